"""Policies outside their runs: loaded, asked, served, exported, pushed, evaluated; and their successes recorded."""

import contextlib
import csv
import dataclasses
import hashlib
import http.server
import importlib
import io
import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import h5py
import msgpack
import numpy as np
import pytest
import torch
from conftest import ROOT, SCRIPTS, follow_demonstrations, tiny_args

import bc
import evaluate
import export
import serve
from plumbing import TASKS, Demos, Task, UserError, load_demos, record
from plumbing.evaluation import EVAL_SEED
from plumbing.openpi import Client, pack, server, unpack
from plumbing.policy import load_policy
from plumbing.storage import Checkpoints, write_json

P, A = 17, 4  # PushCube's numbers, in state mode


def a_run(folder: Path, name: str, **changes) -> tuple[Path, object, object]:
    """A run folder with random weights, the agent that they are of, and its flags."""
    script = importlib.import_module(name)
    args = tiny_args(folder, script, **changes)
    script.validate(args)
    rng = np.random.default_rng(0)
    obs = {"proprio": rng.normal(size=(9, P)).astype(np.float32)}
    if args.obs_mode == "rgb":
        obs |= {camera: rng.integers(0, 255, (9, 64, 64, 3)).astype(np.uint8) for camera in ("primary", "wrist")}
    action = rng.uniform(-1, 1, (9, A)).astype(np.float32)
    torch.manual_seed(1)
    agent = script.Agent(args, Demos(obs, action, np.array([8]), np.array([8]), "toy"))
    run = folder / "runs" / name
    run.mkdir(parents=True)
    write_json(run / "config.json", {"script": f"{name}.py", "args": dataclasses.asdict(args)})
    Checkpoints(run).save("update-1", agent.state_dict(), {}, {})
    return run, agent.eval(), args


def an_observation(seed: int = 1, cameras: bool = False) -> dict:
    rng = np.random.default_rng(seed)
    images = {name: rng.integers(0, 255, (64, 64, 3)).astype(np.uint8) for name in ("primary", "wrist")}
    return {"proprio": rng.normal(size=P).astype(np.float32)} | (images if cameras else {})


@pytest.fixture
def run(tmp_path):
    return a_run(tmp_path, "bc")[0]


# --- load_policy ---
@pytest.mark.parametrize("name, cameras", [(name, False) for name in SCRIPTS] + [("bc", True), ("force_pi0", True)])
def test_a_policy_acts_as_its_agent(name, cameras, tmp_path):
    """As the script's rollout asks it, whatever the script; from the run and from an exported folder."""
    mode = dict(obs_mode="rgb", cameras="both") if cameras else {}
    folder, agent, args = a_run(tmp_path, name, **mode)
    obs = an_observation(cameras=cameras)
    batch = {key: value[None] for key, value in obs.items()}
    with torch.inference_mode():
        feature = agent.feature(agent.recent([batch]))
        noise = [] if name == "co_rft_chunked" else [torch.Generator().manual_seed(0)]
        expected = agent.denormalise(agent.act(feature, *noise)[0])
    policy = load_policy(folder)
    assert policy.cameras == ({"primary": 64, "wrist": 64} if cameras else {}) and policy.proprio_dim == P
    actions = policy.act(obs)
    assert actions.shape == (args.chunk_len, A) and actions.dtype == np.float32
    np.testing.assert_allclose(actions, expected, rtol=1e-5, atol=1e-6)
    policy.save(tmp_path / "out")
    again = load_policy(tmp_path / "out")
    assert not [key for key in again.agent.state_dict() if key not in agent.state_dict()]
    np.testing.assert_allclose(again.act(obs), actions, rtol=1e-5, atol=1e-6)
    assert again.describe() == policy.describe()


def test_a_policy_keeps_its_instruction_where_its_task_is_unknown(tmp_path, monkeypatch):
    """Whoever serves a policy hasn't got the module of its task."""
    monkeypatch.setitem(TASKS, "gone:Gone-v1", Task())
    folder, _, _ = a_run(tmp_path, "bc")
    config = json.loads((folder / "config.json").read_text())
    assert load_policy(folder).instruction == "push the cube onto the round target"
    config["args"]["env_id"] = "gone:Gone-v1"
    for task, said in (({"instruction": "put it there"}, "put it there"), ({"what": 1}, None)):
        write_json(folder / "config.json", config | {"task": task})
        if said:
            policy = load_policy(folder)
            assert policy.instruction == policy.describe()["instruction"] == said
            policy.save(tmp_path / "out")
            assert load_policy(tmp_path / "out").instruction == said
        else:
            with pytest.raises(UserError, match="another make of task"):
                load_policy(folder)


def test_an_instruction_counts(run):
    policy = load_policy(run)
    own = policy.act(an_observation(), policy.instruction)
    policy.seed(0)
    other = policy.act(an_observation(), "do something else")
    policy.seed(0)
    assert policy.agent.instruction == policy.instruction and not np.array_equal(own, other)
    assert np.array_equal(own, policy.act(an_observation()))


@pytest.mark.parametrize("change, words", [
    (dict(proprio=None), "lacks 'proprio'"), (dict(primary=None), "lacks 'primary'; this policy takes 'proprio' float32"),
    (dict(front=np.zeros(3)), "has an unknown 'front'"), (dict(proprio=np.zeros(5)), r"'proprio' is float64 \[5\]"),
    (dict(proprio=np.full(P, np.nan)), "aren't finite"), (dict(proprio=["a"] * P), "'proprio' is <U1"),
    (dict(primary=np.zeros((64, 64, 3))), r"'primary' is float64 \[64, 64, 3\]"),
    (dict(wrist=np.zeros((32, 64, 3), np.uint8)), r"'wrist' is uint8 \[32, 64, 3\]; this policy takes"),
])  # fmt: skip
def test_a_wrong_observation_is_refused(change, words, tmp_path):
    folder, _, _ = a_run(tmp_path, "bc", obs_mode="rgb", cameras="both")
    obs = an_observation(cameras=True) | change
    obs = {name: value for name, value in obs.items() if value is not None}
    with pytest.raises(UserError, match=words) as caught:
        load_policy(folder).act(obs)
    assert "\n" not in str(caught.value)


def test_what_is_no_policy_is_one_line(run, tmp_path):
    with pytest.raises(UserError, match="no folder .*: pass a local folder or hf://"):
        load_policy("nowhere")
    with pytest.raises(UserError, match="is no run folder"):
        load_policy(tmp_path)
    load_policy(run).save(tmp_path / "out")
    weights = tmp_path / "out/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:99])
    with pytest.raises(UserError, match="model.safetensors can't be read"):
        load_policy(tmp_path / "out")
    config = json.loads((run / "config.json").read_text())
    for other, words in (("nothing.py", "is no script"), ("serve.py", "no script with an Agent"), ("../x/bc.py", None)):
        write_json(run / "config.json", config | {"script": other})
        if words is None:
            assert load_policy(run).script == "bc.py"  # of this repository, whatever folder is named
            continue
        with pytest.raises(UserError, match=words):
            load_policy(run)


# --- openpi's protocol ---
@contextlib.contextmanager
def served(policy):
    infer = lambda observation: serve.answer(policy, observation)  # noqa: E731
    with server(policy.describe(), infer, "127.0.0.1", 0) as listening:
        thread = threading.Thread(target=listening.serve_forever)
        thread.start()
        try:
            yield f"ws://127.0.0.1:{listening.socket.getsockname()[1]}"
        finally:
            listening.shutdown()
            thread.join()


def test_openpis_own_client(run):
    """Its package, unchanged: what the server is, actions, times, and errors that it can go on after."""
    client = pytest.importorskip("openpi_client.websocket_client_policy")
    policy = load_policy(run)
    with served(policy) as address:
        asking = client.WebsocketClientPolicy(address)
        assert asking.get_server_metadata() == policy.describe()
        first = asking.infer(an_observation() | {"prompt": policy.instruction})
        assert first["actions"].shape == (3, A) and first["actions"].dtype == np.float32
        assert first["server_timing"]["infer_ms"] > 0 and "prev_total_ms" not in first["server_timing"]
        policy.seed(0)
        again = asking.infer(an_observation())
        assert np.array_equal(again["actions"], first["actions"]) and again["server_timing"]["prev_total_ms"] > 0
        with pytest.raises(RuntimeError, match="Error in inference server:\nthe observation lacks 'proprio'"):
            asking.infer({})
        assert asking.infer(an_observation())["actions"].shape == (3, A)


def test_the_bytes_are_those_of_openpi():
    """Its published format, written out here: arrays and numpy's scalars as maps with these keys."""

    def default(x):
        if isinstance(x, np.ndarray):
            return {b"__ndarray__": True, b"data": x.tobytes(), b"dtype": x.dtype.str, b"shape": x.shape}
        return {b"__npgeneric__": True, b"data": x.item(), b"dtype": x.dtype.str}

    message = {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3),
        "b": {"c": np.uint8(7)},
        "d": "text",
        "e": [1.5, None],
    }
    assert pack(message) == msgpack.packb(message, default=default)
    found = unpack(msgpack.packb(message, default=default))
    assert np.array_equal(found.pop("a"), message.pop("a")) and found == message


@pytest.mark.parametrize("content, words", [
    (b"\xc1", "no msgpack"), (b"", "no msgpack"), (msgpack.packb([1]), "is a list"),
    (msgpack.packb({"a": {b"__ndarray__": True, b"data": b"123", b"dtype": "|O", b"shape": [1]}}), "an array of object"),
    (msgpack.packb({"a": {b"__ndarray__": True, b"data": b"123", b"dtype": "<f4", b"shape": [1]}}), "no msgpack"),
    (msgpack.packb({"a": {b"__ndarray__": True, b"data": b"1234", b"dtype": "<f4", b"shape": [9]}}), "no msgpack"),
    (msgpack.packb({"a": {b"__ndarray__": True}}), "no msgpack"),
])  # fmt: skip
def test_bytes_from_outside_are_checked(content, words):
    with pytest.raises(UserError, match=words):
        unpack(content)


def test_a_server_stands_bad_messages(run):
    from websockets.sync.client import connect

    with served(load_policy(run)) as address:
        with connect(address) as raw:
            unpack(raw.recv())
            for bad in (b"\xc1", "text", pack({"prompt": 1} | an_observation())):
                raw.send(bad)
                answer = raw.recv()
                assert isinstance(answer, str) and "\n" not in answer
            raw.send(pack(an_observation()))
            assert unpack(raw.recv())["actions"].shape == (3, A)
        import urllib.request

        assert urllib.request.urlopen(address.replace("ws:", "http:") + "/healthz", timeout=9).read() == b"OK\n"


def test_a_client_without_a_server():
    with pytest.raises(UserError, match="no policy answers at ws://127.0.0.1:9 .*: start it"):
        Client("ws://127.0.0.1:9")
    with pytest.raises(UserError, match="no policy answers at nonsense"):
        Client("nonsense")


def test_the_command_serves(run):
    """As a user starts it, up to Ctrl-C."""
    program = [sys.executable, ROOT / "serve.py", run, "--port", "0"]
    process = subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    line = process.stdout.readline()
    address = re.search(r"on (ws://127.0.0.1:\d+): takes 'proprio' float32 \[17\]", line)[1]
    client = Client(address)
    assert client.infer(an_observation())["actions"].shape == (3, A)
    with pytest.raises(UserError, match="reports: the observation has an unknown 'x'"):
        client.infer(an_observation() | {"x": np.zeros(1)})
    process.send_signal(2)
    assert process.wait(20) == 130 and process.stderr.read().strip() == "stopped by SIGINT"
    with pytest.raises(UserError, match="is gone or silent"):
        client.infer(an_observation())


# --- the hub ---
class Hub(http.server.BaseHTTPRequestHandler):
    """What of huggingface.co's HTTP API an upload and a download need; commits hold files as they came."""

    files: dict[str, bytes] = {}
    made: list[dict] = []  # repositories
    blobs: dict[str, bytes] = {}

    def answer(self, content, code=200, **headers):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(code)
        for name, value in ({"Content-Length": len(body), "X-Repo-Commit": "c" * 40} | headers).items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def do_POST(self):
        body = self.body()
        base = "http://{}:{}".format(*self.server.server_address)
        if self.path == "/api/repos/create":
            self.made.append(json.loads(body))
            self.answer({"url": f"{base}/owner/name"})
        elif "/preupload/" in self.path:
            kinds = [
                {"path": f["path"], "uploadMode": "lfs" if f["path"].endswith("safetensors") else "regular"}
                for f in json.loads(body)["files"]
            ]
            self.answer({"files": [kind | {"shouldIgnore": False} for kind in kinds]})
        elif self.path.endswith("/info/lfs/objects/batch"):
            objects = [
                o | {"actions": {"upload": {"href": f"{base}/blob/{o['oid']}"}}} for o in json.loads(body)["objects"]
            ]
            self.answer({"transfer": "basic", "objects": objects}, Content_Type="application/vnd.git-lfs+json")
        elif "/commit/" in self.path:
            import base64

            for line in map(json.loads, body.decode().splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    self.files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    self.files[value["path"]] = self.blobs[value["oid"]]
            self.answer({"commitUrl": f"{base}/owner/name/commit/{'c' * 40}", "commitOid": "c" * 40})
        else:
            self.answer({"errors": [], "warnings": []})  # /api/validate-yaml

    def do_PUT(self):
        self.blobs[self.path.split("/")[-1]] = self.body()
        self.answer(b"")

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        name = self.path.split("?")[0].split("/resolve/")[-1].partition("/")[2]
        listed = [{"rfilename": path} for path in self.files]
        if "/tree/" in self.path:
            self.answer([{"type": "file", "path": p, "size": len(c), "oid": "0" * 40} for p, c in self.files.items()])
        elif self.path.startswith("/api/models/"):
            self.answer({"id": "owner/name", "sha": "c" * 40, "siblings": listed, "private": True})
        elif name in self.files:
            content = self.files[name]
            self.answer(content, ETag=f'"{hashlib.sha256(content).hexdigest()}"')
        else:
            self.answer({"error": "not found"}, 404, X_Error_Code="EntryNotFound")

    def log_message(self, *words):
        pass


def test_a_policy_goes_to_the_hub_and_comes_back(run, tmp_path):
    listening = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=listening.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{listening.server_address[1]}"
    environment = os.environ | {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "hf"), "HF_TOKEN": "hf_" + "a" * 30}
    environment |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0", "PYTHONPATH": str(ROOT)}
    environment |= dict.fromkeys(("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"), "")
    code = (
        "import sys, json, numpy, export; from plumbing.policy import load_policy\n"
        "export.main([sys.argv[1], '--out', sys.argv[2], '--push', 'owner/name'])\n"
        "policy = load_policy('hf://owner/name')\n"
        "print(policy.act({'proprio': numpy.zeros(17)}).tolist())"
    )
    words = [sys.executable, "-c", code, run, tmp_path / "out"]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=120)
    listening.shutdown()
    assert done.returncode == 0, done.stderr[-2000:]
    assert Hub.files.keys() >= {"config.json", "model.safetensors", "README.md"}
    assert Hub.made == [{"name": "name", "organization": "owner", "visibility": "private"}]
    for name in ("config.json", "model.safetensors", "README.md"):
        assert Hub.files[name] == (tmp_path / "out" / name).read_bytes()
    own = load_policy(run).act({"proprio": np.zeros(P)})
    np.testing.assert_allclose(json.loads(done.stdout.splitlines()[-1]), own, rtol=1e-5, atol=1e-6)
    assert f"pushed to {address}/owner/name" in done.stdout


def test_a_refused_push_is_one_line(run, tmp_path, monkeypatch):
    import huggingface_hub

    def refuse(*rest, **more):
        raise PermissionError("401\nno")

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", refuse)
    with pytest.raises(
        UserError, match="can't push to owner/name .PermissionError: 401 no.; log in by `hf auth login`"
    ):
        export.main([str(run), "--out", str(tmp_path / "a"), "--push", "owner/name"])
    with pytest.raises(UserError, match="--push x: it takes owner/name"):
        export.main([str(run), "--out", str(tmp_path / "b"), "--push", "x"])


def test_an_exported_folder_explains_itself(run, tmp_path):
    export.main([str(run), "--out", str(tmp_path / "out")])
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["policy"]["actions"] == {"dtype": "float32", "shape": [3, A]} and config["args"]["eval_only"] is None
    card = (tmp_path / "out/README.md").read_text()
    assert "| `proprio` | float32 | [17] |" in card and "pd_ee_delta_pos" in card and card.startswith("---\n")
    with pytest.raises(UserError, match="exists: choose another --out"):
        export.main([str(run), "--out", str(tmp_path / "out")])
    with pytest.raises(UserError, match="needs a run from released Octo weights; this one has --backbone octo-compact"):
        export.main([str(run), "--out", str(tmp_path / "octo"), "--format", "octo"])


# --- evaluate.py ---
FLAGS = "--env-id PushCube-v1 --obs-mode state --eval-episodes 2 --max-episode-steps 12 --cameras primary".split()


def test_a_foreign_policy_is_evaluated_as_a_run_is(tmp_path, monkeypatch, capsys):
    """One policy as a run, as a function and behind a server: the same episodes, the same numbers, a row each."""
    folder, _, args = a_run(tmp_path, "bc", head="mse-chunk", max_episode_steps=12, num_envs=1)
    results = tmp_path / "runs.csv"
    (tmp_path / "mine.py").write_text(
        f"from plumbing.policy import load_policy\nact = load_policy({str(folder)!r}).act\n"
    )
    monkeypatch.chdir(tmp_path)
    actions = {}
    seeds = {}
    make_env = bc.make_env

    def watched(*rest):
        env = make_env(*rest)
        reset, step = env.reset, env.step
        env.reset = lambda **more: (seeds.setdefault(name, []).extend(more["seed"]), reset(**more))[1]
        env.step = lambda action: (actions.setdefault(name, []).append(np.array(action)), step(action))[1]
        return env

    monkeypatch.setattr(bc, "make_env", watched)
    printed = {}
    with served(load_policy(folder)) as address:
        ways = {"run": ["--run", str(folder)], "function": ["--policy", "mine:act"], "server": ["--server", address]}
        for name, words in ways.items():
            rest = [] if name == "run" else FLAGS
            evaluate.main([*words, *rest, "--csv", str(results), "--row", name])
            printed[name] = json.loads(capsys.readouterr().out)
        name = "others"
        others = ["--eval-seed", str(EVAL_SEED + 7)]
        evaluate.main(["--policy", "mine:act", *FLAGS, *others])
    assert seeds["others"] == [EVAL_SEED + 7, EVAL_SEED + 8]
    assert seeds["run"] == seeds["function"] == seeds["server"] == [EVAL_SEED, EVAL_SEED + 1]
    for name in ("function", "server"):
        np.testing.assert_allclose(actions[name], actions["run"], atol=1e-5)
        assert repr(printed[name]) == repr(printed["run"])
    assert printed["run"]["eval/num_episodes"] == 2 and 0 < printed["run"]["eval/success_once_high"] < 1
    with results.open() as file:
        lines = list(csv.DictReader(file))
    assert [line["row"] for line in lines] == ["run", "function", "server"]
    assert {(line["num_episodes"], line["final"], line["env_id"]) for line in lines} == {("2", "1", "PushCube-v1")}


def test_a_row_joins_those_of_the_benchmark(tmp_path):
    results = tmp_path / "runs.csv"
    lines = (ROOT / "benchmark/results/runs.csv").read_text().splitlines(keepends=True)[:4]
    results.write_text("".join(lines))
    row = {"row": "mine", "seed": 1, "success_once": 0.5, "num_episodes": 2, "no such column": 1}
    evaluate.append_row(results, row)
    evaluate.append_row(results, row | {"success_once": 0.75})
    found = results.read_text().splitlines(keepends=True)
    assert found[:4] == lines and len(found) == 5
    assert dict(zip(found[0].strip().split(","), found[4].strip().split(",")))["success_once"] == "0.75"
    (tmp_path / "other.csv").write_text("a,b\n")
    with pytest.raises(UserError, match="has other columns"):
        evaluate.append_row(tmp_path / "other.csv", row)


@pytest.mark.parametrize("answer, words", [
    ([[1, 2]], r"are \[1, 2\]; this controller takes \[H, 4\]"), ("x", "no array of numbers"), ([], "are "),
    ([np.nan] * 4, "aren't finite"), (np.zeros((1, 2, 4)), "are "),
])  # fmt: skip
def test_wrong_answers_are_refused(answer, words):
    with pytest.raises(UserError, match=words):
        evaluate.checked(answer, 4, 0)


def test_answers_are_taken_as_asked():
    assert evaluate.checked([1, 2, 3, 4], 4, 0).shape == (1, 4)
    assert evaluate.checked(np.zeros((8, 4)), 4, 3).shape == (3, 4)
    with pytest.raises(UserError, match="--execute 9 is more than the 8 actions"):
        evaluate.checked(np.zeros((8, 4)), 4, 9)


def test_a_servers_own_names():
    class Asked:
        address = "ws://there"

        def infer(self, message):
            self.message = message
            return {"actions": 1} if "observation/state" in message else {"other": 1}

    asked = Asked()
    act = evaluate.ask_server(asked, "proprio=observation/state primary=observation/image")
    assert act({"proprio": 1, "wrist": 2, "primary": 3}, "go") == 1
    assert asked.message == {"observation/state": 1, "wrist": 2, "observation/image": 3, "prompt": "go"}
    with pytest.raises(UserError, match="answers without 'actions': other"):
        evaluate.ask_server(asked, "")({"proprio": 1}, "go")
    with pytest.raises(UserError, match="--names proprio: it takes words"):
        evaluate.ask_server(asked, "proprio")


@pytest.mark.parametrize("words, message", [
    (["--policy", "nowhere:act"], "--policy nowhere:act can't be imported .ModuleNotFoundError"),
    (["--policy", "json:nothing"], "can't be imported .AttributeError"), (["--policy", "json:__name__"], "is no function"),
    (["--policy", "json:dumps", "--row", "x"], "--csv FILE and --row NAME need each other"),
    (["--policy", "json:dumps", "--execute", "-1"], "--execute must be at least 0"),
])  # fmt: skip
def test_bad_words_of_evaluate(words, message):
    with pytest.raises(UserError, match=message):
        evaluate.main([*words, *FLAGS])


# --- recorded successes ---
def test_successes_are_recorded_as_maniskill_does(place, tmp_path, inline, monkeypatch):
    """A run that does what was demonstrated; its recording is read here and by ManiSkill's replay tool."""
    demos = load_demos(tiny_args(place), bc.make_env)
    folder, _, args = a_run(tmp_path, "bc", max_episode_steps=40, num_envs=1)
    with pytest.MonkeyPatch.context() as patch:
        follow_demonstrations(patch, bc, place)
        out = tmp_path / "successes.h5"
        record.main([str(folder), "--episodes", "1", "--out", str(out)])
    meta = json.loads(out.with_suffix(".json").read_text())
    (episode,) = meta["episodes"]
    assert episode["success"] and episode["episode_seed"] >= record.RECORD_SEED and meta["run"]["script"] == "bc.py"
    with h5py.File(out) as file:
        stored = file["traj_0"]
        length = len(stored["actions"])
        assert stored["success"][-1] and not stored["success"][:-1].any() and stored["actions"].shape == (length, A)
        assert all(len(v) == length + 1 for v in stored["env_states/articulations"].values())
    again = load_demos(tiny_args(tmp_path, bc, demo_path=str(out), num_demos=1), bc.make_env)
    assert again.lengths.tolist() == again.steps.tolist() == [length]
    assert again.obs["proprio"].shape[1] == demos.obs["proprio"].shape[1]

    from mani_skill.trajectory import replay_trajectory

    tool = replay_trajectory.Args(str(out), obs_mode="state", save_traj=True, use_first_env_state=True)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        replay_trajectory.main(tool)
    (replayed,) = [path for path in tmp_path.glob("successes.state.*.h5")]
    with h5py.File(replayed) as file:
        assert file["traj_0/success"][-1] and file["traj_0/obs"].shape[0] == length + 1

    from plumbing import lerobot

    lerobot.main(["export", str(out), "--out", str(tmp_path / "lerobot")])
    info = json.loads((tmp_path / "lerobot/meta/info.json").read_text())
    assert info["total_episodes"] == 1 and info["total_frames"] == length


def test_what_can_not_be_recorded_is_one_line(run, tmp_path):
    (tmp_path / "there.h5").touch()
    for out in ("there.h5", "name.npz", "no/such/folder.h5"):
        with pytest.raises(UserError, match="can't be written: name a new .h5"):
            record.main([str(run), "--out", str(tmp_path / out)])
    with pytest.raises(UserError, match="--episodes must be at least 1"):
        record.main([str(run), "--episodes", "0", "--out", str(tmp_path / "a.h5")])
