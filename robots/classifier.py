"""A small binary classifier of the table camera's pictures: has the task succeeded? A reward, as in HIL-SERL and ConRFT.

Theirs is a frozen ImageNet ResNet-10 with a trained head; this one is four convolutions from random weights. It is
trained on demonstrations that robots.record wrote:

  python -m robots.classifier demos/pick-banana.npz --out banana.safetensors
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from plumbing.flags import UserError, run_script
from robots.config import RobotConfig

SIDE = 64  # pixels that it sees


class SuccessClassifier(nn.Module):
    """Pictures [B, H, H, 3] uint8 -> logits [B]."""

    def __init__(self):
        super().__init__()
        layers = []
        for before, after in [(3, 16), (16, 32), (32, 64), (64, 64)]:
            layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.GroupNorm(8, after), nn.ReLU()]
        self.net = nn.Sequential(*layers, nn.Flatten(), nn.Dropout(0.1), nn.Linear(64 * 16, 1))

    def forward(self, pictures: Tensor) -> Tensor:
        x = pictures.movedim(-1, 1).float() / 127.5 - 1
        x = F.interpolate(x, (SIDE, SIDE), mode="area")
        return self.net(x).squeeze(-1)

    @torch.inference_mode()
    def probability(self, picture: np.ndarray) -> float:
        """Probability that a picture [H, H, 3] uint8 shows a success."""
        return torch.sigmoid(self(torch.from_numpy(picture)[None])).item()


def load_classifier(config: RobotConfig):
    """picture -> probability of a success, or None where a person's key decides. Raises: UserError."""
    if config.reward.kind == "key":
        return None
    path = config.path.parent / config.reward.file
    net = SuccessClassifier().eval()
    try:
        net.load_state_dict(load_file(path))
    except Exception as error:  # the reader raises all sorts
        raise UserError(f"reward.file {path} is no classifier of robots.classifier: {str(error)[:200]}") from error
    return net.probability


def labelled(path: str, last: int, apart: int) -> tuple[Tensor, Tensor]:
    """Pictures of successes and of what came before, from a file of robots.record. Raises: UserError.

    Returns: [P, H, H, 3] the last `last` of each episode, [N, H, H, 3] those more than `apart` steps before its end
    """
    try:
        with np.load(path) as data:
            pictures = torch.from_numpy(data["obs_primary"])
            lengths = data["lengths"]
    except Exception as error:
        raise UserError(f"{path} is no file of robots.record: {error}") from error
    positive = []
    negative = []
    for episode in pictures.split((lengths + 1).tolist()):
        positive.append(episode[-last:])
        negative.append(episode[: -apart - 1])
    return torch.cat(positive), torch.cat(negative)


def train(positive: Tensor, negative: Tensor, updates: int, seed: int = 1) -> tuple[SuccessClassifier, float]:
    """Half of each batch are successes, pictures are shifted at random. Returns: network, accuracy on held-out tenths."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    net = SuccessClassifier()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3, weight_decay=1e-2)
    kinds = []
    held_out = []
    for pictures in (positive, negative):
        pictures = pictures[torch.randperm(len(pictures), generator=generator)]
        few = max(1, len(pictures) // 10)
        held_out.append(pictures[:few])
        kinds.append(pictures[few:])
    labels = torch.cat([torch.ones(32), torch.zeros(32)])
    for _ in range(updates):
        halves = [kind[torch.randint(len(kind), (32,), generator=generator)] for kind in kinds]
        batch = torch.cat(halves)
        shift = torch.randint(-4, 5, (2,), generator=generator).tolist()
        logits = net(batch.roll(shift, (1, 2)))
        loss = F.binary_cross_entropy_with_logits(logits, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    net.eval()
    with torch.no_grad():
        yes = net(held_out[0]) > 0
        no = net(held_out[1]) <= 0
    accuracy = (yes.float().mean() + no.float().mean()) / 2
    return net, float(accuracy)


def main(args) -> None:
    pairs = [labelled(path, args.last, args.apart) for path in args.demos]
    positive, negative = (torch.cat(pictures) for pictures in zip(*pairs))
    if len(positive) < 10 or len(negative) < 10:
        raise UserError("these demonstrations have too few pictures: record more")
    net, accuracy = train(positive, negative, args.updates)
    save_file(net.state_dict(), args.out)
    held_out = f"{accuracy:.1%} right on held-out pictures of {len(positive)} successes and {len(negative)} others"
    print(f"{Path(args.out)}: {held_out} (neighbours of training pictures: true accuracy is lower)")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("demos", nargs="+", help="files of robots.record")
    parser.add_argument("--out", default="classifier.safetensors", help="where the weights go")
    parser.add_argument("--last", type=int, default=5, help="pictures at an episode's end that show a success")
    parser.add_argument("--apart", type=int, default=10, help="steps before its end from which on none does")
    parser.add_argument("--updates", type=int, default=500, help="batches of 64 pictures")
    run_script(main, parser.parse_args())
