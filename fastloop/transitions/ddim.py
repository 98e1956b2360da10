"""The steps of models that were trained with discrete betas.

Whatever solver a repository ships, fastloop samples with DDIM and noise eta (arXiv 2010.02502, equations 12 and 16),
since a policy gradient needs the density of each step. From the config it takes what the model was trained with (betas,
prediction type) and the choice of timesteps. What only concerns the replaced solver (solver_order, use_karras_sigmas,
skip_prk_steps ...) is ignored, and so is set_alpha_to_one: a step that would pass timestep 0 lands on the noise level
of timestep 0, which keeps its sigma positive.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DDIMScheduler

from fastloop.transitions.table import FILE, TransitionTable

# What diffusers takes an absent key for, then the classes that differ. Without a class name nothing is clipped.
_DEFAULTS = {
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
    "rescale_betas_zero_snr": False,
    "prediction_type": "epsilon",
    "timestep_spacing": "leading",
    "steps_offset": 0,
    "clip_sample": False,
}
_CLIPS = {"clip_sample": True}
_LINSPACE = {"timestep_spacing": "linspace"}
_SD_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
_LINSPACE_SD_BETAS = _LINSPACE | {"beta_start": 0.00085, "beta_end": 0.012}
_CLASS_DEFAULTS: dict[str | None, dict[str, Any]] = {
    None: {},
    "DDIMScheduler": _CLIPS,
    "DDIMParallelScheduler": _CLIPS,
    "DDPMScheduler": _CLIPS,
    "DDPMParallelScheduler": _CLIPS,
    "PNDMScheduler": {},
    "DEISMultistepScheduler": _LINSPACE,
    "DPMSolverMultistepScheduler": _LINSPACE,
    "DPMSolverSDEScheduler": _LINSPACE_SD_BETAS,
    "DPMSolverSinglestepScheduler": _LINSPACE,
    "EulerAncestralDiscreteScheduler": _LINSPACE,
    "EulerDiscreteScheduler": _LINSPACE,
    "HeunDiscreteScheduler": _LINSPACE_SD_BETAS,
    "KDPM2AncestralDiscreteScheduler": _LINSPACE_SD_BETAS,
    "KDPM2DiscreteScheduler": _LINSPACE_SD_BETAS,
    "LCMScheduler": _SD_BETAS,
    "LMSDiscreteScheduler": _LINSPACE,
    "SASolverScheduler": _LINSPACE,
    "TCDScheduler": _SD_BETAS,
    "UniPCMultistepScheduler": _LINSPACE,
}
_ACCEPTED = {
    "beta_schedule": ("linear", "scaled_linear", "squaredcos_cap_v2"),
    "prediction_type": ("epsilon", "v_prediction", "sample"),
    "timestep_spacing": ("leading", "trailing", "linspace"),
}
_NOT_AFFINE = "the step is then not affine in the model output and has no Gaussian density; set it to false " + FILE
_REFUSED = {
    "clip_sample": ((True,), _NOT_AFFINE),
    "thresholding": ((True,), _NOT_AFFINE),
    "use_flow_sigmas": ((True,), "this is flow matching; use a model trained with discrete betas"),
    "timestep_type": (("continuous",), "this is an EDM model; use one trained with discrete betas"),
    "variance_type": (("learned", "learned_range"), "the model predicts its variance too; use one that does not"),
}


@dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """The forward process that a model was trained with, x_t = sqrt(alpha_t) x_0 + sqrt(1 - alpha_t) eps.

    Attributes:
        alphas: float64 (num_train_timesteps,), cumulative, falling. prediction: what the network gives: ``epsilon``,
            ``v_prediction`` or ``sample``.
    """

    alphas: torch.Tensor
    prediction: str

    @property
    def last(self) -> int:
        """The largest timestep."""
        return len(self.alphas) - 1

    def levels(self) -> tuple[torch.Tensor, ...]:
        """Return (timestep, signal, noise, ex, em) of each timestep: int64 and float64 (num_train_timesteps,)."""
        _, _, ex, em = self.conversions(self.alphas)
        return torch.arange(len(self.alphas)), self.alphas.sqrt(), (1 - self.alphas).sqrt(), ex, em

    def conversions(self, alpha: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return (cx, cm, ex, em) of noise levels, of their shape: x_0 = cx x + cm m and eps = ex x + em m for an output m."""
        signal, noise = alpha.sqrt(), (1 - alpha).sqrt()
        zero, one = torch.zeros_like(alpha), torch.ones_like(alpha)
        return {
            "epsilon": (1 / signal, -noise / signal, zero, one),
            "v_prediction": (signal, -noise, noise, signal),
            "sample": (zero, one, 1 / noise, -signal / noise),
        }[self.prediction]


def ddim_table(scheduler_config: Mapping[str, Any], steps: int, eta: float) -> TransitionTable:
    """Make the DDIM table of `steps` transitions for a diffusers scheduler config, float64 on the CPU.

    eta in [0, 1] scales the noise: 0 is deterministic, 1 is DDPM. As in diffusers' DDIMScheduler, the step from t lands
    on the noise level of max(t - num_train_timesteps // steps, 0); from t = 0 that is no move at all (a = 1, b = sigma = 0).
    Spacing is leading or trailing; linspace, which fits no fixed stride, is taken as leading with offset 1.

    Raises ValueError, naming the key, for a config whose steps are not affine in the model output or not variance
    preserving with discrete betas, and for steps outside [1, num_train_timesteps].
    """
    settings = _checked_settings(scheduler_config)
    prediction, train_steps = settings["prediction_type"], settings["num_train_timesteps"]
    if not 1 <= steps <= train_steps:
        raise ValueError(f"steps={steps}: must be between 1 and the scheduler's num_train_timesteps={train_steps}")
    if settings["timestep_spacing"] == "linspace":
        # Made for other solvers: DDIM's fixed stride would skip past its timesteps and leave noise in the last latents.
        settings |= {"timestep_spacing": "leading", "steps_offset": 1}
    scheduler = DDIMScheduler(**{key: settings[key] for key in _DEFAULTS})
    # diffusers' own float32 noise levels, which the model was trained at; float64 from here on.
    alphas_cumprod = scheduler.alphas_cumprod.double()
    decreasing = alphas_cumprod[0] < 1 and (alphas_cumprod.diff() < 0).all() and alphas_cumprod[-1] >= 0
    if len(alphas_cumprod) != train_steps or not decreasing:
        keys = "beta_start, beta_end" if settings["trained_betas"] is None else "trained_betas"
        raise ValueError(f"scheduler {keys}: must give num_train_timesteps={train_steps} betas in (0, 1); fix {FILE}")

    scheduler.set_timesteps(steps)
    timesteps = scheduler.timesteps[:steps]  # some trailing spacings (61 steps of 1000) come with an extra timestep -1
    if timesteps.min() < 0 or timesteps.max() >= train_steps:
        raise ValueError(f"scheduler steps_offset={settings['steps_offset']}: too large for steps={steps}; use fewer steps")
    alpha = alphas_cumprod[timesteps]
    alpha_next = alphas_cumprod[(timesteps - train_steps // steps).clamp(min=0)]
    if prediction == "epsilon" and (alpha == 0).any():
        raise ValueError(
            "scheduler rescale_betas_zero_snr=true: x0 cannot be had from epsilon at the first timestep, which is pure"
            f" noise; set it to false, or timestep_spacing to leading, {FILE}"
        )

    schedule = NoiseSchedule(alphas_cumprod, prediction)
    cx, cm, ex, em = schedule.conversions(alpha)
    sigma = eta * ((1 - alpha_next) / (1 - alpha) * (1 - alpha / alpha_next)).sqrt()
    direction = (1 - alpha_next - sigma**2).clamp(min=0).sqrt()  # the factor of eps in the mean
    a = alpha_next.sqrt() * cx + direction * ex
    b = alpha_next.sqrt() * cm + direction * em
    return TransitionTable(timesteps, a, b, sigma, em, schedule)


def with_defaults(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a scheduler's config with absent keys as its diffusers class takes them."""
    return _DEFAULTS | _CLASS_DEFAULTS.get(config.get("_class_name"), {}) | dict(config)


def _checked_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config with absent keys as its diffusers class takes them; ValueError where no table can be made of it."""
    name = config.get("_class_name")
    if name not in _CLASS_DEFAULTS:
        known = ", ".join(filter(None, _CLASS_DEFAULTS))
        raise ValueError(f"scheduler _class_name={name}: no discrete-beta sampler known here; use a model with {known}")
    settings = with_defaults(config)
    for key, (values, problem) in _REFUSED.items():
        if settings.get(key) in values:
            raise ValueError(f"scheduler {key}={str(settings[key]).lower()}: {problem}")
    for key, values in _ACCEPTED.items():
        if settings[key] not in values:
            raise ValueError(f"scheduler {key}={settings[key]}: unknown; set it to {' | '.join(values)} {FILE}")
    return settings
