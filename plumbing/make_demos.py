"""Make demonstrations on their own, as a script would make them on its first run.

  python -m plumbing.make_demos bc.py --env-id StackCube-v1 --num-demos 300 --out stack.npz
  python -m plumbing.make_demos bc.py --env-id PushCube-v1 --demo-path trajectory.h5 --out push.npz

The first word is the script that will use them: flags, defaults and environment are its own. They go into its cache
(--demo-dir) and, with --out, into a file as well. Arrays of the .npz: see `Demos` in plumbing/demos.py; names of
observations begin with obs_.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from pathlib import Path

from plumbing.demos import cache_of, load_demos
from plumbing.flags import UserError, run_script
from plumbing.scripts import with_flags


def main(words: list[str]) -> None:
    """Raises: UserError."""
    script = Path(words[0]) if words else Path()
    if not script.is_file():
        raise UserError("name a script first, as in python -m plumbing.make_demos bc.py --out demos.npz")
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--out", type=Path)
    own, flags = parser.parse_known_args(words[1:])
    if own.out and (own.out.is_dir() or not os.access(own.out.parent, os.W_OK)):
        raise UserError(f"--out {own.out} can't be written: name a file in a folder that you may write to")
    module, args = with_flags(script, __doc__, flags)
    load_demos(args, module.make_env)
    if own.out:
        shutil.copyfile(cache_of(args), own.out)


if __name__ == "__main__":
    run_script(main, sys.argv[1:])
