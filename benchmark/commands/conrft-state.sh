# ConRFT, privileged state
# With and without the planner as operator, HG-DAgger (imitation of the demonstrations and of what the operator did), HIL-SERL's
# recipe (a new head, no imitation, the operator), Cal-QL and CQL (a new head, no imitation, the conservative term online too),
# and ConRFT with the paper's online weight of the Q loss.
# By hand: bash benchmark/commands/conrft-state.sh, or seed=1 and one of the lines. In parallel: benchmark/run.py.
for seed in 1 2 3; do
  # PushCube
  python bc.py --env-id PushCube-v1 --obs-mode state --seed $seed --runs runs/benchmark --run-name bc-push-state-50-$seed
  python conrft.py --env-id PushCube-v1 --obs-mode state --sft-checkpoint runs/benchmark/bc-push-state-50-$seed --seed $seed --runs runs/benchmark --run-name conrft-push-state-$seed
  python conrft.py --env-id PushCube-v1 --obs-mode state --sft-checkpoint runs/benchmark/bc-push-state-50-$seed --fresh-head --bc-weight-offline 0 --q-weight-offline 1 --bc-weight-online 0 --cql-weight-online 0.02 --seed $seed --runs runs/benchmark --run-name calql-push-state-online-$seed
  python conrft.py --env-id PushCube-v1 --obs-mode state --sft-checkpoint runs/benchmark/bc-push-state-50-$seed --fresh-head --no-calibrate --bc-weight-offline 0 --q-weight-offline 1 --bc-weight-online 0 --cql-weight-online 0.02 --seed $seed --runs runs/benchmark --run-name cql-push-state-online-$seed
  # PickCube
  python bc.py --env-id PickCube-v1 --obs-mode state --seed $seed --runs runs/benchmark --run-name bc-pick-state-50-$seed
  python conrft.py --env-id PickCube-v1 --obs-mode state --sft-checkpoint runs/benchmark/bc-pick-state-50-$seed --seed $seed --runs runs/benchmark --run-name conrft-pick-state-$seed
  python conrft.py --env-id PickCube-v1 --obs-mode state --sft-checkpoint runs/benchmark/bc-pick-state-50-$seed --intervention oracle --seed $seed --runs runs/benchmark --run-name conrft-pick-state-oracle-$seed
  python conrft.py --env-id PickCube-v1 --obs-mode state --sft-checkpoint runs/benchmark/bc-pick-state-50-$seed --q-weight-offline 0 --q-weight-online 0 --bc-demo-only --intervention oracle --seed $seed --runs runs/benchmark --run-name hgdagger-pick-state-$seed
  python conrft.py --env-id PickCube-v1 --obs-mode state --sft-checkpoint runs/benchmark/bc-pick-state-50-$seed --fresh-head --offline-updates 0 --bc-weight-online 0 --q-weight-online 1 --intervention oracle --seed $seed --runs runs/benchmark --run-name hilserl-pick-state-$seed
  python conrft.py --env-id PickCube-v1 --obs-mode state --sft-checkpoint runs/benchmark/bc-pick-state-50-$seed --fresh-head --bc-weight-offline 0 --q-weight-offline 1 --bc-weight-online 0 --cql-weight-online 0.02 --seed $seed --runs runs/benchmark --run-name calql-pick-state-online-$seed
  python conrft.py --env-id PickCube-v1 --obs-mode state --sft-checkpoint runs/benchmark/bc-pick-state-50-$seed --fresh-head --no-calibrate --bc-weight-offline 0 --q-weight-offline 1 --bc-weight-online 0 --cql-weight-online 0.02 --seed $seed --runs runs/benchmark --run-name cql-pick-state-online-$seed
  python conrft.py --env-id PickCube-v1 --obs-mode state --sft-checkpoint runs/benchmark/bc-pick-state-50-$seed --online-steps 0 --fresh-head --seed $seed --runs runs/benchmark --run-name calconrft-pick-state-$seed
  python conrft.py --env-id PickCube-v1 --obs-mode state --sft-checkpoint runs/benchmark/bc-pick-state-50-$seed --online-steps 0 --fresh-head --bc-weight-offline 0 --q-weight-offline 1 --seed $seed --runs runs/benchmark --run-name calql-pick-state-$seed
  python conrft.py --env-id PickCube-v1 --obs-mode state --sft-checkpoint runs/benchmark/bc-pick-state-50-$seed --q-weight-online 1 --seed $seed --runs runs/benchmark --run-name conrft-pick-state-strong-$seed
  python conrft.py --env-id PickCube-v1 --obs-mode state --sft-checkpoint runs/benchmark/bc-pick-state-50-$seed --q-weight-online 1 --cql-weight-online 0.02 --seed $seed --runs runs/benchmark --run-name conrft-pick-state-strong-cql-$seed
  python conrft.py --env-id PickCube-v1 --obs-mode state --sft-checkpoint runs/benchmark/bc-pick-state-50-$seed --q-weight-online 1 --onestep-mse 1 --seed $seed --runs runs/benchmark --run-name conrft-pick-state-strong-onestep-$seed
  # PickCube from 20 demonstrations, as few as in the paper
  python bc.py --env-id PickCube-v1 --obs-mode state --num-demos 20 --seed $seed --runs runs/benchmark --run-name bc-pick-state-20-$seed
  python conrft.py --env-id PickCube-v1 --obs-mode state --num-demos 20 --sft-checkpoint runs/benchmark/bc-pick-state-20-$seed --seed $seed --runs runs/benchmark --run-name conrft-pick-state-20-$seed
  python conrft.py --env-id PickCube-v1 --obs-mode state --num-demos 20 --sft-checkpoint runs/benchmark/bc-pick-state-20-$seed --intervention oracle --seed $seed --runs runs/benchmark --run-name conrft-pick-state-20-oracle-$seed
  # StackCube
  python bc.py --env-id StackCube-v1 --obs-mode state --seed $seed --runs runs/benchmark --run-name bc-stack-state-50-$seed
  python conrft.py --env-id StackCube-v1 --obs-mode state --sft-checkpoint runs/benchmark/bc-stack-state-50-$seed --seed $seed --runs runs/benchmark --run-name conrft-stack-state-$seed
  python conrft.py --env-id StackCube-v1 --obs-mode state --sft-checkpoint runs/benchmark/bc-stack-state-50-$seed --intervention oracle --seed $seed --runs runs/benchmark --run-name conrft-stack-state-oracle-$seed
  python conrft.py --env-id StackCube-v1 --obs-mode state --sft-checkpoint runs/benchmark/bc-stack-state-50-$seed --q-weight-offline 0 --q-weight-online 0 --bc-demo-only --intervention oracle --seed $seed --runs runs/benchmark --run-name hgdagger-stack-state-$seed
  python conrft.py --env-id StackCube-v1 --obs-mode state --sft-checkpoint runs/benchmark/bc-stack-state-50-$seed --fresh-head --offline-updates 0 --bc-weight-online 0 --q-weight-online 1 --intervention oracle --seed $seed --runs runs/benchmark --run-name hilserl-stack-state-$seed
done
