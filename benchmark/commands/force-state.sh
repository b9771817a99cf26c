# FORCE, privileged state
# From 50 demonstrations, the default, and from 300. PushCube also as one command, with a longer warm-up.
# By hand: bash benchmark/commands/force-state.sh, or seed=1 and one of the lines. In parallel: benchmark/run.py.
for seed in 1 2 3; do
  python bc.py --env-id PushCube-v1 --obs-mode state --seed $seed --runs runs/benchmark --run-name bc-push-state-50-$seed
  python force_octo.py --env-id PushCube-v1 --obs-mode state --sft-checkpoint runs/benchmark/bc-push-state-50-$seed --seed $seed --runs runs/benchmark --run-name force-push-state-$seed
  python force_octo.py --env-id PushCube-v1 --obs-mode state --gamma 0.98 --sft-updates 4000 --online-steps 7000 --num-envs 2 --warmup-episodes 60 --warmup-updates 800 --actor-ema 0.998 --q-weight 0.25 --q-growth 6 --seed $seed --runs runs/benchmark --run-name force-push-state-ramp-$seed
  python bc.py --env-id PickCube-v1 --obs-mode state --seed $seed --runs runs/benchmark --run-name bc-pick-state-50-$seed
  python force_octo.py --env-id PickCube-v1 --obs-mode state --sft-checkpoint runs/benchmark/bc-pick-state-50-$seed --seed $seed --runs runs/benchmark --run-name force-pick-state-$seed
  python bc.py --env-id StackCube-v1 --obs-mode state --seed $seed --runs runs/benchmark --run-name bc-stack-state-50-$seed
  python force_octo.py --env-id StackCube-v1 --obs-mode state --sft-checkpoint runs/benchmark/bc-stack-state-50-$seed --seed $seed --runs runs/benchmark --run-name force-stack-state-$seed
  python force_octo.py --env-id PushCube-v1 --obs-mode state --num-demos 300 --online-steps 8000 --seed $seed --runs runs/benchmark --run-name force-push-state-300-$seed
  python force_octo.py --env-id PickCube-v1 --obs-mode state --num-demos 300 --seed $seed --runs runs/benchmark --run-name force-pick-state-300-$seed
  python force_octo.py --env-id StackCube-v1 --obs-mode state --num-demos 300 --q-weight 0.02 --explore-noise 0.02 --no-success-filter --seed $seed --runs runs/benchmark --run-name force-stack-state-300-$seed
done
