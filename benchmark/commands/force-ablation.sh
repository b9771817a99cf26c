# FORCE, ablations
# 50 demonstrations, five pairs of runs: each starts from the same clone as FORCE's run of that seed. By chance: VGPD with any
# of its candidates, the control for what the critic's choice adds.
# By hand: bash benchmark/commands/force-ablation.sh, or seed=1 and one of the lines. In parallel: benchmark/run.py.
for seed in 1 2 3 4 5; do
  # PushCube
  python bc.py --env-id PushCube-v1 --obs-mode state --seed $seed --runs runs/benchmark --run-name bc-push-state-50-$seed
  python force_octo.py --env-id PushCube-v1 --obs-mode state --sft-checkpoint runs/benchmark/bc-push-state-50-$seed --seed $seed --runs runs/benchmark --run-name force-push-state-$seed
  python force_octo.py --env-id PushCube-v1 --obs-mode state --sft-checkpoint runs/benchmark/bc-push-state-50-$seed --no-warmup --seed $seed --runs runs/benchmark --run-name force-push-state-no-warmup-$seed
  python force_octo.py --env-id PushCube-v1 --obs-mode state --sft-checkpoint runs/benchmark/bc-push-state-50-$seed --no-vgpd --seed $seed --runs runs/benchmark --run-name force-push-state-no-vgpd-$seed
  python force_octo.py --env-id PushCube-v1 --obs-mode state --sft-checkpoint runs/benchmark/bc-push-state-50-$seed --by-chance --seed $seed --runs runs/benchmark --run-name force-push-state-chance-$seed
  python force_octo.py --env-id PushCube-v1 --obs-mode state --sft-checkpoint runs/benchmark/bc-push-state-50-$seed --no-warmup --no-vgpd --seed $seed --runs runs/benchmark --run-name force-push-state-neither-$seed
  # PullCube
  python bc.py --env-id PullCube-v1 --obs-mode state --seed $seed --runs runs/benchmark --run-name bc-pull-state-50-$seed
  python force_octo.py --env-id PullCube-v1 --obs-mode state --sft-checkpoint runs/benchmark/bc-pull-state-50-$seed --seed $seed --runs runs/benchmark --run-name force-pull-state-$seed
  python force_octo.py --env-id PullCube-v1 --obs-mode state --sft-checkpoint runs/benchmark/bc-pull-state-50-$seed --no-warmup --seed $seed --runs runs/benchmark --run-name force-pull-state-no-warmup-$seed
  python force_octo.py --env-id PullCube-v1 --obs-mode state --sft-checkpoint runs/benchmark/bc-pull-state-50-$seed --no-vgpd --seed $seed --runs runs/benchmark --run-name force-pull-state-no-vgpd-$seed
  python force_octo.py --env-id PullCube-v1 --obs-mode state --sft-checkpoint runs/benchmark/bc-pull-state-50-$seed --by-chance --seed $seed --runs runs/benchmark --run-name force-pull-state-chance-$seed
  python force_octo.py --env-id PullCube-v1 --obs-mode state --sft-checkpoint runs/benchmark/bc-pull-state-50-$seed --no-warmup --no-vgpd --seed $seed --runs runs/benchmark --run-name force-pull-state-neither-$seed
  # PickCube
  python bc.py --env-id PickCube-v1 --obs-mode state --seed $seed --runs runs/benchmark --run-name bc-pick-state-50-$seed
  python force_octo.py --env-id PickCube-v1 --obs-mode state --sft-checkpoint runs/benchmark/bc-pick-state-50-$seed --seed $seed --runs runs/benchmark --run-name force-pick-state-$seed
  python force_octo.py --env-id PickCube-v1 --obs-mode state --sft-checkpoint runs/benchmark/bc-pick-state-50-$seed --no-warmup --seed $seed --runs runs/benchmark --run-name force-pick-state-no-warmup-$seed
  python force_octo.py --env-id PickCube-v1 --obs-mode state --sft-checkpoint runs/benchmark/bc-pick-state-50-$seed --no-vgpd --seed $seed --runs runs/benchmark --run-name force-pick-state-no-vgpd-$seed
  python force_octo.py --env-id PickCube-v1 --obs-mode state --sft-checkpoint runs/benchmark/bc-pick-state-50-$seed --by-chance --seed $seed --runs runs/benchmark --run-name force-pick-state-chance-$seed
  python force_octo.py --env-id PickCube-v1 --obs-mode state --sft-checkpoint runs/benchmark/bc-pick-state-50-$seed --no-warmup --no-vgpd --seed $seed --runs runs/benchmark --run-name force-pick-state-neither-$seed
  # StackCube
  python bc.py --env-id StackCube-v1 --obs-mode state --seed $seed --runs runs/benchmark --run-name bc-stack-state-50-$seed
  python force_octo.py --env-id StackCube-v1 --obs-mode state --sft-checkpoint runs/benchmark/bc-stack-state-50-$seed --seed $seed --runs runs/benchmark --run-name force-stack-state-$seed
  python force_octo.py --env-id StackCube-v1 --obs-mode state --sft-checkpoint runs/benchmark/bc-stack-state-50-$seed --no-warmup --seed $seed --runs runs/benchmark --run-name force-stack-state-no-warmup-$seed
  python force_octo.py --env-id StackCube-v1 --obs-mode state --sft-checkpoint runs/benchmark/bc-stack-state-50-$seed --no-vgpd --seed $seed --runs runs/benchmark --run-name force-stack-state-no-vgpd-$seed
  python force_octo.py --env-id StackCube-v1 --obs-mode state --sft-checkpoint runs/benchmark/bc-stack-state-50-$seed --by-chance --seed $seed --runs runs/benchmark --run-name force-stack-state-chance-$seed
  python force_octo.py --env-id StackCube-v1 --obs-mode state --sft-checkpoint runs/benchmark/bc-stack-state-50-$seed --no-warmup --no-vgpd --seed $seed --runs runs/benchmark --run-name force-stack-state-neither-$seed
done
