# Behaviour cloning, camera
# 300 demonstrations. Two cameras (one on the hand, the default), and the one that looks at the table alone.
# By hand: bash benchmark/commands/bc-rgb.sh, or seed=1 and one of the lines. In parallel: benchmark/run.py.
for seed in 1; do
  python bc.py --env-id PickCube-v1 --num-demos 300 --seed $seed --runs runs/benchmark --run-name bc-pick-rgb-hand-$seed
  python bc.py --env-id PickCube-v1 --cameras primary --num-demos 300 --seed $seed --runs runs/benchmark --run-name bc-pick-rgb-$seed
  python bc.py --env-id StackCube-v1 --num-demos 300 --seed $seed --runs runs/benchmark --run-name bc-stack-rgb-hand-$seed
  python bc.py --env-id StackCube-v1 --cameras primary --num-demos 300 --seed $seed --runs runs/benchmark --run-name bc-stack-rgb-$seed
done
