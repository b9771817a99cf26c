"""Write a trained policy to a folder that others can read, and push it to the Hugging Face hub.

  python export.py runs/NAME --out policy                        # config.json, model.safetensors, README.md
  python export.py runs/NAME --out policy --push owner/name      # and upload it (private, unless --public)
  python export.py runs/NAME --out octo --format octo            # fine-tuned Octo, as rail-berkeley released it
  python export.py runs/NAME --out octo --format octo-safetensors

`load_policy` of plumbing/policy.py reads the first; the last two are Octo itself, and `--checkpoint` reads them too.
They need a run that began with released weights (--backbone octo-small or octo-base). The scripts' own action heads
aren't Octo's: the diffusion head in them is the released one, or that of `bc.py --head diffusion`.
"""

from __future__ import annotations

import plumbing  # noqa: F401  first: it sets how OpenMP's threads wait, which torch reads once

# isort: split
import argparse
import sys
from pathlib import Path

from backbones.octo_weights import load_octo, save_flax, save_octo
from plumbing.flags import UserError, run_script
from plumbing.hub import push
from plumbing.policy import Policy, load_policy


def save_as_octo(policy: Policy, folder: Path, flax: bool) -> None:
    """The run's backbone in the place of the released one, with everything else as it was. Raises: UserError."""
    args = policy.args
    if not (args.backbone.startswith("octo") and args.checkpoint):
        raise UserError(
            f"--format octo needs a run from released Octo weights; this one has --backbone {args.backbone}"
        )
    if folder.exists():
        raise UserError(f"{folder} exists: choose another --out, or move it away")
    released = load_octo(args.checkpoint)
    trained = policy.agent.backbone.state_dict()
    known = released.model.state_dict()
    theirs = {(name, value.shape) for name, value in known.items()}
    ours = {(name, value.shape) for name, value in trained.items()}
    if ours - theirs:
        raise UserError(f"{args.checkpoint} isn't what this run began with: its backbone has other parts")
    released.model.load_state_dict(known | trained)
    if getattr(policy.agent, "head", None) == "diffusion":
        print("the diffusion head stays the released one: bc.py's has other sizes and units", file=sys.stderr)
    if flax:
        save_flax(folder, released)
    else:
        save_octo(folder, released.model, released.head, released.statistics)


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    found.formatter_class = argparse.RawDescriptionHelpFormatter
    found.add_argument("run", help="run folder, exported folder, or hf://owner/name[@revision]")
    found.add_argument("--out", type=Path, required=True, help="folder that isn't there yet")
    found.add_argument("--format", choices=("policy", "octo", "octo-safetensors"), default="policy")
    found.add_argument("--push", help="owner/name on the hub; needs `hf auth login`")
    found.add_argument("--public", action="store_true", help="a new repository on the hub is for everybody")
    return found


def main(words: list[str]) -> None:
    """Raises: UserError."""
    own = parser().parse_args(words)
    policy = load_policy(own.run)
    if own.format == "policy":
        policy.save(own.out)
    else:
        save_as_octo(policy, own.out, flax=own.format == "octo")
    print(f"{own.run} exported to {own.out}")
    if own.push:
        print(f"pushed to {push(own.out, own.push, private=not own.public)}")


if __name__ == "__main__":
    run_script(main, sys.argv[1:])
