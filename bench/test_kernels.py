"""The operators under pytest-benchmark: wall time of a call, with the wait for the device at its end.

    pytest bench/test_kernels.py [-k "policy_loss and backward"] [--benchmark-json=FILE]

The sizes of `python bench/kernel_table.py --quick`, whose table has times without launching, traffic and memory.
"""

from __future__ import annotations

import functools

import kernel_table
import pytest
import torch
from kernel_cases import Case, cases_for

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CASES = cases_for(DEVICE, quick=True)
NAMES = ("triton" if DEVICE.type == "cuda" else "reference", "eager", "compile")


@functools.lru_cache(maxsize=1)  # the passes of a contender follow each other and share what was compiled
def passes(case: Case, name: str) -> dict:
    torch.compiler.reset()
    found = kernel_table.contenders(case.operator, DEVICE)
    if name not in found:
        pytest.skip(kernel_table.compile_problem(DEVICE))
    return kernel_table.passes_of(found[name], case.inputs(DEVICE))[0]


@pytest.mark.parametrize(
    ("case", "name", "which"),
    [
        pytest.param(case, name, which, id=f"{case.operator}: {case.size}: {which}: {name}")
        for case in CASES
        for name in NAMES
        for which in case.passes
    ],
)
def test_operator(benchmark, case, name, which):
    call = passes(case, name)[which]
    benchmark.group = f"{case.operator}: {case.size}: {which}"
    benchmark.extra_info["bytes"] = case.bytes_moved(which)

    def finished():
        call()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    finished()
    benchmark(finished)
