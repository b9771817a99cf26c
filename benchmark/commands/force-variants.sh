# FORCE, variants
# The head alone learns in stage 3, as in the paper. And with the demonstrations' idle steps, in the clone too.
# By hand: bash benchmark/commands/force-variants.sh, or seed=1 and one of the lines. In parallel: benchmark/run.py.
for seed in 1 2 3; do
  # PickCube
  python bc.py --env-id PickCube-v1 --obs-mode state --seed $seed --runs runs/benchmark --run-name bc-pick-state-50-$seed
  python force_octo.py --env-id PickCube-v1 --obs-mode state --sft-checkpoint runs/benchmark/bc-pick-state-50-$seed --seed $seed --runs runs/benchmark --run-name force-pick-state-$seed
  python force_octo.py --env-id PickCube-v1 --obs-mode state --sft-checkpoint runs/benchmark/bc-pick-state-50-$seed --online-finetune head --round-steps 1 --online-lr 3e-4 --utd-ratio 0.3 --seed $seed --runs runs/benchmark --run-name force-pick-state-head-$seed
  python bc.py --env-id PickCube-v1 --obs-mode state --drop-idle 0 --seed $seed --runs runs/benchmark --run-name bc-pick-state-50-idle-$seed
  python force_octo.py --env-id PickCube-v1 --obs-mode state --drop-idle 0 --sft-checkpoint runs/benchmark/bc-pick-state-50-idle-$seed --seed $seed --runs runs/benchmark --run-name force-pick-state-idle-$seed
  # StackCube
  python bc.py --env-id StackCube-v1 --obs-mode state --seed $seed --runs runs/benchmark --run-name bc-stack-state-50-$seed
  python force_octo.py --env-id StackCube-v1 --obs-mode state --sft-checkpoint runs/benchmark/bc-stack-state-50-$seed --seed $seed --runs runs/benchmark --run-name force-stack-state-$seed
  python force_octo.py --env-id StackCube-v1 --obs-mode state --sft-checkpoint runs/benchmark/bc-stack-state-50-$seed --online-finetune head --round-steps 1 --online-lr 3e-4 --utd-ratio 0.3 --seed $seed --runs runs/benchmark --run-name force-stack-state-head-$seed
  python bc.py --env-id StackCube-v1 --obs-mode state --drop-idle 0 --seed $seed --runs runs/benchmark --run-name bc-stack-state-50-idle-$seed
  python force_octo.py --env-id StackCube-v1 --obs-mode state --drop-idle 0 --sft-checkpoint runs/benchmark/bc-stack-state-50-idle-$seed --seed $seed --runs runs/benchmark --run-name force-stack-state-idle-$seed
done
