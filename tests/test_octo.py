"""The Octo port against the original's recorded outputs, its checkpoint loader, and the compact model."""

import dataclasses
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import msgpack
import numpy as np
import pytest
import torch

from backbones import t5
from backbones.octo import (
    PRESETS,
    DiffusionHead,
    HashText,
    Octo,
    SpatialPoints,
    attention_pattern,
    word_ids,
)
from backbones.octo_weights import flax_layout, load_octo, read_flax, save_octo
from plumbing import UserError

torch.set_num_threads(1)

FIXTURES = Path(__file__).parent / "fixtures"
TINY = FIXTURES / "octo_tiny"
REFERENCE = dict(np.load(FIXTURES / "octo_reference.npz"))
CASES = sorted({name.split("/")[0] for name in REFERENCE if name.endswith("/steps")})
TINY_CONFIG = dataclasses.replace(
    PRESETS["octo-small"], token_dim=32, num_layers=2, num_heads=4, mlp_dim=64, stem_features=(32, 32, 32, 64),
    stem_out=40, image_sizes=(("primary", 48), ("wrist", 32)), language_tokens=6, language_dim=32, text="t5-tiny",
    max_horizon=3,
)  # fmt: skip
WORDS = {"pick": 626, "up": 1001, "the": 289, "cube": 468, "stack": 493, "push": 337, "red": 374, "green": 1}
COMPACT = dataclasses.replace(PRESETS["octo-compact"], image_sizes=(("primary", 32),), lowdim_dim=5)


@pytest.fixture(autouse=True)
def tiny_t5(monkeypatch):
    monkeypatch.setitem(t5.T5_SIZES, "t5-tiny", dict(vocabulary=64, layers=2, heads=4, head_dim=8, mlp_dim=48))
    torch.manual_seed(0)


def reference_inputs(model, case):
    """Arguments of `Octo.forward` for a recorded case, and its recorded outputs by our group names."""

    def get(name):
        return torch.from_numpy(REFERENCE[f"{case}/{name}"]) if f"{case}/{name}" in REFERENCE else None

    steps = get("steps")
    images = {}
    for camera, _ in model.config.image_sizes:
        own = get(f"image_{camera}")
        shared = torch.from_numpy(REFERENCE[f"images/image_{camera}"])
        images[camera] = shared[:, : steps.shape[1]] if own is None else own
    arguments = dict(
        images=images,
        language=None if get("input_ids") is None else model.text(get("input_ids")),
        timestep_pad_mask=steps,
        image_pad_masks=None if get("wrist_mask") is None else {"wrist": get("wrist_mask")},
        language_mask=get("language_mask"),
    )
    names = {
        "language": "task_language", "primary": "obs_primary", "wrist": "obs_wrist",
        "language again": "obs_task_language", "readout": "readout_action",
    }  # fmt: skip
    outputs = {ours: get(f"out_{theirs}") for ours, theirs in names.items()}
    return arguments, {name: x for name, x in outputs.items() if x is not None}


# --- the original's numbers ---


def test_all_cases_were_recorded():
    assert CASES == [
        "all_masks", "language_masked", "near_constant", "no_language", "no_wrist", "padded_step", "plain",
        "window_one", "wrist_masked",
    ]  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_trunk_matches_the_original(case):
    cameras = TINY_CONFIG.image_sizes[: 1 if case == "no_wrist" else 2]
    model = load_octo(TINY, dataclasses.replace(TINY_CONFIG, image_sizes=cameras)).model
    arguments, expected = reference_inputs(model, case)
    with torch.no_grad():
        outputs, embedding = model.trunk(**arguments), model(**arguments)
    assert outputs.keys() == expected.keys()
    for name, x in expected.items():
        assert x.abs().max() > 1  # the tolerance means something at this scale
        torch.testing.assert_close(outputs[name], x, atol=2e-5, rtol=0, msg=lambda text, name=name: f"{name}: {text}")
    torch.testing.assert_close(embedding, expected["readout"][:, -1].mean(1), atol=2e-5, rtol=0)


def test_t5_matches_the_original():
    model = load_octo(TINY, TINY_CONFIG).model
    out = model.text(torch.from_numpy(REFERENCE["plain/input_ids"]))
    torch.testing.assert_close(out, torch.from_numpy(REFERENCE["t5/out"]), atol=2e-6, rtol=0)
    assert not any(p.requires_grad for p in model.text.parameters())


def test_t5_distance_buckets_up_to_128():
    """Distances beyond the fixtures' six tokens, by the rule: 8 exact, then 8 logarithmic ones up to 128."""
    t5.T5_SIZES["t5-tiny"] = dict(vocabulary=64, layers=1, heads=1, head_dim=8, mlp_dim=8)
    encoder = t5.T5Encoder(8, **t5.T5_SIZES["t5-tiny"])
    seen = {}
    encoder.distance.forward = lambda bucket: seen.setdefault("bucket", bucket)[..., None].float()
    encoder(torch.ones(1, 140, dtype=torch.int64))
    bucket = seen["bucket"]
    assert bucket[0, 0] == 0 and bucket[0, 7] == 16 + 7 and bucket[7, 0] == 7  # the key to the right: 16 more
    # Bucket 8 + k starts at 8 * 16^(k/8): 8, 11.3, 16, 22.6, 32, 45.3, 64, 90.5.
    starts = [8, 12, 16, 23, 32, 46, 64, 91]
    for k, start in enumerate(starts):
        assert bucket[start, 0] == 8 + k and bucket[start - 1, 0] == 7 + k, start
    assert bucket[139, 0] == 15


def test_diffusion_head_matches_the_original():
    head = load_octo(TINY, TINY_CONFIG).head
    embedding = torch.from_numpy(REFERENCE["plain/out_readout_action"])[:, -1].mean(1)  # [3, 32]
    noisy = torch.from_numpy(REFERENCE["head/noisy"])  # [20, 3, 28]
    step = torch.arange(20).view(20, 1, 1).expand(20, 3, 1)
    with torch.no_grad():
        predicted = head(embedding.expand(20, 3, -1), noisy, step)
    torch.testing.assert_close(predicted, torch.from_numpy(REFERENCE["head/predicted"]), atol=2e-5, rtol=0)
    torch.testing.assert_close(head.betas, torch.from_numpy(REFERENCE["head/betas"]), atol=1e-6, rtol=0)
    torch.testing.assert_close(head.betas[:2], torch.tensor([0.00799, 0.02008]), atol=1e-5, rtol=0)


def test_sampling_matches_the_original_given_its_noise(monkeypatch):
    head = load_octo(TINY, TINY_CONFIG).head
    embedding = torch.from_numpy(REFERENCE["plain/out_readout_action"])[:, -1].mean(1)
    noise = iter(torch.from_numpy(REFERENCE["sample/noise"]).transpose(1, 2))  # [K, B, 28] each to [B, K, 28]
    monkeypatch.setattr(torch, "randn", lambda shape, **_: next(noise).reshape(shape))
    sampled = head.sample(embedding, K=2)
    assert sampled.shape == (3, 2, 4, 7)
    error = (sampled - torch.from_numpy(REFERENCE["sample/actions"]).transpose(0, 1)).abs()
    # The first step divides by 0.03 and the other nineteen feed on it: single numbers may drift further than most.
    assert error.quantile(0.95) <= 2e-5 and error.max() <= 5e-4


@pytest.mark.parametrize("preset", ["octo-small", "octo-base"])
def test_every_released_parameter_has_its_place(preset):
    layout = json.loads((FIXTURES / "octo_layout.json").read_text())[preset]
    with torch.device("meta"):
        model, head = Octo(PRESETS[preset]), DiffusionHead(PRESETS[preset].token_dim)
    ours = list(flax_layout(model, head))
    assert len(ours) == len(layout) == 366
    assert {path: list(shape) for path, shape, *_ in ours} == layout
    modules = [module for root in (model, head) for module in root.modules() if hasattr(module, "eps")]
    assert {module.eps for module in modules} == {1e-6}  # flax's, not PyTorch's 1e-5
    released = {"octo-small": 136_670_604, "octo-base": 202_458_636}[preset]
    assert sum(parameter.numel() for _, _, parameter, _ in ours) == released


def test_t5_token_ids():
    pytest.importorskip("sentencepiece", reason="the T5 tokenizer needs sentencepiece")
    ids = t5.t5_token_ids(REFERENCE["tokenizer/sentences"].tolist(), 16, FIXTURES / "spiece.model")
    assert ids.tolist() == REFERENCE["tokenizer/input_ids"].tolist()
    assert (ids > 0).long().tolist() == REFERENCE["tokenizer/attention_mask"].tolist()
    with pytest.raises(UserError, match="no T5 tokenizer at"):
        t5.t5_token_ids(["x"], 16, FIXTURES / "absent.model")


def test_encode_text_uses_the_tokenizer_beside_the_weights(tmp_path):
    pytest.importorskip("sentencepiece", reason="the T5 tokenizer needs sentencepiece")
    shutil.copytree(TINY, tmp_path / "octo")
    shutil.copy(FIXTURES / "spiece.model", tmp_path / "octo")
    model = load_octo(tmp_path / "octo", TINY_CONFIG).model
    expected = model.text(t5.t5_token_ids(["push it"], 6, FIXTURES / "spiece.model"))
    assert torch.equal(model.encode_text(["push it"]), expected)


# --- the loader ---


def pack(tree) -> bytes:
    """The byte layout of flax's msgpack serialisation, written independently of the reader."""

    def default(x):
        return msgpack.ExtType(1, msgpack.packb((x.shape, x.dtype.name, x.tobytes())))

    return msgpack.packb(tree, default=default, strict_types=True)


@pytest.fixture
def copy(tmp_path):
    """A writable copy of the tiny checkpoint, and its parameters as a nested dict of arrays."""
    folder = tmp_path / "copy"
    shutil.copytree(TINY, folder)
    tree = {}
    for path, leaf in read_flax(TINY / "7/default/checkpoint").items():
        node = tree
        *parents, name = path.split("/")
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return folder, tree


def refuse(folder, pattern, config=TINY_CONFIG):
    with pytest.raises(UserError, match=pattern) as caught:
        load_octo(folder, config)
    assert "\n" not in str(caught.value)


def test_rewriting_the_original_file_reproduces_it(copy):
    folder, tree = copy
    (folder / "7/default/checkpoint").write_bytes(pack(tree))
    assert (folder / "7/default/checkpoint").stat().st_size == (TINY / "7/default/checkpoint").stat().st_size
    ours, theirs = load_octo(folder, TINY_CONFIG), load_octo(TINY, TINY_CONFIG)
    for (name, a), b in zip(ours.model.state_dict().items(), theirs.model.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert theirs.statistics["tiny"]["action"]["mask"] == [True] * 6 + [False]
    assert len(theirs.sha256) == 64 and theirs.file == TINY / "7/default/checkpoint"


def test_the_last_step_is_loaded(copy):
    folder, tree = copy
    tree["octo_transformer"]["readout_action_pos_embedding"] = np.full((1, 3, 1, 32), 2.0, np.float32)
    (folder / "10" / "default").mkdir(parents=True)
    (folder / "10/default/checkpoint").write_bytes(pack(tree))
    assert load_octo(folder, TINY_CONFIG).model.positions["readout"].unique().tolist() == [2.0]


def test_broken_files_are_refused(copy):
    folder, tree = copy
    file = folder / "7/default/checkpoint"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1000])
    refuse(folder, "no complete flax-msgpack file")
    file.write_bytes(whole + b"\x00")
    refuse(folder, rf"has {len(whole) + 1} bytes, but its data ends after {len(whole)}")
    file.write_bytes(b"")
    refuse(folder, "no complete flax-msgpack file")
    file.write_bytes(b"not a checkpoint")
    refuse(folder, "no complete flax-msgpack file|but its data ends after")
    tree["octo_transformer"]["readout_action_pos_embedding"] = np.zeros((1, 3, 1, 32))
    file.write_bytes(pack(tree))
    refuse(folder, "float64")
    tree["octo_transformer"]["readout_action_pos_embedding"] = "PLACEHOLDER://readout"
    file.write_bytes(pack(tree))
    refuse(folder, "readout_action_pos_embedding is str")


def test_misfits_are_refused(copy):
    folder, tree = copy
    file = folder / "7/default/checkpoint"
    trunk = tree["octo_transformer"]["BlockTransformer_0"]["Transformer_0"]
    norm = trunk["encoder_norm"]
    scale = norm.pop("scale")
    file.write_bytes(pack(tree))
    refuse(folder, r"missing 1 \(octo_transformer/BlockTransformer_0/Transformer_0/encoder_norm/scale\), unused 0")
    norm.update(scale=scale, extra=scale)
    file.write_bytes(pack(tree))
    refuse(folder, r"missing 0 \(\), unused 1 \(.*encoder_norm/extra\)")
    del norm["extra"]
    # As many numbers, but two heads instead of four: reshaping alone would not notice.
    query = trunk["encoderblock_0"]["MultiHeadDotProductAttention_0"]["query"]
    query["kernel"] = query["kernel"].reshape(32, 2, 16)
    file.write_bytes(pack(tree))
    refuse(folder, r"query/kernel has shape \(32, 2, 16\), this model needs \(32, 4, 8\)")


def test_wrong_folders_are_refused(copy, tmp_path):
    folder, _ = copy
    refuse(tmp_path / "absent", "no folder .*absent: pass a local folder or hf://owner/name")
    refuse("http://example.org/octo", "no folder")
    refuse(folder, "token width 32, neither octo-small nor octo-base", config=None)
    config = json.loads((folder / "config.json").read_text())
    for key in ("use_correct_attention", "repeat_task_tokens"):  # both absent in 1.0
        changed = {"model": {name: value for name, value in config["model"].items() if name != key}}
        (folder / "config.json").write_text(json.dumps(changed))
        refuse(folder, "Octo 1.0")
    (folder / "config.json").write_text("{}")
    refuse(folder, "doesn't describe an Octo model")
    (folder / "config.json").unlink()
    refuse(folder, "config.json can't be read")
    (folder / "7/default/checkpoint").unlink()
    refuse(folder, "no weights at .*checkpoint")
    (folder / "7/default/manifest.ocdbt").touch()
    refuse(folder, "newer orbax")
    shutil.rmtree(folder / "7")
    refuse(folder, "no weights at")


def test_only_a_config_drops_cameras(copy, monkeypatch):
    folder, tree = copy
    loaded = load_octo(folder, TINY_CONFIG)
    monkeypatch.setitem(PRESETS, "octo-tiny", dataclasses.replace(TINY_CONFIG, window=1))
    found = load_octo(folder)
    assert found.model.config == TINY_CONFIG  # the checkpoint's window, 2
    assert torch.equal(found.model.blocks[1].q.weight, loaded.model.blocks[1].q.weight)
    tree["octo_transformer"]["obs_side_projection"] = {"bias": np.zeros(32, np.float32)}
    (folder / "7/default/checkpoint").write_bytes(pack(tree))
    refuse(folder, r"missing 0 \(\), unused 1 \(octo_transformer/obs_side_projection/bias\)", config=None)
    load_octo(folder, TINY_CONFIG)
    hashed = dataclasses.replace(TINY_CONFIG, text="hash")
    refuse(folder, "octo.text isn't part of the released models", config=hashed)


def test_head_sizes_come_from_the_config(copy):
    folder, _ = copy
    assert load_octo(folder, TINY_CONFIG).head.sizes == dict(
        embedding_dim=32,
        action_horizon=4,
        action_dim=7,
        hidden=24,
        num_blocks=3,
        time_dim=32,
        num_steps=20,
        max_action=5.0,
    )
    config = json.loads((folder / "config.json").read_text())
    del config["model"]["heads"]["action"]["kwargs"]["action_horizon"]
    (folder / "config.json").write_text(json.dumps(config))
    refuse(folder, r"Dense_0/kernel has shape \(92, 24\), this model needs \(71, 24\)")
    config["model"]["heads"]["action"]["name"] = "L1ActionHead"
    (folder / "config.json").write_text(json.dumps(config))
    refuse(folder, "has the action head L1ActionHead")


def test_hub(monkeypatch):
    import huggingface_hub

    asked = []

    def download(repository, revision, allow_patterns):
        asked.append((repository, revision))
        return str(TINY)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert load_octo("hf://owner/octo-tiny@v1", TINY_CONFIG).file == TINY / "7/default/checkpoint"
    load_octo("hf://owner/octo-tiny", TINY_CONFIG)
    assert asked == [("owner/octo-tiny", "v1"), ("owner/octo-tiny", None)]

    def unreachable(*_, **__):
        raise ConnectionError("name resolution\nfailed")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    refuse("hf://owner/octo-tiny", r"can't fetch owner/octo-tiny from the hub \(ConnectionError: name resolution")


def test_a_camera_can_be_dropped_and_low_dimensional_tokens_added():
    config = dataclasses.replace(TINY_CONFIG, image_sizes=(("wrist", 32),), lowdim_dim=5, lowdim_tokens=2)
    model, full = load_octo(TINY, config).model, load_octo(TINY, TINY_CONFIG).model
    assert torch.equal(model.stems["wrist"].convs[0].weight, full.stems["wrist"].convs[0].weight)
    assert model.lowdim_projection.weight.std() > 0
    images = {"wrist": torch.from_numpy(REFERENCE["images/image_wrist"])}
    a, b = (model(images, lowdim=torch.full((3, 2, 5), value)) for value in (0.0, 1.0))
    assert (a - b).abs().max() > 1e-3


@pytest.mark.parametrize("config", [TINY_CONFIG, COMPACT], ids=["tiny", "compact"])
def test_own_format_round_trip(config, tmp_path):
    pytest.importorskip("safetensors", reason="our own format is safetensors")
    model, head = Octo(config), DiffusionHead(config.token_dim, hidden=16, num_blocks=1)
    save_octo(tmp_path, model, head, {"data": {"action": {"mean": [1.0]}}})
    loaded = load_octo(tmp_path, config)
    assert loaded.model.config == config and loaded.statistics == {"data": {"action": {"mean": [1.0]}}}
    for before, after in ((model, loaded.model), (head, loaded.head)):
        for (name, a), b in zip(before.state_dict().items(), after.state_dict().values(), strict=True):
            assert torch.equal(a, b), name
    refuse(tmp_path, "saved with another config", dataclasses.replace(config, window=3))
    described = json.loads((tmp_path / "octo.json").read_text())
    described["config"]["mlp_dim"] += 1
    (tmp_path / "octo.json").write_text(json.dumps(described))
    refuse(tmp_path, "don't fit together")


def test_check_weights_prints_one_line_errors(tmp_path):
    command = [sys.executable, "-m", "backbones.octo_weights", str(tmp_path)]
    done = subprocess.run(command, cwd=FIXTURES.parent.parent, capture_output=True, text=True)
    assert done.returncode == 2
    assert re.fullmatch(r"error: no weights at [^\n]+\n", done.stderr), done.stderr


# --- the compact model and the head ---


def compact_inputs(config, batch=3):
    images = {
        name: torch.randint(0, 256, (batch, config.window, side, side, 3), dtype=torch.uint8)
        for name, side in config.image_sizes
    }
    return images, torch.randn(batch, config.window, config.lowdim_dim) if config.lowdim_dim else None


@pytest.mark.parametrize(
    "change",
    [{}, {"image_sizes": ()}, {"lowdim_dim": 0}, {"window": 2, "max_horizon": 4, "repeat_task_tokens": True},
     {"readout_tokens": 3}, {"image_channels": 6}],
    ids=str,
)  # fmt: skip
def test_embedding_is_the_readout_of_the_whole_trunk(change):
    """Computing the last block for the readout rows only is exact."""
    config = dataclasses.replace(COMPACT, **change)
    model = Octo(config)
    images, lowdim = compact_inputs(config)
    language = model.encode_text(["stack the red cube on the green cube"])
    embedding, outputs = model(images, language, lowdim), model.trunk(images, language, lowdim)
    assert embedding.shape == (3, config.embedding_dim)
    readout = embedding[:, : config.token_dim]  # the cameras' points follow
    torch.testing.assert_close(readout, outputs["readout"][:, -1].mean(1), atol=2e-6, rtol=0)
    assert outputs["readout"].shape == (3, config.window, config.readout_tokens, config.token_dim)
    # One instruction for all samples is the same as one each, and an all-true mask the same as none.
    each = model(images, language.expand(3, -1, -1), lowdim, torch.ones(3, config.window, dtype=torch.bool))
    torch.testing.assert_close(embedding, each, atol=2e-6, rtol=0)
    told = torch.tensor([True, False, True])
    one, each = (model(images, x, lowdim, language_mask=told) for x in (language, language.expand(3, -1, -1)))
    torch.testing.assert_close(one, each, atol=2e-6, rtol=0)
    torch.testing.assert_close(one[::2], embedding[::2], atol=2e-6, rtol=0)
    assert (one[1] - embedding[1]).abs().max() > 1e-5


def test_every_parameter_gets_a_gradient():
    config = dataclasses.replace(COMPACT, image_sizes=(("primary", 32), ("wrist", 16)))
    model, (images, lowdim) = Octo(config), compact_inputs(config)
    model(images, model.encode_text(["push the cube"]), lowdim).square().mean().backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    # A constant added to all keys shifts all scores of a query alike, and the softmax takes it out again.
    assert [name for name in without if not name.endswith(".k.bias")] == []


def test_each_input_matters():
    model, (images, lowdim) = Octo(COMPACT), compact_inputs(COMPACT)
    a, b = model.encode_text(["put the red cube on the green cube", "put the green cube on the red cube"])
    base = model(images, a[None], lowdim)
    others = {
        "word order": model(images, b[None], lowdim),
        "no instruction": model(images, None, lowdim),
        "image": model({"primary": 255 - images["primary"]}, a[None], lowdim),
        "lowdim": model(images, a[None], lowdim + 1),
        "masked image": model(images, a[None], lowdim, image_pad_masks={"primary": torch.zeros(3, 1)}),
        "masked language": model(images, a[None], lowdim, language_mask=torch.zeros(3)),
    }
    for name, other in others.items():
        assert (other - base).abs().max() > 1e-5, name
        assert other.isfinite().all(), name


def test_masked_inputs_do_not_matter():
    config = dataclasses.replace(COMPACT, window=2, max_horizon=2)
    model, (images, lowdim) = Octo(config), compact_inputs(config)
    language, steps = model.encode_text(["push"]), torch.tensor([[False, True]] * 3)
    base = model(images, language, lowdim, steps)
    images["primary"][:, 0], lowdim[:, 0] = 7, 9.0
    assert torch.equal(model(images, language, lowdim, steps), base)
    images["primary"][:, 1] = 7
    assert not torch.equal(model(images, language, lowdim, steps), base)


def test_attention_pattern_by_hand():
    rows = attention_pattern(1, ((1, 2), (2, 1)), 2, torch.device("cpu")).int().tolist()
    assert rows == [
        [1, 0, 0, 0, 0, 0, 0],  # language
        [1, 1, 1, 0, 0, 0, 0],  # step 0: two observation tokens
        [1, 1, 1, 0, 0, 0, 0],
        [1, 1, 1, 1, 0, 0, 0],  # its readout
        [1, 1, 1, 0, 1, 1, 0],  # step 1
        [1, 1, 1, 0, 1, 1, 0],
        [1, 1, 1, 1, 1, 1, 1],
    ]


def test_word_ids_are_the_same_everywhere():
    text = HashText(tokens=2, dim=8, vocabulary=1024, max_words=5)
    ids = word_ids(("Pick up, the CUBE!", "pick up the cube", *WORDS), 1024, 5, "cpu").tolist()
    assert ids[0] == ids[1] == [626, 1001, 289, 468, 0]
    assert dict(zip(WORDS, [row[0] for row in ids[2:]])) == WORDS
    assert text(["pick", "pick up the cube and more words than five"]).shape == (2, 2, 8)
    alone, batched = text(["pick"]), text(["pick", "pick up the cube"])[:1]
    torch.testing.assert_close(alone, batched, atol=1e-6, rtol=0)


def test_wrong_inputs_are_named():
    model, (images, lowdim) = Octo(COMPACT), compact_inputs(COMPACT)
    with pytest.raises(ValueError, match=r"image 'primary' must be \(3, 1, 32, 32, 3\), got \(3, 1, 16, 16, 3\)"):
        model({"primary": images["primary"][:, :, ::2, ::2]}, None, lowdim)
    with pytest.raises(ValueError, match=r"lowdim must be \(3, 1, 5\), got None"):
        model(images)
    with pytest.raises(ValueError, match=r"language must be \('B or 1', 4, 64\), got \(1, 1, 64\)"):
        model(images, torch.zeros(1, 1, 64), lowdim)
    with pytest.raises(ValueError, match="window must be at most max_horizon = 1, got 2"):
        model({"primary": images["primary"].repeat(1, 2, 1, 1, 1)}, None, lowdim.repeat(1, 2, 1))


def test_diffusion_loss_by_hand():
    head, generator = DiffusionHead(8, hidden=16), torch.Generator().manual_seed(3)
    embedding, actions = torch.randn(5, 8), 4 * torch.randn(5, 4, 7)
    assert actions.abs().max() > 5  # so that clipping shows
    loss = head.loss(embedding, actions, generator)
    generator.manual_seed(3)
    step = torch.randint(20, (5, 1), generator=generator)
    noise = torch.randn(5, 28, generator=generator)
    kept = torch.stack([torch.prod(1 - head.betas[: int(t) + 1]) for t in step])[:, None]
    noisy = kept.sqrt() * actions.reshape(5, 28).clip(-5, 5) + (1 - kept).sqrt() * noise
    error = head(embedding, noisy, step) - noise
    torch.testing.assert_close(loss, 7 * (error**2).sum() / (5 * 28))


def test_diffusion_head_learns_and_samples_reproducibly():
    head = DiffusionHead(2, hidden=32, num_blocks=2)
    generator, embedding = torch.Generator().manual_seed(0), torch.eye(2)
    actions = torch.stack([torch.full((4, 7), 1.0), torch.full((4, 7), -0.5)])
    optimizer = torch.optim.Adam(head.parameters(), lr=3e-3)
    losses = []
    for _ in range(250):
        losses.append(head.loss(embedding.repeat(32, 1), actions.repeat(32, 1, 1), generator))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert sum(losses[-20:]) < 0.2 * sum(losses[:20])
    a, b, c = (head.sample(embedding, K=3, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert a.shape == (2, 3, 4, 7) and a.abs().max() <= 5
    assert torch.equal(a, b) and not torch.equal(a, c)


# --- a checkpoint of the released size ---


@pytest.mark.slow
def test_full_size_checkpoint(tmp_path):
    """A random checkpoint of octo-small's byte layout loads strictly, in bounded memory."""
    layout = json.loads((FIXTURES / "octo_layout.json").read_text())["octo-small"]
    rng = np.random.default_rng(0)
    tree = {}
    for path in layout:
        node = tree
        for part in path.split("/"):
            node = node.setdefault(part, {})
    packer = msgpack.Packer()
    file = tmp_path / "300000" / "default" / "checkpoint"
    file.parent.mkdir(parents=True)
    with open(file, "wb") as stream:

        def write(node, path):
            if node:
                stream.write(packer.pack_map_header(len(node)))
                for key, child in node.items():
                    stream.write(packer.pack(key))
                    write(child, f"{path}/{key}" if path else key)
            else:
                values = 0.05 * rng.standard_normal(layout[path], np.float32)
                raw = msgpack.packb((values.shape, "float32", values.tobytes()))
                stream.write(msgpack.packb(msgpack.ExtType(1, raw)))

        write(tree, "")
    assert file.stat().st_size == 546_696_551  # the released file's
    shutil.copy(TINY / "dataset_statistics.json", tmp_path)
    config = json.loads((TINY / "config.json").read_text())
    del config["model"]["heads"]["action"]["kwargs"]["hidden_dim"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    code = f"""
import torch; torch.set_num_threads(1)
from backbones.octo import PRESETS
from backbones.octo_weights import check_weights, load_octo
loaded = load_octo({str(tmp_path)!r})
assert loaded.model.config == PRESETS["octo-small"]
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print("peak", int(peak.split()[1]) * 1024)
del loaded
check_weights({str(tmp_path)!r})
"""
    root = FIXTURES.parent.parent
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    assert int(re.search(r"peak (\d+)", done.stdout)[1]) < 2.5e9
    assert "366 arrays, all used" in done.stdout and "109,628,544 in the frozen text encoder" in done.stdout


def test_points_are_where_the_object_is():
    """Heat on one pixel: its coordinates. Heat on two: the middle between them."""
    points = SpatialPoints(3, 2)
    with torch.no_grad():
        points.heat.weight.copy_(torch.tensor([[100.0, 0, 0], [0, 100.0, 0]])[..., None, None])
        points.heat.bias.zero_()
        image = torch.zeros(1, 3, 5, 5)
        image[0, 0, 1, 3] = 1  # row 1, column 3 of 0..4
        image[0, 1, 0, 4] = image[0, 1, 4, 4] = 1
        assert points(image)[0].tolist() == pytest.approx([0.5, 1.0, -0.5, 0.0], abs=1e-4)  # columns, then rows


def test_points_follow_the_embedding():
    config = dataclasses.replace(PRESETS["octo-compact"], image_sizes=(("primary", 32),))
    torch.manual_seed(0)
    model = Octo(config)
    image = torch.randint(0, 256, (3, 1, 32, 32, 3), dtype=torch.uint8)
    language = model.encode_text(["pick up the cube"])
    embedding = model({"primary": image}, language)
    assert embedding.shape == (3, config.embedding_dim) == (3, 128 + 2 * 32)
    without = Octo(dataclasses.replace(config, points=0))
    without.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("points.")})
    torch.testing.assert_close(embedding[:, :128], without({"primary": image}, language))
    embedding[:, 128:].square().sum().backward()
    assert (
        model.points["primary"].sharpness.grad.abs().sum() > 0
        and model.stems["primary"].convs[0].weight.grad.abs().sum() > 0
    )
    assert not model.stems["primary"].convs[3].weight.grad.any()  # they are read off the second convolution
