"""What a run will do and need, before anything is loaded: derived numbers, parameters, memory."""

from __future__ import annotations

import torch

from fastloop.config import Config


def derived_lines(config: Config, steps_trained: torch.Tensor) -> list[str]:
    return []
