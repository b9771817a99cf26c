"""The encoder of T5 (arXiv:1910.10683) and its tokenizer's ids: the frozen text encoder of the released Octo models."""

from __future__ import annotations

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plumbing.flags import UserError

T5_SIZES = {"t5-base": dict(vocabulary=32128, layers=12, heads=12, head_dim=64, mlp_dim=3072)}


class T5Block(nn.Module):
    """One pre-norm block of T5's encoder: no biases, unscaled attention scores, ReLU."""

    def __init__(self, dim: int, heads: int, head_dim: int, mlp_dim: int):
        super().__init__()
        self.heads = heads
        inner = heads * head_dim
        self.norm1 = nn.RMSNorm(dim, eps=1e-6)
        self.norm2 = nn.RMSNorm(dim, eps=1e-6)
        self.q = nn.Linear(dim, inner, bias=False)
        self.k = nn.Linear(dim, inner, bias=False)
        self.v = nn.Linear(dim, inner, bias=False)
        self.out = nn.Linear(inner, dim, bias=False)
        self.fc1 = nn.Linear(dim, mlp_dim, bias=False)
        self.fc2 = nn.Linear(mlp_dim, dim, bias=False)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        h = self.norm1(x)  # [N, T, dim]
        q, k, v = (p(h).unflatten(2, (self.heads, -1)).transpose(1, 2) for p in (self.q, self.k, self.v))
        a = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1.0)  # [N, heads, T, head_dim]
        x = x + self.out(a.transpose(1, 2).flatten(2))
        return x + self.fc2(F.relu(self.fc1(self.norm2(x))))


class T5Encoder(nn.Module):
    """T5's encoder, frozen as in Octo: its parameters take no gradient and its output carries none.

    Shapes: ids [N, T] int64, 0 = padding -> [N, T, dim]. Padding is hidden from the words here, yet Octo's transformer
    later reads the padded positions too.
    """

    def __init__(self, dim: int, vocabulary: int, layers: int, heads: int, head_dim: int, mlp_dim: int):
        super().__init__()
        self.embedding, self.distance = nn.Embedding(vocabulary, dim), nn.Embedding(32, heads)
        self.blocks = nn.ModuleList(T5Block(dim, heads, head_dim, mlp_dim) for _ in range(layers))
        self.norm = nn.RMSNorm(dim, eps=1e-6)
        self.requires_grad_(False)

    @torch.no_grad()
    def forward(self, ids: Tensor) -> Tensor:
        # Scores get a learned bias by distance, one table for all blocks: 16 buckets to the left, 16 to the right, of
        # which 8 hold one distance each and 8 grow logarithmically up to 128.
        position = torch.arange(ids.shape[1], device=ids.device)
        offset = position[None] - position[:, None]  # [T, T], key minus query
        far = 8 + (torch.log(offset.abs().clamp(min=1) / 8) / math.log(128 / 8) * 8).long().clamp(max=7)
        bucket = torch.where(offset.abs() < 8, offset.abs(), far) + 16 * (offset > 0)
        bias = self.distance(bucket).permute(2, 0, 1)[None]  # [1, heads, T, T]
        bias = bias.masked_fill((ids == 0)[:, None, None], -1e30)  # [N, heads, T, T]
        x = self.embedding(ids)  # [N, T, dim]
        for block in self.blocks:
            x = block(x, bias)
        return self.norm(x)


def t5_token_ids(instructions: list[str], length: int, tokenizer_file: str | Path) -> Tensor:
    """T5's token ids, cut or padded with 0 to `length`, the end-of-sentence id kept: [N, length] int64.

    `tokenizer_file` is T5's SentencePiece model, spiece.model.
    Raises: UserError when the file doesn't exist, is damaged, or the package `sentencepiece` isn't installed.
    """
    try:
        import sentencepiece
    except ImportError:
        raise UserError("the T5 tokenizer needs `pip install sentencepiece`") from None
    if not Path(tokenizer_file).is_file():
        raise UserError(f"no T5 tokenizer at {tokenizer_file}: pass T5's spiece.model")
    try:
        pieces = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer_file))
    except (RuntimeError, OSError) as error:
        raise UserError(f"{tokenizer_file} is no SentencePiece model: fetch T5's spiece.model again") from error
    rows = [pieces.encode(text)[: length - 1] + [pieces.eos_id()] for text in instructions]
    return torch.tensor([row + [0] * (length - len(row)) for row in rows])
