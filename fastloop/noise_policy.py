"""A policy over the initial noise: pi(x_T | c) = N(mu(c), diag s(c)^2), which starts at N(0, I), and its one-step PPO loss.

Reconstructed from the abstract of arXiv 2506.12036; docs/method.md says what of it is ours. It needs nothing but PyTorch, and
docs/method.md prints it in short for use with a stock pipeline.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from fastloop.objectives import OBJECTIVES


class NoisePolicy(nn.Module):
    """Gives the mean and the logarithm of the standard deviation of x_T for features of prompts.

    LayerNorm without weights, a linear layer, SiLU, a linear layer that starts at 0; its 2 C G G outputs are the values of
    both on a grid of G x G points over the latents of each channel, between which they are linear.
    """

    def __init__(self, features: int, channels: int, hidden: int, grid: int) -> None:
        """Args: features: F, of each prompt. channels: C, of the latents. hidden: width. grid: G."""
        super().__init__()
        self.channels, self.grid = channels, grid
        self.norm = nn.LayerNorm(features, elementwise_affine=False)
        self.inner = nn.Linear(features, hidden)
        self.outer = nn.Linear(hidden, 2 * channels * grid * grid)
        nn.init.zeros_(self.outer.weight)
        nn.init.zeros_(self.outer.bias)

    def forward(self, features: torch.Tensor, size: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the mean and the log standard deviation, float32 (n, C, H, W) each, for features (n, F) and size (H, W)."""
        coarse = self.outer(F.silu(self.inner(self.norm(features)))).view(-1, 2 * self.channels, self.grid, self.grid)
        mean, log_scale = F.interpolate(coarse, size=size, mode="bilinear").chunk(2, dim=1)
        return mean, log_scale

    @torch.no_grad()
    def sample(self, noise: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        """Turn noise z ~ N(0, I), float32 (n, C, H, W), into x_T = mu + s z, the same noise where nothing is learned yet."""
        mean, log_scale = self(features, noise.shape[2:])
        return mean + log_scale.exp() * noise


@dataclass(frozen=True)
class NoiseTerms:
    """Of B initial noises, float64 (B,): the loss, with its gradient, the ratio, and the KL to N(0, I) in nats."""

    loss: torch.Tensor
    ratio: torch.Tensor
    kl: torch.Tensor


def log_prob(latents: torch.Tensor, mean: torch.Tensor, log_scale: torch.Tensor) -> torch.Tensor:
    """Return log N(x; mu, diag s^2) = -sum ((x - mu)^2 / (2 s^2) + log s) - D log(2 pi) / 2, the sum over the D elements.

    Args:
        latents, mean, log_scale: (B, C, H, W) each; log_scale is log s.

    Returns:
        float64 (B,): at D = 16,384 a float32 of its size would round log-ratios to multiples of 0.002.
    """
    x, mean, log_scale = (of.double().flatten(1) for of in (latents, mean, log_scale))
    terms = ((x - mean) * (-log_scale).exp()).square() / 2 + log_scale
    return -terms.sum(1) - x.shape[1] * math.log(2 * math.pi) / 2


def kl_to_normal(mean: torch.Tensor, log_scale: torch.Tensor) -> torch.Tensor:
    """Return KL(N(mu, diag s^2) || N(0, I)) = sum (mu^2 + s^2 - 1 - 2 log s) / 2 in nats, float64 (B,).

    Args:
        mean, log_scale: (B, C, H, W) each; log_scale is log s.
    """
    mean, log_scale = (of.double().flatten(1) for of in (mean, log_scale))
    return (mean.square() + (2 * log_scale).exp() - 1 - 2 * log_scale).sum(1) / 2


def noise_terms(
    latents: torch.Tensor,
    mean: torch.Tensor,
    log_scale: torch.Tensor,
    log_prob_old: torch.Tensor,
    advantages: torch.Tensor,
    objective: str,
    clip_range: float,
    kl_weight: float,
) -> NoiseTerms:
    """Compute an objective on the ratio rho = pi(x_T | c) / pi_old(x_T | c), plus ``kl_weight`` times the KL to N(0, I).

    With `clipped` the loss is PPO's of a single step, -min(rho A, clip(rho, 1 - eps, 1 + eps) A).

    Args:
        latents: float32 (B, C, H, W), the x_T that were drawn. mean, log_scale: of the policy that is trained, of the same
            shape. log_prob_old: float64 (B,), as from `log_prob`, of the policy that drew. advantages: float32 (B,).
        objective: a name in ``OBJECTIVES`` whose loss takes no KL. clip_range: eps.
    """
    now, kl = log_prob(latents, mean, log_scale), kl_to_normal(mean, log_scale)
    loss = OBJECTIVES[objective].loss(now, log_prob_old, advantages.double(), clip_range, None)
    return NoiseTerms(loss + kl_weight * kl, (now - log_prob_old).detach().exp(), kl.detach())
