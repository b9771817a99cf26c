"""The pure functions and networks against numbers worked out here with plain Python floats."""

import math
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import force_octo as script
from backbones.units import tanh_
from plumbing import TASKS, Demos, Task

SIGMAS = {0: 80.0, 1: 69.5, 2: 60.1, 5: 38.3, 10: 16.8, 15: 6.59, 20: 2.24, 25: 0.625, 30: 0.131, 35: 0.0175, 38: 0.0037, 39: 0.002}  # fmt: skip  # noqa: E501
FLATNESS = {80.0: 1.000, 16.8: 0.9998, 2.24: 0.998, 0.13: 0.97, 0.0175: 0.78, 0.0037: 0.21}  # w(sigma) * c_out(sigma)^2


def logsumexp(values) -> float:
    return math.log(sum(math.exp(v) for v in values))


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_tanh():
    """In its argument's memory; value and slope by hand, also where it saturates."""
    x = torch.tensor([-100.0, -2.0, 0.0, 1e-3, 0.5, 20.0], requires_grad=True)
    inner = 1.0 * x
    y = tanh_(inner)
    assert y.data_ptr() == inner.data_ptr()
    y.sum().backward()
    for value, slope, at in zip(y.tolist(), x.grad.tolist(), x.tolist()):
        assert value == pytest.approx(math.tanh(at), abs=2e-7)
        assert slope == pytest.approx(1 - math.tanh(at) ** 2, abs=1e-6)


# --- targets ---


def test_td_target():
    batch = SimpleNamespace(
        reward=torch.tensor([0.5, 0.5, 1.0, -2.0]),
        bootstrap=torch.tensor([0.9, 0.0, 0.81, 0.9]),
        mc_return=torch.tensor([0.8, 0.5, 0.2, -9.0]),
    )
    next_q = torch.tensor([[1.0, 9.0, 4.0, -5.0], [2.0, 8.0, 0.25, 3.0]])
    target = script.td_target(batch, next_q, 0.0, -3.0, 1.3)
    by_hand = [
        min(0.5 + 0.9 * 1.0, 1.3),  # 1.4, above every possible return
        0.5,  # terminated: next values don't matter
        1.0 + 0.81 * 0.25,  # the smaller critic, per sample
        max(-2.0 + 0.9 * -5.0, -3.0),  # -6.5, below every possible return
    ]
    assert target.tolist() == pytest.approx(by_hand)
    unbounded = script.td_target(batch, next_q[:1], 0.0, -100, 100)
    assert unbounded.tolist() == pytest.approx([1.4, 0.5, 4.24, -6.5])
    mixed = script.td_target(batch, next_q[:1], 0.25, -100, 4.0)
    by_hand = [0.75 * 1.4 + 0.25 * 0.8, 0.5, 0.75 * 4.24 + 0.25 * 0.2, 0.75 * -6.5 + 0.25 * -9]
    assert mixed.tolist() == pytest.approx(by_hand)
    assert script.td_target(batch, next_q, 1.0, -5, 100).tolist() == pytest.approx([0.8, 0.5, 0.2, -5])


def test_mc_returns():
    g = 0.9
    success = script.mc_returns(np.array([0.0, 0.0, 1.0], np.float32), True, g, 0.0)
    assert success.tolist() == pytest.approx([0.81, 0.9, 1.0])
    conrft = script.mc_returns(np.array([-0.05, -0.05, 10.0], np.float32), True, g, -0.05)
    assert conrft.tolist() == pytest.approx([-0.05 + g * (-0.05 + g * 10), -0.05 + g * 10, 10.0])
    # Nothing but failing steps up to the time limit: the bound for failing for ever, at every step.
    failure = script.mc_returns(np.full(4, -0.05, np.float32), False, g, -0.05)
    assert failure.tolist() == pytest.approx([-0.05 / (1 - g)] * 4)
    # A failure that the task itself ends has no future.
    ended = script.mc_returns(np.full(2, -0.05, np.float32), True, g, -0.05)
    assert ended.tolist() == pytest.approx([-0.05 * (1 + g), -0.05])
    mixed = script.mc_returns(np.array([3.0, -0.05], np.float32), False, g, -0.05)
    assert mixed.tolist() == pytest.approx([3.0 + g * -0.5, -0.5])


def test_rewards_of_a_step():
    assert script.REWARDS == {"binary": (0.0, 1.0), "conrft": (-0.05, 10.0)}


# --- the conservative term ---


def test_calql_loss_by_hand():
    q_data = [[0.3, 2.0], [-0.5, 1.0]]  # 2 critics, 2 states
    q_sampled = [[[0.1, 0.9, -1.0], [2.5, 0.0, 1.0]], [[0.0, 0.2, 3.0], [1.5, -4.0, 1.9]]]  # 3 actions
    mc = [0.5, 1.2]
    gaps, below = [], 0
    for e in range(2):
        for b in range(2):
            entries = [max(q, mc[b]) for q in q_sampled[e][b]] + [q_data[e][b]]
            gaps.append(logsumexp(entries) - math.log(4) - q_data[e][b])
            below += sum(q < mc[b] for q in q_sampled[e][b])
    loss, rate = script.calql_loss(torch.tensor(q_data), torch.tensor(q_sampled), torch.tensor(mc))
    assert loss.item() == pytest.approx(sum(gaps) / 4)
    assert rate.item() == pytest.approx(below / 12)


def test_calql_loss_gradients():
    q_data = torch.tensor([[1.0, 1.0]], requires_grad=True)
    q_sampled = torch.tensor([[[0.2, 3.0], [0.1, 0.2]]], requires_grad=True)
    loss, _ = script.calql_loss(q_data, q_sampled, torch.tensor([0.5, 1.0]))
    loss.backward()
    sampled = q_sampled.grad[0]
    assert sampled[0, 0] == 0 and sampled[1].tolist() == [0, 0]  # below its Monte-Carlo return: not pushed
    total = math.exp(0.5) + math.exp(3) + math.exp(1)
    assert sampled[0, 1].item() == pytest.approx(math.exp(3) / total / 2)  # pushed down
    assert q_data.grad[0, 0].item() == pytest.approx((math.exp(1) / total - 1) / 2)  # pushed up, less than without
    equal, _ = script.calql_loss(torch.full((2, 3), 0.7), torch.full((2, 3, 5), 0.7), torch.full((3,), -1.0))
    assert equal.item() == pytest.approx(0, abs=1e-6)


def test_calql_loss_of_a_state_ignores_the_other_states():
    q_data, q_sampled, mc = torch.randn(2, 3, generator=rng()), torch.randn(2, 3, 4, generator=rng(1)), torch.zeros(3)
    each = [script.calql_loss(q_data[:, [b]], q_sampled[:, [b]], mc[[b]])[0].item() for b in range(3)]
    assert script.calql_loss(q_data, q_sampled, mc)[0].item() == pytest.approx(sum(each) / 3, rel=1e-5)


# --- the consistency head ---


def test_karras_sigmas():
    sigmas = script.karras_sigmas().tolist()
    assert len(sigmas) == 40 and sigmas == sorted(sigmas, reverse=True)
    for i, value in SIGMAS.items():
        assert sigmas[i] == pytest.approx(value, rel=0.01), i
    by_hand = [(80 ** (1 / 7) + i / 39 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7 for i in range(40)]
    assert sigmas == pytest.approx(by_hand, rel=1e-4)


def scalings(sigma: float) -> tuple[float, float]:
    """c_skip and c_out, by hand."""
    return 0.25 / ((sigma - 0.002) ** 2 + 0.25), (sigma - 0.002) * 0.5 / math.sqrt(sigma**2 + 0.25)


@pytest.mark.parametrize("sigma", [80.0, 2.24, 0.5, 0.0037, 0.002])
def test_consistency_scalings(sigma):
    """A head whose network says 3 whatever it sees: what comes out is c_out * 3 + c_skip * x."""
    actor = script.ConsistencyActor(1, torch.full((1,), 1e-3), hidden=4)  # a large box: nothing is cut
    nn.init.zeros_(actor.out.weight)
    nn.init.constant_(actor.out.bias, 3.0)
    skip, out = scalings(sigma)
    for x in (0.0, 0.7, -5.0):
        denoised = actor.denoise(torch.zeros(1, 1), torch.full((1, 1, 1), x), torch.full((1, 1), sigma))
        assert denoised.item() == pytest.approx(3 * out + skip * x, rel=1e-5, abs=1e-6)


def test_the_least_noise_is_the_identity():
    unit = torch.tensor([1.0, 0.5, 2.0, 1.0, 1.0, 0.25])
    actor = script.ConsistencyActor(5, unit, hidden=16)
    x = (torch.rand(3, 4, 6, generator=rng()) * 2 - 1) / unit
    feature, least = torch.randn(3, 5, generator=rng(1)), torch.full((1, 1), script.SIGMA_MIN)
    assert torch.equal(actor.denoise(feature, x, least), x)
    assert not torch.allclose(actor.denoise(feature, x, torch.full((1, 1), 0.5)), x, atol=0.01)
    far = actor.denoise(feature, 9 * x, torch.full((1, 1), 0.1))
    assert torch.equal(far.abs().amax((0, 1)), 1 / unit)  # stays in the box, whose side depends on the unit


class StubActor:
    """Denoises to what it is told; remembers what it was asked."""

    def __init__(self, answer, unit=1.0):
        self.answer, self.unit, self.asked = answer, torch.tensor(unit), []

    def denoise(self, feature, x, sigma):
        self.asked.append((x, sigma))
        return self.answer.expand_as(x)


def test_consistency_loss_weights_and_noise():
    chunk, answer = torch.tensor([[0.5, -0.5]]).repeat(4000, 1), torch.tensor([0.6, -0.2])
    actor = StubActor(answer)
    loss = script.consistency_loss(actor, torch.zeros(4000, 1), chunk, rng())
    ((x, sigma),) = actor.asked
    noise = (x[:, 0] - chunk) / sigma
    assert noise.mean().abs() < 0.05 and noise.std().item() == pytest.approx(1, abs=0.05)
    error = ((0.6 - 0.5) ** 2 + (-0.2 + 0.5) ** 2) / 2
    by_hand = [(s**-2 + 4) * error for s in sigma[:, 0].tolist()]
    assert loss.shape == (4000,) and loss.tolist() == pytest.approx(by_hand, rel=1e-4)
    drawn, levels = set(sigma[:, 0].tolist()), script.karras_sigmas().tolist()
    assert drawn == set(levels[:39])  # 80 ... 0.0037; the least is the identity and is never drawn


def test_consistency_loss_averages_over_noise_levels():
    """Several levels per sample: one feature each, their own noise, and the mean of what one level alone would give."""
    chunk, answer = torch.tensor([[0.5, -0.5], [0.1, 0.2]]), torch.tensor([0.6, -0.2])
    actor = StubActor(answer)
    loss = script.consistency_loss(actor, torch.zeros(2, 1), chunk, rng(), 5)
    ((x, sigma),) = actor.asked
    assert x.shape == (2, 5, 2) and sigma.shape == (2, 5) and len(sigma.unique()) > 3
    assert len(((x - chunk[:, None]) / sigma[..., None]).unique()) == 20
    for row, error in enumerate((0.05, (0.5**2 + 0.4**2) / 2)):
        by_hand = sum((s**-2 + 4) * error for s in sigma[row].tolist()) / 5
        assert loss[row].item() == pytest.approx(by_hand, rel=1e-4)


def test_consistency_loss_is_in_units_of_the_spread():
    actor, chunk = StubActor(torch.tensor([0.6, -0.2]), unit=[0.2, 0.5]), torch.tensor([[0.1, -0.2]]).repeat(2000, 1)
    loss = script.consistency_loss(actor, torch.zeros(2000, 1), chunk, rng())
    ((x, sigma),) = actor.asked
    clean = [0.1 / 0.2, -0.2 / 0.5]
    noise = (x[:, 0] - torch.tensor(clean)) / sigma
    assert noise.mean().abs() < 0.05 and noise.std().item() == pytest.approx(1, abs=0.05)  # noise isn't scaled
    error = ((0.6 - clean[0]) ** 2 + (-0.2 - clean[1]) ** 2) / 2
    assert loss.tolist() == pytest.approx([(s**-2 + 4) * error for s in sigma[:, 0].tolist()], rel=1e-4)


@pytest.mark.parametrize("sigma", FLATNESS)
def test_loss_weight_is_flat_in_the_raw_output(sigma, monkeypatch):
    """weight(sigma) * c_out(sigma)^2, from the loss of a denoiser that is off by c_out."""
    monkeypatch.setattr(script, "karras_sigmas", lambda device: torch.tensor([sigma, 0.002]))
    c_out = scalings(sigma)[1]
    loss = script.consistency_loss(StubActor(torch.tensor(c_out)), torch.zeros(1, 1), torch.zeros(1, 3), rng())
    assert loss.item() == pytest.approx(FLATNESS[sigma], abs=0.006)


def one_by_one(actor, feature, x, sigma):
    """The head on a single state and sample, with its first layer in one piece and plain loops."""
    c_skip = 0.25 / ((sigma - 0.002) ** 2 + 0.25)
    c_out = (sigma - 0.002) * 0.5 / math.sqrt(sigma**2 + 0.25)
    c_in, half = 1 / math.sqrt(sigma**2 + 0.25), actor.time_dim // 2
    angles = [250 * math.log(sigma) * math.exp(-j * math.log(10_000) / (half - 1)) for j in range(half)]
    time = actor.time(torch.tensor([math.sin(a) for a in angles] + [math.cos(a) for a in angles]))
    weight = torch.cat([actor.feature_in.weight, actor.sample_in.weight], 1)
    h = weight @ torch.cat([feature, c_in * x, time]) + actor.feature_in.bias
    for norm, layer in zip(actor.norms, [*actor.hidden, actor.out], strict=True):
        h = (h - h.mean()) / ((h - h.mean()).square().mean() + 1e-6).sqrt() * norm.weight + norm.bias
        h = layer(torch.tanh(h))
    return (c_out * h + c_skip * x).clamp(-1 / actor.unit, 1 / actor.unit)


@pytest.mark.parametrize("second", [0.0, 0.7])
def test_samples_equal_one_by_one_denoising(second):
    torch.manual_seed(0)
    unit = torch.tensor([1.0, 0.5, 2.0, 0.8])
    actor = script.ConsistencyActor(5, unit, hidden=16)
    with torch.no_grad():
        for norm in actor.norms:
            norm.weight.uniform_(0.5, 1.5)
            norm.bias.uniform_(-0.5, 0.5)
        feature = torch.randn(3, 5)
        samples = actor.sample(feature, 6, rng(7), second_sigma=second)
        g = rng(7)
        first = 80 * torch.randn((3, 1 if second else 6, 4), generator=g)
        again = torch.randn((3, 6, 4), generator=g) if second else None
        assert samples.shape == (3, 6, 4)
        for b in range(3):
            for k in range(6):
                x = one_by_one(actor, feature[b], first[b, 0 if second else k], 80.0)
                if second:
                    x = one_by_one(actor, feature[b], x + second * again[b, k], second)
                # The angles reach 1100 radians, where float32 leaves about 1e-4.
                torch.testing.assert_close(samples[b, k], unit * x, atol=1e-3, rtol=0)
        assert torch.equal(samples, actor.sample(feature, 6, rng(7), second_sigma=second))


def test_two_steps_spread_and_one_step_does_not():
    """A head that knows two modes, and says the mean of what its noisy input leaves possible."""
    actor = script.ConsistencyActor(1, torch.ones(1), hidden=8)

    def posterior_mean(feature, x, sigma):
        far = (x[..., None] - torch.tensor([-0.8, 0.8])).square() / (2 * sigma[..., None, None] ** 2)
        return (torch.softmax(-far, -1) * torch.tensor([-0.8, 0.8])).sum(-1)

    actor.denoise = posterior_mean
    feature = torch.zeros(50, 1)
    spread = {s: actor.sample(feature, 40, rng(), second_sigma=s).std(1).mean().item() for s in (0.0, 0.63)}
    assert spread[0.0] < 0.05 < 0.3 < spread[0.63]


# --- actor losses ---


def test_success_weighted_bc():
    bc, success = torch.tensor([1.0, 2.0, 4.0, 8.0], requires_grad=True), torch.tensor([0.0, 1.0, 1.0, 0.0])
    loss = script.success_weighted_bc(bc, success)
    assert loss.item() == pytest.approx((2 + 4) / 2)
    loss.backward()
    assert bc.grad.tolist() == [0, 0.5, 0.5, 0]
    nothing = script.success_weighted_bc(bc, torch.zeros(4))
    assert nothing.item() == 0
    assert script.success_weighted_bc(bc, torch.ones(4)).item() == pytest.approx(15 / 4)


def test_q_loss():
    values = [[1.0, -3.0], [2.0, 6.0]]
    q = torch.tensor(values, requires_grad=True)
    assert script.q_loss(q, False).item() == pytest.approx(-6 / 4)
    loss = script.q_loss(q, True)
    assert loss.item() == pytest.approx(-(6 / 4) / (12 / 4), rel=1e-4)
    loss.backward()
    assert q.grad.flatten().tolist() == pytest.approx([-1 / 4 / 3] * 4, rel=1e-4)  # up, and |Q| is only a scale
    assert script.q_loss(torch.zeros(2, 2), True).item() == 0


def weights_by_hand(q, temperature, adaptive):
    mean = sum(q) / len(q)
    scale = math.sqrt(sum((x - mean) ** 2 for x in q) / len(q)) if adaptive else 1.0
    kept = [math.exp((x - max(q)) / (temperature * scale)) if x >= mean else 0.0 for x in q]
    return [x / sum(kept) for x in kept]


@pytest.mark.parametrize("temperature, adaptive", [(0.1, False), (1.0, False), (1.0, True), (0.3, True)])
def test_vgpd_weights_by_hand(temperature, adaptive):
    q = [[0.0, 0.1, 0.35, 0.5], [5.0, 4.9, 4.0, 4.95], [-1.0, -1.2, -0.2, -3.0]]
    weight, zeta = script.vgpd_target(torch.tensor(q), torch.tensor([0.2, 4.8, -1.35]), temperature, adaptive)
    for row, own in zip(weight.tolist(), q, strict=True):
        assert row == pytest.approx(weights_by_hand(own, temperature, adaptive), rel=1e-4, abs=1e-7)
        assert [w > 0 for w in row] == [x >= sum(own) / 4 for x in own]  # the mean is the baseline
    assert zeta.tolist() == [1, 0, 0]  # means 0.2375, 4.7125, -1.35 against the buffer's; a tie keeps the buffer's


def test_vgpd_always_has_a_candidate():
    for q in ([0.7] * 5, [0.1] * 3, [1e6, 1e6 + 1, 1e6 - 1], [-80.0, 90.0], [0.3]):
        for adaptive in (False, True):
            weight, zeta = script.vgpd_target(torch.tensor([q]), torch.tensor([1e9]), 0.1, adaptive)
            assert weight.isfinite().all() and weight.sum().item() == pytest.approx(1), q
            assert weight[0, q.index(max(q))] > 0 and zeta.item() == 0
    # The mean of equal numbers can be rounded up past all of them.
    many = torch.full((1, 20), 0.1) * torch.rand(4000, 1, generator=rng())
    for adaptive in (False, True):
        assert script.vgpd_target(many, many[:, 0], 1.0, adaptive)[0].isfinite().all()


def test_vgpd_adaptive_temperature_ignores_units():
    q, q_buffer = torch.randn(6, 8, generator=rng()), torch.randn(6, generator=rng(1))
    weight, zeta = script.vgpd_target(q, q_buffer, 0.7, True)
    scaled, same = script.vgpd_target(25 * q - 3, 25 * q_buffer - 3, 0.7, True)
    torch.testing.assert_close(scaled, weight, atol=1e-4, rtol=1e-3)
    assert torch.equal(zeta, same)
    fixed = script.vgpd_target(25 * q - 3, 25 * q_buffer - 3, 0.7, False)[0]
    assert not torch.allclose(fixed, weight, atol=0.05)


# --- networks ---


def test_polyak_update():
    source, target = nn.Linear(2, 1), nn.Linear(2, 1)
    for net, value in ((source, 3.0), (target, 1.0)):
        nn.init.constant_(net.weight, value)
        nn.init.constant_(net.bias, -value)
    script.polyak_update(source, target, 0.25)
    assert target.weight.tolist() == [[1.5, 1.5]] and target.bias.tolist() == [-1.5]
    assert source.weight.tolist() == [[3.0, 3.0]]
    script.polyak_update(source, target, 1.0)
    assert torch.equal(target.weight, source.weight)


def test_ensemble_equals_separate_critics():
    torch.manual_seed(0)
    unit = torch.tensor([0.5, 2.0, 1.0, 0.25])
    ensemble = script.EnsembleCritic(3, feature_dim=5, unit=unit, hidden=8)
    with torch.no_grad():
        for parameter in ensemble.parameters():
            if parameter.ndim == 1:  # biases, and the norms' gains and shifts
                parameter.uniform_(-1, 1)
        feature, chunk = torch.randn(6, 5), torch.rand(6, 7, 4)
        q = ensemble(feature, chunk)
        assert q.shape == (3, 6, 7)
        single = ensemble(feature, chunk[:, 2])
        assert single.shape == (3, 6)
        torch.testing.assert_close(single, q[:, :, 2], atol=1e-5, rtol=0)
        for e, critic in enumerate(ensemble.critics):
            for b in range(6):
                for n in range(7):
                    h = critic.first.weight @ torch.cat([feature[b], chunk[b, n] / unit]) + critic.first.bias
                    for norm, layer in zip(critic.norms, critic.layers):
                        h = (h - h.mean()) / ((h - h.mean()).square().mean() + 1e-6).sqrt()
                        h = layer.weight @ torch.tanh(h * norm.weight + norm.bias) + layer.bias
                    torch.testing.assert_close(q[e, b, n], h[0], atol=1e-5, rtol=1e-4)
    first, second, _ = ensemble.critics
    assert not torch.allclose(first.first.weight, second.first.weight)  # an ensemble of equals would be pointless
    assert not torch.allclose(first.layers[0].weight, second.layers[0].weight)


# --- units, and noise on proprio ---


def toy_policy(obs_mode="state"):
    """Everything that is learned, on two demonstrations of four steps; actions of different spreads, and a gripper."""
    action = np.array([[0.2, 0.01, 1], [-0.2, 0.01, 1], [0.2, 0.01, -1], [-0.2, 0.01, -1], [9, 9, 9]] * 2, np.float32)
    obs = {"proprio": np.random.default_rng(0).normal(size=(10, 5)).astype(np.float32)}
    if obs_mode == "rgb":
        obs["primary"] = np.zeros((10, 32, 32, 3), np.uint8)
    demos = Demos(obs, action, np.array([4, 4]), np.array([4, 4]), "toy")
    args = script.Args(obs_mode=obs_mode, image_size=32, chunk_len=2, hidden_dim=8, device="cpu")
    return script.Agent(args, demos), demos


def test_networks_see_chunks_in_units_of_twice_the_spread():
    policy, _ = toy_policy()
    # In the box, actions are +-1/1.5 in every dimension. Spread: 0.667 is cut at a quarter of the box, 0 raised to 0.02.
    assert policy.chunk_unit.tolist() == pytest.approx([0.5, 0.04, 0.5] * 2)
    for net in (policy.actor, policy.actor_ema, policy.critic, policy.target_critic):
        assert torch.equal(net.unit, policy.chunk_unit)


def test_the_instruction_is_the_task_s():
    policy, _ = toy_policy()
    assert policy.instruction == TASKS["StackCube-v1"].instruction != Task().instruction


def test_proprio_noise_touches_proprio_alone():
    policy, demos = toy_policy("rgb")
    rows = torch.arange(4)
    feature = policy.feature(demos.at(rows, 1))
    assert feature.shape == (4, policy.feature_dim) and policy.perturb(feature, 0.0, rng()) is feature
    many = feature[:1].expand(4000, -1)
    noisy = policy.perturb(many, 0.3, rng())
    assert torch.equal(noisy[:, :-5], many[:, :-5])
    assert (noisy - many)[:, -5:].std(0).tolist() == pytest.approx([0.3] * 5, abs=0.02)
    # Beside a camera the embedding knows nothing of proprio, so the noise is no use without this.
    moved = policy.feature(demos.at(rows, 1) | {"proprio": demos.obs["proprio"][4:8]})
    assert torch.equal(moved[:, :-5], feature[:, :-5]) and not torch.equal(moved[:, -5:], feature[:, -5:])


def test_demonstrations_go_on_past_the_success_while_it_holds():
    policy, demos = toy_policy()
    demos.steps = np.array([2, 2])
    demos.success = np.array([0, 1, 1, 0, 0, 0, 1, 1, 1, 0], bool)  # the first one loses it again
    for stay, starts in (True, [0, 1, 2, 5, 6, 7, 8]), (False, [0, 1, 5, 6]):
        args = script.Args(stay=stay, gamma=0.9, chunk_len=2, device="cpu")
        expert = script.ReplayBuffer(policy, args, demos.empty_obs())
        script.add_demonstrations(expert, demos, policy, args)
        assert expert.starts["row"].tolist() == starts
        assert expert.steps.rows == 10  # as in `demos`, which embeddings go by
        seen = expert.observations(torch.arange(10))
        assert torch.equal(seen["proprio"], torch.from_numpy(demos.obs["proprio"]))
        batch = expert.gather(expert.starts["row"][:2])
        np.testing.assert_allclose(batch.chunk[0], policy.normalise(demos.action[:2]).flatten())
        assert batch.reward.tolist() == pytest.approx([0.9, 1.0]) and batch.bootstrap.tolist() == [0, 0]


def test_what_is_imitated_has_no_idle_steps():
    """Those that end an episode, and what was planned past it, stay."""
    agent = SimpleNamespace(denormalise=lambda action: action, relative=True, gripper=True)
    arm = [0.0, 0.5, 0.01, 0.2, 0.0, 0.3, 0.0, 0.0]  # an episode of 7 steps, and one planned past it
    action = np.stack([arm, np.ones(8)], 1).astype(np.float32)
    steps = np.arange(8.0)
    success = np.arange(1, 8) == 7
    episode = script.Episode(torch.from_numpy(steps)[:, None], {"proprio": steps[:, None]}, action, success, True)
    found = script.without_idle(episode, agent, script.Args(drop_idle=0.1))
    kept = [1, 3, 5, 6]
    assert found.feature[:, 0].tolist() == found.obs["proprio"][:, 0].tolist() == [*kept, 7]
    np.testing.assert_array_equal(found.action, action[[*kept, 7]])
    assert found.success.tolist() == [False] * 3 + [True] and found.terminated
    same = script.without_idle(episode, agent, script.Args(drop_idle=0.0))
    assert len(same.success) == 7 and np.array_equal(same.action, action)
    letting_go = action.copy()
    letting_go[3:, 1] = -1  # the gripper opens at step 3: that step, the next one, and all that follow the last change
    found = script.without_idle(script.Episode(*vars(episode).values()), agent, script.Args(drop_idle=0.1))
    assert len(found.success) == 4
    episode.action = letting_go
    found = script.without_idle(episode, agent, script.Args(drop_idle=0.1))
    assert found.feature[:, 0].tolist() == [1, 3, 4, 5, 6, 7]


def test_a_batch_is_seen_by_its_rows():
    """What the samples of a batch saw, in its order: the expert's, then the policy's; images are shifted, each anew."""
    seen = {"proprio": torch.empty(0, 1), "primary": torch.empty(0, 16, 16, 3, dtype=torch.uint8)}
    image = np.zeros((4, 16, 16, 3), np.uint8)
    image[:, 8, 8] = np.arange(1, 5)[:, None]  # one bright pixel, and how bright says which step
    agent = SimpleNamespace(window=1, feature_dim=1, action_dim=1)
    args = script.Args(chunk_len=1, gamma=0.9, device="cpu")
    buffers = [script.ReplayBuffer(agent, args, seen) for _ in range(2)]
    for buffer, base in zip(buffers, (0, 100)):
        steps = base + np.arange(4.0)[:, None]
        obs = {"proprio": steps, "primary": image + base}
        episode = script.Episode(torch.from_numpy(steps), obs, steps[:3], np.array([0, 0, 1], bool), True)
        buffer.add(episode, script.REWARDS["binary"], np.zeros(1))
    batch = buffers[0].gather(torch.tensor([2, 0])).cat(buffers[1].gather(torch.tensor([1, 1])))
    looked = script.look(*buffers, rng(), batch)
    assert looked["proprio"].tolist() == batch.feature.tolist() == [[2], [0], [101], [101]]
    bright = looked["primary"][..., 0].flatten(1).max(1)
    assert bright.values.tolist() == [3, 1, 102, 102]
    assert len(set(bright.indices.tolist())) > 2  # equal observations too


# --- updates on stubs whose numbers can be followed ---


class Recorder(nn.Module):
    """A critic of E linear functions of feature and chunk sums; remembers what it was asked."""

    def __init__(self, slopes):
        super().__init__()
        self.slope, self.asked = nn.Parameter(torch.tensor(slopes)), []

    def forward(self, feature, chunk):
        self.asked.append((feature.clone(), chunk.clone()))
        total = feature.sum(-1)[(...,) + (None,) * (chunk.dim() - 2)] + chunk.sum(-1)
        return self.slope.view(-1, *[1] * total.dim()) * total


class FixedActor(nn.Module):
    """A policy of one parameter: samples are feature[:, :1] + shift, up to n small steps."""

    def __init__(self, dim: int):
        super().__init__()
        self.shift, self.dim, self.calls = nn.Parameter(torch.tensor(0.1)), dim, []

    def sample(self, feature, n, generator, second_sigma=0.0):
        self.calls.append((feature.clone(), n, second_sigma))
        steps = 0.01 * torch.arange(n)[None, :, None]
        return (feature[:, None, :1] + self.shift + steps).expand(-1, -1, self.dim)

    def denoise(self, feature, x, sigma):
        return (self.shift * torch.ones_like(x)).clamp(-1, 1)


def stub_agent():
    agent = SimpleNamespace(
        actor=FixedActor(2), actor_ema=FixedActor(2), critic=Recorder([1.0, 0.5]), target_critic=Recorder([2.0, 3.0]),
        H=1, action_dim=2,
    )  # fmt: skip
    for name in ("push", "candidates", "act"):
        setattr(agent, name, partial(getattr(script.Agent, name), agent))
    batch = script.Batch(
        feature=torch.tensor([[0.1], [0.2]]), chunk=torch.tensor([[0.3, 0.3], [-0.2, 0.1]]),
        reward=torch.tensor([0.05, 0.1]), bootstrap=torch.tensor([0.5, 0.0]),
        next_feature=torch.tensor([[0.02], [0.6]]), mc_return=torch.tensor([0.3, 0.405]),
        success=torch.tensor([1.0, 0.0]), row=torch.tensor([4, 2]),
    )  # fmt: skip
    return agent, batch


@pytest.mark.parametrize("alpha, mix", [(0.0, 0.0), (0.0, 0.3), (0.5, 0.0)])
def test_critic_update_by_hand(alpha, mix):
    agent, batch = stub_agent()
    args = script.Args(num_critics=2, cql_samples=2, tau=0.5, gamma=0.9, return_mix=mix)
    optimizer = torch.optim.SGD(agent.critic.parameters(), lr=1.0)
    logs = script.update_critic(agent, optimizer, batch, args, alpha, rng())
    # The next chunk is the online actor's at s': [0.12, 0.12]; targets take the smaller critic's 2 * (0.02 + 0.24).
    target = [(1 - mix) * (0.05 + 0.5 * 2.0 * 0.26) + mix * 0.3, (1 - mix) * 0.1 + mix * 0.405]
    inputs = [0.1 + 0.6, 0.2 - 0.1]
    errors = [[s * x - y for x, y in zip(inputs, target, strict=True)] for s in (1.0, 0.5)]
    assert logs["losses/td"].item() == pytest.approx(sum(e * e for row in errors for e in row) / 4, rel=1e-4)
    assert logs["values/td_target"].item() == pytest.approx(sum(target) / 2, rel=1e-4)
    gradient = [sum(2 * e * x for e, x in zip(row, inputs, strict=True)) / 4 for row in errors]
    if alpha:
        (feature, sampled) = agent.critic.asked[1]
        assert torch.equal(feature, batch.feature)  # every sampled action is judged at s, also those of s'
        assert sampled.shape == (2, 6, 2)
        random, current, following = sampled[:, :2], sampled[:, 2:4], sampled[:, 4:]
        assert random.abs().max() <= 1 and random.min() < 0 and len(random.unique()) == 8
        assert current[:, 0, 0].tolist() == pytest.approx([0.2, 0.3])
        assert following[:, 0, 0].tolist() == pytest.approx([0.12, 0.7])
        gap = 0.0
        for e, slope in enumerate((1.0, 0.5)):
            for b, mc in enumerate((0.3, 0.405)):
                sums = [feature[b].sum().item() + a.sum().item() for a in sampled[b]]
                entries = [max(slope * x, mc) for x in sums] + [slope * inputs[b]]
                gap += (logsumexp(entries) - math.log(7) - slope * inputs[b]) / 4
                total = sum(math.exp(v) for v in entries)
                moving = [math.exp(slope * x) * x for x in sums if slope * x > mc] + [math.exp(entries[-1]) * inputs[b]]
                gradient[e] += alpha * (sum(moving) / total - inputs[b]) / 4
        assert logs["losses/calql"].item() == pytest.approx(gap, rel=1e-4)
        assert logs["losses/critic"].item() == pytest.approx(logs["losses/td"].item() + alpha * gap, rel=1e-4)
    else:
        assert len(agent.critic.asked) == 1 and "losses/calql" not in logs
    slopes = [s - g for s, g in zip((1.0, 0.5), gradient, strict=True)]
    assert agent.critic.slope.tolist() == pytest.approx(slopes, rel=1e-4)
    assert agent.target_critic.slope.tolist() == pytest.approx([(2 + slopes[0]) / 2, (3 + slopes[1]) / 2], rel=1e-4)
    assert agent.actor.shift.grad is None  # the critic's loss never reaches the actor


def test_target_uses_two_critics_of_many():
    """With four critics a target takes the minimum of a random pair, so not always the least of all."""
    seen = set()
    for seed in range(40):
        agent, batch = stub_agent()
        agent.critic, agent.target_critic = Recorder([1.0] * 4), Recorder([1.0, 2.0, 3.0, 4.0])
        optimizer = torch.optim.SGD(agent.critic.parameters(), lr=0.0)
        logs = script.update_critic(agent, optimizer, batch, script.Args(num_critics=4, return_mix=0.0), 0.0, rng(seed))
        seen.add(round(((2 * logs["values/td_target"].item() - 0.1) - 0.05) / 0.5 / 0.26, 3))
    assert seen == {1.0, 2.0, 3.0}


def imitate(monkeypatch, bc_weight=2.0, q_weight=0.0, successes_only=False, shift=0.0, ema=0.75, **flags):
    """One actor update on two samples, of which the second one's trajectory failed: the agent, the logs, the batch.

    The actor's feature is by `shift` more than the critic's.
    """
    agent, batch = stub_agent()
    own = batch.feature + shift

    def surrogate(actor, feature, chunk, generator, n):
        assert n == args.noise_levels and torch.equal(feature, own)
        return (actor.shift - chunk).square().mean(-1)

    monkeypatch.setattr(script, "consistency_loss", surrogate)
    args = script.Args(**dict(noise_levels=3) | flags)
    optimizer = torch.optim.SGD(agent.actor.parameters(), lr=1.0)
    logs = script.update_actor(
        agent, optimizer, batch, own, batch.chunk, args, rng(), bc_weight, q_weight, ema, successes_only
    )
    return agent, logs, batch


BC = [(0.1 - 0.3) ** 2, ((0.1 + 0.2) ** 2 + 0) / 2]  # of the two samples of `stub_agent`, by `surrogate`


def test_the_actor_imitates_its_target(monkeypatch):
    agent, logs, _ = imitate(monkeypatch)
    assert logs["losses/bc"].item() == pytest.approx(sum(BC) / 2, rel=1e-4)
    assert logs["losses/actor"].item() == pytest.approx(2 * sum(BC) / 2, rel=1e-4)
    # d/dshift of the mean over two samples of two dimensions, times bc_weight
    gradient = 2 * 2 * ((0.1 - 0.3) * 2 + (0.1 + 0.2) + 0) / 4
    moved = 0.1 - gradient
    assert agent.actor.shift.item() == pytest.approx(moved, rel=1e-4)
    assert agent.actor_ema.shift.item() == pytest.approx(0.75 * 0.1 + 0.25 * moved, rel=1e-4)
    assert agent.critic.slope.grad is None and not agent.critic.asked and "losses/q" not in logs


def test_the_actor_can_imitate_successes_only(monkeypatch):
    _, logs, _ = imitate(monkeypatch, successes_only=True)
    assert logs["losses/bc"].item() == pytest.approx(BC[0], rel=1e-4)
    assert logs["losses/actor"].item() == pytest.approx(2 * BC[0], rel=1e-4)


def test_the_q_loss_raises_the_actor_and_spares_the_critic(monkeypatch):
    agent, logs, _ = imitate(monkeypatch, bc_weight=0.0, q_weight=0.5, q_normalize=False)
    # Q(s, pi(s)) = slope * (s + 2 * (s + shift)); d/dshift of its mean over critics: 0.75 * 2
    q = 0.75 * ((0.1 + 0.4) + (0.2 + 0.6)) / 2
    assert logs["values/q_policy"].item() == pytest.approx(q, rel=1e-4)
    assert logs["losses/q"].item() == pytest.approx(-q, rel=1e-4)
    assert logs["losses/actor"].item() == pytest.approx(-0.5 * q, rel=1e-4)
    assert agent.actor.shift.item() == pytest.approx(0.1 + 0.5 * 1.5, rel=1e-4)
    assert agent.critic.slope.grad is None and agent.critic.slope.requires_grad
    agent, logs, _ = imitate(monkeypatch, bc_weight=0.0, q_weight=0.5, q_normalize=True)
    assert logs["losses/q"].item() == pytest.approx(-1, rel=1e-4)
    assert agent.actor.shift.item() == pytest.approx(0.1 + 1, rel=1e-4)  # 0.5 * 1.5 / q, clipped to a norm of 1


def test_the_actor_s_gradient_has_a_norm_of_at_most_1(monkeypatch):
    agent, logs, _ = imitate(monkeypatch, bc_weight=0.0, q_weight=2.0, q_normalize=False)
    assert logs["grad_norm/actor"].item() == pytest.approx(3.0, rel=1e-4)  # as it was
    assert agent.actor.shift.item() == pytest.approx(0.1 + 1.0, rel=1e-4)


def test_the_actor_sees_its_own_feature_and_the_critic_the_batch_s(monkeypatch):
    agent, logs, batch = imitate(monkeypatch, q_weight=0.5, q_normalize=False, shift=0.4)
    ((feature, chunk),) = agent.critic.asked
    assert torch.equal(feature, batch.feature)
    assert chunk[:, 0].tolist() == pytest.approx([0.1 + 0.4 + 0.1, 0.2 + 0.4 + 0.1])


def online(finetune, vgpd=True, **flags):
    """One update of stage 3 with a backbone of one weight, by which what was seen becomes a feature."""
    agent, batch = stub_agent()
    agent.weight = nn.Parameter(torch.tensor(2.0))
    agent.feature = lambda obs: agent.weight * obs
    agent.perturb = lambda feature, size, generator: feature + size
    args = script.Args(
        online_finetune=finetune, vgpd=vgpd, num_critics=2, K=5, proprio_noise=0.25, actor_ema=0.75, **flags
    )
    optimizer = torch.optim.SGD([agent.weight, agent.actor.shift], lr=0.1)
    logs = script.update_online(agent, optimizer, batch, lambda batch: 3 * batch.feature, args, rng(), q_weight=0.5)
    return agent, logs


def test_learning_rate_of_a_round():
    args = script.Args(online_lr=0.5, round_steps=100)
    found = [script.online_lr(step, 40, args) for step in range(40)]
    assert found == [0.5 * script.warmup_cosine(step, 40) for step in range(40)]
    assert found[0] == pytest.approx(0.25) and max(found) == pytest.approx(0.5, rel=0.05) and found[-1] < 0.01
    assert {script.online_lr(step, 2, script.Args(online_lr=0.5, round_steps=1)) for step in range(2)} == {0.5}


def distilled(agent_and_batch=None, **flags):
    agent, batch = agent_and_batch or stub_agent()
    args = script.Args(**dict(K=5, candidate_noise=0.0) | flags)
    target, logs = script.self_distilled(agent, batch, args, rng())
    return agent, target, logs, batch


def test_the_policy_half_imitates_the_better_proposals():
    agent, target, logs, batch = distilled()
    assert torch.equal(target[0], batch.chunk[0])  # the expert half keeps its action, Eq. (12)
    # Candidates at s = 0.2: 0.30 ... 0.34 in both dimensions, the buffer's action sums to -0.1: the gate opens.
    chosen = [0.32, 0.33, 0.34]  # at or above the mean
    assert min(abs(target[1, 0].item() - c) for c in chosen) < 1e-6 and target[1, 0] == target[1, 1]
    assert logs["vgpd/zeta"] == 1 and logs["vgpd/pass_rate"].item() == pytest.approx(3 / 5)
    q = [0.75 * (0.2 + 2 * (0.3 + 0.01 * k)) for k in range(5)]
    weight = weights_by_hand(q, 1.0, True)
    assert logs["vgpd/ess"].item() == pytest.approx(1 / sum(w * w for w in weight), rel=1e-3)
    assert logs["vgpd/candidate_std"].item() == pytest.approx(0.01 * math.sqrt(2), rel=1e-3)
    assert logs["values/q_std"].item() == pytest.approx(0.015 * math.sqrt(2), rel=1e-3)
    feature, number, sigma = agent.actor_ema.calls[0]  # pi_old proposes
    assert number == 5 and sigma == script.Args().candidate_sigma and not agent.actor.calls
    assert feature.tolist() == batch.feature[1:].tolist()  # only policy states
    assert not target.requires_grad and batch.chunk[1].tolist() == pytest.approx([-0.2, 0.1])  # the batch stays


def test_the_control_chooses_by_chance_and_keeps_the_gate():
    agent, batch = stub_agent()
    many = script.Batch(*(torch.cat([value[1:]] * 6000) for value in vars(batch).values()))
    _, target, logs, _ = distilled((agent, many), by_chance=True)
    for k in range(5):
        share = (target[3000:, 0] - (0.3 + 0.01 * k)).abs().lt(1e-4).float().mean().item()
        assert share == pytest.approx(0.2, abs=0.03), k
    assert logs["vgpd/zeta"] == 1 and logs["vgpd/ess"].item() == pytest.approx(5)
    closed = stub_agent()
    closed[1].chunk[1] = 1.0  # better than all candidates
    _, target, logs, batch = distilled(closed, by_chance=True)
    assert logs["vgpd/zeta"] == 0 and torch.equal(target, batch.chunk)


def test_the_choice_of_a_proposal_follows_the_weights():
    agent, batch = stub_agent()
    many = script.Batch(*(torch.cat([value[1:]] * 6000) for value in vars(batch).values()))
    _, target, _, _ = distilled((agent, many), temperature=0.5)
    weight = weights_by_hand([0.75 * (0.2 + 2 * (0.3 + 0.01 * k)) for k in range(5)], 0.5, True)
    for k in range(5):
        share = (target[3000:, 0] - (0.3 + 0.01 * k)).abs().lt(1e-4).float().mean().item()
        assert share == pytest.approx(weight[k], abs=0.04), k


def test_the_gate_keeps_a_better_buffer_action():
    agent, batch = stub_agent()
    batch = batch.cat(batch)  # the second half is the policy's
    _, target, logs, _ = distilled((agent, batch))
    # State 0: candidates 0.2 ... 0.24 sum to less than the buffer's 0.6. State 1: the other way round.
    assert torch.equal(target[2], batch.chunk[0]) and target[3, 0] > 0.31
    assert logs["vgpd/zeta"].item() == 0.5


@torch.no_grad()
def test_exploration_pushes_a_chunk_as_a_whole():
    agent, _ = stub_agent()
    agent.H, agent.actor_ema.dim, agent.action_dim = 3, 6, 2
    feature = torch.full((4000, 1), 0.2)
    calm = agent.act(feature, rng())
    pushed = agent.act(feature, rng(), 0.1)
    assert calm.shape == pushed.shape == (4000, 3, 2) and calm.std() < 1e-6
    assert not agent.actor.calls  # pi_old acts
    push = pushed - calm
    assert np.abs(push - push[:, :1]).max() < 1e-6  # the same at every step
    push = push[:, 0]
    assert push.mean(0) == pytest.approx([0, 0], abs=0.01) and push.std(0) == pytest.approx([0.1, 0.1], rel=0.1)
    assert abs(np.corrcoef(push.T)[0, 1]) < 0.1  # but not in every direction
    assert np.abs(agent.act(feature, rng(), 5.0)).max() == 1
    args = script.Args(K=50, candidate_sigma=0.0, candidate_noise=0.1)
    candidates = agent.candidates(feature[:100], args, rng()).unflatten(-1, (3, 2))
    push = candidates - (0.3 + 0.01 * torch.arange(50))[:, None, None]
    assert (push - push[:, :, :1]).abs().max() < 1e-6  # candidates are pushed likewise, each on its own
    assert push[:, :, 0].std((0, 1)).tolist() == pytest.approx([0.1, 0.1], rel=0.1)
