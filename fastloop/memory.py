"""What a run needs of a device's memory, by part and by phase, and the micro-batches that fit into what is free.

Parts that stay are counted from shapes. What a phase needs beside them is traced: its operators run on fake tensors, which
have shapes and no values, and a dispatch mode adds up the storages that are alive. The work space of operators, fragmentation
and the rewards' own models are in none of this.
"""

from __future__ import annotations

import importlib.util
import math
import os
import re
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastloop import kernels
from fastloop.batches import Batches
from fastloop.config import Config
from fastloop.denoisers.base import CACHED_PROMPTS, DTYPES, Denoiser
from fastloop.engines.deepspeed import BUCKET
from fastloop.errors import UserError
from fastloop.kernels.reference import MicroBatch
from fastloop.losses import micro_batch_loss
from fastloop.objectives import OBJECTIVES
from fastloop.optimizers import state_bytes, step_bytes
from fastloop.ranks import Ranks

FILL = 0.9  # of the free memory that automatic batches may fill; the rest is for what is not traced
MOST, MOST_PICTURES = 64, 16  # larger batches are not faster
TRACED = (2, 3)  # the batches to trace where any may be asked for


class LiveBytes(TorchDispatchMode):
    """Within it, the bytes of the storages that operators make, as long as they live.

    Attributes:
        now, peak: bytes. history: ``now`` after each change.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.history: list[int] = [0]
        self._known: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count(tree_leaves((args, kwargs)), here=False)
        output = func(*args, **(kwargs or {}))
        self.count(tree_leaves(output))
        return output

    def count(self, tensors: Iterable, here: bool = True) -> None:
        """Counts the storages of these tensors from now on, as far as they are new; those made elsewhere as nothing."""
        for tensor in tensors:
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if id(storage) not in self._known:
                    size = storage.nbytes() if here else 0
                    self._known[id(storage)] = weakref.ref(storage, self._forget(id(storage), size))
                    self._change(size)

    def _forget(self, key: int, size: int) -> Callable[[weakref.ref], None]:
        def gone(_: weakref.ref) -> None:
            del self._known[key]
            self._change(-size)

        return gone

    def _change(self, size: int) -> None:
        if not size:
            return
        self.now += size
        self.peak = max(self.peak, self.now)
        self.history.append(self.now)


class Phase:
    """Bytes that a phase of an iteration has alive, of a batch of b, while ``compute(b)`` runs on fake tensors.

    A trace takes seconds for a large model. So the first two batches asked for are traced, and any other follows from them:
    the operators are the same at any batch, and a line goes through each moment.
    """

    def __init__(self, compute: Callable[[int], None], fake: FakeTensorMode) -> None:
        self._compute, self._fake = compute, fake
        self._histories: dict[int, np.ndarray] = {}  # by batch: bytes after each change, float64

    def trace(self, *batches: int) -> Phase:
        """Makes these the batches that are traced, unless others are already."""
        for batch in batches[: 2 - len(self._histories)]:
            with self._fake, LiveBytes() as live:
                self._compute(batch)
            self._histories[batch] = np.array(live.history, np.float64)
        return self

    def peak(self, batch: int) -> int:
        """Bytes at most."""
        if batch not in self._histories:
            self.trace(batch)
        if batch in self._histories:
            return int(self._histories[batch].max())
        (few, before), (many, after) = self._histories.items()
        if len(before) != len(after):  # else: only that the peak grows with the batch
            before, after = (history.max(keepdims=True) for history in (before, after))
        return max(0, int((before + (batch - few) / (many - few) * (after - before)).max()))

    def largest(self, budget: float, cap: int) -> int:
        """The largest batch up to ``cap`` that stays within a budget of bytes; 0 where not even one does."""
        return max((batch for batch in range(1, cap + 1) if self.peak(batch) <= budget), default=0)


class Traced:
    """The phases of an iteration of a configuration, traced on the skeleton, which then holds fake tensors.

    Args:
        accumulates: whether updates have more than one micro-batch, so that gradients are there when one begins.
        on_gpu: whether to trace what a GPU runs, be there one or not.
    """

    def __init__(self, config: Config, skeleton: Denoiser, accumulates: bool, on_gpu: bool) -> None:
        self.config, self.denoiser = config, skeleton
        self.shape = skeleton.latent_shape(config.sampling.height, config.sampling.width)
        self.size = skeleton.image_size(config.sampling)
        fused = importlib.util.find_spec("triton") is not None and on_gpu
        backend = config.kernels if config.kernels != "auto" else "triton" if fused else "reference"
        if backend == "triton":
            from fastloop.kernels import fused as ops
            from fastloop.kernels.unet import fuse_unet

            fuse_unet(skeleton.unet)
        else:
            ops = kernels.reference
        self.ops = ops
        if on_gpu and config.model.dtype != "fp32" and config.engine.name == "torch":
            _upcast_norms(skeleton.unet)
        self._engine_casts = config.engine.name == "deepspeed"
        self._accumulates = accumulates and (config.engine.zero_stage or 0) < 2
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        with self.fake:
            for module in skeleton.parts.values():
                if self._engine_casts and module in skeleton.trained_parts.values():
                    module.to(DTYPES[config.model.dtype])
                _make_fake(module)
            skeleton.device = torch.device("cpu")  # autocast and the choice of operators go by it
            if self._engine_casts:
                skeleton.model = lambda *args, **kwargs: skeleton.unet(*args, **kwargs)  # as in an engine: no autocast
            if config.kl.weight:
                skeleton.keep_reference()
            if (config.engine.zero_stage or 0) > 1:  # gradients go to their ranks as they come
                for p in skeleton.trainable().values():
                    p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
            self.encode = self._encode()
        self.rollout, self.decode = self._phase(self._rollout), Phase(self._decode, self.fake)
        self.update = self.new_update()

    def new_update(self) -> Phase:
        """The forward and backward of one micro-batch, with the gradients that it leaves, and finds if not the first."""
        return self._phase(self._update)

    def _phase(self, compute: Callable[[int], None]) -> Phase:
        phase = Phase(compute, self.fake)
        # else a trace of 64 rows would run the text encoders 64 times
        return phase.trace(*TRACED) if self.denoiser.trains_text else phase

    def activations(self, batch: int) -> int:
        """Bytes of an update of so many pairs at most, without the gradients."""
        gradients = 0 if (self.config.engine.zero_stage or 0) > 1 else sum(map(_size, self.denoiser.trainable().values()))
        return self.update.peak(batch) - gradients

    def _encode(self) -> int:
        """Bytes at most, of one text."""
        with torch.no_grad(), LiveBytes() as live:
            for encoder in self.denoiser.text_encoders.values():
                encoder(torch.zeros(1, encoder.config.max_position_embeddings, dtype=torch.int64), output_hidden_states=True)
        return live.peak

    def _rollout(self, batch: int) -> None:
        with torch.no_grad():
            x, t, *text = inputs(self.denoiser, self.config, batch)
            outputs = self.denoiser.predict(x, t, *text)
            row, w = torch.ones(batch), self.config.sampling.guidance_scale
            self.ops.sample_transition(*outputs, x, row, row, row, w, 0, t, 0)

    def _decode(self, batch: int) -> None:
        with torch.no_grad():
            self.denoiser.to_bytes(self.denoiser.to_pictures(torch.empty(batch, *self.shape)))

    def _update(self, batch: int) -> None:
        for p in self.denoiser.trainable().values():
            p.grad = torch.empty_like(p) if self._accumulates else None
        update_loss(self.denoiser, self.config, self.ops, batch).backward()


def inputs(denoiser: Denoiser, config: Config, batch: int) -> tuple:
    """Latents, timesteps and both conditions of a micro-batch, of the right shapes; the values are whatever was there.

    Where the text encoders are trained, the conditions come out of them: of as many different prompts as there are rows.
    """
    blank = denoiser.blank_embedding()
    embeddings, absent = [blank] * batch, blank
    if denoiser.trains_text:
        lengths = [encoder.config.max_position_embeddings for encoder in denoiser.text_encoders.values()]
        ids = [torch.zeros(1, length, dtype=torch.int64, device=denoiser.device) for length in lengths]
        embeddings = [denoiser.embed(ids) for _ in range(batch)]
        zeros = denoiser.absent_is_zero and not config.sampling.negative_prompt
        absent = blank if zeros or config.sampling.guidance_scale == 1 else denoiser.embed(ids)
    cond = denoiser.condition(embeddings, config.sampling)
    uncond = None if config.sampling.guidance_scale == 1 else denoiser.condition([absent] * batch, config.sampling)
    x = torch.empty(batch, *denoiser.latent_shape(config.sampling.height, config.sampling.width), device=denoiser.device)
    return x, torch.zeros(batch, dtype=torch.int64, device=denoiser.device), cond, uncond


def update_loss(denoiser: Denoiser, config: Config, ops: ModuleType, batch: int) -> torch.Tensor:
    """The loss of so many rows, as the trainer computes it, of inputs without meaning."""
    x, t, *text = inputs(denoiser, config, batch)
    row = torch.ones(batch, device=x.device)
    vectors = dict.fromkeys(("a", "b", "sigma", "log_prob_old", "advantage", "weight"), row)
    rows = MicroBatch(x_t=x, x_prev=torch.empty_like(x), **vectors, trajectory=t, step=t, timestep=t)
    return micro_batch_loss(denoiser, ops, config, rows, *text)[1].sum()


@dataclass(frozen=True)
class Estimate:
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
        return max(self.phases.values())


def estimate(
    batches: Batches, traced: Traced, prompts: int, on_gpu: bool, micro: tuple[int, int, int] | None = None
) -> Estimate:
    """Memory of an iteration.

    Args:
        prompts: distinct texts that are encoded. micro: batches of rollout, update and VAE; ``None``: those of ``batches``.
    """
    config, denoiser, share = batches.config, traced.denoiser, batches.share
    sharded = Shards(config, batches.world)
    rollout, update, decode = micro or (batches.rollout, batches.update, batches.vae)
    weights = {name: _bytes(module) for name, module in denoiser.parts.items()}
    trainable = [p.numel() for p in denoiser.trainable().values()]
    trained, unet = sum(trainable), weights.pop("unet")
    texts = sum(size for name, size in weights.items() if name != "vae")
    leaves = on_gpu and config.memory.offload_frozen
    states = config.sampling.steps + 1 if OBJECTIVES[config.objective].stored_steps else 1
    steps = 4 * states * share * math.prod(traced.shape)
    away = on_gpu and config.memory.trajectories == "host"
    with traced.fake:
        embedding = sum(map(_size, denoiser.blank_embedding()))
    state = state_bytes(config.optimizer.name, sharded.pieces(trainable))
    stays = {
        "UNet": sharded.weights(unet),
        "master weights": sharded.masters(trained),
        "optimizer": state,
        "moving average": 4 * trained if config.ema.decay else 0,
        "KL reference": unet if config.kl.weight and config.model.adapter == "full" else 0,
        "trajectories": steps,
        "prompt embeddings": min(prompts, CACHED_PROMPTS) * embedding,
    }
    host = {"trajectories": stays.pop("trajectories")} if away else {}
    for name in sharded.offloaded:
        host[name] = stays.pop(name)
    guests = {"VAE": weights["vae"]} | ({} if denoiser.trains_text else {"text encoders": texts})
    if denoiser.trains_text:
        stays |= {"text encoders": texts, "prompt embeddings": 0}
    if leaves:
        host |= guests
    resident = sum(stays.values()) + (0 if leaves else sum(guests.values()))
    gathered = sharded.gathered(unet)
    in_step = sharded.gradients(trained) + step_bytes(config.optimizer.name, sharded.pieces(trainable), on_gpu)
    working = {
        "encode": traced.encode + (guests.get("text encoders", 0) if leaves else 0),
        "rollout": traced.rollout.peak(rollout) + gathered,
        "decode": traced.decode.peak(decode) + (weights["vae"] if leaves else 0) + gathered,
        "update": traced.update.peak(update) + sharded.in_backward(trained) + gathered,
        "step": in_step,
    }
    gradients = sharded.gradients(trained)
    parts = {
        **stays,
        **guests,
        "gradients": gradients,
        f"rollout of {rollout}": working["rollout"],
        f"decoding of {decode}": traced.decode.peak(decode),
        f"activations of {update} pairs": traced.activations(update),
    }
    if rollout <= (config.memory.update_batch or update):  # the first rollout batch is replayed with gradients on
        working["self-check"] = traced.activations(rollout) + gathered
    phases = {name: resident + size for name, size in working.items()}
    return Estimate({name: size for name, size in parts.items() if size}, phases, {k: v for k, v in host.items() if v})


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
        self.offloaded += ["UNet"] if engine.offload_parameters else []

    def _of(self, size: float, stage: int) -> int:
        return math.ceil(size / self.world) if self.stage >= stage else math.ceil(size)

    def pieces(self, sizes: list[int]) -> list[int]:
        """Numbers of elements of what the optimizer sees: with ZeRO, one flat piece for each rank."""
        return [self._of(sum(sizes), 1)] if self.stage else sizes

    def weights(self, size: int) -> int:
        return self._of(size, 3)

    def masters(self, trained: int) -> int:
        return 4 * self._of(trained, 1) if self.deepspeed and (self.half or self.stage) else 0

    def gradients(self, trained: int) -> int:
        """When the optimizer steps."""
        if self.offloads:
            return 0
        if not self.deepspeed:
            return 4 * trained
        return self.accumulated * self._of(trained, 2) + (4 * self._of(trained, 1) if self.stage else 0)

    def in_backward(self, trained: int) -> int:
        """Beside the gradients that the model itself holds."""
        if not self.deepspeed:
            return 0
        bucket = 2 * self.size * min(BUCKET, trained)
        if self.stage < 2:
            return bucket + (self.accumulated * trained if self.half else 0)
        return bucket + (0 if self.offloads else self.accumulated * self._of(trained, 2))

    def gathered(self, unet: int) -> int:
        """Weights that are whole for a while; DeepSpeed keeps a thousand million of them."""
        return min(unet, self.size * 10**9) if self.stage == 3 else 0


def _bytes(module: torch.nn.Module) -> int:
    return sum(map(_size, module.parameters()))


def _size(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


# --- batches that fit -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Chosen:
    """What `choose` decided, for run.json. Sizes in bytes: free when the run started, planned at most."""

    rollout_batch: int
    update_batch: int
    vae_batch: int
    free: int
    planned: int


def free_bytes(device: torch.device, neighbours: int) -> int:
    """Memory that a process may take of a device that it shares with so many: of a GPU, what is free there now."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    found = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    if Path("/proc/meminfo").exists():
        found.append(1024 * int(re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())[1]))
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")  # of a container
    if limit.exists() and used.exists() and limit.read_text().strip() != "max":
        found.append(int(limit.read_text()) - int(used.read_text()))
    return max(0, min(found)) // neighbours


def choose(
    batches: Batches, traced: Traced, prompts: int, ranks: Ranks, on_gpu: bool, free: int, factor: float = 1.0
) -> Chosen:
    """Numbers for the batches that are ``auto``: the largest that fit into ``FILL`` of what is free on every rank.

    They are then evened out, so that the last batch is nearly as large as the others. In half precision, where results
    depend on the batch, rollout and update get one size if both are automatic: they are then computed alike.

    Args:
        factor: of the traced working memory, where a probe has shown that it needs more.

    Raises:
        UserError: not even a batch of one fits.
    """
    for phase in (traced.rollout, traced.update, traced.decode):
        phase.trace(*TRACED)
    config, ones = batches.config, estimate(batches, traced, prompts, on_gpu, (1, 1, 1))
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
    return Chosen(*micro, free, planned=estimate(batches, traced, prompts, on_gpu, micro).peak)


def with_batches(config: Config, chosen: Chosen) -> Config:
    """The configuration with these numbers."""
    numbers = {name: getattr(chosen, name) for name in ("rollout_batch", "update_batch", "vae_batch")}
    return config.model_copy(update={"memory": config.memory.model_copy(update=numbers)})


def probed_factor(denoiser: Denoiser, config: Config, traced: Traced) -> float:
    """How much more a real forward and backward needs than the traced one, at the chosen batch or as much of it as fits.

    Gradients are computed and thrown away, so that neither the model nor the random numbers change.
    """
    ops = kernels.backend(config.kernels, denoiser.device)
    parameters, batch = list(denoiser.trainable().values()), config.memory.update_batch
    while True:
        try:
            with LiveBytes() if denoiser.device.type == "cpu" else _CudaBytes(denoiser.device) as live:
                torch.autograd.grad(update_loss(denoiser, config, ops, batch), parameters)
            return max(1.0, live.peak / traced.update.peak(batch))
        except torch.OutOfMemoryError:
            if batch == 1:
                raise UserError(
                    "memory.update_batch: auto: the device has no room for one pair: see docs/memory.md for what to switch on"
                ) from None
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


def _upcast_norms(unet: torch.nn.Module) -> None:
    """What autocast does on a GPU and not on a CPU: these norms are computed in float32, and their outputs are."""
    for module in unet.modules():
        if type(module) in (torch.nn.LayerNorm, torch.nn.GroupNorm):
            module.float().register_forward_pre_hook(lambda _, args: (args[0].float(), *args[1:]))


def _make_fake(module: torch.nn.Module) -> None:
    """Gives a module fake tensors in place of its own; within the mode that makes them."""
    for m in module.modules():
        for name, p in m._parameters.items():
            if p is not None:
                fake = torch.empty_strided(p.shape, p.stride(), dtype=p.dtype)
                m._parameters[name] = torch.nn.Parameter(fake, p.requires_grad)
        for name, b in m._buffers.items():
            if b is not None:
                m._buffers[name] = torch.empty_strided(b.shape, b.stride(), dtype=b.dtype)
