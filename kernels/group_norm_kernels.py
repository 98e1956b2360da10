"""The Triton kernels of `group_norm`: sums of channels, outputs and gradients, in one program for a group where it fits.

N samples, C channels in G groups, P pixels. All tensors are without gaps:

    x_ptr, y_ptr, dy_ptr, dx_ptr       (N, C, P), float32, bfloat16 or float16; row-major, or (N, P, C) where LAST
    weight_ptr, bias_ptr               (C,), any floating dtype; grad_weight_ptr and grad_bias_ptr of theirs
    mean_ptr, rstd_ptr                 float32 (N, G)
    partial_ptr                        float32 (2, N, STRETCHES, C): two sums for each channel and stretch
    channels, pixels, stretch          C, P, the pixels of a stretch

Grid (G / GROUPS, STRETCHES, N). A program has GROUPS neighbouring groups of WIDTH channels each, BLOCK_C with those that pad
them, and a stretch of pixels, of which it reads BLOCK_P at a time. Several groups in one program make the rows of
channels_last memory long enough for wide loads. With one stretch a program knows its groups' sums by itself; else other
launches write them to ``partial`` before, and each program adds them up. Values of channels are vectors (BLOCK_C,), float32.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _span(WIDTH: tl.constexpr, GROUPS: tl.constexpr, BLOCK_C: tl.constexpr):
    """The program's channels: their places among themselves, in the sample, and which are real."""
    inside = tl.arange(0, BLOCK_C)
    return inside, tl.program_id(0) * (GROUPS * WIDTH) + inside, inside < GROUPS * WIDTH


@triton.jit
def _sample(ptr, channels, pixels):
    """Where the program's sample begins."""
    return ptr + tl.program_id(2).to(tl.int64) * channels * pixels


@triton.jit
def _tile(channel, real, start, channels, pixels, LAST: tl.constexpr, BLOCK_P: tl.constexpr):
    """Offsets in the sample of a tile (BLOCK_C, BLOCK_P) from pixel ``start`` on, and what of it is real."""
    pixel = start + tl.arange(0, BLOCK_P)
    mask = real[:, None] & (pixel < pixels)[None, :]
    if LAST:
        return pixel[None, :] * channels + channel[:, None], mask
    return channel[:, None] * pixels + pixel[None, :], mask


@triton.jit
def _over_groups(value, inside, WIDTH: tl.constexpr, GROUPS: tl.constexpr):
    """For each channel the sum over its group; 0 where it is not real. ``value`` is 0 there too."""
    member = (inside // WIDTH)[None, :] == tl.arange(0, GROUPS)[:, None]
    total = tl.sum(tl.where(member, value[None, :], 0.0), 1)
    return tl.sum(tl.where(member, total[:, None], 0.0), 0)


@triton.jit
def _silu_gradient(h):
    """d silu(h) / d h."""
    s = tl.sigmoid(h)
    return s * (1.0 + h * (1.0 - s))


# --- sums over stretches ----------------------------------------------------------------------------------------------


@triton.jit
def _store_sums(partial_ptr, first, second, channel, real, channels):
    """Write a stretch's two sums of the program's channels."""
    at = (tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)) * channels + channel
    tl.store(partial_ptr + at, first, real)
    tl.store(partial_ptr + tl.num_programs(2) * tl.num_programs(1) * channels + at, second, real)


@triton.jit
def _load_sums(partial_ptr, channel, real, channels, STRETCHES: tl.constexpr):
    """Add up what the stretches' programs have written of the program's channels."""
    at = (tl.program_id(2) * STRETCHES + tl.arange(0, STRETCHES))[:, None] * channels + channel[None, :]
    first = tl.load(partial_ptr + at, real[None, :], 0.0)
    second = tl.load(partial_ptr + tl.num_programs(2) * STRETCHES * channels + at, real[None, :], 0.0)
    return tl.sum(first, 0), tl.sum(second, 0)


@triton.jit
def _input_sums(
    x, channel, real, shift, channels, pixels, stretch, LAST: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr
):
    """Of each channel, over the program's stretch: the sums of x - shift and of its square."""
    first = tl.zeros((BLOCK_C, BLOCK_P), tl.float32)
    second = tl.zeros((BLOCK_C, BLOCK_P), tl.float32)
    begin = tl.program_id(1) * stretch
    for start in range(begin, tl.minimum(begin + stretch, pixels), BLOCK_P):
        at, mask = _tile(channel, real, start, channels, pixels, LAST, BLOCK_P)
        centred = tl.where(mask, tl.load(x + at, mask, 0.0).to(tl.float32) - shift[:, None], 0.0)
        first += centred
        second += centred * centred
    return tl.sum(first, 1), tl.sum(second, 1)


@triton.jit
def _shift(x, channel, real, channels, pixels, LAST: tl.constexpr):
    """The first pixel of each channel: sums are of what x differs from it by, so that a large mean costs no digits."""
    return tl.load(x + (channel if LAST else channel * pixels), real, 0.0).to(tl.float32)


@triton.jit
def _sums(
    x_ptr,
    partial_ptr,
    channels,
    pixels,
    stretch,
    LAST: tl.constexpr,
    WIDTH: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Write the input's sums of a stretch."""
    _, channel, real = _span(WIDTH, GROUPS, BLOCK_C)
    x = _sample(x_ptr, channels, pixels)
    shift = _shift(x, channel, real, channels, pixels, LAST)
    first, second = _input_sums(x, channel, real, shift, channels, pixels, stretch, LAST, BLOCK_C, BLOCK_P)
    _store_sums(partial_ptr, first, second, channel, real, channels)


# --- forward ----------------------------------------------------------------------------------------------------------


@triton.jit
def _forward(
    x_ptr,
    y_ptr,
    partial_ptr,
    mean_ptr,
    rstd_ptr,
    weight_ptr,
    bias_ptr,
    channels,
    pixels,
    stretch,
    eps,
    SILU: tl.constexpr,
    STRETCHES: tl.constexpr,
    LAST: tl.constexpr,
    WIDTH: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Write y = h or silu(h), h = weight (x - mean) / std + bias, of a stretch, and mean and 1 / std of the groups."""
    inside, channel, real = _span(WIDTH, GROUPS, BLOCK_C)
    x, y = _sample(x_ptr, channels, pixels), _sample(y_ptr, channels, pixels)
    shift = _shift(x, channel, real, channels, pixels, LAST)
    if STRETCHES == 1:
        first, second = _input_sums(x, channel, real, shift, channels, pixels, stretch, LAST, BLOCK_C, BLOCK_P)
    else:
        first, second = _load_sums(partial_ptr, channel, real, channels, STRETCHES)
    mean = _over_groups(shift + first / pixels, inside, WIDTH, GROUPS) / WIDTH
    offset = shift - mean  # sum (x - mean)^2 = s2 + 2 o s1 + P o^2
    total = _over_groups(second + offset * (2.0 * first + pixels * offset), inside, WIDTH, GROUPS)
    rstd = 1.0 / tl.sqrt_rn(tl.maximum(total, 0.0) / (WIDTH * pixels) + eps)
    group = (tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)) * GROUPS + inside // WIDTH
    if tl.program_id(1) == 0:
        tl.store(mean_ptr + group, mean, real & (inside % WIDTH == 0))
        tl.store(rstd_ptr + group, rstd, real & (inside % WIDTH == 0))

    scale = rstd * tl.load(weight_ptr + channel, real, 0.0).to(tl.float32)
    bias = tl.load(bias_ptr + channel, real, 0.0).to(tl.float32)
    begin = tl.program_id(1) * stretch
    for start in range(begin, tl.minimum(begin + stretch, pixels), BLOCK_P):
        at, mask = _tile(channel, real, start, channels, pixels, LAST, BLOCK_P)
        h = (tl.load(x + at, mask, 0.0).to(tl.float32) - mean[:, None]) * scale[:, None] + bias[:, None]
        if SILU:
            h = h * tl.sigmoid(h)
        tl.store(y + at, h.to(y_ptr.dtype.element_ty), mask)


# --- backward ---------------------------------------------------------------------------------------------------------


@triton.jit
def _statistics(mean_ptr, rstd_ptr, weight_ptr, bias_ptr, inside, channel, real, WIDTH: tl.constexpr, GROUPS: tl.constexpr):
    """Of each of the program's channels: mean and 1 / std of its group, weight and bias."""
    group = (tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)) * GROUPS + inside // WIDTH
    mean, rstd = tl.load(mean_ptr + group, real, 0.0), tl.load(rstd_ptr + group, real, 0.0)
    weight = tl.load(weight_ptr + channel, real, 0.0).to(tl.float32)
    return mean, rstd, weight, tl.load(bias_ptr + channel, real, 0.0).to(tl.float32)


@triton.jit
def _normalised(dy, x, at, mask, mean, rstd, weight, bias, SILU: tl.constexpr):
    """Of a tile: xhat = (x - mean) / std, and dh, the gradient for h = weight xhat + bias, which is 0 where it is not real."""
    xhat = (tl.load(x + at, mask, 0.0).to(tl.float32) - mean[:, None]) * rstd[:, None]
    dh = tl.load(dy + at, mask, 0.0).to(tl.float32)
    if SILU:
        dh = dh * _silu_gradient(xhat * weight[:, None] + bias[:, None])
    return xhat, dh


@triton.jit
def _output_sums(
    dy,
    x,
    channel,
    real,
    mean,
    rstd,
    weight,
    bias,
    channels,
    pixels,
    stretch,
    SILU: tl.constexpr,
    LAST: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Of each channel, over the program's stretch: the sums of dh and of dh xhat."""
    first = tl.zeros((BLOCK_C, BLOCK_P), tl.float32)
    second = tl.zeros((BLOCK_C, BLOCK_P), tl.float32)
    begin = tl.program_id(1) * stretch
    for start in range(begin, tl.minimum(begin + stretch, pixels), BLOCK_P):
        at, mask = _tile(channel, real, start, channels, pixels, LAST, BLOCK_P)
        xhat, dh = _normalised(dy, x, at, mask, mean, rstd, weight, bias, SILU)
        first += dh
        second += dh * xhat
    return tl.sum(first, 1), tl.sum(second, 1)


@triton.jit
def _gradient_sums(
    dy_ptr,
    x_ptr,
    partial_ptr,
    mean_ptr,
    rstd_ptr,
    weight_ptr,
    bias_ptr,
    channels,
    pixels,
    stretch,
    SILU: tl.constexpr,
    LAST: tl.constexpr,
    WIDTH: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Write the gradient's sums of a stretch."""
    inside, channel, real = _span(WIDTH, GROUPS, BLOCK_C)
    mean, rstd, weight, bias = _statistics(mean_ptr, rstd_ptr, weight_ptr, bias_ptr, inside, channel, real, WIDTH, GROUPS)
    dy, x = _sample(dy_ptr, channels, pixels), _sample(x_ptr, channels, pixels)
    first, second = _output_sums(
        dy, x, channel, real, mean, rstd, weight, bias, channels, pixels, stretch, SILU, LAST, BLOCK_C, BLOCK_P
    )
    _store_sums(partial_ptr, first, second, channel, real, channels)


@triton.jit
def _gradient(
    dy_ptr,
    x_ptr,
    dx_ptr,
    partial_ptr,
    mean_ptr,
    rstd_ptr,
    weight_ptr,
    bias_ptr,
    channels,
    pixels,
    stretch,
    PARAMETERS: tl.constexpr,
    SILU: tl.constexpr,
    STRETCHES: tl.constexpr,
    LAST: tl.constexpr,
    WIDTH: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Write dx = (weight dh - mean(weight dh) - xhat mean(weight dh xhat)) / std of a stretch.

    Where PARAMETERS and it has the only stretch, also the sums that their gradients are made of.
    """
    inside, channel, real = _span(WIDTH, GROUPS, BLOCK_C)
    mean, rstd, weight, bias = _statistics(mean_ptr, rstd_ptr, weight_ptr, bias_ptr, inside, channel, real, WIDTH, GROUPS)
    dy, x, dx = _sample(dy_ptr, channels, pixels), _sample(x_ptr, channels, pixels), _sample(dx_ptr, channels, pixels)
    if STRETCHES == 1:
        first, second = _output_sums(
            dy, x, channel, real, mean, rstd, weight, bias, channels, pixels, stretch, SILU, LAST, BLOCK_C, BLOCK_P
        )
        if PARAMETERS:
            _store_sums(partial_ptr, first, second, channel, real, channels)
    else:
        first, second = _load_sums(partial_ptr, channel, real, channels, STRETCHES)
    first = _over_groups(weight * first, inside, WIDTH, GROUPS) / (WIDTH * pixels)
    second = _over_groups(weight * second, inside, WIDTH, GROUPS) / (WIDTH * pixels)
    begin = tl.program_id(1) * stretch
    for start in range(begin, tl.minimum(begin + stretch, pixels), BLOCK_P):
        at, mask = _tile(channel, real, start, channels, pixels, LAST, BLOCK_P)
        xhat, dh = _normalised(dy, x, at, mask, mean, rstd, weight, bias, SILU)
        value = rstd[:, None] * (weight[:, None] * dh - first[:, None] - xhat * second[:, None])
        tl.store(dx + at, value.to(dx_ptr.dtype.element_ty), mask)


@triton.jit
def _parameter_gradients(
    partial_ptr, grad_weight_ptr, grad_bias_ptr, channels, rows, ROWS: tl.constexpr, BLOCK_C: tl.constexpr
):
    """Sums over samples and stretches, N STRETCHES ``rows``: of dh xhat for the weight, of dh for the bias."""
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
