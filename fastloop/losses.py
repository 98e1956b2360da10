"""The loss of a micro-batch: what updates and the replay compute, what the memory estimate traces and its probe runs."""

from __future__ import annotations

from types import ModuleType

import torch

from fastloop.config import Config, KlConfig, SamplingConfig
from fastloop.kernels.reference import MicroBatch, PolicyTerms, transition_mean
from fastloop.objectives import NOISE_LOG_PROB, OBJECTIVES, gaussian_kl


def update_sampling(config: Config) -> SamplingConfig:
    """Return what updates condition the network on: for objectives of final latents the prompt alone, without guidance."""
    guided = OBJECTIVES[config.objective].stored_steps
    return config.sampling if guided else conditional(config.sampling)


def conditional(sampling: SamplingConfig) -> SamplingConfig:
    """Return what conditions the network on the prompt alone, without guidance."""
    return sampling.model_copy(update={"guidance_scale": 1.0})


def weight_of_kl(config: KlConfig, advantages: torch.Tensor, iteration: int) -> float:
    """Return the factor of the KL in the updates of a rollout: 0 in those that ``kl.every`` leaves out.

    Args:
        advantages: float32, of all rows of the rollout, in whose mean size the weight counts with ``kl.of_advantages``.
    """
    if iteration % config.every:
        return 0.0
    unit = advantages.abs().double().mean().item() if config.of_advantages else 1.0
    return config.weight * config.every * unit


def denoising_error(output: torch.Tensor, batch: MicroBatch) -> torch.Tensor:
    """Return the mean squared error of the predicted noise of noised latents, float32 (B,), as from `ForwardProcess.rows`."""
    predicted = transition_mean(output, None, batch.x_t, batch.a, batch.b, 1.0)
    return (predicted - batch.x_prev).square().flatten(1).mean(1)


def micro_batch_loss(
    denoiser,
    ops: ModuleType,
    config: Config,
    batch: MicroBatch,
    cond,
    uncond,
    full: int = 0,
    noised: MicroBatch | None = None,
    kl_weight: float | None = None,
) -> tuple[PolicyTerms, torch.Tensor, dict[str, torch.Tensor]]:
    """Compute the loss of each row, float32 (B,), with its gradient.

    Args:
        ops: what `kernels.backend` gives. cond, uncond: of the rows' prompts, as `Denoiser.encode` gives them. full: rows that
            the network computes at least, as for `Denoiser.predict`. noised: with ``dlpo.gradient``, noised latents of the
            rows, whose denoising error is part of the loss. kl_weight: as from `weight_of_kl`; ``None``: ``kl.weight``.

    Returns:
        The objective's terms; the whole loss, with KL and weight; and what else is logged of each row, by name.
    """

    def predict(latents: torch.Tensor, timesteps: torch.Tensor):
        return denoiser.predict(latents, timesteps, cond, uncond, full)

    terms, outputs = OBJECTIVES[config.objective].terms(ops, predict, batch, config)
    loss, logged = terms.loss, {}
    if not OBJECTIVES[config.objective].stored_steps:
        error = NOISE_LOG_PROB - terms.log_prob
        logged |= {
            "denoising_loss_better": error * (batch.advantage > 0),
            "denoising_loss_worse": error * (batch.advantage < 0),
        }
    kl_weight = config.kl.weight if kl_weight is None else kl_weight
    if kl_weight:
        with torch.no_grad(), denoiser.reference():
            reference = predict(batch.x_t, batch.timestep)
        means = (
            transition_mean(*of, batch.x_t, batch.a, batch.b, config.sampling.guidance_scale) for of in (outputs, reference)
        )
        distance = gaussian_kl(*means, batch.sigma)
        if batch.kl is not None:
            distance = batch.kl * distance
        loss = loss + kl_weight * distance
        logged["kl_reference"] = distance.detach()
    loss = batch.weight * loss
    if noised is not None:
        error = denoising_error(denoiser.predict(noised.x_t, noised.timestep, cond, None, full)[0], noised)
        loss = loss + config.dlpo.beta * error
        logged["denoising_loss"] = error.detach()
    return terms, loss, logged
