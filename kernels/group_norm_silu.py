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
from torch import Tensor

from . import gaussian
from .gaussian import FUSION
from .group_norm_kernels import _gradient, _gradient_means, _gradient_sums, _output, _parameter_gradients, _statistics, _sums

TILE = 4096  # elements of a program's tile of channels x pixels
MOST_SPLITS = 64  # stretches of pixels: the second stage holds their sums for a group at once

WARPS = {"num_warps": 8, **FUSION}


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
    """Compute silu(group_norm(x)), as ``reference.group_norm_silu``; three launches, the backward three or four.

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
