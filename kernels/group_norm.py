"""``group_norm`` and ``group_norm_silu``: group normalisation, with or without the SiLU after it, forward and backward.

One launch each way where a group has at most ``FITS`` elements, as all of SD's and SDXL's UNets have: a program reads its
groups twice, first for their sums, then for the output. Larger groups, a VAE's, are divided into ``STRETCHES`` stretches of
pixels, whose sums take a launch of their own. In the backward dh = dy silu'(h) of h = weight xhat + bias is computed again
from x; its sums over channels make up the gradients of weight and bias as well, in one more launch where they are wanted.

Every sum has a fixed order, which depends on a sample's shape and memory layout alone: no atomics, and nothing is chosen by
the number of samples, or rollout and update would round differently. Row-major and channels_last.

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
from .group_norm_kernels import _forward, _gradient, _gradient_sums, _parameter_gradients, _sums

TILE = 8192  # elements of a tile of channels x pixels, which a program reads at a time
FITS = 2**19  # elements of a group that one program goes through; the largest of SDXL's at 1,024 pixels has 491,520
STRETCHES = 16  # of pixels, where a group has more
ROW, VECTOR = 32, 8  # elements of a row of channels_last memory: at least, and a multiple of, 16 bytes in half precision

WARPS = {"num_warps": 16, **FUSION}


def _division(x: Tensor, groups: int) -> tuple[tuple[int, int, int], int, dict]:
    """Divide a dense x among programs: the grid, the pixels of a stretch, and the kernels' constants."""
    samples, channels = x.shape[:2]
    width, pixels, last = channels // groups, x[0, 0].numel(), not x.is_contiguous()
    together = 1  # groups of a program
    while last and (together * width % VECTOR or together * width < ROW) and groups % (2 * together) == 0:
        together *= 2
    block_c = triton.next_power_of_2(together * width)
    block_p = min(max(1, TILE // block_c), triton.next_power_of_2(pixels))
    stretches = 1 if width * pixels <= FITS else STRETCHES
    stretch = triton.cdiv(triton.cdiv(pixels, stretches), block_p) * block_p
    constants = {"LAST": last, "WIDTH": width, "GROUPS": together, "BLOCK_C": block_c, "BLOCK_P": block_p}
    return (groups // together, stretches, samples), stretch, constants | WARPS


def _dense(x: Tensor) -> Tensor:
    """x in a memory layout that the kernels read: row-major, or with its channels last."""
    return x if x.is_contiguous() or x.movedim(1, -1).is_contiguous() else x.contiguous()


def _like(tensor: Tensor, x: Tensor) -> Tensor:
    """``tensor`` in the memory layout of the dense ``x``."""
    return tensor.contiguous() if x.is_contiguous() else tensor.movedim(1, -1).contiguous().movedim(-1, 1)


@gaussian.operator("fastloop::group_norm")
def _group_norm(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float, silu: bool) -> tuple[Tensor, Tensor, Tensor]:
    x, weight, bias = _dense(x), weight.contiguous(), bias.contiguous()
    (samples, channels), pixels = x.shape[:2], x[0, 0].numel()
    grid, stretch, constants = _division(x, groups)
    stretches = grid[1]
    y = torch.empty_like(x)
    mean, rstd = (x.new_empty(samples, groups, dtype=torch.float32) for _ in range(2))
    partial = None
    if stretches > 1:
        partial = x.new_empty(2, samples, stretches, channels, dtype=torch.float32)
        _sums[grid](x, partial, channels, pixels, stretch, **constants)
    _forward[grid](
        x, y, partial, mean, rstd, weight, bias, channels, pixels, stretch, eps, SILU=silu, STRETCHES=stretches, **constants
    )
    return y, mean, rstd


@_group_norm.register_fake
def _(x, groups, weight, bias, eps, silu):
    statistics = x.new_empty(x.shape[0], groups, dtype=torch.float32)
    return torch.empty_like(_dense(x)), statistics, torch.empty_like(statistics)


@gaussian.operator("fastloop::group_norm_backward")
def _group_norm_backward(
    dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, groups: int, weight: Tensor, bias: Tensor, silu: bool, parameters: bool
) -> tuple[Tensor, Tensor, Tensor]:
    x, weight, bias = _dense(x), weight.contiguous(), bias.contiguous()
    dy = _like(dy, x)
    (samples, channels), pixels = x.shape[:2], x[0, 0].numel()
    grid, stretch, constants = _division(x, groups)
    stretches = grid[1]
    dx = torch.empty_like(x)
    partial = None
    if stretches > 1 or parameters:
        partial = x.new_empty(2, samples, stretches, channels, dtype=torch.float32)
    if stretches > 1:
        _gradient_sums[grid](dy, x, partial, mean, rstd, weight, bias, channels, pixels, stretch, SILU=silu, **constants)
    _gradient[grid](
        dy,
        x,
        dx,
        partial,
        mean,
        rstd,
        weight,
        bias,
        channels,
        pixels,
        stretch,
        PARAMETERS=parameters,
        SILU=silu,
        STRETCHES=stretches,
        **constants,
    )
    grad_weight, grad_bias = torch.empty_like(weight), torch.empty_like(bias)
    if parameters:
        _parameter_gradients[(triton.cdiv(channels, 32),)](
            partial, grad_weight, grad_bias, channels, samples * stretches, ROWS=32, BLOCK_C=32, **FUSION
        )
    return dx, grad_weight, grad_bias


@_group_norm_backward.register_fake
def _(dy, x, mean, rstd, groups, weight, bias, silu, parameters):
    return torch.empty_like(_dense(x)), weight.new_empty(weight.shape), bias.new_empty(bias.shape)


def _setup_context(ctx, inputs, output):
    x, groups, weight, bias, _, silu = inputs
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, bias, mean, rstd)
    ctx.groups, ctx.silu = groups, silu


def _backward(ctx, dy, *_):
    if dy is None:
        return (None,) * 6
    x, weight, bias, mean, rstd = ctx.saved_tensors
    needed = ctx.needs_input_grad
    parameters = needed[2] or needed[3]
    dx, grad_weight, grad_bias = _group_norm_backward(dy, x, mean, rstd, ctx.groups, weight, bias, ctx.silu, parameters)
    return dx, None, grad_weight if needed[2] else None, grad_bias if needed[3] else None, None, None


_group_norm.register_autograd(_backward, setup_context=_setup_context)


def group_norm(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Compute group_norm(x), as ``reference.group_norm``; the launches are said in the module.

    Args:
        x: (N, C, ...), row-major or channels_last, float32, bfloat16 or float16; computed in float32.
        weight, bias: (C,), any floating dtype.

    Returns:
        The shape, dtype and memory layout of ``x``.

    Raises:
        ValueError: an argument has the wrong shape, dtype or device.
    """
    return _checked(x, groups, weight, bias, eps, silu=False)


def group_norm_silu(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Compute silu(group_norm(x)), as ``reference.group_norm_silu``; the rest is as of `group_norm`."""
    return _checked(x, groups, weight, bias, eps, silu=True)


def _checked(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float, silu: bool) -> Tensor:
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
    return _group_norm(x, groups, weight, bias, float(eps), silu)[0]
