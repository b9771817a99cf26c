"""Octo 1.5 in plain PyTorch: one readable file from pixels to the readout embedding, and the diffusion action head.

Octo (arXiv:2405.12213) is a block-wise causal transformer over tokens of one instruction and W observations:

    [language | cameras_0 low-dim_0 (language again) readout_0 | ... | cameras_{W-1} ... readout_{W-1}]

Each token belongs to one of three kinds. Language tokens see language. Observation tokens also see observations of
the same and earlier steps. The readout token sees all of these and earlier readouts, and nobody else sees it: it
only reads. What it holds after the last block is the embedding that action heads and critics use.

One set of classes serves every scale (`PRESETS`): the released octo-small-1.5 and octo-base-1.5, and `octo-compact`
with the same parts at a size that trains on one CPU core.
"""

from __future__ import annotations

import functools
import hashlib
import math
import re
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backbones.t5 import T5_SIZES, T5Encoder, t5_token_ids
from backbones.units import gaussian
from plumbing.hub import from_hub

# Token kinds, ordered: a token may look at its own kind and at lower ones.
LANGUAGE = 0
OBSERVATION = 1
READOUT = 2
# Added to a score, hides the key. Finite, so that a row which may look at nothing becomes a uniform average as in the
# original, instead of NaN; and not the most negative float, which overflows where a GPU kernel rescales scores.
HIDDEN = -1e30


@dataclass(frozen=True)
class OctoConfig:
    """Sizes of one Octo model. Use `PRESETS` and `dataclasses.replace`; the class itself has no favourite.

    token_dim        width d of every token, and of the embedding
    num_layers, num_heads, mlp_dim   the transformer: blocks, heads (d / heads channels each), hidden width of the MLP
    stem_features    output channels of the four stride-2 convolutions of a camera's stem, multiples of 32
    stem_out         channels after the stem's last 1x1 convolution
    image_sizes      ((camera name, side in pixels), ...), sides multiples of 16; a side of 96 makes 6 x 6 = 36 tokens.
                     () means no camera
    image_channels   3: the observation; 6: observation and goal image, as in the released models. The goal is always
                     the zero image here, which is how Octo is run with an instruction
    language_tokens  number of instruction tokens
    language_dim     width of the text encoder's output
    text             "hash": a small text encoder of our own, trained along; "t5-base": the frozen encoder of T5
    repeat_task_tokens   repeat the instruction among the observation tokens of every step (true in 1.5)
    window           W, the number of observation steps the model is used with (any W <= max_horizon works)
    max_horizon      steps for which there are position embeddings
    lowdim_dim       width of a low-dimensional observation vector (robot or privileged state); 0 = none, as released
    lowdim_tokens    number of tokens made from that vector by one linear layer (ours)
    readout_tokens   readout tokens per step; their mean is the embedding
    points           spatial soft-arg-max points per camera, appended to the embedding (ours; 0 = none, as released)
    """

    token_dim: int
    num_layers: int
    num_heads: int
    mlp_dim: int
    stem_features: tuple[int, ...]
    stem_out: int
    image_sizes: tuple[tuple[str, int], ...]
    image_channels: int
    language_tokens: int
    language_dim: int
    text: str
    repeat_task_tokens: bool
    window: int
    max_horizon: int
    lowdim_dim: int = 0
    lowdim_tokens: int = 0
    readout_tokens: int = 1
    points: int = 0

    @property
    def embedding_dim(self) -> int:
        return self.token_dim + 2 * self.points * len(self.image_sizes)


_RELEASED = dict(
    stem_features=(32, 96, 192, 384), stem_out=512, image_sizes=(("primary", 256), ("wrist", 128)), image_channels=6,
    language_tokens=16, language_dim=768, text="t5-base", repeat_task_tokens=True, window=2, max_horizon=10,
)  # fmt: skip
PRESETS = {
    "octo-compact": OctoConfig(
        token_dim=128, num_layers=2, num_heads=4, mlp_dim=256, stem_features=(32, 64, 64, 128), stem_out=128,
        image_sizes=(("primary", 96),), image_channels=3, language_tokens=4, language_dim=64, text="hash",
        repeat_task_tokens=False, window=1, max_horizon=1, lowdim_tokens=4, points=32,
    ),
    "octo-small": OctoConfig(token_dim=384, num_layers=12, num_heads=6, mlp_dim=1536, **_RELEASED),
    "octo-base": OctoConfig(token_dim=768, num_layers=12, num_heads=12, mlp_dim=3072, **_RELEASED),
}  # fmt: skip


def _lecun_(weight: Tensor) -> None:
    """Flax's default kernel initialiser: truncated normal with variance 1 / fan-in."""
    std = 1.0 / math.sqrt(weight[0].numel())
    nn.init.trunc_normal_(weight, std=std / 0.87962566, a=-2 * std / 0.87962566, b=2 * std / 0.87962566)


def _linear(d_in: int, d_out: int, xavier: bool = False) -> nn.Linear:
    layer = nn.Linear(d_in, d_out)
    nn.init.xavier_uniform_(layer.weight) if xavier else _lecun_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class StdConv(nn.Conv2d):
    """Convolution whose kernel is standardised over (input channel, height, width) each time it is used."""

    def forward(self, x: Tensor) -> Tensor:
        w = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        w = w / (w.std((1, 2, 3), keepdim=True, correction=0) + 1e-5)  # population std; 1e-5 on the std, not the var
        return F.conv2d(x, w, self.bias, self.stride, self.padding)


class SmallStem16(nn.Module):
    """Camera image to patch tokens: four stride-2 convolutions, so that one token covers 16 x 16 pixels.

    Shapes: [N, H, H, C] uint8 (or float with the same 0..255 range) -> [N, (H/16)^2, stem_out], row by row, and the
    map behind the second convolution, [N, features[1], H/4, H/4].
    """

    def __init__(self, channels: int, features: tuple[int, ...], out: int):
        super().__init__()
        widths = (channels, *features)
        self.convs = nn.ModuleList(StdConv(a, b, 3, stride=2, padding=1) for a, b in pairwise(widths))
        self.norms = nn.ModuleList(nn.GroupNorm(32, c, eps=1e-6) for c in features)
        self.out = nn.Conv2d(features[-1], out, 1)
        for conv in (*self.convs, self.out):
            _lecun_(conv.weight)
            nn.init.zeros_(conv.bias)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        # Copied to channels-first memory: group norm's backward is a third slower on CPU with channels last.
        x = image.permute(0, 3, 1, 2).contiguous().float() / 127.5 - 1.0  # [N, C, H, H]
        maps = []
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = F.relu(norm(conv(x)), inplace=True)  # side halves: [N, c, H/2, H/2] ... [N, c, H/16, H/16]
            maps.append(x)
        return self.out(x).flatten(2).transpose(1, 2), maps[1]  # [N, (H/16)^2, stem_out]


class SpatialPoints(nn.Module):
    """Where things are: the mean position under a softmax over the image, for each of `points` learned heat maps.

    A patch token has to say by its content where in its 16 x 16 pixels an object lies, which takes very long to learn
    from a few hundred demonstrations; these coordinates say it by construction. Shapes: [N, C, h, h] -> [N, 2 * points],
    all columns, then all rows, in [-1, 1]. Source: spatial soft-arg-max of Levine et al. (arXiv:1504.00702).
    """

    def __init__(self, channels: int, points: int):
        super().__init__()
        self.heat = nn.Conv2d(channels, points, 1)
        self.sharpness = nn.Parameter(torch.zeros(points, 1))  # log

    def forward(self, x: Tensor) -> Tensor:
        heat = self.heat(x)
        p = F.softmax(heat.flatten(2) * self.sharpness.exp(), -1).view_as(heat)  # [N, points, h, h]
        axis = torch.linspace(-1, 1, x.shape[-1], device=x.device)
        return torch.cat([p.sum(2) @ axis, p.sum(3) @ axis], -1)


class Block(nn.Module):
    """Pre-norm transformer block with tanh-GELU.

    Tokens x [B, S, d] look at `prefix` [1 or B, P, d] (tokens in front of x that are computed elsewhere) and at
    themselves, with bias [1 or B, 1, S, P + S] added to the scores. Returns [B, last, d], the block's output for the
    last `last` tokens of x, all by default; the others serve as keys and values only.
    """

    def __init__(self, dim: int, heads: int, mlp_dim: int):
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.q = _linear(dim, dim, xavier=True)
        self.k = _linear(dim, dim, xavier=True)
        self.v = _linear(dim, dim, xavier=True)
        self.out = _linear(dim, dim, xavier=True)
        self.fc1 = _linear(dim, mlp_dim, xavier=True)
        self.fc2 = _linear(mlp_dim, dim, xavier=True)
        for fc in (self.fc1, self.fc2):
            nn.init.normal_(fc.bias, std=1e-6)

    def split(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)  # [B, S, d] to [B, heads, S, d/heads]

    def forward(self, x: Tensor, bias: Tensor | None, prefix: Tensor | None = None, last: int | None = None) -> Tensor:
        h = self.norm1(x)  # [B, S, d]
        k = self.k(h)
        v = self.v(h)
        if prefix is not None:
            p = self.norm1(prefix)
            k = torch.cat([self.k(p).expand(len(x), -1, -1), k], 1)  # [B, P + S, d]
            v = torch.cat([self.v(p).expand(len(x), -1, -1), v], 1)
        if last is not None:
            x = x[:, -last:]
            h = h[:, -last:]
            bias = bias[..., -last:, :]
        q = self.split(self.q(h))  # [B, heads, last, d/heads]
        k = self.split(k)  # [B, heads, P + S, d/heads]
        v = self.split(v)
        a = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)  # [B, heads, last, d/heads]
        x = x + self.out(a.transpose(1, 2).flatten(2))  # [B, last, d]
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x)), approximate="tanh"))


class HashText(nn.Module):
    """Small text encoder for the compact model: needs no vocabulary file, and reads up to `max_words` words.

    A word's id is a hash of its lower-case letters, the same in every process. Learned slots stand in front of the
    words, and what one pre-norm block writes into them is the encoding, so its length doesn't depend on the text.

    Shapes: list of N strings -> [N, tokens, dim].
    """

    def __init__(self, tokens: int, dim: int, vocabulary: int = 1024, max_words: int = 16):
        super().__init__()
        self.tokens = tokens
        self.vocabulary = vocabulary
        self.max_words = max_words
        self.embedding = nn.Embedding(vocabulary, dim)  # id 0 is padding
        self.position = nn.Parameter(0.02 * torch.randn(1, tokens + max_words, dim))
        self.block = Block(dim, 4, 4 * dim)
        self.norm = nn.LayerNorm(dim, eps=1e-6)

    def forward(self, instructions: list[str]) -> Tensor:
        ids = word_ids(tuple(instructions), self.vocabulary, self.max_words, self.position.device)  # [N, max_words]
        x = F.pad(self.embedding(ids), (0, 0, self.tokens, 0)) + self.position  # [N, tokens + max_words, dim]
        valid = F.pad(ids > 0, (self.tokens, 0), value=True)
        bias = torch.zeros(valid.shape, device=ids.device).masked_fill(~valid, HIDDEN)
        return self.norm(self.block(x, bias[:, None, None])[:, : self.tokens])


@functools.lru_cache(maxsize=256)
@torch.inference_mode(False)  # backward passes keep them
def word_ids(texts: tuple[str, ...], vocabulary: int, max_words: int, device) -> Tensor:
    """Hashes of the first words of N texts: [N, max_words] int64 below `vocabulary`, 0 where a text has ended."""
    rows = []
    for text in texts:
        words = re.findall(r"[a-z0-9]+", text.lower())[:max_words]
        digests = (hashlib.blake2b(word.encode(), digest_size=8).digest() for word in words)
        ids = [1 + int.from_bytes(digest, "big") % (vocabulary - 1) for digest in digests]
        rows.append(ids + [0] * (max_words - len(ids)))
    return torch.tensor(rows, device=device)


@functools.lru_cache(maxsize=16)
def attention_pattern(language: int, groups: tuple[tuple[int, int], ...], window: int, device) -> Tensor:
    """Which token may look at which: [S, S] bool, rows look at columns.

    `language` tokens, then in each of `window` steps the `groups`, (kind, number of tokens) each. Octo's rules, group
    by group, come down to one line: look at the same or earlier steps (language has step -1), and at your own or a
    lower kind.
    """
    kinds = [kind for kind, count in groups for _ in range(count)]
    kind = torch.tensor([LANGUAGE] * language + kinds * window)
    step = torch.tensor([-1] * language + [t for t in range(window) for _ in kinds])
    return ((kind[None] <= kind[:, None]) & (step[None] <= step[:, None])).to(device)


class Octo(nn.Module):
    """The Octo transformer with its tokenizers: images, instruction and low-dimensional vector to one embedding."""

    def __init__(self, config: OctoConfig):
        super().__init__()
        self.config, d = config, config.token_dim
        counts = {camera: (side // 16) ** 2 for camera, side in config.image_sizes}
        self.stems = nn.ModuleDict(
            {c: SmallStem16(config.image_channels, config.stem_features, config.stem_out) for c in counts}
        )
        self.image_projections = nn.ModuleDict({c: _linear(config.stem_out, d) for c in counts})
        if config.points:
            self.points = nn.ModuleDict({c: SpatialPoints(config.stem_features[1], config.points) for c in counts})
        if config.lowdim_dim:
            self.lowdim_projection = _linear(config.lowdim_dim, config.lowdim_tokens * d)
            counts["lowdim"] = config.lowdim_tokens
        counts["readout"] = config.readout_tokens
        self.positions = nn.ParameterDict(
            {name: nn.Parameter(0.02 * torch.randn(1, config.max_horizon, n, d)) for name, n in counts.items()}
        )
        if config.language_tokens:
            self.positions["language"] = nn.Parameter(0.02 * torch.randn(1, config.language_tokens, d))
            self.language_projection = _linear(config.language_dim, d)
            if config.text == "hash":
                self.text = HashText(config.language_tokens, config.language_dim)
            else:
                self.text = T5Encoder(config.language_dim, **T5_SIZES[config.text])
        self.tokenizer_file: Path | None = None  # T5's spiece.model; None: fetched from the hub when first needed
        self.blocks = nn.ModuleList(Block(d, config.num_heads, config.mlp_dim) for _ in range(config.num_layers))
        self.norm = nn.LayerNorm(d, eps=1e-6)

    def encode_text(self, instructions: list[str]) -> Tensor:
        """Encode N instructions, once per task rather than per step: [N, language_tokens, language_dim].

        Raises: UserError when the released models' tokenizer can't be had: the package or the file.
        """
        if self.config.text == "hash":
            return self.text(instructions)
        if self.tokenizer_file is None:
            self.tokenizer_file = from_hub("google-t5/t5-base", None, ["spiece.model"]) / "spiece.model"
        ids = t5_token_ids(instructions, self.config.language_tokens, self.tokenizer_file)
        return self.text(ids.to(self.norm.weight.device))

    def _tokenize(self, images, language, lowdim, timestep_pad_mask, image_pad_masks, language_mask):
        """All inputs to tokens: of the instruction [1 or B, T, d] or None, of all steps [B, S - T, d], then the
        attention bias [1 or B, 1, S, S] of both in this order, {group: tokens per step}, and the cameras' points
        [B, 2 * points] of the last step."""
        config, d = self.config, self.config.token_dim
        some = lowdim if lowdim is not None else next(iter(images.values()))
        (B, W), device = some.shape[:2], some.device
        if W > config.max_horizon:
            raise ValueError(f"window must be at most max_horizon = {config.max_horizon}, got {W} steps")
        present = torch.ones(B, W, dtype=torch.bool, device=device)
        real_step = present if timestep_pad_mask is None else timestep_pad_mask.bool()  # [B, W]
        points = []
        groups: dict[str, tuple[int, Tensor, Tensor]] = {}  # name: kind, tokens [B, W, n, d], may be looked at [B, W]
        for camera, side in config.image_sizes:
            image = images[camera]
            if image.shape != (B, W, side, side, 3):
                raise ValueError(f"image {camera!r} must be {(B, W, side, side, 3)}, got {tuple(image.shape)}")
            image = F.pad(image.flatten(0, 1), (0, config.image_channels - 3))  # [B*W, H, H, C], goal pixels are 0
            x, fine = self.stems[camera](image)
            x = self.image_projections[camera](x).unflatten(0, (B, W))  # [B, W, n, d]
            if config.points:
                points.append(self.points[camera](fine.unflatten(0, (B, W))[:, -1]))
            shown = (image_pad_masks or {}).get(camera, present).bool()
            groups[camera] = (OBSERVATION, x + self.positions[camera][:, :W], real_step & shown)
        if config.lowdim_dim:
            if lowdim is None or lowdim.shape != (B, W, config.lowdim_dim):
                shape = None if lowdim is None else tuple(lowdim.shape)
                raise ValueError(f"lowdim must be {(B, W, config.lowdim_dim)}, got {shape}")
            x = self.lowdim_projection(lowdim).view(B, W, config.lowdim_tokens, d)
            groups["lowdim"] = (OBSERVATION, x + self.positions["lowdim"][:, :W], real_step)
        prefix = None
        T = 0
        told = present[:, 0]
        if language is not None:
            if language.shape[1:] != (config.language_tokens, config.language_dim):
                wanted = ("B or 1", config.language_tokens, config.language_dim)
                raise ValueError(f"language must be {wanted}, got {tuple(language.shape)}")
            prefix = self.language_projection(language) + self.positions["language"]  # [1 or B, T, d]
            T = prefix.shape[1]
            if language_mask is not None:
                told = language_mask.bool()  # [B]
            if config.repeat_task_tokens:  # the same tokens in every step, without an embedding of the step
                groups["language again"] = (OBSERVATION, prefix[:, None].expand(B, W, -1, -1), told[:, None] & present)
        groups["readout"] = (READOUT, self.positions["readout"][:, :W].expand(B, -1, -1, -1), present)

        counts = {name: x.shape[2] for name, (_, x, _) in groups.items()}
        steps = torch.cat([x for _, x, _ in groups.values()], 2)  # [B, W, n of all groups, d]
        kinds = tuple((kind, x.shape[2]) for kind, x, _ in groups.values())
        allowed = attention_pattern(T, kinds, W, device)[None, None]  # [1, 1, S, S]
        if not (timestep_pad_mask is None and image_pad_masks is None and language_mask is None):
            keys = torch.cat([valid[:, :, None].expand(-1, -1, x.shape[2]) for _, x, valid in groups.values()], 2)
            keys = torch.cat([told[:, None].expand(-1, T), keys.flatten(1)], 1)  # [B, S]
            allowed = allowed & keys[:, None, None]  # [B, 1, S, S]
        bias = torch.zeros(allowed.shape, device=device).masked_fill(~allowed, HIDDEN)
        return prefix, steps.flatten(1, 2), bias, counts, points

    def forward(
        self,
        images: dict[str, Tensor],
        language: Tensor | None = None,
        lowdim: Tensor | None = None,
        timestep_pad_mask: Tensor | None = None,
        image_pad_masks: dict[str, Tensor] | None = None,
        language_mask: Tensor | None = None,
    ) -> Tensor:
        """The readout embedding of the last step in the window.

        Shapes:
            images             {camera: [B, W, H, H, 3] uint8}, every camera of the config ({} if it has none)
            language           [B or 1, language_tokens, language_dim] from `encode_text`; None: no instruction tokens
            lowdim             [B, W, lowdim_dim] float, needed if the config has it
            timestep_pad_mask  [B, W] bool, True = a real step; None: all real
            image_pad_masks    {camera: [B, W] bool}, True = this image exists; cameras left out exist
            language_mask      [B] bool, True = this sample has an instruction; None: all have
        Returns: [B, embedding_dim], the mean over the readout tokens, and the cameras' points if the config has any.
        Raises: ValueError for an input of the wrong shape, or a window longer than max_horizon.
        """
        inputs = (images, language, lowdim, timestep_pad_mask, image_pad_masks, language_mask)
        prefix, x, bias, _, points = self._tokenize(*inputs)
        # Language tokens look at nothing but each other: one instruction for a whole batch is computed once.
        if prefix is not None and len(prefix) == len(x):
            x, prefix = torch.cat([prefix, x], 1), None
        bias = bias[..., -x.shape[1] :, :]
        for block in self.blocks[:-1]:
            x, prefix = block(x, bias, prefix), None if prefix is None else block(prefix, None)
        x = self.blocks[-1](x, bias, prefix, last=self.config.readout_tokens)  # nothing reads the other rows any more
        return torch.cat([self.norm(x).mean(1), *points], -1)  # [B, d + 2 * points * cameras]

    def trunk(self, images, language=None, lowdim=None, timestep_pad_mask=None, image_pad_masks=None,
              language_mask=None) -> dict[str, Tensor]:  # fmt: skip
        """Every output token, by group: "language" [B, T, d], all others [B, W, n, d]. Arguments as in `forward`."""
        inputs = (images, language, lowdim, timestep_pad_mask, image_pad_masks, language_mask)
        prefix, x, bias, counts, _ = self._tokenize(*inputs)
        T = 0 if prefix is None else prefix.shape[1]
        if prefix is not None:
            x = torch.cat([prefix.expand(len(x), -1, -1), x], 1)  # [B, S, d]
        for block in self.blocks:
            x = block(x, bias)
        x = self.norm(x)
        steps = x[:, T:].unflatten(1, (-1, sum(counts.values())))  # [B, W, n of all groups, d]
        outputs = dict(zip(counts, steps.split(list(counts.values()), 2), strict=True))
        return outputs if language is None else {"language": x[:, :T], **outputs}


class DiffusionHead(nn.Module):
    """Octo's action head: denoises a chunk of actions, conditioned on the embedding (DDPM, 20 cosine-spaced steps).

    Actions are in the normalised units of the dataset statistics. Sampling K chunks costs K small network passes per
    step and no further pass of the transformer.
    """

    def __init__(self, embedding_dim: int, action_horizon: int = 4, action_dim: int = 7, hidden: int = 256,
                 num_blocks: int = 3, time_dim: int = 32, num_steps: int = 20, max_action: float = 5.0):  # fmt: skip
        super().__init__()
        self.sizes = dict(
            embedding_dim=embedding_dim, action_horizon=action_horizon, action_dim=action_dim, hidden=hidden,
            num_blocks=num_blocks, time_dim=time_dim, num_steps=num_steps, max_action=max_action,
        )  # fmt: skip
        self.action_horizon = action_horizon
        self.action_dim = action_dim
        self.max_action = max_action
        self.num_steps = num_steps
        flat = action_horizon * action_dim
        self.fourier = nn.Parameter(0.2 * torch.randn(time_dim // 2, 1))
        self.time1 = _linear(time_dim, 2 * time_dim, xavier=True)
        self.time2 = _linear(2 * time_dim, time_dim, xavier=True)
        self.input = _linear(time_dim + embedding_dim + flat, hidden, xavier=True)
        self.norms = nn.ModuleList(nn.LayerNorm(hidden, eps=1e-6) for _ in range(num_blocks))
        self.fc1 = nn.ModuleList(_linear(hidden, 4 * hidden) for _ in range(num_blocks))
        self.fc2 = nn.ModuleList(_linear(4 * hidden, hidden) for _ in range(num_blocks))
        self.output = _linear(hidden, flat, xavier=True)
        # Cosine schedule as Octo writes it, s added to the fraction and divided by 1 + s, and in float32 as there: the
        # last steps divide by sqrt(1 - beta), about 0.03, so a rounding more or less shows in the samples.
        s = 0.008
        t = torch.arange(num_steps + 1) / num_steps
        signal = torch.cos((t + s) / (1 + s) * math.pi * 0.5) ** 2
        signal = signal / signal[0]
        betas = (1 - signal[1:] / signal[:-1]).clamp(0, 0.999)  # [num_steps]
        self.register_buffer("betas", betas, persistent=False)
        self.register_buffer("alpha_bars", torch.cumprod(1 - betas, 0), persistent=False)

    def forward(self, embedding: Tensor, noisy: Tensor, step: Tensor) -> Tensor:
        """Predicted noise. Shapes: embedding [..., d], noisy [..., H*A] (time-major), step [..., 1] -> [..., H*A]."""
        angle = 2 * math.pi * step.float() @ self.fourier.T  # the step's integer index, not its fraction: [..., 16]
        time = self.time2(F.silu(self.time1(torch.cat([angle.cos(), angle.sin()], -1))))  # [..., 32]
        x = self.input(torch.cat([time, embedding, noisy], -1))  # [..., hidden]
        for norm, fc1, fc2 in zip(self.norms, self.fc1, self.fc2, strict=True):
            x = x + fc2(F.silu(fc1(norm(x))))
        return self.output(F.silu(x))

    def loss(self, embedding: Tensor, actions: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Noise-prediction error, as trained by Octo: mean squared error times the action dimension.

        Shapes: embedding [B, d], actions [B, H, A] normalised -> scalar.
        """
        clean = actions.flatten(1).clamp(-self.max_action, self.max_action)
        step = torch.randint(self.num_steps, (len(actions), 1), generator=generator, device=actions.device)
        noise = torch.randn(clean.shape, generator=generator, device=actions.device)
        alpha_bar = self.alpha_bars[step]  # [B, 1]
        predicted = self(embedding, alpha_bar.sqrt() * clean + (1 - alpha_bar).sqrt() * noise, step)
        return F.mse_loss(predicted, noise) * self.action_dim

    @torch.no_grad()
    def sample(self, embedding: Tensor, K: int = 1, generator: torch.Generator | None = None) -> Tensor:
        """Draw K action chunks per state.

        Shapes: embedding [B, d] -> [B, K, action_horizon, action_dim], normalised units, within +-max_action.
        """
        shape = (len(embedding), K, self.action_horizon * self.action_dim)
        embedding = embedding[:, None].expand(-1, K, -1)
        x = gaussian(shape, embedding, generator)
        for t in reversed(range(self.num_steps)):
            beta = self.betas[t]
            alpha_bar = self.alpha_bars[t]
            noise = self(embedding, x, torch.full((*shape[:2], 1), t, device=x.device))
            x = (x - beta / (1 - alpha_bar).sqrt() * noise) / (1 - beta).sqrt()
            if t > 0:
                x = x + beta.sqrt() * gaussian(shape, x, generator)
            x = x.clamp(-self.max_action, self.max_action)
        return x.unflatten(-1, (self.action_horizon, self.action_dim))
