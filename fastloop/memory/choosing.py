"""The largest micro-batches that fit into the memory that is free."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from fastloop import kernels
from fastloop.batches import Batches
from fastloop.config import Config
from fastloop.denoisers.base import Denoiser
from fastloop.denoisers.parts import DTYPES
from fastloop.errors import UserError
from fastloop.memory.estimates import memory_needs
from fastloop.memory.traces import TRACED, LiveBytes, Traced, update_loss
from fastloop.optimizers import holding
from fastloop.ranks import Ranks

FILL = 0.9  # of the free memory that automatic batches may fill; the rest is for what is not traced
MOST, MOST_PICTURES = 64, 16  # larger batches are not faster


@dataclass(frozen=True)
class Chosen:
    """What `choose` decided, for run.json. Sizes in bytes: free when the run started, planned at most."""

    rollout_batch: int
    update_batch: int
    vae_batch: int
    free: int
    planned: int


def free_bytes(device: torch.device, neighbours: int) -> int:
    """Return the bytes that a process may take of a device that it shares with so many: of a GPU, what is free there now."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    found = [psutil.virtual_memory().available]
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")  # of a container
    if limit.exists() and used.exists() and limit.read_text().strip() != "max":
        found.append(int(limit.read_text()) - int(used.read_text()))
    return max(0, min(found)) // neighbours


def choose(
    batches: Batches, traced: Traced, prompts: int, ranks: Ranks, on_gpu: bool, free: int, factor: float = 1.0
) -> Chosen:
    """Choose numbers for the batches that are ``auto``: the largest that fit into ``FILL`` of what is free on every rank.

    They are then evened out, so that the last batch is nearly as large as the others. In half precision, where results
    depend on the batch, rollout and update get one size if both are automatic: they are then computed alike.

    Args:
        factor: of the traced working memory, where a probe has shown that it needs more.

    Raises:
        UserError: not even a batch of one fits.
    """
    for phase in (traced.rollout, traced.update, traced.decode):
        phase.trace(*TRACED)
    config, ones = batches.config, memory_needs(batches, traced, prompts, on_gpu, (1, 1, 1))
    limits = {"rollout": batches.share, "update": batches.rows_of_rank, "decode": min(batches.share, MOST_PICTURES)}
    automatic = {name.replace("vae", "decode").removesuffix("_batch") for name in config.memory.automatic}
    given = dict(zip(limits, (config.memory.rollout_batch, config.memory.update_batch, config.memory.vae_batch), strict=True))
    for name in limits:
        if name not in automatic:
            continue
        phase = getattr(traced, name)
        room = (FILL * free - (ones.phases[name] - phase.peak(1))) / factor
        own = phase.largest(room, min(MOST, limits[name]))
        most = -ranks.highest(-own)
        if not most:
            raise UserError(
                f"memory.{name.replace('decode', 'vae')}_batch: auto finds no room for even one: it needs about "
                f"{ones.phases[name] / 2**30:.2f} GiB, and {FILL * free / 2**30:.2f} GiB of what is free may be used: "
                "see docs/memory.md for what to switch on"
            )
        given[name] = -(-limits[name] // -(-limits[name] // most))
    if {"rollout", "update"} <= automatic and config.model.dtype != "fp32":
        given["rollout"] = given["update"] = min(given["rollout"], given["update"])
    micro = tuple(given.values())
    return Chosen(*micro, free, planned=memory_needs(batches, traced, prompts, on_gpu, micro).peak)


def with_batches(config: Config, chosen: Chosen) -> Config:
    """Return the configuration with these numbers."""
    numbers = {name: getattr(chosen, name) for name in ("rollout_batch", "update_batch", "vae_batch")}
    return config.model_copy(update={"memory": config.memory.model_copy(update=numbers)})


def probed_factor(denoiser: Denoiser, config: Config, traced: Traced) -> float:
    """Measure how much more a real forward and backward needs than the traced one, at the chosen batch or what of it fits.

    With weights in the dtype that an engine gives them. Gradients are computed and thrown away, as they come where the trace
    does so, and neither the model nor the random numbers change.
    """
    ops = kernels.backend(config.kernels, denoiser.device)
    trained, batch = denoiser.trainable(), config.memory.update_batch
    rounded = {name: p.detach().to(DTYPES[config.model.dtype]) for name, p in trained.items()}
    while True:
        try:
            with (
                holding(trained, rounded),
                traced.gradients_of(trained.values()),
                LiveBytes() if denoiser.device.type == "cpu" else _CudaBytes(denoiser.device) as live,
            ):
                update_loss(denoiser, config, ops, batch).backward()
            return max(1.0, live.peak / traced.update.peak(batch))
        except torch.OutOfMemoryError:
            if batch == 1:
                raise UserError(
                    "memory.update_batch: auto: the device has no room for one pair: see docs/memory.md for what to switch on"
                ) from None
        finally:
            for p in trained.values():
                p.grad = None
        batch //= 2  # outside of the handler, which holds on to what did not fit
        torch.cuda.empty_cache()


class _CudaBytes:
    """As `LiveBytes`, of PyTorch's allocator on a GPU: ``peak`` beyond what was there before."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.peak = device, 0

    def __enter__(self) -> _CudaBytes:
        torch.cuda.reset_peak_memory_stats(self.device)
        self._before = torch.cuda.memory_allocated(self.device)
        return self

    def __exit__(self, *error) -> None:
        self.peak = torch.cuda.max_memory_allocated(self.device) - self._before
