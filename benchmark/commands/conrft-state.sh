# ConRFT, privileged state
# 50 demonstrations. Without and with the planner as operator; offline stage alone, with and without imitation; Cal-QL
# and CQL with online steps; changes to ConRFT one at a time.
# By hand: bash benchmark/commands/conrft-state.sh, or seed=1 and one of the lines. In parallel: benchmark/run.py.
for seed in 1 2 3; do
  # PushCube
  python bc.py --env-id PushCube-v1 --obs-mode state --seed $seed --runs runs/benchmark --run-name bc-push-state-50-$seed
  python conrft.py --env-id PushCube-v1 --obs-mode state --sft-checkpoint runs/benchmark/bc-push-state-50-$seed --seed $seed --runs runs/benchmark --run-name conrft-push-state-$seed
  python conrft.py --env-id PushCube-v1 --obs-mode state --sft-checkpoint runs/benchmark/bc-push-state-50-$seed --online-steps 10000 --seed $seed --runs runs/benchmark --run-name conrft-push-state-10k-$seed
  python conrft.py --env-id PushCube-v1 --obs-mode state --sft-checkpoint runs/benchmark/bc-push-state-50-$seed --fresh-head --bc-weight-offline 0 --q-weight-offline 1 --bc-weight-online 0 --cql-weight-online 0.02 --seed $seed --runs runs/benchmark --run-name calql-push-state-online-$seed
  python conrft.py --env-id PushCube-v1 --obs-mode state --sft-checkpoint runs/benchmark/bc-push-state-50-$seed --fresh-head --no-calibrate --bc-weight-offline 0 --q-weight-offline 1 --bc-weight-online 0 --cql-weight-online 0.02 --seed $seed --runs runs/benchmark --run-name cql-push-state-online-$seed
  # PickCube
  python bc.py --env-id PickCube-v1 --obs-mode state --seed $seed --runs runs/benchmark --run-name bc-pick-state-50-$seed
  python conrft.py --env-id PickCube-v1 --obs-mode state --sft-checkpoint runs/benchmark/bc-pick-state-50-$seed --seed $seed --runs runs/benchmark --run-name conrft-pick-state-$seed
  python conrft.py --env-id PickCube-v1 --obs-mode state --sft-checkpoint runs/benchmark/bc-pick-state-50-$seed --intervention oracle --seed $seed --runs runs/benchmark --run-name conrft-pick-state-oracle-$seed
  python conrft.py --env-id PickCube-v1 --obs-mode state --sft-checkpoint runs/benchmark/bc-pick-state-50-$seed --online-steps 0 --fresh-head --seed $seed --runs runs/benchmark --run-name calconrft-pick-state-$seed
  python conrft.py --env-id PickCube-v1 --obs-mode state --sft-checkpoint runs/benchmark/bc-pick-state-50-$seed --online-steps 0 --fresh-head --bc-weight-offline 0 --q-weight-offline 1 --seed $seed --runs runs/benchmark --run-name calql-pick-state-$seed
  python conrft.py --env-id PickCube-v1 --obs-mode state --sft-checkpoint runs/benchmark/bc-pick-state-50-$seed --fresh-head --bc-weight-offline 0 --q-weight-offline 1 --bc-weight-online 0 --cql-weight-online 0.02 --seed $seed --runs runs/benchmark --run-name calql-pick-state-online-$seed
  python conrft.py --env-id PickCube-v1 --obs-mode state --sft-checkpoint runs/benchmark/bc-pick-state-50-$seed --fresh-head --no-calibrate --bc-weight-offline 0 --q-weight-offline 1 --bc-weight-online 0 --cql-weight-online 0.02 --seed $seed --runs runs/benchmark --run-name cql-pick-state-online-$seed
  python conrft.py --env-id PickCube-v1 --obs-mode state --sft-checkpoint runs/benchmark/bc-pick-state-50-$seed --q-scale mean-abs --seed $seed --runs runs/benchmark --run-name conrft-pick-state-meanq-$seed
  python conrft.py --env-id PickCube-v1 --obs-mode state --sft-checkpoint runs/benchmark/bc-pick-state-50-$seed --onestep-mse 1 --seed $seed --runs runs/benchmark --run-name conrft-pick-state-onestep-$seed
  python conrft.py --env-id PickCube-v1 --obs-mode state --sft-checkpoint runs/benchmark/bc-pick-state-50-$seed --bc-demo-only --seed $seed --runs runs/benchmark --run-name conrft-pick-state-demobc-$seed
  python conrft.py --env-id PickCube-v1 --obs-mode state --sft-checkpoint runs/benchmark/bc-pick-state-50-$seed --cql-weight-online 0.02 --seed $seed --runs runs/benchmark --run-name conrft-pick-state-cql-$seed
  # PickCube from 20 demonstrations, as few as in the paper
  python bc.py --env-id PickCube-v1 --obs-mode state --num-demos 20 --seed $seed --runs runs/benchmark --run-name bc-pick-state-20-$seed
  python conrft.py --env-id PickCube-v1 --obs-mode state --num-demos 20 --sft-checkpoint runs/benchmark/bc-pick-state-20-$seed --cql-weight-online 0.02 --seed $seed --runs runs/benchmark --run-name conrft-pick-state-20-cql-$seed
  # PickCube from 30 demonstrations; the planner takes over early, while there is time left
  python bc.py --env-id PickCube-v1 --obs-mode state --num-demos 30 --seed $seed --runs runs/benchmark --run-name bc-pick-state-30-$seed
  python conrft.py --env-id PickCube-v1 --obs-mode state --num-demos 30 --sft-checkpoint runs/benchmark/bc-pick-state-30-$seed --online-steps 10000 --cql-weight-online 0.02 --seed $seed --runs runs/benchmark --run-name conrft-pick-state-30-cql-$seed
  python conrft.py --env-id PickCube-v1 --obs-mode state --num-demos 30 --sft-checkpoint runs/benchmark/bc-pick-state-30-$seed --online-steps 10000 --intervention oracle --takeover-after 30 --cql-weight-online 0.02 --seed $seed --runs runs/benchmark --run-name conrft-pick-state-30-oracle-cql-$seed
  # StackCube
  python bc.py --env-id StackCube-v1 --obs-mode state --seed $seed --runs runs/benchmark --run-name bc-stack-state-50-$seed
  python conrft.py --env-id StackCube-v1 --obs-mode state --sft-checkpoint runs/benchmark/bc-stack-state-50-$seed --seed $seed --runs runs/benchmark --run-name conrft-stack-state-$seed
  python conrft.py --env-id StackCube-v1 --obs-mode state --sft-checkpoint runs/benchmark/bc-stack-state-50-$seed --intervention oracle --seed $seed --runs runs/benchmark --run-name conrft-stack-state-oracle-$seed
  python conrft.py --env-id StackCube-v1 --obs-mode state --sft-checkpoint runs/benchmark/bc-stack-state-50-$seed --cql-weight-online 0.02 --seed $seed --runs runs/benchmark --run-name conrft-stack-state-cql-$seed
done
