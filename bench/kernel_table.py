"""Time, traffic and memory of the fused operators: Triton against eager PyTorch and torch.compile.

    python bench/kernel_table.py [--quick] [--out bench/results/kernels_h200.json]

Prints one Markdown table per operator and writes every row, with command, machine and versions, to a JSON file.

- triton: `fastloop.kernels.fused`. eager: the formulas of kernel_cases.py in float32 PyTorch, as people write them (DDPO's
  log-prob with .float() and .mean()); `kernels/reference.py`, which sums in float64 for exactness, would be an unfair
  baseline. compile: torch.compile(dynamic=False) of that same eager function. Each is checked against eager before it is
  timed.
- ms: on a GPU the time between CUDA events, the work queued behind a sleep so that the cost of launching does not show, the
  L2 cache overwritten before each repetition; the median. On a CPU the median wall time.
- call: wall ms of one call from Python when calls follow each other (launching included, caches as they are).
- backward: on a graph built before, outside the timed part. both: forward and backward.
- GB/s: the least an operator can move (`TRAFFIC`, bytes per element) over ms; share: of the bandwidth of `copy_` of one large
  tensor, timed the same way in the same run, read and write counted; both of the table's first contender. x eager, x compile:
  how many times faster than these it is.
- peak: memory allocated at most during the operation, beyond what was there before (inputs are; in backward the graph is).
  saved: what autograd keeps for the backward, beside the inputs.
- launches and what follows: of the Triton kernels as they are compiled for an H100 (sm_90), be there a GPU or not. Loads and
  stores of global memory are given as number x bytes that a thread moves at once. bench/kernel_code.py says what is counted.

Without a GPU the twins in `kernels/reference.py` take the place of Triton, which is not timed, and the sizes are small.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import torch
from kernel_cases import EAGER, TRAFFIC, Case, cases_for
from markdown_tables import padded
from torch._functorch import config as functorch_config

from fastloop.kernels import backend, triton_problem
from fastloop.kernels.reference import MicroBatch
from fastloop.machine import describe_machine, versions

NO_GPU = "Triton was not timed: no GPU here"
CODE_COLUMNS = ["launches", "instructions", "loads", "stores", "divisions"]


# --- measuring --------------------------------------------------------------------------------------------------------


class Clock:
    """Times calls on a device, each for about ``seconds``."""

    def __init__(self, device: torch.device, seconds: float) -> None:
        self.cuda, self.seconds = device.type == "cuda", seconds
        self.flush = torch.empty(2**28, dtype=torch.int8, device=device) if self.cuda else None  # over any L2 cache

    def __call__(self, function: Callable[[], object]) -> tuple[float, float]:
        """ms (see the module) and wall ms of a call."""
        for _ in range(3):
            function()
        if self.cuda:
            torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(10):
            function()
        queued = (time.perf_counter() - started) / 10
        if self.cuda:
            torch.cuda.synchronize()
        call = (time.perf_counter() - started) / 10
        if not self.cuda:
            times = [self._wall(function) for _ in range(max(3, min(200, int(self.seconds / call))))]
            return 1e3 * statistics.median(times), 1e3 * call
        for _ in range(100):
            self.flush.zero_()  # the GPU's clock has fallen while torch compiled
        pairs = []
        for _ in range(max(10, min(100, int(self.seconds / (call + 2 * queued + 1e-4))))):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            self.flush.zero_()
            torch.cuda._sleep(int(4e9 * queued))  # cycles: about twice the time that queueing takes
            start.record()
            function()
            end.record()
            pairs.append((start, end))
        torch.cuda.synchronize()
        return statistics.median(start.elapsed_time(end) for start, end in pairs), 1e3 * call

    @staticmethod
    def _wall(function: Callable[[], object]) -> float:
        started = time.perf_counter()
        function()
        return time.perf_counter() - started


def copy_bandwidth(device: torch.device, clock: Clock) -> float:
    """Bytes per second of copying a large tensor, read and write counted."""
    source = torch.zeros(2**30 if device.type == "cuda" else 2**26, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    ms, _ = clock(lambda: target.copy_(source))
    return 2 * source.numel() / ms * 1e3


def compile_problem(device: torch.device) -> str | None:
    """Why torch.compile cannot be timed here; ``None`` where it can."""
    compiler = os.environ.get("CXX", "g++")
    if device.type != "cuda" and shutil.which(compiler) is None:
        return f"torch.compile was not timed: it needs a C++ compiler, and {compiler} was not found"
    return None


def of_arguments(ops: ModuleType, operator: str) -> Callable:
    """An operator of a backend as a function of a case's arguments."""
    function = getattr(ops, operator)
    if operator != "policy_loss":
        return function

    def loss(cond, uncond, guidance, clip_range, **columns):
        settings = {"guidance": guidance, "clip_range": clip_range, "objective": "clipped"}
        return (function(cond, uncond, MicroBatch(**columns), **settings).loss,)

    return loss


def contenders(operator: str, device: torch.device) -> dict[str, Callable]:
    """Name to a function of the arguments; it returns a tensor or a tuple that starts with the differentiable one."""
    name = "triton" if device.type == "cuda" else "reference"
    found = {name: of_arguments(backend(name, device), operator), "eager": EAGER[operator]}
    if compile_problem(device) is None:
        found["compile"] = torch.compile(EAGER[operator], dynamic=False)
    return found


def first(output) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output


def check(case: Case, got: list[torch.Tensor], want: list[torch.Tensor]) -> None:
    """Raises where a contender computes something else than eager: 2% of the largest value, for bfloat16."""
    for one, other in zip(got, want, strict=True):
        distance = (one.float() - other.float()).abs().max().item()
        if not distance <= 0.02 * other.float().abs().max().item():
            raise AssertionError(f"{case.operator}, {case.size}: differs from eager by {distance:.1e}")


def saved_bytes(function: Callable[[], object], arguments: dict) -> int:
    """What autograd keeps for the backward, beside the arguments: bytes of distinct storages."""
    known = {value.untyped_storage().data_ptr() for value in arguments.values() if isinstance(value, torch.Tensor)}
    kept = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = function()  # alive until its storages are counted, or others could take their places
    del output
    return sum(kept.values())


def peak_bytes(function: Callable[[], object]) -> int | None:
    if not torch.cuda.is_available():
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    output = function()
    torch.cuda.synchronize()
    del output
    return torch.cuda.max_memory_allocated() - before


@functorch_config.patch(donated_buffer=False)  # a graph compiled with donated buffers allows one backward only
def passes_of(function: Callable, arguments: dict) -> tuple[dict[str, Callable[[], object]], list[torch.Tensor]]:
    """A call without arguments for each pass, and what they compute, for `check`."""
    leaves = [value for value in arguments.values() if isinstance(value, torch.Tensor) and value.requires_grad]

    def forward():
        return function(**arguments)

    if not leaves:  # sampling: eager's noise is another, so only the log-prob, about 2.5 +- 0.006, can be compared
        return {"forward": forward}, [forward()[1]]
    output = first(forward())
    g = torch.Generator(output.device).manual_seed(1)
    seed = torch.randn(output.shape, generator=g, device=output.device)
    seed = torch.empty_like(output).copy_(seed)  # in the output's memory layout, as the layer above would hand it down

    def both():
        return torch.autograd.grad(first(forward()), leaves, seed)

    def backward():
        return torch.autograd.grad(output, leaves, seed, retain_graph=True)

    return {"forward": forward, "backward": backward, "both": both}, [output.detach(), *backward()]


def measure(case: Case, device: torch.device, clock: Clock, copy: float) -> tuple[list[dict], list[str]]:
    """Rows of one case; a contender that fails is named among the problems, and the others go on."""
    torch.compiler.reset()  # compiled functions of other sizes count towards a limit
    arguments, rows, problems, want = case.inputs(device), [], [], None
    functions = contenders(case.operator, device)
    for name in ("eager", *(name for name in functions if name != "eager")):
        try:
            calls, computed = passes_of(functions[name], arguments)
            want = computed if name == "eager" else want
            check(case, computed, want)
            saved = saved_bytes(calls["forward"], arguments)
            for which, call in calls.items():
                ms, wall = clock(call)
                rate = case.bytes_moved(which) / ms * 1e3
                row = dict(operator=case.operator, size=case.size, which=which, contender=name, ms=ms, call_ms=wall)
                row |= dict(gb_per_s=rate / 1e9, share_of_copy=rate / copy, peak_bytes=peak_bytes(call), saved_bytes=saved)
                rows.append(row)
            del calls, computed
        except Exception as error:  # whatever it is, the other measurements stand
            lines = str(error).strip().splitlines() or [""]
            problems.append(f"{name} failed: {case.operator}, {case.size}: {type(error).__name__}: {lines[0]}")
    return rows, problems


# --- the kernels' code ------------------------------------------------------------------------------------------------


def code_problem() -> str | None:
    """Why the kernels cannot be compiled here; ``None`` where they can."""
    if find_spec("triton") is None:
        return "the kernels were not compiled: triton is not installed"
    import triton

    return "the kernels were not compiled: TRITON_INTERPRET is set" if triton.knobs.runtime.interpret else None


def code_rows(case: Case) -> list[dict]:
    """What the kernels of a case are compiled to: a row for each launch."""
    from kernel_code import codes_of

    from fastloop.kernels import fused

    codes = codes_of(of_arguments(fused, case.operator), case.inputs)
    place = {"operator": case.operator, "size": case.size}
    return [place | {"which": which} | asdict(code) for which, found in codes.items() for code in found]


# --- the tables -------------------------------------------------------------------------------------------------------


def side_by_side(values: list[float | None], unit: float) -> str:
    return " / ".join("-" if value is None else f"{value / unit:.2f}" for value in values)


def code_cells(code: list[dict]) -> list[str]:
    """Of the launches of one line: their number, and what they have together."""

    def accesses(key: str) -> str:
        total = Counter()
        for row in code:
            total.update(row[key])
        return " + ".join(f"{count}x{size}" for size, count in sorted(total.items(), reverse=True)) or "0"

    if not code:
        return ["-"] * len(CODE_COLUMNS)
    instructions, divisions = (str(sum(row[key] for row in code)) for key in ("instructions", "divisions"))
    return [str(len(code)), instructions, accesses("loads"), accesses("stores"), divisions]


def table(operator: str, rows: list[dict], code: list[dict]) -> str:
    """One operator as a Markdown table: a line for each size and pass, the contenders side by side."""
    rows = [row for row in rows if row["operator"] == operator]
    names = [name for name in ("triton", "reference", "eager", "compile") if any(row["contender"] == name for row in rows)]
    sides = " / ".join(name[0] for name in names)
    counts = ", ".join(f"{which} {count}" for which, count in TRAFFIC[operator].items())
    header = ["size", "pass", *(f"{name} ms" for name in names), "GB/s", "share", *(f"x {name}" for name in names[1:])]
    header += [f"call ms {sides}", f"peak MiB {sides}", f"saved MiB {sides}", *CODE_COLUMNS]
    lines = [header]
    for size, which in dict.fromkeys((row["size"], row["which"]) for row in rows):
        found = {row["contender"]: row for row in rows if (row["size"], row["which"]) == (size, which)}
        one, all_of = found.get(names[0]), [found.get(name) for name in names]
        line = [size, which, *(f"{row['ms']:.4f}" if row else "-" for row in all_of)]
        line += [f"{one['gb_per_s']:.0f}", f"{one['share_of_copy']:.0%}"] if one else ["-"] * 2
        line += [f"{row['ms'] / one['ms']:.2f}" if one and row else "-" for row in all_of[1:]]
        for key, unit in (("call_ms", 1), ("peak_bytes", 2**20), ("saved_bytes", 2**20)):
            line.append(side_by_side([row and row[key] for row in all_of], unit))
        line += code_cells([row for row in code if (row["operator"], row["size"], row["which"]) == (operator, size, which)])
        lines.append(line)
    return "\n".join([f"## {operator}: at least {counts} bytes per element", "", padded(lines)])


def main(argv: list[str] | None = None, cases: list[Case] | None = None, seconds: float | None = None) -> int:
    """``cases`` and ``seconds`` (of timing, for each number) take the place of what the device and --quick choose."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/kernels.json"))
    parser.add_argument("--quick", action="store_true", help="few sizes: about a minute on a GPU")
    args = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda" and (problem := triton_problem(device)):
        parser.error(f"triton {problem}")
    started, clock = time.perf_counter(), Clock(device, seconds or (0.05 if args.quick else 0.1))
    copy = copy_bandwidth(device, clock)
    notes = [] if device.type == "cuda" else [NO_GPU]
    notes += [problem for problem in (compile_problem(device), code_problem()) if problem]
    summary = {
        "command": shlex.join(["python", "bench/kernel_table.py", *(sys.argv[1:] if argv is None else argv)]),
        "machine": describe_machine(device),
        "versions": versions(),
        "copy_gb_per_s": copy / 1e9,
        "traffic_bytes_per_element": TRAFFIC,
        "notes": notes,
        "problems": [],
        "rows": [],
        "code": [],
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    cases = cases_for(device, args.quick) if cases is None else cases
    for number, case in enumerate(cases, 1):
        rows, problems = measure(case, device, clock, copy)
        summary["rows"] += rows
        summary["problems"] += problems
        summary["code"] += code_rows(case) if code_problem() is None else []
        summary["seconds"] = time.perf_counter() - started
        args.out.write_text(json.dumps(summary, indent=1) + "\n")  # after each case: an interrupted run keeps what it has
        print(f"{number}/{len(cases)} {case.operator}, {case.size}: {summary['seconds']:.0f} s", file=sys.stderr, flush=True)

    found = summary["versions"]
    print(f"{summary['machine'].get('gpu', 'CPU')}, torch {found['torch']}, triton {found.get('triton', '-')}")
    print(f"copy bandwidth: {copy / 1e9:.0f} GB/s")
    for operator in dict.fromkeys(row["operator"] for row in summary["rows"]):
        print("\n" + table(operator, summary["rows"], summary["code"]))
    print("\n" + "\n".join([*notes, *summary["problems"], f"{summary['seconds']:.0f} s; every row: {args.out}"]))
    return 1 if summary["problems"] else 0


if __name__ == "__main__":
    sys.exit(main())
