# FORCE on pi0, camera
# Two cameras (one on the hand), 100 demonstrations, 4,000 control steps.
# By hand: bash benchmark/commands/pi0-rgb.sh, or seed=1 and one of the lines. In parallel: benchmark/run.py.
for seed in 1; do
  python force_pi0.py --env-id PushCube-v1 --seed $seed --runs runs/benchmark --run-name pi0-push-rgb-$seed
  python force_pi0.py --env-id PickCube-v1 --seed $seed --runs runs/benchmark --run-name pi0-pick-rgb-$seed
done
