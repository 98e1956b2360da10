"""fastloop.transitions against diffusers' own schedulers: timesteps, steps, densities; and what it refuses."""

import inspect
import math

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from torch.distributions import Normal

from fastloop.objectives import gaussian_kl, kl_factors
from fastloop.transitions import TransitionTable, transition_table
from fastloop.transitions.ddim import _CLASS_DEFAULTS, _DEFAULTS

PREDICTIONS = ("epsilon", "v_prediction", "sample")
SPACINGS = ("leading", "trailing", "linspace")
SD = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "trained_betas": None,
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}
ZERO_SNR = SD | {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}

# scheduler/scheduler_config.json as the repositories ship it, _diffusers_version left out.
SHIPPED = {
    "sd-1.5 PNDM": {"_class_name": "PNDMScheduler", "skip_prk_steps": True} | SD,
    "sd-2.1 DDIM": {"_class_name": "DDIMScheduler", "prediction_type": "v_prediction", "skip_prk_steps": True} | SD,
    "DDPM": {
        "_class_name": "DDPMScheduler",
        "num_train_timesteps": 1000,
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "trained_betas": None,
        "clip_sample": False,
        "clip_sample_range": 1.0,
        "dynamic_thresholding_ratio": 0.995,
        "prediction_type": "epsilon",
        "sample_max_value": 1.0,
        "steps_offset": 0,
        "thresholding": False,
        "timestep_spacing": "leading",
        "variance_type": "fixed_small",
    },
    "sdxl-base-1.0 Euler": SD
    | {
        "_class_name": "EulerDiscreteScheduler",
        "interpolation_type": "linear",
        "prediction_type": "epsilon",
        "sample_max_value": 1.0,
        "skip_prk_steps": True,
        "timestep_spacing": "leading",
        "use_karras_sigmas": False,
    },
    "sd-1.x Euler without spacing": {
        "_class_name": "EulerDiscreteScheduler",
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "interpolation_type": "linear",
        "num_train_timesteps": 1000,
        "prediction_type": "epsilon",
        "set_alpha_to_one": False,
        "skip_prk_steps": True,
        "steps_offset": 1,
        "trained_betas": None,
    },
    "sdxl-turbo EulerAncestral": SD
    | {
        "_class_name": "EulerAncestralDiscreteScheduler",
        "interpolation_type": "linear",
        "prediction_type": "epsilon",
        "sample_max_value": 1.0,
        "skip_prk_steps": True,
        "timestep_spacing": "trailing",
    },
    "DPMSolver with Karras sigmas": {
        "_class_name": "DPMSolverMultistepScheduler",
        "algorithm_type": "dpmsolver++",
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "dynamic_thresholding_ratio": 0.995,
        "lower_order_final": True,
        "num_train_timesteps": 1000,
        "prediction_type": "epsilon",
        "sample_max_value": 1.0,
        "solver_order": 2,
        "solver_type": "midpoint",
        "steps_offset": 1,
        "thresholding": False,
        "timestep_spacing": "linspace",
        "trained_betas": None,
        "use_karras_sigmas": True,
        "variance_type": None,
    },
}
AS_LINSPACE = {"timestep_spacing": "leading", "steps_offset": 1}  # what a table takes linspace for
SHIPPED_SPACING = {
    "sd-1.x Euler without spacing": AS_LINSPACE,
    "sdxl-turbo EulerAncestral": {"timestep_spacing": "trailing"},
    "DPMSolver with Karras sigmas": AS_LINSPACE,
}
CLASSES = [name for name in _CLASS_DEFAULTS if name]


def diffusers_ddim(config: dict, steps: int, double: bool) -> DDIMScheduler:
    """diffusers' scheduler at `steps`; with double, its step() computes in float64 from its own noise levels."""
    keys = inspect.signature(DDIMScheduler.__init__).parameters
    if config.get("timestep_spacing") == "linspace":
        config = config | AS_LINSPACE
    scheduler = DDIMScheduler(**{key: value for key, value in config.items() if key in keys})
    scheduler.set_timesteps(steps)
    if double:
        scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
        scheduler.final_alpha_cumprod = scheduler.final_alpha_cumprod.double()
    return scheduler


def largest_step_error(scheduler: DDIMScheduler, table: TransitionTable, eta: float, dtype: torch.dtype) -> float:
    """max |x'_diffusers - x'_table| / (1 + |x'_table|) over all steps, from the same random x, m, z of that dtype."""
    generator = torch.Generator().manual_seed(0)
    worst = 0.0
    for t, a, b, sigma in zip(table.timesteps.tolist(), table.a, table.b, table.sigma, strict=True):
        x, m, z = torch.randn(3, 2, 4, 8, 8, generator=generator, dtype=dtype)
        theirs = scheduler.step(m, t, x, eta=eta, variance_noise=z if eta > 0 else None).prev_sample
        ours = a * x.double() + b * m.double() + sigma * z.double()
        worst = max(worst, ((theirs - ours).abs() / (1 + ours.abs())).max().item())
    return worst


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("steps", [1, 4, 10, 50])
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_table_equals_diffusers_ddim_step(prediction: str, spacing: str, steps: int, eta: float) -> None:
    config = SD | {"prediction_type": prediction, "timestep_spacing": spacing}
    table = transition_table(config, steps, eta)
    assert len(table) == steps
    assert table.timesteps.dtype == torch.int64
    assert {table.a.dtype, table.b.dtype, table.sigma.dtype} == {torch.float64}

    in_double = diffusers_ddim(config, steps, double=True)
    assert torch.equal(table.timesteps, in_double.timesteps)
    assert largest_step_error(in_double, table, eta, torch.float64) < 1e-12
    # As shipped, diffusers takes 1 - alpha / alpha' in float32, which near t = 0 keeps 4 digits.
    in_single = diffusers_ddim(config, steps, double=False)
    assert largest_step_error(in_single, table, eta, torch.float32) < (2e-5 if prediction == "sample" else 3e-6)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("name", CLASSES)
def test_the_table_of_every_class_is_ddim_with_what_diffusers_takes_from_it(name: str, prediction: str) -> None:
    needs = {"LMSDiscreteScheduler": "scipy", "DPMSolverSDEScheduler": "torchsde"}  # else diffusers has but a stand-in
    if name in needs:
        pytest.importorskip(needs[name])
    cls = getattr(diffusers, name)
    bare = {"_class_name": name, "clip_sample": False, "prediction_type": prediction}
    for config in (bare, bare | {"num_train_timesteps": 500, "beta_start": 0.001, "beta_end": 0.015}):
        live = {key: value for key, value in cls.from_config(config).config.items() if not key.startswith("_")}
        reference = {"timestep_spacing": "linspace"} | live  # DPMSolverSinglestep has no such key and spaces so
        table = transition_table(config, 10, 1.0)
        scheduler = diffusers_ddim(reference | {"set_alpha_to_one": False}, 10, double=True)
        assert torch.equal(table.timesteps, scheduler.timesteps)
        assert largest_step_error(scheduler, table, 1.0, torch.float64) < 1e-12


@pytest.mark.parametrize("steps", [1, 4, 10, 30, 50, 333])
def test_linspace_is_taken_as_leading_with_offset_1_whatever_the_offset_given(steps: int) -> None:
    for offset in (0, 1, 5):
        linspace = transition_table(SD | {"timestep_spacing": "linspace", "steps_offset": offset}, steps, 1.0)
        leading = transition_table(SD | AS_LINSPACE, steps, 1.0)
        for column in ("timesteps", "a", "b", "sigma"):
            assert torch.equal(getattr(linspace, column), getattr(leading, column))
        # The last step lands on the least noise there is: the latents that are decoded are clean.
        assert linspace.timesteps[-1] == 1 and linspace.trainable.all()


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squaredcos_cap_v2", "trained_betas"])
def test_table_follows_every_beta_schedule_and_number_of_train_timesteps(schedule: str) -> None:
    config = SD | {"num_train_timesteps": 400, "prediction_type": "v_prediction"}
    if schedule == "trained_betas":
        config |= {"trained_betas": torch.linspace(0.001, 0.03, 400).tolist()}
    else:
        config |= {"beta_schedule": schedule}
    table = transition_table(config, 20, 1.0)
    assert largest_step_error(diffusers_ddim(config, 20, double=True), table, 1.0, torch.float64) < 1e-12


def test_v_prediction_table_starts_from_pure_noise_with_zero_terminal_snr() -> None:
    config = ZERO_SNR | {"prediction_type": "v_prediction"}
    scheduler = diffusers_ddim(config, 10, double=True)
    assert scheduler.alphas_cumprod[-1] == 0
    assert largest_step_error(scheduler, transition_table(config, 10, 0.5), 0.5, torch.float64) < 1e-12
    table = transition_table(config, 10, 1.0)
    assert table.timesteps[0] == 999
    assert table.a[0] == 0  # the first latents say nothing of x0
    assert all(column.isfinite().all() for column in (table.a, table.b, table.sigma))


def test_epsilon_table_with_zero_terminal_snr_is_made_where_no_timestep_is_pure_noise() -> None:
    table = transition_table(ZERO_SNR | {"timestep_spacing": "leading"}, 50, 1.0)
    assert table.timesteps[0] == 981
    assert table.b.isfinite().all()


@pytest.mark.parametrize("name", SHIPPED)
@pytest.mark.parametrize("steps", [4, 10, 50])
def test_shipped_configs_of_every_solver_give_the_ddim_table_of_their_spacing(name: str, steps: int) -> None:
    config = SHIPPED[name]
    reference = SD | {
        "timestep_spacing": "leading",
        "steps_offset": config["steps_offset"],
        "prediction_type": config.get("prediction_type", "epsilon"),
        **SHIPPED_SPACING.get(name, {}),
    }
    table = transition_table(config, steps, 1.0)
    scheduler = diffusers_ddim(reference, steps, double=True)
    assert torch.equal(table.timesteps, scheduler.timesteps)
    assert largest_step_error(scheduler, table, 1.0, torch.float64) < 1e-12


@pytest.mark.parametrize("name", CLASSES)
def test_absent_keys_mean_what_the_diffusers_class_takes_them_for(name: str) -> None:
    needs = {"LMSDiscreteScheduler": "scipy", "DPMSolverSDEScheduler": "torchsde"}  # else diffusers has but a stand-in
    if name in needs:
        pytest.importorskip(needs[name])
    parameters = inspect.signature(getattr(diffusers, name).__init__).parameters
    # What a class does that has no such key: DPMSolverSinglestep always spaces by linspace, the others do not clip.
    fixed = {"clip_sample": False, "rescale_betas_zero_snr": False, "timestep_spacing": "linspace", "steps_offset": 0}
    for key, value in (_DEFAULTS | _CLASS_DEFAULTS[name]).items():
        assert value == (parameters[key].default if key in parameters else fixed[key]), key


def test_absent_clip_sample_clips_only_where_the_class_named_does() -> None:
    for name, defaults in _CLASS_DEFAULTS.items():
        config = {"_class_name": name} if name else {}
        if name in ("DDIMScheduler", "DDPMScheduler", "DDIMParallelScheduler", "DDPMParallelScheduler"):
            assert defaults == {"clip_sample": True}
            with pytest.raises(ValueError, match="clip_sample"):
                transition_table(config, 10, 1.0)
        else:
            assert len(transition_table(config, 10, 1.0)) == 10


def test_a_live_scheduler_s_config_converts_like_its_file() -> None:
    config = SHIPPED["sdxl-base-1.0 Euler"]
    live = dict(diffusers.EulerDiscreteScheduler.from_config(config).config)
    ours, theirs = transition_table(live, 10, 1.0), transition_table(config, 10, 1.0)
    assert torch.equal(ours.timesteps, theirs.timesteps)
    assert torch.equal(ours.a, theirs.a) and torch.equal(ours.b, theirs.b) and torch.equal(ours.sigma, theirs.sigma)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("steps", [1000, 50])
def test_eta_one_is_the_ddpm_posterior_in_mean_variance_and_log_density(steps: int, prediction: str) -> None:
    scheduler = DDPMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        variance_type="fixed_small",
        prediction_type=prediction,
    )
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    scheduler.set_timesteps(steps)
    table = transition_table(SD | {"steps_offset": 0, "prediction_type": prediction}, steps, 1.0)
    assert torch.equal(table.timesteps, scheduler.timesteps)

    generator = torch.Generator().manual_seed(0)
    # Without the last step: from t = 0 DDPM returns x0, and the table moves nowhere.
    for i in sorted({0, 1, *range(7, steps - 1, steps // 10), steps - 3, steps - 2}):
        t, a, b, sigma = int(table.timesteps[i]), table.a[i], table.b[i], table.sigma[i]
        x, m = torch.randn(2, 1, 4, 8, 8, generator=generator, dtype=torch.float64)
        z = torch.randn(x.shape, generator=torch.Generator().manual_seed(i), dtype=torch.float64)
        sample = scheduler.step(m, t, x, generator=torch.Generator().manual_seed(i)).prev_sample
        ddpm = Normal(sample - scheduler._get_variance(t).sqrt() * z, scheduler._get_variance(t).sqrt())

        mean = a * x + b * m
        torch.testing.assert_close(mean, ddpm.loc, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(sigma.expand_as(x), ddpm.scale, rtol=1e-9, atol=0)
        log_prob = -((sample - mean) ** 2).mean() / (2 * sigma**2) - sigma.log() - math.log(2 * math.pi) / 2
        torch.testing.assert_close(log_prob, ddpm.log_prob(sample).mean(), rtol=1e-7, atol=1e-7)


def test_steps_without_noise_are_not_trainable() -> None:
    assert not transition_table(SD, 10, 0.0).trainable.any()
    assert transition_table(SD, 10, 1.0).trainable.all()
    assert transition_table(SD, 10, 1.0).trainable.dtype == torch.bool


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_step_from_timestep_zero_moves_nothing_and_is_not_trained(prediction: str) -> None:
    config = SD | {"steps_offset": 0, "timestep_spacing": "leading", "prediction_type": prediction}
    table = transition_table(config, 10, 1.0)
    assert table.timesteps[-1] == 0
    torch.testing.assert_close(table.a[-1].item(), 1.0)
    assert abs(table.b[-1]) < 1e-12 and table.sigma[-1] == 0
    assert table.trainable.tolist() == [True] * 9 + [False]


def test_set_alpha_to_one_does_not_change_the_table() -> None:
    one, zero = (transition_table(SD | {"set_alpha_to_one": flag}, 10, 1.0) for flag in (True, False))
    assert torch.equal(one.a, zero.a) and torch.equal(one.sigma, zero.sigma) and one.sigma[-1] > 0


@pytest.mark.parametrize("spacing", SPACINGS)
def test_every_number_of_steps_gives_as_many_falling_timesteps_and_a_finite_table(spacing: str) -> None:
    for steps in (1, 2, 3, 7, 29, 61, 103, 121, 122, 201, 333, 600, 999, *([1000] if spacing != "linspace" else [])):
        table = transition_table(SD | {"steps_offset": 0, "timestep_spacing": spacing}, steps, 1.0)
        assert len(table) == steps
        assert (table.timesteps.diff() < 0).all() and table.timesteps[-1] >= 0 and table.timesteps[0] < 1000
        assert all(column.isfinite().all() for column in (table.a, table.b, table.sigma))


@pytest.mark.parametrize(("steps", "expected"), [(50, 3.27), (10, 8.32)])
def test_the_penultimate_step_is_by_far_the_most_sensitive_to_the_model(steps: int, expected: float) -> None:
    table = transition_table(SD, steps, 1.0)
    sensitivity = table.b.abs() / table.sigma  # |d mean / d epsilon| / sigma
    assert sensitivity[-2].item() == pytest.approx(expected, abs=0.01)
    others = torch.cat([sensitivity[:-2], sensitivity[-1:]])
    assert sensitivity[-2] > 3 * others.max()
    assert sensitivity[-2] > 5 * others.median()


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"clip_sample": True}, "clip_sample=true: .* set it to false in scheduler/scheduler_config.json"),
        ({"thresholding": True}, "thresholding=true: .* set it to false in scheduler/scheduler_config.json"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, "_class_name=FlowMatchEulerDiscreteScheduler: "),
        ({"_class_name": "EDMEulerScheduler"}, "_class_name=EDMEulerScheduler: .* DDIMScheduler"),
        ({"_class_name": "EDMEulerScheduler"}, "_class_name=EDMEulerScheduler: "),
        ({"use_flow_sigmas": True, "prediction_type": "flow_prediction"}, "use_flow_sigmas=true: "),
        ({"prediction_type": "flow_prediction"}, "prediction_type=flow_prediction: .*v_prediction"),
        ({"timestep_type": "continuous", "prediction_type": "v_prediction"}, "timestep_type=continuous: "),
        ({"variance_type": "learned_range"}, "variance_type=learned_range: "),
        ({"beta_schedule": "sigmoid"}, "beta_schedule=sigmoid: "),
        ({"timestep_spacing": "log"}, "timestep_spacing=log: "),
        ({"trained_betas": [0.1] * 10}, "trained_betas: must give num_train_timesteps=1000 betas"),
        ({"trained_betas": [0.01] * 999 + [1.2]}, "trained_betas: must give "),
        ({"beta_start": 0.0}, "beta_start, beta_end: must give "),
        ({"beta_end": 1.5}, "beta_start, beta_end: must give "),
        (ZERO_SNR, "rescale_betas_zero_snr=true: .* set it to false"),
        ({"steps_offset": 101}, "steps_offset=101: too large for steps=10; use fewer steps"),
    ],
)
def test_what_has_no_affine_gaussian_step_is_refused_in_one_line_naming_the_key(config: dict, words: str) -> None:
    with pytest.raises(ValueError, match=f"^scheduler {words}") as refusal:
        transition_table(SD | config, 10, 1.0)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("steps", [0, -1, 1001])
def test_steps_beyond_what_the_model_was_trained_with_are_refused(steps: int) -> None:
    with pytest.raises(ValueError, match=f"^steps={steps}: .*num_train_timesteps=1000"):
        transition_table(SD, steps, 1.0)


def test_as_many_steps_as_timesteps_do_not_fit_behind_an_offset() -> None:
    for config in (SD | {"steps_offset": 1}, SD | {"steps_offset": 0, "timestep_spacing": "linspace"}):
        assert len(transition_table(config, 999, 1.0)) == 999
        with pytest.raises(ValueError, match="^scheduler steps_offset=1: too large for steps=1000; use fewer steps$"):
            transition_table(config, 1000, 1.0)


@pytest.mark.parametrize("eta", [-0.1, 1.1, math.nan])
def test_eta_outside_zero_to_one_is_refused(eta: float) -> None:
    with pytest.raises(ValueError, match=f"^eta={eta}: "):
        transition_table(SD, 10, eta)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_kl_of_form_epsilon_is_the_squared_distance_of_the_predicted_noises(prediction: str) -> None:
    table = transition_table(SD | {"prediction_type": prediction}, 10, 1.0)
    x, one, two = torch.randn(3, 10, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    alphas = table.schedule.alphas[table.timesteps].view(-1, 1)
    if prediction == "sample":
        noises = [(x - alphas.sqrt() * m) / (1 - alphas).sqrt() for m in (one, two)]
    else:
        noises = [m if prediction == "epsilon" else alphas.sqrt() * m + (1 - alphas).sqrt() * x for m in (one, two)]
    means = [table.a.view(-1, 1) * x + table.b.view(-1, 1) * m for m in (one, two)]
    found = kl_factors(table, "epsilon") * gaussian_kl(*means, table.sigma)
    torch.testing.assert_close(found, (noises[0] - noises[1]).square().mean(1))
    assert kl_factors(table, "gaussian").equal(torch.ones(10, dtype=torch.float64))
    assert not kl_factors(transition_table(SD, 10, 0.0), "epsilon").any()
