# Behaviour cloning, camera
# By hand: bash benchmark/commands/bc-rgb.sh, or seed=1 and one of the lines. In parallel: benchmark/run.py.
for seed in 1; do
  python bc.py --env-id PickCube-v1 --seed $seed --runs runs/benchmark --run-name bc-pick-rgb-$seed
  python bc.py --env-id StackCube-v1 --seed $seed --runs runs/benchmark --run-name bc-stack-rgb-$seed
done
