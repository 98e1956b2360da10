"""What is minimised, per row: one denoising transition of a rollout, or its final latents at one noise level.

An objective of one's own is an `Objective` in ``OBJECTIVES``; docs/architecture.md has one to copy.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import ModuleType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:  # the kernels' specification takes the objectives from here
    from fastloop.config import Config
    from fastloop.kernels.reference import MicroBatch, PolicyTerms
    from fastloop.transitions import TransitionTable

Outputs = tuple[Tensor, Tensor | None]  # of the denoiser, with the prompt and without
NOISE_SIGMA = 0.5**0.5  # of a forward process's rows: -log p is then the squared error of the noise and a constant,
NOISE_LOG_PROB = -math.log(NOISE_SIGMA) - 0.5 * math.log(2 * math.pi)  # this one


@dataclass(frozen=True)
class Objective:
    """A loss of a row's log-prob: of the stored transition, or of the noise that was added to final latents.

    Attributes:
        loss: of float32 vectors (B,) (log_prob, log_prob_old, advantage, clip_range, kl), with a gradient for the first.
            ``log_prob`` is the mean over the D elements of a latent, as in DDPO; ratio = exp(log_prob - log_prob_old).
        uses_ratio: whether the ratio plays a part: it must then be 1 before the first update, and later passes are unbiased.
        uses_kl: whether ``kl`` is given, the exact KL between the policy that sampled and the one that is trained, per
            element; ``clip_range`` then bounds it, else the ratio.
        fused: whether the Triton kernel has this loss. Where not, it is computed from the fused log-prob.
        stored_steps: whether rows are transitions of a rollout; else they are its final latents at ``forward.levels`` noise
            levels each (`ForwardProcess`), the rollout keeps no others, and the network is trained without guidance.
    """

    name: str
    loss: Callable[[Tensor, Tensor, Tensor, float, Tensor | None], Tensor]
    uses_ratio: bool = True
    uses_kl: bool = False
    fused: bool = False
    stored_steps: bool = True

    def terms(
        self, ops: ModuleType, predict: Callable[[Tensor, Tensor], Outputs], batch: MicroBatch, config: Config
    ) -> tuple[PolicyTerms, Outputs]:
        """Compute the loss of a micro-batch with its statistics, and the denoiser's outputs that it took.

        Args:
            ops: what `kernels.backend` gives. predict: of latents float32 (B, ...) and timesteps (B,).
        """
        outputs = predict(batch.x_t, batch.timestep)
        shared = {"guidance": config.sampling.guidance_scale, "clip_range": config.clip_range, "seed": config.seed}
        if self.fused or not ops.FUSED:
            return ops.policy_loss(*outputs, batch, objective=self.name, **shared), outputs
        if self.uses_kl:
            raise ValueError(f"objective: {self.name} needs the KL, which is fused for kl_mask alone: set kernels=reference")
        one = replace(batch, advantage=-torch.ones_like(batch.advantage))  # the score function's loss is then the log-prob
        terms = ops.policy_loss(*outputs, one, objective="score_function", **shared)
        loss = self.loss(terms.loss, batch.log_prob_old, batch.advantage, config.clip_range, None)
        return replace(terms, loss=loss), outputs


def score_function(log_prob, log_prob_old, advantage, clip_range, kl=None):
    """Return -A log p: REINFORCE and RLOO. The old log-prob and the clip range play no part."""
    return -advantage * log_prob


def clipped(log_prob, log_prob_old, advantage, clip_range, kl=None):
    """Return -min(rho A, clip(rho, 1 - eps, 1 + eps) A): PPO and LOOP."""
    ratio = (log_prob - log_prob_old).exp()
    return torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - clip_range, 1 + clip_range))


def clip_only(log_prob, log_prob_old, advantage, clip_range, kl=None):
    """Return -clip(rho, 1 - eps, 1 + eps) A, without the min: DPOK's form (no gradient outside the window)."""
    ratio = (log_prob - log_prob_old).exp()
    return -advantage * ratio.clamp(1 - clip_range, 1 + clip_range)


def kl_mask(log_prob, log_prob_old, advantage, clip_range, kl):
    """Return -rho A, without a gradient for a row whose KL is over the bound and which would move further away (Flow-DPPO).

    The policy moves away where A > 0 and rho > 1, or A < 0 and rho < 1.
    """
    ratio = (log_prob - log_prob_old).exp()
    loss, further = -advantage * ratio, advantage * (ratio - 1) > 0
    return torch.where((kl > clip_range) & further, loss.detach(), loss)


def forward_process(log_prob, log_prob_old, advantage, clip_range, kl=None):
    """Return A d of the noise's mean squared error d = |eps_hat - eps|^2 / D, given -log p, which is d and a constant."""
    return advantage * (NOISE_LOG_PROB - log_prob)


OBJECTIVES = {
    objective.name: objective
    for objective in (
        Objective("score_function", score_function, uses_ratio=False, fused=True),
        Objective("clipped", clipped, fused=True),
        Objective("clip_only", clip_only, fused=True),
        Objective("kl_mask", kl_mask, uses_kl=True, fused=True),
        Objective("forward_process", forward_process, uses_ratio=False, stored_steps=False),
    )
}


def kl_factors(table: TransitionTable, form: str) -> torch.Tensor:
    """Return what a form of the KL is, at each step, in units of `gaussian_kl`: float64 (T,); 0 for steps without noise.

    `epsilon` is the mean of (eps_hat - eps_ref)^2, of predictions eps_hat = ex x + em m that a step's mean moves with by b m.
    """
    if form == "gaussian":
        return torch.ones_like(table.sigma)
    return torch.where(table.trainable, 2 * (table.sigma * table.em / table.b).square(), 0.0)


def gaussian_kl(mean: torch.Tensor, mean_reference: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """Return KL(N(mean, sigma^2) || N(mean_reference, sigma^2)) = |mean - mean_reference|^2 / (2 sigma^2), per element.

    Args:
        mean, mean_reference: float32 (B, ...). sigma: float32 (B,).

    Returns:
        (B,), averaged over the elements like the log-prob.
    """
    distance = (mean - mean_reference).square().flatten(1).mean(1)
    return distance / (2 * sigma.square())
