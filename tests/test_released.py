"""Released Octo weights in the scripts: two cameras, a window of two steps, T5 asked once, a checkpoint of its own."""

import dataclasses
import json
import shutil

import msgpack
import numpy as np
import pytest
import torch
from conftest import FIXTURES, tiny_args

import bc
import export
import force_octo as script
from backbones import t5
from backbones.octo import PRESETS, DiffusionHead, Octo
from backbones.octo_policy import random_shift
from backbones.octo_weights import flax_layout, load_octo, read_flax
from plumbing import TASKS, Demos, UserError, load_demos, load_sft_weights
from plumbing.storage import Checkpoints, write_json

THIN = dataclasses.replace(  # the released inputs, with a trunk that runs in milliseconds
    PRESETS["octo-small"], token_dim=32, num_layers=1, num_heads=4, mlp_dim=32, stem_features=(32, 32, 32, 32),
    stem_out=32, language_dim=32,
)  # fmt: skip


@pytest.fixture(autouse=True)
def thin(monkeypatch):
    size = dict(vocabulary=32128, layers=1, heads=2, head_dim=16, mlp_dim=32)
    monkeypatch.setitem(t5.T5_SIZES, "t5-base", size)
    monkeypatch.setitem(PRESETS, "octo-small", THIN)


@pytest.fixture
def released(tmp_path):
    """A folder as the released repositories are, with random weights, and the model that was written."""
    folder = tmp_path / "octo-small-1.5"
    shutil.copytree(FIXTURES / "octo_tiny", folder)
    shutil.copy(FIXTURES / "spiece.model", folder)
    torch.manual_seed(3)
    described = json.loads((folder / "config.json").read_text())["model"]["heads"]["action"]["kwargs"]
    sizes = dict(action_horizon=described["action_horizon"], action_dim=described["action_dim"])
    model, head, tree = Octo(THIN), DiffusionHead(32, hidden=described["hidden_dim"], **sizes), {}
    for path, shape, parameter, transposed in flax_layout(model, head):
        value = parameter.detach()
        if transposed:  # [out, in, ...] here, [..., in, out] there
            value = value.permute(*range(2, value.ndim), 1, 0)
        *parents, leaf = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = np.ascontiguousarray(value.reshape(shape).numpy())

    def array(x):
        return msgpack.ExtType(1, msgpack.packb((x.shape, x.dtype.name, x.tobytes())))

    (folder / "7/default/checkpoint").write_bytes(msgpack.packb(tree, default=array, strict_types=True))
    return folder, model


def flags(place, folder, **changes):
    chosen = dict(
        env_id="PickCube-v1", obs_mode="rgb", cameras="both", backbone="octo-small", checkpoint=str(folder),
        image_size=256, num_demos=2, num_envs=1, sft_updates=2, sft_batch_size=2, batch_size=4, offline_updates=1,
        warmup_episodes=1, warmup_updates=2, online_steps=4, max_episode_steps=4, eval_episodes=1, noise_levels=1,
    )  # fmt: skip
    return tiny_args(place, **chosen | changes)


def test_a_run_from_released_weights(place, released, tmp_path):
    folder, model = released
    args = flags(place, folder, runs=str(tmp_path), run_name="run")
    run = script.main(args)
    config = json.loads((run / "config.json").read_text())
    assert config["weights"] == f"{folder}, sha256 {load_octo(folder, THIN).sha256}"
    demos = load_demos(args, script.make_env)
    assert demos.obs["primary"].shape[1:] == (256, 256, 3) and demos.obs["wrist"].shape[1:] == (128, 128, 3)
    assert demos.obs["wrist"].std() > 5  # the hand's camera sees something
    weights, _ = Checkpoints(run).load(resume=False)
    assert not any(name.startswith("backbone.text") for name in weights)  # T5 was asked once
    expected = model.text(t5.t5_token_ids([TASKS["PickCube-v1"].instruction], 16, folder / "spiece.model"))
    torch.testing.assert_close(weights["language"], expected)
    for name in ("stems.wrist.convs.0.weight", "blocks.0.q.weight", "positions.readout"):  # trained, from there
        change = (weights[f"backbone.{name}"] - model.state_dict()[name]).abs().max()
        assert 0 < change < 0.02, name
    # What is saved is enough: neither the folder nor a tokenizer is needed to go on.
    shutil.rmtree(folder)
    assert script.main(script.Args(eval_only=str(run))) == run


def test_bc_reads_them_too(place, released, tmp_path):
    folder, _ = released
    args = flags(place, folder)
    shared = {f.name: getattr(args, f.name) for f in dataclasses.fields(bc.Args) if hasattr(args, f.name)}
    run = bc.main(bc.Args(**shared | dict(runs=str(tmp_path), run_name="bc", updates=2, batch_size=2)))
    assert json.loads((run / "config.json").read_text())["weights"].startswith(f"{folder}, sha256 ")
    script.validate(args := dataclasses.replace(args, sft_checkpoint=str(run)))
    agent = script.Agent(args, load_demos(args, script.make_env))
    load_sft_weights(agent, args, head="consistency")
    weights, _ = Checkpoints(run).load(resume=False)
    assert torch.equal(agent.state_dict()["actor.out.weight"], weights["actor.out.weight"])


def test_trained_octo_goes_out_in_its_own_format(place, released, tmp_path):
    """flax-msgpack with every leaf; what was trained is the run's, all else as released. Then --checkpoint takes it."""
    folder, model = released
    args = flags(place, folder, eval_only="x")
    one = np.array([1])
    obs = {"proprio": np.zeros((2, 9), np.float32), "primary": np.zeros((2, 256, 256, 3), np.uint8)}
    obs["wrist"] = np.zeros((2, 128, 128, 3), np.uint8)
    agent = script.Agent(args, Demos(obs, np.zeros((2, 4), np.float32), one, one, "shapes"))
    with torch.no_grad():
        for weight in agent.backbone.parameters():
            weight.add_(0.5)
    run = tmp_path / "run"
    run.mkdir()
    write_json(run / "config.json", {"script": "force_octo.py", "args": dataclasses.asdict(args) | {"eval_only": None}})
    Checkpoints(run).save("update-1", agent.state_dict(), {}, {})
    export.main([str(run), "--out", str(tmp_path / "octo"), "--format", "octo"])
    export.main([str(run), "--out", str(tmp_path / "ours"), "--format", "octo-safetensors"])
    before, after = (read_flax(path / "7/default/checkpoint") for path in (folder, tmp_path / "octo"))
    assert before.keys() == after.keys()
    for name in before:
        frozen = "hf_model" in name or name.startswith("heads_action")
        assert np.array_equal(before[name], after[name]) == frozen, name
    for out in ("octo", "ours"):
        again = load_octo(tmp_path / out)
        assert again.model.tokenizer_file is not None or out == "ours"
        for name, weight in agent.backbone.state_dict().items():
            assert torch.equal(again.model.state_dict()[name], weight), name
    (folder / "7/default/checkpoint").unlink()
    with pytest.raises(UserError, match="no weights at"):
        export.main([str(run), "--out", str(tmp_path / "more"), "--format", "octo"])


def test_the_window_holds_the_step_before(place, released):
    folder, _ = released
    args = flags(place, folder)
    script.validate(args)
    demos = load_demos(args, script.make_env)
    policy = script.Agent(args, demos)
    start = int(demos.starts()[1])
    obs = demos.at(torch.tensor([start, start + 1, start + 2]), 2)
    assert obs["real"].tolist() == [[False, True], [True, True], [True, True]]
    assert torch.equal(obs["primary"][0, 0], obs["primary"][0, 1])  # nothing of the episode before
    for back in (0, 1):
        assert torch.equal(obs["wrist"][2, back], torch.from_numpy(demos.obs["wrist"][start + 1 + back]))
    with torch.no_grad():
        feature = policy.feature(obs)
        other = policy.feature(obs | {"primary": torch.stack([255 - obs["primary"][:, 0], obs["primary"][:, 1]], 1)})
    same = (other == feature).all(1)
    assert same.tolist() == [True, False, False]  # the step before counts, but not before the start
    # A running episode is seen as a recorded one.
    rows = [{k: v[[start + t]] for k, v in demos.obs.items()} for t in range(3)]
    for t in range(3):
        with torch.no_grad():
            live = policy.feature(policy.recent(rows[: t + 1]))
        torch.testing.assert_close(live, feature[[t]], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    "changes, words",
    [(dict(checkpoint=None), "need each other"), (dict(backbone="octo-compact"), "need each other"),
     (dict(image_size=128), "256 pixels"), (dict(obs_mode="state"), "--obs-mode rgb")],
)  # fmt: skip
def test_impossible_flags(place, changes, words):
    with pytest.raises(UserError, match=words):
        script.validate(flags(place, "anywhere", **changes))


def test_a_wrong_folder_is_one_line(place, tmp_path):
    with pytest.raises(UserError, match="no weights at") as caught:
        script.main(flags(place, tmp_path, runs=str(tmp_path / "runs")))
    assert "\n" not in str(caught.value) and not (tmp_path / "runs").exists()


def test_random_shift_moves_a_sample_as_a_whole():
    image = torch.arange(3 * 2 * 32 * 32 * 3).view(3, 2, 32, 32, 3)
    shifted = random_shift({"primary": image}, torch.Generator().manual_seed(0), pad=4)["primary"]
    padded = torch.nn.functional.pad(image.flatten(0, 1).permute(0, 3, 1, 2).float(), (4, 4, 4, 4), mode="replicate")
    padded = padded.permute(0, 2, 3, 1).long().unflatten(0, (3, 2))
    found = []
    for sample in range(3):
        places = [(r, c) for r in range(9) for c in range(9)
                  if torch.equal(shifted[sample], padded[sample, :, r : r + 32, c : c + 32])]  # fmt: skip
        assert len(places) == 1  # both steps by the same shift
        found += places
    assert len(set(found)) > 1  # samples differ
