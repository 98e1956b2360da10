"""The memory of an iteration on one rank, by part and by phase."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from fastloop.batches import Batches, evaluation_batch
from fastloop.config import Config
from fastloop.denoisers.parts import part_title
from fastloop.denoisers.texts import CACHE_BYTES
from fastloop.engines.deepspeed import BUCKET
from fastloop.memory.traces import Traced, size_of
from fastloop.objectives import OBJECTIVES
from fastloop.optimizers import state_bytes, step_bytes
from fastloop.values import new_network


@dataclass(frozen=True)
class MemoryNeeds:
    """Bytes on the device of one rank, of the largest where they differ.

    Attributes:
        parts: what stays through an iteration, and what is there while it is used, by name.
        phases: the peak of each phase of an iteration. host: what is in the host's memory instead.
    """

    parts: dict[str, int]
    phases: dict[str, int]
    host: dict[str, int]

    @property
    def peak(self) -> int:
        """Bytes of the phase that needs most."""
        return max(self.phases.values())


def memory_needs(
    batches: Batches, traced: Traced, prompts: int, on_gpu: bool, micro: tuple[int, int, int] | None = None
) -> MemoryNeeds:
    """Estimate the memory of an iteration.

    Args:
        prompts: distinct texts that are encoded. micro: batches of rollout, update and VAE; ``None``: those of ``batches``.
    """
    config, denoiser, share = batches.config, traced.denoiser, batches.share
    sharded, title = Shards(config, batches.world), part_title(denoiser.network_name)
    rollout, update, decode = micro or (batches.rollout, batches.update, batches.vae)
    weights = {name: _bytes(module) for name, module in denoiser.parts.items()}
    trainable = [p.numel() for p in denoiser.trainable().values()]
    trained, network = sum(trainable), weights.pop(denoiser.network_name)
    texts = sum(size for name, size in weights.items() if name != "vae")
    leaves = on_gpu and config.memory.offload_frozen
    stored = OBJECTIVES[config.objective].stored_steps and not config.trains_noise
    states = config.sampling.steps + 1 if stored else 1
    steps = 4 * states * share * math.prod(traced.shape)
    away = on_gpu and config.memory.trajectories == "host"
    with traced.fake:
        embedding = sum(map(size_of, denoiser.blank_embedding()))
    branches = max(config.sampling.branches, config.eval_sampling.branches)
    state = state_bytes(config.optimizer.name, sharded.pieces(trainable))
    stays = {
        title: sharded.weights(network) + sum(map(size_of, denoiser.network.buffers())),  # which ZeRO leaves whole
        "master weights": sharded.masters(trained),
        "optimizer": state,
        "moving average": 4 * trained if config.ema.decay else 0,
        "KL reference": network if config.kl.weight and config.model.adapter == "full" else 0,
        "trajectories": steps
        * (1 if config.replay.rollouts == 1 else 1 + config.replay.rollouts),  # the new one and those kept
        "value network": 16 * _value_parameters(config, denoiser) if config.advantage == "value" else 0,  # and two moments
        # of a rollout's prompts and as many times the negative one; and of all that are kept
        "prompt embeddings": branches * min(config.prompts_per_step, share) * embedding,
    }
    kept = min(prompts * embedding, CACHE_BYTES)
    host = {"trajectories": stays.pop("trajectories")} if away else {}
    (host if on_gpu else stays)["kept embeddings"] = kept
    for name in (*sharded.offloaded, *([title] if config.engine.offload_parameters else [])):
        host[name] = stays.pop(name)
    guests = {"VAE": weights["vae"]} | ({} if denoiser.trains_text else {"text encoders": texts})
    if denoiser.trains_text:
        stays |= {"text encoders": texts, "prompt embeddings": 0}
        (host if on_gpu else stays)["kept embeddings"] = 0
    if leaves:
        host |= guests
    resident = sum(stays.values()) + (0 if leaves else sum(guests.values()))
    gathered = sharded.gathered(network)
    in_step = sharded.gradients(trained) + step_bytes(config.optimizer.name, sharded.pieces(trainable), on_gpu)
    working = {
        "encode": traced.encode + (guests.get("text encoders", 0) if leaves else 0),
        "rollout": traced.rollout.peak(rollout) + gathered,
        "decode": traced.decode.peak(decode) + (weights["vae"] if leaves else 0) + gathered,
        "update": traced.update.peak(update) + sharded.in_backward(trained) + gathered,
        "step": in_step,
    }
    if traced.evaluation:
        batch = evaluation_batch(config, denoiser, config.memory.rollout_batch or rollout)
        working["evaluation"] = traced.evaluation.peak(batch) + gathered - stays.get("trajectories", 0)  # gone by then
    gradients = sharded.gradients(trained)
    parts = {
        **stays,
        **guests,
        "gradients": gradients,
        f"rollout of {rollout}": working["rollout"],
        f"decoding of {decode}": traced.decode.peak(decode),
        f"update of {update} noises" if config.trains_noise else f"activations of {update} pairs": traced.activations(update),
    }
    if stored and rollout <= (config.memory.update_batch or update):  # the first rollout batch is replayed with gradients on
        working["self-check"] = traced.activations(rollout) + gathered
    phases = {name: resident + size for name, size in working.items()}
    return MemoryNeeds({name: size for name, size in parts.items() if size}, phases, {k: v for k, v in host.items() if v})


def _value_parameters(config: Config, denoiser) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in new_network(config, denoiser).parameters())


class Shards:
    """What ZeRO leaves on one of several ranks (arXiv 1910.02054, section 5, and DeepSpeed's buckets), in bytes.

    Without DeepSpeed all of it is here.
    """

    def __init__(self, config: Config, world: int) -> None:
        engine = config.engine
        self.deepspeed = engine.name == "deepspeed"
        self.stage, self.world = (engine.zero_stage if self.deepspeed else 0), world
        self.half = config.model.dtype != "fp32"
        self.size = 2 if self.deepspeed and self.half else 4
        self.accumulated = 4 if config.model.dtype != "fp16" else 2
        self.offloads = engine.offload_optimizer
        self.offloaded = ["master weights", "optimizer"] if engine.offload_optimizer else []

    def _of(self, size: float, stage: int) -> int:
        return math.ceil(size / self.world) if self.stage >= stage else math.ceil(size)

    def pieces(self, sizes: list[int]) -> list[int]:
        """Return the numbers of elements of what the optimizer sees: with ZeRO, one flat piece for each rank."""
        return [self._of(sum(sizes), 1)] if self.stage else sizes

    def weights(self, size: int) -> int:
        """Return the bytes that stay on a rank of so many bytes of weights."""
        return self._of(size, 3)

    def masters(self, trained: int) -> int:
        """Return the bytes of float32 weights behind so many trained parameters; 0 where there are none."""
        return 4 * self._of(trained, 1) if self.half or self.stage else 0

    def gradients(self, trained: int) -> int:
        """Return the bytes of gradients when the optimizer steps."""
        if self.offloads:
            return 0
        if not self.deepspeed:
            return 4 * trained
        return self.accumulated * self._of(trained, 2) + (4 * self._of(trained, 1) if self.stage else 0)

    def in_backward(self, trained: int) -> int:
        """Return the bytes in a backward beside the gradients that the model itself holds."""
        if not self.deepspeed:
            return 4 * trained if self.half else 0  # the masters' sums
        bucket = 2 * self.size * min(BUCKET, trained)
        if self.stage < 2:
            return bucket + (self.accumulated * trained if self.half else 0)
        return bucket + (0 if self.offloads else self.accumulated * self._of(trained, 2))

    def gathered(self, network: int) -> int:
        """Return the bytes of weights that are whole for a while; DeepSpeed keeps a thousand million of them."""
        return min(network, self.size * 10**9) if self.stage == 3 else 0


def _bytes(module: torch.nn.Module) -> int:
    return sum(map(size_of, module.parameters()))
