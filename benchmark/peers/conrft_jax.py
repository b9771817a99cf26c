"""One update by ConRFT's own code (JAX), with the sizes of timed.py: conrft_jax.py REPO calql|td. Its actions have 7 numbers.

Its encoders are left out on both sides: what comes in is an embedding.
"""

import sys
from functools import partial
from pathlib import Path
from types import ModuleType
from unittest.mock import MagicMock

import flax.io  # noqa: F401  before something stands for tensorflow
import flax.linen as nn
import jax
import numpy as np
from flax.core import FrozenDict
from timed import BATCH, CRITICS, FEATURES, HIDDEN, SAMPLES, serve

ABSENT = "octo octo.model octo.model.octo_model octo.model.octo_module octo.utils octo.utils.typing wandb tensorflow"


class Embedded(nn.Module):
    """In the place of a critic's encoder."""

    def __call__(self, observations):
        return observations["state"]


class EmbeddedTask(nn.Module):
    """In the place of Octo."""

    def __call__(self, observations, action_embeddings=None, **rest):
        if action_embeddings is None:
            action_embeddings = observations["state"]
        return action_embeddings, action_embeddings


def main(repo: str, loss: str) -> None:
    for name in ABSENT.split():  # for its program, not for its updates
        sys.modules[name] = MagicMock()
    sys.modules["octo.utils.typing"].Data = dict
    jax.tree_map = jax.tree.map  # its name when that code was written
    root = Path(repo) / "serl_launcher"
    sys.path.insert(0, str(root))
    agents = ModuleType("serl_launcher.agents")  # its own __init__.py imports a file that isn't there
    agents.__path__ = [str(root / "serl_launcher/agents")]
    sys.modules[agents.__name__] = agents
    from serl_launcher.agents.continuous.conrft_single_octo_cp import ConrftCPOctoAgentSingleArm
    from serl_launcher.networks.actor_critic_nets import ConsistencyPolicy_octo, Critic, ensemblize
    from serl_launcher.networks.mlp import MLP, timeMLP

    layers = dict(hidden_dims=[HIDDEN, HIDDEN], activations=nn.tanh, use_layer_norm=True, activate_final=True)
    ensemble = ensemblize(partial(MLP, **layers), CRITICS)(name="critic_ensemble")
    times = timeMLP(t_dim=16, activations=nn.tanh)
    actor = ConsistencyPolicy_octo(
        encoder=EmbeddedTask(), network=MLP(**layers), t_network=times, action_dim=7, name="actor"
    )
    rng = np.random.default_rng(0)

    def normal(*shape):
        return rng.normal(size=shape).astype(np.float32)

    observations = {"state": normal(BATCH, FEATURES)}
    actions = rng.uniform(-1, 1, (BATCH, 7)).astype(np.float32)
    agent = ConrftCPOctoAgentSingleArm.create(
        jax.random.PRNGKey(0), observations, actions, {}, actor, Critic(encoder=Embedded(), network=ensemble, name="critic"),
        cql_n_actions=SAMPLES, critic_ensemble_size=CRITICS, image_keys=["state"], q_weight=0.1,
    )  # fmt: skip
    ones = np.ones(BATCH, np.float32)
    batch = FrozenDict(
        observations=observations, next_observations={"state": normal(BATCH, FEATURES)}, actions=actions, rewards=ones,
        masks=ones, mc_returns=ones, tasks={}, embeddings=observations["state"], next_embeddings=normal(BATCH, FEATURES),
    )  # fmt: skip

    def update() -> None:
        nonlocal agent
        agent, _ = agent.update_calql(batch) if loss == "calql" else agent.update_ql(batch)
        jax.block_until_ready(agent.state.params)

    serve(update)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
