"""A trained policy outside its run: asked for actions, and written to a folder that others can read.

  policy = load_policy("runs/NAME")                        # or an exported folder, or hf://owner/name
  actions = policy.act({"proprio": q, "primary": image})   # [H, A] in the controller's units

A folder has config.json (script, flags, and what goes in and comes out), model.safetensors (backbone, heads and units;
no critics) and README.md, the model card.
"""

from __future__ import annotations

import inspect
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save

from plumbing.demos import Demos
from plumbing.earlier import load_weights
from plumbing.flags import UserError
from plumbing.hub import local
from plumbing.run import provenance
from plumbing.scripts import of_run
from plumbing.storage import Checkpoints, write, write_json
from plumbing.tasks import cameras_of, task_of

MODEL = "model.safetensors"
PATTERNS = ["config.json", MODEL, "README.md"]


class Policy:
    """What a run has learned.

    Attributes: `instruction`; `H` actions a decision of `A` numbers each; `proprio_dim` P; `cameras` {name: side};
    `control_mode` and `control_freq`, which say what the actions are; `window`, the observations that it looks at.
    """

    def __init__(self, agent: torch.nn.Module, args, script: str):
        self.agent = agent.eval()
        self.args = args
        self.script = script
        self.instruction = agent.instruction
        self.H = agent.H
        self.A = agent.action_dim
        self.proprio_dim = agent.proprio_dim
        self.cameras = cameras_of(args)
        self.control_mode = args.control_mode
        self.control_freq = args.control_freq
        self.window = agent.window
        self.draws = "generator" in inspect.signature(agent.act).parameters
        self.seed(0)

    def seed(self, seed: int) -> None:
        """Start the noise of its sampling anew."""
        self.generator = torch.Generator(self.args.device).manual_seed(seed)

    @torch.inference_mode()
    def act(self, obs: dict, instruction: str | None = None, history=()) -> np.ndarray:
        """The next actions [H, A] float32, in the units of `control_mode`: the first now, one each control step.

        obs           "proprio" [P] numbers; each camera [side, side, 3] uint8
        instruction   None: the one that it was trained with
        history       observations of the control steps just before, oldest first; only with a `window` above 1

        Raises: UserError for other names, shapes or dtypes, and numbers that aren't finite.
        """
        steps = [*history, obs]
        seen = [self.checked(step) for step in steps[-self.window :]]
        own = self.agent.instruction
        if instruction not in (None, own) and hasattr(self.agent, "language"):
            raise UserError(f"this policy keeps the language of one instruction: {own!r}")
        self.agent.instruction = instruction or own
        try:
            feature = self.agent.feature(self.agent.recent(seen))
        finally:
            self.agent.instruction = own
        noise = [self.generator] if self.draws else []
        chunk = self.agent.act(feature, *noise)
        return self.agent.denormalise(chunk[0]).astype(np.float32)

    def checked(self, obs: dict) -> dict[str, np.ndarray]:
        """An observation as a batch of one. Raises: UserError."""
        known = ["proprio", *self.cameras]
        for name in [*known, *obs]:
            if name not in obs or name not in known:
                word = "lacks" if name in known else "has an unknown"
                raise UserError(f"the observation {word} {name!r}; this policy takes {self.takes()}")
        proprio = np.asarray(obs["proprio"])
        if proprio.shape != (self.proprio_dim,) or proprio.dtype.kind not in "fiu":
            got = f"{proprio.dtype} {list(proprio.shape)}"
            raise UserError(f"'proprio' is {got}; this policy takes {self.takes()}")
        if not np.isfinite(proprio).all():
            raise UserError("'proprio' has numbers that aren't finite")
        found = {"proprio": proprio.astype(np.float32)[None]}
        for name, side in self.cameras.items():
            image = np.asarray(obs[name])
            fits = image.shape == (side, side, 3)
            if not fits or image.dtype != np.uint8:
                got = f"{image.dtype} {list(image.shape)}"
                raise UserError(f"{name!r} is {got}; this policy takes {self.takes()}")
            found[name] = image[None]
        return found

    def takes(self) -> str:
        known = [f"'proprio' float32 [{self.proprio_dim}]"]
        for name, side in self.cameras.items():
            known.append(f"{name!r} uint8 [{side}, {side}, 3]")
        return ", ".join(known)

    def describe(self) -> dict:
        """What goes in and comes out, as plain data: for config.json, and for who connects to a server."""
        inputs = {"proprio": {"dtype": "float32", "shape": [self.proprio_dim]}}
        for name, side in self.cameras.items():
            inputs[name] = {"dtype": "uint8", "shape": [side, side, 3]}
        return {
            "script": self.script,
            "env_id": self.args.env_id,
            "robot": self.args.robot_uids,
            "instruction": self.instruction,
            "inputs": inputs,
            "actions": {"dtype": "float32", "shape": [self.H, self.A]},
            "control_mode": self.control_mode,
            "control_freq": self.control_freq,
        }

    def save(self, folder: Path) -> None:
        """Write config.json, model.safetensors and README.md to a folder that isn't there. Raises: UserError, OSError."""
        if folder.exists():
            raise UserError(f"{folder} exists: choose another --out, or move it away")
        folder.mkdir(parents=True)
        weights = {}
        for name, value in self.agent.state_dict().items():
            if "critic." not in name:
                weights[name] = value.cpu().contiguous()
        flags = vars(self.args) | {"resume": None, "eval_only": None}
        config = {"script": self.script, "args": flags, "task": asdict(task_of(self.args.env_id))}
        config |= {"policy": self.describe()} | provenance()
        write_json(folder / "config.json", config)
        (folder / "README.md").write_text(model_card(self.describe()))
        write(folder / MODEL, save(weights))


def load_policy(source: str | Path, device: str = "cpu") -> Policy:
    """The policy of a run, of an exported folder or of hf://owner/name[@revision].

    Needs neither demonstrations nor a simulator. Raises: UserError, one line, for what is none or is damaged.
    """
    here = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    if device not in here:
        raise UserError(f"--device {device} isn't here: use {' or '.join(here)}")
    folder = local(str(source), PATTERNS)
    module, args = of_run(folder, device)
    if (folder / MODEL).exists():
        weights = read_weights(folder / MODEL)
    else:
        weights, _ = Checkpoints(folder).load(resume=False)
    agent = module.Agent(args, like_demonstrations(args, weights, folder))
    fresh = agent.state_dict()
    critics = {name: fresh[name] for name in fresh if "critic." in name}  # a folder may have none, and none is asked
    load_weights(agent, critics | weights, folder)
    return Policy(agent.to(device), args, f"{module.__name__}.py")


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """Raises: UserError."""
    try:
        return load_file(path)
    except Exception as error:  # the reader's errors have no common base
        raise UserError(f"{path} can't be read ({str(error)[:200]}); export or fetch it again") from error


def like_demonstrations(args, weights: dict[str, torch.Tensor], folder: Path) -> Demos:
    """What an Agent is built for, in shape only: what it needs of demonstrations is in its weights. Raises: UserError."""
    try:
        proprio = torch.zeros(2, *weights["proprio_mean"].shape).numpy()
        action = torch.zeros(2, *weights["action_centre"].shape).numpy()
    except KeyError as error:
        raise UserError(f"{folder} holds no policy's weights: {error} isn't there") from error
    obs = {"proprio": proprio}
    for name, side in cameras_of(args).items():
        obs[name] = np.zeros((2, side, side, 3), np.uint8)
    one = np.array([1])
    return Demos(obs, action, lengths=one, steps=one, source="shapes alone")


def model_card(about: dict) -> str:
    """README.md of an exported folder."""
    inputs = []
    for name, form in about["inputs"].items():
        kind = form["dtype"]
        inputs.append(f"| `{name}` | {kind} | {form['shape']} |")
    H, A = about["actions"]["shape"]
    lines = [
        "---",
        "library_name: pytorch",
        "pipeline_tag: robotics",
        "tags: [robotics, reinforcement-learning, vision-language-action]",
        "---",
        f"# Policy for {about['env_id']}",
        "",
        f'Trained by `{about["script"]}` to "{about["instruction"]}" with the robot `{about["robot"]}`.',
        "",
        "| Input | dtype | Shape |",
        "|---|---|---|",
        *inputs,
        "",
        f"Output: {H} actions of {A} numbers for ManiSkill's controller `{about['control_mode']}`,",
        f"one each 1/{about['control_freq']} s. `config.json` has all flags of the training.",
        "",
        "```python",
        "from plumbing.policy import load_policy",
        "",
        'policy = load_policy("FOLDER")  # this folder, or hf://owner/name',
        "actions = policy.act(obs)",
        "```",
    ]
    return "\n".join(lines) + "\n"
