"""The per-step Gaussian in plain PyTorch: the specification of the fused kernels, and the path without a GPU.

    m    = u + w (c - u)                      classifier-free guidance; without u: m = c
    mean = a x_t + b m
    x'   = mean + sigma z,  z ~ N(0, I)
    logp = -(1/D) sum (x' - mean)^2 / (2 sigma^2) - log sigma - log(2 pi) / 2

Latents, coefficients and log-probs are float32, whatever the model's dtype. Both operators take the residual x' - mean of the
*stored* x', and their sums of squares do not depend on their order (``_mean_square``), so the same model outputs give
bit-identical log-probs.

Noise is counter-based, Philox 4x32-10 (Salmon et al., SC 2011): key = seed, counter = (element / 4, step, trajectory id).
A trajectory's noise depends on nothing else: not on its micro-batch, not on the number of processes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from fastloop.objectives import OBJECTIVES

FUSED = False  # whether only some objectives are there, as in the Triton module; here any is computed from the log-prob
INITIAL = 2**32 - 1  # the step number under which x_T is drawn
_MASK = 0xFFFFFFFF
_ROUND_A, _ROUND_B, _KEY_A, _KEY_B = 0xD2511F53, 0xCD9E8D57, 0x9E3779B9, 0xBB67AE85


# of a micro-batch, float32: pairs out of the trust region with a ratio above and below 1, the sums of (log ratio)^2 / 2 and of
# the ratios, the largest |ratio - 1|
STATISTICS = ("clipped_high", "clipped_low", "approx_kl", "ratio", "ratio_max_dev")


@dataclass(frozen=True)
class MicroBatch:
    """B rows of a rollout, one denoising transition each: what a loss needs of them beside the denoiser's outputs.

    Attributes:
        x_t, x_prev: float32 (B, ...), the latents before and after the step, as stored.
        a, b, sigma: float32 (B,), the step's mean is a x_t + b m for a guided output m.
        log_prob_old: float32 (B,), at the rollout. advantage: float32 (B,).
        trajectory, step: int64 (B,), what keyed the noise of x_prev; only a KL to the policy that sampled needs them.
        timestep: int64, of a flow float32 (B,), what the denoiser is called with. weight: float32 (B,), factor of the loss.
        kl: float32 (B,), factor of the Gaussian KL to the reference, as from `kl_factors`; ``None``: 1.
    """

    x_t: torch.Tensor
    x_prev: torch.Tensor
    a: torch.Tensor
    b: torch.Tensor
    sigma: torch.Tensor
    log_prob_old: torch.Tensor
    advantage: torch.Tensor
    trajectory: torch.Tensor | None = None
    step: torch.Tensor | None = None
    timestep: torch.Tensor | None = None
    weight: torch.Tensor | None = None
    kl: torch.Tensor | None = None


@dataclass(frozen=True)
class PolicyTerms:
    """Per pair, float32 (B,): the loss with its gradient; the log-prob and the ratio without. ``STATISTICS``, float32 (5,)."""

    loss: torch.Tensor
    log_prob: torch.Tensor
    ratio: torch.Tensor
    statistics: torch.Tensor


def philox(seed: int, counter: tuple[torch.Tensor | int, ...]) -> tuple[torch.Tensor, ...]:
    """Return four words of 32 bits (int64 tensors) for each counter of four words: Philox 4x32-10. ``seed`` has 64 bits."""
    c0, c1, c2, c3 = counter
    k0, k1 = seed & _MASK, (seed >> 32) & _MASK
    for _ in range(10):
        # the products wrap at 64 bits as unsigned ones do; the mask takes the sign extension off the high word
        a, b = c0 * _ROUND_A, c2 * _ROUND_B
        c0, c1, c2, c3 = ((b >> 32) & _MASK) ^ c1 ^ k0, b & _MASK, ((a >> 32) & _MASK) ^ c3 ^ k1, a & _MASK
        k0, k1 = (k0 + _KEY_A) & _MASK, (k1 + _KEY_B) & _MASK
    return c0, c1, c2, c3


def normal(seed: int, trajectory: torch.Tensor, step: int | torch.Tensor, size: int) -> torch.Tensor:
    """Draw standard normal noise, float32 (B, size), of trajectories (int64 (B,)) at a step, or at one each (int64 (B,)).

    Box-Muller on 23-bit uniforms.

    Element e takes word e % 4 of counter e // 4; words 0, 1 and 2, 3 make the two pairs.
    """
    block = torch.arange(-(-size // 4), device=trajectory.device)[None, :]
    low, high = (trajectory & _MASK)[:, None], ((trajectory >> 32) & _MASK)[:, None]
    if isinstance(step, torch.Tensor):
        step = step[:, None]
    words = philox(seed, (block + 0 * low, step + 0 * (block + low), low + 0 * block, high + 0 * block))
    uniform = [((word >> 9).float() + 0.5) * 2.0**-23 for word in words]  # exact in float32, in (0, 1)
    pairs = []
    for u, v in (uniform[:2], uniform[2:]):
        radius, angle = (-2 * u.log()).sqrt(), 2 * math.pi * v
        pairs += [radius * angle.cos(), radius * angle.sin()]
    return torch.stack(pairs, -1).flatten(1)[:, :size]


def initial_noise(seed: int, trajectory: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Draw x_T of trajectories (int64 (B,)): float32 (B, *shape)."""
    return normal(seed, trajectory, INITIAL, math.prod(shape)).view(-1, *shape)


def sample_transition(
    cond: torch.Tensor,
    uncond: torch.Tensor | None,
    x_t: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    sigma: torch.Tensor,
    guidance: float,
    seed: int,
    trajectory: torch.Tensor,
    step: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Take one reverse step: guidance, mean, noise, sample and its log-prob.

    Args:
        cond, uncond: model outputs (B, ...), any floating dtype; ``uncond`` is ``None`` without guidance.
        x_t: float32 (B, ...). a, b, sigma: float32 (B,). trajectory: int64 (B,).

    Returns:
        x_{t-1} float32 (B, ...) and its log-prob float32 (B,); where sigma is 0 the step is its mean and the log-prob 0.
    """
    mean = transition_mean(cond, uncond, x_t, a, b, guidance)
    noise = normal(seed, trajectory, step, x_t[0].numel()).view_as(x_t)
    x_prev = mean + _expand(sigma, mean) * noise
    return x_prev, _log_prob(mean, x_prev, sigma)


def policy_loss(
    cond: torch.Tensor,
    uncond: torch.Tensor | None,
    batch: MicroBatch,
    *,
    guidance: float,
    clip_range: float,
    objective: str,
    seed: int = 0,
) -> PolicyTerms:
    """Compute the policy-gradient loss of a micro-batch, with gradients for ``cond`` and ``uncond``.

    Args:
        cond, uncond, guidance: as in ``sample_transition``. objective: a key of ``fastloop.objectives.OBJECTIVES``.
        seed: of the noise; only where the objective looks at the KL.
    """
    x_t, x_prev, sigma = batch.x_t, batch.x_prev, batch.sigma
    mean = transition_mean(cond, uncond, x_t, batch.a, batch.b, guidance)
    log_prob = _log_prob(mean, x_prev, sigma)
    kl, chosen = None, OBJECTIVES[objective]
    if chosen.uses_kl:
        # the mean that sampled is x' - sigma z, and z can be drawn again: nothing of it was stored
        noise = normal(seed, batch.trajectory, batch.step, x_t[0].numel()).view_as(x_t)
        kl = (0.5 * _mean_square(mean.detach() - (x_prev - _expand(sigma, mean) * noise), sigma)).float()
    loss = chosen.loss(log_prob, batch.log_prob_old, batch.advantage, clip_range, kl)
    change = log_prob.detach() - batch.log_prob_old
    ratio = change.exp()
    if kl is None:
        high, low = ratio > 1 + clip_range, ratio < 1 - clip_range
    else:
        high, low = (kl > clip_range) & (ratio > 1), (kl > clip_range) & (ratio < 1)
    statistics = (high.float().sum(), low.float().sum(), 0.5 * change.square().sum(), ratio.sum(), (ratio - 1).abs().max())
    return PolicyTerms(loss, log_prob.detach(), ratio, torch.stack(statistics))


def transition_mean(cond, uncond, x_t, a, b, guidance: float) -> torch.Tensor:
    """Return a x_t + b (u + w (c - u)), float32 (B, ...)."""
    cond = cond.float()
    guided = cond if uncond is None else uncond.float() + guidance * (cond - uncond.float())
    return _expand(a, x_t) * x_t + _expand(b, x_t) * guided


def _log_prob(mean: torch.Tensor, x_prev: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    scale = torch.where(sigma > 0, sigma, 1.0).double()
    log_prob = -(0.5 * _mean_square(x_prev - mean, sigma) + scale.log() + 0.5 * math.log(2 * math.pi))
    return torch.where(sigma > 0, log_prob, 0.0).float()


def _mean_square(residual: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """Mean over the D elements of (residual / sigma)^2, float64 (B,), the same whatever the order of the sum.

    torch's reductions take their order from the number of threads and rows, the kernels' from their layout. Squares that are
    multiples of 2^-30 add up in float64 without rounding, as long as their sum is below 2^23 = 8.4 million (about D near the
    policy that sampled); so each is rounded to that first.
    """
    inverse = torch.where(sigma > 0, 1 / torch.where(sigma > 0, sigma, 1.0), 0.0)
    squares = (residual * _expand(inverse, residual)).square().flatten(1).double()
    squares = (squares + 1.5 * 2.0**22) - 1.5 * 2.0**22  # float64 has 52 bits after the first
    return squares.sum(1) / squares.shape[1]


def _expand(value: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return value.view(-1, *[1] * (like.dim() - 1))


def group_norm(x: torch.Tensor, groups: int, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> torch.Tensor:
    """Normalise each group of channels of (N, C, ...), as stock diffusers does."""
    return torch.nn.functional.group_norm(x, groups, weight, bias, eps)


def group_norm_silu(x: torch.Tensor, groups: int, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> torch.Tensor:
    """Compute silu(group_norm(x)) of (N, C, ...), as stock diffusers does."""
    return torch.nn.functional.silu(group_norm(x, groups, weight, bias, eps))


def geglu(projected: torch.Tensor) -> torch.Tensor:
    """Compute hidden * gelu(gate) of the halves (hidden, gate) of the last dimension: (..., 2 I) -> (..., I)."""
    hidden, gate = projected.chunk(2, dim=-1)
    return hidden * torch.nn.functional.gelu(gate)
