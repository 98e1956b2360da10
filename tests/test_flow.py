"""The transitions of flow matching: diffusers' own times and step, three noises, their marginals and densities; refusals."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from torch.distributions import Normal

from fastloop.errors import UserError
from fastloop.forward import ForwardProcess
from fastloop.kernels import reference
from fastloop.rollout import sampler_table
from fastloop.transitions import TransitionTable, transition_table

NOISES = ("sde", "dance", "cps")
FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000}
# scheduler/scheduler_config.json of stabilityai/stable-diffusion-3-medium-diffusers, and of 3.5 medium and large
SD3 = FLOW | {"shift": 3.0}
# of black-forest-labs/FLUX.1-dev; FLUX.1-schnell has shift 1 and no dynamic shifting
DEV = FLOW | {
    "base_image_seq_len": 256,
    "base_shift": 0.5,
    "max_image_seq_len": 4096,
    "max_shift": 1.15,
    "shift": 3.0,
    "use_dynamic_shifting": True,
}
# of Qwen/Qwen-Image, the one with a terminal shift
TERMINAL = DEV | {
    "max_image_seq_len": 8192,
    "max_shift": 0.9,
    "shift": 1.0,
    "shift_terminal": 0.02,
    "time_shift_type": "exponential",
}


def flux_times(steps: int, tokens: int = 1024) -> dict:
    """What FluxPipeline calls ``set_timesteps`` with; 1,024 tokens are 512 x 512 pixels."""
    return {"sigmas": np.linspace(1.0, 1 / steps, steps), "mu": calculate_shift(tokens)}


def sd3_times(steps: int) -> dict:
    """What StableDiffusion3Pipeline calls ``set_timesteps`` with, without dynamic shifting."""
    return {"num_inference_steps": steps}


SHIPPED = {
    "SD3": (SD3, sd3_times),
    "FLUX.1-dev": (DEV, flux_times),
    "FLUX.1-schnell": (FLOW | {"shift": 1.0}, lambda steps: {"sigmas": np.linspace(1.0, 1 / steps, steps)}),
    "linear": (DEV | {"time_shift_type": "linear"}, flux_times),
    "terminal": (TERMINAL, flux_times),
}


def made(name: str, steps: int, eta: float, noise: str | None = None) -> TransitionTable:
    config, times = SHIPPED[name]
    return transition_table(config, steps, eta, noise, times(steps))


# --- times and steps --------------------------------------------------------------------------------------------------


def test_sd3_has_the_twice_shifted_times_of_its_pipeline():
    table = made("SD3", 10, 0.0)
    shown = [1, 0.9601, 0.9133, 0.8577, 0.7904, 0.7073, 0.6022, 0.4649, 0.2780, 0.0089]
    assert (table.timesteps / 1000).tolist() == pytest.approx(shown, abs=1e-4)
    assert table.timesteps.dtype == torch.float32 and {table.a.dtype, table.b.dtype, table.sigma.dtype} == {torch.float64}


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("name", SHIPPED)
def test_without_noise_every_step_is_diffusers_own(name, noise):
    config, times = SHIPPED[name]
    for steps in (2, 10, 50):
        scheduler = FlowMatchEulerDiscreteScheduler.from_config(config)
        scheduler.set_timesteps(**times(steps))
        table = made(name, steps, 0.0, noise)
        assert len(table) == steps and table.timesteps.equal(scheduler.timesteps) and not table.trainable.any()
        for t, a, b in zip(scheduler.timesteps, table.a, table.b, strict=True):
            x, v = torch.randn(2, 64, generator=torch.Generator().manual_seed(int(t)))
            theirs = scheduler.step(v, t, x).prev_sample
            torch.testing.assert_close(a * x.double() + b * v.double(), theirs.double(), rtol=0, atol=1e-6)


def test_the_default_noise_of_a_flow_is_sde():
    for default, named in ((None, "sde"), ("sde", "sde")):
        assert made("SD3", 10, 0.7, default).sigma.equal(made("SD3", 10, 0.7, named).sigma)
    assert not made("SD3", 10, 0.7).sigma.equal(made("SD3", 10, 0.7, "dance").sigma)


@pytest.mark.parametrize("name", ["SD3", "FLUX.1-dev", "terminal"])
def test_means_follow_from_the_score_and_from_the_predicted_picture_and_noise(name):
    eta = 0.7
    s = torch.cat([made(name, 10, 0).timesteps.double() / 1000, torch.zeros(1, dtype=torch.float64)])
    x, v = torch.randn(2, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for i in range(10):
        at, ds = s[i], s[i + 1] - s[i]
        x_0, eps = x - at * v, x + (1 - at) * v
        score, last = -eps / at, i == 9
        sde = 0 if last else eta * (at / (1 - (s[1] if i == 0 else at))).sqrt()
        for noise, g in (("sde", sde), ("dance", 0 if last else eta)):
            table = made(name, 10, eta, noise)
            mean = x + (v - g**2 / 2 * score) * ds
            torch.testing.assert_close(table.a[i] * x + table.b[i] * v, mean, rtol=1e-6, atol=1e-6)
            assert table.sigma[i].item() == pytest.approx(float(g * (-ds).sqrt()), rel=1e-5)
        table = made(name, 10, eta, "cps")
        sigma = s[i + 1] * math.sin(eta * math.pi / 2)
        mean = (1 - s[i + 1]) * x_0 + (s[i + 1] ** 2 - sigma**2).sqrt() * eps
        torch.testing.assert_close(table.a[i] * x + table.b[i] * v, mean, rtol=1e-6, atol=1e-6)
        assert table.sigma[i].item() == pytest.approx(sigma.item(), rel=1e-5)


@pytest.mark.parametrize("noise", NOISES)
def test_the_last_step_has_no_noise_and_is_not_trained(noise):
    for name in SHIPPED:
        table = made(name, 10, 0.8, noise)
        assert table.trainable.tolist() == [True] * 9 + [False]
        s = table.timesteps[-1].item() / 1000
        assert (table.a[-1].item(), table.b[-1].item()) == pytest.approx((1, -s), rel=1e-6)
    assert not made("FLUX.1-schnell", 1, 0.8, noise).trainable.any()


@pytest.mark.parametrize("noise", NOISES)
def test_steps_outside_of_noise_steps_are_deterministic(noise):
    config, times = SHIPPED["SD3"]
    noisy, quiet = made("SD3", 10, 0.7, noise), made("SD3", 10, 0.0, noise)
    table = transition_table(config, 10, 0.7, noise, times(10), (1, 3))
    assert table.trainable.nonzero()[:, 0].tolist() == [1, 2, 3] and table.timesteps.equal(noisy.timesteps)
    for name in ("a", "b", "sigma"):
        of, wanted, still = (getattr(t, name) for t in (table, noisy, quiet))
        assert of[1:4].equal(wanted[1:4]) and of[0] == still[0] and of[4:].equal(still[4:])


def test_the_first_step_of_sde_has_noise_eta():
    """From s = 1, where g = eta sqrt(s / (1 - s)) has no bound of its own; as in Flow-GRPO."""
    for name in SHIPPED:
        for steps in (10, 40):
            table = made(name, steps, 0.7)
            assert table.sigma[0].item() == pytest.approx(0.7, rel=1e-6) and table.sigma.max() < 0.8
    # a first time that is 1 but for rounding is taken for 1
    off = transition_table(FLOW, 4, 0.7, "sde", {"sigmas": [1 - 1e-7, 0.75, 0.5, 0.25]})
    assert off.sigma[0].item() == pytest.approx(0.7, rel=1e-6)


def test_how_much_each_step_says_of_the_network():
    """|b| / sigma: SD3 at 10 steps; of cps the last but one step, to the twice shifted last time, stands far out."""
    trained = {noise: made("SD3", 10, eta, noise) for noise, eta in (("sde", 0.7), ("dance", 0.3), ("cps", 0.7))}
    signal = {noise: (table.b.abs() / table.sigma)[:-1].tolist() for noise, table in trained.items()}
    assert signal["sde"] == pytest.approx([0.06, 0.08, 0.13, 0.19, 0.26, 0.37, 0.54, 0.82, 1.49], abs=6e-3)
    assert (min(signal["dance"]), max(signal["dance"])) == pytest.approx((0.67, 1.93), abs=6e-3)
    assert max(signal["cps"]) == signal["cps"][-1] > 30 * 0.9 and signal["cps"][-2] < 2


# --- marginals --------------------------------------------------------------------------------------------------------


def final_spread(table: TransitionTable, spread: float) -> float:
    """The standard deviation of x_0 that a table draws with the exact velocity of data N(0, spread^2): in closed form.

    (1 - s) x_0 + s eps has the variance V = (1 - s)^2 spread^2 + s^2, and E[eps - x_0 | x_s] = (s - (1 - s) spread^2) / V x_s.
    So every step is a factor and a noise.
    """
    variance, times = 1.0, table.timesteps.double() / 1000
    for s, a, b, sigma in zip(*(column.tolist() for column in (times, table.a, table.b, table.sigma)), strict=True):
        velocity = (s - (1 - s) * spread**2) / ((1 - s) ** 2 * spread**2 + s**2)
        variance = (a + b * velocity) ** 2 * variance + sigma**2
    return variance**0.5


@pytest.mark.parametrize("name", ["SD3", "FLUX.1-dev"])
@pytest.mark.parametrize("noise, eta", [("sde", 0.7), ("sde", 1.0), ("dance", 0.3), ("dance", 1.0)])
def test_sde_and_dance_draw_the_right_spread_in_the_limit_of_many_steps(name, noise, eta):
    errors = [abs(final_spread(made(name, steps, eta, noise), 0.5) / 0.5 - 1) for steps in (10, 160, 2560)]
    assert errors[2] < 0.01 and errors[0] > 3 * errors[2]
    without = abs(final_spread(made(name, 2560, 0.0, noise), 0.5) / 0.5 - 1)
    assert without < 0.01


@pytest.mark.parametrize("steps", [1, 2, 10, 40])
def test_cps_is_exact_for_a_point_mass_at_any_number_of_steps(steps):
    """All data at one point: x_s is always (1 - s) x_0 + s eps, and what is drawn is the point."""
    for name in ("SD3", "FLUX.1-schnell"):
        table = made(name, steps, 0.8, "cps")
        variance, after = 1.0, [*(table.timesteps[1:].double() / 1000).tolist(), 0.0]
        for t, a, b, sigma, s_next in zip(table.timesteps.double(), table.a, table.b, table.sigma, after, strict=True):
            variance = (a + b / (t / 1000)) ** 2 * variance + sigma**2  # v = (x - x_0) / s, with x_0 = 0
            assert float(variance) == pytest.approx(s_next**2, abs=1e-7)
        assert variance < 1e-12


def test_cps_shrinks_any_other_spread_however_many_steps():
    """To spread cos(eta pi / 4) in the limit: at eta 0.7 to 0.42 in place of 0.5, which docs/method.md says."""
    assert final_spread(made("SD3", 2560, 0.7, "cps"), 0.5) == pytest.approx(0.42, abs=5e-3)
    for eta in (0.3, 0.7, 1.0):
        limit = 0.5 * math.cos(eta * math.pi / 4)
        many = [final_spread(made("FLUX.1-schnell", steps, eta, "cps"), 0.5) for steps in (160, 2560, 40960)]
        assert many[0] < many[1] < many[2] < limit and many[2] == pytest.approx(limit, rel=2e-3)


# --- densities --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("noise", NOISES)
def test_samples_have_the_mean_and_the_true_log_density_of_their_step(noise):
    table = made("SD3", 10, 0.7, noise)
    x = reference.initial_noise(3, torch.arange(2), (4, 8, 8))
    c, u = torch.randn(2, *x.shape, generator=torch.Generator().manual_seed(1))
    for i in range(10):
        columns = (column[i].float().expand(2) for column in (table.a, table.b, table.sigma))
        after, log_prob = reference.sample_transition(c, u, x, *columns, 4.5, 3, torch.arange(2), i)
        mean = table.a[i] * x.double() + table.b[i] * (u + 4.5 * (c - u)).double()
        if table.sigma[i] == 0:
            assert (after - mean).abs().max() < 1e-5 and not log_prob.any()
            continue
        exact = Normal(mean, table.sigma[i]).log_prob(after.double()).flatten(1).mean(1)
        torch.testing.assert_close(log_prob.double(), exact, rtol=1e-5, atol=1e-4)
        x = after


# --- the forward process ----------------------------------------------------------------------------------------------


def test_final_latents_are_noised_along_the_flow_and_the_mean_is_the_noise(make_config):
    config = make_config(algorithm="loop_forward", forward={"levels": 4, "window": [0, 1000]}, images_per_prompt=2)
    schedule = made("SD3", 10, 0.0).schedule
    assert schedule.last == 1000
    x_0 = torch.randn(6, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    process = ForwardProcess(config, schedule, reference, torch.device("cpu"))
    row = process.rows(x_0, torch.arange(6), torch.tensor([0, 0, 1, 2, 3, 3]))
    assert row["timestep"].dtype == torch.float32 and row["timestep"].equal(row["timestep"].round())
    s, noise = (row["timestep"] / 1000).view(-1, 1, 1, 1), row["x_prev"]
    torch.testing.assert_close(row["x_t"], (1 - s) * x_0 + s * noise, rtol=0, atol=1e-6)
    mean = reference.transition_mean(noise - x_0, None, row["x_t"], row["a"], row["b"], 1.0)
    torch.testing.assert_close(mean, noise, rtol=0, atol=1e-5)
    assert row["timestep"][0] == row["timestep"][1] != row["timestep"][2]  # of one prompt, and of another


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"use_karras_sigmas": True}, "scheduler use_karras_sigmas=true: .* set it to false in scheduler/"),
        ({"use_exponential_sigmas": True}, "scheduler use_exponential_sigmas=true: .* set it to false in scheduler/"),
        ({"use_beta_sigmas": True}, "scheduler use_beta_sigmas=true: .* set it to false in scheduler/"),
        ({"stochastic_sampling": True}, "scheduler stochastic_sampling=true: .*sampling.noise; set it to false in"),
        ({"invert_sigmas": True}, "scheduler invert_sigmas=true: .* set it to false in scheduler/"),
        (
            {"_class_name": "FlowMatchHeunDiscreteScheduler"},
            "scheduler _class_name=FlowMatchHeunDiscreteScheduler: this model",
        ),
        (
            {"_class_name": "UniPCMultistepScheduler", "use_flow_sigmas": True},
            "scheduler _class_name=UniPCMultistepScheduler: ",
        ),
        ({"_class_name": None}, "scheduler _class_name=None: this model is a flow; use it with its FlowMatchEuler"),
        ({"shift": -1.0}, "scheduler shift, shift_terminal: times must fall"),
    ],
)
def test_what_is_not_the_models_own_sampler_is_refused_in_one_line(config, words):
    with pytest.raises(ValueError, match=f"^{words}") as refusal:
        transition_table(SD3 | config, 10, 0.7, "sde", sd3_times(10))
    assert "\n" not in str(refusal.value)


def test_a_terminal_shift_of_one_step_is_refused():
    with pytest.raises(ValueError, match="^scheduler shift, shift_terminal: .* or use more steps$"):
        made("terminal", 1, 0.7)


def test_noises_are_refused_for_the_other_kind_of_model(make_config):
    with pytest.raises(ValueError, match="^sampling.noise=ddim: this model is a flow; set it to sde, dance, cps, or to null$"):
        made("SD3", 10, 0.7, "ddim")
    for noise in NOISES:
        config = make_config(sampling={"noise": noise})
        with pytest.raises(UserError, match=f": sampling.noise={noise}: is for flow-matching models, .* to ddim, or to null$"):
            sampler_table(config.model, config.sampling)
    ddim, default = (make_config(sampling={"noise": noise}) for noise in ("ddim", None))
    tables = [sampler_table(config.model, config.sampling) for config in (ddim, default)]
    assert tables[0].sigma.equal(tables[1].sigma)
    with pytest.raises(UserError, match="sampling.noise"):
        make_config(sampling={"noise": "ode"})
