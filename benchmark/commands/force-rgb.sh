# FORCE, camera
# Two cameras (one on the hand, the default), and the one that looks at the table alone.
# By hand: bash benchmark/commands/force-rgb.sh, or seed=1 and one of the lines. In parallel: benchmark/run.py.
for seed in 1; do
  python force_octo.py --env-id PickCube-v1 --seed $seed --runs runs/benchmark --run-name force-pick-rgb-hand-$seed
  python force_octo.py --env-id StackCube-v1 --seed $seed --runs runs/benchmark --run-name force-stack-rgb-hand-$seed
  python force_octo.py --env-id StackCube-v1 --cameras primary --seed $seed --runs runs/benchmark --run-name force-stack-rgb-$seed
done
