"""One update of critic and actor by conrft.py, with the sizes of timed.py: python ours.py calql|td ACTION_DIM CHUNK_LEN [compiled]."""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parent)]
import torch  # noqa: E402
from timed import BATCH, CRITICS, FEATURES, HIDDEN, SAMPLES, serve  # noqa: E402

import conrft  # noqa: E402
from plumbing import compiling  # noqa: E402


class Sizes(torch.nn.Module):
    """What the updates need of an Agent."""

    def __init__(self, args: conrft.Args, chunk: int):
        super().__init__()
        unit = torch.ones(chunk)
        self.actor = conrft.ConsistencyActor(FEATURES, unit, HIDDEN)
        self.critic = conrft.EnsembleCritic(CRITICS, FEATURES, unit, HIDDEN)
        self.target_critic = conrft.EnsembleCritic(CRITICS, FEATURES, unit, HIDDEN)


def main(loss: str, action_dim: int, chunk_len: int, compile: bool) -> None:
    torch.set_num_threads(1)
    compiling.use("on" if compile else "off", "cpu")
    args = conrft.Args(
        chunk_len=chunk_len,
        num_critics=CRITICS,
        cql_samples=SAMPLES,
        noise_levels=1,
        hidden_dim=HIDDEN,
        batch_size=BATCH,
    )
    chunk = action_dim * chunk_len
    agent = Sizes(args, chunk)
    adam = dict(lr=3e-4, fused=True)
    critic_optimizer = torch.optim.Adam(agent.critic.parameters(), **adam)
    actor_optimizer = torch.optim.Adam(agent.actor.parameters(), **adam)
    noise = None if compile else torch.Generator().manual_seed(0)
    feature = torch.randn(2, BATCH, FEATURES)
    batch = conrft.Batch(
        feature=feature[0], chunk=torch.rand(BATCH, chunk) * 2 - 1, reward=torch.rand(BATCH),
        bootstrap=torch.full((BATCH,), 0.98), next_feature=feature[1], mc_return=torch.rand(BATCH),
        expert=torch.arange(BATCH) % 2 == 0,
    )  # fmt: skip

    def update() -> None:
        weight = args.cql_weight if loss == "calql" else 0.0
        conrft.update_critic(agent, critic_optimizer, batch, args, weight, noise)
        conrft.update_actor(agent, actor_optimizer, batch, args, noise, bc_weight=1.0, q_weight=0.1)

    serve(update)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), compile=sys.argv[4:] == ["compiled"])
