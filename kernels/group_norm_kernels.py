"""The Triton kernels of `group_norm_silu`: sums over stretches of pixels, statistics of groups, outputs and gradients.

N samples, C channels in G groups, P pixels, S stretches of ``stretch`` pixels. All tensors are without gaps:

    x_ptr, y_ptr, dy_ptr, dx_ptr       (N, C, P), float32, bfloat16 or float16; row-major, or (N, P, C) where LAST
    weight_ptr, bias_ptr               (C,), any floating dtype; grad_weight_ptr and grad_bias_ptr of theirs
    mean_ptr, rstd_ptr                 float32 (N, G)
    partial_ptr                        float32 (2, N, S, C): two sums for each channel and stretch
    means_ptr                          float32 (2, N, G): of weight dh, and of weight dh xhat
    samples, channels, groups, pixels  N, C, G, P; splits: S; rows: N S

BLOCK_C channels and BLOCK_P pixels are a program's tile; SPLITS and WIDTH are S and C / G, rounded up to powers of 2.
"""

from __future__ import annotations

import triton
import triton.language as tl


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
    """y = silu(h) of a tile."""
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
