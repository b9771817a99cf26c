"""One update by CORL's Cal-QL (algorithms/finetune/cal_ql.py), with the sizes of timed.py: corl.py REPO ACTION_DIM."""

import sys
from pathlib import Path
from unittest.mock import MagicMock

import torch
from timed import BATCH, FEATURES, SAMPLES, serve


def main(repo: str, action_dim: int) -> None:
    torch.set_num_threads(1)
    for name in ("d4rl", "gym", "pyrallis", "wandb"):  # for its program, not for its updates
        sys.modules[name] = MagicMock()
    sys.path.insert(0, str(Path(repo) / "algorithms/finetune"))
    import cal_ql

    critics = [cal_ql.FullyConnectedQFunction(FEATURES, action_dim, n_hidden_layers=2) for _ in range(2)]
    actor = cal_ql.TanhGaussianPolicy(FEATURES, action_dim, max_action=1.0)
    optimizers = [torch.optim.Adam(net.parameters(), 3e-4) for net in (*critics, actor)]
    trainer = cal_ql.CalQL(
        critics[0], optimizers[0], critics[1], optimizers[1], actor, optimizers[2], target_entropy=-action_dim,
        cql_n_actions=SAMPLES, bc_steps=0,
    )  # fmt: skip
    action = torch.rand(BATCH, action_dim) * 2 - 1
    batch = [
        torch.randn(BATCH, FEATURES), action, torch.rand(BATCH, 1), torch.randn(BATCH, FEATURES), torch.zeros(BATCH, 1),
        torch.rand(BATCH, 1),
    ]  # fmt: skip
    serve(lambda: trainer.train(batch))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
