"""LoRA's forward and backward with fewer operators than peft's, put in place by `lean.lighten`.

Linear layers with the same input, as q, k and v of a self-attention, share their thin product, x A', and its gradients.
"""

from __future__ import annotations

import torch
from peft.tuners import lora
from torch import Tensor, nn
from torch.nn import functional as F

from fastloop.denoisers.quantised import QuantisedLinear, whole


class LoraLinear(lora.Linear):
    """peft's linear layer with one plain adapter on a frozen layer: no casts, no dropout, and no multiplication by 1."""

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        """Return x W' + b + scaling x A' B', of (..., C)."""
        if args or kwargs or not self.takes(x):
            return super().forward(x, *args, **kwargs)
        return low_rank(x, [self])[0]

    def takes(self, x: Tensor) -> bool:
        """Say whether the adapter is on, and all is computed in the dtype of x."""
        on = not self.disable_adapters and not self.merged and len(self.active_adapters) == 1
        alike = isinstance(self.base_layer, QuantisedLinear) or self.base_layer.weight.dtype == x.dtype
        return on and alike and not torch.is_autocast_enabled(x.device.type)


def project(x: Tensor, *layers: nn.Module) -> list[Tensor]:
    """Return the outputs of layers that have the same input, (..., C)."""
    own = [layer for layer in layers if isinstance(layer, LoraLinear) and layer.takes(x)]
    outputs = dict(zip(own, low_rank(x, own), strict=True)) if own else {}
    return [outputs[layer] if layer in outputs else layer(x) for layer in layers]


def low_rank(x: Tensor, layers: list[LoraLinear]) -> list[Tensor]:
    """Return the outputs of layers with adapters on, which have the same input, (..., C)."""
    scalings, weights = [], []
    for layer in layers:
        (adapter,) = layer.active_adapters
        thin = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
        scalings.append(layer.scaling[adapter])
        base = layer.base_layer
        weights += [base.weight, getattr(base, "scales", None), base.bias, *(weight.to(x.dtype) for weight in thin)]
    outputs = _LowRank.apply(x.reshape(-1, x.shape[-1]), scalings, *weights)
    return [output.view(*x.shape[:-1], -1) for output in outputs]


class _LowRank(torch.autograd.Function):
    """Takes x (N, C), and for each layer a scaling and the tensors W, scales or None, b or None, A and B.

    The last two are trained. W with scales is held as `QuantisedLinear` does, and is whole only while it is multiplied.
    With and without gradients it is the same code, so that the policy that is trained is the one that sampled, bit for bit.
    """

    @staticmethod
    def forward(ctx, x: Tensor, scalings: list[float], *weights: Tensor | None) -> tuple[Tensor, ...]:
        bases, scales, biases, downs, ups = (weights[i::5] for i in range(5))
        down = torch.cat(downs) if len(downs) > 1 else downs[0]
        thin = F.linear(x, down)
        held = zip(bases, scales, biases, strict=True)
        outputs = tuple(F.linear(x, whole(*base, x.shape[1], x.dtype), bias) for *base, bias in held)
        parts = thin.split([len(a) for a in downs], 1)
        for output, part, up, scaling in zip(outputs, parts, ups, scalings, strict=True):
            output.addmm_(part, up.t(), alpha=scaling)
        ctx.save_for_backward(x, thin, down, *bases, *scales, *ups)
        ctx.scalings, ctx.ranks = scalings, [len(a) for a in downs]
        return outputs

    @staticmethod
    def backward(ctx, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, thin, down, *weights = ctx.saved_tensors
        bases, scales, ups = (weights[i * len(gradients) :][: len(gradients)] for i in range(3))
        for_thin, for_x, for_ups = torch.empty_like(thin), None, []
        thins = zip(thin.split(ctx.ranks, 1), for_thin.split(ctx.ranks, 1), strict=True)
        held = zip(bases, scales, strict=True)
        for g, base, up, scaling, (part, for_part) in zip(gradients, held, ups, ctx.scalings, thins, strict=True):
            for_part.addmm_(g, up, beta=0, alpha=scaling)
            for_ups.append(torch.empty_like(up).addmm_(g.t(), part, beta=0, alpha=scaling))
            if ctx.needs_input_grad[0]:
                weight = whole(*base, x.shape[1], x.dtype)
                for_x = g @ weight if for_x is None else for_x.addmm_(g, weight)
        if for_x is not None:
            for_x.addmm_(for_thin, down)
        for_downs = (for_thin.t() @ x).split(ctx.ranks)
        return for_x, None, *(g for pair in zip(for_downs, for_ups, strict=True) for g in (None, None, None, *pair))


def can_be_ours(layer: nn.Module) -> bool:
    """Say whether a layer is peft's linear one on a frozen linear layer, without dropout, biases or variants of LoRA."""
    if type(layer) is not lora.Linear or type(layer.base_layer) not in (nn.Linear, QuantisedLinear) or layer.lora_variant:
        return False
    undropped = all(isinstance(dropout, nn.Identity) for dropout in layer.lora_dropout.values())
    frozen = not any(p.requires_grad for p in layer.base_layer.parameters())
    return undropped and frozen and not any(layer.lora_bias.values())
