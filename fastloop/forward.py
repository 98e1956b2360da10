"""The forward process: a rollout's final latents noised again, with noise and levels that the images of a prompt share.

    x_t = signal_t x_0 + noise_t eps,    eps_hat = ex x_t + em m

for the network's output m (`transitions.table.Schedule`). Such a row has the form of a denoising transition: the mean
ex x_t + em m and the sample eps, with one standard deviation for all. So log-prob, loss and KL are computed by what computes
those of steps.
"""

from __future__ import annotations

from types import ModuleType

import torch

from fastloop.config import Config
from fastloop.kernels.reference import philox
from fastloop.objectives import NOISE_SIGMA
from fastloop.transitions.table import Schedule

STREAM = 1 << 33  # training seeds have 32 bits, and evaluations the 33rd: no row shares its noise with a rollout
_WORD = 1 << 32


class ForwardProcess:
    """Makes rows of final latents, each at one of ``forward.levels`` noise levels.

    Noise and levels follow from the number of the prompt's group alone, so that in a sum over a group, whose leave-one-out
    advantages add up to 0, what they do to all of its images alike cancels. The gradient's mean is the same.
    """

    def __init__(
        self,
        config: Config,
        schedule: Schedule,
        ops: ModuleType,
        device: torch.device,
        levels: int | None = None,
        window: tuple[int, int] | None = None,
    ) -> None:
        """``ops`` is what `kernels.backend` gives; ``levels`` and ``window`` are others than those of ``forward``."""
        self.levels, self.window = levels or config.forward.levels, window or config.forward.window
        self.seed = STREAM | config.seed
        self.ops, self.images = ops, config.images_per_prompt
        timesteps, *columns = schedule.levels()
        self._timesteps = timesteps.to(device)
        self._signal, self._noise, self._ex, self._em = (column.float().to(device) for column in columns)

    def timesteps(self, trajectory: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
        """Draw timesteps, int64 (B,): of level j of n uniform in the j-th of n equal parts of the window, its ends included.

        Args:
            trajectory, level: int64 (B,), the numbers that key it; of the trajectory, that of its group.
        """
        zero, (first, last), group = torch.zeros_like(level), self.window, trajectory // self.images
        word = philox(self.seed, (zero, level, group % _WORD, group // _WORD))[0]
        return first + (level * _WORD + word) * (last - first + 1) // (self.levels * _WORD)

    def rows(self, latents: torch.Tensor, trajectory: torch.Tensor, level: torch.Tensor) -> dict[str, torch.Tensor]:
        """Noise final latents, float32 (B, ...): the columns of a `MicroBatch` whose sample is the noise.

        Args:
            trajectory, level: as for `timesteps`; they key the noise as well.
        """
        timestep, group = self.timesteps(trajectory, level), trajectory // self.images
        noise = self.ops.initial_noise(self.seed, group * self.levels + level, tuple(latents.shape[1:]))
        signal, level_noise = (of[timestep].view(-1, *[1] * (latents.dim() - 1)) for of in (self._signal, self._noise))
        return {
            "x_t": signal * latents + level_noise * noise,
            "x_prev": noise,
            "a": self._ex[timestep],
            "b": self._em[timestep],
            "sigma": torch.full_like(self._ex[timestep], NOISE_SIGMA),
            "timestep": self._timesteps[timestep],
        }
