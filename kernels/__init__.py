"""The operators of the training loop and the one place that chooses their backend.

`fastloop.kernels` holds what fuses the per-step Gaussian, `sample_transition` for rollouts and `policy_loss` for updates, and
what fuses parts of the UNet and the VAE, `group_norm`, `group_norm_silu` and `geglu`. ``reference`` is plain PyTorch, the
specification and the path without a GPU; ``fused`` is Triton; ``unet`` puts the latter three into diffusers' modules.
"""

from __future__ import annotations

import os
from types import ModuleType

import torch

from . import reference  # relative: Hugging Face libraries probe for a package `kernels` and may find this folder

BACKENDS = ("auto", "triton", "reference")
VARIABLE = "FASTLOOP_KERNELS"
CAPABILITY = (8, 0)  # the oldest GPUs that the kernels are compiled for in the tests


def triton_problem(device: torch.device) -> str | None:
    """Say why the Triton kernels cannot run on a device; ``None`` where they can."""
    try:
        import triton
    except ImportError:
        return "is not installed (pip install triton)"
    if device.type == "cuda":
        found = torch.cuda.get_device_capability(device)
        return (
            None
            if torch.version.hip or found >= CAPABILITY
            else f"needs compute capability 8.0, and {device} has {found[0]}.{found[1]}"
        )
    if triton.knobs.runtime.interpret:
        return None
    return "needs a GPU"


def choose(name: str, device: torch.device) -> str:
    """Return ``triton`` or ``reference``: for ``auto`` what the variable FASTLOOP_KERNELS says, else Triton on a GPU that can.

    Raises:
        ValueError: the name is not one of ``BACKENDS``, or Triton is asked for and cannot run.
    """
    source = "kernels"
    if name == "auto" and VARIABLE in os.environ:
        name, source = os.environ[VARIABLE], VARIABLE
    if name not in BACKENDS:
        raise ValueError(f"{source}: unknown backend {name!r}: one of {', '.join(BACKENDS)}")
    if name == "auto":
        return "triton" if device.type == "cuda" and triton_problem(device) is None else "reference"
    if name == "triton" and (problem := triton_problem(device)):
        raise ValueError(f"{source}: triton {problem}: set it to auto or reference")
    return name


def backend(name: str, device: torch.device) -> ModuleType:
    """Return the module with ``initial_noise``, ``sample_transition`` and ``policy_loss`` for a device; raises as `choose`."""
    if choose(name, device) == "reference":
        return reference
    from . import fused  # imports triton

    return fused


def fuse(network: torch.nn.Module, name: str, device: torch.device) -> None:
    """Put the fused modules into a diffusers UNet or VAE where the backend of a device is Triton; raises as `choose`."""
    if choose(name, device) == "triton":
        from .unet import fuse_network

        fuse_network(network)
