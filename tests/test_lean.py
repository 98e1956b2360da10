"""The modules that launch less: the results of peft's and diffusers', their names, and when theirs stay."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from diffusers.models.attention_processor import Attention
from peft import LoraConfig
from peft.tuners import lora
from torch import nn

from fastloop.config import EngineConfig
from fastloop.denoisers import load_denoiser
from fastloop.denoisers.lean import FrozenConv, LeanAttention, LeanResnet, LeanTransformer, lighten, lighten_parts
from fastloop.denoisers.lora import LoraLinear, project
from fastloop.denoisers.unet import FlashAttention

CPU = torch.device("cpu")
EVERYWHERE = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"]
KINDS = {FrozenConv, LoraLinear, LeanAttention, LeanResnet, LeanTransformer}


@pytest.fixture(params=["tiny_sd", "tiny_sdxl"])
def denoiser(request, make_config):
    """With adapters that do something, and nothing put in yet."""
    return trained(make_config(model=model(request.getfixturevalue(request.param))))


def model(path: str, **lora) -> dict:
    return {"path": path, "lora": {"rank": 3, "alpha": 5, "target_modules": EVERYWHERE, **lora}}


def trained(config):
    denoiser = load_denoiser(config.model, CPU)
    denoiser.train_adapter(False, seed=0)
    g = torch.Generator().manual_seed(1)
    for p in denoiser.trainable().values():
        p.data = 0.3 * torch.randn(p.shape, generator=g)
    denoiser.sampling = config.sampling
    return denoiser


def step(denoiser, gradients: bool = True) -> dict[str, torch.Tensor]:
    """The outputs of `predict` and all gradients."""
    g = torch.Generator().manual_seed(2)
    x, t = torch.randn(3, *denoiser.latent_shape(None, None), generator=g), torch.tensor([1, 400, 900])
    with torch.set_grad_enabled(gradients):
        texts = denoiser.encode(["a cat", "two dogs", "a"], denoiser.sampling)
        with_prompt, without = denoiser.predict(x, t, *texts)
    found = {"with": with_prompt.detach(), "without": without.detach()}
    if gradients:
        trainable = denoiser.trainable()
        loss = with_prompt.square().sum() + without.sum()
        found |= dict(zip(trainable, torch.autograd.grad(loss, list(trainable.values())), strict=True))
    return found


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def close(one: dict, other: dict) -> bool:
    """To 3e-5 of each tensor's largest value: rounding of a whole network in float32."""
    return one.keys() == other.keys() and all(
        (value - other[name]).abs().max() <= 3e-5 * value.abs().max() for name, value in one.items()
    )


def test_outputs_gradients_and_names_are_those_of_stock_modules(denoiser):
    stock, names = step(denoiser), denoiser.network.state_dict().keys()
    count = lighten(denoiser.network)
    layers = [module for module in denoiser.network.modules() if isinstance(module, lora.Linear)]
    assert count > len(layers) > 20 and all(type(layer) is LoraLinear for layer in layers)
    assert {type(module) for module in denoiser.network.modules()} >= KINDS
    assert close(stock, step(denoiser))
    assert denoiser.network.state_dict().keys() == names
    assert lighten(denoiser.network) == 0  # all is done already


def test_frozen_convolutions_keep_no_input_and_give_the_same_bits(denoiser):
    def saved() -> tuple[dict, int]:
        kept = {}
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.setdefault(x.data_ptr(), x.nbytes) and x, lambda x: x):
            found = step(denoiser)
        return found, sum(kept.values())

    def convolutions() -> list[nn.Module]:
        return [module for module in denoiser.network.modules() if isinstance(module, nn.Conv2d)]

    inputs = []
    for module in convolutions():
        module.register_forward_pre_hook(lambda _, args: inputs.append(args[0].nbytes))
    stock, before = saved()
    assert {type(module) for module in convolutions()} == {nn.Conv2d}
    inputs.clear()
    for module in convolutions():
        module.__class__ = FrozenConv
    frozen, after = saved()
    assert same(stock, frozen)
    assert before - after > sum(inputs) / 2  # of the others a norm before or beside the convolution keeps them


def test_gradients_do_not_change_a_bit_of_the_outputs(denoiser):
    lighten(denoiser.network)
    with_gradients, without = step(denoiser), step(denoiser, gradients=False)
    assert all(torch.equal(with_gradients[name], value) for name, value in without.items())


def test_without_adapters_it_is_the_base_model(denoiser):
    with denoiser.reference():
        base = step(denoiser, gradients=False)
        lighten(denoiser.network)
        assert close(base, step(denoiser, gradients=False))
    assert not close(base, step(denoiser, gradients=False))


def test_checkpointed_blocks_give_the_same_gradients(denoiser):
    lighten(denoiser.network)
    plain = step(denoiser)
    denoiser.network.enable_gradient_checkpointing()
    assert same(plain, step(denoiser))


def test_adapters_on_some_of_the_layers(tiny_sd, make_config):
    denoiser = trained(make_config(model=model(tiny_sd, target_modules=["attn1.to_q", "to_v", "conv1"])))
    stock = step(denoiser)
    lighten(denoiser.network)
    assert any(type(module) is lora.Conv2d for module in denoiser.network.modules())
    assert close(stock, step(denoiser))


def test_text_encoders(tiny_sd, make_config):
    denoiser = trained(make_config(model=model(tiny_sd, text_encoders=True)))
    stock = step(denoiser)
    lighten_parts(denoiser, EngineConfig())
    assert any(type(module) is LoraLinear for module in denoiser.text_encoders["text_encoder"].modules())
    assert close(stock, step(denoiser))


def test_zero_3_keeps_stock_modules_whose_weights_it_gathers(tiny_sd, make_config):
    denoiser = trained(make_config(model=model(tiny_sd)))
    lighten_parts(denoiser, EngineConfig(name="deepspeed", zero_stage=3))
    assert KINDS.isdisjoint(type(module) for module in denoiser.network.modules())


def test_another_attention_backend_keeps_its_processor(tiny_sd, make_config):
    denoiser = trained(make_config(model=model(tiny_sd)))
    lighten(denoiser.network)
    calls = []
    with mock.patch.object(FlashAttention, "__call__", lambda self, attn, x, **_: calls.append(attn) or x):
        denoiser.set_attention("flash")
        step(denoiser, gradients=False)
    assert len(calls) == sum(isinstance(module, Attention) for module in denoiser.network.modules())


def small(**of_lora) -> nn.Module:
    """A module with one LoRA layer, ``layer``, 6 to 4 channels."""
    from peft import inject_adapter_in_model

    module = nn.Module()
    module.layer = nn.Linear(6, 4)
    module.requires_grad_(False)
    return inject_adapter_in_model(LoraConfig(r=2, target_modules=["layer"], init_lora_weights=False, **of_lora), module)


@pytest.mark.parametrize("other", [{"lora_dropout": 0.1}, {"use_dora": True}, {"lora_bias": True}])
def test_what_is_no_plain_adapter_keeps_pefts_forward(other):
    module = small(**other)
    assert lighten(module) == 0 and type(module.layer) is lora.Linear


def test_a_base_layer_that_is_trained_keeps_pefts_forward():
    module = small()
    module.layer.base_layer.weight.requires_grad_(True)
    assert lighten(module) == 0


def test_merged_and_switched_off_it_is_pefts():
    module, x = small(), torch.randn(3, 5, 6)
    stock = module.layer(x)
    assert lighten(module) == 1
    assert torch.allclose(module.layer(x), stock, atol=1e-6)
    module.layer.merge()
    assert torch.allclose(module.layer(x), stock, atol=1e-6)
    module.layer.unmerge()
    module.layer.enable_adapters(False)
    assert torch.equal(module.layer(x), module.layer.base_layer(x))


@pytest.mark.parametrize("count", [1, 3])
def test_gradients_of_layers_with_one_input_are_those_of_finite_differences(count):
    layers = [small(lora_alpha=3, use_rslora=i == 1).double().layer for i in range(count)]
    x = torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True)
    stock = [layer(x) for layer in layers]
    for layer in layers:
        assert lighten(layer) == 1
    assert all(torch.allclose(a, b, atol=1e-13) for a, b in zip(project(x, *layers), stock, strict=True))
    weights = [p for layer in layers for p in layer.parameters() if p.requires_grad]
    assert len(weights) == 2 * count and torch.autograd.gradcheck(lambda x, *_: project(x, *layers), (x, *weights))
    assert torch.autograd.gradcheck(lambda *_: project(x.detach(), *layers), weights)


def test_a_layer_computes_in_the_dtype_of_its_input_and_trains_float32_weights():
    module, x = small().to(torch.bfloat16), torch.randn(3, 6, dtype=torch.bfloat16)
    layer = module.layer
    weights = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    for weight in weights:
        weight.data = weight.data.float()
    lighten(module)
    output = layer(x)
    gradients = torch.autograd.grad(output.float().sum(), weights)
    assert output.dtype == torch.bfloat16 and all(g.dtype == torch.float32 for g in gradients)


def test_layers_of_one_input_save_it_once_and_one_thin_product(denoiser):
    """And nothing is added up for the gradient of the input: products accumulate into it."""
    lighten(denoiser.network)
    (attention, *_) = (m for m in denoiser.network.modules() if isinstance(m, LeanAttention))
    width = attention.to_q.in_features
    x, kept = torch.randn(2, 5, width, requires_grad=True), set()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.add(tuple(t.shape)) or t, lambda t: t):
        attention(x)
    assert (2 * 5, width) in kept and (2 * 5, 3 * 3) in kept
