"""Rollouts: K trajectories for each prompt, with everything that an update needs later."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from tqdm import tqdm

from fastloop import kernels
from fastloop.config import Config, ModelConfig, SamplingConfig
from fastloop.denoisers import family, read_json, source
from fastloop.denoisers.base import upload
from fastloop.errors import RewardFailed, UserError
from fastloop.prompts import Prompt
from fastloop.ranks import Ranks
from fastloop.rewards import Rewards, Scores
from fastloop.transitions import TransitionTable, transition_table


@dataclass
class Trajectories:
    """N trajectories of T steps; trajectories p K to p K + K - 1 belong to prompt p.

    Attributes:
        latents: float32 (T + 1, N, C, H, W), x_T first, on the device or in the host's memory; empty where the rollout was
            only for its images.
        log_probs: float32 (T, N), the mean over the latent's elements.
        prompts: N prompts. ids: int64 (N,), the trajectory numbers that key the noise.
        images: uint8 (N, height, width, 3).
    """

    latents: torch.Tensor
    log_probs: torch.Tensor
    prompts: list[str]
    ids: torch.Tensor
    images: np.ndarray

    def pairs(self, at: torch.Tensor, i: torch.Tensor, step: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """x_t and x_{t-1}, float32 (B, C, H, W) on the device, of (trajectory, step) pairs.

        Args:
            at: int64 (B, 2), on the host. i, step: its columns, on the device.
        """
        if self.latents.device == i.device:
            return self.latents[step, i], self.latents[step + 1, i]
        i, step, device = *at.unbind(1), i.device
        return upload(self.latents[step, i], device), upload(self.latents[step + 1, i], device)


class Texts:
    """The conditioning of trajectories: encoded once, or for each micro-batch where updates reach the text encoders."""

    def __init__(self, denoiser, prompts: list[str], sampling: SamplingConfig) -> None:
        self.denoiser, self.prompts, self.sampling = denoiser, prompts, sampling
        if denoiser.trains_text:
            return
        distinct = list(dict.fromkeys(prompts))
        number = {prompt: i for i, prompt in enumerate(distinct)}
        self._row = torch.tensor([number[prompt] for prompt in prompts], device=denoiser.device)
        self._cond, self._uncond = denoiser.encode(distinct, sampling)

    def of(self, at: torch.Tensor, i: torch.Tensor):
        """What `predict` takes as ``cond`` and ``uncond`` for (trajectory, step) pairs.

        Args:
            at: int64 (B, 2), on the host. i: its trajectories, on the device.
        """
        if self.denoiser.trains_text:
            return self.denoiser.encode([self.prompts[k] for k in at[:, 0].tolist()], self.sampling)
        row = self._row[i]
        return self._cond[row], None if self._uncond is None else self._uncond[row]


@torch.no_grad()
def rollout(
    denoiser,
    table: TransitionTable,
    prompts: list[str],
    ids: torch.Tensor,
    *,
    sampling: SamplingConfig,
    seed: int,
    batch: int,
    vae_batch: int,
    backend: str,
    keep_latents: bool = True,
    trajectories_on: str = "device",
    on_images: Callable[[int, np.ndarray], None] = lambda start, images: None,
    on_step: Callable[[int], None] = lambda trajectories: None,
) -> Trajectories:
    """Samples one trajectory for each prompt and number, ``batch`` at a time. The host waits for the device once a batch.

    ``trajectories_on`` is ``memory.trajectories``: with ``host`` the latents are copied beside the work, into pinned memory.
    ``on_images(start, images)`` is called as soon as a batch is decoded, so that rewards run beside the next one;
    ``on_step(n)`` after each denoising step of n trajectories, for progress bars and for leaving early.
    """
    device = denoiser.device
    ops = kernels.backend(backend, device)
    a, b, sigma = (column.float().to(device) for column in (table.a, table.b, table.sigma))
    timesteps, ids = table.timesteps.to(device), ids.to(device)
    shape = denoiser.latent_shape(sampling.height, sampling.width)
    stored = (len(table) + 1, len(prompts), *shape) if keep_latents else (0,)
    on_host = trajectories_on == "host" and device.type != "cpu"
    latents = torch.empty(stored, pin_memory=device.type == "cuda") if on_host else torch.empty(stored, device=device)
    if not denoiser.trains_text:
        denoiser.encode(list(dict.fromkeys(prompts)), sampling)  # what is new all at once: the text encoders come in once
    log_probs = torch.empty((len(table), len(prompts)), device=device)
    images = []
    for start in range(0, len(prompts), batch):
        chunk = slice(start, min(start + batch, len(prompts)))
        number = ids[chunk]
        n = len(number)
        cond, uncond = denoiser.encode(prompts[chunk], sampling)
        x = ops.initial_noise(seed, number, shape)
        if keep_latents:
            latents[0, chunk].copy_(x, non_blocking=True)
        for step in range(len(table)):
            outputs = denoiser.predict(x, timesteps[step].expand(n), cond, uncond)
            coefficients = (column[step].expand(n) for column in (a, b, sigma))
            x, log_probs[step, chunk] = ops.sample_transition(
                *outputs, x, *coefficients, sampling.guidance_scale, seed, number, step
            )
            if keep_latents:
                latents[step + 1, chunk].copy_(x, non_blocking=True)
            on_step(n)
        images.append(denoiser.decode(x, vae_batch))  # waits for the device, so that latents on the host are there too
        on_images(start, images[-1])
    return Trajectories(latents, log_probs, prompts, ids, np.concatenate(images))


def scored_rollout(
    denoiser,
    table: TransitionTable,
    prompts: list[Prompt],
    ids: torch.Tensor,
    rewards: Rewards,
    ranks: Ranks,
    *,
    title: str,
    leave: Callable[[], None],
    **settings,
) -> Trajectories:
    """This rank's share of the trajectories of prompts and numbers; each batch is scored while the next one is sampled.

    All ranks call the UNet equally often, as ZeRO 3 needs: a rank with one trajectory less draws its last one twice, and
    only its latents count twice, nothing else (see `Ranks.padded`). `gather_scores` waits for the rewards.

    Args:
        title: of the progress bar. leave: raises where the run is to be left; called after each step of a single process,
            and after each batch of several. settings: as for `rollout`.
    """
    own, mine = ranks.padded(len(prompts)), len(ranks.share(len(prompts)))
    with tqdm(total=len(own) * len(table), desc=title, leave=False, disable=None if ranks.main else True) as bar:

        def on_step(n: int) -> None:
            bar.update(n)
            if ranks.world == 1:
                leave()

        def on_images(start: int, images: np.ndarray) -> None:
            if ranks.world > 1:
                leave()
            scored = range(start, min(start + len(images), mine))
            if scored:
                rewards.submit(images[: len(scored)], [prompts[own[i]] for i in scored])

        return rollout(
            denoiser,
            table,
            [prompts[i].text for i in own],
            ids[own],
            on_images=on_images,
            on_step=on_step,
            **settings,
        )


def gather_scores(rewards: Rewards, ranks: Ranks, n: int) -> Scores:
    """The rewards of all n trajectories, on every rank; waits for them.

    Raises:
        RewardFailed: as `Rewards.collect`, on every rank, so that all of them end at the same place.
    """
    own, failure = {}, None
    try:
        own = rewards.collect()
    except RewardFailed as error:
        failure = error
    if message := ranks.first_message(str(failure) if failure else ""):
        raise failure or RewardFailed(message)
    return rewards.total({name: ranks.whole(values, n) for name, values in own.items()})


def sampler_table(model: ModelConfig, sampling: SamplingConfig, steps: int | None = None) -> TransitionTable:
    """The transitions of a model's scheduler; loads no weights. Raises ``UserError`` where they cannot be used."""
    path = source(model)
    family(path, model)  # refuses what cannot be trained, whatever its scheduler
    scheduler = read_json(path, model, "scheduler_config.json", "scheduler")
    try:
        return transition_table(scheduler, steps or sampling.steps, sampling.eta)
    except (ValueError, TypeError) as error:
        raise UserError(f"the scheduler of model.path={path}: {error}") from None


def trained_steps(table: TransitionTable, config: Config) -> torch.Tensor:
    """Indices (int64) of the steps that updates draw from: those with noise, less the last ``last_steps.drop``.

    Raises:
        UserError: no step is left, or fewer (trajectory, timestep) pairs than updates.
    """
    steps = torch.nonzero(table.trainable)[:, 0]
    steps = steps[: len(steps) - config.last_steps.drop]
    if len(steps) == 0:
        raise UserError(f"sampling.steps: none of {len(table)} steps can be trained: raise it or lower last_steps.drop")
    pairs = config.passes_per_rollout * config.images_per_rollout * kept_steps(steps, config.timestep_fraction)
    if config.updates_per_rollout > pairs:
        raise UserError(
            f"updates_per_rollout: {config.updates_per_rollout} updates, but a rollout has only {pairs} (trajectory, "
            "timestep) pairs: use fewer"
        )
    return steps


def kept_steps(steps: torch.Tensor, fraction: float) -> int:
    """How many of the trainable steps one pass takes of each trajectory: ``timestep_fraction`` of them, at least one."""
    return max(1, round(fraction * len(steps)))
