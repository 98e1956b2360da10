"""DeepSpeed's ZeRO, stages 0 to 3, with offload and a JSON of the user's own, applied to the trainer from outside."""

from __future__ import annotations

import importlib.util
import json
import logging
import math
import os
import pkgutil
import re
import socket
import warnings
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from fastloop.batches import Batches
from fastloop.config import Config
from fastloop.engines.torch import describe
from fastloop.errors import RunFailed, UserError
from fastloop.optimizers import build_optimizer
from fastloop.ranks import Ranks

BUCKET = 50_000_000  # elements in one reduction; DeepSpeed's 500 million are more than a LoRA or a small GPU has room for
SWITCHES = {"offload_optimizer": "offload_optimizer", "offload_param": "offload_parameters"}  # DeepSpeed's key: the recipe's
_TAG = "deepspeed"  # the folder of its files in a checkpoint
# What its files hold beside tensors and plain values: nothing with ZeRO 0; with 1, 2 and 3 the loss scaler (with bf16 and fp32
# the one that does not scale) and the stage; with 1 and 2 where a parameter lies in its group. A file that is not honest can
# make these and set their attributes, those of the stage for the whole process, to things that it may hold: wrong values, as
# it can hold anyway. None has a __setstate__, and making one runs nothing but assignments.
_CLASSES = (
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.utils.tensor_fragment.fragment_address",
)


def deepspeed_problem(config: Config, device: torch.device) -> str | None:
    """Say why a configuration cannot run on DeepSpeed here, with the remedy; ``None`` where it can."""
    if importlib.util.find_spec("deepspeed") is None:
        return "engine.name: deepspeed is not installed: pip install fastloop[deepspeed], or set it to torch"
    if config.model.dtype == "fp16" and device.type == "cpu":
        return "model.dtype: DeepSpeed has no fp16 on a CPU: set bf16 or fp32"
    wanted = os.environ.get("DS_ACCELERATOR", device.type)
    if wanted != device.type:
        return f"engine.device: DS_ACCELERATOR={wanted} in the environment, but the device is {device}: set one like the other"
    return None


def deepspeed_settings(batches: Batches, trained: int) -> dict[str, Any]:
    """Derive DeepSpeed's configuration: the user's JSON, with what the recipe and the number of ranks decide put in.

    Args:
        trained: number of trained parameters.

    Raises:
        UserError: the JSON cannot be read, or says other than the recipe.
    """
    config, steps = batches.config, batches.micro_batches
    engine, dtype = config.engine, config.model.dtype
    zero: dict[str, Any] = {"stage": engine.zero_stage}
    for key, name in SWITCHES.items():
        if getattr(engine, name):
            zero[key] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    settings = {
        "train_batch_size": batches.largest_update,
        "train_micro_batch_size_per_gpu": batches.update,
        "gradient_accumulation_steps": steps,
        "gradient_clipping": config.optimizer.max_grad_norm,
        "zero_optimization": zero,
        "bf16": {"enabled": dtype == "bf16"},
        "fp16": {"enabled": dtype == "fp16"},
    }
    own = _read(engine.deepspeed_config) if engine.deepspeed_config else {}
    merged = _merge(own, settings, f"engine.deepspeed_config: {engine.deepspeed_config}:")
    # An update has as many (trajectory, timestep) pairs on any number of ranks. Where they do not divide evenly, the ranks'
    # micro-batches are smaller than DeepSpeed's arithmetic has them; the trainer says which is the last.
    del merged["train_batch_size"]
    # With 1 it would not add up gradients in the CPU's memory, and an uneven share may need one more than the division says.
    merged["gradient_accumulation_steps"] = max(2, steps)
    if dtype == "bf16":
        merged["bf16"].setdefault("check_grad_overflow", True)
        if engine.zero_stage:  # an update may have hundreds of micro-batches to add up
            merged.setdefault("data_types", {"grad_accum_dtype": "fp32"})
    if dtype == "fp16":
        merged["fp16"].setdefault("hysteresis", 1)  # the first overflow lowers the scale, as the trainer counts on
    zero = merged["zero_optimization"]
    for key in ("reduce_bucket_size", "allgather_bucket_size"):
        zero.setdefault(key, min(BUCKET, max(trained, 1)))
    merged.setdefault("zero_allow_untested_optimizer", True)  # bitsandbytes
    merged.setdefault("steps_per_print", 10**9)
    return merged


def _read(path: str) -> dict[str, Any]:
    try:
        values = json.loads(Path(path).expanduser().read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"engine.deepspeed_config: cannot read {path}: {getattr(error, 'strerror', None) or error}") from None
    if not isinstance(values, dict):
        raise UserError(f"engine.deepspeed_config: {path} holds no JSON object")
    remedies = {
        "optimizer": "set optimizer.* in the recipe, and take it out",
        "scheduler": "set optimizer.schedule in the recipe, and take it out",
        **dict.fromkeys(("nebula", "datastates_ckpt"), "it would read checkpoints by code that is not torch's: take it out"),
    }
    for key, remedy in remedies.items():
        if key in values:
            raise UserError(f"engine.deepspeed_config: {path}: {key}: {remedy}")
    return values


def _merge(own: dict[str, Any], derived: dict[str, Any], where: str, prefix: str = "") -> dict[str, Any]:
    """``own`` with ``derived`` put in. A value of its own must be "auto" or the derived one, within 1e-9.

    What the recipe only switches on is the user's below its key.
    """
    merged = dict(own)
    for key, name in SWITCHES.items():
        if key not in derived and isinstance(own.get(key), dict) and own[key].get("device", "none") != "none":
            raise UserError(f"{where} {prefix}{key}: the recipe has engine.{name}=false: set it to true, or take this out")
    for key, value in derived.items():
        given = own.get(key, "auto")
        if isinstance(value, dict):
            if not isinstance(given, dict) and given != "auto":
                raise UserError(f"{where} {prefix}{key} is {given!r}: give an object, or take it out")
            below = {} if given == "auto" else given
            merged[key] = {**value, **below} if key in SWITCHES else _merge(below, value, where, f"{prefix}{key}.")
        elif given == "auto" or given == value or (isinstance(value, float) and math.isclose(given, value, rel_tol=1e-9)):
            merged[key] = value
        else:
            raise UserError(f'{where} {prefix}{key} is {given!r}, the recipe gives {value!r}: take it out, or write "auto"')
    return merged


class _Together(torch.nn.Module):
    """Trained parts as the one module that DeepSpeed takes.

    Its forward is that of the first, the network; the others are called by themselves.
    """

    def __init__(self, parts: dict[str, torch.nn.Module]) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)
        self._first = next(iter(parts))

    def forward(self, *args, **kwargs):
        return getattr(self, self._first)(*args, **kwargs)


class DeepSpeedEngine:
    """What `TorchEngine` is, over ranks: gradients are summed over all of them, and ZeRO shares out what they hold.

    ``parts`` are those with trained weights, by name, the network first; ZeRO 3 is for the network alone. They are cast to
    ``model.dtype``; with bf16 and fp16 the optimizer steps float32 master weights.

    Raises:
        RunFailed: DeepSpeed refuses the configuration.
    """

    def __init__(
        self,
        parts: dict[str, torch.nn.Module],
        parameters: dict[str, torch.nn.Parameter],
        config: Config,
        device: torch.device,
        ranks: Ranks,
        batches: Batches,
    ) -> None:
        os.environ.setdefault("DS_ACCELERATOR", device.type)
        import deepspeed

        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")  # names that it uses
        if not dist.is_initialized():  # one process without a launcher
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo", init_method=address, rank=0, world_size=1)
            os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed looks for it
        self.network = network = next(iter(parts.values()))
        self.parameters, self.ranks = parameters, ranks
        self.masters = parameters  # those that are averaged: the float32 ones are shared out
        self.stage, self.dtype = config.engine.zero_stage, config.model.dtype
        self.max_grad_norm = config.optimizer.max_grad_norm
        start = {name: p.detach().cpu().clone() for name, p in parameters.items()} if self._has_masters else {}
        settings = deepspeed_settings(batches, sum(p.numel() for p in parameters.values()))
        if self._clips_itself:
            settings["gradient_clipping"] = 0.0
        for p in network.parameters():  # it broadcasts and flattens weights as if they were contiguous
            if p.dim() == 4:  # a clone: .contiguous() leaves the strides of a 1 x 1 convolution as they are
                p.data = p.data.clone(memory_format=torch.contiguous_format)
        # DeepSpeed would compile an operator for inference, whose shared memory it leaves behind, 64 MiB a rank
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        try:
            self.model, *_ = deepspeed.initialize(
                model=network if len(parts) == 1 else _Together(parts),
                optimizer=build_optimizer(config.optimizer, list(parameters.values())),
                config=settings,
                dist_init_required=False,
            )
        except (ValueError, AssertionError, RuntimeError) as error:
            raise RunFailed(f"DeepSpeed: {' '.join(str(error).split())[:300]}") from error
        self.forward = self.model  # whose weights are all in the dtype that it computes in
        if self.stage < 3:
            for p in network.parameters():
                if p.dim() == 4 and not p.requires_grad:
                    p.data = p.data.clone(memory_format=torch.channels_last)
        for name, value in start.items():  # it made them from the rounded weights
            self._set_master(parameters[name], value)

    @property
    def _has_masters(self) -> bool:
        """Whether float32 weights stand behind those of the model and can be reached."""
        return self.dtype != "fp32" and self.stage > 0

    @property
    def _clips_itself(self) -> bool:
        """Plain float32 without ZeRO: DeepSpeed neither tells the norm nor looks whether it is finite."""
        return self.dtype == "fp32" and self.stage == 0

    def _set_master(self, parameter: torch.nn.Parameter, value: torch.Tensor) -> None:
        from deepspeed.utils import safe_get_local_fp32_param, safe_set_full_fp32_param

        if self.stage < 3:
            safe_set_full_fp32_param(parameter, value.to(parameter.device))
            return
        part = safe_get_local_fp32_param(parameter)  # the last rank's is padded, which DeepSpeed's own setter forgets
        own = value.flatten()[self.ranks.rank * part.numel() :][: part.numel()]
        part.data.view(-1)[: len(own)].copy_(own)

    @contextmanager
    def gathered(self, parameters: list[torch.nn.Parameter] | None = None) -> Iterator[None]:
        """Gather the given parameters, or all: within it they are whole on every rank, and ZeRO's hooks are off."""
        if self.stage < 3:
            yield
            return
        import deepspeed

        modules = list(self.network.modules())
        hooks = [(module._forward_pre_hooks, module._forward_hooks) for module in modules]
        with deepspeed.zero.GatheredParameters(list(self.network.parameters()) if parameters is None else parameters):
            for module in modules:
                module._forward_pre_hooks, module._forward_hooks = OrderedDict(), OrderedDict()
            try:
                yield
            finally:
                for module, (before, after) in zip(modules, hooks, strict=True):
                    module._forward_pre_hooks, module._forward_hooks = before, after

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        """Add a micro-batch's gradients; those of all ranks are summed at the last one."""
        self.model.set_gradient_accumulation_boundary(last)
        self.model.backward(loss * self.ranks.world, scale_wrt_gas=False)  # it takes the mean over ranks

    def step(self) -> float | None:
        """Step as `TorchEngine.step` does. In bf16 and fp32 a norm that is not finite ends the run."""
        if self._clips_itself:
            norm = torch.nn.utils.clip_grad_norm_(self.parameters.values(), self.max_grad_norm).item()
            if not math.isfinite(norm):
                return None
            self.model.step()
            return norm
        self.model.step()
        norm = float(self.model.get_global_grad_norm())
        overflow = getattr(self.model.optimizer, "overflow", False)
        return norm if not overflow and math.isfinite(norm) and norm >= 0 else None

    def set_lr(self, lr: float) -> None:
        """Set the learning rate of the steps to come."""
        for group in self.model.optimizer.param_groups:
            group["lr"] = lr

    @property
    def scales_loss(self) -> bool:
        """Whether the loss is scaled, so that an update may be skipped for a norm that is not finite."""
        return self.dtype == "fp16"

    def weights(self) -> dict[str, torch.Tensor]:
        """Return the trained weights, float32 on the CPU, masters where there are any.

        All ranks call it; the main one gets them.
        """
        from deepspeed.utils import safe_get_full_fp32_param

        found = {}
        for name, p in self.parameters.items():
            value = safe_get_full_fp32_param(p) if self._has_masters or self.stage == 3 else p.detach()
            if self.ranks.main:
                found[name] = value.float().cpu().clone()
        return found

    @property
    def _written_by(self) -> dict[str, Any]:
        """What a checkpoint's files can only be read by."""
        return {"name": "deepspeed", "ranks": self.ranks.world, "zero_stage": self.stage, "dtype": self.dtype}

    def save(self, folder: Path) -> dict[str, Any]:
        """Write every rank's part by DeepSpeed's own save; the state says what they are parts of."""
        self.model.save_checkpoint(str(folder), tag=_TAG, save_latest=False, exclude_frozen_parameters=True)
        return {**self._written_by, "steps": self.model.global_steps}

    def load(self, folder: Path, state: dict[str, Any]) -> str | None:
        """Take back what `save` wrote, where it was the same number of ranks and stage; the weights are loaded already.

        Raises:
            UserError: a part is missing or damaged, of another checkpoint, or holds what is not of DeepSpeed's state.
        """
        if any(state.get(key) != value for key, value in self._written_by.items()):
            return f"the optimizer's state, which {describe(state)} has written"
        try:
            with _no_code_from_files():
                self.model.load_checkpoint(str(folder), tag=_TAG, load_module_strict=False)
            steps = self.model.global_steps  # those skipped for an overflow too
            saved = state.get("steps", steps)  # earlier versions did not write it
            if steps != saved:
                raise ValueError(f"its {_TAG}/ is of another one, {steps} optimizer steps old where this one is {saved}")
        except Exception as error:  # DeepSpeed, pickle and zip raise many kinds
            reason = _reason(error)
            raise UserError(f"cannot read the checkpoint {folder}: {reason}; remove it to resume from another") from None
        return None


@contextmanager
def _no_code_from_files() -> Iterator[None]:
    """Within it ``torch.load`` makes only tensors, plain values and ``_CLASSES``, though DeepSpeed asks it for any object."""
    ours = {"TORCH_FORCE_WEIGHTS_ONLY_LOAD": "1", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "0"}  # it refuses to have both
    before = {name: os.environ.get(name) for name in ours}
    os.environ.update(ours)
    try:
        with torch.serialization.safe_globals(list(_classes())):
            yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _classes() -> Iterator[type]:
    """Those of ``_CLASSES`` that this version of DeepSpeed has."""
    for name in _CLASSES:
        with suppress(ImportError, AttributeError):
            yield pkgutil.resolve_name(name)


def _reason(error: Exception) -> str:
    """Why a checkpoint cannot be read, in a line."""
    said = str(error).strip()
    if "weights_only" not in said:
        return (said or type(error).__name__).splitlines()[0]
    named = re.search(r"GLOBAL ([\w.]+)", said)  # torch's refusal is a page, and names no class where it knows none
    which = f" ({named[1]})" if named else ""
    return f"a file in its {_TAG}/ holds other things than tensors and DeepSpeed's own state{which}, and was not loaded"
