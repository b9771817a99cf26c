# Behaviour cloning, privileged state
# Each head with chunks of four; the two that need no second pass also with single steps. From 50 demonstrations, the
# diffusion head from 150 as well, and the one-step head from 300.
# By hand: bash benchmark/commands/bc-state.sh, or seed=1 and one of the lines. In parallel: benchmark/run.py.
for seed in 1 2 3; do
  # PickCube
  python bc.py --env-id PickCube-v1 --obs-mode state --seed $seed --runs runs/benchmark --run-name bc-pick-state-50-$seed
  python bc.py --env-id PickCube-v1 --obs-mode state --chunk-len 1 --seed $seed --runs runs/benchmark --run-name bc-pick-state-50-single-$seed
  python bc.py --env-id PickCube-v1 --obs-mode state --head diffusion --seed $seed --runs runs/benchmark --run-name bc-pick-state-50-diffusion-$seed
  python bc.py --env-id PickCube-v1 --obs-mode state --head mse-chunk --seed $seed --runs runs/benchmark --run-name bc-pick-state-50-mse-$seed
  python bc.py --env-id PickCube-v1 --obs-mode state --head mse-chunk --chunk-len 1 --seed $seed --runs runs/benchmark --run-name bc-pick-state-50-mse-single-$seed
  python bc.py --env-id PickCube-v1 --obs-mode state --num-demos 150 --head diffusion --seed $seed --runs runs/benchmark --run-name bc-pick-state-150-diffusion-$seed
  python bc.py --env-id PickCube-v1 --obs-mode state --num-demos 300 --seed $seed --runs runs/benchmark --run-name bc-pick-state-300-$seed
  # StackCube
  python bc.py --env-id StackCube-v1 --obs-mode state --seed $seed --runs runs/benchmark --run-name bc-stack-state-50-$seed
  python bc.py --env-id StackCube-v1 --obs-mode state --chunk-len 1 --seed $seed --runs runs/benchmark --run-name bc-stack-state-50-single-$seed
  python bc.py --env-id StackCube-v1 --obs-mode state --head diffusion --seed $seed --runs runs/benchmark --run-name bc-stack-state-50-diffusion-$seed
  python bc.py --env-id StackCube-v1 --obs-mode state --head mse-chunk --seed $seed --runs runs/benchmark --run-name bc-stack-state-50-mse-$seed
  python bc.py --env-id StackCube-v1 --obs-mode state --head mse-chunk --chunk-len 1 --seed $seed --runs runs/benchmark --run-name bc-stack-state-50-mse-single-$seed
  python bc.py --env-id StackCube-v1 --obs-mode state --num-demos 150 --head diffusion --seed $seed --runs runs/benchmark --run-name bc-stack-state-150-diffusion-$seed
  python bc.py --env-id StackCube-v1 --obs-mode state --num-demos 300 --seed $seed --runs runs/benchmark --run-name bc-stack-state-300-$seed
done
