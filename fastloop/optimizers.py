"""Optimizers by name, and the moving average of the weights."""

from __future__ import annotations

import importlib.util
import math
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from fastloop.compiled_ops import load_op
from fastloop.config import OptimizerConfig

SMALLEST_8BIT = 4096  # bitsandbytes keeps the state of smaller tensors in float32
BLOCK_8BIT = 256  # elements that share a scale


@dataclass(frozen=True)
class Kind:
    """An optimizer: its class, its state tensors, and where it runs. 8-bit ones are bitsandbytes', others torch's."""

    name: str
    moments: int
    eight_bit: bool = False
    needs_gpu: bool = False
    has_eps: bool = True
    deepspeed: bool = False  # DeepSpeed's, which compiles it when it is first used


OPTIMIZERS = {
    "adamw": Kind("AdamW", moments=2),
    "adamw8bit": Kind("AdamW8bit", moments=2, eight_bit=True),
    "paged_adamw8bit": Kind("PagedAdamW8bit", moments=2, eight_bit=True, needs_gpu=True),
    "lion8bit": Kind("Lion8bit", moments=1, eight_bit=True, has_eps=False),
    "cpu_adamw": Kind("DeepSpeedCPUAdam", moments=2, deepspeed=True),
}


def optimizer_problem(name: str, device: torch.device) -> str | None:
    """Say why an optimizer cannot be used on a device, with the remedy; ``None`` where it can."""
    kind = OPTIMIZERS[name]
    if kind.eight_bit and importlib.util.find_spec("bitsandbytes") is None:
        return f"{name} needs bitsandbytes: pip install fastloop[bnb], or set it to adamw"
    if kind.deepspeed and importlib.util.find_spec("deepspeed") is None:
        return f"{name} needs DeepSpeed: pip install fastloop[deepspeed], or set it to adamw"
    if kind.deepspeed and shutil.which("g++") is None and shutil.which("c++") is None:
        return f"{name} is compiled when it is first used, and there is no C++ compiler here: install g++, or set it to adamw"
    if kind.needs_gpu and device.type != "cuda":
        return f"{name} pages its state between GPU and CPU, and this runs on {device}: set it to adamw8bit"
    return None


def build_optimizer(config: OptimizerConfig, parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """Build the optimizer of a configuration over float32 parameters."""
    kind = OPTIMIZERS[config.name]
    kwargs = {"lr": config.lr, "betas": config.betas, "weight_decay": config.weight_decay}
    if kind.has_eps:
        kwargs["eps"] = config.eps
    if kind.eight_bit:
        import bitsandbytes

        return getattr(bitsandbytes.optim, kind.name)(parameters, **kwargs)
    if kind.deepspeed:
        import deepspeed

        load_op("CPUAdamBuilder")
        return getattr(deepspeed.ops.adam, kind.name)(parameters, **kwargs)
    if parameters[0].device.type == "cuda":
        kwargs["fused"] = True  # else it makes a temporary as large as all parameters
    return getattr(torch.optim, kind.name)(parameters, **kwargs)


def state_bytes(name: str, sizes: Iterable[int]) -> int:
    """Return the bytes of an optimizer's state over parameters of these numbers of elements."""
    kind = OPTIMIZERS[name]

    def of(size: int) -> int:
        if kind.eight_bit and size >= SMALLEST_8BIT:
            return size + 4 * math.ceil(size / BLOCK_8BIT)
        return 4 * size

    return kind.moments * sum(map(of, sizes))


def step_bytes(name: str, sizes: Iterable[int], on_gpu: bool) -> int:
    """Return the bytes that a step needs for a while: of torch's AdamW on a CPU, two temporaries of the largest parameter."""
    return 8 * max(sizes) if OPTIMIZERS[name].name == "AdamW" and not on_gpu else 0


class Ema:
    """Exponential moving average of named parameters, float32: average += (1 - d) (parameter - average).

    d is the decay, and at update n no more than (1 + n) / (10 + n), as in diffusers' ``EMAModel``: the average follows the
    weights at first, and is not held back by those before training. Where the parameters are rounded, their ``masters``
    are averaged.

    Attributes:
        updates: so far.
    """

    def __init__(
        self, parameters: dict[str, torch.nn.Parameter], decay: float, masters: dict[str, torch.nn.Parameter] | None = None
    ) -> None:
        self.parameters, self.decay, self.masters = parameters, decay, masters or parameters
        self.average = {name: p.detach().float().clone() for name, p in self.masters.items()}
        self.updates = 0

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the parameters as they are now."""
        self.updates += 1
        stays = min(self.decay, (1 + self.updates) / (10 + self.updates))
        for name, p in self.masters.items():
            self.average[name].lerp_(p.float(), 1 - stays)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Let the parameters hold their average within it."""
        with holding(self.parameters, {name: self.average[name].to(p.dtype) for name, p in self.parameters.items()}):
            yield


@contextmanager
def holding(parameters: dict[str, torch.nn.Parameter], values: dict[str, torch.Tensor]) -> Iterator[None]:
    """Let the parameters hold other values within it."""
    before = {name: p.data for name, p in parameters.items()}
    for name, p in parameters.items():
        p.data = values[name]
    try:
        yield
    finally:
        for name, p in parameters.items():
            p.data = before[name]
