"""What the compiler makes of the Triton kernels for an H100 (sm_90), counted without a GPU.

The operators run on fake tensors; the launches of their kernels are caught and compiled instead, with the specialisation that
Triton itself derives from the arguments. Of each kernel, from its machine code as nvdisasm lists it:

- instructions: all of them, a loop's once.
- loads, stores: of global memory, their number by the bytes that a thread moves with one. 16 is the most there is; a number
  for a row, such as its sigma, needs 4. What stands in a loop counts once.
- divisions: of integers, in the PTX before it; each becomes about 20 instructions.
- spilled: loads and stores of registers that did not suffice.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import torch
import triton
from torch._library.custom_ops import _maybe_get_opdef
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

H100 = 90
DISASSEMBLER = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)")
DIVISION = re.compile(r"\b(?:div|rem)\.[us](?:32|64)\b")
BYTES = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}  # by the suffix of an instruction; 4 without one


@dataclass(frozen=True)
class Code:
    """The machine code of a kernel, counted as the module says; loads and stores are numbers by bytes."""

    kernel: str
    instructions: int
    loads: dict[int, int]
    stores: dict[int, int]
    divisions: int
    spilled: int
    shared_bytes: int


def code_of(kernel) -> Code:
    """Count a kernel that Triton has compiled."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        done = subprocess.run([DISASSEMBLER, "-c", file.name], capture_output=True, text=True, check=True)
    found = [name for name in INSTRUCTION.findall(done.stdout) if name != "NOP"]
    module = kernel.src.fn.__module__.rpartition(".")[2]
    return Code(
        kernel=f"{module}.{kernel.name}",
        instructions=len(found),
        loads=by_bytes(found, "LDG"),
        stores=by_bytes(found, "STG"),
        divisions=len(DIVISION.findall(kernel.asm["ptx"])),
        spilled=sum(name.startswith(("LDL", "STL")) for name in found),
        shared_bytes=kernel.metadata.shared,
    )


def by_bytes(instructions: list[str], start: str) -> dict[int, int]:
    """Numbers of the accesses of a kind by their bytes, the widest first."""
    counts = Counter(
        next((BYTES[suffix] for suffix in name.split(".") if suffix in BYTES), 4)
        for name in instructions
        if name.startswith(start)
    )
    return dict(sorted(counts.items(), reverse=True))


@contextmanager
def compiled_launches(capability: int = H100) -> Iterator[list]:
    """Within it launches of Triton kernels are not made but compiled, for GPUs of a capability; the list has the results."""
    kernels, run = [], JITFunction.run
    target = GPUTarget("cuda", capability, 32)
    gpu = SimpleNamespace(
        get_current_device=lambda: f"sm_{capability}",  # Triton keeps its compiled kernels by device
        get_current_stream=lambda device: 0,
        get_current_target=lambda: target,
    )

    def compile_only(self, *args, grid, warmup, **kwargs):
        kernels.append(run(self, *args, grid=grid, warmup=True, **kwargs))

    with patch.object(JITFunction, "run", compile_only), patch.object(driver, "_active", gpu):
        yield kernels


class Bodies(TorchDispatchMode):
    """Within it custom operators run what they run on a GPU, with fake tensors too."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "fastloop":
            return _maybe_get_opdef(func)._init_fn(*args, **kwargs or {})
        return func(*args, **kwargs or {})


def codes_of(function: Callable, inputs: Callable[[torch.device], dict]) -> dict[str, list[Code]]:
    """Count the kernels of an operator's forward and, where an input requires gradients, of its backward.

    Args:
        function: of the inputs; it returns a tensor or a tuple that starts with the differentiable one.
        inputs: makes them on a device.
    """
    with warnings.catch_warnings(), FakeTensorMode(), Bodies():
        warnings.simplefilter("ignore")  # Triton looks at the addresses of fake tensors
        arguments = inputs(torch.device("cpu"))
        leaves = [value for value in arguments.values() if isinstance(value, torch.Tensor) and value.requires_grad]
        with compiled_launches() as forward:
            output = function(**arguments)
        found = {"forward": [code_of(kernel) for kernel in forward]}
        if leaves:
            output = output[0] if isinstance(output, tuple) else output
            with compiled_launches() as backward:
                torch.autograd.grad(output, leaves, torch.empty_like(output))
            found["backward"] = [code_of(kernel) for kernel in backward]
    return found
