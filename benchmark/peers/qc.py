"""One update by an agent of Q-chunking (JAX), with the sizes of timed.py: qc.py REPO acrlpd|acfql ACTION_DIM CHUNK_LEN.

acrlpd is RLPD on chunks: a Gaussian policy. acfql is QC-FQL: a flow policy, and a one-step policy that is distilled from
it and goes up Q.
"""

import importlib
import sys

import jax
import numpy as np
from timed import BATCH, CRITICS, FEATURES, HIDDEN, serve


def main(repo: str, name: str, action_dim: int, chunk_len: int) -> None:
    sys.path.insert(0, repo)
    module = importlib.import_module(f"agents.{name}")
    config = module.get_config()
    sizes = (HIDDEN, HIDDEN)
    config.update(actor_hidden_dims=sizes, value_hidden_dims=sizes, num_qs=CRITICS, horizon_length=chunk_len)
    rng = np.random.default_rng(0)
    observations = rng.normal(size=(BATCH, FEATURES)).astype(np.float32)
    actions = rng.uniform(-1, 1, (BATCH, chunk_len, action_dim)).astype(np.float32)
    ones = np.ones((BATCH, chunk_len), np.float32)
    batch = {
        "observations": observations,
        "actions": actions,
        "next_observations": np.repeat(observations[:, None], chunk_len, 1),
        "rewards": ones,
        "masks": ones,
        "valid": ones,
    }
    agent = getattr(module, f"{name.upper()}Agent").create(0, observations[0], actions[0, 0], config)

    def update() -> None:
        nonlocal agent
        agent, _ = agent.update(batch)
        jax.block_until_ready(agent.network.params)

    serve(update)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
