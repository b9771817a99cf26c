# FORCE on pi0, camera
# Two cameras (one on the hand), a third of the default's demonstrations, half of its updates of stage 0.
# By hand: bash benchmark/commands/pi0-rgb.sh, or seed=1 and one of the lines. In parallel: benchmark/run.py.
for seed in 1; do
  python force_pi0.py --env-id PushCube-v1 --seed $seed --runs runs/benchmark --run-name pi0-push-rgb-$seed
  python force_pi0.py --env-id PickCube-v1 --seed $seed --runs runs/benchmark --run-name pi0-pick-rgb-$seed
done
