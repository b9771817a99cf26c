"""Released Octo 1.5 checkpoints to `backbones.octo` and back: flax-msgpack and safetensors, strictly, without JAX.

A released repository holds config.json, dataset_statistics.json and <step>/default/checkpoint, one msgpack file with a
nested dict of float32 arrays. `FLAX_NAMES` says where each of our parameters lives in it. `load_octo` is the way in;
`python -m backbones.octo_weights SOURCE` checks a source and prints a report.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from backbones.octo import PRESETS, DiffusionHead, Octo, OctoConfig
from backbones.t5 import t5_token_ids
from plumbing.flags import UserError, run_script
from plumbing.hub import from_hub


@dataclass
class LoadedOcto:
    """What `load_octo` returns."""

    model: Octo
    head: DiffusionHead
    statistics: dict  # dataset_statistics.json: {data set: {"action": {"mean": [7 numbers], "std": ..., ...}, ...}}
    file: Path  # the weights file that was read
    sha256: str  # of that file


_BLOCKS, _T5 = "octo_transformer/BlockTransformer_0/Transformer_0", "octo_transformer/task_tokenizers_language/hf_model"
_STEM, _HEAD = r"octo_transformer/observation_tokenizers_\1/SmallStem16_0", "heads_action/diffusion_model"
FLAX_NAMES = {  # our module or parameter, as a regular expression: its name in the released file
    r"octo\.stems\.(\w+)\.convs\.(\d+)": rf"{_STEM}/StdConv_\2",
    r"octo\.stems\.(\w+)\.norms\.(\d+)": rf"{_STEM}/GroupNorm_\2",
    r"octo\.stems\.(\w+)\.out": rf"{_STEM}/embedding",
    r"octo\.image_projections\.(\w+)": r"octo_transformer/obs_\1_projection",
    r"octo\.language_projection": "octo_transformer/task_language_projection",
    r"octo\.positions\.language": "octo_transformer/task_language_pos_embedding",
    r"octo\.positions\.readout": "octo_transformer/readout_action_pos_embedding",
    r"octo\.positions\.(\w+)": r"octo_transformer/obs_\1_pos_embedding",
    r"octo\.blocks\.(\d+)\.norm1": rf"{_BLOCKS}/encoderblock_\1/LayerNorm_0",
    r"octo\.blocks\.(\d+)\.norm2": rf"{_BLOCKS}/encoderblock_\1/LayerNorm_1",
    r"octo\.blocks\.(\d+)\.q": rf"{_BLOCKS}/encoderblock_\1/MultiHeadDotProductAttention_0/query",
    r"octo\.blocks\.(\d+)\.k": rf"{_BLOCKS}/encoderblock_\1/MultiHeadDotProductAttention_0/key",
    r"octo\.blocks\.(\d+)\.v": rf"{_BLOCKS}/encoderblock_\1/MultiHeadDotProductAttention_0/value",
    r"octo\.blocks\.(\d+)\.out": rf"{_BLOCKS}/encoderblock_\1/MultiHeadDotProductAttention_0/out",
    r"octo\.blocks\.(\d+)\.fc1": rf"{_BLOCKS}/encoderblock_\1/MlpBlock_0/Dense_0",
    r"octo\.blocks\.(\d+)\.fc2": rf"{_BLOCKS}/encoderblock_\1/MlpBlock_0/Dense_1",
    r"octo\.norm": f"{_BLOCKS}/encoder_norm",
    r"octo\.text\.embedding": f"{_T5}/shared",
    r"octo\.text\.distance": f"{_T5}/encoder/block/0/layer/0/SelfAttention/relative_attention_bias",
    r"octo\.text\.blocks\.(\d+)\.norm1": rf"{_T5}/encoder/block/\1/layer/0/layer_norm",
    r"octo\.text\.blocks\.(\d+)\.([qkv])": rf"{_T5}/encoder/block/\1/layer/0/SelfAttention/\2",
    r"octo\.text\.blocks\.(\d+)\.out": rf"{_T5}/encoder/block/\1/layer/0/SelfAttention/o",
    r"octo\.text\.blocks\.(\d+)\.norm2": rf"{_T5}/encoder/block/\1/layer/1/layer_norm",
    r"octo\.text\.blocks\.(\d+)\.fc1": rf"{_T5}/encoder/block/\1/layer/1/DenseReluDense/wi",
    r"octo\.text\.blocks\.(\d+)\.fc2": rf"{_T5}/encoder/block/\1/layer/1/DenseReluDense/wo",
    r"octo\.text\.norm": f"{_T5}/encoder/final_layer_norm",
    r"head\.fourier": f"{_HEAD}/time_preprocess/kernel",
    r"head\.time1": f"{_HEAD}/cond_encoder/Dense_0",
    r"head\.time2": f"{_HEAD}/cond_encoder/Dense_1",
    r"head\.input": f"{_HEAD}/reverse_network/Dense_0",
    r"head\.norms\.(\d+)": rf"{_HEAD}/reverse_network/MLPResNetBlock_\1/LayerNorm_0",
    r"head\.fc1\.(\d+)": rf"{_HEAD}/reverse_network/MLPResNetBlock_\1/Dense_0",
    r"head\.fc2\.(\d+)": rf"{_HEAD}/reverse_network/MLPResNetBlock_\1/Dense_1",
    r"head\.output": f"{_HEAD}/reverse_network/Dense_1",
}


def flax_layout(model: Octo, head: DiffusionHead) -> Iterator[tuple[str, tuple[int, ...], nn.Parameter, bool]]:
    """For each parameter: its name and shape in a released checkpoint, itself, and whether it is stored transposed.

    Parameters that only our models have (the low-dimensional tokens) are left out.
    """
    d, heads = model.config.token_dim, model.config.num_heads
    for prefix, module in nn.ModuleDict({"octo": model, "head": head}).named_modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            bare = isinstance(module, (nn.ParameterDict, DiffusionHead))  # parameters that belong to no layer
            ours = f"{prefix}.{leaf}" if bare else prefix
            shape = tuple(parameter.shape)
            if "lowdim" in ours:
                continue
            names = (re.sub(rule, name, ours) for rule, name in FLAX_NAMES.items() if re.fullmatch(rule, ours))
            path = next(names, None)
            if path is None:
                raise UserError(f"{ours} isn't part of the released models; base the config on octo-small or octo-base")
            transposed = leaf == "weight" and isinstance(module, (nn.Linear, nn.Conv2d))
            if transposed:  # [out, in, h, w] here, [h, w, in, out] there
                leaf, shape = "kernel", (*shape[2:], shape[1], shape[0])
            elif leaf == "weight":
                leaf = {nn.Embedding: "embedding", nn.RMSNorm: "weight"}.get(type(module), "scale")
            if path.endswith(("Attention_0/query", "Attention_0/key", "Attention_0/value")):
                shape = (*shape[:-1], heads, d // heads)
            elif path.endswith("Attention_0/out") and leaf == "kernel":
                shape = (heads, d // heads, d)
            yield (path if bare else f"{path}/{leaf}"), shape, parameter, transposed


def read_flax(file: Path) -> dict[str, np.ndarray]:
    """Read a flax-msgpack parameter file: {"module/.../name": float32 array}. Nothing in the file is executed.

    Raises: UserError when the file is cut short, isn't msgpack, or holds anything but float32 arrays.
    """
    try:
        import msgpack
    except ImportError:
        raise UserError("released Octo weights need `pip install msgpack`") from None

    def array(code: int, data: bytes) -> np.ndarray:
        shape, dtype, raw = msgpack.unpackb(data)
        if code != 1 or dtype != "float32":
            raise ValueError(f"an array of type {code}/{dtype}")
        return np.frombuffer(bytearray(raw), np.float32).reshape(shape)

    leaves, size = {}, file.stat().st_size
    try:
        with open(file, "rb") as stream:
            unpacker = msgpack.Unpacker(stream, ext_hook=array, max_buffer_size=max(size, 1))
            todo = [("", unpacker.unpack())]
            end = unpacker.tell()
        while todo:
            path, node = todo.pop()
            if isinstance(node, dict):
                todo += [(f"{path}/{key}", child) for key, child in node.items()]
            elif isinstance(node, np.ndarray):
                leaves[path[1:]] = node
            else:
                raise ValueError(f"{path[1:] or 'the file'} is {type(node).__name__}")
    except (msgpack.exceptions.UnpackException, ValueError, TypeError) as error:
        reason = " ".join(f"{type(error).__name__} {error}".split())
        raise UserError(f"{file} is no complete flax-msgpack file of float32 arrays ({reason})") from None
    if end != size:
        raise UserError(f"{file} has {size} bytes, but its data ends after {end}")
    return leaves


def _one_line(names: list[str]) -> str:
    return f"{len(names)} ({', '.join(sorted(names)[:3])}{', ...' if len(names) > 3 else ''})"


def load_octo(source: str | Path, config: OctoConfig | None = None) -> LoadedOcto:
    """Load Octo 1.5 weights, strictly: every name is used, every shape agrees.

    `source` is a folder or "hf://owner/name[@revision]", e.g. "hf://rail-berkeley/octo-small-1.5". It holds either the
    original repository's files (config.json, dataset_statistics.json, <step>/default/checkpoint; the last step is
    taken) or what `save_octo` wrote. A spiece.model in it is used as the tokenizer.

    `config` None: octo-small or octo-base, whichever fits, with the checkpoint's window. A config of yours may drop
    cameras, whose weights are then ignored, and may add low-dimensional tokens, which start random.

    Raises: UserError, one line, for a source that can't be reached or isn't Octo 1.5, and for any misfit.
    """
    match = re.fullmatch(r"hf://([\w.-]+/[\w.-]+)(?:@([\w./-]+))?", str(source))
    if match:
        patterns = ["*.json", "*/default/checkpoint", "octo.safetensors", "spiece.model"]
        folder = from_hub(match[1], match[2], patterns)
    else:
        folder = Path(source)
        if not folder.is_dir():
            raise UserError(f"no folder {source}: pass a local folder or hf://owner/name[@revision]")
    loaded = _load_ours(folder) if (folder / "octo.safetensors").is_file() else _load_released(folder, config)
    if config is not None and loaded.model.config != config:
        raise UserError(f"{source} was saved with another config: {loaded.model.config}")
    if (folder / "spiece.model").is_file():
        loaded.model.tokenizer_file = folder / "spiece.model"
        t5_token_ids([], 1, folder / "spiece.model")  # a damaged one is said here, before anything is made
    return loaded


def _sha256(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _json(file: Path) -> dict:
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{file} can't be read: {error}") from None


def _load_released(folder: Path, config: OctoConfig | None) -> LoadedOcto:
    steps = sorted((p for p in folder.iterdir() if p.name.isdigit()), key=lambda p: int(p.name))
    file = steps[-1] / "default" / "checkpoint" if steps else folder / "<step>" / "default" / "checkpoint"
    if not file.is_file():
        newer = bool(steps) and (steps[-1] / "default" / "manifest.ocdbt").exists()
        hint = "; it was saved by a newer orbax in the OCDBT format, which isn't read here" if newer else ""
        raise UserError(f"no weights at {file}{hint}")
    described, statistics = _json(folder / "config.json"), _json(folder / "dataset_statistics.json")
    try:
        options = described["model"]
        action = options["heads"]["action"]
        kind, kwargs = action["name"], dict(action["kwargs"])
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{folder / 'config.json'} doesn't describe an Octo model with an action head") from None
    if not options.get("use_correct_attention") or not options.get("repeat_task_tokens"):
        raise UserError(f"{folder} is Octo 1.0, whose attention differs; only Octo 1.5 is supported")
    if kind != "DiffusionActionHead" or kwargs.get("use_map"):
        raise UserError(f"{folder} has the action head {kind}; only DiffusionActionHead on mean readouts is supported")
    leaves, kept = read_flax(file), None
    if config is None:
        dim = leaves.get("octo_transformer/task_language_pos_embedding", np.empty(0)).shape[-1]
        config = next((c for c in PRESETS.values() if c.text != "hash" and c.token_dim == dim), None)
        if config is None:
            raise UserError(f"{file} has token width {dim}, neither octo-small nor octo-base; pass its config")
        window = described.get("window_size", config.window)
        if type(window) is not int or not 0 < window < 1000:
            raise UserError(f"{folder / 'config.json'} says window_size = {window!r}: fetch the file again")
        config = dataclasses.replace(config, window=window)
    else:
        kept = {name for name, _ in config.image_sizes}
    model = Octo(config)
    ours = {"hidden_dim": "hidden", "diffusion_steps": "num_steps"}
    known = ("action_horizon", "action_dim", "num_blocks", "time_dim", "max_action", *ours)
    sizes = {ours.get(key, key): kwargs[key] for key in known if key in kwargs}
    for name, size in sizes.items():
        kinds = (int, float) if name == "max_action" else (int,)
        if type(size) not in kinds or not 0 < size < 100_000:
            raise UserError(f"{folder / 'config.json'} says {name} = {size!r} of its action head: fetch the file again")
    head = DiffusionHead(config.token_dim, **{"action_horizon": 1, **sizes})  # the original's default, not ours

    layout = list(flax_layout(model, head))
    missing = [path for path, *_ in layout if path not in leaves]
    camera = re.compile(r"octo_transformer/(?:observation_tokenizers|obs)_(\w+?)(?:/|_pos_embedding|_projection)")
    dropped = set()
    if kept is not None:
        matches = filter(None, map(camera.match, leaves))
        dropped = {hit.string for hit in matches if hit[1] not in kept}
    unused = list(leaves.keys() - {path for path, *_ in layout} - dropped)
    if missing or unused:
        raise UserError(f"{file} doesn't fit: missing {_one_line(missing)}, unused {_one_line(unused)}")
    for path, shape, parameter, transposed in layout:
        leaf = leaves.pop(path)  # let go of it at once: the file's arrays and the model's need not both stay in memory
        if leaf.shape != shape:
            raise UserError(f"{file}: {path} has shape {leaf.shape}, this model needs {shape}")
        tensor = torch.from_numpy(leaf)
        if transposed:
            tensor = tensor.reshape(*shape[:-2] if len(shape) == 4 else (), *parameter.shape[1::-1])
            tensor = tensor.permute(-1, -2, *range(tensor.ndim - 2))
        parameter.data.copy_(tensor.reshape(parameter.shape))
        if not parameter.isfinite().all():
            raise UserError(f"{file}: {path} isn't finite; fetch or save the file again")
    return LoadedOcto(model, head, statistics, file, _sha256(file))


def save_octo(folder: str | Path, model: Octo, head: DiffusionHead, statistics: dict) -> None:
    """Write octo.safetensors (parameters) and octo.json (configs and statistics), which `load_octo` reads back."""
    from safetensors.torch import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = nn.ModuleDict({"octo": model, "head": head}).state_dict()
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}, folder / "octo.safetensors")
    described = {"config": dataclasses.asdict(model.config), "head": head.sizes, "statistics": statistics}
    (folder / "octo.json").write_text(json.dumps(described, indent=1))


def save_flax(folder: str | Path, released: LoadedOcto) -> None:
    """Write a released model whose parameters have changed in the form in which it was read: flax-msgpack.

    config.json, dataset_statistics.json and the tokenizer come from beside the file that was read. Raises: UserError
    if that isn't Octo's own file.
    """
    import msgpack

    if released.file.name != "checkpoint":
        raise UserError(f"{released.file} isn't in Octo's own format, and has no config.json of Octo's to go with it")
    tree: dict = {}
    for path, shape, parameter, transposed in flax_layout(released.model, released.head):
        tensor = parameter.detach().float().cpu()
        if transposed:
            tensor = tensor.permute(*range(2, tensor.ndim), 1, 0)  # [h, w, in, out]
        array = tensor.reshape(shape).contiguous().numpy()
        content = msgpack.packb((shape, "float32", array.tobytes()))
        *modules, leaf = path.split("/")
        node = tree
        for module in modules:
            node = node.setdefault(module, {})
        node[leaf] = msgpack.ExtType(1, content)
    step = released.file.parent.parent
    target = Path(folder) / step.name / "default"
    target.mkdir(parents=True)
    (target / "checkpoint").write_bytes(msgpack.packb(tree))
    for name in ("config.json", "dataset_statistics.json", "spiece.model"):
        if (step.parent / name).is_file():
            shutil.copyfile(step.parent / name, Path(folder) / name)


def _load_ours(folder: Path) -> LoadedOcto:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    file, described = folder / "octo.safetensors", _json(folder / "octo.json")
    try:
        fields = described["config"]
        fields["image_sizes"] = tuple((name, side) for name, side in fields["image_sizes"])
        fields["stem_features"] = tuple(fields["stem_features"])
        model, head = Octo(OctoConfig(**fields)), DiffusionHead(**described["head"])
        nn.ModuleDict({"octo": model, "head": head}).load_state_dict(load_file(file), strict=True)
        return LoadedOcto(model, head, described["statistics"], file, _sha256(file))
    except (KeyError, TypeError, RuntimeError, SafetensorError) as error:
        reason = " ".join(f"{type(error).__name__} {error}".split())[:300]
        raise UserError(f"{file} and octo.json don't fit together: {reason}") from None


def check_weights(source: str) -> None:
    """Load strictly, print what was found and a fingerprint of one fixed forward pass, the same on every machine up to
    rounding of the last digit shown."""
    loaded = load_octo(source)
    model = loaded.model.eval()
    head = loaded.head
    config = model.config
    print(f"{source}: {loaded.file}\nsha256 {loaded.sha256}\n{config}")
    leaves = list(flax_layout(model, head))
    trained = sum(p.numel() for _, _, p, _ in leaves if p.requires_grad)
    frozen = sum(p.numel() for _, _, p, _ in leaves if not p.requires_grad)
    print(f"{len(leaves)} arrays, all used: {trained:,} parameters and {frozen:,} in the frozen text encoder")
    print(f"statistics of {len(loaded.statistics)} data sets: {', '.join(loaded.statistics)}")
    images = {
        name: (torch.arange(config.window * side * side * 3) * 7919 % 256).to(torch.uint8).view(1, -1, side, side, 3)
        for name, side in config.image_sizes
    }
    with torch.no_grad():
        ids = torch.arange(3, 3 + config.language_tokens)[None]
        embedding = model(images, language=model.text(ids))
        noise = head(embedding, torch.zeros(1, head.output.out_features), torch.zeros(1, 1))
    for name, x in (("embedding", embedding), ("noise", noise)):
        first = ", ".join(f"{value:.4f}" for value in x[0, :4])
        print(f"{name}: mean {x.mean():.4f} rms {x.square().mean().sqrt():.4f} first {first}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Check released Octo 1.5 weights against this code.")
    parser.add_argument("source", help="folder or hf://owner/name[@revision]")
    run_script(check_weights, parser.parse_args().source)


if __name__ == "__main__":
    main()
