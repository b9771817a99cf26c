"""The one-step consistency head over action chunks of ConRFT (arXiv:2502.05450): noise levels, scalings, network.

Its loss is an equation of the algorithms, and stands in the scripts (`consistency_loss`).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from backbones.units import SIGMA_DATA

SIGMA_MIN, SIGMA_MAX, RHO, NUM_SIGMAS = 0.002, 80.0, 7.0, 40  # ConRFT, as EDM


def karras_sigmas() -> Tensor:
    """The 40 noise levels, descending from 80 to 0.002."""
    i = torch.arange(NUM_SIGMAS) / (NUM_SIGMAS - 1)
    return (SIGMA_MAX ** (1 / RHO) + i * (SIGMA_MIN ** (1 / RHO) - SIGMA_MAX ** (1 / RHO))) ** RHO


def consistency_scalings(sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """c_skip, c_out, c_in with f(x, sigma_min) = x exactly. Source: ConRFT's consistency policy."""
    c_skip = SIGMA_DATA**2 / ((sigma - SIGMA_MIN) ** 2 + SIGMA_DATA**2)
    c_out = (sigma - SIGMA_MIN) * SIGMA_DATA / (sigma**2 + SIGMA_DATA**2).sqrt()
    return c_skip, c_out, 1 / (sigma**2 + SIGMA_DATA**2).sqrt()


class ConsistencyActor(nn.Module):
    """One-step consistency policy over action chunks: f(x, sigma | feature) is the denoised chunk.

    It works in its own units, in which each dimension's standard deviation is SIGMA_DATA, as the scalings assume:
    chunk in [-1, 1] = unit * x. With a far smaller one, learning is much slower (docs/force.md, log).
    The part of the first layer that reads the feature is computed once per state and shared by its N samples.
    """

    def __init__(self, feature_dim: int, unit: Tensor, hidden: int, layers: int, time_dim: int = 16):
        super().__init__()
        self.chunk_dim, self.time_dim = len(unit), time_dim
        self.register_buffer("unit", unit.clone())  # [D]
        self.time = nn.Sequential(nn.Linear(time_dim, 2 * time_dim), nn.Tanh(), nn.Linear(2 * time_dim, time_dim))
        self.feature_in = nn.Linear(feature_dim, hidden)
        self.sample_in = nn.Linear(self.chunk_dim + time_dim, hidden, bias=False)
        self.norms = nn.ModuleList(nn.LayerNorm(hidden, eps=1e-6) for _ in range(layers))
        self.hidden = nn.ModuleList(nn.Linear(hidden, hidden) for _ in range(layers - 1))
        self.out = nn.Linear(hidden, self.chunk_dim)

    def denoise(self, feature: Tensor, x: Tensor, sigma: Tensor) -> Tensor:
        """Shapes: feature [B, F], x [B, N, D], sigma [B or 1, N or 1] -> [B, N, D] within the action box, own units."""
        sigma = sigma[..., None]  # [B, N, 1]
        c_skip, c_out, c_in = consistency_scalings(sigma)
        half = self.time_dim // 2
        frequencies = torch.exp(-math.log(10_000) / (half - 1) * torch.arange(half, device=x.device))
        angle = 250 * torch.log(sigma + 1e-44) * frequencies
        time = self.time(torch.cat([angle.sin(), angle.cos()], -1)).expand(*x.shape[:2], -1)
        h = self.feature_in(feature)[:, None] + self.sample_in(torch.cat([c_in * x, time], -1))  # [B, N, hidden]
        for norm, layer in zip(self.norms, [*self.hidden, self.out]):
            h = layer(torch.tanh(norm(h)))
        return (c_out * h + c_skip * x).clamp(-1 / self.unit, 1 / self.unit)

    def sample(self, feature: Tensor, n: int, generator, second_sigma: float = 0.0) -> Tensor:
        """Draw n chunks per state: [B, n, D] in [-1, 1].

        One-step samples lie very close together (the denoiser at sigma 80 nearly ignores its input). With
        second_sigma > 0 each one is re-noised to that level and denoised once more, which spreads them over what
        the policy knows; the first step is then shared by all n.
        """
        shape = (len(feature), 1 if second_sigma else n, self.chunk_dim)
        x = SIGMA_MAX * torch.randn(shape, generator=generator, device=feature.device)
        x = self.denoise(feature, x, torch.full((1, 1), SIGMA_MAX, device=x.device))
        if second_sigma:
            z = torch.randn((len(feature), n, self.chunk_dim), generator=generator, device=x.device)
            x = self.denoise(feature, x + second_sigma * z, torch.full((1, 1), second_sigma, device=x.device))
        return self.unit * x
