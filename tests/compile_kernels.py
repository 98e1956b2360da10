"""Compiles every Triton kernel, as the operators launch it, for sm_80, sm_90 and sm_100, and prints what ptxas says of each.

    python tests/compile_kernels.py        (TRITON_INTERPRET unset; needs no GPU)

The operators are called on CPU tensors; launches are caught and compiled for a target instead, with the specialisation that
Triton itself derives from the arguments. One JSON line per kernel, variant and target: for sm_90 each dtype with each layout,
each objective and so on, for the others the usual variant.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from types import SimpleNamespace

import torch
import triton
from step_cases import pairwise
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from fastloop.kernels import geglu, group_norm_silu, policy, transition
from fastloop.objectives import OBJECTIVES

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


def launch_all(every_variant: bool) -> None:
    """Every operator, in every pair of its kernels' options or as is usual: bfloat16, with guidance, channels_last."""
    dtypes = (torch.bfloat16, torch.float32, torch.float16)[: 3 if every_variant else 1]
    both, layouts = (True, False)[: 1 + every_variant], LAYOUTS[: 1 + every_variant]
    sizes = ((320, 64), (1280, 8))[: 1 + every_variant]
    transition._initial_noise(7, torch.arange(ROWS), 4 * 64 * 64)
    for dtype, guided, layout, objective in pairwise(dtypes, both, layouts, OBJECTIVES):
        t = tensors(dtype, guided, layout)
        row, ids = t["row"], t["ids"]
        transition._sample_transition(t["cond"], t["uncond"], t["x_t"], row, row, row, 3.0, 7, ids, 4)
        step = (t["cond"], t["uncond"], t["x_t"], t["x_prev"], row, row, row, 3.0)
        policy._policy_loss(*step, row, row, 1e-4, objective, 7, ids, ids)
        policy._policy_loss_backward(row, row, *step)
    for dtype in dtypes:
        geglu._geglu_backward(geglu._geglu(torch.zeros(2, 77, 2560, dtype=dtype)), torch.zeros(2, 77, 2560, dtype=dtype))
    for dtype, (channels, side), layout in pairwise(dtypes, sizes, layouts):
        x = torch.zeros(2, channels, side, side, dtype=dtype).contiguous(memory_format=layout)
        weight = torch.ones(channels, dtype=dtype)
        y, mean, rstd = group_norm_silu._group_norm_silu(x, 32, weight, weight, 1e-5)
        group_norm_silu._group_norm_silu_backward(y, x, mean, rstd, 32, weight, weight, True)


def spilled(ptx: str, capability: int) -> int:
    """Bytes of registers that ptxas spills."""
    target = re.search(r"^\.target (\w+)", ptx, re.M).group(1)
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [get_ptxas(capability).path, "-v", f"--gpu-name={target}", "--fmad=false", file.name, "-o", "/dev/null"]
        said = subprocess.run(command, capture_output=True, text=True).stderr
    found = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", said)
    assert found, said
    return sum(int(stores) + int(loads) for stores, loads in found)


def main() -> int:
    if triton.knobs.runtime.interpret:
        print("unset TRITON_INTERPRET: interpreted kernels are not compiled", file=sys.stderr)
        return 2
    run, seen = JITFunction.run, set()
    for capability in CAPABILITIES:
        target = GPUTarget("cuda", capability, 32)
        driver.set_active(
            SimpleNamespace(
                get_current_device=lambda capability=capability: capability,
                get_current_stream=lambda device: 0,
                get_current_target=lambda target=target: target,
            )
        )

        def compiled(self, *args, grid, warmup, capability=capability, **kwargs):
            kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
            if (capability, kernel.hash) in seen:
                return
            seen.add((capability, kernel.hash))
            name = self.fn.__name__
            row = {
                "kernel": f"{self.fn.__module__.rpartition('.')[2]}.{name}",
                "capability": capability,
                "shared_bytes": kernel.metadata.shared,
                "spilled_bytes": spilled(kernel.asm["ptx"], capability),
            }
            print(json.dumps(row), flush=True)

        JITFunction.run = compiled
        launch_all(every_variant=capability == FULLY)
    return 0


if __name__ == "__main__":
    sys.exit(main())
