"""Frozen linear layers held in 8 or 4 bits, as bitsandbytes rounds them: put in by `quantise`, for ``model.base_precision``.

Of bitsandbytes it takes the rounding and its undoing, not the layers. Its 8-bit layer rounds the inputs as well, around the
columns in which any row of the call is large, so that a row's outputs depend on the other rows; its 4-bit layer has a forward
of its own for evaluation. Here a weight is made whole for the product in which it is used, in the forward and once more in the
backward. So the function is that of a linear layer with the rounded weight, and its gradient is exact.
"""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastloop.config import ModelConfig
from fastloop.denoisers.parts import DTYPES

BLOCK = 64  # weights that share a scale in nf4; layers whose inputs are no multiple of it stay as they are
LARGE = 10**9  # parameters from which on a text encoder is held so too: T5, not the CLIPs


def quantisation_problem(precision: str) -> str | None:
    """Say why weights cannot be held in a precision here, with the remedy, or ``None``."""
    if importlib.util.find_spec("bitsandbytes") is None:
        return f"{precision} needs bitsandbytes: pip install fastloop[bnb], or set it to null"
    return None


class QuantisedLinear(nn.Linear):
    """A linear layer that is not trained and whose weight is held in int8 or nf4.

    Attributes:
        weight: int8: (out, in), with a scale for each output, or (out, in / 2) with two numbers of 4 bits in each byte.
        scales: of these, float32 (out, 1) or (out, in / 64), as int32 of the same bits: no cast of the module rounds them.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Return x W' + b, of (..., C), in the dtype of x."""
        output = _Linear.apply(x.reshape(-1, x.shape[-1]), self.weight, self.scales, self.bias)
        return output.view(*x.shape[:-1], -1)


class _Linear(torch.autograd.Function):
    """The same operators with gradients and without. For the backward it keeps the weight as it is held."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight, scales)
        ctx.width = x.shape[-1]
        return F.linear(x, whole(weight, scales, ctx.width, x.dtype), bias)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad[0]
        return gradient @ whole(*ctx.saved_tensors, ctx.width, gradient.dtype) if needed else None, None, None, None


def whole(weight: Tensor, scales: Tensor | None, width: int, dtype: torch.dtype) -> Tensor:
    """Return a weight as (out, in) in a dtype, of a layer with ``width`` inputs; as it is where it has no scales."""
    if scales is None:
        return weight
    scales = scales.view(torch.float32)
    if weight.shape[1] == width:
        return weight.to(dtype).mul_(scales * (1 / 127))
    packed, shape = weight.view(torch.uint8), [len(weight), width]
    return torch.ops.bitsandbytes.dequantize_4bit(packed, scales.flatten(), BLOCK, "nf4", shape, dtype)


def quantise_parts(config: ModelConfig, device: torch.device, network: nn.Module, text_encoders: dict[str, nn.Module]) -> None:
    """Hold the network and large text encoders as ``model.base_precision`` says, on a device."""
    if config.base_precision is None:
        return
    large = [encoder for encoder in text_encoders.values() if sum(p.numel() for p in encoder.parameters()) >= LARGE]
    for part in (network, *large):
        quantise(part, config.base_precision, DTYPES[config.dtype], device)


def quantise(module: nn.Module, precision: str, dtype: torch.dtype, device: torch.device) -> None:
    """Hold the linear layers of a module in ``int8`` or ``nf4``, on a device, one after the other; they change their class.

    Layers in another dtype, which a model keeps out of half precision, stay as they are, and so do convolutions, norms,
    embeddings and the layers that `BLOCK` does not divide.
    """
    import bitsandbytes  # noqa: F401  its operators are then known to PyTorch

    for layer in module.modules():
        if type(layer) is nn.Linear and layer.weight.dtype == dtype and layer.in_features % BLOCK == 0:
            held, scales = _rounded(layer.weight.detach().to(device), precision)
            layer.weight = nn.Parameter(held, requires_grad=False)
            layer.scales = nn.Parameter(scales.view(len(held), -1).view(torch.int32), requires_grad=False)
            layer.__class__ = QuantisedLinear


def _rounded(weight: Tensor, precision: str) -> tuple[Tensor, Tensor]:
    """The held weight (out, ...) and its float32 scales."""
    if precision == "int8":
        return torch.ops.bitsandbytes.int8_vectorwise_quant(weight.half())[:2]
    held, scales = torch.ops.bitsandbytes.quantize_4bit(weight, BLOCK, "nf4", torch.uint8)
    return held.view(torch.int8).view(len(weight), -1), scales  # int8: T5 casts inputs to what other dtypes its weights have


def packed_away(module: nn.Module) -> int:
    """Return by how much the elements of a module's parameters are fewer than its weights, since some are packed."""
    layers = [layer for layer in module.modules() if isinstance(layer, QuantisedLinear)]
    return sum(layer.in_features * layer.out_features - layer.weight.numel() - layer.scales.numel() for layer in layers)
