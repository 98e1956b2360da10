"""PyTorch's settings of a ready model are those that make ratios start at 1, and a CPU computes as without them."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, _cur_sdpa_kernel_backends

from fastloop.denoisers import ready_denoiser
from fastloop.numerics import attention_backends, half_precision_sums, pin

CPU = torch.device("cpu")
cuda = torch.backends.cuda


@pytest.fixture
def as_pytorch_has_it():
    """A function that puts PyTorch's own settings back; those of a run come back in the end."""

    def undo() -> None:
        cuda.enable_cudnn_sdp(True)
        cuda.matmul.allow_bf16_reduced_precision_reduction = cuda.matmul.allow_fp16_reduced_precision_reduction = True

    yield undo
    pin()


def test_a_ready_model_has_its_attention_backends_and_its_sums_pinned_and_a_cpu_computes_as_without(
    as_pytorch_has_it, make_config
):
    config = make_config(sampling={"guidance_scale": 1}, model={"dtype": "bf16"})
    as_pytorch_has_it()
    assert attention_backends()[0] == "cudnn" and half_precision_sums() == "bf16 in float32 or bf16, fp16 in float32 or fp16"
    denoiser = ready_denoiser(config, CPU)
    assert attention_backends() == ["flash", "mem_efficient", "math"]
    assert half_precision_sums() == "bf16 in float32, fp16 in float32"
    in_order = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    assert _cur_sdpa_kernel_backends(with_priority=True)[:3] == in_order  # as PyTorch itself sees it

    x, t = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([10, 500])

    def outputs_and_gradients() -> list[torch.Tensor]:
        cond, _ = denoiser.encode(["a cat", "a dog"], config.sampling)
        output = denoiser.predict(x, t, cond, None)[0]
        return [output, *torch.autograd.grad(output.float().square().sum(), list(denoiser.trainable().values()))]

    pinned = outputs_and_gradients()
    as_pytorch_has_it()
    assert all(torch.equal(one, other) for one, other in zip(outputs_and_gradients(), pinned, strict=True))
