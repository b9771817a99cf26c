"""force_pi0.py: flow matching by hand, what is trained and stored, and short real runs with both heads.

The stages themselves are those of force_octo.py, which test_losses.py and test_training.py look at.
"""

import copy
import dataclasses
import functools
import gc
import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import FIXTURES, ROOT, rows, tiny_args, weights
from torch import nn

import force_octo
import force_pi0 as script
from backbones import pi0, pi0_policy
from backbones.pi0_policy import accumulate
from backbones.pi0_weights import load_pi0
from plumbing import Demos, Run, UserError, fill, parse_flags

sys.path.insert(0, str(ROOT / "benchmark"))
import dry_run as program  # noqa: E402
from dry_run import dry_run  # noqa: E402

SMALL = dataclasses.replace(
    pi0.PRESETS["pi0-compact"], vlm_width=16, vlm_mlp=24, expert_width=12, expert_mlp=20, depth=2, heads=2, head_dim=8,
    vit_width=8, vit_mlp=16, vit_depth=1, vit_heads=2, image_size=32, points=4, lowdim_tokens=2,
)  # fmt: skip
HEADS = pytest.mark.parametrize("head", ["consistency", "flow"])


@pytest.fixture(scope="module", autouse=True)
def small_models():
    """The compact presets at the smallest size, and short flows."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pi0_policy, "FLOW_STEPS", 5)
        patch.setitem(pi0.PRESETS, "pi0-compact", SMALL)
        patch.setitem(pi0.PRESETS, "pi05-compact", dataclasses.replace(SMALL, pi05=True, max_tokens=80))
        yield


def toy_demos(camera=False, rows=6):
    rng = np.random.default_rng(0)
    obs = {"proprio": rng.normal(size=(rows, 4)).astype(np.float32)}
    if camera:
        obs["primary"] = rng.integers(0, 256, (rows, 32, 32, 3), dtype=np.uint8)
    lengths = np.array([rows - 1])
    return Demos(obs, rng.uniform(-0.3, 0.3, (rows, 3)).astype(np.float32), lengths, lengths, "toy")


def toy_agent(camera=False, **flags):
    torch.manual_seed(0)
    mode = dict(obs_mode="rgb" if camera else "state", image_size=32, chunk_len=2, hidden_dim=16)
    return script.Agent(script.Args(**mode | flags), toy_demos(camera))


def rng(seed=0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Field(nn.Module):
    """In the place of the action expert: a velocity field of x and t that is known, and what it was asked."""

    def __init__(self, velocity, dims):
        super().__init__()
        self.config, self.velocity, self.asked = SimpleNamespace(action_dim=dims, state_dim=4), velocity, []

    def forward(self, cache, valid, state, x, t):
        self.asked.append((x, t))
        return self.velocity(x, t)

    sample = pi0.ActionExpert.sample


def field_actor(velocity, dims=3):
    mean, unit = torch.tensor([0.1, -0.1, 0.1, -0.1]), torch.tensor([0.1, 0.2, 0.1, 0.2])  # H = 2 steps, A = 2
    return pi0_policy.FlowActor(Field(velocity, dims), mean, unit, (5, 4), 2)


# --- flow matching ---


def test_flow_loss():
    """Against numpy, from the points and times at which the field was asked; the third dimension is padding."""
    actor = field_actor(lambda x, t: 0.5 * x)
    chunk = torch.tensor([[0.1, -0.2, 0.05, 0.4], [0.0, 0.0, 0.2, 0.1]])
    context = (torch.zeros(2, 1), torch.zeros(2, 1), torch.zeros(2, 4))
    loss = script.flow_loss(actor, context, chunk, rng(), 3)
    (x, t), unit = actor.expert.asked[0], np.array([0.1, 0.2])
    assert x.shape == (2, 3, 2, 3) and t.shape == (2, 3) and loss.shape == (2,)
    for b in range(2):
        clean = np.concatenate([(chunk[b].numpy().reshape(2, 2) - [0.1, -0.1]) / unit, np.zeros((2, 1))], 1)
        errors = []
        for k in range(3):
            time, point = t[b, k].item(), x[b, k].numpy()
            noise = (point - (1 - time) * clean) / time
            errors.append(((0.5 * point - (noise - clean)) ** 2).mean())
        assert loss[b].item() == pytest.approx(np.mean(errors), rel=1e-3)


def test_flow_loss_draws_noise_and_times_as_pi0_does():
    actor = field_actor(lambda x, t: 0 * x)
    context = (torch.zeros(500, 1), torch.zeros(500, 1), torch.zeros(500, 4))
    loss = script.flow_loss(actor, context, torch.tensor([0.3, 0.1, 0.3, 0.1]).repeat(500, 1), rng(), 20)
    x, t = actor.expert.asked[0]
    t = t.flatten().numpy()
    assert t.min() >= 0.001 and t.max() <= 1 and t.mean() == pytest.approx(0.001 + 0.999 * 0.6, abs=0.01)
    for level in (0.2, 0.5, 0.8):  # Beta(1.5, 1): P(s < level) = level^1.5
        assert np.mean(t < 0.001 + 0.999 * level) == pytest.approx(level**1.5, abs=0.02)
    # E (noise - clean)^2 = 1 + clean^2; clean is 2, 1 and 0 (padding)
    assert loss.mean().item() == pytest.approx(1 + (4 + 1 + 0) / 3, rel=0.03)


def test_a_flow_towards_one_chunk_arrives_there():
    """x_t = t * noise + (1 - t) * c has the velocity (x - c) / t: Euler steps end at c, in the box's units."""
    target = torch.tensor([[1.5, -2.0, 0.0], [0.5, 1.0, 0.0]])
    actor = field_actor(lambda x, t: (x - target) / t[..., None, None])
    chunks = actor.flow((torch.zeros(3, 1), None, None), 7, rng())
    assert chunks.shape == (3, 7, 4) and [t[0, 0].item() for _, t in actor.expert.asked] == pytest.approx([1, 0.8, 0.6, 0.4, 0.2])  # fmt: skip
    np.testing.assert_allclose(chunks, np.broadcast_to([0.25, -0.5, 0.15, 0.1], (3, 7, 4)), atol=1e-5)
    far = field_actor(lambda x, t: (x - 100) / t[..., None, None]).flow((torch.zeros(1, 1), None, None), 1, rng())
    assert (far == 1).all()  # the box's edge


@torch.no_grad()
def test_rows_hold_all_that_the_flow_reads():
    agent = toy_agent(head="flow")
    obs = {"proprio": toy_demos().obs["proprio"]}
    seen = agent.observe(obs)
    prefix, proprio = seen.prefix, seen.proprio
    row = agent.feature(obs)
    assert row.shape == (6, agent.feature_dim)
    cache, valid, state = agent.actor.unpack(row)
    assert torch.equal(cache, prefix.cache) and torch.equal(valid, prefix.valid) and torch.equal(state, proprio)
    assert torch.equal(row[:, -4:], proprio) and torch.equal(row[:, -20:-4], prefix.embedding)
    q = agent.critic(row, torch.zeros(6, 6))
    assert torch.equal(q, agent.critic(row[:, -20:], torch.zeros(6, 6)))  # it reads no cache
    one = agent.actor.sample(row, 3, rng())
    assert torch.equal(one, agent.actor.flow((cache, valid, state), 3, rng()))
    noisy = agent.perturb(row, 0.5, rng())
    assert torch.equal(noisy[:, :-4], row[:, :-4]) and not torch.equal(noisy[:, -4:], row[:, -4:])


@pytest.mark.parametrize("head", ["flow", "consistency"])
def test_the_heads_draw_numbers_of_levels_of_their_own(head):
    agent, args, chunk = (
        toy_agent(head=head),
        script.Args(head=head, flow_times=3, noise_levels=5),
        torch.full((6, 6), 0.2),
    )
    row = agent.feature({"proprio": toy_demos().obs["proprio"]})
    loss = script.bc_loss(agent, row, chunk, args, rng())
    if head == "flow":
        losses = {n: script.flow_loss(agent.actor, agent.actor.unpack(row), chunk, rng(), n) for n in (3, 5)}
    else:
        losses = {n: script.consistency_loss(agent.actor, row, chunk, rng(), n) for n in (3, 5)}
    same = {n: torch.equal(loss, other) for n, other in losses.items()}
    assert same == {3: head == "flow", 5: head == "consistency"}


def test_the_flow_head_learns_a_state_dependent_chunk():
    agent, args = toy_agent(head="flow"), script.Args(head="flow", flow_times=8)
    obs = {"proprio": toy_demos().obs["proprio"]}
    chunk = torch.where(torch.arange(6)[:, None] < 3, 0.3, -0.2) * torch.tensor([1, 0.5, -1, 1, 0.5, -1])
    optimizer, g = torch.optim.Adam(agent.parameters(), lr=5e-3), rng()
    for _ in range(250):
        loss = script.bc_loss(agent, agent.feature(obs), chunk, args, g).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        samples = agent.actor.sample(agent.feature(obs), 50, g)
    np.testing.assert_allclose(samples.mean(1), chunk, atol=0.08)


# --- the agent ---


@pytest.mark.parametrize("backbone", ["pi0-compact", "pi05-compact"])
@HEADS
@torch.no_grad()
def test_what_an_agent_sees(backbone, head):
    """A camera, or the state as tokens; in pi0.5 the proprio changes the prefix even beside a camera."""
    obs = toy_demos(camera=True).obs
    other = obs | {"proprio": obs["proprio"] + 1}
    agent = toy_agent(camera=True, backbone=backbone, head=head)
    assert agent.act(agent.feature(obs), rng()).shape == (6, 2, 3)
    a, b = agent.observe(obs).prefix, agent.observe(other).prefix
    assert torch.equal(a.embedding, b.embedding) == (backbone == "pi0-compact")
    swapped = agent.observe(obs | {"primary": 255 - obs["primary"]}).prefix
    assert (a.embedding - swapped.embedding).abs().max() > 1e-3
    state = toy_agent(backbone=backbone, head=head)
    assert not torch.equal(state.observe(obs).prefix.embedding, state.observe(other).prefix.embedding)


@torch.no_grad()
def test_a_second_camera():
    """The camera on the hand is a camera of the model's; its images are brought to the size of the other one's."""
    demos = toy_demos(camera=True)
    demos.obs["wrist"] = demos.obs["primary"][:, ::2, ::2].copy()
    torch.manual_seed(0)
    agent = script.Agent(script.Args(obs_mode="rgb", image_size=32, chunk_len=2, hidden_dim=16), demos)
    assert agent.backbone.config.cameras == ("primary", "wrist")
    feature = agent.feature(demos.obs)
    assert feature.shape == (6, agent.feature_dim)
    other = agent.feature(demos.obs | {"wrist": 255 - demos.obs["wrist"]})
    assert ((feature - other).abs().amax(1) > 1e-3).all()


def names(finetune, **flags):
    agent = toy_agent(camera=True, finetune=finetune, **flags)
    return agent, {n for n, p in agent.backbone.named_parameters() if p.requires_grad}, {
        n for n, p in agent.flow_policy.expert.named_parameters() if p.requires_grad
    }  # fmt: skip


def test_finetune():
    full, prefix, expert = names("full")
    assert len(prefix) == len(list(full.backbone.parameters()))
    _, few, all_of_it = names("expert")
    assert all(n.startswith("points") for n in few) and few and all_of_it == expert
    _, few, projections = names("head")
    assert projections == {n for n in expert if n.startswith(("action_", "state_proj"))} and len(projections) == 10
    agent, low, part = names("lora", head="flow")
    new = {n for n in low | part if n.endswith((".A", ".B"))}
    assert (
        low | part == few | projections | new and len(new) == 2 * 2 * 7
    )  # A and B of 7 weights in 2 layers, of the same names in both stacks
    obs = toy_demos(camera=True).obs
    with torch.no_grad():
        base = agent.observe(obs).prefix.embedding
        for name, parameter in agent.backbone.named_parameters():
            if name.endswith(".B"):
                assert not parameter.any()  # starts as the model it was
                parameter += 0.1
        assert not torch.equal(base, agent.observe(obs).prefix.embedding)


def test_released_weights(monkeypatch):
    """The files' numbers are the agent's; what can't be loaded is said in one line."""
    sizes = dict(
        vlm_width=32, vlm_mlp=48, expert_width=24, expert_mlp=40, depth=2, heads=8, kv_heads=1, head_dim=8, vocabulary=64,
        vit_width=16, vit_mlp=24, vit_depth=2, vit_heads=2, patch=14, image_size=28, action_dim=5, state_dim=5,
    )  # fmt: skip
    monkeypatch.setitem(pi0.PRESETS, "pi0", dataclasses.replace(pi0.PRESETS["pi0"], **sizes))
    flags = dict(camera=True, backbone="pi0", finetune="expert")
    with pytest.raises(UserError, match="pieces, the embedding 64 rows"):
        toy_agent(**flags, checkpoint=str(FIXTURES / "pi0_tiny"))
    encode = lambda text, add_bos=False: [2] * add_bos + [3 + ord(c) % 60 for c in text]  # noqa: E731
    monkeypatch.setattr(pi0, "load_tokenizer", lambda file, rows: SimpleNamespace(encode=encode))
    agent = toy_agent(**flags, checkpoint=str(FIXTURES / "pi0_tiny"), env_id="PushCube-v1")
    loaded = load_pi0(FIXTURES / "pi0_tiny", pi0.PRESETS["pi0"])
    assert torch.equal(agent.backbone.norm.weight, loaded.model.prefix.norm.weight)
    assert agent.weights == f"{FIXTURES / 'pi0_tiny'}, sha256 {loaded.sha256}"
    with torch.no_grad():
        row = agent.feature(toy_demos(camera=True).obs)  # 32 px images, resized; 3 of 5 action dimensions
        assert agent.flow_policy.flow(agent.observe(toy_demos(camera=True).obs).context, 2, rng()).shape == (6, 2, 6)
        half = toy_agent(**flags, checkpoint=str(FIXTURES / "pi0_tiny"), env_id="PushCube-v1", bf16=True)
        other = half.feature(toy_demos(camera=True).obs)
        assert half.backbone.embed_tokens.weight.dtype == torch.bfloat16 and other.dtype == torch.float32
        assert 0 < (row - other).abs().max() < 0.05 * row.abs().max()
        assert half.flow_policy.flow(half.observe(toy_demos(camera=True).obs).context, 2, rng()).dtype == torch.float32
    assert row.shape == (6, agent.feature_dim)
    with pytest.raises(UserError, match=r"no weights at .*absent"):
        toy_agent(**flags, checkpoint=str(FIXTURES / "absent"))
    monkeypatch.setitem(pi0.PRESETS, "pi0", dataclasses.replace(pi0.PRESETS["pi0"], state_dim=3))
    with pytest.raises(UserError, match="has room for 3 numbers of proprio and 5 of actions"):
        toy_agent(**flags)


@HEADS
def test_dry_run(head):
    """Its parameters and rows are those of a real agent, and it costs no memory at the released size."""
    args = script.Args(env_id="PushCube-v1", obs_mode="state", head=head, device="cpu", hidden_dim=16, image_size=64)
    found = dry_run(dataclasses.replace(args))
    demos = Demos({"proprio": np.zeros((2, 25), np.float32)}, np.eye(2, 4, dtype=np.float32), np.ones(1, int), np.ones(1, int), "")  # fmt: skip
    agent = script.Agent(args, demos)
    assert found["parameters"] == sum(p.numel() for p in agent.parameters())
    assert found["trained_in_stage_0"] == sum(
        p.numel() for p in agent.parameters() if p.requires_grad
    ) - sum(p.numel() for p in agent.critic.parameters())  # fmt: skip
    spare = SMALL.max_tokens - agent.backbone.prompt(agent.instruction)[0].shape[1]  # it counts the longest prompt
    width = 2 * 2 * 8 + 1 if head == "flow" else 0
    assert found["replay_bytes_per_step"] == 4 * (agent.feature_dim + spare * width) + 4 * 4 + 40
    assert found["flops_action_K1"] < found["flops_action_K"] < 20 * found["flops_action_K1"]
    assert found["gpu_bytes_activations"] > 0


def test_parameters_at_the_released_size():
    flags = dict(backbone="pi0", head="flow", finetune="expert", device="cpu", chunk_len=10, image_size=224)
    args = script.Args(**flags)
    one = np.ones(1, int)
    demos = Demos(program.toy_observations(args, 2), np.eye(2, 4, dtype=np.float32), one, one, "none")
    with torch.device("meta"):
        agent = script.Agent(args, demos)
    models = program.count(agent.backbone.parameters()) + program.count(agent.flow_policy.parameters())
    assert models == 3_238_048_528
    layer = 2 * 1024 * 2048 + 2 * 1024 * 256 + 3 * 1024 * 4096 + 2 * 1024  # attention, MLP, norms
    projections = 3 * 1024 * 32 + 2 * 1024 + 32 + 3 * 1024 * 1024 + 2 * 1024  # of actions and state; the time MLP
    assert program.count(agent.cloned_weights()) == 18 * layer + 1024 + projections


def test_dry_run_takes_the_flags_of_the_script(monkeypatch, capsys):
    words = ["--backbone", "pi05", "--image-size", "224", "--device", "cpu", "--finetune", "head"]
    flags = parse_flags(script.Args, "", script.TABLES, words)
    assert flags.bf16 and flags.micro_batch
    words = ["--backbone", "pi05-compact", "--obs-mode", "state", "--device", "cpu"]
    program.main(parse_flags(script.Args, "", script.TABLES, words))
    assert json.loads(capsys.readouterr().out)["gpu_gib_stage_0"] > 0
    with pytest.raises(UserError, match="give --image-size 224"):
        dry_run(script.Args(backbone="pi0", device="cpu"))


# --- memory of stage 0 ---
MEDIUM = dataclasses.replace(  # activations weigh about as much as weights, gradients and moments together
    SMALL, vlm_width=64, vlm_mlp=256, expert_width=32, expert_mlp=64, depth=4, head_dim=32, vit_width=32, vit_mlp=64,
    vit_depth=4, patch=8, points=0, max_tokens=7,
)  # fmt: skip


def cloning_batch(args, rows):
    obs = {name: torch.from_numpy(value) for name, value in program.toy_observations(args, rows).items()}
    actions = 4 * args.chunk_len
    return obs, torch.linspace(-0.5, 0.5, rows * actions).view(rows, actions)


def medium_agent(args):
    torch.manual_seed(0)
    one = np.ones(1, int)
    demos = Demos(program.toy_observations(args, 2), np.eye(2, 4, dtype=np.float32), one, one, "")
    return script.Agent(args, demos)


def medium_args(**flags):
    return script.Args(**dict(env_id="PushCube-v1", cameras="primary", device="cpu", hidden_dim=32) | flags)


def set_medium(monkeypatch, recompute):
    monkeypatch.setitem(pi0.PRESETS, "pi0-compact", dataclasses.replace(MEDIUM, recompute=recompute))


def gradients(agent, args, rows=8):
    """Of a batch, after a step that moves what starts at zero; noise is that of a new generator."""
    for weight in agent.cloned_weights():
        weight.data += 0.02 * torch.randn(weight.shape, generator=rng(weight.numel()))
    accumulate(script.clone_losses(agent, *cloning_batch(args, rows), args, rng()))
    return {name: weight.grad for name, weight in agent.named_parameters() if weight.grad is not None}


def assert_close(found, expected):
    """Within 1e-6 of the whole gradient; and of each tensor, but for those that are rounding errors (a key's bias)."""
    assert found.keys() == expected.keys() and len(found) > 50
    errors = {name: (found[name] - grad).norm() for name, grad in expected.items()}
    sizes = {name: grad.norm() for name, grad in expected.items()}
    whole = torch.stack([*sizes.values()]).norm()
    assert torch.stack([*errors.values()]).norm() <= 1e-6 * whole
    seen = [name for name, size in sizes.items() if size > 1e-4 * whole]
    assert len(seen) > 0.8 * len(sizes)
    for name in seen:
        assert errors[name] <= 1e-4 * sizes[name], name


@pytest.mark.parametrize("finetune", ["full", "lora"])
@pytest.mark.parametrize("bf16", [False, True])
def test_recomputed_layers_have_the_same_gradients(finetune, bf16, monkeypatch):
    args = medium_args(finetune=finetune, bf16=bf16)
    entered = []
    original = pi0.checkpoint
    monkeypatch.setattr(pi0, "checkpoint", lambda *rest, **more: entered.append(rest[1]) or original(*rest, **more))
    set_medium(monkeypatch, recompute=False)
    kept = gradients(medium_agent(args), args)
    assert not entered
    set_medium(monkeypatch, recompute=True)
    agent = medium_agent(args)
    assert_close(gradients(agent, args), kept)
    layers = [*agent.backbone.vision.layers, *agent.backbone.layers, *agent.flow_policy.expert.layers]
    assert [id(layer) for layer in entered] == [id(layer) for layer in layers]
    with torch.no_grad():
        agent.feature(cloning_batch(args, 2)[0])
    assert len(entered) == len(layers)  # without gradients there is nothing to compute anew


@HEADS
def test_micro_batches_add_up_to_the_batch(head, monkeypatch):
    """With the same noise in each row: then it doesn't depend on how rows are drawn."""
    for name in ("randn", "rand"):
        draw = getattr(torch, name)
        monkeypatch.setattr(torch, name, functools.partial(alike_in_rows, draw))
    choose = torch.randint
    monkeypatch.setattr(
        torch, "randint", lambda high, shape, **more: alike_in_rows(functools.partial(choose, high), shape, **more)
    )
    set_medium(monkeypatch, recompute=True)
    args = medium_args(head=head, proprio_noise=0.0)
    whole = gradients(medium_agent(args), args)
    for size in (3, 4):
        part = dataclasses.replace(args, micro_batch=size)  # 3: the last one is smaller
        assert_close(gradients(medium_agent(args), part), whole)
    losses = [
        accumulate(script.clone_losses(medium_agent(args), *cloning_batch(args, 8), dataclasses.replace(args, micro_batch=n), rng()))
        for n in (0, 3)
    ]  # fmt: skip
    for name, loss in losses[0].items():
        assert losses[1][name].item() == pytest.approx(loss.item(), rel=1e-5)


def alike_in_rows(draw, shape, *rest, generator=None, **more):
    """Numbers that depend on the shape of a row alone; those of weights, without a generator, as ever."""
    if generator is None:
        return draw(shape, *rest, **more)
    return draw((1, *shape[1:]), generator=rng(len(shape)), **more).expand(shape).contiguous()


def low_rank_layer():
    torch.manual_seed(0)
    linear = nn.Linear(240, 400, bias=False).requires_grad_(False)
    return linear, pi0.LowRank(linear, 4), torch.randn(2, 3, 240)


def test_low_rank_layers_multiply_by_the_sum():
    """x W^T + x A^T B^T is x (W + B A)^T, also on a W in bfloat16, with A and B in float32."""
    linear, low, x = low_rank_layer()
    assert torch.equal(low(x), linear(x))  # it starts as the layer that it was
    low.B.data.normal_()
    torch.testing.assert_close(low(x), x @ (linear.weight + low.B @ low.A).T, rtol=1e-4, atol=1e-4)
    linear.weight.data = linear.weight.data.bfloat16()
    expected = x @ (linear.weight.float() + low.B @ low.A).T
    with torch.autocast("cpu", torch.bfloat16):
        found = low(x)
    assert found.dtype == torch.bfloat16 and low.A.dtype == low.B.dtype == torch.float32
    assert (found - expected).abs().max() < 0.02 * expected.abs().max()


def test_low_rank_layers_make_no_second_matrix():
    linear, low, x = low_rank_layer()
    with program.LiveBytes() as memory:
        low(x).sum().backward()
    assert linear.weight.nbytes < memory.most < 1.5 * linear.weight.nbytes  # W itself, seen as a view
    assert low.weight.grad is None and low.B.grad.any()
    with program.LiveBytes() as memory:
        x @ (linear.weight + low.B @ low.A).T
    assert memory.most >= 2 * linear.weight.nbytes  # what the bound above would notice


@pytest.mark.parametrize("finetune", ["full", "lora", "expert"])
def test_what_is_held_in_bf16(finetune):
    """Matrices of layers that aren't trained, and the prompt's embedding; norms and all that is trained are float32."""
    agent = toy_agent(camera=True, finetune=finetune, bf16=True, head="flow")
    stacks = [agent.backbone.vision.layers, agent.backbone.layers, agent.actor.expert.layers]
    weights = [weight for stack in stacks for weight in stack.parameters()]
    weights.append(agent.backbone.embed_tokens.weight)
    held = [weight for weight in weights if weight.dim() == 2 and not weight.requires_grad]
    assert all(weight.dtype == torch.bfloat16 for weight in held) and bool(held) == (finetune != "full")
    others = {id(weight) for weight in agent.parameters()} - {id(weight) for weight in held}
    if finetune == "lora":
        others -= {id(weight) for weight in agent.actor_ema.parameters()}  # a copy
    assert all(weight.dtype == torch.float32 for weight in agent.parameters() if id(weight) in others)


@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize("finetune", ["full", "lora"])
def test_dry_run_counts_the_memory_that_a_run_takes(finetune, recompute, monkeypatch):
    """Against the allocator: what it hands out and gets back in two updates, and while an agent and all else is made."""
    set_medium(monkeypatch, recompute)
    monkeypatch.setattr(program, "check_sizes", lambda args: None)  # it refuses --bf16 here
    args = medium_args(finetune=finetune, bf16=True, sft_batch_size=32, micro_batch=16)
    found = dry_run(dataclasses.replace(args))
    counted = {name: size for name, size in found.items() if name.startswith("gpu_bytes")}
    built = medium_agent(args)
    assert built.backbone.prompt(built.instruction)[0].shape[1] == MEDIUM.max_tokens  # which the dry run counts
    obs, chunk = cloning_batch(args, 32)
    gc.collect()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        agent = copy.deepcopy(built)
        sft = script.cloning(agent.cloned_weights(), args)
        sft_head = script.cloning(script.trained(agent.actor), args)  # noqa: F841  its average is there already
        for _ in range(2):
            script.update_clone(sft, script.clone_losses(agent, obs, chunk, args, rng()), 1e-4)
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    alive = np.cumsum([event.nbytes() for event in events])
    assert sum(counted.values()) == pytest.approx(alive.max(), rel=0.1)
    assert counted["gpu_bytes_activations"] > 0.25 * alive.max()  # so that it matters that they are right


def test_stage_0_fits_a_gpu():
    """All of pi0, at the released size and the default batch."""
    words = ["--backbone", "pi0", "--image-size", "224", "--device", "cpu", "--finetune", "full"]
    found = dry_run(parse_flags(script.Args, "", script.TABLES, words))
    assert found["parameters_pi0"] > 3.2e9
    assert 20 < found["gpu_gib_stage_0"] <= 80


# --- runs ---


class Killed(BaseException):
    """What a kill looks like from the inside: nothing catches it."""


LEARN = {
    "sft": {"backbone", "actor", "flow"},
    "sft-head": {"actor"},
    "offline": {"actor", "critic", "target_critic"},
    "warmup": {"actor", "critic", "target_critic"},
    "online": {"actor", "critic", "target_critic"},
}
STAGES = [*LEARN, "end"]


@pytest.fixture(scope="module", params=["consistency", "flow"])
def both(request, place, tmp_path_factory):
    """An undisturbed run with each head, and the weights at the start of each stage and at the end."""
    starts, enter = {}, Run.enter

    def watched(self, stage):
        going_in = enter(self, stage)
        starts[stage] = {k: v.clone() for k, v in self.agent.state_dict().items()}
        return going_in

    runs = tmp_path_factory.mktemp(request.param)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "enter", watched)
        folder = script.main(tiny_args(place, script, runs=str(runs), run_name="whole", head=request.param))
    starts["end"] = weights(folder)
    return SimpleNamespace(folder=folder, starts=starts, head=request.param)


def test_every_network_learns_in_its_stages_only(both):
    for stage, after in zip(STAGES, STAGES[1:]):
        for part in ("backbone", "flow", "actor", "critic", "target_critic"):
            own = [k for k in both.starts[stage] if k.startswith(part + ".")]
            moved = [k for k in own if not torch.equal(both.starts[stage][k], both.starts[after][k])]
            if part not in LEARN[stage]:
                assert not moved, (stage, part, moved[:3])
            elif own:  # buffers; words never read; and nothing reads the last prefix output of a flow head
                still = set(own) - set(moved)
                idle = (".unit", ".mean", "embed_tokens.weight")
                last = ("backbone.norm", "backbone.layers.1.") if both.head == "flow" else ()
                assert not {k for k in still if not k.endswith(idle) and not k.startswith(last)}, (stage, part, still)


def test_metrics_and_config(both):
    found = {name for _, _, name, _ in rows(both.folder)}
    expected = {"losses/bc", "losses/td", "losses/calql", "vgpd/zeta", "vgpd/ess", "values/q_std",
                "calib/q_minus_return", "eval/success_once", "buffer/size", "lr/sft", "grad_norm/sft"}  # fmt: skip
    assert expected <= found and ("losses/flow" in found) == (both.head == "consistency")
    for row in rows(both.folder):
        assert np.isfinite(float(row[3])) or row[2] == "calib/correlation", row
    config = json.loads((both.folder / "config.json").read_text())
    assert config["script"] == "force_pi0.py" and config["weights"] == "random" and config["args"]["head"] == both.head


def test_eval_only_and_a_start_from_the_run(both, place, tmp_path, capsys):
    """--sft-checkpoint: the same policy acts after stage 0, which is left out; critics are new."""
    capsys.readouterr()
    script.main(script.Args(eval_only=str(both.folder), device="cpu"))
    printed, last = capsys.readouterr().out, json.loads((both.folder / "summary.json").read_text())["evaluations"][-1]
    own = json.loads(printed[printed.index("{") :])
    assert all(own[k] == last[k] for k in own)
    args = tiny_args(place, script, runs=str(tmp_path), head=both.head, sft_checkpoint=str(both.folder),
                     run_name="next", warmup=False, offline_updates=0, online_steps=0)  # fmt: skip
    folder = script.main(args)
    found = weights(folder)
    kept = [k for k in found if k.startswith(("actor.", "backbone.", "flow."))]
    assert kept and all(torch.equal(found[k], both.starts["end"][k]) for k in kept)
    first = "critic.critics.0.first.weight"
    assert not torch.equal(found[first], both.starts["end"][first])
    assert json.loads((folder / "config.json").read_text())["weights"] == f"run {both.folder}"
    other = "flow" if both.head == "consistency" else "consistency"
    for changes, words in ((dict(head=other), f"was trained with --head {both.head}, not {other}"),
                           (dict(sft_checkpoint=str(tmp_path / "no")), "is no run folder")):  # fmt: skip
        with pytest.raises(UserError, match=words):
            script.main(dataclasses.replace(args, run_name="bad", **changes))


# --- flags ---


@pytest.mark.parametrize("flags, words", [
    (dict(backbone="pi0", obs_mode="rgb", image_size=224), "--backbone pi0 needs its weights: --checkpoint hf://lerobot/pi0_base"),
    (dict(checkpoint="x"), "--backbone pi0-compact none"),
    (dict(backbone="pi05", checkpoint="x"), "needs --obs-mode rgb"),
    (dict(backbone="pi05", checkpoint="x", obs_mode="rgb"), "pi05 sees 224 pixels: give --image-size 224, not 64"),
    (dict(bf16=True), "--bf16 needs a released model"),
    (dict(micro_batch=-1), "--micro-batch must be at least 0"),
    (dict(flow_times=0), "--flow-times must be at least 1"),
    (dict(backbone="pi0", checkpoint="nowhere", obs_mode="rgb", image_size=224, finetune="head"), "no weights at nowhere"),
], ids=str)  # fmt: skip
def test_flags_that_cannot_be(flags, words, place, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "load_demos", lambda *_: toy_demos())
    monkeypatch.setattr(script, "make_env", lambda *_: None)
    with pytest.raises(UserError, match=words):
        script.main(tiny_args(place, script, runs=str(tmp_path), **flags))
    assert not list(tmp_path.iterdir())


def test_shared_flags_have_the_same_defaults():
    """But for the model, and what stage 0 and stage 3 take with it: here the backbone stays frozen online."""
    theirs = {f.name: f.default for f in dataclasses.fields(force_octo.Args)}
    ours = {f.name: f.default for f in dataclasses.fields(script.Args)}
    assert theirs.keys() - ours.keys() == {"online_finetune", "round_steps", "online_lr", "weight_decay"}
    common = theirs.keys() & ours.keys()
    budgets = {"backbone", "sft_updates", "online_steps", "utd_ratio", "eval_freq"}
    assert {name for name in common if theirs[name] != ours[name]} == budgets
    one, two = (fill(s.Args, s.TABLES, obs_mode="state", env_id="other") for s in (force_octo, script))
    differ = {name for name in common if getattr(one, name) != getattr(two, name)}
    assert differ == budgets | {"q_weight", "explore_noise", "success_filter"}  # episodes in the place of rounds


def test_defaults_by_task_are_the_benchmarks():
    """With the number of updates and flags as in benchmark/commands/pi0-state.sh and pi0-rgb.sh."""
    push = fill(script.Args, script.TABLES, env_id="PushCube-v1", obs_mode="state")
    assert (push.num_demos, push.sft_updates, push.online_steps) == (50, 3000, 8000)
    assert (push.gamma, push.q_weight, push.explore_noise, push.candidate_noise) == (0.95, 0.05, 0.1, 0.1)
    pick = fill(script.Args, script.TABLES, env_id="PickCube-v1", obs_mode="state")
    stack = fill(script.Args, script.TABLES, env_id="StackCube-v1", obs_mode="state")
    assert (pick.online_steps, stack.online_steps, pick.gamma, stack.q_weight) == (5000, 8000, 0.98, 0.02)
    camera = fill(script.Args, script.TABLES, env_id="PickCube-v1")
    assert (camera.num_demos, camera.sft_updates, camera.online_steps, camera.q_weight) == (100, 3000, 4000, 0.0)
