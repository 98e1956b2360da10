"""``geglu``: the gated linear unit of a transformer's feed-forward, hidden * gelu(gate), fused, forward and backward.

Saved for the backward: the projection alone, which is the input; stock modules keep gelu(gate) and both halves' products too.
Memory traffic per output element of size s: forward reads 2 s and writes s, backward reads 3 s and writes 2 s.

Parameters of the kernels: projected_ptr and grad_ptr point to (rows, 2 inner), y_ptr and dy_ptr to (rows, inner), contiguous
and of one dtype, float32, bfloat16 or float16. ``size`` is rows x inner, of which a program takes BLOCK. WIDE: 64-bit offsets.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import gaussian
from .gaussian import FUSION

BLOCK = 1024


@triton.jit
def _places(size, inner, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    """Of a block of outputs: their places, those of their hidden values (the gates stand ``inner`` further), what is real."""
    start = tl.program_id(0)
    if WIDE:
        start = start.to(tl.int64)
    at = start * BLOCK + tl.arange(0, BLOCK)
    return at, at // inner * (2 * inner) + at % inner, at < size


@triton.jit
def _normal_cdf(x):
    """Phi(x), float32."""
    return 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit
def _forward(projected_ptr, y_ptr, size, inner, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    """hidden * gelu(gate) of a block of outputs, computed in float32."""
    at, hidden_at, mask = _places(size, inner, BLOCK, WIDE)
    hidden = tl.load(projected_ptr + hidden_at, mask, 0.0).to(tl.float32)
    gate = tl.load(projected_ptr + hidden_at + inner, mask, 0.0).to(tl.float32)
    tl.store(y_ptr + at, (hidden * gate * _normal_cdf(gate)).to(y_ptr.dtype.element_ty), mask)


@triton.jit
def _gradient(dy_ptr, projected_ptr, grad_ptr, size, inner, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    """gelu(g) = g Phi(g), gelu'(g) = Phi(g) + g phi(g)."""
    at, hidden_at, mask = _places(size, inner, BLOCK, WIDE)
    hidden = tl.load(projected_ptr + hidden_at, mask, 0.0).to(tl.float32)
    gate = tl.load(projected_ptr + hidden_at + inner, mask, 0.0).to(tl.float32)
    dy = tl.load(dy_ptr + at, mask, 0.0).to(tl.float32)
    cdf = _normal_cdf(gate)
    density = 0.3989422804014327 * tl.exp(-0.5 * gate * gate)
    tl.store(grad_ptr + hidden_at, (dy * gate * cdf).to(grad_ptr.dtype.element_ty), mask)
    tl.store(grad_ptr + hidden_at + inner, (dy * hidden * (cdf + gate * density)).to(grad_ptr.dtype.element_ty), mask)


@gaussian.operator("fastloop::geglu")
def _geglu(projected: Tensor) -> Tensor:
    projected = projected.contiguous()
    inner = projected.shape[-1] // 2
    y = projected.new_empty(*projected.shape[:-1], inner)
    wide = projected.numel() >= 2**31
    _forward[(triton.cdiv(y.numel(), BLOCK),)](projected, y, y.numel(), inner, BLOCK=BLOCK, WIDE=wide, **FUSION)
    return y


@_geglu.register_fake
def _(projected):
    return projected.new_empty(*projected.shape[:-1], projected.shape[-1] // 2)


@gaussian.operator("fastloop::geglu_backward")
def _geglu_backward(dy: Tensor, projected: Tensor) -> Tensor:
    dy, projected = dy.contiguous(), projected.contiguous()
    grad = torch.empty_like(projected)
    wide = projected.numel() >= 2**31
    _gradient[(triton.cdiv(dy.numel(), BLOCK),)](
        dy, projected, grad, dy.numel(), dy.shape[-1], BLOCK=BLOCK, WIDE=wide, **FUSION
    )
    return grad


@_geglu_backward.register_fake
def _(dy, projected):
    return projected.new_empty(projected.shape)


def _backward(ctx, dy):
    return _geglu_backward(dy, *ctx.saved_tensors)


_geglu.register_autograd(_backward, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs))


def geglu(projected: Tensor) -> Tensor:
    """Compute hidden * gelu(gate) of the halves of the last dimension, as ``reference.geglu``; one launch each way.

    Args:
        projected: (..., 2 I), float32, bfloat16 or float16; computed in float32.

    Returns:
        (..., I), of its dtype.

    Raises:
        ValueError: an odd or empty last dimension, or the wrong dtype or device.
    """
    if projected.dim() == 0 or projected.shape[-1] % 2 or projected.numel() == 0:
        raise ValueError(f"projected: shape {tuple(projected.shape)}: expected an even last dimension, not empty")
    gaussian.check_model_dtype("projected", projected)
    return _geglu(projected)
