"""pi0 and pi0.5 in plain PyTorch: one readable file from pixels and prompt to a cache of keys and values, and the flow
matching action expert that reads it.

pi0 (arXiv:2410.24164) is two Gemma transformers of equal depth that share their attention, layer by layer:

    vision-language model   [camera tokens ... | prompt tokens]          sees itself only: the prefix
    action expert           [state | noisy action_1 ... action_H]        sees the prefix and itself: the suffix

The state token doesn't see the actions; the actions see everything. Since nothing in the prefix sees the suffix, the
prefix is computed once per observation, and its keys and values serve all candidates and all steps of the flow.
The expert predicts the velocity that carries noise (t = 1) to actions (t = 0). pi0.5 (arXiv:2504.16054) differs in two
points: the state stands in the prompt as digits, and the flow's time enters through adaptive norms.

One set of classes serves every scale (`PRESETS`): the released pi0 and pi0.5, and compact models with the same parts at
a size that trains on one CPU core. Modules carry the names of the released checkpoints.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
import re
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from backbones.octo import SpatialPoints
from plumbing.flags import UserError

HIDDEN = -1e30  # added to a score, hides the key
TOKENIZER = "https://storage.googleapis.com/big_vision/paligemma_tokenizer.model"


@dataclass(frozen=True)
class Pi0Config:
    """Sizes of one model. Use `PRESETS` and `dataclasses.replace`; the class itself has no favourite.

    pi05             adaptive norms and the state in the prompt; otherwise pi0
    vlm_width, vlm_mlp, expert_width, expert_mlp   token and MLP width of the vision-language model and of the expert
    depth, heads, kv_heads, head_dim   of both: they attend together
    vocabulary       rows of the prompt's embedding
    vit_width, vit_mlp, vit_depth, vit_heads, patch   the image encoder (SigLIP)
    cameras          names of the cameras, in the order of their tokens; () means no image encoder
    image_size       side of the images in pixels, a multiple of patch; other sizes are resized
    text             "paligemma": its SentencePiece tokenizer; "hash": words are hashed, no file needed
    max_tokens       longest prompt
    action_dim, state_dim   width of an action and of the state vector (pi0), padded with zeros by the user
    lowdim_dim, lowdim_tokens   privileged state as tokens of the prefix (ours; 0 = none, as released)
    points           spatial soft-arg-max points per camera, as one more token and beside the embedding (ours)
    recompute        the backward pass computes the inside of a layer anew: only what goes in is kept
    bf16             layers multiply in bfloat16, and their weights that aren't trained are held in it
    """

    pi05: bool
    vlm_width: int
    vlm_mlp: int
    expert_width: int
    expert_mlp: int
    depth: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    vit_width: int
    vit_mlp: int
    vit_depth: int
    vit_heads: int
    patch: int
    cameras: tuple[str, ...]
    image_size: int
    text: str
    max_tokens: int
    action_dim: int
    state_dim: int
    lowdim_dim: int = 0
    lowdim_tokens: int = 0
    points: int = 0
    recompute: bool = False
    bf16: bool = False

    @property
    def embedding_dim(self) -> int:
        return self.vlm_width + 2 * self.points * len(self.cameras)


_COMPACT = Pi0Config(
    pi05=False, vlm_width=128, vlm_mlp=512, expert_width=64, expert_mlp=256, depth=4, heads=4, kv_heads=1, head_dim=32,
    vocabulary=512, vit_width=96, vit_mlp=384, vit_depth=3, vit_heads=4, patch=16, cameras=("primary",), image_size=64,
    text="hash", max_tokens=16, action_dim=8, state_dim=32, lowdim_tokens=4, points=32,
)  # fmt: skip
_RELEASED = Pi0Config(
    pi05=False, vlm_width=2048, vlm_mlp=16384, expert_width=1024, expert_mlp=4096, depth=18, heads=8, kv_heads=1,
    head_dim=256, vocabulary=257152, vit_width=1152, vit_mlp=4304, vit_depth=27, vit_heads=16, patch=14,
    cameras=("base", "left_wrist", "right_wrist"), image_size=224, text="paligemma", max_tokens=48, action_dim=32,
    state_dim=32, recompute=True,
)  # fmt: skip
PRESETS = {
    "pi0-compact": _COMPACT,
    "pi05-compact": dataclasses.replace(_COMPACT, pi05=True, max_tokens=80),
    "pi0": _RELEASED,
    "pi05": dataclasses.replace(_RELEASED, pi05=True, max_tokens=200),
}


@dataclass
class Prefix:
    """What one pass over an observation leaves: all that the action expert and a critic need. P prefix tokens."""

    cache: Tensor  # [B, depth, 2, P, kv_heads, head_dim] rotated keys and values of each layer
    valid: Tensor  # [B, P] bool, False: padding or a missing camera
    embedding: Tensor  # [B, embedding_dim] mean of the valid output tokens, beside the cameras' points


# === Layers: how they are run ========================================================================================
def compute(layer: nn.Module, config: Pi0Config, *inputs):
    """What a transformer layer makes of its inputs, in the config's precision and with its memory.

    What goes from layer to layer stays float32: with bf16, autocast is on inside of a layer only.
    """
    if config.recompute and torch.is_grad_enabled():
        once = dataclasses.replace(config, recompute=False)
        return checkpoint(compute, layer, once, *inputs, use_reentrant=False, preserve_rng_state=False)
    if not config.bf16:
        return layer(*inputs)
    with torch.autocast(inputs[0].device.type, torch.bfloat16):
        return layer(*inputs)


# === Image encoder ===================================================================================================
def resize_with_pad(image: Tensor, side: int) -> Tensor:
    """Keep the aspect ratio, centre, fill up with -1 (black). Shapes: [B, h, w, 3] uint8 -> [B, 3, side, side] float."""
    x = image.permute(0, 3, 1, 2).float() / 127.5 - 1
    h, w = x.shape[2:]
    if (h, w) != (side, side):
        ratio = max(h, w) / side
        h, w = int(h / ratio), int(w / ratio)
        x = F.interpolate(x, (h, w), mode="bilinear", align_corners=False)
        top, left = (side - h) // 2, (side - w) // 2
        x = F.pad(x, (left, side - w - left, top, side - h - top), value=-1.0)
    return x


class VisionLayer(nn.Module):
    """Pre-norm transformer block with tanh-GELU; every token sees every other. [N, S, width] -> same."""

    def __init__(self, width: int, heads: int, mlp: int):
        super().__init__()
        self.heads = heads
        self.layer_norm1 = nn.LayerNorm(width, eps=1e-6)
        self.layer_norm2 = nn.LayerNorm(width, eps=1e-6)
        self.self_attn = nn.ModuleDict({f"{name}_proj": nn.Linear(width, width) for name in ("q", "k", "v", "out")})
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, mlp), "fc2": nn.Linear(mlp, width)})

    def forward(self, x: Tensor) -> Tensor:
        h = self.layer_norm1(x)
        q, k, v = (self.self_attn[f"{n}_proj"](h).unflatten(2, (self.heads, -1)).transpose(1, 2) for n in "qkv")
        x = x + self.self_attn["out_proj"](F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.layer_norm2(x)), approximate="tanh"))


class SigLIP(nn.Module):
    """Vision transformer: [N, 3, side, side] in [-1, 1] -> [N, (side / patch)^2, width], row by row."""

    def __init__(self, c: Pi0Config):
        super().__init__()
        self.config = c
        self.patch_embedding = nn.Conv2d(3, c.vit_width, c.patch, stride=c.patch)
        self.position_embedding = nn.Embedding((c.image_size // c.patch) ** 2, c.vit_width)
        self.layers = nn.ModuleList(VisionLayer(c.vit_width, c.vit_heads, c.vit_mlp) for _ in range(c.vit_depth))
        self.post_layernorm = nn.LayerNorm(c.vit_width, eps=1e-6)
        nn.init.normal_(self.position_embedding.weight, std=c.vit_width**-0.5)

    def forward(self, image: Tensor) -> Tensor:
        x = self.patch_embedding(image).flatten(2).transpose(1, 2)
        x = x + self.position_embedding.weight
        for layer in self.layers:
            x = compute(layer, self.config, x)
        return self.post_layernorm(x)


class Points(nn.Module):
    """Image positions from a small convolution (ours): a 16-pixel patch is slow to learn where in it an object lies.

    Shapes: [N, 3, side, side] -> [N, 2 * points].
    """

    def __init__(self, points: int, channels: int = 32):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, channels, 8, 4, 2), nn.Conv2d(channels, channels, 3, 1, 1)
        self.where = SpatialPoints(channels, points)

    def forward(self, image: Tensor) -> Tensor:
        x = F.relu(self.conv1(image))
        return self.where(F.relu(self.conv2(x)))


# === Gemma ===========================================================================================================
class RMSNorm(nn.Module):
    """x / rms(x) * (1 + weight), in float32; adaptive: scale, shift and a gate for the branch come from `cond`.

    Shapes: x [..., S, width], cond [..., 1, width] or None -> normed x, gate (1.0 if not adaptive).
    """

    def __init__(self, width: int, adaptive: bool):
        super().__init__()
        if adaptive:
            self.dense = nn.Linear(width, 3 * width)
            nn.init.zeros_(self.dense.weight)
            nn.init.zeros_(self.dense.bias)
        else:
            self.weight = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor, cond: Tensor | None = None) -> tuple[Tensor, Tensor | float]:
        normed = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-6)
        if cond is None:
            return (normed * (1 + self.weight.float())).to(x.dtype), 1.0
        scale, shift, gate = self.dense(cond).chunk(3, -1)
        return (normed * (1 + scale.float()) + shift.float()).to(x.dtype), gate.to(x.dtype)


def rope(position: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the rotary angles: position [..., S] -> two of [..., S, 1, head_dim / 2]."""
    half = head_dim // 2
    frequency = 10_000 ** (-torch.arange(half, device=position.device) / half)
    angle = position[..., None, None].float() * frequency
    return angle.cos(), angle.sin()


def rotate(x: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate the pairs (i, i + head_dim / 2). Shapes: x [..., S, heads, head_dim] -> same."""
    (cos, sin), (a, b) = angles, x.float().chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)


def attend_to_cache(q: Tensor, k: Tensor, v: Tensor, cached: tuple[Tensor, Tensor], bias: Tensor) -> Tensor:
    """Attention of K suffixes to one cached prefix and each to itself, under one softmax; the cache is never copied.

    Shapes: q [B, K, S, heads, d], k, v [B, K, S, G, d], cached two of [B, P, G, d], bias [B, 1, 1, 1, S, P + S] ->
    [B, K, S, heads * d]. Query heads come in G groups, each with one head of keys and values.
    """
    q = q.unflatten(3, (k.shape[3], -1)) * q.shape[-1] ** -0.5  # [B, K, S, G, heads/G, d]
    to_cache = torch.einsum("bksgnd,bpgd->bkgnsp", q, cached[0])
    scores = torch.cat([to_cache, torch.einsum("bksgnd,bktgd->bkgnst", q, k)], -1)
    weight = F.softmax(scores.float() + bias, -1).to(v.dtype)
    weight, own = weight.split([to_cache.shape[-1], k.shape[2]], -1)
    out = torch.einsum("bkgnsp,bpgd->bksgnd", weight, cached[1]) + torch.einsum("bkgnst,bktgd->bksgnd", own, v)
    return out.flatten(3)


class GemmaLayer(nn.Module):
    """Pre-norm block: attention with rotary positions, then a gated MLP; no biases."""

    def __init__(self, width: int, mlp: int, c: Pi0Config, adaptive: bool):
        super().__init__()
        self.head_dim = c.head_dim
        inner = c.heads * c.head_dim
        kv = c.kv_heads * c.head_dim
        shapes = dict(q_proj=(width, inner), k_proj=(width, kv), v_proj=(width, kv), o_proj=(inner, width))
        self.self_attn = nn.ModuleDict({name: nn.Linear(*shape, bias=False) for name, shape in shapes.items()})
        shapes = dict(gate_proj=(width, mlp), up_proj=(width, mlp), down_proj=(mlp, width))
        self.mlp = nn.ModuleDict({name: nn.Linear(*shape, bias=False) for name, shape in shapes.items()})
        self.input_layernorm = RMSNorm(width, adaptive)
        self.post_attention_layernorm = RMSNorm(width, adaptive)
        for linear in (*self.self_attn.values(), *self.mlp.values()):
            nn.init.normal_(linear.weight, std=linear.in_features**-0.5)

    def forward(self, x: Tensor, angles, bias: Tensor, cond: Tensor | None = None, cached=None):
        """The prefix: x [B, P, width], bias [B, 1, 1, P]. A suffix: x [B, K, S, width], `cached` and bias as above.

        Returns: tokens like x, and this layer's keys and values [..., S, kv_heads, head_dim].
        """
        h, gate = self.input_layernorm(x, cond)
        q, k, v = (self.self_attn[f"{name}_proj"](h).unflatten(-1, (-1, self.head_dim)) for name in "qkv")
        q = rotate(q, angles)
        k = rotate(k, angles)
        if cached is None:
            heads_first = (t.transpose(1, 2) for t in (q, k, v))
            a = F.scaled_dot_product_attention(*heads_first, attn_mask=bias.to(q.dtype), enable_gqa=True)
            a = a.transpose(1, 2).flatten(2)
        else:
            a = attend_to_cache(q, k, v, cached, bias)
        x = x + self.self_attn["o_proj"](a) * gate
        h, gate = self.post_attention_layernorm(x, cond)
        h = F.gelu(self.mlp["gate_proj"](h), approximate="tanh") * self.mlp["up_proj"](h)
        return x + self.mlp["down_proj"](h) * gate, (k, v)


# === Prefix: the vision-language model ===============================================================================
def fetch_tokenizer() -> Path:
    """PaliGemma's tokenizer from its public source, once; kept in torch's cache. Raises: UserError if unreachable."""
    file = Path(torch.hub.get_dir()) / "checkpoints" / "paligemma_tokenizer.model"
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(TOKENIZER, str(file), progress=False)
        except Exception as error:  # urllib's, sockets', the file system's
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            raise UserError(
                f"can't fetch PaliGemma's tokenizer from {TOKENIZER} ({reason}); download it where there is network and "
                f"save it as {file}, or beside the weights as paligemma_tokenizer.model"
            ) from None
    return file


@functools.lru_cache(maxsize=4)
def load_tokenizer(file: Path, rows: int):
    """PaliGemma's SentencePiece model. Raises: UserError if the file or the package is missing, or it doesn't fit."""
    try:
        import sentencepiece

        tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(file))
    except ImportError:
        raise UserError("prompts of the released models need `pip install sentencepiece`") from None
    except (OSError, RuntimeError) as error:
        raise UserError(f"{file} is no SentencePiece model: {' '.join(str(error).split())[:200]}") from None
    if tokenizer.vocab_size() > rows or tokenizer.bos_id() < 0:
        raise UserError(f"{file} has {tokenizer.vocab_size()} pieces, the embedding {rows} rows: not PaliGemma's")
    return tokenizer


def state_bins(state: Tensor) -> Tensor:
    """pi0.5's digits: which of 256 equal bins of [-1, 1] a number lies in (-1 below). [B, D] float -> int64."""
    edges = torch.linspace(-1, 1, 257, dtype=torch.float64, device=state.device)[:-1]
    return torch.bucketize(state.double(), edges, right=True) - 1


class PaliGemma(nn.Module):
    """Images and prompt to a `Prefix`."""

    def __init__(self, config: Pi0Config):
        super().__init__()
        self.config, c = config, config
        if c.cameras:
            self.vision, self.projector = SigLIP(c), nn.Linear(c.vit_width, c.vlm_width)
        self.embed_tokens = nn.Embedding(c.vocabulary, c.vlm_width)
        nn.init.normal_(self.embed_tokens.weight, std=c.vlm_width**-0.5)
        self.layers = nn.ModuleList(GemmaLayer(c.vlm_width, c.vlm_mlp, c, False) for _ in range(c.depth))
        self.norm = RMSNorm(c.vlm_width, False)
        self.tokenizer_file: Path | None = None  # None: PaliGemma's, fetched when first needed
        self.add_ours()

    def add_ours(self) -> None:
        """The parts that no released model has, newly initialised."""
        c = self.config
        if c.lowdim_dim:
            self.lowdim = nn.Linear(c.lowdim_dim, c.lowdim_tokens * c.vlm_width)
        if c.points and c.cameras:
            self.points = nn.ModuleDict({camera: Points(c.points) for camera in c.cameras})
            self.points_token = nn.Linear(2 * c.points * len(c.cameras), c.vlm_width)

    def prompt(self, instruction: str, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Token ids and which are no padding, two of [B, T]; pi0: B = 1 and no padding, since all prompts are alike.

        `state` [B, D] in [-1, 1] is needed by pi0.5, which reads it as digits. Raises: UserError for a prompt that is
        longer than max_tokens, or without the tokenizer.
        """
        c, text = self.config, " ".join(instruction.replace("_", " ").split())
        if c.text == "hash":  # rows 1 to 255 are words, the upper 256 are digits of the state
            words = (hashlib.blake2b(w.encode(), digest_size=8).digest() for w in re.findall(r"\w+", text.lower()))
            ids = torch.tensor([[1 + int.from_bytes(word, "big") % 255 for word in words]])
            if c.pi05:
                ids = torch.cat([ids.to(state.device).expand(len(state), -1), 256 + state_bins(state).clamp_min(0)], 1)
            rows = [ids.shape[1]]
        else:
            if self.tokenizer_file is None:
                self.tokenizer_file = fetch_tokenizer()
            tokenizer = load_tokenizer(self.tokenizer_file, c.vocabulary)
            if c.pi05:
                digits = (" ".join(map(str, row)) for row in state_bins(state).tolist())
                lists = [tokenizer.encode(f"Task: {text}, State: {d};\nAction: ", add_bos=True) for d in digits]
            else:
                lists = [tokenizer.encode(text, add_bos=True) + tokenizer.encode("\n")]
            rows = [len(row) for row in lists]
            length = c.max_tokens if c.pi05 else rows[0]
            ids = torch.tensor([row + [0] * (length - len(row)) for row in lists if len(row) <= length])
        if max(rows) > c.max_tokens:
            raise UserError(f"the prompt has {max(rows)} tokens, this model reads {c.max_tokens}: {text[:80]!r}")
        lengths = torch.tensor(rows)[:, None]
        ids, valid = ids.to(self.norm.weight.device), torch.arange(ids.shape[1]) < lengths
        return ids, valid.to(ids.device).expand(len(ids), -1)

    def forward(self, images: dict[str, Tensor], ids: Tensor, valid: Tensor, lowdim: Tensor | None = None,
                image_masks: dict[str, Tensor] | None = None) -> Prefix:  # fmt: skip
        """Shapes:
            images       {camera: [B, h, w, 3] uint8}; leaving one out equals masking it (a model with points needs all)
            ids, valid   [B or 1, T] from `prompt`
            lowdim       [B, lowdim_dim] float, needed if the config has it
            image_masks  {camera: [B] bool}, True = this image exists; cameras left out exist
        Raises: ValueError for a camera that the config doesn't have.
        """
        c = self.config
        unknown = set(images) - set(c.cameras)
        if unknown:
            raise ValueError(f"this model has the cameras {c.cameras}, not {sorted(unknown)}")
        shown = [camera for camera in c.cameras if camera in images]
        B = len(lowdim if lowdim is not None else images[shown[0]])
        device = ids.device
        tokens = []
        masks = []
        points = []
        for camera in shown:
            image = resize_with_pad(images[camera], c.image_size)
            tokens.append(self.projector(self.vision(image)))  # [B, n, width], not scaled like the prompt
            mask = (image_masks or {}).get(camera, torch.ones(B, dtype=torch.bool, device=device))
            masks.append(mask[:, None].expand(-1, tokens[-1].shape[1]))
            if c.points:
                points.append(self.points[camera](image))
        if c.points and c.cameras:
            tokens.append(self.points_token(torch.cat(points, -1))[:, None])
        if c.lowdim_dim:
            tokens.append(self.lowdim(lowdim).unflatten(1, (c.lowdim_tokens, -1)))
        own = sum(x.shape[1] for x in tokens[len(shown) :])
        masks.append(torch.ones(B, own, dtype=torch.bool, device=device))
        tokens.append((self.embed_tokens(ids).float() * math.sqrt(c.vlm_width)).expand(B, -1, -1))
        masks.append(valid.expand(B, -1))
        x = torch.cat(tokens, 1)  # [B, P, width]
        mask = torch.cat(masks, 1)  # [B, P]

        angles = rope(mask.cumsum(1) - 1, c.head_dim)  # padding doesn't advance the position
        bias = torch.zeros(mask.shape, device=device).masked_fill(~mask, HIDDEN)[:, None, None]  # [B, 1, 1, P]
        cache = []
        for layer in self.layers:
            x, keys_and_values = compute(layer, c, x, angles, bias)
            cache.append(torch.stack(keys_and_values, 1))  # [B, 2, P, kv_heads, head_dim]
        x = self.norm(x)[0] * mask[..., None]
        mean = x.sum(1) / mask.sum(1, keepdim=True)
        return Prefix(torch.stack(cache, 1), mask, torch.cat([mean, *points], -1))


# === Suffix: the action expert =======================================================================================
def time_embedding(t: Tensor, width: int) -> Tensor:
    """Sines, then cosines of 2 pi t / period, periods from 0.004 to 4, in float64. [...] -> [..., width]."""
    fraction = torch.linspace(0, 1, width // 2, dtype=torch.float64, device=t.device)
    angle = t.double()[..., None] * (2 * math.pi / (4e-3 * 1e3**fraction))
    return torch.cat([angle.sin(), angle.cos()], -1)


class ActionExpert(nn.Module):
    """The velocity field of the flow over action chunks. It works on a `Prefix`, K samples of each state at a time."""

    def __init__(self, config: Pi0Config):
        super().__init__()
        self.config = c = config
        w = c.expert_width
        self.layers = nn.ModuleList(GemmaLayer(w, c.expert_mlp, c, c.pi05) for _ in range(c.depth))
        self.norm = RMSNorm(w, c.pi05)
        self.action_in_proj, self.action_out_proj = nn.Linear(c.action_dim, w), nn.Linear(w, c.action_dim)
        if c.pi05:
            self.time_mlp_in, self.time_mlp_out = nn.Linear(w, w), nn.Linear(w, w)
        else:
            self.state_proj = nn.Linear(c.state_dim, w)
            self.action_time_mlp_in, self.action_time_mlp_out = nn.Linear(2 * w, w), nn.Linear(w, w)

    def forward(self, cache: Tensor, valid: Tensor, state: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """Velocity at x and time t; what it should be is noise - actions.

        Shapes: cache, valid as in `Prefix`, state [B, state_dim] (pi0.5 has read it already and ignores it),
        x [B, K, H, action_dim], t [B, K] from 1 (noise) to 0 (actions) -> [B, K, H, action_dim].
        """
        c, (B, K, H, _) = self.config, x.shape
        tokens, time = self.action_in_proj(x), time_embedding(t, c.expert_width).to(x.dtype)
        if c.pi05:
            cond = F.silu(self.time_mlp_out(F.silu(self.time_mlp_in(time))))[:, :, None]  # [B, K, 1, width]
        else:
            cond, time = None, time[:, :, None].expand_as(tokens)
            tokens = self.action_time_mlp_out(F.silu(self.action_time_mlp_in(torch.cat([tokens, time], -1))))
            state = self.state_proj(state)[:, None, None].expand(-1, K, -1, -1)
            tokens = torch.cat([state, tokens], 2)  # [B, K, S, width]
        S = tokens.shape[2]
        position = valid.sum(1, keepdim=True) + torch.arange(S, device=x.device)  # [B, S], behind the prefix
        angles = rope(position[:, None], c.head_dim)
        own = torch.ones(S, S, dtype=torch.bool, device=x.device)
        own[: S - H, S - H :] = False  # the state doesn't see the actions
        visible = torch.cat([valid[:, None].expand(-1, S, -1), own.expand(B, -1, -1)], 2)  # [B, S, P + S]
        bias = torch.zeros(visible.shape, device=x.device).masked_fill(~visible, HIDDEN)[:, None, None, None]
        for layer, cached in zip(self.layers, cache.unbind(1)):
            tokens, _ = compute(layer, c, tokens, angles, bias, cond, cached.unbind(1))
        return self.action_out_proj(self.norm(tokens[:, :, S - H :], cond)[0])

    def sample(self, cache: Tensor, valid: Tensor, state: Tensor, noise: Tensor, steps: int = 10) -> Tensor:
        """Euler steps from noise [B, K, H, action_dim] at t = 1 to action chunks, same shape."""
        x = noise
        for i in range(steps):
            t = torch.full(x.shape[:2], 1 - i / steps, device=x.device)
            x = x - self(cache, valid, state, x, t) / steps
        return x


class Pi0(nn.Module):
    """Both halves."""

    def __init__(self, config: Pi0Config):
        super().__init__()
        self.config = config
        self.prefix = PaliGemma(config)
        self.expert = ActionExpert(config)


class LowRank(nn.Linear):
    """LoRA (arXiv:2106.09685): x W^T + x A^T B^T, of which A and B are trained, in float32. [..., in] -> [..., out].

    The matrix B A is never made.
    """

    def __init__(self, frozen: nn.Linear, rank: int):
        super().__init__(frozen.in_features, frozen.out_features, bias=False, device="meta")
        self.weight = frozen.weight
        self.A = nn.Parameter(torch.randn(rank, frozen.in_features) * frozen.in_features**-0.5)
        self.B = nn.Parameter(torch.zeros(frozen.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + F.linear(F.linear(x, self.A), self.B)


def choose_trainable(model: Pi0, finetune: str) -> None:
    """Freeze all but: "full" everything, "expert" the action expert, "head" its projections, "lora" the projections and
    low-rank updates of all attention and MLP weights (rank 16 and 32, scale 1, as openpi). Our own parts always train.

    With the config's bf16, what is frozen of layers and prompt embedding is held in bfloat16 from here on.
    """
    prefix, expert = model.prefix, model.expert
    if finetune == "full":
        return
    prefix.requires_grad_(False)
    for name in ("lowdim", "points", "points_token"):  # new, so they have to learn
        if hasattr(prefix, name):
            getattr(prefix, name).requires_grad_(True)
    if finetune != "expert":
        expert.layers.requires_grad_(False)
        expert.norm.requires_grad_(False)
    if finetune == "lora":
        for layers, rank in ((prefix.layers, 16), (expert.layers, 32)):
            for part in (part for layer in layers for part in (layer.self_attn, layer.mlp)):
                for name, linear in part.items():
                    part[name] = LowRank(linear, rank)
    if model.config.bf16:
        hold_frozen_in_bf16(model)


def hold_frozen_in_bf16(model: Pi0) -> None:
    """Matrices of the layers, which `compute` multiplies in bfloat16 anyway, and the prompt's embedding.

    Norms, biases, positions and projections stay float32: they are small, and openpi keeps norms and positions so too.
    """
    stacks = [model.prefix.layers, model.expert.layers]
    if model.config.cameras:
        stacks.append(model.prefix.vision.layers)
    matrices = [module for stack in stacks for module in stack.modules() if isinstance(module, nn.Linear)]
    for module in (model.prefix.embed_tokens, *matrices):
        if not module.weight.requires_grad:
            module.weight.data = module.weight.data.bfloat16()
