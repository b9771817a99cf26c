# All methods, privileged state
# The same 50 demonstrations of a task for all. All but CO-RFT start from the policy of the task's first line (CO-RFT clones
# its own, with a plain chunk head), and the online methods of a task have the same number of control steps after hand-over.
# Cal-QL is conrft.py with a new head, without imitation, and with the conservative term online too. PA-RL: benchmark/pa_rl.py.
# By hand: bash benchmark/commands/main.sh, or seed=1 and one of the lines. In parallel: benchmark/run.py.
for seed in 1 2 3; do
  # PushCube
  python bc.py --env-id PushCube-v1 --obs-mode state --seed $seed --runs runs/benchmark --run-name bc-push-state-50-$seed
  python conrft.py --env-id PushCube-v1 --obs-mode state --sft-checkpoint runs/benchmark/bc-push-state-50-$seed --fresh-head --bc-weight-offline 0 --q-weight-offline 1 --bc-weight-online 0 --cql-weight-online 0.02 --seed $seed --runs runs/benchmark --run-name calql-push-state-online-$seed
  python benchmark/pa_rl.py --env-id PushCube-v1 --obs-mode state --sft-checkpoint runs/benchmark/bc-push-state-50-$seed --seed $seed --runs runs/benchmark --run-name parl-push-state-$seed
  python conrft.py --env-id PushCube-v1 --obs-mode state --sft-checkpoint runs/benchmark/bc-push-state-50-$seed --seed $seed --runs runs/benchmark --run-name conrft-push-state-$seed
  python force_octo.py --env-id PushCube-v1 --obs-mode state --sft-checkpoint runs/benchmark/bc-push-state-50-$seed --seed $seed --runs runs/benchmark --run-name force-push-state-$seed
  python force_octo.py --env-id PushCube-v1 --obs-mode state --sft-checkpoint runs/benchmark/bc-push-state-50-$seed --no-warmup --seed $seed --runs runs/benchmark --run-name force-push-state-no-warmup-$seed
  python force_octo.py --env-id PushCube-v1 --obs-mode state --sft-checkpoint runs/benchmark/bc-push-state-50-$seed --no-vgpd --seed $seed --runs runs/benchmark --run-name force-push-state-no-vgpd-$seed
  python co_rft_chunked.py --env-id PushCube-v1 --obs-mode state --eval-elsewhere --seed $seed --runs runs/benchmark --run-name corft-push-state-$seed
  # PullCube
  python bc.py --env-id PullCube-v1 --obs-mode state --seed $seed --runs runs/benchmark --run-name bc-pull-state-50-$seed
  python conrft.py --env-id PullCube-v1 --obs-mode state --sft-checkpoint runs/benchmark/bc-pull-state-50-$seed --fresh-head --bc-weight-offline 0 --q-weight-offline 1 --bc-weight-online 0 --cql-weight-online 0.02 --seed $seed --runs runs/benchmark --run-name calql-pull-state-online-$seed
  python benchmark/pa_rl.py --env-id PullCube-v1 --obs-mode state --sft-checkpoint runs/benchmark/bc-pull-state-50-$seed --seed $seed --runs runs/benchmark --run-name parl-pull-state-$seed
  python conrft.py --env-id PullCube-v1 --obs-mode state --sft-checkpoint runs/benchmark/bc-pull-state-50-$seed --seed $seed --runs runs/benchmark --run-name conrft-pull-state-$seed
  python force_octo.py --env-id PullCube-v1 --obs-mode state --sft-checkpoint runs/benchmark/bc-pull-state-50-$seed --seed $seed --runs runs/benchmark --run-name force-pull-state-$seed
  python force_octo.py --env-id PullCube-v1 --obs-mode state --sft-checkpoint runs/benchmark/bc-pull-state-50-$seed --no-warmup --seed $seed --runs runs/benchmark --run-name force-pull-state-no-warmup-$seed
  python force_octo.py --env-id PullCube-v1 --obs-mode state --sft-checkpoint runs/benchmark/bc-pull-state-50-$seed --no-vgpd --seed $seed --runs runs/benchmark --run-name force-pull-state-no-vgpd-$seed
  python co_rft_chunked.py --env-id PullCube-v1 --obs-mode state --seed $seed --runs runs/benchmark --run-name corft-pull-state-$seed
  # PickCube
  python bc.py --env-id PickCube-v1 --obs-mode state --seed $seed --runs runs/benchmark --run-name bc-pick-state-50-$seed
  python conrft.py --env-id PickCube-v1 --obs-mode state --sft-checkpoint runs/benchmark/bc-pick-state-50-$seed --fresh-head --bc-weight-offline 0 --q-weight-offline 1 --bc-weight-online 0 --cql-weight-online 0.02 --seed $seed --runs runs/benchmark --run-name calql-pick-state-online-$seed
  python benchmark/pa_rl.py --env-id PickCube-v1 --obs-mode state --sft-checkpoint runs/benchmark/bc-pick-state-50-$seed --seed $seed --runs runs/benchmark --run-name parl-pick-state-$seed
  python conrft.py --env-id PickCube-v1 --obs-mode state --sft-checkpoint runs/benchmark/bc-pick-state-50-$seed --seed $seed --runs runs/benchmark --run-name conrft-pick-state-$seed
  python force_octo.py --env-id PickCube-v1 --obs-mode state --sft-checkpoint runs/benchmark/bc-pick-state-50-$seed --seed $seed --runs runs/benchmark --run-name force-pick-state-$seed
  python force_octo.py --env-id PickCube-v1 --obs-mode state --sft-checkpoint runs/benchmark/bc-pick-state-50-$seed --no-warmup --seed $seed --runs runs/benchmark --run-name force-pick-state-no-warmup-$seed
  python force_octo.py --env-id PickCube-v1 --obs-mode state --sft-checkpoint runs/benchmark/bc-pick-state-50-$seed --no-vgpd --seed $seed --runs runs/benchmark --run-name force-pick-state-no-vgpd-$seed
  python co_rft_chunked.py --env-id PickCube-v1 --obs-mode state --eval-elsewhere --seed $seed --runs runs/benchmark --run-name corft-pick-state-$seed
  # StackCube
  python bc.py --env-id StackCube-v1 --obs-mode state --seed $seed --runs runs/benchmark --run-name bc-stack-state-50-$seed
  python conrft.py --env-id StackCube-v1 --obs-mode state --sft-checkpoint runs/benchmark/bc-stack-state-50-$seed --fresh-head --bc-weight-offline 0 --q-weight-offline 1 --bc-weight-online 0 --cql-weight-online 0.02 --seed $seed --runs runs/benchmark --run-name calql-stack-state-online-$seed
  python benchmark/pa_rl.py --env-id StackCube-v1 --obs-mode state --sft-checkpoint runs/benchmark/bc-stack-state-50-$seed --seed $seed --runs runs/benchmark --run-name parl-stack-state-$seed
  python conrft.py --env-id StackCube-v1 --obs-mode state --sft-checkpoint runs/benchmark/bc-stack-state-50-$seed --seed $seed --runs runs/benchmark --run-name conrft-stack-state-$seed
  python force_octo.py --env-id StackCube-v1 --obs-mode state --sft-checkpoint runs/benchmark/bc-stack-state-50-$seed --seed $seed --runs runs/benchmark --run-name force-stack-state-$seed
  python force_octo.py --env-id StackCube-v1 --obs-mode state --sft-checkpoint runs/benchmark/bc-stack-state-50-$seed --no-warmup --seed $seed --runs runs/benchmark --run-name force-stack-state-no-warmup-$seed
  python force_octo.py --env-id StackCube-v1 --obs-mode state --sft-checkpoint runs/benchmark/bc-stack-state-50-$seed --no-vgpd --seed $seed --runs runs/benchmark --run-name force-stack-state-no-vgpd-$seed
  python co_rft_chunked.py --env-id StackCube-v1 --obs-mode state --eval-elsewhere --seed $seed --runs runs/benchmark --run-name corft-stack-state-$seed
  # PlaceSphere
  python bc.py --env-id PlaceSphere-v1 --obs-mode state --seed $seed --runs runs/benchmark --run-name bc-sphere-state-50-$seed
  python conrft.py --env-id PlaceSphere-v1 --obs-mode state --sft-checkpoint runs/benchmark/bc-sphere-state-50-$seed --fresh-head --bc-weight-offline 0 --q-weight-offline 1 --bc-weight-online 0 --cql-weight-online 0.02 --seed $seed --runs runs/benchmark --run-name calql-sphere-state-online-$seed
  python benchmark/pa_rl.py --env-id PlaceSphere-v1 --obs-mode state --sft-checkpoint runs/benchmark/bc-sphere-state-50-$seed --seed $seed --runs runs/benchmark --run-name parl-sphere-state-$seed
  python conrft.py --env-id PlaceSphere-v1 --obs-mode state --sft-checkpoint runs/benchmark/bc-sphere-state-50-$seed --seed $seed --runs runs/benchmark --run-name conrft-sphere-state-$seed
  python force_octo.py --env-id PlaceSphere-v1 --obs-mode state --sft-checkpoint runs/benchmark/bc-sphere-state-50-$seed --seed $seed --runs runs/benchmark --run-name force-sphere-state-$seed
  python force_octo.py --env-id PlaceSphere-v1 --obs-mode state --sft-checkpoint runs/benchmark/bc-sphere-state-50-$seed --no-warmup --seed $seed --runs runs/benchmark --run-name force-sphere-state-no-warmup-$seed
  python force_octo.py --env-id PlaceSphere-v1 --obs-mode state --sft-checkpoint runs/benchmark/bc-sphere-state-50-$seed --no-vgpd --seed $seed --runs runs/benchmark --run-name force-sphere-state-no-vgpd-$seed
  python co_rft_chunked.py --env-id PlaceSphere-v1 --obs-mode state --seed $seed --runs runs/benchmark --run-name corft-sphere-state-$seed
  # PullCubeTool: the planner needs 20 control steps a second
  python bc.py --env-id PullCubeTool-v1 --obs-mode state --control-freq 20 --max-episode-steps 300 --seed $seed --runs runs/benchmark --run-name bc-tool-state-50-$seed
  python conrft.py --env-id PullCubeTool-v1 --obs-mode state --control-freq 20 --max-episode-steps 300 --sft-checkpoint runs/benchmark/bc-tool-state-50-$seed --fresh-head --bc-weight-offline 0 --q-weight-offline 1 --bc-weight-online 0 --cql-weight-online 0.02 --seed $seed --runs runs/benchmark --run-name calql-tool-state-online-$seed
  python benchmark/pa_rl.py --env-id PullCubeTool-v1 --obs-mode state --control-freq 20 --max-episode-steps 300 --sft-checkpoint runs/benchmark/bc-tool-state-50-$seed --seed $seed --runs runs/benchmark --run-name parl-tool-state-$seed
  python conrft.py --env-id PullCubeTool-v1 --obs-mode state --control-freq 20 --max-episode-steps 300 --sft-checkpoint runs/benchmark/bc-tool-state-50-$seed --seed $seed --runs runs/benchmark --run-name conrft-tool-state-$seed
  python force_octo.py --env-id PullCubeTool-v1 --obs-mode state --control-freq 20 --max-episode-steps 300 --sft-checkpoint runs/benchmark/bc-tool-state-50-$seed --seed $seed --runs runs/benchmark --run-name force-tool-state-$seed
  python force_octo.py --env-id PullCubeTool-v1 --obs-mode state --control-freq 20 --max-episode-steps 300 --sft-checkpoint runs/benchmark/bc-tool-state-50-$seed --no-warmup --seed $seed --runs runs/benchmark --run-name force-tool-state-no-warmup-$seed
  python force_octo.py --env-id PullCubeTool-v1 --obs-mode state --control-freq 20 --max-episode-steps 300 --sft-checkpoint runs/benchmark/bc-tool-state-50-$seed --no-vgpd --seed $seed --runs runs/benchmark --run-name force-tool-state-no-vgpd-$seed
  python co_rft_chunked.py --env-id PullCubeTool-v1 --obs-mode state --control-freq 20 --max-episode-steps 300 --seed $seed --runs runs/benchmark --run-name corft-tool-state-$seed
done
