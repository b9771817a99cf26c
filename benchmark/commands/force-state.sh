# FORCE, privileged state
# From 50 demonstrations and from the default of 300; PushCube with a Q loss that grows, too.
# By hand: bash benchmark/commands/force-state.sh, or seed=1 and one of the lines. In parallel: benchmark/run.py.
for seed in 1 2 3; do
  python bc.py --env-id PushCube-v1 --obs-mode state --num-demos 50 --seed $seed --runs runs/benchmark --run-name bc-push-state-50-$seed
  python force_octo.py --env-id PushCube-v1 --obs-mode state --num-demos 50 --sft-checkpoint runs/benchmark/bc-push-state-50-$seed --online-steps 5000 --gamma 0.95 --q-weight 0.05 --explore-noise 0.1 --candidate-noise 0.1 --seed $seed --runs runs/benchmark --run-name force-push-state-$seed
  python force_octo.py --env-id PushCube-v1 --obs-mode state --num-demos 50 --sft-updates 4000 --online-steps 7000 --num-envs 2 --skip-idle 0.01 --warmup-episodes 60 --warmup-updates 800 --actor-ema 0.998 --q-weight 0.25 --q-weight-end 1.5 --explore-noise 0.1 --candidate-noise 0.1 --seed $seed --runs runs/benchmark --run-name force-push-state-ramp-$seed
  python bc.py --env-id PickCube-v1 --obs-mode state --num-demos 50 --seed $seed --runs runs/benchmark --run-name bc-pick-state-50-$seed
  python force_octo.py --env-id PickCube-v1 --obs-mode state --num-demos 50 --sft-checkpoint runs/benchmark/bc-pick-state-50-$seed --online-steps 5000 --seed $seed --runs runs/benchmark --run-name force-pick-state-$seed
  python bc.py --env-id StackCube-v1 --obs-mode state --num-demos 50 --seed $seed --runs runs/benchmark --run-name bc-stack-state-50-$seed
  python force_octo.py --env-id StackCube-v1 --obs-mode state --num-demos 50 --sft-checkpoint runs/benchmark/bc-stack-state-50-$seed --online-steps 8000 --success-filter True --explore-noise 0 --q-weight 0 --seed $seed --runs runs/benchmark --run-name force-stack-state-$seed
  python force_octo.py --env-id PushCube-v1 --obs-mode state --online-steps 8000 --gamma 0.95 --q-weight 0.05 --explore-noise 0.1 --candidate-noise 0.1 --seed $seed --runs runs/benchmark --run-name force-push-state-300-$seed
  python force_octo.py --env-id PickCube-v1 --obs-mode state --online-steps 5000 --seed $seed --runs runs/benchmark --run-name force-pick-state-300-$seed
  python force_octo.py --env-id StackCube-v1 --obs-mode state --online-steps 8000 --seed $seed --runs runs/benchmark --run-name force-stack-state-300-$seed
done
