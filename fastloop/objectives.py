"""What is minimised, per (trajectory, timestep) pair. Pure functions of float32 vectors of one length (B,).

``log_prob`` is the mean over the D elements of a latent, as in DDPO; ratio = exp(log_prob - log_prob_old). ``kl`` is the exact
KL between the policy that sampled and the one that is trained, per element; only ``kl_mask`` looks at it.
"""

from __future__ import annotations

import torch


def score_function(log_prob, log_prob_old, advantage, clip_range, kl=None):
    """-A log p: REINFORCE and RLOO. The old log-prob and the clip range play no part."""
    return -advantage * log_prob


def clipped(log_prob, log_prob_old, advantage, clip_range, kl=None):
    """-min(rho A, clip(rho, 1 - eps, 1 + eps) A): PPO and LOOP."""
    ratio = (log_prob - log_prob_old).exp()
    return torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - clip_range, 1 + clip_range))


def clip_only(log_prob, log_prob_old, advantage, clip_range, kl=None):
    """-clip(rho, 1 - eps, 1 + eps) A, without the min: DPOK's form (no gradient outside the window)."""
    ratio = (log_prob - log_prob_old).exp()
    return -advantage * ratio.clamp(1 - clip_range, 1 + clip_range)


def kl_mask(log_prob, log_prob_old, advantage, clip_range, kl):
    """-rho A, but no gradient for a pair whose KL is over the bound and which would move further away (Flow-DPPO).

    The policy moves away where A > 0 and rho > 1, or A < 0 and rho < 1.
    """
    ratio = (log_prob - log_prob_old).exp()
    loss, further = -advantage * ratio, advantage * (ratio - 1) > 0
    return torch.where((kl > clip_range) & further, loss.detach(), loss)


OBJECTIVES = {"score_function": score_function, "clipped": clipped, "clip_only": clip_only, "kl_mask": kl_mask}


def gaussian_kl(mean: torch.Tensor, mean_reference: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """KL(N(mean, sigma^2) || N(mean_reference, sigma^2)) = |mean - mean_reference|^2 / (2 sigma^2), per element.

    Args:
        mean, mean_reference: float32 (B, ...). sigma: float32 (B,).

    Returns:
        (B,), averaged over the elements like the log-prob.
    """
    distance = (mean - mean_reference).square().flatten(1).mean(1)
    return distance / (2 * sigma.square())
