"""What only a GPU can show of the Triton kernels: real sizes, its own arithmetic, memory, synchronisation, Inductor, a run.

tests/test_fused.py runs on a GPU as well where there is one.
"""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device, and torch finds none here", allow_module_level=True)

import torch.nn.functional as F
from step_cases import CLIP, DEVICE, DTYPES, SEED, case, close, gradients, policy_loss, sampled, trajectories, update

from fastloop.kernels import VARIABLE, backend, choose, fused, reference
from fastloop.trainer import Trainer

pytestmark = pytest.mark.gpu
SD, SDXL = (4, 64, 64), (4, 128, 128)
NORMS = [(2, 320, 64, 64), (2, 640, 64, 64), (2, 1280, 8, 8), (1, 320, 128, 128), (3, 96, 7, 9)]
NORMS += [(1, 128, 512, 512)]  # of a VAE, divided into stretches
GATES = [(2, 4096, 2560), (2, 256, 10240), (1, 4096, 5120), (3, 5, 14)]
# of the largest value: float32 sums of 10^4 to 10^5 terms; half a unit of the last place of 8 and 11 bits, with room
TOLERANCE = {torch.float32: 3e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def norm_inputs(shape=NORMS[0], dtype=torch.bfloat16, channels_last=False) -> dict:
    g = torch.Generator(DEVICE).manual_seed(1)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x = (2 * torch.randn(shape, generator=g, device=DEVICE) + 0.5).to(dtype).contiguous(memory_format=layout)
    weight, bias = (torch.randn(shape[1], generator=g, device=DEVICE).to(dtype) for _ in range(2))
    return {"x": x, "weight": weight, "bias": bias}


def gate_inputs(shape=GATES[0], dtype=torch.bfloat16) -> dict:
    g = torch.Generator(DEVICE).manual_seed(1)
    return {"projected": torch.randn(shape, generator=g, device=DEVICE).to(dtype)}


def normalised(x, weight, bias, ops=fused):
    return ops.group_norm_silu(x, 32, weight, bias, 1e-5)


def output_and_gradients(function, inputs: dict) -> list[torch.Tensor]:
    leaves = {name: value.detach().requires_grad_() for name, value in inputs.items()}
    output = function(**leaves)
    g = torch.Generator(DEVICE).manual_seed(2)
    seed = torch.randn(output.shape, generator=g, device=DEVICE).bfloat16()  # exact in the other dtypes
    seed = torch.empty_like(output).copy_(seed)  # in the output's memory layout, on its device
    return [output.detach(), *torch.autograd.grad(output, list(leaves.values()), seed)]


# --- one step and its loss, at real sizes -----------------------------------------------------------------------------


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 4, 16, 64])
@pytest.mark.parametrize("shape", [SD, SDXL])
def test_the_ratio_is_exactly_1_and_the_log_prob_the_twins_bit_for_bit(shape, rows, dtype, channels_last):
    inputs = case(shape, rows=rows, dtype=dtype, channels_last=channels_last)
    _, log_prob = sampled(inputs)
    arguments = update(inputs, move=0.0)
    terms = policy_loss(fused, **arguments, objective="clipped")
    assert torch.equal(terms.log_prob, log_prob)
    assert torch.equal(terms.ratio, torch.ones_like(terms.ratio))
    assert terms.statistics.tolist() == [0, 0, 0, rows, 0]
    assert torch.equal(policy_loss(reference, **arguments, objective="clipped").log_prob, log_prob)


@pytest.mark.parametrize("seed", [0, 2**63 + 11])
def test_noise_is_the_twins(seed):
    # both take log, sin and cos from CUDA, but of different compilers: a few units of the last place of numbers up to 5.7
    got, want = (ops.initial_noise(seed, trajectories(16), SDXL) for ops in (fused, reference))
    assert (got - want).abs().max() < 5e-6
    assert abs(got.mean().item()) < 5e-3 and abs(got.std().item() - 1) < 5e-3


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [SD, SDXL])
def test_losses_and_gradients_are_the_twins(shape, dtype, channels_last):
    arguments = update(case(shape, rows=16, dtype=dtype, channels_last=channels_last))
    terms, grads = gradients(fused, arguments, "clipped")
    want, want_grads = gradients(reference, arguments, "clipped")
    assert torch.equal(terms.log_prob, want.log_prob)
    assert torch.allclose(terms.loss, want.loss, rtol=1e-5, atol=1e-6)
    assert torch.allclose(terms.statistics, want.statistics, rtol=1e-5, atol=1e-6)
    assert 0 < terms.statistics[:2].sum() < 16
    for got, exact in zip(grads, want_grads, strict=True):
        assert got.dtype == dtype and close(got, exact, TOLERANCE[dtype])


# --- parts of the UNet ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", NORMS, ids=str)
def test_group_norm_silu_is_that_of_float64(shape, dtype, channels_last):
    inputs = norm_inputs(shape, dtype, channels_last)
    got = output_and_gradients(normalised, inputs)
    want = output_and_gradients(
        lambda x, weight, bias: F.silu(F.group_norm(x, 32, weight, bias, 1e-5)),
        {name: value.double() for name, value in inputs.items()} | {"x": inputs["x"].double().contiguous()},
    )
    assert got[0].stride() == got[1].stride() == inputs["x"].stride()
    for one, exact in zip(got, want, strict=True):
        assert one.dtype == dtype and close(one, exact, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", GATES, ids=str)
def test_geglu_is_that_of_float64(shape, dtype):
    inputs = gate_inputs(shape, dtype)
    got = output_and_gradients(fused.geglu, inputs)
    want = output_and_gradients(reference.geglu, {name: value.double() for name, value in inputs.items()})
    for one, exact in zip(got, want, strict=True):
        assert one.dtype == dtype and close(one, exact, TOLERANCE[dtype])


def test_repeats_are_bit_equal():
    arguments = update(case(SDXL, rows=16, dtype=torch.bfloat16))
    inputs = {name: arguments[name] for name in ("cond", "uncond", "x_t", "a", "b", "sigma", "guidance")}

    def everything() -> list[torch.Tensor]:
        terms, grads = gradients(fused, arguments, "clipped")
        found = [terms.loss, terms.statistics, *grads, *sampled(inputs), *output_and_gradients(fused.geglu, gate_inputs())]
        for channels_last in (False, True):
            found += output_and_gradients(normalised, norm_inputs(channels_last=channels_last))
        return found

    once = everything()
    for _ in range(5):
        assert all(torch.equal(one, other) for one, other in zip(everything(), once, strict=True))


# --- torch.compile, synchronisation, memory ---------------------------------------------------------------------------


def test_inductor_compiles_the_parts_of_the_unet_without_a_graph_break():
    def block(x, weight, bias, projected):
        return normalised(2 * x, weight, bias).sum() + (3 * fused.geglu(projected + 1)).float().sum()

    inputs = norm_inputs(dtype=torch.float32) | gate_inputs(dtype=torch.float32)
    compiled = output_and_gradients(torch.compile(block, fullgraph=True), inputs)
    for got, want in zip(compiled, output_and_gradients(block, inputs), strict=True):
        assert close(got, want, 1e-5)


def test_inductor_compiles_a_step_and_its_loss_to_the_same_bits():
    inputs, ids = case(SD, rows=4, dtype=torch.bfloat16), trajectories(4)
    step = torch.compile(
        lambda cond: fused.sample_transition(**inputs | {"cond": 2 * cond}, seed=SEED, trajectory=ids, step=4), fullgraph=True
    )
    want = sampled(inputs | {"cond": 2 * inputs["cond"]})
    assert all(torch.equal(got, expected) for got, expected in zip(step(inputs["cond"]), want, strict=True))
    arguments = update(inputs)

    def loss(cond):
        return policy_loss(fused, **arguments | {"cond": 2 * cond}, objective="clipped").loss

    cond = {"cond": arguments["cond"]}
    compiled = output_and_gradients(torch.compile(loss, fullgraph=True), cond)
    assert all(torch.equal(got, want) for got, want in zip(compiled, output_and_gradients(loss, cond), strict=True))


def test_nothing_waits_for_the_device():
    arguments = update(case(SD, rows=4, dtype=torch.bfloat16))
    for name in ("cond", "uncond"):
        arguments[name].requires_grad_()
    inputs = {name: arguments[name] for name in ("x_t", "a", "b", "sigma", "guidance")}
    inputs |= {name: arguments[name].detach() for name in ("cond", "uncond")}
    norm, gate, ids = norm_inputs(), gate_inputs(), trajectories(4)
    norm["x"].requires_grad_(), gate["projected"].requires_grad_()

    def everything() -> None:
        fused.sample_transition(**inputs, seed=SEED, trajectory=ids, step=4)
        policy_loss(fused, **arguments, objective="kl_mask").loss.sum().backward()
        policy_loss(fused, **arguments, objective="clipped").loss.sum().backward()
        normalised(**norm).sum().backward()
        fused.geglu(**gate).sum().backward()

    everything()  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        everything()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_loss_needs_no_memory_but_its_gradients():
    arguments = update(case(SDXL, rows=16, dtype=torch.bfloat16))
    names = ("cond", "uncond")
    leaves = {name: arguments[name].detach().requires_grad_() for name in names}

    def step() -> tuple[torch.Tensor, ...]:
        loss = policy_loss(fused, **arguments | leaves, objective="clipped").loss.mean()
        return torch.autograd.grad(loss, list(leaves.values()))

    step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    # requested, not allocated: the allocator hands out blocks up to 1 MiB larger
    before = torch.cuda.memory_stats()["requested_bytes.all.current"]
    grads = step()
    torch.cuda.synchronize()
    peak = torch.cuda.memory_stats()["requested_bytes.all.peak"] - before
    needed = sum(grad.numel() * grad.element_size() for grad in grads)
    assert needed <= peak <= needed + 2**16  # partial sums: one float64 for each 2,048 elements, 4 KiB here


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_every_operator_runs_on_the_device_of_its_tensors_whatever_the_current_one_is():
    for one, other in zip(everything_on("cuda:0"), everything_on("cuda:1"), strict=True):
        assert (one.device.index, other.device.index) == (0, 1) and torch.equal(one.cpu(), other.cpu())


def everything_on(device: str, shape=SD, norm=NORMS[0], gate=GATES[0]) -> list[torch.Tensor]:
    """What the operators give, and their gradients, of inputs that do not depend on the device where they are made."""

    def there(values: dict) -> dict:
        return {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in values.items()}

    inputs = case(shape, rows=4, dtype=torch.bfloat16)
    arguments, ids = there(update(inputs)), trajectories(4).to(device)

    def loss(cond, uncond):
        return policy_loss(fused, **arguments | {"cond": cond, "uncond": uncond}, objective="kl_mask").loss

    return [
        fused.initial_noise(SEED, ids, shape),
        *fused.sample_transition(**there(inputs), seed=SEED, trajectory=ids, step=4),
        *output_and_gradients(loss, {name: arguments[name] for name in ("cond", "uncond")}),
        *output_and_gradients(normalised, there(norm_inputs(norm))),
        *output_and_gradients(fused.geglu, there(gate_inputs(gate))),
    ]


# --- a run ------------------------------------------------------------------------------------------------------------


def test_auto_takes_the_kernels_on_a_gpu(monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    assert choose("auto", DEVICE) == "triton" and backend("auto", DEVICE) is fused


def bright(images, prompts, metadata):
    """The share of bright values: rounding in the latents moves single pictures by one level, which this seldom sees."""
    return np.float64(images > 127).mean((1, 2, 3))


@pytest.mark.parametrize(
    "changes",
    [{}, {"objective": "kl_mask", "clip_range": 1e-4}, {"algorithm": "loop_forward"}],
    ids=["loop", "kl_mask", "loop_forward"],
)
def test_a_run_on_the_gpu_gives_the_losses_of_the_reference(make_config, tmp_path, monkeypatch, changes):
    monkeypatch.delenv(VARIABLE, raising=False)
    rows = {}
    for name in ("reference", "auto"):
        config = make_config(
            **{
                "rewards": [{"name": f"{__name__}:bright"}],
                "iterations": 2,
                "kernels": name,
                "clip_range": CLIP,
                "memory": {"rollout_batch": 6, "update_batch": 6},
                "output_dir": str(tmp_path / name),
            }
            | changes
        )
        # TF32 and non-deterministic convolutions would differ more between two runs than the kernels do
        with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
            folder = Trainer(config, resume=False).train()
        rows[name] = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert len(rows["auto"]) == 2
    # of the second iteration the weights differ by rounding, which Adam enlarges where a gradient is near 0
    for got, want, tolerance in zip(rows["auto"], rows["reference"], (1e-4, 1e-2), strict=True):
        seen = "policy/denoising_loss_worse" if changes.get("algorithm") == "loop_forward" else "policy/ratio_mean"
        for key in ("reward/mean", "policy/loss", seen):
            assert got[key] == pytest.approx(want[key], rel=tolerance, abs=1e-2 * tolerance), key
    assert rows["auto"][0].get("policy/replay_max_dev", 0) < 1e-5
