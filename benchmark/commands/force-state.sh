# FORCE, privileged state
# By hand: bash benchmark/commands/force-state.sh, or seed=1 and one of the lines. In parallel: benchmark/run.py.
for seed in 1 2 3; do
  python force_octo.py --env-id PushCube-v1 --obs-mode state --online-steps 8000 --gamma 0.95 --q-weight 0.05 --explore-noise 0.1 --candidate-noise 0.1 --seed $seed --runs runs/benchmark --run-name force-push-state-$seed
  python force_octo.py --env-id PickCube-v1 --obs-mode state --online-steps 5000 --seed $seed --runs runs/benchmark --run-name force-pick-state-$seed
  python force_octo.py --env-id StackCube-v1 --obs-mode state --online-steps 8000 --seed $seed --runs runs/benchmark --run-name force-stack-state-$seed
done
