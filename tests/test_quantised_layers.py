"""Layers held in 8 and 4 bits: what they round to, and that the rest is as with whole ones."""

from __future__ import annotations

import pytest
import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from torch import nn

from fastloop.denoisers.quantised import QuantisedLinear, quantise, whole

CPU = torch.device("cpu")
PRECISIONS = ["int8", "nf4"]
# Of a weight, in parts of its scale: half a step of int8, with the rounding to fp16 before, and half of nf4's widest gap.
BOUND = {"int8": 0.5 / 127 + 2**-11, "nf4": 0.1520}


def layer(width: int = 128, outputs: int = 24, dtype=torch.float32) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(width, outputs).to(dtype).requires_grad_(False)


def held(like: nn.Linear, precision: str) -> QuantisedLinear:
    model = nn.Sequential(nn.Linear(like.in_features, like.out_features))
    model[0].load_state_dict(like.state_dict())
    model.to(like.weight.dtype).requires_grad_(False)
    quantise(model, precision, like.weight.dtype, CPU)
    return model[0]


def dequantised(of: QuantisedLinear, dtype=None) -> torch.Tensor:
    return whole(of.weight, of.scales, of.in_features, dtype or torch.float32).detach()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_weights_are_those_of_bitsandbytes_and_near_the_given_ones(precision, dtype):
    given, x = layer(dtype=dtype), torch.eye(128, dtype=dtype)
    ours = held(given, precision)
    if precision == "int8":
        theirs = Linear8bitLt(128, 24, has_fp16_weights=False)
    else:
        theirs = Linear4bit(128, 24, compute_dtype=dtype, quant_type="nf4", compress_statistics=False)
    theirs.load_state_dict(given.state_dict())
    theirs = theirs.to(dtype=dtype).to("cpu").train()  # the mode in which its forward on a CPU rounds no inputs
    assert torch.equal(ours(x), theirs(x))
    assert torch.equal(whole(ours.weight, ours.scales, 128, dtype).t() + given.bias, ours(x))
    scales = ours.scales.view(torch.float32).repeat_interleave(128 // ours.scales.shape[1], 1)
    rounding = 0 if dtype == torch.float32 else 2**-8
    error = (dequantised(ours, dtype).float() - given.weight.float()).abs()
    assert error.max() > 0 and (error <= (BOUND[precision] + rounding) * scales).all()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_no_row_depends_on_another(precision):
    """In bitsandbytes' own 8-bit layer a large value in one row takes its column out of the rounding of all inputs."""
    ours, x = held(layer(), precision), torch.randn(5, 3, 128)
    other = x.clone()
    other[1:, :, 7] = 1e3
    assert torch.equal(ours(x)[0], ours(other)[0])


@pytest.mark.parametrize("precision", PRECISIONS)
def test_casts_leave_what_is_held_and_compiled_code_gives_the_same(precision):
    ours, x = held(layer(), precision), torch.randn(5, 128, requires_grad=True)
    before = dequantised(ours)
    for cast in (nn.Module.half, nn.Module.bfloat16, nn.Module.float):
        assert torch.equal(dequantised(cast(nn.Sequential(ours))[0]), before)
    again = held(layer(), precision)
    compiled = torch.compile(again, backend="aot_eager", fullgraph=True)
    (wanted,) = torch.autograd.grad(again(x).square().sum(), x)
    (found,) = torch.autograd.grad(compiled(x).square().sum(), x)
    assert torch.equal(compiled(x), again(x)) and torch.equal(found, wanted)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_gradients_of_layers_are_those_of_the_rounded_weights_and_no_whole_weight_is_kept(precision):
    ours, x = held(layer(), precision), torch.randn(5, 3, 128, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        (found,) = torch.autograd.grad(ours(x).square().sum(), x)
    (wanted,) = torch.autograd.grad(nn.functional.linear(x, dequantised(ours), ours.bias).square().sum(), x)
    torch.testing.assert_close(found, wanted)
    assert not any(t.is_floating_point() and t.shape == (24, 128) for t in saved)
