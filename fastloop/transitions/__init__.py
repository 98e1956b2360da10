"""A diffusers scheduler config becomes a table of Gaussian transitions: all that the trainer knows of samplers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastloop.transitions.ddim import ddim_table
from fastloop.transitions.flow import NOISES, SCHEDULER, flow_table
from fastloop.transitions.table import TransitionTable

__all__ = ["TransitionTable", "transition_table"]


def transition_table(
    scheduler_config: Mapping[str, Any],
    steps: int,
    eta: float,
    noise: str | None = None,
    flow: Mapping[str, Any] | None = None,
    noise_steps: tuple[int, int] | None = None,
) -> TransitionTable:
    """Make the table of ``steps`` transitions for a diffusers scheduler config, float64 on the CPU.

    Args:
        eta: in [0, 1], how much noise. noise: ``ddim`` for models of discrete betas, ``sde``, ``dance`` or ``cps`` for flows;
            ``None``: the first of these for the model. flow: of a flow what its pipeline calls its scheduler's
            ``set_timesteps`` with, as from `Denoiser.flow_times`; ``None``: the model is no flow. noise_steps: first and
            last step with noise; the others are those of eta = 0. ``None``: all.

    Raises:
        ValueError: one line that names the key, for a scheduler whose steps are not affine in the network's output or not
            those of the model, and for values out of range.
    """
    name = scheduler_config.get("_class_name")
    if noise_steps is not None:
        noisy, quiet = (transition_table(scheduler_config, steps, of, noise, flow) for of in (eta, 0.0))
        return noisy.with_noise_in(noise_steps, quiet)
    if not 0 <= eta <= 1:
        raise ValueError(f"eta={eta}: must be between 0 (deterministic) and 1")
    if flow is None:
        if noise not in (None, "ddim"):
            raise ValueError(f"sampling.noise={noise}: is for flow-matching models, this is none; set it to ddim, or to null")
        return ddim_table(scheduler_config, steps, eta)
    if name != SCHEDULER:
        raise ValueError(f"scheduler _class_name={name}: this model is a flow; use it with its {SCHEDULER}")
    if noise == "ddim":
        raise ValueError(f"sampling.noise=ddim: this model is a flow; set it to {', '.join(NOISES)}, or to null")
    return flow_table(scheduler_config, eta, noise or NOISES[0], flow)
