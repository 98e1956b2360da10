"""`model.compile: auto`: the UNet's blocks are compiled where the planned iterations pay for the time that it takes.

What compiled code saves nobody knows of a machine and a model beforehand. So a run that is long enough tries it before its
first iteration, and keeps it only where it was measured to pay. Times are of the network's calls alone.
"""

from __future__ import annotations

import time

import torch

from fastloop import kernels
from fastloop.batches import Batches
from fastloop.config import Config
from fastloop.memory.traces import inputs, update_loss

SECONDS_A_GRAPH = 12.0  # of a transformer block, with or without gradients, on a CPU: docs/kernels.md has the measurement
MAY_COST = 1 / 50  # of the run's time in the network, that a trial may take: compiled code has to save as much to pay
CALLS = 2  # that are timed, after one that is not; the faster one counts


def compile_seconds(denoiser, batches: Batches) -> float:
    """Estimate the seconds of compiling the network's repeated blocks for a run.

    One graph for each size of a block, and for each kind of call: the rollout's, the update's, and a KL's.
    """
    kinds = getattr(denoiser.network, "_repeated_blocks", None) or ()
    blocks = [module for module in denoiser.network.modules() if type(module).__name__ in kinds]
    sizes = {tuple(p.shape for p in block.parameters()) for block in blocks}
    return SECONDS_A_GRAPH * len(sizes) * (2 + (batches.config.kl.weight > 0))


def why_not(denoiser, config: Config, problem: str | None) -> str | None:
    """Say why ``auto`` is never compiled here; ``problem`` is what `model.compile` itself would be refused for."""
    if problem is None and config.engine.name == "deepspeed":
        return "with engine.name=deepspeed nothing is tried: set it to regional yourself"
    if problem is None and not getattr(denoiser.network, "_repeated_blocks", None):
        return "this network names no blocks that repeat: set it to true yourself"
    return problem


def decide(denoiser, config: Config, batches: Batches, problem: str | None) -> tuple[Config, str]:
    """Compile the network's blocks if the planned iterations pay for it; the weights and random numbers stay as they are.

    Args:
        denoiser: with its trained parts, not compiled. problem: as for `why_not`.

    Returns:
        The configuration with ``regional`` or ``False`` in place of ``auto``, and a line that says why.
    """
    if problem := why_not(denoiser, config, problem):
        return with_compile(config, False), f"compile      auto: no: {problem}"
    eager, needed = iteration_seconds(denoiser, config, batches), compile_seconds(denoiser, batches)
    n = config.iterations
    if not worth_a_trial(n, eager, needed):
        return with_compile(config, False), f"compile      auto: no: {_in_words(n, eager, needed)}"
    started = time.perf_counter()
    denoiser.compile()
    compiled = iteration_seconds(denoiser, config, batches)
    spent = time.perf_counter() - started
    said = f"UNet calls of an iteration take {eager:.3g} s, compiled {compiled:.3g} s; compiling took {spent:.0f} s"
    if n * (eager - compiled) > spent:
        return with_compile(config, "regional"), f"compile      auto: regional: {said}, and {n} iterations are planned"
    denoiser.uncompile()
    return with_compile(config, False), f"compile      auto: no: {said}, which {n} iterations do not save"


def with_compile(config: Config, choice: bool | str) -> Config:
    """Return the configuration with another ``model.compile``."""
    return config.model_copy(update={"model": config.model.model_copy(update={"compile": choice})})


def worth_a_trial(iterations: int, seconds: float, needed: float) -> bool:
    """Say whether compiling, ``needed`` seconds, is a small part of a run whose iterations take so many in the network."""
    return iterations * seconds * MAY_COST >= needed


def planned_line(config: Config, batches: Batches, denoiser, problem: str | None, seconds: float | None) -> str:
    """Write what a plan says of ``auto``; ``seconds`` are those of an iteration in the network, where they are known."""
    if problem := why_not(denoiser, config, problem):
        return f"compile      auto: no: {problem}"
    needed, n = compile_seconds(denoiser, batches), config.iterations
    if seconds is None:
        least = f"{needed / MAY_COST / n:.3g} s of each of {n} iterations"
        return f"compile      auto: tried if the UNet takes {least}: compiling takes about {needed:.0f} s (on a CPU)"
    tried = worth_a_trial(n, seconds, needed)
    return f"compile      auto: {'tried when the run starts' if tried else 'no'}: {_in_words(n, seconds, needed)}"


def _in_words(iterations: int, seconds: float, needed: float) -> str:
    return (
        f"compiling takes about {needed:.0f} s (on a CPU), a fiftieth of the UNet's time in {iterations} iterations is "
        f"{iterations * seconds * MAY_COST:.0f} s"
    )


def iteration_seconds(denoiser, config: Config, batches: Batches) -> float:
    """Measure how long the network's calls of an iteration take: one call of a rollout and one of an update are timed."""
    ops, parameters = kernels.backend(config.kernels, denoiser.device), list(denoiser.trainable().values())

    @torch.no_grad()
    def sample() -> None:
        denoiser.predict(*inputs(denoiser, config.sampling, batches.rollout))

    def train() -> None:
        torch.autograd.grad(update_loss(denoiser, config, ops, batches.update), parameters)

    calls = -(-batches.share // batches.rollout) * config.sampling.steps, batches.micro_batches * config.updates_per_rollout
    return sum(number * _fastest(call, denoiser.device) for number, call in zip(calls, (sample, train), strict=True))


def _fastest(call, device: torch.device) -> float:
    """Seconds of a call."""
    found = []
    for _ in range(1 + CALLS):
        started = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        found.append(time.perf_counter() - started)
    return min(found[1:])
