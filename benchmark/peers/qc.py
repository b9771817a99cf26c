"""One update by Q-chunking's ACRLPD (agents/acrlpd.py, JAX), with the sizes of timed.py: qc.py REPO ACTION_DIM CHUNK_LEN."""

import sys

import jax
import numpy as np
from timed import BATCH, CRITICS, FEATURES, HIDDEN, serve


def main(repo: str, action_dim: int, chunk_len: int) -> None:
    sys.path.insert(0, repo)
    from agents.acrlpd import ACRLPDAgent, get_config

    config = get_config()
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
    agent = ACRLPDAgent.create(0, observations, actions[:, 0], config)

    def update() -> None:
        nonlocal agent
        agent, _ = agent.update(batch)
        jax.block_until_ready(agent.network.params)

    serve(update)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
