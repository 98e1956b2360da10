"""The steps of flow matching: x_s = (1 - s) x_0 + s eps for a time s in [0, 1], and a network that gives v = eps - x_0.

Times are those of diffusers' own FlowMatchEulerDiscreteScheduler, called as the model's pipeline calls it. Its step is
deterministic, x' = x + ds v with ds = s' - s < 0, and has no density. Three noises give it one; without noise all are it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from fastloop.transitions.table import FILE, TransitionTable

SCHEDULER = "FlowMatchEulerDiscreteScheduler"
NOISES = ("sde", "dance", "cps")
_REFUSED = {
    "use_karras_sigmas": "the times are then not those that the model's pipeline is known for",
    "use_exponential_sigmas": "the times are then not those that the model's pipeline is known for",
    "use_beta_sigmas": "the times are then not those that the model's pipeline is known for",
    "stochastic_sampling": "its noise is another; choose one by sampling.noise",
    "invert_sigmas": "time then runs the other way",
}
_PURE = 1e-6  # 1 - s of a time that is 1 but for rounding


@dataclass(frozen=True)
class FlowSchedule:
    """The forward process of a flow, at its timesteps 0, 1, ..., num_train_timesteps, which are s times that number."""

    last: int

    def levels(self) -> tuple[torch.Tensor, ...]:
        """Return (timestep, signal, noise, ex, em) of each timestep, float32 and float64 (num_train_timesteps + 1,).

        eps = x + (1 - s) v.
        """
        timesteps = torch.arange(self.last + 1)
        s = timesteps.double() / self.last
        return timesteps.float(), 1 - s, s, torch.ones_like(s), 1 - s


def flow_table(scheduler_config: Mapping[str, Any], eta: float, noise: str, times: Mapping[str, Any]) -> TransitionTable:
    """Make the table of a flow from its scheduler's config and what its pipeline calls ``set_timesteps`` with.

    ``sde`` and ``dance`` are Euler-Maruyama steps of a process with the flow's marginals, for a noise level g:

        a = 1 + g^2 ds / (2 s),    b = (1 + g^2 (1 - s) / (2 s)) ds,    sigma = g sqrt(-ds)

    with g = eta sqrt(s / (1 - s)) in ``sde`` (Flow-GRPO), where 1 - s of the first step, at s = 1, is taken at the next time,
    as Flow-GRPO does; and g = eta in ``dance`` (DanceGRPO). Their last step, to s = 0, has g = 0: its noise would stay in the
    picture. ``cps`` keeps the latents' noise at s' exactly, sin(eta pi / 2) of it drawn anew:

        c = s' cos(eta pi / 2),    a = 1 - s' + c,    b = -s (1 - s') + (1 - s) c,    sigma = s' sin(eta pi / 2)

    Raises:
        ValueError: one line that names the key, for times that are not the model's own.
    """
    for key, why in _REFUSED.items():
        if scheduler_config.get(key):
            raise ValueError(f"scheduler {key}=true: {why}; set it to false {FILE}")
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(scheduler_config)
    with np.errstate(all="ignore"):
        scheduler.set_timesteps(**times)
    s = scheduler.sigmas.double()  # diffusers' own float32 times, the last one 0; float64 from here on
    if not (s.diff() < 0).all() or s[0] > 1:  # as a terminal shift of a single step, which is not a number
        raise ValueError(
            f"scheduler shift, shift_terminal: times must fall from at most 1 to 0; fix them {FILE}, or use more steps"
        )

    s, after = s[:-1], s[1:]
    if noise == "cps":
        kept = after * math.cos(eta * math.pi / 2)
        a, b = 1 - after + kept, (1 - s) * kept - s * (1 - after)
        sigma = after * math.sin(eta * math.pi / 2)
    else:
        ds = after - s
        left = torch.where(1 - s < _PURE, 1 - after, 1 - s)
        g_squared = eta**2 * (s / left if noise == "sde" else torch.ones_like(s))
        g_squared[-1] = 0
        a, b = 1 + g_squared * ds / (2 * s), (1 + g_squared * (1 - s) / (2 * s)) * ds
        sigma = (g_squared * -ds).sqrt()
    return TransitionTable(scheduler.timesteps, a, b, sigma, 1 - s, FlowSchedule(scheduler.config.num_train_timesteps))
