"""Compute in one unit: the forward of one row of the network, without gradients. What else costs how many is counted here.

- a trained row: its forward and backward with the adapter at hand, by PyTorch's flop counter;
- a decoded picture: the VAE's operations, by the same counter;
- a reward: its CPU seconds for a picture, over those of a forward for a row, in the same process and on one thread.

Rows are counted where the network is called (`RowCounter`), so that guidance, copies that fill up a batch, replays and a KL's
reference all count; pictures where fastloop decodes them (`PictureCounter`), each with a reward. Text encoders, which see each
prompt once, and optimizer steps do not; CPU seconds have them.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from throughput import unet_flops

from fastloop.batches import Batches, trained_steps
from fastloop.config import Config
from fastloop.denoisers import build_skeleton, ready_denoiser
from fastloop.engines.torch import pick_device
from fastloop.losses import update_sampling
from fastloop.prompts import load_prompts
from fastloop.rewards.scoring import Rewards
from fastloop.rollout import rollout, sampler_table

ROWS = 64  # of the calls that are timed
REPEATS = 5


@dataclass(frozen=True)
class Factors:
    """Forwards of a row that each of these is worth: a trained row, a decoded picture, a reward."""

    trained: float
    decoded: float
    scored: float

    def equivalents(self, sampled: int, trained: int, images: int) -> float:
        """Return the forwards that so many rows without and with gradients and so many pictures are worth."""
        return sampled + self.trained * trained + (self.decoded + self.scored) * images


class RowCounter:
    """Rows of a network's calls since it was last asked, without gradients and with them."""

    def __init__(self, network: torch.nn.Module) -> None:
        self.sampled = self.trained = 0
        network.register_forward_hook(self._count)

    def _count(self, network, inputs, output) -> None:
        if torch.is_grad_enabled():
            self.trained += len(output[0])
        else:
            self.sampled += len(output[0])

    def take(self) -> dict[str, int]:
        """Return both, and begin again."""
        counts = {"sampled": self.sampled, "trained": self.trained}
        self.sampled = self.trained = 0
        return counts


class PictureCounter:
    """Pictures that a denoiser has decoded since it was last asked."""

    def __init__(self, denoiser) -> None:
        self.pictures, decode = 0, denoiser.decode

        def counted(latents: torch.Tensor, batch: int):
            self.pictures += len(latents)
            return decode(latents, batch)

        denoiser.decode = counted

    def take(self) -> dict[str, int]:
        """Return their number, and begin again."""
        pictures, self.pictures = self.pictures, 0
        return {"pictures": pictures}


def rows_of_iteration(config: Config, steps: torch.Tensor | None = None) -> dict[str, int]:
    """Return the rows of the network's calls in an iteration, as `RowCounter` has them, before anything is run.

    ``steps``: int64, those that are trained; ``None``: as from `trained_steps`.
    """
    if steps is None:
        steps = trained_steps(sampler_table(config.model, config.sampling), config)
    batches = Batches(config, steps)
    drawn = -(-batches.share // batches.rollout) * batches.rollout
    updated = sum(-(-rows // batches.update) * batches.update for rows in batches.update_rows) * config.passes_per_rollout
    references = round(updated * update_sampling(config).branches / config.kl.every) if config.kl.weight else 0
    penalties = drawn if config.dlpo.denoises_drawn else 0
    return {
        "sampled": drawn * config.sampling.steps * config.sampling.branches + references + penalties,
        "trained": updated * (update_sampling(config).branches + config.dlpo.gradient),
    }


def measure_factors(config: Config) -> Factors:
    """Count the factors of a model, its adapter and its rewards; a reward's by the fastest of some calls."""
    alone = config.model_copy(update={"sampling": config.sampling.model_copy(update={"guidance_scale": 1.0})})
    flops = unet_flops(alone)
    return Factors(
        trained=flops["forward_backward"] / flops["forward"],
        decoded=_decode_flops(alone) / flops["forward"],
        scored=_reward_forwards(alone),
    )


def _decode_flops(config: Config) -> int:
    """Operations of decoding one picture, counted on the meta device."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    skeleton = build_skeleton(config.model.model_copy(update={"dtype": "fp32"}))
    latents = torch.zeros(1, *skeleton.latent_shape(config.sampling.height, config.sampling.width), device="meta")
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        skeleton.to_pictures(latents)
    return counter.get_total_flops()


def _reward_forwards(config: Config) -> float:
    """CPU seconds of the rewards of a picture over those of a forward of one row."""
    denoiser = ready_denoiser(config, pick_device("auto"))
    known = load_prompts(config.prompts)
    prompts = [known[i % len(known)] for i in range(ROWS)]
    texts, ids = [prompt.text for prompt in prompts], torch.arange(ROWS)
    table = sampler_table(config.model, config.sampling)
    options = {"seed": 0, "batch": ROWS, "vae_batch": config.memory.vae_batch, "backend": config.kernels, "keep": "final"}
    sampled = rollout(denoiser, table, texts, ids, sampling=config.sampling, **options)
    timesteps = table.timesteps[:1].expand(ROWS).to(denoiser.device)
    cond, _ = denoiser.encode(texts, config.sampling)
    rewards = Rewards(config.rewards, prompts, sampled.images.shape[1:3])
    rewards.start()

    @torch.no_grad()
    def forward() -> None:
        denoiser.predict(sampled.latents[0], timesteps, cond, None)

    try:
        return _cpu_seconds(lambda: rewards.score(sampled.images, prompts)) / _cpu_seconds(forward)
    finally:
        rewards.close()


def _cpu_seconds(call) -> float:
    """Of this process, the least of some calls."""
    found = []
    for _ in range(REPEATS):
        started = time.process_time()
        call()
        found.append(time.process_time() - started)
    return min(found)
