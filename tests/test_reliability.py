"""Nothing lost, nothing silently wrong: checkpoints, signals, processes that die, foreign files. See docs/reliability.md.

tests/faults.py does the same to whole runs; here are the parts, and a sample of its cases.
"""

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import fault_inputs
import faults
import pytest
import torch
from conftest import FIXTURES, ROOT
from safetensors.torch import load_file, save_file
from torch import nn

from backbones.pi0_weights import load_pi0
from backbones.t5 import t5_token_ids
from plumbing import RunArgs, UserError, check_flags, hub, run_script, stop
from plumbing.beside import Evaluator
from plumbing.run import Run
from plumbing.storage import Checkpoints, lock, write_json
from plumbing.table import Table


# --- checkpoints ---
def rows(count: int, value: float = 0.0) -> Table:
    table = Table({"x": torch.zeros(0, 3), "n": torch.zeros(0, dtype=torch.int64)})
    table.append(count, x=torch.full((count, 3), value), n=torch.arange(count))
    return table


def put(checkpoints: Checkpoints, update: int, table: Table, value: float | None = None) -> None:
    value = float(update) if value is None else value
    checkpoints.save(f"update-{update}", {"w": torch.full((500,), value)}, {"value": value}, {"expert": table})


def got(folder: Path, resume: bool = False) -> tuple[float, int]:
    """Value and rows of the checkpoint that a run would go on from."""
    weights, state = Checkpoints(folder).load(resume)
    columns = state["buffers"]["expert"]["columns"]
    assert weights["w"].unique().tolist() == [state["value"]]
    assert columns["n"].tolist() == list(range(len(columns["x"])))
    return state["value"], len(columns["n"])


@pytest.fixture
def two(tmp_path):
    """A folder with two checkpoints, of 100 and 150 rows."""
    checkpoints, table = Checkpoints(tmp_path), rows(100)
    put(checkpoints, 1, table)
    table.append(50, x=torch.zeros(50, 3), n=torch.arange(100, 150))
    put(checkpoints, 2, table)
    return tmp_path


def test_each_step_is_on_the_disk_before_the_next(two, monkeypatch):
    done = []
    sync, replace = os.fsync, os.replace

    def watched_sync(number):
        done.append(("sync", Path(os.readlink(f"/proc/self/fd/{number}"))))
        sync(number)

    def watched_replace(source, target):
        done.append(("rename", Path(target)))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", watched_sync)
    monkeypatch.setattr(os, "replace", watched_replace)
    checkpoints, table = Checkpoints(two), rows(10)
    put(checkpoints, 3, table)
    root = two / "checkpoints"
    renamed, latest = done.index(("rename", root / "update-3")), done.index(("rename", root / "latest"))
    before = {path.name for step, path in done[:renamed] if step == "sync"}
    assert {"expert-0-x.bin", "expert-0-n.bin", "rows", ".update-3.tmp"} <= before
    assert {"weights.safetensors", "training.pt", "sums.json"} <= before
    assert ("sync", root) in done[renamed:latest]  # the name is there before anything says so
    assert ("sync", root / "latest.tmp") in done[renamed:latest] and done[-1] == ("sync", root)


class Cut(BaseException):
    pass


@pytest.mark.parametrize("step", range(0, 16))
def test_a_crash_at_any_step_leaves_a_checkpoint(two, step, monkeypatch):
    count = 0

    def dying(function):
        def call(*args, **kwargs):
            nonlocal count
            count += 1
            if count > step:
                raise Cut
            return function(*args, **kwargs)

        return call

    checkpoints = Checkpoints(two)
    _, state = checkpoints.load(resume=True)
    table = rows(0)
    table.load_state_dict(state["buffers"]["expert"]["columns"])
    table.append(20, x=torch.zeros(20, 3), n=torch.arange(150, 170))
    with monkeypatch.context() as patch:
        for owner, name in ((os, "fsync"), (os, "replace"), (shutil, "rmtree")):
            patch.setattr(owner, name, dying(getattr(owner, name)))
        try:
            put(checkpoints, 3, table)
        except Cut:
            pass
    assert got(two) in ((2.0, 150), (3.0, 170))
    checkpoints = Checkpoints(two)
    _, state = checkpoints.load(resume=True)
    table.load_state_dict(state["buffers"]["expert"]["columns"])
    table.append(30, x=torch.zeros(30, 3), n=torch.arange(table.rows, table.rows + 30))
    put(checkpoints, 4, table)
    assert got(two) == (4.0, table.rows)


def newest(folder: Path) -> Path:
    return folder / "checkpoints" / "update-2"


DAMAGE = {
    "half the weights": lambda p: os.truncate(p / "weights.safetensors", 900),
    "no weights": lambda p: (p / "weights.safetensors").unlink(),
    "a bit of the weights": lambda p: fault_inputs.flip("weights.safetensors", 5, p),
    "a bit of the state": lambda p: fault_inputs.flip("training.pt", 3, p),
    "an empty state": lambda p: os.truncate(p / "training.pt", 0),
    "a state that is a list": lambda p: fault_inputs.state_changed(lambda state: [1], p),
    "sums that are text": lambda p: (p / "sums.json").write_text("hello"),
    "rows cut short": lambda p: os.truncate(p.parent / "rows/expert-0-n.bin", 149 * 8),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_checkpoint_falls_back_with_a_line(two, name, capsys):
    DAMAGE[name](newest(two))
    assert got(two) == (1.0, 100) and newest(two).exists()  # looking changes nothing
    assert got(two, resume=True) == (1.0, 100)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and all(re.match(r"checkpoint update-2 is damaged \(.*\); going on from", x) for x in lines)
    checkpoints = Checkpoints(two)
    checkpoints.load(resume=True)
    put(checkpoints, 2, rows(160))  # the same update again, with rows that may differ
    assert got(two) == (2.0, 160)


def test_a_bit_of_the_rows_is_found(two):
    """They are shared by both checkpoints: where the older one's are hit, nothing is left that can be trusted."""
    path = two / "checkpoints/rows/expert-0-x.bin"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert got(two) == (1.0, 100)
    content[0] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match="no readable checkpoint .*expert-0-x.bin isn't as it was written"):
        Checkpoints(two).load(resume=True)
    assert newest(two).exists()


def test_rows_of_a_damaged_checkpoint_are_not_taken_for_written(tmp_path):
    """A table that only the damaged one knows is written from its beginning when the run gets there again."""
    checkpoints, table = Checkpoints(tmp_path), rows(10)
    put(checkpoints, 1, table)
    table.rewrite("x", torch.ones(10, 3))  # another version, so other files
    put(checkpoints, 2, table)
    os.truncate(newest(tmp_path) / "weights.safetensors", 9)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.load(resume=True)
    again = rows(10)
    again.rewrite("x", torch.full((10, 3), 7.0))
    put(checkpoints, 2, again)
    _, state = Checkpoints(tmp_path).load(resume=True)
    assert state["buffers"]["expert"]["columns"]["x"].unique().tolist() == [7.0]


def test_the_last_of_many_checkpoints_at_one_update_is_the_newest(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    for value in range(6):
        put(checkpoints, 5, rows(value), float(value))
        assert got(tmp_path) == (value, value)
        assert (tmp_path / "checkpoints" / (tmp_path / "checkpoints/latest").read_text()).is_dir()
    kept = [path for path in (tmp_path / "checkpoints").iterdir() if path.is_dir() and path.name != "rows"]
    assert len(kept) == 2


def test_foreign_folders_are_no_checkpoints(two):
    shutil.copytree(newest(two), newest(two).with_name("update-copy"))
    assert got(two) == (2.0, 150)


def test_only_new_rows_are_written(two):
    checkpoints = Checkpoints(two)
    _, state = checkpoints.load(resume=True)
    table = rows(0)
    table.load_state_dict(state["buffers"]["expert"]["columns"])
    path = two / "checkpoints/rows/expert-0-x.bin"
    content = bytearray(path.read_bytes())
    path.write_bytes(b"\xff" * len(content))  # were they written again, this would be gone
    table.append(5, x=torch.ones(5, 3), n=torch.arange(150, 155))
    put(checkpoints, 3, table)
    assert path.read_bytes()[: len(content)] == b"\xff" * len(content)
    path.write_bytes(content + path.read_bytes()[len(content) :])
    assert got(two) == (3.0, 155)


def test_tables_refuse_what_is_not_theirs():
    for state in (
        {"x": torch.zeros(2, 4), "n": torch.zeros(2, dtype=torch.int64)},
        {"x": torch.zeros(2, 3), "n": torch.zeros(2)},
        {"x": torch.zeros(2, 3), "n": torch.zeros(3, dtype=torch.int64)},
    ):
        with pytest.raises(ValueError):
            rows(0).load_state_dict(state)
    with pytest.raises(KeyError):
        rows(0).load_state_dict({"x": torch.zeros(2, 3)})


def test_json_has_no_nan(tmp_path):
    write_json(tmp_path / "a.json", {"x": float("nan"), "y": [1.5, float("inf")], "z": ({"n": 3},)})
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": None, "y": [1.5, None], "z": [{"n": 3}]}


def test_a_folder_belongs_to_one_process(tmp_path):
    held = lock(tmp_path)
    with pytest.raises(UserError, match=f"in use by process {os.getpid()}: .*another --run-name"):
        lock(tmp_path)
    held.close()
    lock(tmp_path).close()


# --- runs ---
@dataclasses.dataclass
class Args(RunArgs):
    obs_mode: str = "state"
    num_envs: int = 1


class Agent(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(3))


@pytest.fixture
def run(tmp_path):
    """run(): a run without any environment, with a checkpoint after each update; run(resume=...) goes on with it."""
    found = []

    def make(agent=None, **flags):
        given = dict(device="cpu", runs=str(tmp_path), log_freq=1, checkpoint_freq=1) | flags
        made = Run(Args(**given), "toy.py", ("first", "second"), {}, None)
        agent = agent or Agent()
        made.keep(agent, optimizer=torch.optim.Adam(agent.parameters()), expert=Buffer())
        found.append(made)
        return made

    yield make
    stop.can_wait, stop.folder, stop.asked = False, "", 0
    for made in found:
        made.logger.close()
        made.lock.close()


class Buffer:
    def __init__(self):
        self.tables = {"steps": rows(4)}


def step(run: Run, loss: float = 1.0) -> None:
    optimizer = run.parts["optimizer"]
    optimizer.zero_grad()
    run.agent.w.square().sum().backward()
    optimizer.step()
    run.tick({"losses/x": torch.tensor(loss)})


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_the_first_loss_that_is_not_finite_ends_a_run(run, loss):
    toy = run(run_name="toy")
    step(toy)
    with pytest.raises(
        UserError, match=r"losses/x is no longer finite \(stage first, update 2\): try a lower .*from before"
    ):
        step(toy, loss)
    assert toy.checkpoints.names() == ["update-1"]
    assert "nan" not in (toy.folder / "metrics.csv").read_text()


@pytest.mark.parametrize("value", [float("nan"), float("-inf"), 1e18])
def test_weights_that_are_not_finite_are_never_saved(run, value):
    toy = run(run_name="toy")
    with torch.no_grad():
        toy.agent.w[1] = value
    with pytest.raises(UserError, match=r"the weight w is no longer finite \(stage first, update 1\)") as found:
        step(toy)
    assert toy.checkpoints.names() == [] and "checkpoint in" not in str(found.value)


def test_two_runs_of_one_name(run):
    toy = run(run_name="toy")
    with pytest.raises(UserError, match="in use by process"):
        run(run_name="toy")
    step(toy)
    toy.lock.close()
    with pytest.raises(UserError, match="exists: choose another --run-name"):
        run(run_name="toy")


def test_default_names_of_one_second(run, monkeypatch):
    monkeypatch.setattr(time, "strftime", lambda _: "now")
    folders = [run().folder.name for _ in range(3)]
    assert [name.removeprefix(folders[0]) for name in folders] == ["", "-2", "-3"]


CHANGES = {
    "stage": lambda state: state.update(stage="dreaming"),
    "updates": lambda state: state.update(updates="many"),
    "generators": lambda state: state.pop("rng") and None,
    "optimizer": fault_inputs.wider,
    "seconds": lambda state: state.update(seconds={}),
    "rows": lambda state: state["buffers"]["expert_steps"].update(columns={}),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_state_of_another_make_is_one_line(run, name):
    toy = run(run_name="toy")
    step(toy)
    toy.lock.close()
    fault_inputs.state_changed(CHANGES[name], toy.folder / "checkpoints/update-1")
    with pytest.raises(UserError, match="of another version or make"):
        run(resume=str(toy.folder))


def test_a_log_that_is_shorter_than_its_checkpoint(run):
    toy = run(run_name="toy")
    step(toy)
    toy.lock.close()
    os.truncate(toy.folder / "metrics.csv", 20)
    with pytest.raises(UserError, match="metrics.csv is shorter than"):
        run(resume=str(toy.folder))
    assert (toy.folder / "metrics.csv").stat().st_size == 20


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_run_after_its_update(run, number, capfd):
    toy = run(run_name="toy")
    toy.args.checkpoint_freq = 1000
    step(toy)
    stop.receive(number, None)
    with pytest.raises(stop.Stopped) as end:
        step(toy)
    assert end.value.number == number and end.value.folder == str(toy.folder)
    assert toy.checkpoints.names() == ["update-2"]
    assert capfd.readouterr().err.count("once more ends at once") == 1
    with pytest.raises(stop.Stopped):  # the second one doesn't wait
        stop.receive(number, None)


class Slow:
    """In the place of `Evaluator`: results come when they are collected."""

    def __init__(self):
        self.asked = []

    def submit(self, weights, whole):
        self.asked.append(whole)

    def ready(self, seconds=0.0):
        return True

    def result(self):
        low, high = "eval/success_once_low", "eval/success_once_high"
        return {"eval/success_once": 0.5, low: 0.1, high: 0.9, "eval/episode_len": 3.0}


def test_an_evaluation_is_neither_lost_nor_made_twice(run):
    """Whether a run ends before it, within it or after it."""
    toy = run(run_name="toy")
    toy.args.eval_freq = 20
    toy.evaluator = Slow()
    assert not toy.evaluation_due()
    toy.env_steps = 25
    step(toy)  # a checkpoint, and the end could come here
    toy.lock.close()
    again = run(resume=str(toy.folder))
    again.args.eval_freq = 20
    again.evaluator = Slow()
    assert again.evaluation_due()
    again.evaluate(whole=True)
    again.evaluate(whole=True)
    assert len(again.evaluator.asked) == 1 and not again.evaluation_due()
    again.env_steps = 39
    assert not again.evaluation_due()
    again.env_steps = 40
    assert again.evaluation_due()
    again.collect_evaluation(wait=True)
    assert [found["global_step"] for found in again.evaluations] == [25] and again.evaluation_due()


# --- the end of a program ---
ENDS = {
    "user": (UserError("wrong\nflag"), 2, "error: wrong flag"),
    "worker": (EOFError(), 2, "a worker process died"),
    "memory": (MemoryError("big"), 2, "out of memory"),
    "torch's memory": (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 2, "out of memory"),
    "probabilities": (
        RuntimeError("contains either `inf`, `nan` or element < 0"),
        2,
        "is no longer finite: try a lower",
    ),
    "disk": (OSError(28, "No space left on device"), 2, "the disk is full; .*--resume"),
    "name": (OSError(36, "File name too long"), 2, "a file or folder can't be used .*too long"),
}


@pytest.mark.parametrize("name", ENDS)
def test_what_the_user_can_put_right_is_one_line(name, capsys):
    error, code, pattern = ENDS[name]
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]

    def main(args):
        raise error

    with pytest.raises(SystemExit) as end:
        run_script(main, None)
    for number, handler in zip((signal.SIGTERM, signal.SIGINT), before):
        signal.signal(number, handler)
    text = capsys.readouterr().err
    assert end.value.code == code and text.count("\n") == 1 and re.search(pattern, text), text


def test_a_mistake_of_ours_is_a_traceback():
    def main(args):
        raise RuntimeError("shapes don't fit")

    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with pytest.raises(RuntimeError, match="shapes"):
        run_script(main, None)
    for number, handler in zip((signal.SIGTERM, signal.SIGINT), before):
        signal.signal(number, handler)


def test_a_broken_pipe():
    """As in `python SCRIPT | head`: exit code 2, and nothing more than the line on what can still be heard."""
    program = (
        "from plumbing.flags import run_script\n"
        "def main(args):\n    for _ in range(100_000): print('line', flush=True)\n"
        "run_script(main, None)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdout.readline()
    process.stdout.close()
    errors = process.stderr.read().decode()
    process.stderr.close()
    assert process.wait() == 2 and errors.count("\n") == 1 and "broken pipe" in errors, errors


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), 1e30])
def test_numbers_without_a_limit_are_limited(value):
    @dataclasses.dataclass
    class Flags(Args):
        env_id: str = "PushCube-v1"
        tau: float = 0.1

    with pytest.raises(UserError, match="--tau must be"):
        check_flags(Flags(tau=value), {})
    with pytest.raises(UserError, match="--num-envs must be at most 10000, got 1000000"):
        check_flags(Flags(num_envs=1_000_000), {})


# --- the evaluation process ---
def make_env(args, count: int):
    class Env:
        def close(self):
            pass

    return Env()


FAILS, DIES = 3.0, 4.0  # weights with which an evaluation does


def evaluate(env, agent: nn.Module, args, whole: bool) -> dict[str, float]:
    if agent.w[0] == DIES:
        os.kill(os.getpid(), signal.SIGKILL)
    if agent.w[0] == FAILS:
        raise BrokenPipeError("an environment")
    if args == "sleep":
        time.sleep(600)
    return {"w": agent.w.sum().item(), "whole": float(whole)}


class Flags(str):
    num_envs = 1
    robot = "maniskill"


def test_an_evaluation_process_fails_or_dies():
    evaluator = Evaluator(Flags(""), make_env, evaluate, Agent())
    for value in (1.0, 2.0):
        evaluator.submit({"w": torch.full((3,), value)}, whole=value > 1)
        assert evaluator.result() == {"w": 3 * value, "whole": value - 1}
    for value, says in (
        (FAILS, "evaluation has failed.*BrokenPipe"),
        (DIES, "process that evaluates has died.*--resume"),
    ):
        evaluator.submit({"w": torch.full((3,), value)}, whole=True)
        with pytest.raises(UserError, match=says):
            evaluator.result()
    evaluator.close()


def test_an_evaluation_ends_with_its_program(tmp_path):
    """The program is over at once, though its evaluation would take minutes."""
    program = (
        "import sys; sys.path[:0] = ['tests', '.']\n"
        "import torch, test_reliability as t\n"
        "if __name__ == '__main__':\n"
        "    e = t.Evaluator(t.Flags('sleep'), t.make_env, t.evaluate, t.Agent())\n"
        "    e.submit({'w': torch.ones(3)}, True)\n"
        "    print(e.process.pid, flush=True)\n"
    )
    path = tmp_path / "program.py"
    path.write_text(program)
    process = subprocess.Popen([sys.executable, path], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    limit = threading.Timer(120, process.kill)
    limit.start()
    out, errors = process.communicate()
    limit.cancel()
    assert process.returncode == 0 and not errors, errors.decode()
    assert not Path(f"/proc/{int(out)}").exists()


# --- files of others ---
def test_pi0_files_with_both_twins(tmp_path):
    from test_pi0 import TINY

    folder = Path(shutil.copytree(FIXTURES / "pi0_tiny", tmp_path / "pi0"))
    file = folder / "model.safetensors"
    stored = load_file(file)
    head = "paligemma_with_expert.paligemma.lm_head.weight"
    twin = "paligemma_with_expert.paligemma.model.language_model.embed_tokens.weight"
    save_file(stored | {twin: stored[head] + 1}, file)
    with pytest.raises(UserError, match="which are to be the same and differ"):
        load_pi0(folder, TINY["pi0"])
    save_file(stored | {twin: stored[head].clone()}, file)
    load_pi0(folder, TINY["pi0"])
    name = "action_in_proj.weight"
    save_file(stored | {name: torch.full_like(stored[name], torch.nan)}, file)
    with pytest.raises(UserError, match="action_in_proj.weight isn't finite"):
        load_pi0(folder, TINY["pi0"])
    for extra, year in (("normalize_inputs.buffer_observation_state.mean", "mid 2025"),
                        ("paligemma_with_expert.paligemma.vision_tower.x", "early 2025")):  # fmt: skip
        save_file(stored | {extra: torch.zeros(3)}, file)
        with pytest.raises(UserError, match=f"lerobot of {year}: take a present revision"):
            load_pi0(folder, TINY["pi0"])


@pytest.mark.parametrize("size", [-4, 0, "seven", None, 1e9])
def test_octo_head_sizes_that_cannot_be(size, tmp_path, monkeypatch):
    from test_octo import TINY, TINY_CONFIG

    from backbones import t5
    from backbones.octo_weights import load_octo

    monkeypatch.setitem(t5.T5_SIZES, "t5-tiny", dict(vocabulary=64, layers=2, heads=4, head_dim=8, mlp_dim=48))

    folder = Path(shutil.copytree(TINY, tmp_path / "octo"))
    config = json.loads((folder / "config.json").read_text())
    config["model"]["heads"]["action"]["kwargs"]["action_dim"] = size
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="config.json says action_dim = "):
        load_octo(folder, TINY_CONFIG)


@pytest.mark.parametrize("content", [b"", b"hello", b"\x0a\xff" * 99])
def test_a_damaged_tokenizer(content, tmp_path):
    (tmp_path / "spiece.model").write_bytes(content)
    with pytest.raises(UserError, match="spiece.model is no SentencePiece model"):
        t5_token_ids(["push"], 8, tmp_path / "spiece.model")


def test_downloads_are_pinned_and_checked(tmp_path, monkeypatch):
    import hashlib

    import huggingface_hub

    asked = []
    content = b"weights"
    blob = tmp_path / "blobs" / hashlib.sha256(content).hexdigest()
    blob.parent.mkdir()
    blob.write_bytes(content)
    folder = tmp_path / "snapshots" / "abc"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").symlink_to(blob)

    def download(repository, revision, allow_patterns):
        asked.append(revision)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    name = "rail-berkeley/octo-small-1.5"
    assert hub.from_hub(name, None, ["*"]) == folder
    hub.from_hub(name, "main", ["*"])
    hub.from_hub("owner/other", None, ["*"])
    assert asked == [hub.REVISIONS[name], "main", None] and len(asked[0]) == 40
    blob.write_bytes(b"Weights")
    with pytest.raises(UserError, match="model.safetensors has sha256 .*the hub says .*delete"):
        hub.from_hub(name, None, ["*"])


# --- tests/faults.py ---
def test_the_table_counts_what_was_tried(tmp_path):
    path = tmp_path / "faults.csv"
    for kind, name, seen in (("a", "1", ""), ("a", "2", "wrong\nline"), ("b", "1", "")):
        faults.note(path, kind, name, seen)
    results = faults.read_results(path)
    assert results["a", "2"] == "wrong line"
    text = faults.tables(results, [{"rows": 3, "MB": 1.5}])
    assert (
        "| a | 2 | 1 |" in text and "| b | 1 | 1 |" in text and "| in all | 3 | 2 |" in text and "| 3 | 1.5 |" in text
    )
    document = tmp_path / "x.md"
    document.write_text("before\n<!-- faults -->\nold\n<!-- /faults -->\nafter\n")
    faults.write_document(document, text)
    assert document.read_text() == f"before\n<!-- faults -->\n{text}\n<!-- /faults -->\nafter\n"


def test_there_are_as_many_cases_as_asked_for(tmp_path):
    listed = [(kind, name) for kind, name, _ in faults.cases(tmp_path, kills=100, cuts=20)]
    assert len(listed) == len(set(listed)) >= 250 and sum("killed" in kind for kind, _ in listed) == 25
    assert len([kind for kind, _ in listed if kind == "power cut"]) in (0, 20)


def test_a_sample_of_the_cases(place, tmp_path):
    """By the program itself, in a process that has no simulator: what it starts is forked from it."""
    work = tmp_path / "work"
    shutil.copytree(place / "demos", work / "demos")
    program = [sys.executable, "tests/faults.py", "--each", "1", "--only", SAMPLE, "--kills", "10", "--cuts", "0"]
    places = ["--work", work, "--results", tmp_path / "faults.csv"]
    subprocess.run([*program, *places], cwd=ROOT, check=True, timeout=900, capture_output=True)
    results = faults.read_results(tmp_path / "faults.csv")
    assert len(results) == 17 and not any(results.values()), results


SAMPLE = (
    "^(flags|run folders|no checkpoint|training.pt|weights of|.h5|Octo|pi0|files|operators|tasks|numbers|damaged newest)"
    "|^two processes: bc: two --resume|^signals: bc: SIGTERM after 0.8|^killed four times: bc"
)
