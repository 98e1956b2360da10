"""What the phases of an iteration have alive: their operators run on fake tensors, and the storages are added up."""

from __future__ import annotations

import importlib.util
import math
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import ModuleType

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastloop import kernels
from fastloop.config import Config, SamplingConfig
from fastloop.denoisers.base import Denoiser
from fastloop.denoisers.lean import lighten_parts
from fastloop.denoisers.parts import DTYPES
from fastloop.kernels.reference import MicroBatch
from fastloop.losses import micro_batch_loss, update_sampling
from fastloop.noise_policy import noise_terms

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
        """Count the storages of these tensors from now on, as far as they are new; those made elsewhere as nothing."""
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
        """Make these the batches that are traced, unless others are already."""
        for batch in batches[: 2 - len(self._histories)]:
            with self._fake, LiveBytes() as live:
                self._compute(batch)
            self._histories[batch] = np.array(live.history, np.float64)
        return self

    def peak(self, batch: int) -> int:
        """Return the bytes that it has alive at most."""
        if batch not in self._histories:
            self.trace(batch)
        if batch in self._histories:
            return int(self._histories[batch].max())
        (few, before), (many, after) = self._histories.items()
        if len(before) != len(after):  # else: only that the peak grows with the batch
            before, after = (history.max(keepdims=True) for history in (before, after))
        return max(0, int((before + (batch - few) / (many - few) * (after - before)).max()))

    def largest(self, budget: float, cap: int) -> int:
        """Return the largest batch up to ``cap`` that stays within a budget of bytes; 0 where not even one does."""
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
        sizes = {skeleton.latent_shape(of.height, of.width) for of in (config.sampling, config.eval_sampling)}
        self.decoded = max(sizes, key=math.prod)
        lighten_parts(skeleton, config.engine)
        fused = importlib.util.find_spec("triton") is not None and on_gpu
        backend = config.kernels if config.kernels != "auto" else "triton" if fused else "reference"
        if backend == "triton":
            from fastloop.kernels import fused as ops
            from fastloop.kernels.unet import fuse_network

            fuse_network(skeleton.vae)
            fuse_network(skeleton.network)
        else:
            ops = kernels.reference
        self.ops = ops
        half, stage = config.model.dtype != "fp32", config.engine.zero_stage or 0
        rounds = config.engine.name == "torch" and half
        # gradients of half precision are added up elsewhere, and ZeRO shares them out
        self._accumulates = accumulates and not rounds and stage < 2
        self._hands_over = stage > 1 or (rounds and config.model.adapter == "full")
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        with self.fake:
            for module in skeleton.parts.values():
                if module in skeleton.trained_parts.values():
                    module.to(DTYPES[config.model.dtype])  # as an engine does
                make_fake(module)
            if skeleton.noise_policy is not None:
                make_fake(skeleton.noise_policy)
            skeleton.device = torch.device("cpu")  # the choice of operators goes by it
            if config.kl.weight:
                skeleton.keep_reference()
            self.encode = self._encode()
        self.rollout, self.decode = self._phase(self._rollout), Phase(self._decode, self.fake)
        guided = config.eval_sampling.branches > config.sampling.branches
        larger = self.decoded != self.shape or guided
        self.evaluation = self._phase(self._evaluation) if larger else None  # else it is as a rollout
        self.update = self.new_update()

    def new_update(self) -> Phase:
        """Trace the forward and backward of one micro-batch, with the gradients that it leaves, and finds if not the first."""
        return self._phase(self._update)

    def _phase(self, compute: Callable[[int], None]) -> Phase:
        phase = Phase(compute, self.fake)
        # else a trace of 64 rows would run the text encoders 64 times
        return phase.trace(*TRACED) if self.denoiser.trains_text else phase

    def activations(self, batch: int) -> int:
        """Return the bytes of an update of so many pairs at most, without the gradients."""
        gradients = 0 if self._hands_over else sum(map(size_of, self.denoiser.trainable().values()))
        return self.update.peak(batch) - gradients

    def _encode(self) -> int:
        """Bytes at most, of one text."""
        with torch.no_grad(), LiveBytes() as live:
            for name, encoder in self.denoiser.text_encoders.items():
                shape = self.denoiser.config.prompt_chunks, self.denoiser.text_length(name)
                encoder(torch.zeros(shape, dtype=torch.int64), output_hidden_states=True)
        return live.peak

    def _rollout(self, batch: int) -> None:
        self._sample(self.config, batch)

    def _evaluation(self, batch: int) -> None:
        self._sample(self.config.model_copy(update={"sampling": self.config.eval_sampling}), batch)

    def _sample(self, config: Config, batch: int) -> None:
        with torch.no_grad():
            x, t, *text = inputs(self.denoiser, config.sampling, batch)
            outputs = self.denoiser.predict(x, t, *text)
            row, w = torch.ones(batch), config.sampling.guidance_scale
            self.ops.sample_transition(*outputs, x, row, row, row, w, 0, row.long(), 0)

    def _decode(self, batch: int) -> None:
        with torch.no_grad():
            self.denoiser.to_bytes(self.denoiser.to_pictures(torch.empty(batch, *self.decoded)))

    def _update(self, batch: int) -> None:
        parameters = self.denoiser.trainable().values()
        for p in parameters:
            p.grad = torch.empty_like(p) if self._accumulates else None
        with self.gradients_of(parameters):
            update_loss(self.denoiser, self.config, self.ops, batch).backward()

    @contextmanager
    def gradients_of(self, parameters: Iterable[torch.nn.Parameter]) -> Iterator[None]:
        """Have backwards leave gradients as an engine does: none where they go to ranks or masters as they come."""
        hooks = []
        if self._hands_over:
            hooks = [p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None)) for p in parameters]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def inputs(denoiser: Denoiser, sampling: SamplingConfig, batch: int) -> tuple:
    """Make latents, timesteps and both conditions of a micro-batch, in the right shapes; the values are whatever was there.

    Where the text encoders are trained, the conditions come out of them: of as many different prompts as there are rows.
    """
    blank = denoiser.blank_embedding()
    embeddings, absent = [blank] * batch, blank
    if denoiser.trains_text:
        lengths = map(denoiser.text_length, denoiser.text_encoders)
        chunks = denoiser.config.prompt_chunks
        ids = [torch.zeros(chunks, length, dtype=torch.int64, device=denoiser.device) for length in lengths]
        embeddings = [denoiser.embed(ids) for _ in range(batch)]
        zeros = denoiser.absent_is_zero and not sampling.negative_prompt
        absent = blank if zeros or sampling.guidance_scale == 1 else denoiser.embed(ids)
    cond = denoiser.condition(embeddings, sampling)
    uncond = None if sampling.guidance_scale == 1 else denoiser.condition([absent] * batch, sampling)
    x = torch.empty(batch, *denoiser.latent_shape(sampling.height, sampling.width), device=denoiser.device)
    return x, torch.zeros(batch, dtype=denoiser.timestep_dtype, device=denoiser.device), cond, uncond


def update_loss(denoiser: Denoiser, config: Config, ops: ModuleType, batch: int) -> torch.Tensor:
    """Compute the loss of so many rows, as the trainer computes it, of inputs without meaning."""
    if config.trains_noise:
        x = torch.empty(batch, *denoiser.latent_shape(config.sampling.height, config.sampling.width), device=denoiser.device)
        features, row = torch.empty(batch, denoiser.feature_size, device=x.device), torch.ones(batch, device=x.device)
        own = denoiser.noise_policy(features, x.shape[2:])
        return noise_terms(x, *own, row, row, config.objective, config.clip_range, config.kl.weight).loss.sum()
    x, t, *text = inputs(denoiser, update_sampling(config), batch)
    row = torch.ones(batch, device=x.device)
    vectors = dict.fromkeys(("a", "b", "sigma", "log_prob_old", "advantage", "weight"), row)
    number = row.long()
    rows = MicroBatch(x_t=x, x_prev=torch.empty_like(x), **vectors, trajectory=number, step=number, timestep=t)
    noised = rows if config.dlpo.gradient else None
    return micro_batch_loss(denoiser, ops, config, rows, *text, noised=noised)[1].sum()


def size_of(tensor: torch.Tensor) -> int:
    """Return the bytes of a tensor's elements."""
    return tensor.numel() * tensor.element_size()


def make_fake(module: torch.nn.Module) -> None:
    """Gives a module fake tensors in place of its own; within the mode that makes them.

    A parameter with two names, as T5's embedding of tokens, has one stand-in.
    """
    made = {}
    for m in module.modules():
        for name, p in m._parameters.items():
            if p is not None and p not in made:
                fake = torch.empty_strided(p.shape, p.stride(), dtype=p.dtype)
                made[p] = torch.nn.Parameter(fake, p.requires_grad)
            m._parameters[name] = made.get(p)
        for name, b in m._buffers.items():
            if b is not None:
                m._buffers[name] = torch.empty_strided(b.shape, b.stride(), dtype=b.dtype)
