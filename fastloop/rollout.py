"""Rollouts: K trajectories for each prompt, with everything that an update needs later."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from tqdm import tqdm

from fastloop import kernels
from fastloop.config import ModelConfig, SamplingConfig
from fastloop.denoisers import family
from fastloop.denoisers.files import model_source, read_scheduler
from fastloop.denoisers.residence import upload
from fastloop.errors import RewardFailed, UserError
from fastloop.prompts import Prompt
from fastloop.ranks import Ranks
from fastloop.rewards.scoring import Rewards, Scores
from fastloop.transitions import TransitionTable, transition_table


@dataclass
class Trajectories:
    """N trajectories of T steps; trajectories p K to p K + K - 1 belong to prompt p. There may be room for more (`Replay`).

    Attributes:
        latents: float32 (T + 1, N, C, H, W), x_T first, on the device or in the host's memory; (1, N, C, H, W), x_0 alone, for
            objectives that take no stored steps; empty where the rollout was only for its images.
        log_probs: float32 (T, N), the mean over the latent's elements.
        prompts: N prompts. ids: int64 (N,), the trajectory numbers that key the noise.
        images: uint8 (N, height, width, 3).
    """

    latents: torch.Tensor
    log_probs: torch.Tensor
    prompts: list[str]
    ids: torch.Tensor
    images: np.ndarray

    def transitions(self, steps: torch.Tensor) -> Transitions:
        """Pair each trajectory with each of these steps (int64 (S,)): N S rows, those of a trajectory together.

        Where only the final latents are there, they are both states of every row, and the log-probs are 0.
        """
        n, room, only_final = len(self.prompts), self.latents.shape[1], len(self.latents) == 1
        trajectory, step = torch.arange(n).repeat_interleave(len(steps)), steps.cpu().repeat(n)
        first = torch.zeros_like(step) if only_final else step
        device = self.log_probs.device
        log_prob = torch.zeros(len(step), device=device) if only_final else self.log_probs.T[:n, steps.to(device)].flatten()
        return Transitions(
            states=self.latents.flatten(0, 1),
            trajectory=trajectory,
            step=step,
            state=first * room + trajectory,
            next_state=(first + (not only_final)) * room + trajectory,
            log_prob=log_prob,
            ids=self.ids,
        )


@dataclass(frozen=True)
class At:
    """Where B rows stand, int64 (B,) each, on the device; and the same columns (B, 5) on the host."""

    row: torch.Tensor
    trajectory: torch.Tensor
    step: torch.Tensor
    state: torch.Tensor
    next_state: torch.Tensor
    on_host: torch.Tensor


@dataclass
class Transitions:
    """What updates draw from: a table with one denoising transition a row. States are stored once, however rows share them.

    Attributes:
        states: float32 (M, C, H, W), latents on the device or in the host's memory.
        trajectory, step, state, next_state: int64 (R,), on the host: whose advantage and prompt a row has, its step of the
            sampler, and the states before and after it.
        log_prob: float32 (R,), at the rollout. ids: int64, the numbers of the trajectories, which key the noise.
    """

    states: torch.Tensor
    trajectory: torch.Tensor
    step: torch.Tensor
    state: torch.Tensor
    next_state: torch.Tensor
    log_prob: torch.Tensor
    ids: torch.Tensor

    def __post_init__(self) -> None:
        self._columns = torch.stack([torch.arange(len(self.step)), self.trajectory, self.step, self.state, self.next_state], 1)

    def __len__(self) -> int:
        return len(self.step)

    @cached_property
    def numbers(self) -> list[int]:
        """The numbers of the trajectories on the host, for which it waits once."""
        return self.ids.tolist()

    def at(self, rows: torch.Tensor) -> At:
        """Say where rows (int64 (B,), on the host) stand, in one copy to the device that the host does not wait for."""
        chosen = self._columns[rows]
        return At(*upload(chosen, self.log_prob.device).unbind(1), on_host=chosen)

    def latents(self, at: At) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the latents before and after the step of each row, float32 (B, C, H, W), on the device."""
        device = at.row.device
        if self.states.device == device:
            return self.states[at.state], self.states[at.next_state]
        before, after = at.on_host[:, 3:].unbind(1)
        return upload(self.states[before], device), upload(self.states[after], device)

    def final(self, at: At) -> torch.Tensor:
        """Return the final latents of each row's trajectory, float32 (B, C, H, W), on the device."""
        last, device = self.states[-len(self.ids) :], at.row.device
        return last[at.trajectory] if last.device == device else upload(last[at.on_host[:, 1]], device)


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

    def of(self, at: At):
        """Return what `predict` takes as ``cond`` and ``uncond`` for rows."""
        if self.denoiser.trains_text:
            return self.denoiser.encode([self.prompts[k] for k in at.on_host[:, 1].tolist()], self.sampling)
        row = self._row[at.trajectory]
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
    fill: bool = False,
    keep: Literal["all", "final", "none"] = "all",
    trajectories_on: str = "device",
    on_images: Callable[[int, np.ndarray], None] = lambda start, images: None,
    on_step: Callable[[int], None] = lambda trajectories: None,
) -> Trajectories:
    """Sample one trajectory for each prompt and number, ``batch`` at a time. The host waits for the device once a batch.

    ``fill`` says whether the network computes ``batch`` rows where there are fewer trajectories, as updates will.
    ``keep`` says which latents are kept: those of all steps, the final ones, or none. ``trajectories_on`` is
    ``memory.trajectories``: with ``host`` the latents are copied beside the work, into pinned memory.
    ``on_images(start, images)`` is called as soon as a batch is decoded, so that rewards run beside the next one;
    ``on_step(n)`` after each denoising step of n trajectories, for progress bars and for leaving early.
    """
    device = denoiser.device
    ops = kernels.backend(backend, device)
    a, b, sigma = (column.float().to(device) for column in (table.a, table.b, table.sigma))
    timesteps, ids = table.timesteps.to(device), ids.to(device)
    shape = denoiser.latent_shape(sampling.height, sampling.width)
    stored = {"all": (len(table) + 1, len(prompts), *shape), "final": (1, len(prompts), *shape), "none": (0,)}[keep]
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
        x = denoiser.initial_latents(ops.initial_noise(seed, number, shape), prompts[chunk])
        if keep == "all":
            latents[0, chunk].copy_(x, non_blocking=True)
        for step in range(len(table)):
            outputs = denoiser.predict(x, timesteps[step].expand(n), cond, uncond, batch if fill else 0)
            if sampling.guidance_rescale and outputs[1] is not None:
                outputs = rescaled(*outputs, sampling.guidance_scale, sampling.guidance_rescale), None
            coefficients = (column[step].expand(n) for column in (a, b, sigma))
            x, log_probs[step, chunk] = ops.sample_transition(
                *outputs, x, *coefficients, sampling.guidance_scale, seed, number, step
            )
            if keep == "all":
                latents[step + 1, chunk].copy_(x, non_blocking=True)
            on_step(n)
        if keep == "final":
            latents[0, chunk].copy_(x, non_blocking=True)
        images.append(denoiser.decode(x, vae_batch))  # waits for the device, so that latents on the host are there too
        on_images(start, images[-1])
    return Trajectories(latents, log_probs, prompts, ids, np.concatenate(images))


def rescaled(cond: torch.Tensor, uncond: torch.Tensor, scale: float, share: float) -> torch.Tensor:
    """Return share m std(c) / std(m) + (1 - share) m for m = u + scale (c - u), as stock's pipelines do (arXiv 2305.08891).

    Args:
        cond, uncond: outputs with the prompt and without, c and u, (n, C, H, W); the spread is that of each row.
    """
    guided, axes = uncond + scale * (cond - uncond), tuple(range(1, cond.dim()))
    return guided * (share * cond.std(axes, keepdim=True) / guided.std(axes, keepdim=True) + 1 - share)


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
    """Sample this rank's share of the trajectories of prompts and numbers, each batch scored while the next is sampled.

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
    """Wait for the rewards of all n trajectories, and return them on every rank.

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
    return rewards.total({name: ranks.gather_shares(values, n) for name, values in own.items()})


def sampler_table(model: ModelConfig, sampling: SamplingConfig) -> TransitionTable:
    """Return the transitions of a model's scheduler; loads no weights.

    Raises:
        UserError: the scheduler cannot be used, or the model does not take these settings.
    """
    path = model_source(model)
    adapter = family(path, model)  # refuses what cannot be trained, whatever its scheduler
    adapter.check_settings(path, model, sampling)
    scheduler = adapter.as_in_stock(read_scheduler(path, model))
    try:
        flow = adapter.flow_times(path, model, scheduler, sampling)
        return transition_table(scheduler, sampling.steps, sampling.eta, sampling.noise, flow, sampling.noise_steps)
    except (ValueError, TypeError) as error:
        raise UserError(f"the scheduler of model.path={path}: {error}") from None
