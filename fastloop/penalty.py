"""DLPO's penalty (arXiv 2405.14632): how badly the trained model denoises a picture, which is subtracted from its reward.

    r' = alpha r - beta d,    d = (1/D) sum (eps_hat(x_t, t, c) - eps)^2,    x_t = signal_t x_0 + noise_t eps

for x_0 the final latents that the model drew, eps ~ N(0, I) and one timestep t of the model's schedule, uniform. As in the
forward process, both are shared by the images of a prompt, so that what they do to all of them alike cancels in the advantage.
DLPO takes x_0 from its data set, and the gradient of d too: `dlpo.data`, `dlpo.gradient`.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from PIL import Image

from fastloop.config import Config, SamplingConfig
from fastloop.denoisers.base import Denoiser
from fastloop.denoisers.residence import upload
from fastloop.errors import UserError
from fastloop.forward import ForwardProcess
from fastloop.kernels.reference import MicroBatch
from fastloop.losses import conditional, denoising_error
from fastloop.prompts import Prompt
from fastloop.rollout import Texts, Trajectories
from fastloop.transitions.table import Schedule

PENALTY = ""  # its label among the terms of the reward, which no term of the user's can have


class DenoisingPenalty:
    """Noises final latents, or a user's pictures of their prompts, and measures how badly the model denoises them."""

    def __init__(self, config: Config, denoiser, schedule: Schedule, ops: ModuleType) -> None:
        """``ops`` is what `kernels.backend` gives. Raises ``UserError`` for pictures that cannot be read."""
        self.config, self.denoiser = config, denoiser
        self.process = ForwardProcess(config, schedule, ops, denoiser.device, levels=1, window=(0, schedule.last))
        self.latents = None if config.dlpo.data is None else self._encoded(read_pictures(config.dlpo.data))

    @torch.no_grad()
    def _encoded(self, pictures: dict[str, list[np.ndarray]]) -> dict[str, list[torch.Tensor]]:
        """The latents of pictures, float32, on the host."""
        found: dict[str, list[torch.Tensor]] = {}
        for prompt, of_prompt in pictures.items():
            for picture in of_prompt:
                found.setdefault(prompt, []).append(self.denoiser.encode_picture(picture).cpu())
        return found

    def pictures(self, prompts: list[str], numbers: list[int]) -> torch.Tensor:
        """Return the latents of one of each prompt's own pictures, float32 (B, ...): the trajectories' numbers choose them."""
        own = [self.latents[prompt] for prompt in prompts]
        chosen = torch.stack([of[n % len(of)] for of, n in zip(own, numbers, strict=True)])
        return upload(chosen, self.denoiser.device)

    def rows(self, latents: torch.Tensor, number: torch.Tensor) -> MicroBatch:
        """Noise final latents, float32 (B, ...), of the trajectories of these numbers, int64 (B,), on the device.

        Where they are of the user's pictures every trajectory has noise of its own.
        """
        key = number if self.latents is None else number * self.process.images  # a group for each
        zero = torch.zeros_like(number)
        columns = self.process.rows(latents, key, zero)
        none = torch.zeros_like(columns["a"])
        return MicroBatch(**columns, log_prob_old=none, advantage=none, trajectory=number, step=zero)

    @torch.no_grad()
    def __call__(self, trajectories: Trajectories) -> np.ndarray:
        """Return d of each of a rank's n trajectories, float64 (n,), of the model as it is."""
        size = self.config.memory.rollout_batch
        text, found = Texts(self.denoiser, trajectories.prompts, conditional(self.config.sampling)), []
        final, transitions = trajectories.latents[-1], trajectories.transitions(torch.zeros(1, dtype=torch.int64))
        for chosen in torch.arange(len(trajectories.prompts)).split(size):
            latents, number = (of.to(self.denoiser.device) for of in (final[chosen], trajectories.ids[chosen]))
            batch = self.rows(latents, number)
            cond, _ = text.of(transitions.at(chosen))
            output, _ = self.denoiser.predict(batch.x_t, batch.timestep, cond, None, min(size, len(trajectories.prompts)))
            found.append(denoising_error(output, batch))
        return torch.cat(found).double().cpu().numpy()


def read_pictures(path: str) -> dict[str, list[np.ndarray]]:
    """Read pictures, uint8 (height, width, 3), by prompt: lines of JSON with ``prompt`` and ``image``, a path beside the file.

    Raises:
        UserError: one line that names the file, the line and the remedy.
    """
    file, found = Path(path).expanduser(), {}
    try:
        lines = file.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"dlpo.data: cannot read {path}: {reason}; give a .jsonl file with prompt and image") from None
    for i, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            with Image.open(file.parent / row["image"]) as image:
                found.setdefault(str(row["prompt"]), []).append(np.asarray(image.convert("RGB")))
        except (ValueError, TypeError, KeyError, OSError) as error:
            raise UserError(f'dlpo.data: {path}, line {i}: {error!r}; write {{"prompt": ..., "image": FILE}}') from None
    return found


def check_pictures(path: str, prompts: list[Prompt], skeleton: Denoiser, sampling: SamplingConfig) -> None:
    """Raise ``UserError`` where a model cannot encode pictures, a prompt has none, or one has another size than is drawn."""
    if not skeleton.encodes_pictures:
        raise UserError("dlpo.data: pictures are not encoded for this model: leave it out, and what it draws is denoised")
    found, size = read_pictures(path), skeleton.image_size(sampling)
    for prompt in prompts:
        if prompt.text not in found:
            raise UserError(f"dlpo.data: {path} has no picture of the prompt {prompt.text!r}: add one, or leave it out")
    for prompt, pictures in found.items():
        for height, width, _ in (picture.shape for picture in pictures):
            if (height, width) != size:
                raise UserError(
                    f"dlpo.data: a picture of {prompt!r} has {width} x {height} pixels, training draws {size[1]} x {size[0]}: "
                    "scale it"
                )
