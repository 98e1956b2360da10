"""``policy_loss``: guidance, log-prob, importance ratio and clipped loss, fused, forward and backward.

Forward, stage one: each program reads a block of one pair's elements and writes one float64 partial sum (two with the KL
mask). Stage two: one program adds the partial sums and writes per pair the loss, the log-prob, the ratio and d loss / d log p,
and the statistics of the micro-batch. Backward: element-wise, from the same inputs; the residual is computed again.

Memory traffic per element, with bfloat16 model outputs and guidance: forward reads 2 + 2 + 4 + 4 bytes (cond, uncond, x_t,
x_prev) and writes nothing latent-sized; backward reads the same 12 and writes 2 + 2 (both gradients): 28 bytes in all. Without
guidance 10 + 12. Saved for the backward beside the inputs: one float32 per pair.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastloop.objectives import OBJECTIVES

from . import gaussian
from .gaussian import BLOCK, EXACT, ROWS, SPLITS
from .reference import STATISTICS, MicroBatch, PolicyTerms

SCORE_FUNCTION, CLIPPED, CLIP_ONLY, KL_MASK = (tl.constexpr(i) for i in range(4))
_NUMBER = {name: i for i, name in enumerate(("score_function", "clipped", "clip_only", "kl_mask"))}
assert _NUMBER.keys() == {name for name, objective in OBJECTIVES.items() if objective.fused}


@triton.jit
def _mean(
    cond_ptr,
    uncond_ptr,
    x_t_ptr,
    a_ptr,
    b_ptr,
    guidance,
    row,
    split,
    offset,
    mask,
    size,
    cond_stride,
    uncond_stride,
    GUIDED: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The mean of a program's elements of one pair, float32 (BLOCK,); ``offset`` and ``mask`` are those of `elements_of`."""
    long_row = row.to(tl.int64)
    cond = gaussian.load_output(cond_ptr + long_row * cond_stride, split, size, CHANNELS, BLOCK)
    uncond = cond
    if GUIDED:
        uncond = gaussian.load_output(uncond_ptr + long_row * uncond_stride, split, size, CHANNELS, BLOCK)
    x_t = tl.load(x_t_ptr + long_row * size + offset, mask, 0.0)
    return gaussian.guided_mean(cond, uncond, x_t, tl.load(a_ptr + row), tl.load(b_ptr + row), guidance, GUIDED)


@triton.jit(do_not_specialize=["seed"])
def _residual_sums(
    cond_ptr,
    uncond_ptr,
    x_t_ptr,
    x_prev_ptr,
    partial_ptr,
    a_ptr,
    b_ptr,
    sigma_ptr,
    trajectory_ptr,
    step_ptr,
    seed,
    guidance,
    size,
    pixels,
    cond_stride,
    uncond_stride,
    GUIDED: tl.constexpr,
    CHANNELS: tl.constexpr,
    MASK_KL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid (S, B): write the partial sums of a block. Parameters as in ``gaussian``, for all kernels here."""
    split, row = tl.program_id(0), tl.program_id(1)
    splits, rows = tl.num_programs(0), tl.num_programs(1)
    offset, mask = gaussian.elements_of(split, size, pixels, CHANNELS, BLOCK)
    long_row = row.to(tl.int64)
    mean = _mean(
        cond_ptr, uncond_ptr, x_t_ptr, a_ptr, b_ptr, guidance, row, split, offset, mask, size, cond_stride, uncond_stride,
        GUIDED, CHANNELS, BLOCK,
    )  # fmt: skip
    x_prev = tl.load(x_prev_ptr + long_row * size + offset, mask, 0.0)
    sigma = tl.load(sigma_ptr + row)
    inverse = gaussian.inverse(sigma)
    tl.store(partial_ptr + long_row * splits + split, gaussian.exact_sum(x_prev - mean, inverse, mask))
    if MASK_KL:
        # the mean that sampled is x_prev - sigma z, and z can be drawn again: nothing of it was stored
        trajectory, step = tl.load(trajectory_ptr + row), tl.load(step_ptr + row)
        noise = gaussian.standard_normal(seed, trajectory, step, split, size, pixels, CHANNELS, BLOCK)
        moved = gaussian.exact_sum(mean - (x_prev - sigma * noise), inverse, mask)
        tl.store(partial_ptr + (rows + long_row) * splits + split, moved)


@triton.jit
def _finish(
    partial_ptr,
    sigma_ptr,
    log_prob_old_ptr,
    advantage_ptr,
    loss_ptr,
    log_prob_ptr,
    ratio_ptr,
    slope_ptr,
    statistics_ptr,
    low,
    high,
    clip_range,
    rows,
    size,
    splits,
    OBJECTIVE: tl.constexpr,
    ROWS: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """Grid (1,): one program for all pairs, so that the statistics have one order too."""
    clipped_high, clipped_low = tl.zeros((ROWS,), tl.float32), tl.zeros((ROWS,), tl.float32)
    change_squares, ratios = tl.zeros((ROWS,), tl.float32), tl.zeros((ROWS,), tl.float32)
    deviations = tl.zeros((ROWS,), tl.float32)
    for start in range(0, rows, ROWS):
        row = start + tl.arange(0, ROWS)
        valid = row < rows
        sigma = tl.load(sigma_ptr + row, valid, 1.0)
        total = gaussian.row_sums(partial_ptr, row, valid, splits, ROWS, SPLITS)
        log_prob = gaussian.log_prob_of(total, sigma, size)
        old = tl.load(log_prob_old_ptr + row, valid, 0.0)
        advantage = tl.load(advantage_ptr + row, valid, 0.0)
        change = tl.where(valid, log_prob - old, 0.0)
        ratio = tl.exp(change)
        above, below = ratio > high, ratio < low
        loss, slope = -advantage * ratio, -advantage * ratio  # slope: d loss / d log p
        if OBJECTIVE == SCORE_FUNCTION:
            loss, slope = -advantage * log_prob, -advantage
        elif OBJECTIVE == KL_MASK:
            moved = gaussian.row_sums(partial_ptr, rows + row, valid, splits, ROWS, SPLITS)
            far = (moved / (2.0 * size)).to(tl.float32) > clip_range
            above, below = far & (ratio > 1), far & (ratio < 1)
            slope = tl.where((above & (advantage > 0)) | (below & (advantage < 0)), 0.0, slope)
        else:
            window = -advantage * tl.where(above, high, tl.where(below, low, ratio))
            if OBJECTIVE == CLIPPED:
                slope = tl.where(loss < window, 0.0, slope)
                loss = tl.maximum(loss, window, propagate_nan=tl.PropagateNan.ALL)
            else:
                slope = tl.where(above | below, 0.0, slope)
                loss = window
        tl.store(loss_ptr + row, loss, valid)
        tl.store(log_prob_ptr + row, log_prob, valid)
        tl.store(ratio_ptr + row, ratio, valid)
        tl.store(slope_ptr + row, tl.where(sigma > 0, slope, 0.0), valid)
        clipped_high += (above & valid).to(tl.float32)
        clipped_low += (below & valid).to(tl.float32)
        change_squares += 0.5 * change * change
        ratios += tl.where(valid, ratio, 0.0)
        deviations = tl.maximum(deviations, tl.abs(tl.where(valid, ratio - 1.0, 0.0)), propagate_nan=tl.PropagateNan.ALL)
    tl.store(statistics_ptr + 0, tl.sum(clipped_high, 0))
    tl.store(statistics_ptr + 1, tl.sum(clipped_low, 0))
    tl.store(statistics_ptr + 2, tl.sum(change_squares, 0))
    tl.store(statistics_ptr + 3, tl.sum(ratios, 0))
    nans = tl.sum((deviations != deviations).to(tl.int32), 0)  # a maximum would pass over them
    tl.store(statistics_ptr + 4, tl.where(nans > 0, float("nan"), tl.max(deviations, 0)))


@triton.jit
def _gradients(
    cond_ptr,
    uncond_ptr,
    x_t_ptr,
    x_prev_ptr,
    a_ptr,
    b_ptr,
    sigma_ptr,
    slope_ptr,
    grad_loss_ptr,
    grad_cond_ptr,
    grad_uncond_ptr,
    guidance,
    size,
    pixels,
    cond_stride,
    uncond_stride,
    grad_loss_stride,
    GUIDED: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid (S, B): d log p / d mean = (x_prev - mean) / (D sigma^2); d mean / d cond = b w, d mean / d uncond = b (1 - w)."""
    split, row = tl.program_id(0), tl.program_id(1)
    offset, mask = gaussian.elements_of(split, size, pixels, CHANNELS, BLOCK)
    long_row = row.to(tl.int64)
    mean = _mean(
        cond_ptr, uncond_ptr, x_t_ptr, a_ptr, b_ptr, guidance, row, split, offset, mask, size, cond_stride, uncond_stride,
        GUIDED, CHANNELS, BLOCK,
    )  # fmt: skip
    residual = tl.load(x_prev_ptr + long_row * size + offset, mask, 0.0) - mean
    inverse = gaussian.inverse(tl.load(sigma_ptr + row))
    slope = tl.load(grad_loss_ptr + long_row * grad_loss_stride) * tl.load(slope_ptr + row)
    # where nothing is to be learned a residual that overflows must not make NaN of 0
    grad_mean = tl.where(slope == 0, 0.0, slope * inverse / size * (residual * inverse))
    grad = tl.load(b_ptr + row) * grad_mean
    if GUIDED:
        gaussian.store_output(grad_uncond_ptr + long_row * size, grad * (1.0 - guidance), split, size, CHANNELS, BLOCK)
        grad = grad * guidance
    gaussian.store_output(grad_cond_ptr + long_row * size, grad, split, size, CHANNELS, BLOCK)


@gaussian.operator("fastloop::policy_loss")
def _policy_loss(
    cond: Tensor,
    uncond: Tensor | None,
    x_t: Tensor,
    x_prev: Tensor,
    a: Tensor,
    b: Tensor,
    sigma: Tensor,
    guidance: float,
    log_prob_old: Tensor,
    advantage: Tensor,
    clip_range: float,
    objective: str,
    seed: int,
    trajectory: Tensor | None,
    step: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    cond, uncond, channels = gaussian.model_layout(cond, uncond)
    x_t, x_prev, a, b, sigma, log_prob_old, advantage = (
        t.contiguous() for t in (x_t, x_prev, a, b, sigma, log_prob_old, advantage)
    )
    masked = objective == "kl_mask"
    rows, size = x_t.shape[0], x_t[0].numel()
    splits = gaussian.splits_of(size)
    partial = x_t.new_empty((1 + masked) * rows, splits, dtype=torch.float64)
    loss, log_prob, ratio, slope = (x_t.new_empty(rows) for _ in range(4))
    statistics = x_t.new_empty(len(STATISTICS))
    _residual_sums[(splits, rows)](
        cond,
        uncond,
        x_t,
        x_prev,
        partial,
        a,
        b,
        sigma,
        trajectory.contiguous() if masked else None,
        step.contiguous() if masked else None,
        seed,
        guidance,
        size,
        size // channels if channels else 1,
        cond.stride(0),
        0 if uncond is None else uncond.stride(0),
        GUIDED=uncond is not None,
        CHANNELS=channels,
        MASK_KL=masked,
        BLOCK=BLOCK,
        **EXACT,
    )
    _finish[(1,)](
        partial,
        sigma,
        log_prob_old,
        advantage,
        loss,
        log_prob,
        ratio,
        slope,
        statistics,
        1 - clip_range,
        1 + clip_range,
        clip_range,
        rows,
        size,
        splits,
        OBJECTIVE=_NUMBER[objective],
        ROWS=ROWS,
        SPLITS=SPLITS,
        **EXACT,
    )
    return loss, log_prob, ratio, slope, statistics


@_policy_loss.register_fake
def _(cond, uncond, x_t, *rest):
    rows = x_t.shape[0]
    return (*(x_t.new_empty(rows) for _ in range(4)), x_t.new_empty(len(STATISTICS)))


@gaussian.operator("fastloop::policy_loss_backward")
def _policy_loss_backward(
    grad_loss: Tensor,
    slope: Tensor,
    cond: Tensor,
    uncond: Tensor | None,
    x_t: Tensor,
    x_prev: Tensor,
    a: Tensor,
    b: Tensor,
    sigma: Tensor,
    guidance: float,
) -> tuple[Tensor, Tensor]:
    cond, uncond, channels = gaussian.model_layout(cond, uncond)
    x_t, x_prev, a, b, sigma = (t.contiguous() for t in (x_t, x_prev, a, b, sigma))
    rows, size = x_t.shape[0], x_t[0].numel()
    grad_cond = torch.empty_like(cond, memory_format=torch.channels_last if channels else torch.contiguous_format)
    grad_uncond = cond.new_empty(0) if uncond is None else torch.empty_like(grad_cond)
    _gradients[(gaussian.splits_of(size), rows)](
        cond,
        uncond,
        x_t,
        x_prev,
        a,
        b,
        sigma,
        slope,
        grad_loss,
        grad_cond,
        None if uncond is None else grad_uncond,
        guidance,
        size,
        size // channels if channels else 1,
        cond.stride(0),
        0 if uncond is None else uncond.stride(0),
        grad_loss.stride(0),
        GUIDED=uncond is not None,
        CHANNELS=channels,
        BLOCK=BLOCK,
        **EXACT,
    )
    return grad_cond, grad_uncond


@_policy_loss_backward.register_fake
def _(grad_loss, slope, cond, uncond, *rest):
    cond, uncond, channels = gaussian.model_layout(cond, uncond)
    grad_cond = torch.empty_like(cond, memory_format=torch.channels_last if channels else torch.contiguous_format)
    return grad_cond, cond.new_empty(0) if uncond is None else torch.empty_like(grad_cond)


def _setup_context(ctx, inputs, output):
    cond, uncond, x_t, x_prev, a, b, sigma, guidance, *_ = inputs
    _, log_prob, ratio, slope, statistics = output
    ctx.mark_non_differentiable(log_prob, ratio, slope, statistics)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(cond, uncond, x_t, x_prev, a, b, sigma, slope)
    ctx.guidance = guidance


def _backward(ctx, grad_loss, *_):
    if grad_loss is None:
        return (None,) * 15
    cond, uncond, x_t, x_prev, a, b, sigma, slope = ctx.saved_tensors
    arguments = (cond, uncond, x_t, x_prev, a, b, sigma, ctx.guidance)
    grad_cond, grad_uncond = _policy_loss_backward(grad_loss, slope, *arguments)
    return grad_cond, None if uncond is None else grad_uncond, *(None,) * 13


_policy_loss.register_autograd(_backward, setup_context=_setup_context)


def policy_loss(
    cond: Tensor,
    uncond: Tensor | None,
    batch: MicroBatch,
    *,
    guidance: float,
    clip_range: float,
    objective: str,
    seed: int = 0,
) -> PolicyTerms:
    """Compute the policy-gradient loss of a micro-batch, as ``reference.policy_loss``: two launches, one backward.

    Raises:
        ValueError: an argument has the wrong shape, dtype or device, or the objective is not fused.
    """
    if objective not in _NUMBER:
        raise ValueError(f"objective: {objective!r}: one of {', '.join(_NUMBER)}")
    if objective == "kl_mask" and (batch.trajectory is None or batch.step is None):
        raise ValueError("kl_mask: needs trajectory and step, which key the noise that sampled x_prev")
    vectors = ("a", "b", "sigma", "log_prob_old", "advantage", "trajectory", "step")
    of_rows = {name: getattr(batch, name) for name in vectors}
    gaussian.check_arguments({"x_t": batch.x_t, "x_prev": batch.x_prev}, {"cond": cond, "uncond": uncond}, of_rows)
    loss, log_prob, ratio, _, statistics = _policy_loss(
        cond, uncond, batch.x_t, batch.x_prev, batch.a, batch.b, batch.sigma, float(guidance), batch.log_prob_old,
        batch.advantage, float(clip_range), objective, gaussian.signed(seed), batch.trajectory, batch.step,
    )  # fmt: skip
    return PolicyTerms(loss, log_prob, ratio, statistics)
