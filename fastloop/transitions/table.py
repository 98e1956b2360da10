"""What every sampler becomes: one table of Gaussian transitions, and the forward process that its model was trained with."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import torch

FILE = "in scheduler/scheduler_config.json"  # where a refused key stands


class Schedule(Protocol):
    """The forward process that a model was trained with, x_t = signal x_0 + noise eps.

    Attributes:
        last: the largest of its timesteps 0, 1, ...
    """

    last: int

    def levels(self) -> tuple[torch.Tensor, ...]:
        """Return (timestep, signal, noise, ex, em) of each timestep, (last + 1,) each: eps = ex x + em m for an output m.

        ``timestep`` is what the network is called with, as in a `TransitionTable`; the others are float64.
        """


@dataclass(frozen=True, eq=False)
class TransitionTable:
    """Gaussian transitions x' = a x + b m + sigma z of one sampler, first step first; the first x is N(0, I)."""

    timesteps: torch.Tensor  # int64 (T,), of a flow float32: what the denoiser is called with
    a: torch.Tensor  # float64 (T,): factor of the latents x
    b: torch.Tensor  # float64 (T,): factor of the (guided) model output m
    sigma: torch.Tensor  # float64 (T,): standard deviation of the noise
    em: torch.Tensor  # float64 (T,): factor of the output m in the noise that it predicts, eps = ex x + em m
    schedule: Schedule  # of the model, which the table was made of

    def __len__(self) -> int:
        return len(self.timesteps)

    @property
    def trainable(self) -> torch.Tensor:
        """bool (T,): where sigma > 0. The other steps are sampled, but have no density to train."""
        return self.sigma > 0

    def with_noise_in(self, steps: tuple[int, int], quiet: TransitionTable) -> TransitionTable:
        """Take from ``quiet``, of the same sampler without noise, all but the first to the last of these steps."""
        number = torch.arange(len(self))
        noisy = (steps[0] <= number) & (number <= steps[1])
        columns = {name: torch.where(noisy, getattr(self, name), getattr(quiet, name)) for name in ("a", "b", "sigma")}
        return replace(self, **columns)
