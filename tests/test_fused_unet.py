"""The UNet's fused operators against their twins and float64, and in whole UNets. Interpreted where there is no GPU."""

from __future__ import annotations

import pytest
import torch
from diffusers import Transformer2DModel, UNet2DConditionModel
from diffusers.models.activations import GEGLU
from diffusers.models.resnet import ResnetBlock2D
from step_cases import pairwise
from tiny_pipelines import make_unet, make_vae
from torch.utils.checkpoint import checkpoint

from fastloop.denoisers import build_skeleton, ready_denoiser
from fastloop.kernels import fuse, fused, group_norm, reference
from fastloop.kernels.geglu import _geglu
from fastloop.kernels.unet import FusedGEGLU, FusedGroupNorm, GroupNormSiLU, fuse_network, unfuse
from fastloop.memory.traces import Traced

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# N, C, groups, height, width: odd sizes; channels and groups that are no power of 2; several tiles of pixels
SIZES = [(2, 8, 4, 5, 7), (1, 70, 10, 9, 9), (3, 12, 3, 16, 16), (1, 6, 2, 90, 70)]
ROUNDING = {torch.float32: 3e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def close(got: torch.Tensor, want: torch.Tensor, tolerance: float) -> bool:
    """Within a tolerance relative to the largest value."""
    return bool((got.double() - want.double()).abs().max() <= tolerance * want.double().abs().max())


def norm_case(size, dtype=torch.float32, channels_last=False, mean=3.0, parameters=torch.float32):
    n, c, groups, height, width = size
    g = torch.Generator().manual_seed(0)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x = (2 * torch.randn(n, c, height, width, generator=g) + mean).to(DEVICE, dtype).contiguous(memory_format=layout)
    weight, bias = (torch.randn(c, generator=g).to(DEVICE, parameters) for _ in range(2))
    dy = torch.randn(n, c, height, width, generator=g).to(DEVICE, dtype)
    return x, groups, weight, bias, dy


def normalised(ops, x, groups, weight, bias, dy, eps=1e-5, name="group_norm_silu"):
    """The output and the gradients for x, weight and bias."""
    leaves = [tensor.detach().requires_grad_() for tensor in (x, weight, bias)]
    y = getattr(ops, name)(leaves[0], groups, leaves[1], leaves[2], eps)
    return y.detach(), *torch.autograd.grad(y, leaves, dy)


def in_float64(x, groups, weight, bias, dy, name="group_norm_silu"):
    return normalised(reference, x.double(), groups, weight.double(), bias.double(), dy.double(), name=name)


# --- group norm and SiLU ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "size, dtype, name, channels_last, fits",  # the last: a group is divided into stretches, unless it is small
    pairwise(SIZES, ROUNDING, ("group_norm_silu", "group_norm"), (True, False), (group_norm.FITS, 100)),
)
def test_norms_and_their_gradients_are_those_in_float64(monkeypatch, size, dtype, name, channels_last, fits):
    monkeypatch.setattr(group_norm, "FITS", fits)
    monkeypatch.setattr(group_norm, "STRETCHES", 2)
    case = norm_case(size, dtype, channels_last)
    got = normalised(fused, *case, name=name)
    for value, exact in zip(got, in_float64(*case, name=name), strict=True):
        assert close(value, exact, ROUNDING[dtype])
    y, dx, grad_weight, grad_bias = got
    assert y.dtype == dx.dtype == dtype and grad_weight.dtype == grad_bias.dtype == torch.float32
    assert y.stride() == dx.stride() == case[0].stride()


def test_the_parameters_may_have_another_dtype_than_x():
    case = norm_case(SIZES[0], torch.bfloat16, parameters=torch.bfloat16)
    got = normalised(fused, *case)
    assert all(value.dtype == torch.bfloat16 for value in got)
    assert all(close(value, exact, 2e-2) for value, exact in zip(got, in_float64(*case), strict=True))


def test_a_mean_a_thousand_times_the_deviation_costs_no_digits_that_float32_has():
    case = norm_case((1, 8, 2, 16, 16), mean=2000.0)
    for value, exact in zip(normalised(fused, *case), in_float64(*case), strict=True):
        assert close(value, exact, 1e-3)  # x itself holds its deviation to 6e-5


def test_a_flat_group_stays_finite():
    x = torch.full((1, 4, 3, 3), 7.0, device=DEVICE)
    weight, bias = torch.ones(4, device=DEVICE), torch.full((4,), 0.5, device=DEVICE)
    y, *grads = normalised(fused, x, 2, weight, bias, torch.ones_like(x))
    assert torch.allclose(y, torch.nn.functional.silu(torch.full_like(x, 0.5)), atol=1e-6)
    assert all(g.isfinite().all() for g in grads)


def test_other_shapes_and_layouts():
    g = torch.Generator().manual_seed(0)
    weight, bias = torch.ones(6, device=DEVICE), torch.zeros(6, device=DEVICE)
    for x in (
        torch.randn(2, 6, generator=g),
        torch.randn(2, 6, 5, generator=g),
        torch.randn(2, 6, 3, 4, 5, generator=g),
        torch.randn(2, 6, 8, 9, generator=g).transpose(2, 3),
        torch.randn(2, 6, 8, 9, generator=g)[:, :, ::2],
        torch.randn(2, 5, 6, generator=g).transpose(1, 2),  # as the VAE's attention gives it
    ):
        x = x.to(DEVICE)
        args = (x, 3, weight, bias, 1e-5)
        assert torch.allclose(fused.group_norm_silu(*args), reference.group_norm_silu(*args), atol=2e-6)
    assert fused.group_norm(*args).stride() == x.stride()  # that of the last was not copied


def test_a_gradient_in_another_layout_than_x_is_read_rightly():
    x, groups, weight, bias, dy = norm_case(SIZES[0], channels_last=True)
    assert not dy.is_contiguous(memory_format=torch.channels_last)
    one = normalised(fused, x, groups, weight, bias, dy)
    other = normalised(fused, x, groups, weight, bias, dy.contiguous(memory_format=torch.channels_last))
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_repeats_are_bit_equal_and_a_sample_does_not_depend_on_its_batch():
    x, groups, weight, bias, dy = norm_case(SIZES[2])
    first = normalised(fused, x, groups, weight, bias, dy)
    assert all(torch.equal(a, b) for a, b in zip(first, normalised(fused, x, groups, weight, bias, dy), strict=True))
    y, dx, *_ = normalised(fused, x[1:2], groups, weight, bias, dy[1:2])
    assert torch.equal(y, first[0][1:2]) and torch.equal(dx, first[1][1:2])


def test_only_statistics_are_saved_and_frozen_parameters_get_no_gradients():
    x, groups, weight, bias, dy = norm_case(SIZES[2], torch.bfloat16)
    x.requires_grad_()
    known, kept = {t.untyped_storage().data_ptr() for t in (x, weight, bias)}, []

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in known:
            kept.append(tensor.numel() * tensor.element_size())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = fused.group_norm_silu(x, groups, weight, bias, 1e-5)
    assert sum(kept) == 2 * 4 * len(x) * groups  # mean and 1 / std, float32
    y.backward(dy)
    assert x.grad is not None and weight.grad is None and bias.grad is None


# --- geglu ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("shape", [(3, 10), (2, 7, 514), (1, 5, 2048), (6,)])
def test_gate_and_its_gradients_are_those_in_float64(shape, dtype):
    g = torch.Generator().manual_seed(0)
    projected = (3 * torch.randn(*shape, generator=g)).to(DEVICE, dtype).requires_grad_()
    dy = torch.randn(*shape[:-1], shape[-1] // 2, generator=g).to(DEVICE, dtype)
    y = fused.geglu(projected)
    exact = projected.detach().double().requires_grad_()
    want = reference.geglu(exact)
    assert y.dtype == dtype and close(y, want, ROUNDING[dtype])
    (got,), (grad,) = torch.autograd.grad(y, projected, dy), torch.autograd.grad(want, exact, dy.double())
    assert got.dtype == dtype and close(got, grad, ROUNDING[dtype])


def test_the_gate_saves_its_input_alone():
    projected = torch.randn(4, 64, device=DEVICE, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        fused.geglu(projected)
    assert kept == [projected.data_ptr()]


def test_projections_that_are_not_contiguous():
    wide = torch.randn(3, 4, 40, device=DEVICE)
    for projected in (wide[..., ::2], wide.transpose(0, 1), wide[..., :20]):
        assert torch.allclose(fused.geglu(projected), reference.geglu(projected), atol=1e-6)


# --- contracts --------------------------------------------------------------------------------------------------------


def test_the_operators_keep_torchs_contracts():
    x, groups, weight, bias, _ = norm_case(SIZES[0], channels_last=True)
    parameters = (weight.requires_grad_(), bias.requires_grad_())
    torch.library.opcheck(group_norm._group_norm, (x.requires_grad_(), groups, *parameters, 1e-5, True))
    torch.library.opcheck(_geglu, (torch.randn(3, 10, device=DEVICE, requires_grad=True),))


def test_torch_compile_goes_through_without_a_graph_break():
    x, groups, weight, bias, dy = norm_case(SIZES[0])

    def block(x):
        y = fused.group_norm_silu(2 * x, groups, weight, bias, 1e-5)
        return fused.geglu(y.flatten(2).transpose(1, 2)).sum()

    def run(function):
        leaf = x.detach().requires_grad_()
        return torch.autograd.grad(function(leaf), leaf)[0]

    backend = "inductor" if DEVICE.type == "cuda" else "aot_eager"
    assert torch.allclose(run(torch.compile(block, fullgraph=True, backend=backend)), run(block), atol=1e-6)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda x, w: fused.group_norm_silu(x, 3, w, w, 1e-5), "^groups: 3 does not divide the 4 channels$"),
        (lambda x, w: fused.group_norm_silu(x, 2, w[:3], w, 1e-5), r"^weight: shape \(3,\): expected \(4,\)$"),
        (lambda x, w: fused.group_norm_silu(x, 2, w, w.to("meta"), 1e-5), "^bias: on meta: expected"),
        (lambda x, w: fused.group_norm_silu(x.double(), 2, w, w, 1e-5), "^x: dtype torch.float64: expected float32, bfloat16"),
        (lambda x, w: fused.group_norm_silu(x[:0], 2, w, w, 1e-5), r"^x: shape \(0, 4, 2, 2\): expected"),
        (lambda x, w: fused.geglu(w[:3]), r"^projected: shape \(3,\): expected an even last dimension"),
        (lambda x, w: fused.geglu(w.long()), "^projected: dtype torch.int64: expected float32, bfloat16 or float16$"),
    ],
)
def test_what_the_kernels_would_read_wrongly_is_refused(call, says):
    with pytest.raises(ValueError, match=says):
        call(torch.zeros(1, 4, 2, 2, device=DEVICE), torch.ones(4, device=DEVICE))


# --- in a UNet --------------------------------------------------------------------------------------------------------


def tiny_unet(**changes) -> UNet2DConditionModel:
    torch.manual_seed(0)
    return make_unet(4, cross_attention_dim=16, **changes).to(DEVICE)


def step(unet):
    """The output and every gradient of one forward and backward."""
    g = torch.Generator().manual_seed(1)
    x, text = torch.randn(1, 4, 4, 4, generator=g).to(DEVICE), torch.randn(1, 3, 16, generator=g).to(DEVICE)
    unet.zero_grad()
    output = unet(x, torch.tensor([7], device=DEVICE), text).sample
    output.square().sum().backward()
    return {"output": output.detach()} | {name: p.grad for name, p in unet.named_parameters()}


def test_a_fused_unet_gives_the_outputs_and_gradients_of_the_stock_one_and_goes_back_to_it():
    unet = tiny_unet()
    stock, weights = step(unet), unet.state_dict()
    kinds = [type(module) for module in unet.modules()]
    norms = 2 * sum(isinstance(module, ResnetBlock2D) for module in unet.modules()) + 1
    gates = sum(isinstance(module, GEGLU) for module in unet.modules())
    transformers = sum(isinstance(module, Transformer2DModel) for module in unet.modules())
    assert fuse_network(unet) == norms + gates + transformers
    assert sum(isinstance(m, FusedGroupNorm) for m in unet.modules()) == transformers > 1
    assert sum(isinstance(m, GroupNormSiLU) for m in unet.modules()) == norms > 10
    assert sum(isinstance(m, FusedGEGLU) for m in unet.modules()) == gates > 1
    assert unet.state_dict().keys() == weights.keys()
    fused_step = step(unet)
    for name, value in stock.items():
        assert close(fused_step[name], value, 1e-4), name
    assert fuse_network(unet) == 0  # all is fused already
    unfuse(unet)
    assert [type(module) for module in unet.modules()] == kinds
    again = step(unet)
    assert all(torch.equal(again[name], value) for name, value in stock.items())


def test_a_fused_unet_saves_and_loads_as_a_stock_one(tmp_path):
    unet = tiny_unet()
    fuse_network(unet)
    unet.save_pretrained(tmp_path)
    loaded = UNet2DConditionModel.from_pretrained(tmp_path)
    assert not any(isinstance(module, (GroupNormSiLU, FusedGEGLU)) for module in loaded.modules())
    assert all(torch.equal(loaded.state_dict()[name].to(DEVICE), value) for name, value in unet.state_dict().items())


@pytest.mark.parametrize("changes", [{"resnet_time_scale_shift": "scale_shift"}, {"act_fn": "gelu"}])
def test_blocks_that_do_something_else_stay_as_they_are(changes):
    unet = tiny_unet(**changes)
    fuse_network(unet)
    blocks = [module for module in unet.modules() if isinstance(module, ResnetBlock2D)]
    assert blocks and all(type(block.norm1) is type(block.norm2) is torch.nn.GroupNorm for block in blocks)
    assert all(type(block.nonlinearity) in (torch.nn.SiLU, torch.nn.GELU) for block in blocks)


def test_a_fused_vae_decodes_as_the_stock_one_and_stays_in_channels_last():
    torch.manual_seed(0)
    vae, z, layouts = make_vae(4).to(DEVICE, memory_format=torch.channels_last).eval(), torch.randn(1, 4, 4, 4).to(DEVICE), []
    vae.decoder.conv_out.register_forward_pre_hook(lambda _, args: layouts.append(args[0].stride()[1]))
    with torch.no_grad():
        stock = vae.decode(z).sample
        fuse(vae, "triton", DEVICE)
        fused_output = vae.decode(z).sample
    assert close(fused_output, stock, 1e-4)
    assert not any(type(module) is torch.nn.GroupNorm for module in vae.modules())
    assert type(vae.decoder.mid_block.attentions[0].group_norm) is FusedGroupNorm
    assert layouts[-1] == 1  # from one channel to the next


def test_a_run_and_its_plan_fuse_the_same_modules(make_config):
    config = make_config(kernels="triton")
    run, plan = ready_denoiser(config, DEVICE), build_skeleton(config.model)
    Traced(config, plan, accumulates=False, on_gpu=False)
    of_run, of_plan = (
        [
            (part, name.removesuffix(".base_layer"), type(module).__name__)
            for part, network in denoiser.parts.items()
            for name, module in network.named_modules()
            if type(module).__module__ == "fastloop.kernels.unet"
        ]
        for denoiser in (run, plan)
    )
    assert of_run == of_plan and {part for part, *_ in of_run} == {"unet", "vae"}
    assert run.vae.decoder.conv_in.weight.stride() == plan.vae.decoder.conv_in.weight.stride()


def test_a_fused_block_can_be_recomputed():
    """Under gradient checkpointing the forward runs twice, and must give the same."""
    x, groups, weight, bias, dy = norm_case(SIZES[0])
    norm = GroupNormSiLU(groups, x.shape[1], device=DEVICE)
    leaf = x.clone().requires_grad_()
    checkpoint(norm, leaf, use_reentrant=False).backward(dy)
    other = x.clone().requires_grad_()
    norm(other).backward(dy)
    assert torch.equal(leaf.grad, other.grad)


def test_the_dispatch_fuses_for_triton_and_leaves_a_unet_of_the_reference_alone():
    unet, vae = tiny_unet(), make_vae(4)
    fuse(unet, "reference", DEVICE), fuse(vae, "reference", DEVICE)
    assert type(unet.conv_norm_out) is type(vae.decoder.conv_norm_out) is torch.nn.GroupNorm
    fuse(unet, "triton", DEVICE)
    assert type(unet.conv_norm_out) is GroupNormSiLU
