"""``sample_transition``: one reverse step, fused: guidance, mean, noise, sample and its log-prob. And ``initial_noise``.

Memory traffic per element, with bfloat16 model outputs and guidance: reads 2 + 2 + 4 bytes (cond, uncond, x_t), writes 4
(x_prev): 12 bytes. Noise is drawn in the kernel and never stored.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import gaussian
from .gaussian import BLOCK, EXACT, ROWS, SPLITS
from .reference import INITIAL


@triton.jit(do_not_specialize=["seed", "step"])
def _sample(
    cond_ptr,
    uncond_ptr,
    x_t_ptr,
    x_prev_ptr,
    partial_ptr,
    a_ptr,
    b_ptr,
    sigma_ptr,
    trajectory_ptr,
    seed,
    step,
    guidance,
    size,
    pixels,
    cond_stride,
    uncond_stride,
    GUIDED: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid (S, B): write x_prev and the partial sums of a block. Parameters as in ``gaussian``, one ``step`` for all."""
    split, row = tl.program_id(0), tl.program_id(1)
    offset, mask = gaussian.elements_of(split, size, pixels, CHANNELS, BLOCK)
    long_row = row.to(tl.int64)
    cond = gaussian.load_output(cond_ptr + long_row * cond_stride, split, size, CHANNELS, BLOCK)
    uncond = cond
    if GUIDED:
        uncond = gaussian.load_output(uncond_ptr + long_row * uncond_stride, split, size, CHANNELS, BLOCK)
    x_t = tl.load(x_t_ptr + long_row * size + offset, mask, 0.0)
    sigma = tl.load(sigma_ptr + row)
    mean = gaussian.guided_mean(cond, uncond, x_t, tl.load(a_ptr + row), tl.load(b_ptr + row), guidance, GUIDED)
    noise = gaussian.standard_normal(seed, tl.load(trajectory_ptr + row), step, split, size, pixels, CHANNELS, BLOCK)
    x_prev = mean + sigma * noise
    tl.store(x_prev_ptr + long_row * size + offset, x_prev, mask)
    total = gaussian.exact_sum(x_prev - mean, gaussian.inverse(sigma), mask)
    tl.store(partial_ptr + long_row * tl.num_programs(0) + split, total)


@triton.jit
def _finish(partial_ptr, sigma_ptr, log_prob_ptr, rows, size, splits, ROWS: tl.constexpr, SPLITS: tl.constexpr):
    """Grid (B / ROWS,): write the log-probs of ROWS rows. Parameters as in ``gaussian``."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    valid = row < rows
    total = gaussian.row_sums(partial_ptr, row, valid, splits, ROWS, SPLITS)
    tl.store(log_prob_ptr + row, gaussian.log_prob_of(total, tl.load(sigma_ptr + row, valid, 1.0), size), valid)


@triton.jit(do_not_specialize=["seed", "step"])
def _noise(out_ptr, trajectory_ptr, seed, step, size, BLOCK: tl.constexpr):
    """Grid (S, B): write a block of noise to ``out_ptr``, float32 (B, D). The others as in ``gaussian``."""
    split, row = tl.program_id(0), tl.program_id(1)
    offset, mask = gaussian.elements_of(split, size, 1, 0, BLOCK)
    noise = gaussian.standard_normal(seed, tl.load(trajectory_ptr + row), step, split, size, 1, 0, BLOCK)
    tl.store(out_ptr + row.to(tl.int64) * size + offset, noise, mask)


@gaussian.operator("fastloop::sample_transition")
def _sample_transition(
    cond: Tensor,
    uncond: Tensor | None,
    x_t: Tensor,
    a: Tensor,
    b: Tensor,
    sigma: Tensor,
    guidance: float,
    seed: int,
    trajectory: Tensor,
    step: int,
) -> tuple[Tensor, Tensor]:
    cond, uncond, channels = gaussian.model_layout(cond, uncond)
    x_t, a, b, sigma, trajectory = (t.contiguous() for t in (x_t, a, b, sigma, trajectory))
    rows, size = x_t.shape[0], x_t[0].numel()
    splits = gaussian.splits_of(size)
    x_prev, log_prob = torch.empty_like(x_t), x_t.new_empty(rows)
    partial = x_t.new_empty(rows, splits, dtype=torch.float64)
    _sample[(splits, rows)](
        cond,
        uncond,
        x_t,
        x_prev,
        partial,
        a,
        b,
        sigma,
        trajectory,
        seed,
        step,
        guidance,
        size,
        size // channels if channels else 1,
        cond.stride(0),
        0 if uncond is None else uncond.stride(0),
        GUIDED=uncond is not None,
        CHANNELS=channels,
        BLOCK=BLOCK,
        **EXACT,
    )
    _finish[(triton.cdiv(rows, ROWS),)](partial, sigma, log_prob, rows, size, splits, ROWS=ROWS, SPLITS=SPLITS, **EXACT)
    return x_prev, log_prob


@_sample_transition.register_fake
def _(cond, uncond, x_t, a, b, sigma, guidance, seed, trajectory, step):
    return x_t.new_empty(x_t.shape), x_t.new_empty(x_t.shape[0])


@gaussian.operator("fastloop::initial_noise")
def _initial_noise(seed: int, trajectory: Tensor, size: int) -> Tensor:
    noise = torch.empty(len(trajectory), size, device=trajectory.device)
    step = INITIAL - 2**32  # as a signed 32-bit integer
    grid = (gaussian.splits_of(size), len(trajectory))
    _noise[grid](noise, trajectory.contiguous(), seed, step, size, BLOCK=BLOCK, **EXACT)
    return noise


@_initial_noise.register_fake
def _(seed, trajectory, size):
    return trajectory.new_empty(len(trajectory), size, dtype=torch.float32)


def initial_noise(seed: int, trajectory: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Draw x_T of trajectories, as ``reference.initial_noise``. No gradients."""
    return _initial_noise(gaussian.signed(seed), trajectory, math.prod(shape)).view(-1, *shape)


def sample_transition(
    cond: Tensor,
    uncond: Tensor | None,
    x_t: Tensor,
    a: Tensor,
    b: Tensor,
    sigma: Tensor,
    guidance: float,
    seed: int,
    trajectory: Tensor,
    step: int,
) -> tuple[Tensor, Tensor]:
    """Take one reverse step, as ``reference.sample_transition``: two launches, no gradients.

    Raises:
        ValueError: an argument has the wrong shape, dtype or device.
    """
    rows = {"a": a, "b": b, "sigma": sigma, "trajectory": trajectory}
    gaussian.check_arguments({"x_t": x_t}, {"cond": cond, "uncond": uncond}, rows)
    return _sample_transition(cond, uncond, x_t, a, b, sigma, float(guidance), gaussian.signed(seed), trajectory, step)
