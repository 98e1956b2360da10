"""The operators of the training loop and the one place that chooses their backend.

`fastloop.kernels` holds what fuses the per-step Gaussian: `sample_transition` for rollouts and `policy_loss` for updates.
``reference`` is plain PyTorch, the specification and the CPU path.
"""

from __future__ import annotations

from types import ModuleType

import torch

from . import reference  # relative: Hugging Face libraries probe for a package `kernels` and may find this folder

BACKENDS = ("auto", "reference")


def backend(name: str, device: torch.device) -> ModuleType:
    """The module with ``initial_noise``, ``sample_transition`` and ``policy_loss`` that runs on a device.

    Raises:
        ValueError: the name is not one of ``BACKENDS``.
    """
    if name not in BACKENDS:
        raise ValueError(f"kernels: unknown backend {name!r}: one of {', '.join(BACKENDS)}")
    return reference
