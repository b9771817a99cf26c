# Tuning
# What each method's defaults were chosen by: three settings, two tasks, two seeds, 15,000 control steps, and episodes of their
# own. 50 demonstrations, from privileged state. FORCE and ConRFT start from the first clone of a task. PushCube has ConRFT
# alone, with 8,000 control steps.
# By hand: bash benchmark/commands/tuning.sh, or seed=101 and one of the lines. In parallel: benchmark/run.py.
for seed in 101 102; do
  # PickCube
  python bc.py --env-id PickCube-v1 --obs-mode state --lr 2e-3 --eval-seed 1500000000 --eval-episodes 60 --seed $seed --runs runs/benchmark --run-name bc-pick-$seed
  python bc.py --env-id PickCube-v1 --obs-mode state --lr 1e-3 --eval-seed 1500000000 --eval-episodes 60 --seed $seed --runs runs/benchmark --run-name bc-pick-lr1e-3-$seed
  python bc.py --env-id PickCube-v1 --obs-mode state --lr 4e-3 --eval-seed 1500000000 --eval-episodes 60 --seed $seed --runs runs/benchmark --run-name bc-pick-lr4e-3-$seed
  python conrft.py --env-id PickCube-v1 --obs-mode state --sft-checkpoint runs/benchmark/bc-pick-$seed --online-steps 15000 --q-weight-online 0.03 --eval-seed 1500000000 --eval-episodes 60 --seed $seed --runs runs/benchmark --run-name conrft-pick-q003-$seed
  python conrft.py --env-id PickCube-v1 --obs-mode state --sft-checkpoint runs/benchmark/bc-pick-$seed --online-steps 15000 --q-weight-online 0.1 --eval-seed 1500000000 --eval-episodes 60 --seed $seed --runs runs/benchmark --run-name conrft-pick-q01-$seed
  python conrft.py --env-id PickCube-v1 --obs-mode state --sft-checkpoint runs/benchmark/bc-pick-$seed --online-steps 15000 --q-weight-online 0.3 --eval-seed 1500000000 --eval-episodes 60 --seed $seed --runs runs/benchmark --run-name conrft-pick-q03-$seed
  python force_octo.py --env-id PickCube-v1 --obs-mode state --sft-checkpoint runs/benchmark/bc-pick-$seed --online-steps 15000 --q-weight 0 --eval-seed 1500000000 --eval-episodes 60 --seed $seed --runs runs/benchmark --run-name force-pick-q0-$seed
  python force_octo.py --env-id PickCube-v1 --obs-mode state --sft-checkpoint runs/benchmark/bc-pick-$seed --online-steps 15000 --q-weight 0.02 --eval-seed 1500000000 --eval-episodes 60 --seed $seed --runs runs/benchmark --run-name force-pick-q002-$seed
  python force_octo.py --env-id PickCube-v1 --obs-mode state --sft-checkpoint runs/benchmark/bc-pick-$seed --online-steps 15000 --q-weight 0.05 --eval-seed 1500000000 --eval-episodes 60 --seed $seed --runs runs/benchmark --run-name force-pick-q005-$seed
  python co_rft_chunked.py --env-id PickCube-v1 --obs-mode state --cql-alpha 0.005 --actor-until rest --eval-seed 1500000000 --eval-episodes 60 --seed $seed --runs runs/benchmark --run-name corft-pick-default-$seed
  python co_rft_chunked.py --env-id PickCube-v1 --obs-mode state --cql-alpha 0.05 --actor-until rest --eval-seed 1500000000 --eval-episodes 60 --seed $seed --runs runs/benchmark --run-name corft-pick-alpha005-$seed
  python co_rft_chunked.py --env-id PickCube-v1 --obs-mode state --cql-alpha 0.005 --actor-until end --eval-seed 1500000000 --eval-episodes 60 --seed $seed --runs runs/benchmark --run-name corft-pick-end-$seed
  # StackCube
  python bc.py --env-id StackCube-v1 --obs-mode state --lr 2e-3 --eval-seed 1500000000 --eval-episodes 60 --seed $seed --runs runs/benchmark --run-name bc-stack-$seed
  python bc.py --env-id StackCube-v1 --obs-mode state --lr 1e-3 --eval-seed 1500000000 --eval-episodes 60 --seed $seed --runs runs/benchmark --run-name bc-stack-lr1e-3-$seed
  python bc.py --env-id StackCube-v1 --obs-mode state --lr 4e-3 --eval-seed 1500000000 --eval-episodes 60 --seed $seed --runs runs/benchmark --run-name bc-stack-lr4e-3-$seed
  python conrft.py --env-id StackCube-v1 --obs-mode state --sft-checkpoint runs/benchmark/bc-stack-$seed --online-steps 15000 --q-weight-online 0.03 --eval-seed 1500000000 --eval-episodes 60 --seed $seed --runs runs/benchmark --run-name conrft-stack-q003-$seed
  python conrft.py --env-id StackCube-v1 --obs-mode state --sft-checkpoint runs/benchmark/bc-stack-$seed --online-steps 15000 --q-weight-online 0.1 --eval-seed 1500000000 --eval-episodes 60 --seed $seed --runs runs/benchmark --run-name conrft-stack-q01-$seed
  python conrft.py --env-id StackCube-v1 --obs-mode state --sft-checkpoint runs/benchmark/bc-stack-$seed --online-steps 15000 --q-weight-online 0.3 --eval-seed 1500000000 --eval-episodes 60 --seed $seed --runs runs/benchmark --run-name conrft-stack-q03-$seed
  python force_octo.py --env-id StackCube-v1 --obs-mode state --sft-checkpoint runs/benchmark/bc-stack-$seed --online-steps 15000 --q-weight 0 --eval-seed 1500000000 --eval-episodes 60 --seed $seed --runs runs/benchmark --run-name force-stack-q0-$seed
  python force_octo.py --env-id StackCube-v1 --obs-mode state --sft-checkpoint runs/benchmark/bc-stack-$seed --online-steps 15000 --q-weight 0.02 --eval-seed 1500000000 --eval-episodes 60 --seed $seed --runs runs/benchmark --run-name force-stack-q002-$seed
  python force_octo.py --env-id StackCube-v1 --obs-mode state --sft-checkpoint runs/benchmark/bc-stack-$seed --online-steps 15000 --q-weight 0.05 --eval-seed 1500000000 --eval-episodes 60 --seed $seed --runs runs/benchmark --run-name force-stack-q005-$seed
  python co_rft_chunked.py --env-id StackCube-v1 --obs-mode state --cql-alpha 0.005 --actor-until rest --eval-seed 1500000000 --eval-episodes 60 --seed $seed --runs runs/benchmark --run-name corft-stack-default-$seed
  python co_rft_chunked.py --env-id StackCube-v1 --obs-mode state --cql-alpha 0.05 --actor-until rest --eval-seed 1500000000 --eval-episodes 60 --seed $seed --runs runs/benchmark --run-name corft-stack-alpha005-$seed
  python co_rft_chunked.py --env-id StackCube-v1 --obs-mode state --cql-alpha 0.005 --actor-until end --eval-seed 1500000000 --eval-episodes 60 --seed $seed --runs runs/benchmark --run-name corft-stack-end-$seed
  # PushCube: what pushing wants of ConRFT's Q loss. FORCE's flags for pushing were chosen before (benchmark/README.md)
  python bc.py --env-id PushCube-v1 --obs-mode state --eval-seed 1500000000 --eval-episodes 60 --seed $seed --runs runs/benchmark --run-name bc-push-$seed
  python conrft.py --env-id PushCube-v1 --obs-mode state --sft-checkpoint runs/benchmark/bc-push-$seed --online-steps 8000 --q-weight-online 0.1 --eval-seed 1500000000 --eval-episodes 60 --seed $seed --runs runs/benchmark --run-name conrft-push-q01-$seed
  python conrft.py --env-id PushCube-v1 --obs-mode state --sft-checkpoint runs/benchmark/bc-push-$seed --online-steps 8000 --q-weight-online 0.3 --eval-seed 1500000000 --eval-episodes 60 --seed $seed --runs runs/benchmark --run-name conrft-push-q03-$seed
  python conrft.py --env-id PushCube-v1 --obs-mode state --sft-checkpoint runs/benchmark/bc-push-$seed --online-steps 8000 --q-weight-online 1 --eval-seed 1500000000 --eval-episodes 60 --seed $seed --runs runs/benchmark --run-name conrft-push-q1-$seed
done
