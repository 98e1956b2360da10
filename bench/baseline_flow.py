"""The plain PPO of bench/baseline_ppo.py on a flow: Stable Diffusion 3's pipeline, sampled with Flow-GRPO's noise.

Written from the published description (arXiv 2505.05470), in eager PyTorch, as one would write it without fastloop. For a time
s, the next one s' and the network's velocity v, with g = eta sqrt(s / (1 - s)):

    x' = x + (v + g^2 / (2 s) (x + (1 - s) v)) (s' - s) + g sqrt(s - s') z

Where s is 1, 1 - s is that of the next time. The last step has no noise and is not trained.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from baseline_ppo import TEXT, BaselinePPO
from torch import Tensor


class FlowPPO(BaselinePPO):
    """Trains the transformer of a StableDiffusion3Pipeline without dynamic shifting."""

    network_name = "transformer"

    @property
    def targets(self) -> dict:
        """The attention of pictures and texts; the last block's queries of the text have no effect."""
        names = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]
        last = self.network.config.num_layers - 1
        return {"target_modules": names, "exclude_modules": rf"transformer_blocks\.{last}\.attn\.add_q_proj"}

    def make_steps(self) -> int:
        """Have the times of the scheduler; all steps but the last are trained."""
        self.times = self.scheduler.sigmas.to(self.device)
        self.timesteps = self.scheduler.timesteps.to(self.device)
        return self.settings.steps - 1

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> dict[str, Tensor]:
        """Embeddings of prompts and of the empty prompt, with the pooled ones."""
        options = {"device": self.device, "num_images_per_prompt": 1, "do_classifier_free_guidance": self.guided}
        if self.settings.max_sequence_length:
            options["max_sequence_length"] = self.settings.max_sequence_length
        found = self.pipe.encode_prompt(prompts, prompts, prompts, **options)
        return {name: value for name, value in zip(TEXT, found, strict=True) if value is not None}

    def predict(self, latents: Tensor, timesteps: Tensor, text: dict[str, Tensor]) -> Tensor:
        """The guided velocity."""
        hidden, pooled = text["cond"], text["pooled"]
        if self.guided:
            latents, timesteps = torch.cat([latents, latents]), torch.cat([timesteps, timesteps])
            hidden, pooled = torch.cat([text["uncond"], hidden]), torch.cat([text["pooled_uncond"], pooled])
        with self.mixed():
            output = self.network(latents.to(self.dtype), hidden, pooled, timesteps).sample.float()
        return self.guide(output)

    def step(self, output: Tensor, timesteps: Tensor, latents: Tensor, following: Tensor | None = None):
        """One step and the log-prob of its result, or of ``following``; after the last one it means nothing."""
        i = (self.timesteps == timesteps[:, None]).int().argmax(1)
        s, after = (self.times[index].view(-1, *[1] * (latents.dim() - 1)) for index in (i, i + 1))
        g = self.settings.eta * (s / torch.where(s == 1, 1 - after, 1 - s)).sqrt() * (after > 0)
        mean = latents + (output + g**2 / (2 * s) * (latents + (1 - s) * output)) * (after - s)
        sigma = g * (s - after).sqrt()
        if following is None:
            following = mean + sigma * torch.randn_like(mean)
        log_prob = -((following - mean) ** 2) / (2 * sigma**2) - sigma.log() - 0.5 * math.log(2 * math.pi)
        return following, log_prob.flatten(1).mean(1)

    def decode(self, latents: Tensor) -> np.ndarray:
        """Pictures uint8 (n, height, width, 3)."""
        config = self.pipe.vae.config
        return super().decode(latents + config.shift_factor * config.scaling_factor)
