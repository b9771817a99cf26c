"""Ranks: two processes do what one does with the whole batch, end and go on together, and faults are one line."""

import contextlib
import dataclasses
import importlib
import multiprocessing
import os
import pickle
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, SCRIPT, SCRIPTS, differences, latest, tiny_args
from test_alike import by_name
from test_resume import FORKS
from torch import nn

from backbones import shards
from plumbing import Demos, Run, demos, ranks, run_script

WORLD = 2
B, D = 8, 4  # a rank's samples; numbers of an action
BAR = re.compile(r"it/s|s/it|\?it")  # progress


def launch(work, *about) -> list:
    """work(rank, *about) in a process for each rank, as torchrun starts them. Returns what they send, and exit codes."""
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # outlives all ranks
    pipes = [FORKS.Pipe() for _ in range(WORLD)]
    processes = [
        FORKS.Process(target=as_rank, args=(rank, store.port, theirs, work, about))
        for rank, (_, theirs) in enumerate(pipes)
    ]
    for process in processes:
        process.start()
    for _, theirs in pipes:
        theirs.close()
    answers = []
    for ours, _ in pipes:
        try:
            answers.append(pickle.loads(ours.recv_bytes()))
        except EOFError:
            answers.append(None)
    for process in processes:
        process.join()
    return answers, [process.exitcode for process in processes]


def as_rank(rank: int, port: int, pipe, work, about) -> None:
    torch.set_num_threads(1)
    place = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=WORLD, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    place |= dict(TORCHELASTIC_USE_AGENT_STORE=True, TORCHELASTIC_RESTART_COUNT=0)
    os.environ |= {name: str(value) for name, value in place.items()}
    pipe.send_bytes(pickle.dumps(work(rank, *about)))


# --- two halves are a whole ---
def toy_demos(rows=12, episodes=3) -> Demos:
    g = np.random.default_rng(0)
    obs = {"proprio": g.normal(size=(rows * episodes, 5)).astype(np.float32)}
    action = g.uniform(-0.5, 0.5, (rows * episodes, D)).astype(np.float32)
    lengths = np.full(episodes, rows - 1)
    return Demos(obs, action, lengths, lengths, "toy", success=np.ones(rows * episodes, bool))


def random_batch(script, agent, args, seed: int):
    """Samples of all ranks: half expert, half policy; successes and prefixes differ."""
    g = torch.Generator().manual_seed(seed)
    N, F, H = WORLD * B, agent.feature_dim, args.chunk_len
    K = (getattr(args, "critic_len", None),) if script.__name__ == "co_rft_chunked" else ()
    return by_name(
        script.Batch,
        feature=torch.randn(N, F, generator=g),
        chunk=torch.rand(N, H * D, generator=g) * 2 - 1,
        reward=torch.rand(N, *K, generator=g),
        bootstrap=torch.rand(N, *K, generator=g),
        next_feature=torch.randn(N, *K, F, generator=g),
        mc_return=torch.rand(N, generator=g),
        success=(torch.arange(N) % B < torch.arange(1, N + 1) // 5).float(),
        expert=torch.arange(N) < N // 2,
        row=torch.arange(N),
        valid=(torch.rand(N, *K, generator=g) < torch.linspace(0.3, 1, N)[:, None]).float() if K else None,
        terminated=torch.arange(N) % 3 == 0,
    )


def share(script, size: int, rank: int, world: int) -> torch.Tensor:
    """Which of `size` samples of all ranks are this rank's; where the policy's are the second half, a part of either."""
    by_halves = hasattr(script, "self_distilled") and size == WORLD * B
    halves = torch.arange(size).chunk(2 if by_halves else 1)
    return torch.cat([half.chunk(world)[rank] for half in halves])


def part(script, draw, rank: int, world: int):
    """A function that draws [B, ...] numbers, for this rank's part of what one process would draw."""

    def drawn(*front, **more):
        *front, shape = front
        whole = draw(*front, (shape[0] * world, *shape[1:]), **more)
        return whole[share(script, len(whole), rank, world)]

    return drawn


@contextlib.contextmanager
def parts_of_noise(script, rank: int, world: int):
    rand = part(script, torch.rand, rank, world)

    def choose(weight, generator):
        return (weight / -rand(weight.shape, generator=generator).log()).argmax(-1)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "drawn", choose, raising=False)
        patch.setattr(torch, "rand", rand)
        for name in ("randn", "randint"):
            patch.setattr(torch, name, part(script, getattr(torch, name), rank, world))
        yield


FLAGS = dict(
    obs_mode="state", device="cpu", chunk_len=2, hidden_dim=24, K=4, max_episode_steps=10, cql_samples=2, sft_batch_size=16,
    batch_size=16, q_normalize=True, q_scale="mean-abs", bc_demo_only=True, onestep_mse=0.1, critic_len=2, success_filter=True,
    flow_times=2, proprio_noise=0.1,
)  # fmt: skip


def updates(name: str, rank: int, world: int, rounds: int = 4, **flags) -> tuple[list[dict], dict]:
    """Every kind of update of a script, `rounds` times, on a rank's rows: logged values, and the weights then."""
    script = importlib.import_module(name)
    own = {field: value for field, value in (FLAGS | flags).items() if hasattr(script.Args, field)}
    args, shown = script.Args(**own), toy_demos()
    torch.manual_seed(0)
    agent = script.Agent(args, shown)
    g = torch.Generator().manual_seed(1)
    body = nn.ModuleList([agent.backbone, *getattr(agent, "flow", []), agent.actor])
    optimizers = {
        "clone": torch.optim.AdamW(body.parameters(), lr=1e-3),
        "critic": torch.optim.Adam(getattr(agent, "critic", agent.actor).parameters(), lr=1e-3),
        "actor": torch.optim.Adam(agent.actor.parameters(), lr=1e-3),
    }
    ranks.average_gradients(weight for one in optimizers.values() for weight in one.param_groups[0]["params"])
    mine = share(script, WORLD * B, rank, world)
    found = []
    for i in range(rounds):
        batch = random_batch(script, agent, args, i) if hasattr(script, "Batch") else None
        rows = torch.arange(i, i + WORLD * B)[mine]
        known = dict(agent=agent, args=args, generator=g, cql_alpha=0.1, cql_weight=0.1)
        known["observed"] = lambda batch: shown.at(batch.row, 1)
        with parts_of_noise(script, rank, world):
            logs = clone(
                script, known, body, optimizers["clone"], shown.at(rows, 1), agent.normalise(shown.action)[rows]
            )
            if batch is not None:
                batch = script.Batch(*(value[mine] for value in vars(batch).values()))
                logs |= by_name(script.update_critic, optimizer=optimizers["critic"], batch=batch, **known)
                logs |= learn(script, known, optimizers, batch)
        found.append({key: torch.as_tensor(value).item() for key, value in ranks.means(logs).items()})
    return found, {key: value.detach().clone() for key, value in agent.state_dict().items()}


def clone(script, known: dict, body, optimizer, obs: dict, action: np.ndarray) -> dict:
    """An update of stage 0, or of bc.py."""
    agent, args, g = known["agent"], known["args"], known["generator"]
    chunk = torch.as_tensor(action).repeat(1, args.chunk_len)
    if script.__name__ == "force_pi0":
        losses = by_name(script.clone_losses, obs=obs, chunk=chunk, **known)
        weights = nn.ParameterList(body.parameters())
        cloning = script.Cloning(weights, optimizer, torch.optim.swa_utils.AveragedModel(weights))
        return by_name(script.update_clone, cloning=cloning, losses=losses, lr=1e-3)
    feature = agent.feature(obs)
    if hasattr(script, "update_clone"):
        return by_name(script.update_clone, optimizer=optimizer, feature=feature, chunk=chunk, **known)
    feature = agent.perturb(feature, args.proprio_noise, g)
    if script.__name__ == "bc":
        loss = by_name(script.bc_loss, feature=feature, chunk=chunk, n=args.noise_levels, **known)
    else:
        loss = script.mse_loss(agent.actor(feature), chunk, agent.actor.unit)
    optimizer.zero_grad()
    loss.backward()
    grad_norm = nn.utils.clip_grad_norm_(body.parameters(), 1.0)
    optimizer.step()
    return {"losses/clone": loss, "grad_norm/sft": grad_norm}


def learn(script, known: dict, optimizers: dict, batch) -> dict:
    """An update of the actor, on successes where the script can do that, and one of the online stage."""
    more = dict(feature=batch.feature, target=batch.chunk, bc_weight=1.0, q_weight=0.3, ema=0.9, successes_only=True)
    logs = by_name(script.update_actor, optimizer=optimizers["actor"], batch=batch, **known, **more)
    if hasattr(script, "update_online"):
        optimizer = optimizers["clone" if script.__name__ == "force_octo" else "actor"]
        found = by_name(script.update_online, optimizer=optimizer, batch=batch, q_weight=0.3, **known)
        logs |= {f"online {name}": value for name, value in found.items()}
    return logs


CASES = [(name, {}) for name in SCRIPTS] + [
    ("bc", dict(head="diffusion", noise_levels=1)), ("bc", dict(head="mse-chunk")), ("force_pi0", dict(head="flow")),
]  # fmt: skip


def half_updates(rank: int, cases: list) -> list:
    ranks.join()
    return [updates(name, rank, WORLD, **flags) for name, flags in cases]


@pytest.fixture(scope="module")
def halves():
    """What each of two ranks found in all cases."""
    answers, codes = launch(half_updates, CASES)
    assert codes == [0] * WORLD
    return answers


@pytest.mark.parametrize(
    "case", range(len(CASES)), ids=[" ".join([name, *flags.values()][:2]) for name, flags in CASES]
)
def test_two_half_batches_are_a_whole_one(case, halves):
    name, flags = CASES[case]
    whole, weights = updates(name, 0, 1, **flags)
    (first, first_weights), (second, second_weights) = (half[case] for half in halves)
    assert first == second
    assert all(torch.equal(value, second_weights[key]) for key, value in first_weights.items())
    for number, (one, two) in enumerate(zip(whole, first, strict=True)):
        start = number == 0  # the same weights; then rounding grows. All within 1e-6 with ATEN_CPU_CAPABILITY=avx2
        assert two == pytest.approx(one, rel=1e-5 if start else 1e-4, abs=1e-5)
        losses = {key: value for key, value in one.items() if "losses/" in key}
        close = 2e-6 if start else 2e-5
        assert losses and {key: two[key] for key in losses} == pytest.approx(losses, rel=close, abs=1e-6)
    assert any(not torch.equal(value, weights[key]) for key, value in updates(name, 0, 1, 0, **flags)[1].items())


# --- weights that are shared out ---
SHARED = [dict(head="consistency"), dict(head="flow", micro_batch=4)]


def cloned(rank: int, world: int, flags: dict, rounds: int, state=None) -> tuple:
    """Stage 0 of force_pi0 for so many updates: losses, the weights that it ends with, and its state before the end."""
    script = importlib.import_module("force_pi0")
    known = {field: value for field, value in (FLAGS | flags).items() if hasattr(script.Args, field)}
    args, shown = script.Args(**known), toy_demos()
    torch.manual_seed(0)
    agent = script.Agent(args, shown)
    learner = script.shared_out(agent, script.Agent.blocks)
    sft = script.cloning(learner.cloned_weights(), args)
    first = 0
    if state:
        first, parts = state
        for name, part in sft.parts("sft").items():
            part.load_state_dict(parts[name])
    mine = share(script, WORLD * B, rank, world) if "micro_batch" not in flags else slice(None)
    g = torch.Generator().manual_seed(first)
    found = []
    for i in range(first, rounds):
        g.manual_seed(i)
        rows = torch.arange(i, i + WORLD * B)[mine]
        chunk = torch.as_tensor(agent.normalise(shown.action))[rows].repeat(1, args.chunk_len)
        noisy = parts_of_noise(script, rank, world) if "micro_batch" not in flags else contextlib.nullcontext()
        with noisy:
            logs = script.update_clone(sft, script.clone_losses(learner, shown.at(rows, 1), chunk, args, g), 1e-3)
        found.append({key: torch.as_tensor(value).item() for key, value in ranks.means(logs).items()})
    held = sum(weight.numel() for weight in map(shards.own, sft.weights))
    parts = {name: part.state_dict() for name, part in sft.parts("sft").items()}
    kept = pickle.loads(pickle.dumps((rounds, parts)))  # as a checkpoint would
    sft.end(agent.cloned_weights())
    return found, [weight.detach() for weight in agent.cloned_weights()], kept, held


def shared_clones(rank: int) -> list:
    ranks.join()
    found = []
    for flags in SHARED:
        whole = cloned(rank, WORLD, flags, 4)
        half_way = cloned(rank, WORLD, flags, 2)
        rest = cloned(rank, WORLD, flags, 4, half_way[2])
        found.append((*whole[:2], whole[3], rest[0], rest[1]))
    return found


@pytest.fixture(scope="module")
def shares():
    answers, codes = launch(shared_clones)
    assert codes == [0] * WORLD
    return answers


@pytest.mark.parametrize("case", range(len(SHARED)), ids=[" ".join(map(str, flags.values())) for flags in SHARED])
def test_weights_shared_out_learn_what_whole_ones_do(case, shares):
    """Losses and weights of one rank; each of two holds half of the numbers; a checkpoint goes on with the same bits."""
    losses, weights, _, _ = cloned(0, 1, SHARED[case], 4)
    (first, first_weights, one, rest, rest_weights), (second, second_weights, two, *_) = (half[case] for half in shares)
    assert first == second and rest == first[2:]
    for found, expected in zip(first, losses, strict=True):
        assert found == pytest.approx(expected, rel=1e-5, abs=1e-6)
    numbers = sum(weight.numel() for weight in weights)
    assert one + two == numbers and 0.4 * numbers < one < 0.6 * numbers
    for ours, theirs, again, alone in zip(first_weights, second_weights, rest_weights, weights, strict=True):
        assert torch.equal(ours, theirs) and torch.equal(ours, again)
        far = ~torch.isclose(ours, alone, rtol=1e-3, atol=2e-4)  # four steps of 1e-3
        assert far.float().mean() < 1e-3 and (ours - alone).abs().max() < 1e-3  # where a gradient is all rounding error
    assert any(not torch.equal(ours, start) for ours, start in zip(weights, cloned(0, 1, SHARED[case], 0)[1]))


# --- whole runs ---
def toy_cache(args) -> None:
    """Demonstrations of random numbers, in the place of those that a planner would make."""
    path = demos.cache_of(args)
    path.parent.mkdir(parents=True, exist_ok=True)
    g = np.random.default_rng(0)
    lengths = np.full(4, 9)
    numbers = dict(obs_proprio=g.normal(size=(40, 17)), action=g.uniform(-0.3, 0.3, (40, 4)))
    arrays = {name: value.astype(np.float32) for name, value in numbers.items()}
    demos.write(path, source="toy", gripper=True, lengths=lengths, steps=lengths, success=np.ones(40, bool), **arrays)


def live(rank: int, name: str, args, end: tuple | None) -> None:
    """A rank's life, which ends as run_script ends it, or by a signal to one rank: (rank, signal, stage, its updates)."""
    script, tick = importlib.import_module(name), Run.tick
    sys.stderr = open(Path(args.demo_dir).parent / f"stderr-{rank}", "w")
    sys.stdout = open(os.devnull, "w")

    def deadly_tick(self, *rest, **more):
        if end and end[0] == rank and end[2:] == (self.stage, self.stage_updates):
            os.kill(os.getpid(), end[1])
        tick(self, *rest, **more)

    Run.tick = deadly_tick
    multiprocessing.get_context = lambda kind: FORKS
    run_script(script.main, args)


def lives(name: str, args, end: tuple | None = None) -> tuple[list[int], list[str]]:
    """Exit codes of both ranks, and the lines that they said, without progress."""
    _, codes = launch(live, name, args, end)
    said = [(Path(args.demo_dir).parent / f"stderr-{rank}").read_text().replace("\r", "\n") for rank in range(WORLD)]
    lines = [line for text in said for line in text.splitlines() if line.strip() and not BAR.search(line)]
    return codes, lines


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Flags of a run of two ranks in a folder with demonstrations, and its run folder."""
    folder = tmp_path_factory.mktemp("ranks")
    script = importlib.import_module("force_octo")
    args = tiny_args(folder, script, run_name="whole", warmup_episodes=3)
    toy_cache(args)
    assert lives("force_octo", args)[0] == [0, 0]
    return args, Path(args.runs) / "whole"


def state_of(folder: Path) -> dict:
    return torch.load(latest(folder) / "training.pt", weights_only=True)


def test_ranks_share_the_work(undisturbed):
    args, folder = undisturbed
    state = state_of(folder)
    assert state["env_steps"] == 10 * state["episodes"] and state["stage_start"] == 30  # three episodes of warm-up
    (other,) = state["others"]
    rounds = (state["episodes"] - 3) // WORLD
    assert rounds >= 1 and state["episodes"] == 3 + WORLD * rounds
    for own, warmup in ((state, 2), (other, 1)):  # what each has seen itself
        assert own["buffers"]["policy_steps"]["columns"]["reward"]["shape"] == [13 * (warmup + rounds)]
    sums = [own["buffers"]["policy_steps"]["columns"]["action"]["sum"] for own in (state, other)]
    assert sums[0] != sums[1]
    assert not torch.equal(state["rng"]["batch"], other["rng"]["batch"]) and other["parts"] == {}
    assert state["updates"] == 6 + 5 + 6 + int(0.3 * (state["env_steps"] - 30))


def test_ranks_that_end_go_on_as_if_nothing_had_been(undisturbed, command):
    args, whole = undisturbed
    script = importlib.import_module("force_octo")
    args = tiny_args(Path(args.demo_dir).parent, script, run_name="ended", warmup_episodes=3)
    folder = Path(args.runs) / "ended"

    codes, lines = lives("force_octo", args, (1, signal.SIGTERM, "sft", 3))  # one hears of it
    assert codes == [143, 143]
    assert lines[-1:] == [f"stopped by SIGTERM; go on with --resume {folder}"] and len(lines) <= 2

    again = tiny_args(Path(args.demo_dir).parent, script, resume=str(folder))
    codes, lines = lives("force_octo", again, (1, signal.SIGKILL, "online", 2))
    assert codes == [2, -signal.SIGKILL]
    said = [line for line in lines if "env steps" not in line]
    assert len(said) == 1, said
    assert said[0].startswith("error: another rank has ended") and f"--resume {folder}" in said[0]

    code, _, said = command("--resume", folder)
    assert (
        code == 2 and said.count("\n") == 1 and "is a run of 2 ranks" in said and "torchrun --nproc-per-node 2" in said
    )

    codes, lines = lives("force_octo", again)
    assert codes == [0, 0] and not [line for line in lines if "error" in line]
    assert differences(whole, folder) == []


def test_ranks_that_share_weights_go_on_with_them(tmp_path):
    """pi0's stage 0 alone: ended within it, and gone on with, it leaves what an undisturbed run does."""
    script = importlib.import_module("force_pi0")
    few = dict(warmup=False, offline_updates=0, online_steps=0, sft_updates=4, sft_head_updates=1)
    args = tiny_args(tmp_path, script, run_name="whole", **few)
    toy_cache(args)
    assert lives("force_pi0", args)[0] == [0, 0]
    ended = dataclasses.replace(args, run_name="ended")
    assert lives("force_pi0", ended, (1, signal.SIGTERM, "sft", 2))[0] == [143, 143]
    state = state_of(tmp_path / "runs/ended")
    halves = [own["parts"]["sft_shards"]["weights"]["0"] for own in (state, *state["others"])]
    assert not torch.equal(*halves)
    again = tiny_args(tmp_path, script, resume=str(tmp_path / "runs/ended"))
    assert lives("force_pi0", again)[0] == [0, 0]
    assert differences(tmp_path / "runs/whole", tmp_path / "runs/ended") == []
    assert "sft_shards" not in state_of(tmp_path / "runs/whole")["parts"]


# --- bad input ---
@pytest.mark.parametrize("environment, message", [
    (dict(RANK="0"), "WORLD_SIZE and LOCAL_RANK and MASTER_ADDR and MASTER_PORT missing"),
    (dict(WORLD_SIZE="2"), "RANK and LOCAL_RANK and MASTER_ADDR and MASTER_PORT missing"),
    (dict(RANK="2", WORLD_SIZE="2", LOCAL_RANK="0", MASTER_ADDR="x", MASTER_PORT="1"), "RANK=2 must be in 0..1"),
    (dict(RANK="a", WORLD_SIZE="2", LOCAL_RANK="0", MASTER_ADDR="x", MASTER_PORT="1"), "must be numbers"),
])  # fmt: skip
def test_an_environment_that_does_not_fit(environment, message, command, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    code, _, said = command("--obs-mode", "state")
    assert code == 2 and said.count("\n") == 1 and message in said


@pytest.mark.parametrize("script, flags, message", [
    ("force_octo", "--batch-size 64", "--batch-size 64 is shared by 3 ranks"),
    ("force_octo", "--batch-size 3", "at least 6"),
    ("co_rft_chunked", "--batch-size 66 --sft-batch-size 64", "--sft-batch-size 64 is shared by 3 ranks"),
    ("bc", "--batch-size 63 --num-envs 0", "--num-envs must be at least 1"),
    ("bc", "--batch-size 63 --sim-backend physx_cuda", "leave torchrun out|no CUDA device"),
    ("conrft", "--batch-size 63 --sft-batch-size 63 --intervention oracle", "one operator"),
    ("conrft", "--robot franka-http --robot-config {robot} --batch-size 63", "is one arm"),
    ("bc", "--eval-only {run}", "--eval-only is the work of one process"),
])  # fmt: skip
def test_flags_that_ranks_can_not_have(script, flags, message, undisturbed, command, monkeypatch, tmp_path):
    monkeypatch.setattr(ranks, "WORLD", 3)
    args, run = undisturbed
    robot = ROOT / "robots" / "example.toml"
    script = "force_octo" if "{run}" in flags else script
    words = flags.format(run=run, robot=robot).split()
    code, _, said = command("--obs-mode", "rgb" if "robot" in flags else "state", *words, script=ROOT / f"{script}.py")
    assert code == 2 and said.count("\n") == 1 and re.search(message, said)


def test_torchrun_says_a_fault_once(tmp_path):
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    flags = ["--obs-mode", "state", "--sft-batch-size", "63", "--runs", str(tmp_path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    ended = subprocess.run([*words, str(SCRIPT), *flags], capture_output=True, text=True, cwd=ROOT, env=environment)
    assert ended.returncode == 1 and ended.stderr.count("error: --sft-batch-size 63 is shared by 2 ranks") == 1
