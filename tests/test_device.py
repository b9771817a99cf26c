"""Updates on another device: nothing is copied there or back, nothing waits; and losses compiled by --compile.

There is no GPU here. Torch's "meta" device stands for one: its tensors have shapes and no content, so whatever has to
look at a number on the device raises, and whatever mixes devices too.
"""

import dataclasses
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import TINY
from torch.utils._python_dispatch import TorchDispatchMode

import bc
import co_rft_chunked
import conrft
import force_octo
import force_pi0
from plumbing import Demos, UserError, compiling, fill

RL = (force_octo, force_pi0, conrft, co_rft_chunked)
SIZES = TINY | dict(online_finetune="full", round_steps=20, num_critics=2, q_weight=0.1, vgpd=True, image_size=32)


def rng():
    return torch.Generator().manual_seed(0)


class Setting:
    """What main has before its stages, on random demonstrations of 3 episodes; on `device`, once everything is filled."""

    def __init__(self, script, device="cpu", **flags):
        own = {field.name for field in dataclasses.fields(script.Args)}
        known = {name: value for name, value in (SIZES | flags).items() if name in own}
        self.script, self.args = script, fill(script.Args, script.TABLES, **known)
        script.validate(self.args)
        g, rows, length = np.random.default_rng(0), 63, np.full(3, 20)
        obs = {"proprio": g.normal(size=(rows, 5)).astype(np.float32)}
        if self.args.obs_mode == "rgb":
            side = self.args.image_size
            obs["primary"] = g.integers(0, 255, (rows, side, side, 3), np.uint8)
        action = g.uniform(-0.5, 0.5, (rows, 4)).astype(np.float32)
        self.demos = Demos(obs, action, length, length, "toy", np.ones(rows, bool))
        torch.manual_seed(0)
        self.agent = script.Agent(self.args, self.demos)
        tables = []
        if script is co_rft_chunked:
            self.data = script.ChunkData(self.demos, self.agent, self.args)
            script.embed_demonstrations(self.data, self.demos, self.agent)
        elif script is bc:
            self.data = script.Chunks(self.demos, self.agent, 0.3)
        else:
            kept = self.demos.empty_obs() if script is force_octo else None
            self.buffer = script.ReplayBuffer(self.agent, self.args, *[kept or True] * (script is not force_pi0))
            script.add_demonstrations(self.buffer, self.demos, self.agent, self.args)
            self.buffer.steps["feature"].normal_(generator=rng())
            tables = self.buffer.tables.values()
        if device != "cpu":
            vars(self.demos).pop("on_device", None)  # made anew, there
            self.demos.device = self.args.device = device
            self.agent.to(device)
            for table in tables:
                table.columns = {name: column.to(device) for name, column in table.columns.items()}
            for name, value in vars(getattr(self, "data", SimpleNamespace())).items():
                if isinstance(value, torch.Tensor):
                    setattr(self.data, name, value.to(device))
        critic = getattr(self.agent, "critic", self.agent.actor)
        self.critic_optimizer = torch.optim.SGD(critic.parameters(), lr=0.01)  # Adam counts its steps on the CPU
        self.actor_optimizer = torch.optim.SGD(self.agent.parameters(), lr=0.01)

    def clone(self) -> None:
        """An update of stage 0."""
        script, agent, args, demos = self.script, self.agent, self.args, self.demos
        if script is bc:
            rows = self.data.draw(args.batch_size, None)
            feature = agent.feature(script.random_shift(demos.at(rows, agent.window), None))
            script.bc_loss(agent, feature, self.data.at(rows), None, 2).backward()
            return
        if script is co_rft_chunked:
            rows = self.data.draw(self.data.cloned_rows, args.batch_size, None)
            feature = agent.feature(script.random_shift(demos.at(rows, agent.window), None))
            loss = script.mse_loss(agent.actor(feature), self.data.chunk(rows), agent.actor.unit)
            script.descend(self.actor_optimizer, loss, 1.0)
            return
        rows = demos.draw(args.sft_batch_size, None)
        chunk = self.buffer.gather(rows).chunk
        if script is force_pi0:
            losses = script.clone_losses(agent, script.random_shift(demos.at(rows, 1), None), chunk, args, None)
            script.accumulate(losses)
        else:
            feature = agent.feature(script.random_shift(demos.at(rows, agent.window), None))
            script.update_clone(agent, self.actor_optimizer, feature, chunk, args, None)

    def draw(self):
        if self.script is co_rft_chunked:
            return self.script.draw(self.data, self.data.critic_rows, self.agent, self.args, None, None)
        none = {"batch": None, "update": None}
        return self.script.draw(self.buffer, self.buffer, self.agent, self.args, none)

    def learn(self, conservative=0.1, online=True) -> dict:
        """An update of the critic, and one of the actor, as in the last stage."""
        script, agent, args = self.script, self.agent, self.args
        batch = self.draw()
        if script is co_rft_chunked:
            logs = script.update_critic(agent, self.critic_optimizer, batch, args, None)
            return logs | script.update_actor(agent, self.actor_optimizer, batch, args)
        logs = script.update_critic(agent, self.critic_optimizer, batch, args, conservative, None)
        if script is conrft:
            return logs | script.update_actor(agent, self.actor_optimizer, batch, args, None, 1.0, 0.1)
        if script is force_pi0:
            return logs | script.update_online(agent, self.actor_optimizer, batch, args, None, 0.1)

        def observed(batch):
            return script.look(self.buffer, self.buffer, None, batch)

        return logs | script.update_online(agent, self.actor_optimizer, batch, observed, args, None, 0.1)


class Elsewhere(TorchDispatchMode):
    """Names the operations that make a tensor that isn't on the device."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        made = operation(*args, **kwargs or {})
        parts = made if isinstance(made, tuple | list) else [made]
        if any(isinstance(part, torch.Tensor) and not part.is_meta for part in parts):
            self.found.append(str(operation))
        return made


@pytest.mark.parametrize("obs_mode", ["state", "rgb"])
@pytest.mark.parametrize("script", [bc, *RL], ids=lambda script: script.__name__)
def test_an_update_stays_on_the_device(script, obs_mode):
    setting = Setting(script, "meta", obs_mode=obs_mode)
    updates = [setting.clone] if script is bc else [setting.clone, setting.learn]
    for update in updates:
        update()  # what is kept from then on may be brought there
        with Elsewhere() as elsewhere:
            update()
        assert elsewhere.found == []


@pytest.mark.parametrize("script", [force_octo, force_pi0], ids=lambda script: script.__name__)
def test_what_rollouts_have_brought_there_serves_training_too(script):
    """Tensors that are made in inference mode can't be kept for a backward pass."""
    setting = Setting(script)
    setting.agent.instruction = f"an instruction that {script.__name__} alone has seen"
    with torch.inference_mode():
        setting.agent.feature(setting.demos.at(torch.arange(3), setting.agent.window))
    setting.clone()


def test_what_leaves_the_device_is_found():
    x = torch.ones(3, device="meta")
    with pytest.raises(RuntimeError, match="meta"):
        x.sum().item()
    with pytest.raises((RuntimeError, NotImplementedError)):
        x[x > 0]
    with Elsewhere() as elsewhere:
        (torch.arange(3).to("meta") + x)[torch.tensor([1])]
    assert len(elsewhere.found) >= 2


@pytest.fixture
def one_graph(monkeypatch):
    """--compile as far as one graph a loss, without a compiler; says which losses went through it."""
    compiled, graphs = torch.compile, []

    def quick(function, fullgraph, options):
        def backend(module, inputs):
            graphs.append(function.__qualname__)
            return module

        return compiled(function, fullgraph=fullgraph, backend=backend)

    monkeypatch.setattr(torch, "compile", quick)
    monkeypatch.setattr(compiling, "mode", "on")
    torch._dynamo.reset()
    yield graphs
    torch._dynamo.reset()


@pytest.mark.parametrize("script", RL, ids=lambda script: script.__name__)
def test_each_loss_is_one_graph(script, one_graph):
    """fullgraph=True raises where there would be more than one; and the numbers are those of the plain functions."""
    losses = Setting(script).learn()
    graphs = len(one_graph)
    compiling.mode = "off"
    plain = Setting(script).learn()
    assert graphs == len(one_graph) == (3 if script in (force_octo, force_pi0) else 2)
    assert losses.keys() == plain.keys()
    for name, value in plain.items():
        assert torch.allclose(losses[name], value, atol=1e-6), name


@pytest.mark.skipif(not shutil.which("g++"), reason="no compiler")
def test_compiled_losses_over_20_updates(monkeypatch):
    found = []
    for mode in ("off", "on"):
        monkeypatch.setattr(compiling, "mode", mode)
        setting = Setting(conrft)
        torch.manual_seed(1)
        found.append([setting.learn() for _ in range(20)])
    plain, compiled = found
    for one, other in zip(plain, compiled, strict=True):
        for name, value in one.items():
            assert torch.allclose(value, other[name], atol=1e-5), name
    assert plain[0]["losses/critic"] != plain[19]["losses/critic"]


def test_no_compiler(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UserError, match="no-such-compiler isn't there"):
        compiling.use("on", "cpu")
    compiling.use("off", "cpu")


def test_a_draw_follows_its_weights():
    weight = torch.tensor([[0.1, 0.0, 0.6, 0.3]]).expand(20_000, -1)
    found = torch.bincount(compiling.drawn(weight, rng()), minlength=4) / 20_000
    assert found.tolist() == pytest.approx([0.1, 0, 0.6, 0.3], abs=0.02) and found[1] == 0


def test_a_fixed_net_passes_gradients_to_its_input_alone():
    net = torch.nn.Linear(3, 2)
    x = torch.randn(4, 3, requires_grad=True)
    y = compiling.fixed(net)(x)
    assert torch.equal(y, net(x))
    y.sum().backward()
    assert torch.allclose(x.grad, net.weight.sum(0).expand(4, -1)) and net.weight.grad is None
