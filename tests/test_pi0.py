"""The pi0 and pi0.5 ports against openpi's recorded outputs, the checkpoint loader, and the compact models."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from backbones import pi0, pi0_weights
from backbones.pi0 import PRESETS, Pi0, resize_with_pad, state_bins, time_embedding
from backbones.pi0_weights import DEAD, TIED, find_statistics, load_pi0, released_name
from plumbing import UserError

torch.set_num_threads(1)

FIXTURES = Path(__file__).parent / "fixtures"
REFERENCE = dict(np.load(FIXTURES / "pi0_reference.npz"))
SIZES = dict(
    vlm_width=32, vlm_mlp=48, expert_width=24, expert_mlp=40, depth=2, heads=8, kv_heads=1, head_dim=8, vocabulary=64,
    vit_width=16, vit_mlp=24, vit_depth=2, vit_heads=2, patch=14, image_size=28, action_dim=5, state_dim=5, max_tokens=96,
)  # fmt: skip
TINY = {name: dataclasses.replace(PRESETS[name], **SIZES) for name in ("pi0", "pi05")}
BOTH = pytest.mark.parametrize("name", TINY)


@pytest.fixture(scope="module")
def tiny():
    return {name: load_pi0(FIXTURES / f"{name}_tiny", config).model for name, config in TINY.items()}


def recorded(name: str) -> dict[str, torch.Tensor]:
    return {
        key.removeprefix(f"{name}/"): torch.from_numpy(REFERENCE[key])
        for key in REFERENCE
        if key.startswith(f"{name}/")
    }


@torch.no_grad()
def run_prefix(model, x, drop=()):
    cameras = {"base": "image_base", "left_wrist": "image_left", "right_wrist": "image_right"}
    images = {camera: x[key] for camera, key in cameras.items() if camera not in drop}
    masks = {"left_wrist": x["mask_left"], "right_wrist": x["mask_right"]}
    return model.prefix(images, x["ids"], x["valid"], image_masks=masks)


def close(a, b, tolerance):
    assert a.shape == b.shape and b.abs().max() > 1  # the tolerance means something at this scale
    error = (a - b).abs().max().item()
    assert error <= tolerance * b.abs().max().item(), error


# --- openpi's numbers ---


@BOTH
@torch.no_grad()
def test_loss_samples_and_prefix_match_the_original(tiny, name):
    """Different prompt lengths, a camera missing in some samples, three times of the flow."""
    x, expert = recorded(name), tiny[name].expert
    prefix = run_prefix(tiny[name], x)
    close(prefix.embedding, x["embedding"], 2e-5)
    t, noise, actions = x["time"][:, None], x["noise"][:, None], x["actions"][:, None]
    mixed = t[..., None, None] * noise + (1 - t[..., None, None]) * actions
    loss = (expert(prefix.cache, prefix.valid, x["state"], mixed, t) - (noise - actions)).square()[:, 0]
    close(loss, x["loss"], 2e-5)
    sample = expert.sample(prefix.cache, prefix.valid, x["state"], noise, 10)[:, 0]
    close(sample, x["sample"], 1e-4)


@BOTH
@torch.no_grad()
def test_twenty_samples_on_one_prefix_equal_one_by_one(tiny, name):
    x, expert = recorded(name), tiny[name].expert
    prefix = run_prefix(tiny[name], x)
    noise = torch.randn(3, 20, 4, 5, generator=torch.Generator().manual_seed(0))
    context = (prefix.cache, prefix.valid, x["state"])
    together = expert.sample(*context, noise, 2)
    for b in range(3):
        for k in range(0, 20, 7):
            alone = expert.sample(*(part[b : b + 1] for part in context), noise[b : b + 1, k : k + 1], 2)
            close(alone[0, 0], together[b, k], 1e-6)


@BOTH
@torch.no_grad()
def test_dropping_a_masked_camera_or_padding_changes_nothing(tiny, name):
    x = recorded(name)
    x["mask_right"][:] = False
    x["valid"][:, 4:] = False
    masked, dropped = run_prefix(tiny[name], x), run_prefix(tiny[name], x, drop=["right_wrist"])
    short = run_prefix(tiny[name], x | {"ids": x["ids"][:, :4], "valid": x["valid"][:, :4]}, drop=["right_wrist"])
    noise = x["noise"][:, None]
    outputs = [
        tiny[name].expert(p.cache, p.valid, x["state"], noise, noise[:, :, 0, 0]) for p in (masked, dropped, short)
    ]
    assert masked.valid.shape[1] == 18 and short.valid.shape[1] == 12
    for other in outputs[1:]:
        close(other, outputs[0], 1e-6)  # sums in another order, nothing else
    x["image_right"].fill_(9)
    assert torch.equal(run_prefix(tiny[name], x).embedding, masked.embedding)  # nothing sees it


@torch.no_grad()
def test_who_sees_whom(tiny):
    """The state doesn't see the actions; every action sees the state and all actions. Nobody sees padding."""
    x, expert = recorded("pi0"), tiny["pi0"].expert
    prefix, t = run_prefix(tiny["pi0"], x), torch.full((3, 1), 0.5)
    seen, layer = [], expert.layers[1].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    noise = x["noise"][:, None]
    base = expert(prefix.cache, prefix.valid, x["state"], noise, t)
    moved = noise.clone()
    moved[:, :, 3] += 1  # the last action
    other = expert(prefix.cache, prefix.valid, x["state"], moved, t)
    assert torch.equal(seen[0][:, :, 0], seen[1][:, :, 0])  # the state's token, after a layer
    assert ((seen[0][:, :, 1:] - seen[1][:, :, 1:]).abs().amax(-1) > 1e-4).all()
    assert ((base - other).abs().amax(-1) > 1e-4).all()
    stated = expert(prefix.cache, prefix.valid, x["state"] + 1, noise, t)
    assert ((base - stated).abs().amax(-1) > 1e-4).all()
    layer.remove()
    hidden = prefix.cache.clone()
    hidden[~prefix.valid[:, None, None].expand(-1, 2, 2, -1)] = 7.0
    torch.testing.assert_close(expert(hidden, prefix.valid, x["state"], noise, t), base, atol=1e-6, rtol=0)


@BOTH
def test_every_released_parameter_has_its_place(name):
    layout = json.loads((FIXTURES / "pi0_layout.json").read_text())[name]
    with torch.device("meta"):
        model = Pi0(PRESETS[name])
    ours = {}
    for own, parameter in model.named_parameters():
        key = re.sub(r"layers\.\d+\.", "layers.{i}.", released_name(own))
        ours.setdefault(key, [0, list(parameter.shape)])[0] += 1
    spare = (TIED | DEAD) - ours.keys()
    assert ours == {key: value for key, value in layout.items() if key not in spare}
    assert spare <= layout.keys() and len(spare) == 2
    released = {"pi0": 3_238_048_528, "pi05": 3_353_433_872}[name]  # openpi's, without the head that nothing uses
    assert sum(p.numel() for p in model.parameters()) == released


def test_prompts_match_the_original(tiny):
    file = FIXTURES / "pi0_tiny" / "paligemma_tokenizer.model"
    assert tiny["pi0"].prefix.tokenizer_file == file
    prompts, state = REFERENCE["tokens/prompts"].tolist(), torch.from_numpy(REFERENCE["tokens/state"])
    for name in TINY:
        prefix = Pi0(dataclasses.replace(TINY[name], vocabulary=400)).prefix
        prefix.tokenizer_file = file
        for prompt, row, ids, valid in zip(
            prompts, state, REFERENCE[f"tokens/{name}/ids"], REFERENCE[f"tokens/{name}/valid"]
        ):
            own, mask = prefix.prompt(prompt, row[None] if name == "pi05" else None)
            n = valid.sum()
            assert own[0, :n].tolist() == ids[:n].tolist() and mask[0, :n].all() and not mask[0, n:].any()
    with pytest.raises(UserError, match="pieces, the embedding 64 rows"):
        tiny["pi0"].prefix.prompt("push it")


# --- small parts, by hand ---


def test_time_embedding():
    width, t = 8, np.array([0.3, 1.0])
    period = [0.004 * 1000 ** (i / 3) for i in range(4)]
    expected = [[f(2 * np.pi * x / p) for f in (np.sin, np.cos) for p in period] for x in t]
    np.testing.assert_allclose(time_embedding(torch.tensor(t), width), expected, atol=1e-12)


def test_state_bins():
    x = np.array([-3.0, -1.0, -0.9922, -0.99, 0.0, 0.999, 1.0, 5.0])
    bins = [int(np.floor((v + 1) * 128)) if v >= -1 else -1 for v in x]
    assert state_bins(torch.tensor(x)[None])[0].tolist() == [min(b, 255) for b in bins]


def test_images_are_padded_in_the_middle():
    image = torch.full((1, 8, 16, 3), 255, dtype=torch.uint8)
    out = resize_with_pad(image, 8)
    assert out.shape == (1, 3, 8, 8) and (out[:, :, 2:6] == 1).all() and (out[:, :, [0, 1, 6, 7]] == -1).all()
    image = torch.arange(192, dtype=torch.uint8).view(1, 8, 8, 3)
    np.testing.assert_allclose(resize_with_pad(image, 8).permute(0, 2, 3, 1), image / 127.5 - 1, atol=1e-6)


# --- the loader ---


@pytest.fixture
def folder(tmp_path):
    shutil.copytree(FIXTURES / "pi0_tiny", tmp_path / "copy")
    return tmp_path / "copy"


def refuse(source, pattern, config=TINY["pi0"]):
    with pytest.raises(UserError, match=pattern) as caught:
        load_pi0(source, config)
    assert "\n" not in str(caught.value)


def test_names_dtypes_and_the_tied_embedding(folder, tiny):
    """All layouts of the same numbers give the same model."""
    file, expected = folder / "model.safetensors", tiny["pi0"].state_dict()
    stored = load_file(file)
    lm_head, embedding = (next(k for k in TIED if k.endswith(end)) for end in ("lm_head.weight", "embed_tokens.weight"))
    assert lm_head in stored and embedding not in stored
    swapped = {(embedding if k == lm_head else k): v for k, v in stored.items() if k not in DEAD}
    for layout in (
        swapped,
        {f"model.{k}": v for k, v in stored.items()},
        stored | {embedding: stored[lm_head].clone()},
    ):
        save_file(layout, file)
        for key, value in load_pi0(file, TINY["pi0"]).model.state_dict().items():
            assert torch.equal(value, expected[key]), key
    save_file({k: v.bfloat16() for k, v in stored.items()}, file)
    loaded = load_pi0(folder, TINY["pi0"])
    assert all(torch.equal(v, expected[k].bfloat16().float()) for k, v in loaded.model.state_dict().items())
    assert loaded.file == file and len(loaded.sha256) == 64
    raw = load_file(FIXTURES / "pi05_tiny" / "model.safetensors")
    assert all(
        k.startswith("model.") and v.dtype == torch.bfloat16 for k, v in raw.items()
    )  # the other recorded layout


def test_misfits_are_refused(folder):
    file = folder / "model.safetensors"
    stored, whole = load_file(file), file.read_bytes()
    key = "paligemma_with_expert.gemma_expert.model.norm.weight"
    save_file({k: v for k, v in stored.items() if k != key}, file)
    refuse(folder, rf"doesn't fit pi0: missing 1 \({key}\), unused 0 \(\)")
    save_file(stored | {"normalize_inputs.mean": torch.zeros(3)}, file)
    refuse(folder, r"missing 0 \(\), unused 1 \(normalize_inputs\.mean\)")
    save_file(stored | {"action_in_proj.weight": torch.zeros(24, 6)}, file)
    refuse(folder, r"action_in_proj.weight has shape \(24, 6\), this model needs \(24, 5\)")
    file.write_bytes(whole)
    refuse(folder, "doesn't fit pi0.5: missing", TINY["pi05"])
    refuse(folder, "doesn't fit pi0: missing 688", None)  # the released sizes, with 18 layers
    for broken in (whole[:-100], b"", b"not a checkpoint"):
        file.write_bytes(broken)
        refuse(folder, "is no complete safetensors file")
    file.unlink()
    refuse(folder, "no weights at .*model.safetensors: pass .*converted first")
    refuse(folder / "absent", "no weights at")


def test_a_config_may_drop_cameras_and_add_parts(folder, tiny):
    config = dataclasses.replace(TINY["pi0"], cameras=(), lowdim_dim=3, lowdim_tokens=2)
    model = load_pi0(folder, config).model
    assert torch.equal(model.prefix.embed_tokens.weight, tiny["pi0"].prefix.embed_tokens.weight)
    ids = torch.tensor([[5, 6]])
    out = [model.prefix({}, ids, ids > 0, lowdim=torch.full((3, 3), value)) for value in (0.0, 1.0)]
    assert out[0].embedding.shape == (3, 32) and (out[0].embedding - out[1].embedding).abs().max() > 1e-3
    with pytest.raises(ValueError, match="not \\['base'\\]"):
        model.prefix({"base": torch.zeros(3, 28, 28, 3)}, ids, ids > 0, lowdim=torch.zeros(3, 3))


def test_hub(monkeypatch):
    import huggingface_hub

    asked = []

    def download(repository, revision, allow_patterns):
        asked.append((repository, revision))
        return str(FIXTURES / "pi0_tiny")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert load_pi0("hf://owner/pi0-tiny@v1", TINY["pi0"]).file == FIXTURES / "pi0_tiny" / "model.safetensors"
    assert asked == [("owner/pi0-tiny", "v1")]

    class GatedRepoError(Exception):
        pass

    for error, words in ((ConnectionError("no\nnetwork"), r"can't fetch owner/x from the hub \(ConnectionError: no network\)"),
                         (GatedRepoError("401"), "owner/x is gated: accept its terms at .*hf auth login")):  # fmt: skip

        def fail(*_, error=error, **__):
            raise error

        monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
        refuse("hf://owner/x", words)


def test_the_tokenizer_is_fetched_once(monkeypatch, tmp_path):
    fetched = []

    def download(url, file, progress):
        fetched.append(url)
        shutil.copy(FIXTURES / "pi0_tiny" / "paligemma_tokenizer.model", file)

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda *_, **__: (_ for _ in ()).throw(OSError("no route")))
    with pytest.raises(UserError, match="can't fetch PaliGemma's tokenizer from https://storage.*no route.*save it as"):
        pi0.fetch_tokenizer()
    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    for _ in range(2):
        assert pi0.fetch_tokenizer().is_file()
    assert len(fetched) == 1
    (tmp_path / "bad.model").write_text("no")
    with pytest.raises(UserError, match="is no SentencePiece model"):
        pi0.load_tokenizer(tmp_path / "bad.model", 400)


def test_statistics_of_both_families(tmp_path):
    assert find_statistics(tmp_path) == {}
    stats = {part: {"mean": [0.5, 1.0], "std": [1.0, 2.0], "q01": None, "q99": None} for part in ("state", "actions")}
    file = tmp_path / "assets" / "org" / "robot" / "norm_stats.json"
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps({"norm_stats": stats}))
    arrays = {"observation.state.q01": torch.tensor([-1.0]), "observation.state.q99": torch.tensor([2.0]), "action.mean": torch.tensor([3.0])}  # fmt: skip
    save_file(arrays, tmp_path / "policy_preprocessor_step_5_normalizer_processor.safetensors")
    found = find_statistics(tmp_path)
    assert found["org/robot"]["actions"] == {"mean": [0.5, 1.0], "std": [1.0, 2.0]}
    assert found["lerobot"] == {"state": {"q01": [-1.0], "q99": [2.0]}, "actions": {"mean": [3.0]}}
    file.write_text("{}")
    with pytest.raises(UserError, match="norm_stats.json holds no normalisation statistics"):
        find_statistics(tmp_path)


def test_check_weights(folder, monkeypatch, capsys):
    monkeypatch.setitem(PRESETS, "pi0", TINY["pi0"])
    pi0_weights.check_weights(str(folder))
    first = capsys.readouterr().out
    assert "all used" in first and "statistics: none" in first and re.search(r"actions: mean -?\d", first)
    pi0_weights.check_weights(str(folder))
    assert capsys.readouterr().out == first
    monkeypatch.setattr("sys.argv", ["pi0", "--check-weights", str(folder / "no")])
    with pytest.raises(SystemExit, match="2"):
        pi0_weights.main()
    assert re.fullmatch(r"error: no weights at [^\n]+\n", capsys.readouterr().err)


# --- the compact models ---


@pytest.mark.parametrize("name", ["pi0-compact", "pi05-compact"])
def test_compact_models(name):
    """About 1.7 M parameters, the same parts, and everything learns."""
    torch.manual_seed(0)
    config = dataclasses.replace(PRESETS[name], lowdim_dim=5, state_dim=5)
    model = Pi0(config)
    assert 1.5e6 < sum(p.numel() for p in model.parameters()) < 2.1e6
    for parameter in model.parameters():  # zero norms hide gradients at the start
        parameter.data += 0.02 * torch.randn_like(parameter)
    state, images = torch.randn(2, 5), {"primary": torch.randint(0, 256, (2, 64, 64, 3), dtype=torch.uint8)}
    ids, valid = model.prefix.prompt("push the cube", state)
    assert len(ids) == (2 if config.pi05 else 1) and valid.all() and ids.max() < config.vocabulary
    prefix = model.prefix(images, ids, valid, lowdim=state)
    assert prefix.embedding.shape == (2, config.embedding_dim) == (2, 128 + 64)
    out = model.expert(prefix.cache, prefix.valid, state, torch.randn(2, 3, 4, 8), torch.rand(2, 3))
    (out.square().mean() + prefix.embedding.square().mean()).backward()
    still = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum()]
    assert still == []
    assert not torch.equal(model.prefix.prompt("push the cube", state)[0][:, 2], model.prefix.prompt("push the ball", state)[0][:, 2])  # fmt: skip
    with pytest.raises(UserError, match="the prompt has"):
        model.prefix.prompt("word " * 100, state)
