"""The Triton kernels compiled ahead of time, for GPUs that need not be there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

KERNELS = {
    "transition": ("_noise", "_sample", "_finish"),
    "policy": ("_residual_sums", "_finish", "_gradients"),
    "group_norm_kernels": ("_sums", "_forward", "_gradient_sums", "_gradient", "_parameter_gradients"),
    "geglu": ("_forward", "_gradient"),
}


# Loads and stores of less than 16 bytes that a thread may make: numbers of a row, sums of a block. Of the norms, which read
# each channel's weight and statistics once, only stores are bounded.
NARROW = {
    "transition._sample": (4, 1),
    "policy._residual_sums": (5, 2),
    "policy._gradients": (5, 0),
    "group_norm_kernels._forward": (99, 2),
    "group_norm_kernels._gradient": (99, 2),
    "geglu._forward": (0, 0),
    "geglu._gradient": (0, 0),
}
READS = {"group_norm_kernels._forward": 2, "group_norm_kernels._gradient": 4}  # of each tile, its sums and its output


def test_every_kernel_compiles_for_real_gpus_without_spills_to_wide_loads_and_stores_and_divides_no_element():
    """In a process of its own: here the kernels may be interpreted."""
    script = Path(__file__).parent / "compile_kernels.py"
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, str(script)], env=env, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    compiled = [json.loads(line) for line in done.stdout.splitlines()]
    assert {row["capability"] for row in compiled} == {80, 90, 100}
    assert {row["kernel"] for row in compiled} == {f"{module}.{name}" for module in KERNELS for name in KERNELS[module]}
    for row in compiled:
        assert row["spilled"] == 0 and row["shared_bytes"] <= 99 * 1024, row  # 99 KiB: the least of the three
        assert row["divisions"] <= 2 * row["kernel"].startswith("geglu."), row  # geglu has one for 16 bytes
        if row["kernel"] in NARROW:
            loads, stores = ({int(size): count for size, count in row[key].items()} for key in ("loads", "stores"))
            for of, most in zip((loads, stores), NARROW[row["kernel"]], strict=True):
                assert sum(count for size, count in of.items() if size < 16) <= most, row
            assert loads[16] >= READS.get(row["kernel"], 2), row
