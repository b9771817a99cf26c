# CO-RFT, privileged state
# 50 demonstrations; objects start at random or in one place, and evaluation starts there and elsewhere.
# By hand: bash benchmark/commands/corft-state.sh, or seed=1 and one of the lines. In parallel: benchmark/run.py.
for seed in 1 2 3; do
  # PushCube
  python co_rft_chunked.py --env-id PushCube-v1 --obs-mode state --eval-elsewhere --seed $seed --runs runs/benchmark --run-name corft-push-state-$seed
  python co_rft_chunked.py --env-id PushCube-v1 --obs-mode state --spawn fixed --eval-elsewhere --seed $seed --runs runs/benchmark --run-name corft-push-state-fixed-$seed
  # PickCube
  python co_rft_chunked.py --env-id PickCube-v1 --obs-mode state --eval-elsewhere --seed $seed --runs runs/benchmark --run-name corft-pick-state-$seed
  python co_rft_chunked.py --env-id PickCube-v1 --obs-mode state --spawn fixed --eval-elsewhere --seed $seed --runs runs/benchmark --run-name corft-pick-state-fixed-$seed
  python co_rft_chunked.py --env-id PickCube-v1 --obs-mode state --critic-len 1 --seed $seed --runs runs/benchmark --run-name corft-pick-state-single-$seed
  python co_rft_chunked.py --env-id PickCube-v1 --obs-mode state --upsample-steps 0 --seed $seed --runs runs/benchmark --run-name corft-pick-state-plain-reward-$seed
  python co_rft_chunked.py --env-id PickCube-v1 --obs-mode state --actor-until end --seed $seed --runs runs/benchmark --run-name corft-pick-state-hold-$seed
  python co_rft_chunked.py --env-id PickCube-v1 --obs-mode state --no-calibrate --seed $seed --runs runs/benchmark --run-name corft-pick-state-no-calibrate-$seed
  # StackCube
  python co_rft_chunked.py --env-id StackCube-v1 --obs-mode state --eval-elsewhere --seed $seed --runs runs/benchmark --run-name corft-stack-state-$seed
  python co_rft_chunked.py --env-id StackCube-v1 --obs-mode state --spawn fixed --eval-elsewhere --seed $seed --runs runs/benchmark --run-name corft-stack-state-fixed-$seed
done
