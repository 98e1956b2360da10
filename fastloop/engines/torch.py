"""One process, no launcher: the embedded default."""

from __future__ import annotations

import torch

from fastloop.config import Config
from fastloop.errors import UserError
from fastloop.optimizers import build_optimizer


def pick_device(name: str) -> torch.device:
    """``auto``: the first GPU, else the CPU. Raises ``UserError`` for a device that this machine lacks."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
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
    """Gradient accumulation, clipping and the optimizer step; loss scaling where the model runs in fp16."""

    def __init__(self, parameters: dict[str, torch.nn.Parameter], config: Config, device: torch.device) -> None:
        self.parameters = list(parameters.values())
        self.max_grad_norm = config.optimizer.max_grad_norm
        self.optimizer = build_optimizer(config.optimizer, self.parameters)
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.model.dtype == "fp16")

    def backward(self, loss: torch.Tensor) -> None:
        """Adds a micro-batch's gradients; the caller has scaled its loss by its share of the update."""
        self.scaler.scale(loss).backward()

    def step(self) -> float | None:
        """Clips, steps and clears the gradients.

        Returns:
            The gradient norm before clipping, or ``None`` where it was not finite: then the weights are as before. With
            loss scaling that is routine at first: the scale has been lowered.
        """
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.max_grad_norm)
        finite = bool(norm.isfinite())
        if finite:
            self.scaler.step(self.optimizer)
        if self.scaler.is_enabled():
            self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return norm.item() if finite else None

    def set_lr(self, lr: float) -> None:
        """The learning rate of the steps to come."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr

    @property
    def scales_loss(self) -> bool:
        return self.scaler.is_enabled()

    def state_dict(self) -> dict:
        return {"optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
