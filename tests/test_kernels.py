"""Objectives, and the reference kernels' gradients, against float64 autograd of the formulas in docs/method.md."""

from __future__ import annotations

import math

import pytest
import torch
from step_cases import policy_loss

from fastloop.kernels import backend, reference
from fastloop.objectives import clip_only, clipped, gaussian_kl, kl_mask, score_function

B, SHAPE = 6, (3, 5, 7)


def case(dtype=torch.float32, guidance=True, spread=1e-3):
    """Inputs of one micro-batch near the old policy, so that some ratios leave a clip window of 1e-3."""
    g = torch.Generator().manual_seed(1)
    draw = lambda *shape: torch.randn(*shape, generator=g)  # noqa: E731
    cond, uncond, x_t = draw(B, *SHAPE).to(dtype), draw(B, *SHAPE).to(dtype), draw(B, *SHAPE)
    a, b = torch.rand(B, generator=g) + 0.5, -torch.rand(B, generator=g) - 0.1
    sigma = torch.rand(B, generator=g) * 0.5 + 0.05
    w = 3.0
    mean = reference.transition_mean(cond, uncond if guidance else None, x_t, a, b, w)
    x_prev = mean + sigma.view(-1, 1, 1, 1) * draw(B, *SHAPE)
    advantage = draw(B)
    exact = formula(cond.double(), uncond.double() if guidance else None, x_t, x_prev, a, b, sigma, w)
    log_prob_old = (exact + spread * draw(B)).float()
    return dict(
        cond=cond,
        uncond=uncond if guidance else None,
        x_t=x_t,
        x_prev=x_prev,
        a=a,
        b=b,
        sigma=sigma,
        guidance=w,
        log_prob_old=log_prob_old,
        advantage=advantage,
        clip_range=1e-3,
    )


def formula(cond, uncond, x_t, x_prev, a, b, sigma, w):
    """log p as it is written, in float64."""
    e = lambda v: v.double().view(-1, 1, 1, 1)  # noqa: E731
    m = cond if uncond is None else uncond + w * (cond - uncond)
    mean = e(a) * x_t.double() + e(b) * m
    normal = torch.distributions.Normal(mean, e(sigma).expand_as(mean))
    return normal.log_prob(x_prev.double()).flatten(1).mean(1)


def expected_loss(name, log_prob, old, advantage, eps):
    """The three objectives by hand, in float64."""
    old, advantage = old.double(), advantage.double()
    ratio = (log_prob - old).exp()
    if name == "score_function":
        return -advantage * log_prob
    window = torch.clamp(ratio, 1 - eps, 1 + eps)
    if name == "clip_only":
        return -advantage * window
    return -torch.minimum(ratio * advantage, window * advantage)


@pytest.mark.parametrize("guidance", [True, False])
@pytest.mark.parametrize("objective", ["score_function", "clipped", "clip_only"])  # kl_mask: tests/test_fused.py
def test_losses_and_gradients_equal_float64_autograd_of_the_formulas(objective, guidance):
    inputs = case(guidance=guidance)
    leaves = [inputs["cond"].requires_grad_()] + ([inputs["uncond"].requires_grad_()] if guidance else [])
    terms = policy_loss(reference, **inputs, objective=objective)
    gradients = torch.autograd.grad(terms.loss.sum(), leaves)

    cond = inputs["cond"].detach().double().requires_grad_()
    uncond = inputs["uncond"].detach().double().requires_grad_() if guidance else None
    args = (inputs[k] for k in ("x_t", "x_prev", "a", "b", "sigma", "guidance"))
    log_prob = formula(cond, uncond, *args)
    loss = expected_loss(objective, log_prob, inputs["log_prob_old"], inputs["advantage"], 1e-3)
    exact = torch.autograd.grad(loss.sum(), [cond] + ([uncond] if guidance else []))
    assert torch.allclose(terms.loss.double(), loss, rtol=1e-5, atol=1e-6)
    assert torch.allclose(terms.log_prob.double(), log_prob, rtol=1e-5, atol=1e-6)
    for got, want in zip(gradients, exact, strict=True):
        assert torch.allclose(got.double(), want, rtol=1e-3, atol=1e-7)
    assert any(g.abs().sum() > 0 for g in gradients)


def test_some_pairs_of_the_test_case_are_clipped_and_some_are_not():
    inputs = case()
    ratio = policy_loss(reference, **inputs, objective="clipped").ratio
    outside = (ratio - 1).abs() > inputs["clip_range"]
    assert 0 < outside.sum() < B


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_come_in_the_models_dtype_and_log_probs_in_float32(dtype):
    inputs = case(dtype)
    inputs["cond"].requires_grad_()
    terms = policy_loss(reference, **inputs, objective="clipped")
    terms.loss.sum().backward()
    assert inputs["cond"].grad.dtype == dtype
    assert terms.log_prob.dtype == terms.ratio.dtype == terms.loss.dtype == torch.float32
    exact = formula(
        inputs["cond"].detach().double(),
        inputs["uncond"].double(),
        *(inputs[k] for k in ("x_t", "x_prev", "a", "b", "sigma", "guidance")),
    )
    assert torch.allclose(terms.log_prob.double(), exact, atol=1e-5)


def test_clipped_stops_the_gradient_only_where_the_ratio_has_moved_too_far_the_right_way():
    old, eps = torch.zeros(4), 0.1
    log_prob = torch.tensor([0.5, 0.5, -0.5, -0.5], requires_grad=True)
    advantage = torch.tensor([1.0, -1.0, 1.0, -1.0])
    clipped(log_prob, old, advantage, eps).sum().backward()
    assert (log_prob.grad != 0).tolist() == [False, True, True, False]


def test_the_kl_mask_drops_only_what_is_over_the_bound_and_moves_further_away():
    log_prob = torch.tensor([0.5, 0.5, -0.5, -0.5, 0.5, 0.5], requires_grad=True)
    advantage, kl = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0, 0.0]), torch.tensor([0.2, 0.2, 0.2, 0.2, 0.05, 0.2])
    loss = kl_mask(log_prob, torch.zeros(6), advantage, 0.1, kl)
    loss.sum().backward()
    assert torch.equal(loss.detach(), -log_prob.detach().exp() * advantage)  # dropped pairs keep their value
    assert (log_prob.grad != 0).tolist() == [False, True, True, False, True, False]


def test_clip_only_stops_the_gradient_outside_the_window_whatever_the_sign():
    log_prob = torch.tensor([0.5, 0.5, -0.5, -0.5, 0.05], requires_grad=True)
    clip_only(log_prob, torch.zeros(5), torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0]), 0.1).sum().backward()
    assert (log_prob.grad != 0).tolist() == [False, False, False, False, True]


def test_at_ratio_one_the_clipped_gradient_is_that_of_the_score_function():
    log_prob, advantage = torch.randn(8, requires_grad=True), torch.randn(8)
    one = torch.autograd.grad(clipped(log_prob, log_prob.detach(), advantage, 1e-4).sum(), log_prob)[0]
    two = torch.autograd.grad(score_function(log_prob, log_prob.detach(), advantage, 1e-4).sum(), log_prob)[0]
    assert torch.allclose(one, two, rtol=1e-6)


def test_gaussian_kl_equals_that_of_torch_distributions():
    g = torch.Generator().manual_seed(3)
    p, q, sigma = torch.randn(B, *SHAPE, generator=g), torch.randn(B, *SHAPE, generator=g), torch.rand(B, generator=g) + 0.1
    wide = sigma.view(-1, 1, 1, 1).expand_as(p)
    exact = torch.distributions.kl_divergence(torch.distributions.Normal(p, wide), torch.distributions.Normal(q, wide))
    assert torch.allclose(gaussian_kl(p, q, sigma), exact.flatten(1).mean(1), rtol=1e-5)
    assert torch.equal(gaussian_kl(p, p, sigma), torch.zeros(B))


# --- the transition kernel and its noise ---------------------------------------------------------------------------------


def test_philox_gives_the_published_known_answers():
    """Vectors of Random123 (kat_vectors) for philox4x32-10."""
    vectors = [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ]
    for counter, (k0, k1), answer in vectors:
        got = reference.philox(k0 | k1 << 32, tuple(torch.tensor([c]) for c in counter))
        assert tuple(int(word) for word in got) == answer


def test_noise_is_standard_normal_and_finite():
    noise = reference.normal(7, torch.arange(64), 3, 4096)
    assert noise.isfinite().all()
    assert abs(noise.mean().item()) < 0.01
    assert abs(noise.std().item() - 1) < 0.01
    assert abs((noise**4).mean().item() - 3) < 0.1
    neighbours = torch.corrcoef(torch.stack([noise[:, :-1].flatten(), noise[:, 1:].flatten()]))[0, 1]
    assert abs(neighbours.item()) < 0.01


def test_noise_depends_on_seed_trajectory_and_step_and_on_nothing_else():
    ids = torch.tensor([5, 0, 2**33 + 5, 17])
    noise = reference.normal(1, ids, 4, 33)
    for row, number in enumerate(ids):  # alone, in another order, or longer: the same numbers
        assert torch.equal(reference.normal(1, number[None], 4, 33)[0], noise[row])
    assert torch.equal(reference.normal(1, ids.flip(0), 4, 33).flip(0), noise)
    assert torch.equal(reference.normal(1, ids, 4, 70)[:, :33], noise)
    for other in (reference.normal(2, ids, 4, 33), reference.normal(1 | 1 << 32, ids, 4, 33)):
        assert not torch.isclose(other, noise).any(1).all()
    assert not torch.equal(reference.normal(1, ids, 5, 33), noise)
    assert not torch.equal(noise[0], noise[2])  # ids that differ in the high word only


@pytest.mark.parametrize("shape", [(4, 8, 8), (3, 5, 7), (1, 1, 1), (4, 64, 64)])
@pytest.mark.parametrize("guidance", [True, False])
def test_both_kernels_give_bit_identical_log_probs_so_the_first_ratio_is_exactly_one(shape, guidance):
    g = torch.Generator().manual_seed(2)
    cond, uncond, x = (torch.randn(5, *shape, generator=g) for _ in range(3))
    uncond = uncond if guidance else None
    a, b, sigma = torch.full((5,), 1.02), torch.full((5,), -0.3), torch.full((5,), 0.2)
    x_prev, log_prob = reference.sample_transition(cond, uncond, x, a, b, sigma, 5.0, 0, torch.arange(5), 1)
    settings = {"guidance": 5.0, "clip_range": 1e-4, "objective": "clipped"}
    columns = {
        "x_t": x,
        "x_prev": x_prev,
        "a": a,
        "b": b,
        "sigma": sigma,
        "log_prob_old": log_prob,
        "advantage": torch.ones(5),
    }
    terms = policy_loss(reference, cond.requires_grad_(), uncond, **settings, **columns)
    assert torch.equal(terms.log_prob, log_prob)
    assert torch.equal(terms.ratio, torch.ones(5))
    # one row alone sums along the same tree
    first = {name: column[:1] for name, column in columns.items()}
    alone = policy_loss(reference, cond[:1], None if uncond is None else uncond[:1], **settings, **first)
    assert torch.equal(alone.log_prob, log_prob[:1])


def test_a_step_without_noise_is_its_mean_with_log_prob_zero():
    x = torch.randn(2, 4, 4, 4)
    zero, one = torch.zeros(2), torch.ones(2)
    x_prev, log_prob = reference.sample_transition(x, None, x, one, zero, zero, 1.0, 0, torch.arange(2), 0)
    assert torch.equal(x_prev, x)
    assert torch.equal(log_prob, zero)


@pytest.mark.parametrize("sigma", [1e-4, 1e3])
def test_log_probs_stay_exact_at_extreme_sigma(sigma):
    x, noise_of = torch.zeros(3, 4, 8, 8), torch.arange(3)
    s = torch.full((3,), sigma)
    x_prev, log_prob = reference.sample_transition(x, None, x, s * 0, s * 0, s, 1.0, 0, noise_of, 0)
    expected = torch.distributions.Normal(0.0, sigma).log_prob(x_prev.double()).flatten(1).mean(1)
    assert torch.allclose(log_prob.double(), expected, rtol=1e-5)
    assert math.isfinite(log_prob.sum())


def test_an_unknown_backend_is_refused_by_name():
    with pytest.raises(ValueError, match="kernels: unknown backend 'cuda'"):
        backend("cuda", torch.device("cpu"))
