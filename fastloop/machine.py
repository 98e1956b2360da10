"""What this machine is and what it can do."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
from typing import Any

import torch

from fastloop import numerics
from fastloop.kernels import triton_problem
from fastloop.optimizers import OPTIMIZERS, optimizer_problem

_PACKAGES = ("torch", "diffusers", "transformers", "peft", "accelerate", "numpy")
_OPTIONAL = ("triton", "deepspeed", "bitsandbytes", "xformers", "wandb", "datasets", "rapidocr", "starlette")


def version_of(package: str) -> str | None:
    """Return the installed version of a package, or ``None``."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Describe processor, memory and device, for run.json."""
    facts = {
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1),
        "device": str(device),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts |= {"gpu": properties.name, "gpu_memory_gib": round(properties.total_memory / 2**30, 1)}
    return facts


def versions() -> dict[str, str]:
    """Return the versions of the packages that decide a run's numbers."""
    found = {name: version_of(name) for name in ("fastloop", *_PACKAGES, *_OPTIONAL)}
    return {name: version for name, version in found.items() if version}


def xformers_problem() -> str | None:
    """Say why ``model.attention=xformers`` cannot be used here, or ``None``."""
    if importlib.util.find_spec("xformers") is None:
        return "xformers is not installed: pip install fastloop[xformers]"
    if not torch.cuda.is_available():
        return "xformers has no CPU operator and there is no GPU here"
    try:
        from xformers.ops import memory_efficient_attention

        q = torch.zeros(1, 8, 1, 32, device="cuda", dtype=torch.float16)
        memory_efficient_attention(q, q, q)
    except Exception as error:
        return f"xformers does not work here: {str(error).splitlines()[0]}"
    return None


def flash_problem(dtype: str, device: torch.device) -> str | None:
    """Say why ``model.attention=flash`` cannot be used, or ``None``."""
    if dtype == "fp32":
        return "flash attention computes in half precision and model.dtype is fp32: set it to bf16 or fp16"
    if device.type != "cuda":
        return f"flash attention needs a GPU, and this runs on {device}"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "flash attention needs compute capability 8.0"
    return None if torch.backends.cuda.is_flash_attention_available() else "this PyTorch is built without flash attention"


def compiler_problem(device: torch.device) -> str | None:
    """Say why torch.compile cannot be used on a device, or ``None``."""
    if device.type == "cuda":
        problem = triton_problem(device)
        return problem and f"torch.compile writes Triton kernels, and triton {problem}"
    compilers = [os.environ.get("CXX"), "g++", "clang++", "c++"]
    return None if any(map(shutil.which, filter(None, compilers))) else "torch.compile needs a C++ compiler: install g++"


def capabilities() -> list[tuple[str, str]]:
    """Return the rows of `fastloop info`: what this machine can do, and what is missing for the rest."""
    numerics.pin()  # as every run does
    cpu = torch.device("cpu")
    facts = describe_machine(cpu)
    rows = [("machine", f"{facts['system']}, {facts['cpus']} CPU cores, {facts['memory_gib']} GiB")]
    rows += [("python", facts["python"])]
    rows += [(name, version_of(name) or "not installed") for name in (*_PACKAGES, *_OPTIONAL)]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        for i in range(torch.cuda.device_count()):
            found = describe_machine(torch.device("cuda", i))
            rows.append((f"device cuda:{i}", f"{found['gpu']}, {found['gpu_memory_gib']} GiB"))
    else:
        rows.append(("device", "cpu (no CUDA device found)"))
    rows += [
        ("kernels", "triton" if (problem := triton_problem(device)) is None else f"reference (PyTorch); triton {problem}"),
        ("attention", f"sdpa ({', '.join(numerics.attention_backends())})" + ("" if xformers_problem() else ", xformers")),
        ("sums", numerics.half_precision_sums()),
        ("xformers", xformers_problem() or "works"),
        ("optimizers", ", ".join(name for name in OPTIMIZERS if optimizer_problem(name, device) is None)),
        ("engines", "torch" + (", deepspeed" if version_of("deepspeed") else "")),
    ]
    return rows
