"""Compiles every Triton kernel, as the operators launch it, for sm_80, sm_90 and sm_100, and prints what their code is like.

    python tests/compile_kernels.py        (TRITON_INTERPRET unset; needs no GPU)

The operators are called on CPU tensors; launches are caught and compiled for a target instead, with the specialisation that
Triton itself derives from the arguments. One JSON line per kernel, variant and target, as bench/kernel_code.py counts it: for
sm_90 each dtype with each layout, each objective and so on, for the others the usual variant.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch
import triton
from step_cases import pairwise

from fastloop.kernels import geglu, group_norm, policy, transition

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "bench"))
from kernel_code import code_of, compiled_launches  # of bench/, which is no package

CAPABILITIES, FULLY = (80, 90, 100), 90  # of which one with every variant
ROWS, SHAPE = 4, (4, 64, 64)
LAYOUTS = (torch.channels_last, torch.contiguous_format)


def tensors(dtype: torch.dtype, guided: bool, layout: torch.memory_format) -> dict:
    output = torch.zeros(ROWS, *SHAPE, dtype=dtype).contiguous(memory_format=layout)
    return dict(
        cond=output,
        uncond=output if guided else None,
        x_t=torch.zeros(ROWS, *SHAPE),
        x_prev=torch.zeros(ROWS, *SHAPE),
        row=torch.ones(ROWS),
        ids=torch.arange(ROWS),
    )


def launch_all(every_variant: bool) -> Iterator[dict]:
    """Launch every operator, in every pair of its kernels' options or as is usual: bfloat16, with guidance, in both layouts.

    Yields what is said of the launches since the last time.
    """
    dtypes = (torch.bfloat16, torch.float32, torch.float16)[: 3 if every_variant else 1]
    both, objectives = (True, False)[: 1 + every_variant], policy._NUMBER if every_variant else ("clipped", "kl_mask")
    sizes = ((320, 64), (128, 512))[: 1 + every_variant]  # the second, of a VAE, is divided into stretches
    transition._initial_noise(7, torch.arange(ROWS), 4 * 64 * 64)
    yield {}
    for dtype, guided, layout, objective in pairwise(dtypes, both, LAYOUTS, objectives):
        t = tensors(dtype, guided, layout)
        row, ids = t["row"], t["ids"]
        transition._sample_transition(t["cond"], t["uncond"], t["x_t"], row, row, row, 3.0, 7, ids, 4)
        step = (t["cond"], t["uncond"], t["x_t"], t["x_prev"], row, row, row, 3.0)
        policy._policy_loss(*step, row, row, 1e-4, objective, 7, ids, ids)
        policy._policy_loss_backward(row, row, *step)
        yield {"dtype": str(dtype), "guided": guided, "layout": str(layout), "objective": objective}
    for dtype in dtypes:
        geglu._geglu_backward(geglu._geglu(torch.zeros(2, 77, 2560, dtype=dtype)), torch.zeros(2, 77, 2560, dtype=dtype))
        yield {"dtype": str(dtype)}
    for dtype, (channels, side), layout in pairwise(dtypes, sizes, LAYOUTS):
        x = torch.empty(1, channels, side, side, dtype=dtype).contiguous(memory_format=layout)
        weight = torch.ones(channels, dtype=dtype)
        y, mean, rstd = group_norm._group_norm(x, 32, weight, weight, 1e-5, True)
        group_norm._group_norm_backward(y, x, mean, rstd, 32, weight, weight, True, True)
        yield {"dtype": str(dtype), "channels": channels, "layout": str(layout)}


def main() -> int:
    if triton.knobs.runtime.interpret:
        print("unset TRITON_INTERPRET: interpreted kernels are not compiled", file=sys.stderr)
        return 2
    seen = set()
    for capability in CAPABILITIES:
        with compiled_launches(capability) as kernels:
            for variant in launch_all(every_variant=capability == FULLY):
                for kernel in kernels:
                    if (capability, kernel.hash) not in seen:
                        print(json.dumps({"capability": capability, **variant, **asdict(code_of(kernel))}), flush=True)
                    seen.add((capability, kernel.hash))
                kernels.clear()
    return 0


if __name__ == "__main__":
    sys.exit(main())
