# FORCE, camera
# From 50 demonstrations, the default, or from 20, and cloning on them for as many minutes.
# By hand: bash benchmark/commands/force-rgb.sh, or seed=1 and one of the lines. In parallel: benchmark/run.py.
for seed in 1 2 3; do
  python force_octo.py --env-id StackCube-v1 --seed $seed --runs runs/benchmark --run-name force-stack-rgb-50-$seed
  python bc.py --env-id StackCube-v1 --updates 6000 --seed $seed --runs runs/benchmark --run-name bc-stack-rgb-50-$seed
  python force_octo.py --env-id PickCube-v1 --seed $seed --runs runs/benchmark --run-name force-pick-rgb-50-$seed
  python bc.py --env-id PickCube-v1 --updates 6000 --seed $seed --runs runs/benchmark --run-name bc-pick-rgb-50-$seed
  python force_octo.py --env-id PushCube-v1 --num-demos 20 --seed $seed --runs runs/benchmark --run-name force-push-rgb-20-$seed
  python bc.py --env-id PushCube-v1 --num-demos 20 --updates 4000 --seed $seed --runs runs/benchmark --run-name bc-push-rgb-20-$seed
done
