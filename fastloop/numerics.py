"""PyTorch's settings that decide how sums are rounded, the same in rollouts as in updates: else ratios do not start at 1.

They hold for the whole process, so that they cost nothing in the inner loops. On a CPU they change nothing.
"""

from __future__ import annotations

import torch

# Whether they may be chosen, in the order in which PyTorch tries them. cuDNN's picks its own code, by the shape and by whether
# gradients are wanted, and only some GPUs and versions of PyTorch would try it, which then is first.
ATTENTION = {"cudnn": False, "flash": True, "mem_efficient": True, "math": True}


def pin() -> None:
    """Set the attention backends that may be chosen, and have bf16 and fp16 products summed in float32, split or not."""
    for name, allowed in ATTENTION.items():
        getattr(torch.backends.cuda, f"enable_{name}_sdp")(allowed)
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(False)
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False


def attention_backends() -> list[str]:
    """Return the names of PyTorch's attention backends that may be chosen now, in the order in which it tries them."""
    return [name for name in ATTENTION if getattr(torch.backends.cuda, f"{name}_sdp_enabled")()]


def half_precision_sums() -> str:
    """Say in which dtype products of bf16 and fp16 may be summed now."""
    matmul = torch.backends.cuda.matmul
    reduced = {name: getattr(matmul, f"allow_{name}_reduced_precision_reduction") for name in ("bf16", "fp16")}
    return ", ".join(f"{name} in {f'float32 or {name}' if allowed else 'float32'}" for name, allowed in reduced.items())
