"""Released pi0 and pi0.5 checkpoints to `backbones.pi0`: safetensors, strictly, one tensor at a time.

A folder holds model.safetensors under openpi's names (what openpi's converter writes and lerobot/pi0_base holds), or
under the same names behind "model." (what lerobot saves after training). The prompt's embedding is stored once, as
embed_tokens or as its tied twin lm_head. Beside it there may be normalisation statistics, in openpi's or in lerobot's
layout, and PaliGemma's tokenizer. `load_pi0` is the way in; `python -m backbones.pi0_weights --check-weights SOURCE`
prints a report.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path

import torch

from backbones.pi0 import PRESETS, Pi0, Pi0Config, load_tokenizer
from plumbing.flags import UserError, run_script
from plumbing.hub import from_hub

_VLM, _EXPERT = "paligemma_with_expert.paligemma.", "paligemma_with_expert.gemma_expert."
_VISION = f"{_VLM}model.vision_tower.vision_model."
NAMES = {  # the beginning of our names: of the released names
    "prefix.vision.layers.": f"{_VISION}encoder.layers.",
    "prefix.vision.post_layernorm.": f"{_VISION}post_layernorm.",
    "prefix.vision.": f"{_VISION}embeddings.",
    "prefix.projector.": f"{_VLM}model.multi_modal_projector.linear.",
    "prefix.": f"{_VLM}model.language_model.",
    "expert.layers.": f"{_EXPERT}model.layers.",
    "expert.norm.": f"{_EXPERT}model.norm.",
    "expert.": "",
}
TIED = {f"{_VLM}model.language_model.embed_tokens.weight", f"{_VLM}lm_head.weight"}
DEAD = {f"{_EXPERT}lm_head.weight"}  # stored, never used
FILES = ["model.safetensors", "*.json", "*normalizer*.safetensors", "assets/*", "*tokenizer.model"]  # of a repository
OURS = ("prefix.lowdim", "prefix.points")  # parameters that no released model has


@dataclass
class LoadedPi0:
    """What `load_pi0` returns."""

    model: Pi0
    statistics: dict  # {asset: {"state" or "actions": {"mean", "std", "q01", "q99": [numbers]}}}, {} if there are none
    file: Path  # the weights file that was read
    sha256: str  # of that file


def released_name(name: str) -> str:
    """The name in a released checkpoint of one of our parameters."""
    ours = next(beginning for beginning in NAMES if name.startswith(beginning))
    return NAMES[ours] + name[len(ours) :]


def find_statistics(folder: Path) -> dict:
    """Normalisation statistics beside the weights, in openpi's or lerobot's layout; {} if there are none."""
    from safetensors.torch import load_file

    found = {}
    try:
        for file in sorted(folder.glob("assets/**/norm_stats.json")):
            stats = json.loads(file.read_text())["norm_stats"]
            name = str(file.parent.relative_to(folder / "assets"))
            found[name] = {part: {k: v for k, v in stats[part].items() if v is not None} for part in stats}
        for file in sorted(folder.glob("policy_preprocessor*normalizer*.safetensors")):
            stats = found.setdefault("lerobot", {})
            for key, value in load_file(file).items():
                feature, _, statistic = key.rpartition(".")
                part = {"observation.state": "state", "action": "actions"}.get(feature, feature)
                stats.setdefault(part, {})[statistic] = value.float().tolist()
    except Exception as error:  # not JSON, not safetensors, or not in this layout
        reason = f"{type(error).__name__} {' '.join(str(error).split())[:150]}"
        raise UserError(f"{file} holds no normalisation statistics ({reason})") from None
    return found


def _some(names) -> str:
    return f"{len(names)} ({', '.join(sorted(names)[:3])}{', ...' if len(names) > 3 else ''})"


def _older(unused: set[str]) -> str:
    """Which earlier lerobot wrote these names, and what to do about it; "" for none."""
    advice = "take a present revision of the repository, or save it again with a present lerobot"
    if any(name.startswith(("normalize_", "unnormalize_")) for name in unused):
        return f"; the normalize_ buffers are from a lerobot of mid 2025: {advice}"
    if any(".language_model.model." in name or ".paligemma.vision_tower." in name for name in unused):
        return f"; these are the names of a lerobot of early 2025: {advice}"
    return ""


def find_weights(source: str | Path) -> Path:
    """The weights file of a source for `load_pi0`. Raises: UserError if there is none."""
    match = re.fullmatch(r"hf://([\w.-]+/[\w.-]+)(?:@([\w./-]+))?", str(source))
    path = from_hub(match[1], match[2], FILES) if match else Path(source)
    file = path / "model.safetensors" if path.is_dir() else path
    if not file.is_file():
        raise UserError(
            f"no weights at {file}: pass a folder with model.safetensors, the file, or hf://owner/name[@revision]"
            + (
                "; a sharded or JAX checkpoint has to be converted first"
                if path.is_dir() and any(path.iterdir())
                else ""
            )
        )
    return file


def check_pi0_weights(source: str | Path, config: Pi0Config) -> None:
    """Does a source fit? By names and shapes, without reading the weights. Raises: UserError."""
    file = find_weights(source)
    _read(file, config, names_only=True)
    find_statistics(file.parent)
    tokenizer = find_tokenizer(file.parent)
    if tokenizer:
        load_tokenizer(tokenizer, config.vocabulary)


def find_tokenizer(folder: Path) -> Path | None:
    files = (folder / name for name in ("paligemma_tokenizer.model", "tokenizer.model"))
    return next((file for file in files if file.is_file()), None)


def load_pi0(source: str | Path, config: Pi0Config | None = None) -> LoadedPi0:
    """Load weights of pi0 or pi0.5, strictly: every name is used, every shape agrees.

    `source` is "hf://owner/name[@revision]", e.g. "hf://lerobot/pi0_base" or "hf://lerobot/pi05_base", or a local folder
    or file: model.safetensors as openpi's converter, or lerobot, writes it, in float32 or bfloat16 (the model is
    float32). `config` None: the released sizes of the model that the file holds. A config of yours may drop cameras
    and may add low-dimensional tokens or points, which start random.

    Raises: UserError, one line, for a source that can't be reached or read, and for any misfit.
    """
    file = find_weights(source)
    model, folder = _read(file, config), file.parent
    model.prefix.tokenizer_file = find_tokenizer(folder)
    with open(file, "rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return LoadedPi0(model, find_statistics(folder), file, digest)


def _read(file: Path, config: Pi0Config | None, names_only: bool = False) -> Pi0:
    """The model with the file's weights. Tensors are read one by one: the file and the model are never both in memory.

    names_only: nothing but names and shapes is looked at, and the model's weights are not there.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "pt") as stored:
            names = {name.removeprefix("model."): name for name in stored.keys()}  # noqa: SIM118  not a dict
            config = config or PRESETS["pi0" if "state_proj.weight" in names else "pi05"]
            with torch.device("meta"):
                model = Pi0(config)
            ours = {name: p for name, p in model.named_parameters() if not name.startswith(OURS)}
            wanted = {name: released_name(name) for name in ours}
            twins = sorted(TIED & names.keys())
            if len(twins) > 1 and not torch.equal(*(stored.get_tensor(names[twin]) for twin in twins)):
                raise UserError(f"{file} holds {' and '.join(twins)}, which are to be the same and differ")
            for name, theirs in wanted.items():
                if theirs in TIED:
                    wanted[name] = (twins or [theirs])[0]
            vision = {n for n in names if n.startswith((_VISION, f"{_VLM}model.multi_modal_projector."))}
            dropped = set() if config.cameras else vision
            missing = set(wanted.values()) - names.keys()
            unused = names.keys() - set(wanted.values()) - TIED - DEAD - dropped
            if missing or unused:
                kind = "pi0.5" if config.pi05 else "pi0"
                misfits = f"missing {_some(missing)}, unused {_some(unused)}"
                raise UserError(f"{file} doesn't fit {kind}: {misfits}{_older(unused)}")
            for name, parameter in ours.items():
                shape = tuple(stored.get_slice(names[wanted[name]]).get_shape())
                if shape != tuple(parameter.shape):
                    needs = tuple(parameter.shape)
                    raise UserError(f"{file}: {wanted[name]} has shape {shape}, this model needs {needs}")
            if names_only:
                return model
            model.to_empty(device="cpu")
            model.prefix.add_ours()
            for name in ours:
                weight = stored.get_tensor(names[wanted[name]])
                if not weight.is_floating_point():
                    raise UserError(f"{file}: {wanted[name]} is of type {weight.dtype}; fetch or save the file again")
                model.get_parameter(name).data.copy_(weight)
                if not weight.isfinite().all():
                    raise UserError(f"{file}: {wanted[name]} isn't finite; fetch or save the file again")
    except (SafetensorError, OSError) as error:
        reason = f"{type(error).__name__} {' '.join(str(error).split())[:200]}"
        raise UserError(f"{file} is no complete safetensors file ({reason})") from None
    return model


def check_weights(source: str) -> None:
    """Load strictly, print what was found and a fingerprint of one fixed forward pass, the same on every machine up to
    rounding of the last digit shown."""
    loaded = load_pi0(source)
    model, c = loaded.model.eval(), loaded.model.config
    print(f"{source}: {loaded.file}\nsha256 {loaded.sha256}\n{c}")
    count = sum(p.numel() for p in model.parameters())
    print(f"{len(list(model.parameters()))} tensors, all used: {count:,} parameters")
    print(f"statistics: {', '.join(loaded.statistics) or 'none'}")
    try:
        tokenizer = load_tokenizer(model.prefix.tokenizer_file, c.vocabulary) if model.prefix.tokenizer_file else None
        print(f"tokenizer: {model.prefix.tokenizer_file if tokenizer else 'none here; fetched when first needed'}")
    except UserError as error:
        print(f"tokenizer: {error}")
    side, state = c.image_size, torch.linspace(-1, 1, c.state_dim)[None]
    image = (torch.arange(side * side * 3) * 7919 % 256).to(torch.uint8).view(1, side, side, 3)
    ids = torch.arange(3, 11)[None]
    noise = torch.linspace(-2, 2, 5 * c.action_dim).view(1, 1, 5, c.action_dim)
    with torch.no_grad():
        prefix = model.prefix({c.cameras[0]: image}, ids, torch.ones_like(ids, dtype=torch.bool))
        actions = model.expert.sample(prefix.cache, prefix.valid, state, noise)
    for name, x in (("embedding", prefix.embedding[0]), ("actions", actions.flatten())):
        first = ", ".join(f"{value:.4f}" for value in x[:4])
        print(f"{name}: mean {x.mean():.4f} rms {x.square().mean().sqrt():.4f} first {first}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Check released pi0 or pi0.5 weights against this code.")
    parser.add_argument(
        "--check-weights", metavar="SOURCE", required=True, help="folder, file or hf://owner/name[@rev]"
    )
    run_script(check_weights, parser.parse_args().check_weights)


if __name__ == "__main__":
    main()
