# FORCE on pi0, privileged state
# 50 demonstrations. The one-step head, and pi0's own flow head on PushCube. Cloning alone on pi0.5.
# By hand: bash benchmark/commands/pi0-state.sh, or seed=1 and one of the lines. In parallel: benchmark/run.py.
for seed in 1 2 3; do
  python force_pi0.py --env-id PushCube-v1 --obs-mode state --seed $seed --runs runs/benchmark --run-name pi0-push-state-$seed
  python force_pi0.py --env-id PickCube-v1 --obs-mode state --seed $seed --runs runs/benchmark --run-name pi0-pick-state-$seed
  python force_pi0.py --env-id StackCube-v1 --obs-mode state --seed $seed --runs runs/benchmark --run-name pi0-stack-state-$seed
  python force_pi0.py --env-id PushCube-v1 --obs-mode state --online-steps 5000 --head flow --seed $seed --runs runs/benchmark --run-name pi0-push-state-flow-$seed
  python force_pi0.py --env-id PushCube-v1 --obs-mode state --backbone pi05-compact --offline-updates 0 --no-warmup --online-steps 0 --seed $seed --runs runs/benchmark --run-name pi05-push-state-bc-$seed
  python force_pi0.py --env-id PickCube-v1 --obs-mode state --backbone pi05-compact --offline-updates 0 --no-warmup --online-steps 0 --seed $seed --runs runs/benchmark --run-name pi05-pick-state-bc-$seed
  python force_pi0.py --env-id StackCube-v1 --obs-mode state --backbone pi05-compact --offline-updates 0 --no-warmup --online-steps 0 --seed $seed --runs runs/benchmark --run-name pi05-stack-state-bc-$seed
done
