# From few demonstrations, privileged state
# 10, 20 and 30 demonstrations, where cloning is weak. FORCE and ConRFT start from the clone above them.
# By hand: bash benchmark/commands/few-state.sh, or seed=1 and one of the lines. In parallel: benchmark/run.py.
for seed in 1 2 3; do
  # PushCube, 10
  python bc.py --env-id PushCube-v1 --obs-mode state --num-demos 10 --seed $seed --runs runs/benchmark --run-name bc-push-state-10-$seed
  python conrft.py --env-id PushCube-v1 --obs-mode state --num-demos 10 --sft-checkpoint runs/benchmark/bc-push-state-10-$seed --seed $seed --runs runs/benchmark --run-name conrft-push-state-10-$seed
  python force_octo.py --env-id PushCube-v1 --obs-mode state --num-demos 10 --sft-checkpoint runs/benchmark/bc-push-state-10-$seed --seed $seed --runs runs/benchmark --run-name force-push-state-10-$seed
  # PushCube, 20
  python bc.py --env-id PushCube-v1 --obs-mode state --num-demos 20 --seed $seed --runs runs/benchmark --run-name bc-push-state-20-$seed
  python conrft.py --env-id PushCube-v1 --obs-mode state --num-demos 20 --sft-checkpoint runs/benchmark/bc-push-state-20-$seed --seed $seed --runs runs/benchmark --run-name conrft-push-state-20-$seed
  python force_octo.py --env-id PushCube-v1 --obs-mode state --num-demos 20 --sft-checkpoint runs/benchmark/bc-push-state-20-$seed --seed $seed --runs runs/benchmark --run-name force-push-state-20-$seed
  # PickCube, 10
  python bc.py --env-id PickCube-v1 --obs-mode state --num-demos 10 --seed $seed --runs runs/benchmark --run-name bc-pick-state-10-$seed
  python conrft.py --env-id PickCube-v1 --obs-mode state --num-demos 10 --sft-checkpoint runs/benchmark/bc-pick-state-10-$seed --seed $seed --runs runs/benchmark --run-name conrft-pick-state-10-$seed
  python force_octo.py --env-id PickCube-v1 --obs-mode state --num-demos 10 --sft-checkpoint runs/benchmark/bc-pick-state-10-$seed --seed $seed --runs runs/benchmark --run-name force-pick-state-10-$seed
  # PickCube, 20
  python bc.py --env-id PickCube-v1 --obs-mode state --num-demos 20 --seed $seed --runs runs/benchmark --run-name bc-pick-state-20-$seed
  python conrft.py --env-id PickCube-v1 --obs-mode state --num-demos 20 --sft-checkpoint runs/benchmark/bc-pick-state-20-$seed --seed $seed --runs runs/benchmark --run-name conrft-pick-state-20-$seed
  python force_octo.py --env-id PickCube-v1 --obs-mode state --num-demos 20 --sft-checkpoint runs/benchmark/bc-pick-state-20-$seed --seed $seed --runs runs/benchmark --run-name force-pick-state-20-$seed
  # PickCube, 30
  python bc.py --env-id PickCube-v1 --obs-mode state --num-demos 30 --seed $seed --runs runs/benchmark --run-name bc-pick-state-30-$seed
  python conrft.py --env-id PickCube-v1 --obs-mode state --num-demos 30 --sft-checkpoint runs/benchmark/bc-pick-state-30-$seed --seed $seed --runs runs/benchmark --run-name conrft-pick-state-30-$seed
  python force_octo.py --env-id PickCube-v1 --obs-mode state --num-demos 30 --sft-checkpoint runs/benchmark/bc-pick-state-30-$seed --seed $seed --runs runs/benchmark --run-name force-pick-state-30-$seed
  # StackCube, 10
  python bc.py --env-id StackCube-v1 --obs-mode state --num-demos 10 --seed $seed --runs runs/benchmark --run-name bc-stack-state-10-$seed
  python conrft.py --env-id StackCube-v1 --obs-mode state --num-demos 10 --sft-checkpoint runs/benchmark/bc-stack-state-10-$seed --seed $seed --runs runs/benchmark --run-name conrft-stack-state-10-$seed
  python force_octo.py --env-id StackCube-v1 --obs-mode state --num-demos 10 --sft-checkpoint runs/benchmark/bc-stack-state-10-$seed --seed $seed --runs runs/benchmark --run-name force-stack-state-10-$seed
  # StackCube, 20
  python bc.py --env-id StackCube-v1 --obs-mode state --num-demos 20 --seed $seed --runs runs/benchmark --run-name bc-stack-state-20-$seed
  python conrft.py --env-id StackCube-v1 --obs-mode state --num-demos 20 --sft-checkpoint runs/benchmark/bc-stack-state-20-$seed --seed $seed --runs runs/benchmark --run-name conrft-stack-state-20-$seed
  python force_octo.py --env-id StackCube-v1 --obs-mode state --num-demos 20 --sft-checkpoint runs/benchmark/bc-stack-state-20-$seed --seed $seed --runs runs/benchmark --run-name force-stack-state-20-$seed
  # StackCube, 30
  python bc.py --env-id StackCube-v1 --obs-mode state --num-demos 30 --seed $seed --runs runs/benchmark --run-name bc-stack-state-30-$seed
  python conrft.py --env-id StackCube-v1 --obs-mode state --num-demos 30 --sft-checkpoint runs/benchmark/bc-stack-state-30-$seed --seed $seed --runs runs/benchmark --run-name conrft-stack-state-30-$seed
  python force_octo.py --env-id StackCube-v1 --obs-mode state --num-demos 30 --sft-checkpoint runs/benchmark/bc-stack-state-30-$seed --seed $seed --runs runs/benchmark --run-name force-stack-state-30-$seed
done
