# Behaviour cloning, privileged state
# Each head with chunks of four; the two that need no second pass also with single steps.
# By hand: bash benchmark/commands/bc-state.sh, or seed=1 and one of the lines. In parallel: benchmark/run.py.
for seed in 1 2 3; do
  python bc.py --env-id PickCube-v1 --obs-mode state --num-demos 300 --seed $seed --runs runs/benchmark --run-name bc-pick-state-$seed
  python bc.py --env-id PickCube-v1 --obs-mode state --num-demos 300 --head diffusion --seed $seed --runs runs/benchmark --run-name bc-pick-state-diffusion-$seed
  python bc.py --env-id PickCube-v1 --obs-mode state --num-demos 300 --head mse-chunk --seed $seed --runs runs/benchmark --run-name bc-pick-state-mse-$seed
  python bc.py --env-id PickCube-v1 --obs-mode state --num-demos 300 --chunk-len 1 --seed $seed --runs runs/benchmark --run-name bc-pick-state-single-$seed
  python bc.py --env-id PickCube-v1 --obs-mode state --num-demos 300 --head mse-chunk --chunk-len 1 --seed $seed --runs runs/benchmark --run-name bc-pick-state-mse-single-$seed
  python bc.py --env-id StackCube-v1 --obs-mode state --num-demos 300 --seed $seed --runs runs/benchmark --run-name bc-stack-state-$seed
  python bc.py --env-id StackCube-v1 --obs-mode state --num-demos 300 --head diffusion --seed $seed --runs runs/benchmark --run-name bc-stack-state-diffusion-$seed
  python bc.py --env-id StackCube-v1 --obs-mode state --num-demos 300 --head mse-chunk --seed $seed --runs runs/benchmark --run-name bc-stack-state-mse-$seed
  python bc.py --env-id StackCube-v1 --obs-mode state --num-demos 300 --chunk-len 1 --seed $seed --runs runs/benchmark --run-name bc-stack-state-single-$seed
  python bc.py --env-id StackCube-v1 --obs-mode state --num-demos 300 --head mse-chunk --chunk-len 1 --seed $seed --runs runs/benchmark --run-name bc-stack-state-mse-single-$seed
done
