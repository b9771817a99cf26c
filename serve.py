"""Serve a trained policy to robots and programs elsewhere, by openpi's websocket protocol.

  python serve.py runs/NAME                       # or an exported folder, or hf://owner/name
  python serve.py runs/NAME --host 0.0.0.0        # to other machines too: nothing is encrypted, and nobody is asked who

A client sends "proprio", the cameras and, if it wants, "prompt" (an instruction); it gets "actions" [H, A] in the
controller's units. http://HOST:PORT/healthz says OK. Ctrl-C ends it. More: docs/interop.md.
"""

from __future__ import annotations

import plumbing  # noqa: F401  first: it sets how OpenMP's threads wait, which torch reads once

# isort: split
import argparse
import sys
from functools import partial

from plumbing.flags import UserError, run_script
from plumbing.openpi import server
from plumbing.policy import Policy, load_policy


def answer(policy: Policy, observation: dict) -> dict:
    """A client's observation to actions. Raises: UserError for one that the policy can't take."""
    obs = dict(observation)
    prompt = obs.pop("prompt", None)
    if prompt is not None and not isinstance(prompt, str):
        raise UserError(f"'prompt' is {type(prompt).__name__}, and not text")
    return {"actions": policy.act(obs, prompt)}


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    found.formatter_class = argparse.RawDescriptionHelpFormatter
    found.add_argument("run", help="run folder, exported folder, or hf://owner/name[@revision]")
    found.add_argument("--host", default="127.0.0.1", help="address to listen on (127.0.0.1: this machine alone)")
    found.add_argument("--port", type=int, default=8000, help="port (8000; 0: any that is free)")
    found.add_argument("--device", default="cpu", help="where the networks live (cpu)")
    return found


def main(words: list[str]) -> None:
    """Raises: UserError."""
    own = parser().parse_args(words)
    if not 0 <= own.port < 65536:
        raise UserError(f"--port must be in 0..65535, got {own.port}")
    policy = load_policy(own.run, own.device)
    infer = partial(answer, policy)
    with server(policy.describe(), infer, own.host, own.port) as listening:
        host, port = listening.socket.getsockname()[:2]
        address = f"ws://{host}:{port}"
        print(f"{own.run} on {address}: takes {policy.takes()}", flush=True)
        listening.serve_forever()


if __name__ == "__main__":
    run_script(main, sys.argv[1:])
