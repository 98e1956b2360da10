"""The Triton operators against their twins and against float64: on a GPU where there is one, else in Triton's interpreter."""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext

import pytest
import torch
from step_cases import (
    CLIP,
    DEVICE,
    DTYPES,
    GUIDANCE,
    SEED,
    case,
    close,
    gradients,
    pairwise,
    policy_loss,
    sampled,
    trajectories,
    update,
)

from fastloop.kernels import backend, choose, fused, gaussian, policy, reference, transition
from fastloop.trainer import Trainer

OBJECTIVES = tuple(policy._NUMBER)  # those that the kernel has
SHAPES = [(3, 5, 7), (4, 16, 16), (4, 32, 33)]  # D = 105: less than a block; 1,024; 4,224: three blocks, the last one odd


# --- noise ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("seed", [0, 1, 2**32 | 5, 2**63 + 11])
def test_noise_drawn_in_the_kernel_is_the_twins(shape, seed):
    for ids in (trajectories(3), torch.tensor([2**40 + 1], device=DEVICE)):
        got, want = fused.initial_noise(seed, ids, shape), reference.initial_noise(seed, ids, shape)
        assert got.shape == want.shape and (got - want).abs().max() < 2e-6


def test_the_noise_of_a_step_depends_on_seed_trajectory_and_step_alone():
    inputs = case(sigma=1.0) | {"a": torch.zeros(5, device=DEVICE), "b": torch.zeros(5, device=DEVICE)}
    x_prev, _ = sampled(inputs)
    for i in range(5):
        alone, _ = fused.sample_transition(
            **{k: v[i : i + 1] if isinstance(v, torch.Tensor) else v for k, v in inputs.items()},
            seed=SEED,
            trajectory=trajectories(5)[i : i + 1],
            step=4,
        )
        assert torch.equal(alone[0], x_prev[i])
    assert (sampled(inputs, step=5)[0] != x_prev).float().mean() > 0.99
    assert (x_prev[0] != x_prev[1]).float().mean() > 0.99


# --- one step ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape, dtype, guided, channels_last", pairwise(SHAPES, DTYPES, (True, False), (False, True)))
def test_a_step_is_the_twins(shape, dtype, guided, channels_last):
    inputs = case(shape, dtype=dtype, guided=guided, channels_last=channels_last)
    x_prev, log_prob = sampled(inputs)
    want_x, want_log_prob = sampled(inputs, reference)
    assert x_prev.dtype == log_prob.dtype == torch.float32 and x_prev.shape == inputs["x_t"].shape
    assert torch.allclose(x_prev, want_x, rtol=1e-6, atol=2e-6)
    assert torch.allclose(log_prob, want_log_prob, rtol=1e-6, atol=1e-6)
    assert log_prob[1] == 0 and log_prob[0] != 0  # sigma 0: the mean itself
    mean = reference.transition_mean(*(inputs[k] for k in ("cond", "uncond", "x_t", "a", "b", "guidance")))
    assert torch.equal(x_prev[1], mean[1])


@pytest.mark.parametrize("sigma", [1e-6, 1e-3, 1.0, 1e4])
def test_extreme_sigmas_give_the_twins_log_probs(sigma):
    inputs = case((4, 32, 33), sigma=sigma)
    x_prev, log_prob = sampled(inputs)
    arguments = update(inputs, move=0.0)
    assert log_prob.isfinite().all()
    want = policy_loss(reference, **arguments, objective="clipped")
    got = policy_loss(fused, **arguments, objective="clipped")
    assert torch.equal(got.log_prob, want.log_prob) and torch.equal(got.log_prob, log_prob)


# --- the ratio starts at exactly 1 ------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape, dtype, channels_last, objective", pairwise(SHAPES, DTYPES, (False, True), OBJECTIVES))
def test_both_kernels_and_the_twin_give_the_same_log_prob_bit_for_bit(shape, dtype, channels_last, objective):
    inputs = case(shape, dtype=dtype, channels_last=channels_last)
    _, log_prob = sampled(inputs)
    arguments = update(inputs, move=0.0)
    terms = policy_loss(fused, **arguments, objective=objective)
    assert torch.equal(terms.log_prob, log_prob)
    assert torch.equal(terms.ratio, torch.ones_like(terms.ratio))
    assert terms.statistics.tolist() == [0, 0, 0, 5, 0]
    assert torch.equal(policy_loss(reference, **arguments, objective=objective).log_prob, log_prob)


@pytest.mark.parametrize("size", [1, 3, gaussian.BLOCK, gaussian.BLOCK + 1, gaussian.BLOCK * (gaussian.SPLITS + 2) + 5])
def test_any_number_of_elements_and_more_blocks_than_the_second_stage_holds(size):
    inputs = case((size, 1, 1), rows=2, sigma=0.3)
    x_prev, log_prob = sampled(inputs)
    want_x, want_log_prob = sampled(inputs, reference)
    assert torch.allclose(x_prev, want_x, rtol=1e-6, atol=2e-6)
    assert torch.allclose(log_prob, want_log_prob, atol=1e-6)
    terms = policy_loss(fused, **update(inputs, move=0.0), objective="clipped")
    assert torch.equal(terms.log_prob, log_prob)


def test_the_batch_a_pair_falls_in_changes_nothing():
    inputs = case((4, 5, 7), rows=gaussian.ROWS + 3)  # more rows than the second stage holds at a time
    arguments = update(inputs)
    terms, grads = gradients(fused, arguments, "clipped")
    for part in (slice(0, 1), slice(3, 9), slice(5, None)):
        rows = {k: v[part] if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
        some = policy_loss(fused, **rows, objective="clipped")
        assert torch.equal(some.log_prob, terms.log_prob[part]) and torch.equal(some.loss, terms.loss[part])
    again, grads_again = gradients(fused, arguments, "clipped")
    assert torch.equal(again.statistics, terms.statistics)
    assert all(torch.equal(one, other) for one, other in zip(grads, grads_again, strict=True))


# --- the loss ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype, objective, guided, channels_last", pairwise(DTYPES, OBJECTIVES, (True, False), (False, True)))
def test_losses_gradients_and_statistics_are_the_twins(dtype, objective, guided, channels_last):
    arguments = update(case((4, 32, 33), dtype=dtype, guided=guided, channels_last=channels_last))
    terms, grads = gradients(fused, arguments, objective)
    want, want_grads = gradients(reference, arguments, objective)
    assert torch.equal(terms.log_prob, want.log_prob)
    for name in ("loss", "ratio", "statistics"):
        assert torch.allclose(getattr(terms, name), getattr(want, name), rtol=3e-6, atol=1e-6), name
    for got, exact in zip(grads, want_grads, strict=True):
        assert got.dtype == dtype and got.stride() == arguments["cond"].stride()
        assert close(got, exact, {torch.float32: 3e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype])
        assert not got[1].any()  # sigma 0: nothing to learn
    assert not terms.log_prob.requires_grad and not terms.ratio.requires_grad and not terms.statistics.requires_grad


@pytest.mark.parametrize("guided", [True, False])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_losses_and_gradients_are_those_of_the_formulas_in_float64(objective, guided):
    arguments = update(case(guided=guided, sigma=0.3), move=0.01 if guided else 0.1)
    terms, grads = gradients(fused, arguments, objective)
    names = ("cond", "uncond") if guided else ("cond",)
    leaves = {name: arguments[name].double().requires_grad_() for name in names}
    cond, uncond = leaves["cond"], leaves.get("uncond")
    m = cond if uncond is None else uncond + GUIDANCE * (cond - uncond)
    a, b, sigma = (arguments[name].double().view(-1, 1, 1, 1) for name in ("a", "b", "sigma"))
    mean = a * arguments["x_t"].double() + b * m
    log_prob = torch.distributions.Normal(mean, sigma).log_prob(arguments["x_prev"].double()).flatten(1).mean(1)
    ratio, advantage = (log_prob - arguments["log_prob_old"].double()).exp(), arguments["advantage"].double()
    window = ratio.clamp(1 - CLIP, 1 + CLIP)
    noise = reference.normal(SEED, arguments["trajectory"], 4, m[0].numel()).view_as(m).double()
    kl = ((mean - (arguments["x_prev"].double() - sigma * noise)) ** 2 / (2 * sigma**2)).flatten(1).mean(1)
    dropped = (kl > CLIP) & (advantage * (ratio - 1) > 0)
    loss = {
        "score_function": -advantage * log_prob,
        "clipped": -torch.minimum(ratio * advantage, window * advantage),
        "clip_only": -window * advantage,
        "kl_mask": torch.where(dropped, (-ratio * advantage).detach(), -ratio * advantage),
    }[objective]
    if objective != "score_function":
        assert (
            0 < {"clipped": (loss > -ratio * advantage), "clip_only": window != ratio, "kl_mask": dropped}[objective].sum() < 5
        )
    exact = torch.autograd.grad((loss * torch.arange(1.0, 6.0, device=DEVICE)).sum(), list(leaves.values()))
    assert torch.allclose(terms.loss.double(), loss, rtol=1e-5, atol=1e-6)
    for got, want in zip(grads, exact, strict=True):
        assert close(got, want, 1e-5)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("size", [0.0, 1e-8, 1e6])
def test_extreme_advantages(objective, size):
    advantage = size * torch.tensor([1.0, -1.0, 1.0, -1.0, 0.0])
    arguments = update(case(), advantage=advantage)
    terms, grads = gradients(fused, arguments, objective)
    want, want_grads = gradients(reference, arguments, objective)
    assert torch.allclose(terms.loss, want.loss, rtol=3e-6, atol=0)
    for got, exact in zip(grads, want_grads, strict=True):
        assert close(got, exact, 1e-5) and not got[4].any()


def test_a_pair_far_away_neither_overflows_nor_learns():
    arguments = update(case(sigma=1e-3), move=1e3, advantage=torch.ones(5))
    terms, grads = gradients(fused, arguments, "clipped")
    assert (terms.ratio[[0, 1, 3, 4]] == 0).all() and terms.loss.isfinite().all() and all(g.isfinite().all() for g in grads)


def test_values_that_are_not_finite_are_not_hidden():
    arguments = update(case())
    arguments["cond"][0, 0, 0, 0] = torch.nan
    for objective in OBJECTIVES:
        terms = policy_loss(fused, **arguments, objective=objective)
        assert terms.loss[0].isnan() and terms.loss[2:].isfinite().all() and terms.statistics[3:].isnan().all()


def test_nothing_of_a_latents_size_is_saved_beside_the_inputs():
    arguments = update(case((4, 32, 33), dtype=torch.bfloat16))
    arguments |= {name: arguments[name].requires_grad_() for name in ("cond", "uncond")}
    known = {t.untyped_storage().data_ptr() for t in arguments.values() if isinstance(t, torch.Tensor)}
    kept = []

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in known:
            kept.append(tensor.numel() * tensor.element_size())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        terms = policy_loss(fused, **arguments, objective="clipped")
    assert 0 < sum(kept) <= 4 * 5  # one float32 for each pair
    terms.loss.sum().backward()
    assert arguments["cond"].grad.any()


def test_the_statistics_count_both_sides_of_the_window():
    arguments = update(case(sigma=0.3))
    terms = policy_loss(fused, **arguments, objective="clipped")
    high, low, approx_kl, ratio, deviation = terms.statistics.tolist()
    assert high == (terms.ratio > 1 + CLIP).sum() and low == (terms.ratio < 1 - CLIP).sum() and high + low > 0
    change = terms.log_prob - arguments["log_prob_old"]
    assert approx_kl == pytest.approx(0.5 * change.square().sum().item(), rel=1e-5)
    assert ratio == pytest.approx(terms.ratio.sum().item()) and deviation == (terms.ratio - 1).abs().max()


# --- torch.compile, operator contracts --------------------------------------------------------------------------------


@pytest.mark.parametrize("guided", [True, False])
def test_torch_compile_goes_through_without_a_graph_break(guided):
    arguments = update(case(guided=guided))

    def step(cond, uncond):
        terms = policy_loss(fused, **arguments | {"cond": 2 * cond, "uncond": uncond}, objective="clipped")
        return (3 * terms.loss).sum(), terms.statistics

    def run(function):
        leaves = [arguments[name].detach().requires_grad_() for name in ("cond", "uncond") if arguments[name] is not None]
        loss, statistics = function(leaves[0], leaves[1] if guided else None)
        return loss.detach(), statistics, torch.autograd.grad(loss, leaves)

    backend = "inductor" if DEVICE.type == "cuda" else "aot_eager"
    loss, statistics, grads = run(torch.compile(step, fullgraph=True, backend=backend))
    want_loss, want_statistics, want_grads = run(step)
    assert torch.allclose(loss, want_loss) and torch.equal(statistics, want_statistics)
    assert all(torch.allclose(got, want, rtol=1e-6) for got, want in zip(grads, want_grads, strict=True))


def test_sampling_compiles_as_well():
    inputs = case()
    ids = trajectories(5)
    compiled = torch.compile(
        lambda cond: fused.sample_transition(**inputs | {"cond": cond + 0}, seed=SEED, trajectory=ids, step=4),
        fullgraph=True,
        backend="aot_eager",
    )
    assert all(torch.equal(got, want) for got, want in zip(compiled(inputs["cond"]), sampled(inputs), strict=True))


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("guided", [True, False])
def test_the_operators_keep_torchs_contracts(guided, channels_last):
    inputs = case((4, 8, 8), guided=guided, channels_last=channels_last)
    arguments = update(inputs)
    for name in ("cond", "uncond"):
        if arguments[name] is not None:
            arguments[name].requires_grad_()
    order = ("cond", "uncond", "x_t", "x_prev", "a", "b", "sigma", "guidance", "log_prob_old", "advantage", "clip_range")
    values = [arguments[name] for name in order]
    torch.library.opcheck(policy._policy_loss, (*values, "clipped", SEED, arguments["trajectory"], arguments["step"]))
    inputs = {k: v.detach() if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
    step = [inputs[name] for name in ("cond", "uncond", "x_t", "a", "b", "sigma", "guidance")]
    torch.library.opcheck(transition._sample_transition, (*step, SEED, trajectories(5), 4))
    torch.library.opcheck(transition._initial_noise, (SEED, trajectories(5), 77))


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"x_prev": torch.zeros(5, 4, 16, 15)}, r"^x_prev: shape \(5, 4, 16, 15\): expected \(5, 4, 16, 16\)$"),
        ({"x_t": torch.zeros(5, 4, 16, 16, dtype=torch.bfloat16)}, "^x_t: dtype torch.bfloat16: expected torch.float32$"),
        ({"cond": torch.zeros(5, 4, 16, 16).double(), "uncond": None}, "^cond: dtype torch.float64: expected float32, bf"),
        ({"uncond": torch.zeros(5, 4, 16, 16, dtype=torch.float16)}, "^uncond: dtype torch.float16: expected torch.float32$"),
        ({"uncond": torch.zeros(1, 4, 16, 16)}, r"^uncond: shape \(1, 4, 16, 16\): expected"),
        ({"sigma": torch.ones(5, 1)}, r"^sigma: shape \(5, 1\): expected \(5,\)$"),
        ({"advantage": torch.ones(4)}, r"^advantage: shape \(4,\): expected \(5,\)$"),
        ({"advantage": torch.ones(5).double()}, "^advantage: dtype torch.float64: expected torch.float32$"),
        ({"step": torch.ones(5)}, "^step: dtype torch.float32: expected torch.int64$"),
        ({"sigma": torch.ones(5, device="meta")}, "^sigma: on meta: expected"),
        ({"objective": "ppo"}, "^objective: 'ppo': one of score_function, clipped, clip_only, kl_mask$"),
        ({"objective": "kl_mask", "trajectory": None}, "^kl_mask: needs trajectory and step"),
        ({"x_t": torch.zeros(0, 4)}, r"^x_t: shape \(0, 4\): expected"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)  # fmt: skip
def test_what_the_kernels_would_read_wrongly_is_refused(change, says):
    change = {k: v.to(DEVICE) if isinstance(v, torch.Tensor) and v.device.type != "meta" else v for k, v in change.items()}
    with pytest.raises(ValueError, match=says):
        policy_loss(fused, **{"objective": "clipped"} | update(case()) | change)


def test_rows_that_are_not_contiguous_are_read_rightly():
    wide = case((4, 16, 32))
    arguments = {k: v[..., ::2] if isinstance(v, torch.Tensor) and v.dim() == 4 else v for k, v in wide.items()}
    want = sampled({k: v.contiguous() if isinstance(v, torch.Tensor) else v for k, v in arguments.items()})
    assert all(torch.equal(got, expected) for got, expected in zip(sampled(arguments), want, strict=True))
    both = torch.cat([wide["uncond"], wide["cond"]])  # as the UNet gives them
    halves = wide | dict(zip(("uncond", "cond"), both.chunk(2), strict=True))
    assert torch.equal(sampled(halves)[0], sampled(wide)[0])


def test_kernels_are_launched_with_the_device_of_their_tensors_as_the_current_one(monkeypatch):
    current = []
    monkeypatch.setattr(torch.cuda, "device_of", lambda tensor: current.append(tensor.shape) or nullcontext())
    gradients(fused, update(case((4, 2, 2))), "clipped")
    fused.initial_noise(0, trajectories(1), (4,))
    norm, gate = torch.ones(1, 4, 2, 2, device=DEVICE, requires_grad=True), torch.ones(6, device=DEVICE, requires_grad=True)
    fused.group_norm(norm, 2, norm[0, :, 0, 0], norm[0, :, 0, 0], 1e-5).sum().backward()
    fused.geglu(gate).sum().backward()
    assert current == [(5, 4, 2, 2), (5, 4, 2, 2), (5,), (1,), (1, 4, 2, 2), (1, 4, 2, 2), (6,), (3,)]


# --- the dispatch -----------------------------------------------------------------------------------------------------


def test_auto_is_the_reference_on_a_cpu_and_what_the_variable_says_where_it_is_set(monkeypatch):
    cpu = torch.device("cpu")
    monkeypatch.delenv("FASTLOOP_KERNELS", raising=False)
    assert choose("auto", cpu) == "reference" and backend("auto", cpu) is reference
    monkeypatch.setenv("FASTLOOP_KERNELS", "triton")
    monkeypatch.setattr("triton.knobs.runtime.interpret", True)
    assert choose("auto", cpu) == "triton" and backend("auto", cpu) is fused
    assert backend("reference", cpu) is reference  # the configuration has the last word
    monkeypatch.setenv("FASTLOOP_KERNELS", "cuda")
    with pytest.raises(ValueError, match="^FASTLOOP_KERNELS: unknown backend 'cuda': one of auto, triton, reference$"):
        choose("auto", cpu)


def test_triton_where_it_cannot_run_is_refused_with_the_reason(monkeypatch):
    monkeypatch.setattr("triton.knobs.runtime.interpret", False)
    with pytest.raises(ValueError, match="^kernels: triton needs a GPU: set it to auto or reference$"):
        choose("triton", torch.device("cpu"))
    monkeypatch.setattr(gaussian, "INTERPRETED", False)
    with pytest.raises(ValueError, match="^cond: on cpu: the Triton kernels run on a GPU"):
        fused.sample_transition(
            **{k: v.cpu() if isinstance(v, torch.Tensor) else v for k, v in case().items()},
            seed=0,
            trajectory=torch.arange(5),
            step=0,
        )
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(ValueError, match=r"^kernels: triton is not installed \(pip install triton\): set it to"):
        choose("triton", torch.device("cpu"))
    assert choose("auto", torch.device("cpu")) == "reference"


@pytest.mark.skipif(DEVICE.type == "cuda", reason="tests/gpu has this for a GPU, where the UNet rounds too")
@pytest.mark.parametrize(
    "changes",
    [
        {"algorithm": "loop"},
        {"objective": "kl_mask", "clip_range": 1e-9, "sampling": {"guidance_scale": 1.0}},
        {"algorithm": "loop_forward", "kl": {"weight": 0.1}},
    ],
    ids=str,
)
def test_a_run_with_the_kernels_gives_the_losses_of_the_reference(make_config, tmp_path, monkeypatch, changes):
    # those of UNet and VAE would take minutes in the interpreter: tests/test_fused_unet.py has them
    monkeypatch.setattr("fastloop.kernels.unet.fuse_network", lambda network: 0)
    rows = {}
    for name in ("reference", "triton"):
        small = {"sampling": {"steps": 2}, "eval": {"every": 9, "prompts": {"source": "animals", "limit": 1}}}
        small["sampling"] |= changes.get("sampling", {})
        config = make_config(**{"kernels": name, "output_dir": str(tmp_path / name), "clip_range": 1e-6} | changes | small)
        folder = Trainer(config, leave_out=("report", "export")).train()
        rows[name] = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    of_rows = ("ratio_mean", "clipfrac", "clipfrac_high") if "kl" not in changes else ("denoising_loss_better", "kl_reference")
    for got, want in zip(rows["triton"], rows["reference"], strict=True):
        for key in ("reward/mean", "policy/loss", *(f"policy/{name}" for name in of_rows)):
            assert got[key] == pytest.approx(want[key], rel=1e-5, abs=1e-7), key
        for key in ("policy/grad_norm", *(["policy/approx_kl"] if "kl" not in changes else [])):
            assert got[key] == pytest.approx(want[key], rel=1e-3, abs=1e-12), key
    if "kl" not in changes:
        assert rows["triton"][0]["policy/replay_max_dev"] < 1e-5
