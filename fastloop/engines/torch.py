"""One process, no launcher: the embedded default."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fastloop.config import Config
from fastloop.denoisers.parts import DTYPES
from fastloop.errors import UserError
from fastloop.optimizers import build_optimizer


def pick_device(name: str, local_rank: int = 0) -> torch.device:
    """Return the device of a name; ``auto`` is the GPU of this rank, else the CPU.

    Raises ``UserError`` for a device that this machine lacks.
    """
    if name == "auto":
        return torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"engine.device: {name!r} is no device: use auto, cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"engine.device: {name!r} is not supported: use auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"engine.device: {name} is not there ({torch.cuda.device_count()} GPUs found): use auto or cpu")
    return device


class TorchEngine:
    """Gradient accumulation, clipping and the optimizer step; loss scaling where the model runs in fp16.

    What an engine is; `DeepSpeedEngine` is the other one. The trained weights of a model in half precision get that dtype.
    Behind them are float32 masters, which add up the gradients, are stepped, averaged and saved; each update rounds them.

    Attributes:
        forward: how the network's forward is called; ``None``: as the denoiser does it by itself.
        masters: what the optimizer steps, float32, by name: the parameters themselves, or what is behind them.
    """

    forward: Callable[..., Any] | None = None

    def __init__(self, parameters: dict[str, torch.nn.Parameter], config: Config, device: torch.device) -> None:
        self.parameters = self.masters = parameters
        dtype, full = DTYPES[config.model.dtype], config.model.adapter == "full"
        self._rounds = dtype != torch.float32
        self._sums_at_once = self._rounds and not full
        if self._rounds:
            layout = torch.preserve_format if full else torch.contiguous_format
            self.masters = {name: torch.nn.Parameter(p.detach().clone(memory_format=layout)) for name, p in parameters.items()}
            for p, master in zip(parameters.values(), self.masters.values(), strict=True):
                p.data = p.data.to(dtype)
                if full:  # each as it comes: those of a whole network in half precision are not held beside the sums
                    p.register_post_accumulate_grad_hook(partial(_hand_over, master))
        self.max_grad_norm = config.optimizer.max_grad_norm
        self.optimizer = build_optimizer(config.optimizer, list(self.masters.values()))
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.model.dtype == "fp16")

    @contextmanager
    def gathered(self, parameters: list[torch.nn.Parameter] | None = None) -> Iterator[None]:
        """Gather the given parameters, or all: within it they are whole on every rank, which here they always are."""
        yield

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        """Add a micro-batch's gradients; the caller has scaled its loss by its share of the update.

        ``last`` is that of the update's last micro-batch.
        """
        self.scaler.scale(loss).backward()
        self.add_up()

    def add_up(self) -> None:
        """Move the gradients of adapters to their masters, if they have any: all of them in few launches."""
        if not self._sums_at_once:
            return
        parameters, masters = list(self.parameters.values()), list(self.masters.values())
        if masters[0].grad is None:
            sizes = [p.numel() for p in masters]
            self._sum = torch.zeros(sum(sizes), device=masters[0].device)
            for p, own in zip(masters, self._sum.split(sizes), strict=True):
                p.grad = own.view_as(p)
        self._sum += torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters])
        for p in parameters:
            p.grad = None

    def step(self) -> float | None:
        """Clip, step and clear the gradients.

        Returns:
            The gradient norm before clipping, or ``None`` where it was not finite: then the weights are as before. With
            loss scaling that is routine at first: the scale has been lowered.
        """
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.masters.values(), self.max_grad_norm)
        finite = bool(norm.isfinite())
        if finite:
            self.scaler.step(self.optimizer)
            if self._rounds:
                torch._foreach_copy_([p.data for p in self.parameters.values()], [p.data for p in self.masters.values()])
        if self.scaler.is_enabled():
            self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return norm.item() if finite else None

    def set_lr(self, lr: float) -> None:
        """Set the learning rate of the steps to come."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr

    @property
    def scales_loss(self) -> bool:
        """Whether the loss is scaled, so that an update may be skipped for a norm that is not finite."""
        return self.scaler.is_enabled()

    def weights(self) -> dict[str, torch.Tensor]:
        """Return the trained weights, float32. Every rank calls it; the main one gets them."""
        return {name: p.detach() for name, p in self.masters.items()}

    def save(self, folder: Path) -> dict[str, Any]:
        """Return its state as plain values and tensors; what is sharded over ranks it writes into a checkpoint's folder."""
        return {"name": "torch", "optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict()}

    def load(self, folder: Path, state: dict[str, Any]) -> str | None:
        """Take back what `save` gave; the weights are loaded already. Returns what of the state could not be carried over."""
        if state["name"] != "torch":
            return f"the optimizer's state, which {describe(state)} has written"
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        return None


def _hand_over(master: torch.nn.Parameter, p: torch.nn.Parameter) -> None:
    """Adds the gradient of a parameter to that of its master, in float32."""
    if master.grad is None:
        master.grad = p.grad.float()
    else:
        master.grad += p.grad
    p.grad = None


def describe(state: dict[str, Any]) -> str:
    """Say in words what engine has saved a state."""
    if state["name"] == "torch":
        return "engine.name=torch"
    return f"DeepSpeed on {state['ranks']} rank{'s' * (state['ranks'] > 1)} with engine.zero_stage={state['zero_stage']}"
