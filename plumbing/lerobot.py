"""Export demonstrations or recorded successes as a LeRobotDataset v3 folder.

  python -m plumbing.lerobot export bc.py --env-id PickCube-v1 --out pick      # what bc.py would be trained on
  python -m plumbing.lerobot export runs/NAME --out pick                       # what a run was trained on
  python -m plumbing.lerobot export successes.h5 --out pick                    # what plumbing.record has written

The first word is a script (its flags may follow), a run folder, or a recording by plumbing.record. Demonstrations that
aren't in the cache are made. Pictures become H.264 video, or with --images png files within the tables, without loss.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import fields, replace
from pathlib import Path

from plumbing.demos import load_demos
from plumbing.flags import UserError, run_script
from plumbing.lerobot_write import About, files, write_dataset
from plumbing.scripts import ROOT, load_script, of_run, with_flags
from plumbing.tasks import task_of


def of_recording(path: Path):
    """The module and the flags of the run that a recording is from, to read it. Raises: UserError."""
    try:
        meta = json.loads(path.with_suffix(".json").read_text())
        script = meta["run"]["script"]
        flags = meta["run"]["args"]
        count = len(meta["episodes"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        advice = "name a script first, and the file by --demo-path"
        raise UserError(f"{path} isn't by plumbing.record ({error!r}): {advice}") from error
    module = load_script(ROOT / Path(script).name)
    known = {field.name for field in fields(module.Args)}
    kept = {name: flags[name] for name in flags if name in known}
    args = module.Args(**kept)
    args = replace(args, demo_path=str(path), num_demos=count, drop_idle=0.0, resume=None)
    return module, args


def main(words: list[str]) -> None:
    """Raises: UserError."""
    if not words or words[0] in ("-h", "--help"):
        print(__doc__)
        return
    if words[0] != "export" or len(words) < 2:
        raise UserError("usage: python -m plumbing.lerobot export SCRIPT|RUN|FILE.h5 --out FOLDER")
    source = Path(words[1])
    parser = argparse.ArgumentParser(prog="plumbing.lerobot", add_help=False, allow_abbrev=False)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--images", choices=("video", "png"), default="video")
    own, rest = parser.parse_known_args(words[2:])
    if own.out.exists():
        raise UserError(f"{own.out} exists: choose another --out, or move it away")
    if source.suffix == ".py":
        module, args = with_flags(source, __doc__, rest)
    elif rest:
        raise UserError(f"{rest[0]} goes with a script; a run and a recording bring their own flags")
    else:
        module, args = of_recording(source) if source.suffix == ".h5" else of_run(source)
    demos = load_demos(args, module.make_env)
    instruction = task_of(args.env_id).instruction
    lossless = own.images == "png"
    about = About(instruction, args.robot_uids, args.control_mode, args.control_freq, lossless)
    write_dataset(demos, own.out, about)
    sizes = [file.stat().st_size for file in files(own.out)]
    content = f"{len(demos.lengths)} episodes, {demos.lengths.sum()} frames"
    megabytes = sum(sizes) / 1e6
    print(f"{content}, {megabytes:.1f} MB in {own.out}")


if __name__ == "__main__":
    run_script(main, sys.argv[1:])
