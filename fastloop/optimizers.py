"""Optimizers by name, and the moving average of the weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from fastloop.config import OptimizerConfig


def build_optimizer(config: OptimizerConfig, parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """The optimizer of a configuration over float32 parameters."""
    kwargs = {"lr": config.lr, "betas": config.betas, "eps": config.eps, "weight_decay": config.weight_decay}
    return {"adamw": torch.optim.AdamW}[config.name](parameters, **kwargs)


class Ema:
    """Exponential moving average of named parameters: average += (1 - decay) (parameter - average)."""

    def __init__(self, parameters: dict[str, torch.nn.Parameter], decay: float) -> None:
        self.parameters, self.decay = parameters, decay
        self.average = {name: p.detach().clone() for name, p in parameters.items()}

    @torch.no_grad()
    def update(self) -> None:
        for name, p in self.parameters.items():
            self.average[name].lerp_(p, 1 - self.decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within it the parameters hold their average."""
        trained = {name: p.data for name, p in self.parameters.items()}
        for name, p in self.parameters.items():
            p.data = self.average[name]
        try:
            yield
        finally:
            for name, p in self.parameters.items():
                p.data = trained[name]
