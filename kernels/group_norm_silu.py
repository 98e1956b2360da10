"""``group_norm_silu``: group normalisation and SiLU of a UNet's residual blocks, fused, forward and backward.

Forward: per channel partial sums over stretches of pixels; from them mean and 1 / std of each group; the output. Backward:
with h = weight xhat + bias and dh = dy silu'(h), computed again from x: per channel partial sums of dh and of dh xhat; from
them two means of each group; dx. Every sum has a fixed order; no atomics. NCHW and channels_last.

Saved for the backward beside the inputs: mean and 1 / std of each group, float32; stock modules keep the normalised
activation too. Memory traffic per element of size s: forward reads x twice and writes y (3 s), backward reads x and dy twice
and writes dx (5 s); the second reads find what the L2 cache still holds.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import gaussian
from .gaussian import FUSION

TILE = 4096  # elements of a program's tile of channels x pixels
MOST_SPLITS = 64  # stretches of pixels: the second stage holds their sums for a group at once

WARPS = {"num_warps": 8, **FUSION}


@triton.jit
def _offsets(sample, channel, pixel, channels, pixels, LAST: tl.constexpr):
    """Memory offsets of a tile (channels, pixels) of one sample."""
    start = sample.to(tl.int64) * channels * pixels
    if LAST:
        return start + pixel[None, :] * channels + channel[:, None]
    return start + channel[:, None] * pixels + pixel[None, :]


@triton.jit
def _silu_gradient(h):
    """d silu(h) / d h."""
    s = tl.sigmoid(h)
    return s * (1.0 + h * (1.0 - s))


@triton.jit
def _sums(
    x_ptr,
    partial_ptr,
    channels,
    pixels,
    stretch,
    LAST: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Of each channel, over a stretch of pixels: the sums of x - x[0] and of its square: a large mean costs no digits."""
    split, sample = tl.program_id(0), tl.program_id(2)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    zero = tl.zeros((1,), tl.int32)
    shift = tl.load(x_ptr + _offsets(sample, channel, zero, channels, pixels, LAST), (channel < channels)[:, None], 0.0)
    first = tl.zeros((BLOCK_C, BLOCK_P), tl.float32)
    second = tl.zeros((BLOCK_C, BLOCK_P), tl.float32)
    for start in range(split * stretch, tl.minimum((split + 1) * stretch, pixels), BLOCK_P):
        pixel = start + tl.arange(0, BLOCK_P)
        mask = (channel < channels)[:, None] & (pixel < pixels)[None, :]
        x = tl.load(x_ptr + _offsets(sample, channel, pixel, channels, pixels, LAST), mask, 0.0).to(tl.float32)
        centred = tl.where(mask, x - shift.to(tl.float32), 0.0)
        first += centred
        second += centred * centred
    at = (sample * tl.num_programs(0) + split) * channels + channel
    size = tl.num_programs(2) * tl.num_programs(0) * channels
    tl.store(partial_ptr + at, tl.sum(first, 1), channel < channels)
    tl.store(partial_ptr + size + at, tl.sum(second, 1), channel < channels)


@triton.jit
def _group_tile(sample, group, groups, samples, channels, splits, SPLITS: tl.constexpr, WIDTH: tl.constexpr):
    """Of a group: its channels, the places of its partial sums (splits, channels) in either half, and what of it is real."""
    width = channels // groups
    inside = tl.arange(0, WIDTH)
    channel = group * width + inside
    split = tl.arange(0, SPLITS)
    at = (sample * splits + split)[:, None] * channels + channel[None, :]
    return channel, inside < width, at, (split < splits)[:, None] & (inside < width)[None, :]


@triton.jit
def _statistics(
    x_ptr,
    partial_ptr,
    mean_ptr,
    rstd_ptr,
    channels,
    pixels,
    stretch,
    splits,
    eps,
    LAST: tl.constexpr,
    SPLITS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Mean and 1 / std of one group of one sample."""
    group, sample = tl.program_id(0), tl.program_id(1)
    groups, samples = tl.num_programs(0), tl.num_programs(1)
    channel, real, at, mask = _group_tile(sample, group, groups, samples, channels, splits, SPLITS, WIDTH)
    first = tl.load(partial_ptr + at, mask, 0.0)
    second = tl.load(partial_ptr + samples * splits * channels + at, mask, 0.0)
    zero = tl.zeros((1,), tl.int32)
    shift = tl.load(x_ptr + _offsets(sample, channel, zero, channels, pixels, LAST), real[:, None], 0.0).to(tl.float32)
    shift = tl.reshape(shift, (WIDTH,))
    size = (channels // groups * pixels).to(tl.float32)
    mean = (tl.sum(tl.sum(first, 0), 0) + pixels * tl.sum(shift, 0)) / size
    offset = tl.where(real, shift - mean, 0.0)  # of the shifts, from the mean: sum (x - mean)^2 = s2 + 2 o s1 + P o^2
    total = tl.sum(second, 0) + 2.0 * offset * tl.sum(first, 0) + pixels * offset * offset
    tl.store(mean_ptr + sample * groups + group, mean)
    tl.store(rstd_ptr + sample * groups + group, 1.0 / tl.sqrt_rn(tl.maximum(tl.sum(total, 0), 0.0) / size + eps))


@triton.jit
def _normalised(x_ptr, mean_ptr, rstd_ptr, weight_ptr, bias_ptr, sample, channel, groups, channels, at, mask):
    """Of a tile: xhat, h = weight xhat + bias, and per channel 1 / std and weight. All float32."""
    real = channel < channels
    group = sample * groups + channel // (channels // groups)
    mean, rstd = tl.load(mean_ptr + group, real, 0.0), tl.load(rstd_ptr + group, real, 0.0)
    weight = tl.load(weight_ptr + channel, real, 0.0).to(tl.float32)
    bias = tl.load(bias_ptr + channel, real, 0.0).to(tl.float32)
    xhat = (tl.load(x_ptr + at, mask, 0.0).to(tl.float32) - mean[:, None]) * rstd[:, None]
    return xhat, xhat * weight[:, None] + bias[:, None], rstd, weight


@triton.jit
def _output(
    x_ptr,
    y_ptr,
    mean_ptr,
    rstd_ptr,
    weight_ptr,
    bias_ptr,
    groups,
    channels,
    pixels,
    LAST: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    sample = tl.program_id(2)
    pixel = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    at = _offsets(sample, channel, pixel, channels, pixels, LAST)
    mask = (channel < channels)[:, None] & (pixel < pixels)[None, :]
    _, h, _, _ = _normalised(x_ptr, mean_ptr, rstd_ptr, weight_ptr, bias_ptr, sample, channel, groups, channels, at, mask)
    tl.store(y_ptr + at, (h * tl.sigmoid(h)).to(y_ptr.dtype.element_ty), mask)


@triton.jit
def _gradient_sums(
    dy_ptr,
    x_ptr,
    partial_ptr,
    mean_ptr,
    rstd_ptr,
    weight_ptr,
    bias_ptr,
    groups,
    channels,
    pixels,
    stretch,
    LAST: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Of each channel, over a stretch of pixels: the sums of dh and of dh xhat."""
    split, sample = tl.program_id(0), tl.program_id(2)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    first = tl.zeros((BLOCK_C, BLOCK_P), tl.float32)
    second = tl.zeros((BLOCK_C, BLOCK_P), tl.float32)
    for start in range(split * stretch, tl.minimum((split + 1) * stretch, pixels), BLOCK_P):
        pixel = start + tl.arange(0, BLOCK_P)
        at = _offsets(sample, channel, pixel, channels, pixels, LAST)
        mask = (channel < channels)[:, None] & (pixel < pixels)[None, :]
        xhat, h, _, _ = _normalised(
            x_ptr, mean_ptr, rstd_ptr, weight_ptr, bias_ptr, sample, channel, groups, channels, at, mask
        )
        dh = tl.load(dy_ptr + at, mask, 0.0).to(tl.float32) * _silu_gradient(h)
        first += dh
        second += dh * xhat
    at = (sample * tl.num_programs(0) + split) * channels + channel
    size = tl.num_programs(2) * tl.num_programs(0) * channels
    tl.store(partial_ptr + at, tl.sum(first, 1), channel < channels)
    tl.store(partial_ptr + size + at, tl.sum(second, 1), channel < channels)


@triton.jit
def _gradient_means(
    partial_ptr,
    weight_ptr,
    means_ptr,
    channels,
    pixels,
    splits,
    SPLITS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Of one group of one sample: the means of weight dh and of weight dh xhat."""
    group, sample = tl.program_id(0), tl.program_id(1)
    groups, samples = tl.num_programs(0), tl.num_programs(1)
    channel, real, at, mask = _group_tile(sample, group, groups, samples, channels, splits, SPLITS, WIDTH)
    weight = tl.load(weight_ptr + channel, real, 0.0).to(tl.float32)
    first = tl.sum(tl.load(partial_ptr + at, mask, 0.0), 0)
    second = tl.sum(tl.load(partial_ptr + samples * splits * channels + at, mask, 0.0), 0)
    size = (channels // groups * pixels).to(tl.float32)
    place = sample * groups + group
    tl.store(means_ptr + place, tl.sum(first * weight, 0) / size)
    tl.store(means_ptr + samples * groups + place, tl.sum(second * weight, 0) / size)


@triton.jit
def _parameter_gradients(
    partial_ptr, grad_weight_ptr, grad_bias_ptr, channels, rows, ROWS: tl.constexpr, BLOCK_C: tl.constexpr
):
    """Sums over samples and stretches: of dh xhat for the weight, of dh for the bias."""
    channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    bias = tl.zeros((ROWS, BLOCK_C), tl.float32)
    weight = tl.zeros((ROWS, BLOCK_C), tl.float32)
    for start in range(0, rows, ROWS):
        row = start + tl.arange(0, ROWS)
        at = row[:, None] * channels + channel[None, :]
        mask = (row < rows)[:, None] & (channel < channels)[None, :]
        bias += tl.load(partial_ptr + at, mask, 0.0)
        weight += tl.load(partial_ptr + rows * channels + at, mask, 0.0)
    real = channel < channels
    tl.store(grad_weight_ptr + channel, tl.sum(weight, 0).to(grad_weight_ptr.dtype.element_ty), real)
    tl.store(grad_bias_ptr + channel, tl.sum(bias, 0).to(grad_bias_ptr.dtype.element_ty), real)


@triton.jit
def _gradient(
    dy_ptr,
    x_ptr,
    dx_ptr,
    mean_ptr,
    rstd_ptr,
    weight_ptr,
    bias_ptr,
    means_ptr,
    samples,
    groups,
    channels,
    pixels,
    LAST: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """dx = (weight dh - mean(weight dh) - xhat mean(weight dh xhat)) / std."""
    sample = tl.program_id(2)
    pixel = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    at = _offsets(sample, channel, pixel, channels, pixels, LAST)
    mask = (channel < channels)[:, None] & (pixel < pixels)[None, :]
    xhat, h, rstd, weight = _normalised(
        x_ptr, mean_ptr, rstd_ptr, weight_ptr, bias_ptr, sample, channel, groups, channels, at, mask
    )
    dh = tl.load(dy_ptr + at, mask, 0.0).to(tl.float32) * _silu_gradient(h)
    real = channel < channels
    place = sample * groups + channel // (channels // groups)
    first, second = tl.load(means_ptr + place, real, 0.0), tl.load(means_ptr + samples * groups + place, real, 0.0)
    dx = rstd[:, None] * (weight[:, None] * dh - first[:, None] - xhat * second[:, None])
    tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask)


def _tile(channels: int, pixels: int, last: bool) -> tuple[int, int]:
    """Channels and pixels of a tile, powers of 2, long in the direction that is contiguous in memory."""
    if last:
        block_c = min(64, triton.next_power_of_2(channels))
        return block_c, min(TILE // block_c, triton.next_power_of_2(pixels))
    block_p = min(1024, triton.next_power_of_2(pixels))
    return min(TILE // block_p, triton.next_power_of_2(channels)), block_p


def _stretches(pixels: int, block_p: int) -> tuple[int, int]:
    """Pixels of a stretch, a multiple of the tile, and the number of stretches."""
    stretch = triton.cdiv(triton.cdiv(pixels, MOST_SPLITS), block_p) * block_p
    return stretch, triton.cdiv(pixels, stretch)


def _dense(x: Tensor) -> Tensor:
    """x in a memory layout that the kernels read: row-major or channels_last."""
    return x if x.is_contiguous() or (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)) else x.contiguous()


def _like(tensor: Tensor, x: Tensor) -> Tensor:
    """``tensor`` in the memory layout of the dense ``x``."""
    return tensor.contiguous(memory_format=torch.contiguous_format if x.is_contiguous() else torch.channels_last)


@torch.library.custom_op("fastloop::group_norm_silu", mutates_args=())
def _group_norm_silu(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    x, weight, bias = _dense(x), weight.contiguous(), bias.contiguous()
    samples, channels = x.shape[:2]
    pixels, last = x[0, 0].numel(), not x.is_contiguous()
    block_c, block_p = _tile(channels, pixels, last)
    stretch, splits = _stretches(pixels, block_p)
    tile = {"LAST": last, "BLOCK_C": block_c, "BLOCK_P": block_p}
    columns = triton.cdiv(channels, block_c)
    y = torch.empty_like(x)
    mean, rstd = (x.new_empty(samples, groups, dtype=torch.float32) for _ in range(2))
    partial = x.new_empty(2, samples, splits, channels, dtype=torch.float32)
    _sums[(splits, columns, samples)](x, partial, channels, pixels, stretch, **tile, **WARPS)
    _statistics[(groups, samples)](
        x,
        partial,
        mean,
        rstd,
        channels,
        pixels,
        stretch,
        splits,
        eps,
        LAST=last,
        SPLITS=triton.next_power_of_2(splits),
        WIDTH=triton.next_power_of_2(channels // groups),
        **FUSION,
    )
    grid = (triton.cdiv(pixels, block_p), columns, samples)
    _output[grid](x, y, mean, rstd, weight, bias, groups, channels, pixels, **tile, **WARPS)
    return y, mean, rstd


@_group_norm_silu.register_fake
def _(x, groups, weight, bias, eps):
    statistics = x.new_empty(x.shape[0], groups, dtype=torch.float32)
    return torch.empty_like(_dense(x)), statistics, torch.empty_like(statistics)


@torch.library.custom_op("fastloop::group_norm_silu_backward", mutates_args=())
def _group_norm_silu_backward(
    dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, groups: int, weight: Tensor, bias: Tensor, parameters: bool
) -> tuple[Tensor, Tensor, Tensor]:
    x, weight, bias = _dense(x), weight.contiguous(), bias.contiguous()
    dy = _like(dy, x)
    samples, channels = x.shape[:2]
    pixels, last = x[0, 0].numel(), not x.is_contiguous()
    block_c, block_p = _tile(channels, pixels, last)
    stretch, splits = _stretches(pixels, block_p)
    tile = {"LAST": last, "BLOCK_C": block_c, "BLOCK_P": block_p}
    columns = triton.cdiv(channels, block_c)
    partial = x.new_empty(2, samples, splits, channels, dtype=torch.float32)
    means = x.new_empty(2, samples, groups, dtype=torch.float32)
    dx = torch.empty_like(x)
    _gradient_sums[(splits, columns, samples)](
        dy, x, partial, mean, rstd, weight, bias, groups, channels, pixels, stretch, **tile, **WARPS
    )
    _gradient_means[(groups, samples)](
        partial,
        weight,
        means,
        channels,
        pixels,
        splits,
        SPLITS=triton.next_power_of_2(splits),
        WIDTH=triton.next_power_of_2(channels // groups),
        **FUSION,
    )
    grid = (triton.cdiv(pixels, block_p), columns, samples)
    _gradient[grid](dy, x, dx, mean, rstd, weight, bias, means, samples, groups, channels, pixels, **tile, **WARPS)
    grad_weight, grad_bias = torch.empty_like(weight), torch.empty_like(bias)
    if parameters:
        _parameter_gradients[(triton.cdiv(channels, 32),)](
            partial, grad_weight, grad_bias, channels, samples * splits, ROWS=32, BLOCK_C=32, **FUSION
        )
    return dx, grad_weight, grad_bias


@_group_norm_silu_backward.register_fake
def _(dy, x, mean, rstd, groups, weight, bias, parameters):
    return torch.empty_like(_dense(x)), weight.new_empty(weight.shape), bias.new_empty(bias.shape)


def _setup_context(ctx, inputs, output):
    x, groups, weight, bias, _ = inputs
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, bias, mean, rstd)
    ctx.groups = groups


def _backward(ctx, dy, *_):
    if dy is None:
        return (None,) * 5
    x, weight, bias, mean, rstd = ctx.saved_tensors
    needed = ctx.needs_input_grad
    parameters = needed[2] or needed[3]
    dx, grad_weight, grad_bias = _group_norm_silu_backward(dy, x, mean, rstd, ctx.groups, weight, bias, parameters)
    return dx, None, grad_weight if needed[2] else None, grad_bias if needed[3] else None, None


_group_norm_silu.register_autograd(_backward, setup_context=_setup_context)


def group_norm_silu(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """silu(group_norm(x)), as ``reference.group_norm_silu``; three launches, the backward three or four.

    Args:
        x: (N, C, ...), row-major or channels_last, float32, bfloat16 or float16; computed in float32.
        weight, bias: (C,), any floating dtype.

    Returns:
        The shape, dtype and memory layout of ``x``.

    Raises:
        ValueError: an argument has the wrong shape, dtype or device.
    """
    if x.dim() < 2 or x.numel() == 0:
        raise ValueError(f"x: shape {tuple(x.shape)}: expected (N, C, ...) with at least one element")
    if groups < 1 or x.shape[1] % groups:
        raise ValueError(f"groups: {groups} does not divide the {x.shape[1]} channels")
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter.shape != x.shape[1:2]:
            raise ValueError(f"{name}: shape {tuple(parameter.shape)}: expected {tuple(x.shape[1:2])}")
        if parameter.device != x.device:
            raise ValueError(f"{name}: on {parameter.device}: expected {x.device}")
    gaussian.check_model_dtype("x", x)
    return _group_norm_silu(x, groups, weight, bias, float(eps))[0]
