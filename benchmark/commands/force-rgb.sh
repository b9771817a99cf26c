# FORCE, camera
# By hand: bash benchmark/commands/force-rgb.sh, or seed=1 and one of the lines. In parallel: benchmark/run.py.
for seed in 1; do
  python force_octo.py --env-id PickCube-v1 --seed $seed --runs runs/benchmark --run-name force-pick-rgb-$seed
  python force_octo.py --env-id StackCube-v1 --K 20 --seed $seed --runs runs/benchmark --run-name force-stack-rgb-$seed
done
