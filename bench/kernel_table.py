"""Time, traffic and memory of the fused operators: Triton against eager PyTorch and torch.compile.

    python bench/kernel_table.py [--quick] [--out bench/results/kernels_h200.json]

Prints one Markdown table per operator and writes every row, with command, machine and versions, to a JSON file.

- triton: `fastloop.kernels.fused`. eager: the formulas below in float32 PyTorch, as people write them (DDPO's log-prob with
  .float() and .mean()); `kernels/reference.py`, which sums in float64 for exactness, would be an unfair baseline. compile:
  torch.compile(dynamic=False) of that same eager function. Each is checked against eager before it is timed.
- ms: on a GPU the time between CUDA events, the work queued behind a sleep so that the cost of launching does not show, the
  L2 cache overwritten before each repetition; the median. On a CPU the median wall time.
- call: wall ms of one call from Python when calls follow each other (launching included, caches as they are).
- backward: on a graph built before, outside the timed part. both: forward and backward.
- GB/s: the least an operator can move (`TRAFFIC`, bytes per element) over ms; share: of the bandwidth of `copy_` of one large
  tensor, timed the same way in the same run, read and write counted; both of the table's first contender. x eager, x compile:
  how many times faster than these it is.
- peak: memory allocated at most during the operation, beyond what was there before (inputs are; in backward the graph is).
  saved: what autograd keeps for the backward, beside the inputs.

Without a GPU the twins in `kernels/reference.py` take the place of Triton, which is not timed, and the sizes are small.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch._functorch import config as functorch_config

from fastloop.kernels import backend, triton_problem
from fastloop.kernels.reference import MicroBatch
from fastloop.machine import describe_machine, versions

# bytes per element in bfloat16, latents float32. Per element of a latent: forward reads cond, uncond, x_t and x_prev, backward
# writes two gradients as well; sampling reads three and writes x_prev. group_norm_silu: x read, y written; x and dy read, dx
# written. geglu, per output: two read, one written; three read, two written
TRAFFIC = {
    "policy_loss": {"forward": 12, "backward": 16},
    "sample_transition": {"forward": 12},
    "group_norm_silu": {"forward": 4, "backward": 6},
    "geglu": {"forward": 6, "backward": 10},
}
NO_GPU = "Triton was not timed: no GPU here"


# --- the baselines ----------------------------------------------------------------------------------------------------


def eager_log_prob(mean, x_prev, sigma):
    log_prob = -((x_prev - mean) ** 2) / (2 * sigma**2) - torch.log(sigma) - 0.5 * math.log(2 * math.pi)
    return log_prob.mean(dim=(1, 2, 3))


def eager_mean(cond, uncond, x_t, a, b, guidance):
    guided = uncond.float() + guidance * (cond.float() - uncond.float())
    return a.view(-1, 1, 1, 1) * x_t + b.view(-1, 1, 1, 1) * guided


def eager_policy_loss(cond, uncond, x_t, x_prev, a, b, sigma, guidance, log_prob_old, advantage, clip_range):
    """DDPO's loss before its mean over the batch, with the two statistics that DDPO logs."""
    log_prob = eager_log_prob(eager_mean(cond, uncond, x_t, a, b, guidance), x_prev, sigma.view(-1, 1, 1, 1))
    ratio = torch.exp(log_prob - log_prob_old)
    loss = torch.maximum(-advantage * ratio, -advantage * torch.clamp(ratio, 1 - clip_range, 1 + clip_range))
    with torch.no_grad():
        approx_kl = 0.5 * torch.mean((log_prob - log_prob_old) ** 2)
        clip_fraction = torch.mean((torch.abs(ratio - 1) > clip_range).float())
    return loss, approx_kl, clip_fraction


def eager_sample_transition(cond, uncond, x_t, a, b, sigma, guidance, seed, trajectory, step):
    """Noise from torch's generator: seed, trajectory and step key the kernel's alone."""
    mean, sigma = eager_mean(cond, uncond, x_t, a, b, guidance), sigma.view(-1, 1, 1, 1)
    x_prev = mean + sigma * torch.randn_like(mean)
    return x_prev, eager_log_prob(mean, x_prev, sigma)


def eager_group_norm_silu(x, groups, weight, bias, eps):
    return F.silu(F.group_norm(x, groups, weight, bias, eps))


def eager_geglu(projected):
    hidden, gate = projected.chunk(2, dim=-1)
    return hidden * F.gelu(gate)


EAGER = {
    "policy_loss": eager_policy_loss,
    "sample_transition": eager_sample_transition,
    "group_norm_silu": eager_group_norm_silu,
    "geglu": eager_geglu,
}


# --- what is measured -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One operator at one size. ``elements``: what `TRAFFIC` counts; ``inputs``: makes its arguments on a device."""

    operator: str
    size: str
    elements: int
    inputs: Callable[[torch.device], dict]

    def bytes_moved(self, which: str) -> int:
        counts = TRAFFIC[self.operator]
        return self.elements * (sum(counts.values()) if which == "both" else counts[which])

    @property
    def passes(self) -> tuple[str, ...]:
        return ("forward", "backward", "both") if "backward" in TRAFFIC[self.operator] else ("forward",)


def step_case(operator: str, model: str, shape: tuple[int, int, int], batch: int) -> Case:
    def inputs(device: torch.device) -> dict:
        g = torch.Generator(device).manual_seed(0)
        cond, uncond, x_t, noise = (torch.randn(batch, *shape, generator=g, device=device) for _ in range(4))
        cond, uncond = cond.bfloat16(), uncond.bfloat16()
        a, b, sigma = (torch.full((batch,), value, device=device) for value in (1.01, -0.05, 0.02))
        step = dict(cond=cond, uncond=uncond, x_t=x_t, a=a, b=b, sigma=sigma, guidance=5.0)
        if operator == "sample_transition":
            return step | dict(seed=7, trajectory=torch.arange(batch, device=device), step=4)
        mean = eager_mean(cond, uncond, x_t, a, b, 5.0)
        x_prev = mean + 0.02 * noise
        # some pairs inside the window and some outside, none near its edges
        offset = torch.linspace(-0.02, 0.02, batch, device=device)
        log_prob_old = eager_log_prob(mean, x_prev, sigma.view(-1, 1, 1, 1)) + offset
        cond.requires_grad_(), uncond.requires_grad_()
        advantage = 1.0 - 2.0 * (torch.arange(batch, device=device) % 2)
        return step | dict(x_prev=x_prev, log_prob_old=log_prob_old, advantage=advantage, clip_range=1e-2)

    return Case(operator, f"{model} {'x'.join(map(str, shape))}, batch {batch}", batch * math.prod(shape), inputs)


def norm_case(model: str, channels: int, side: int, batch: int, last: bool = False, trained: bool = False) -> Case:
    def inputs(device: torch.device) -> dict:
        g = torch.Generator(device).manual_seed(0)
        layout = torch.channels_last if last else torch.contiguous_format
        x = torch.randn(batch, channels, side, side, generator=g, device=device).bfloat16().contiguous(memory_format=layout)
        weight = 1 + 0.1 * torch.randn(channels, generator=g, device=device)
        bias = 0.1 * torch.randn(channels, generator=g, device=device)
        weight, bias = (parameter.bfloat16().requires_grad_(trained) for parameter in (weight, bias))
        return dict(x=x.requires_grad_(), groups=32, weight=weight, bias=bias, eps=1e-5)

    size = f"{model} {channels}@{side}x{side}, batch {batch}{', NHWC' if last else ''}{', trained' if trained else ''}"
    return Case("group_norm_silu", size, batch * channels * side * side, inputs)


def geglu_case(model: str, tokens: int, inner: int, batch: int) -> Case:
    def inputs(device: torch.device) -> dict:
        g = torch.Generator(device).manual_seed(0)
        projected = torch.randn(batch, tokens, 2 * inner, generator=g, device=device, dtype=torch.bfloat16)
        return dict(projected=projected.requires_grad_())

    return Case("geglu", f"{model} {tokens} x 2*{inner}, batch {batch}", batch * tokens * inner, inputs)


def cases_for(device: torch.device, quick: bool) -> list[Case]:
    """What the table has on a device; trained: weight and bias need gradients as well (not so with LoRA)."""
    sd, sdxl = ("SD", (4, 64, 64)), ("SDXL", (4, 128, 128))
    operators = ("policy_loss", "sample_transition")
    if device.type != "cuda":
        steps = [(sd, 1)] if quick else [(sd, 1), (sd, 4), (sdxl, 1)]
        cases = [step_case(operator, *model, batch) for operator in operators for model, batch in steps]
        cases += [norm_case("SD", 320, 16, 1)]
        if not quick:
            cases += [norm_case("SD", 320, 32, 2, last=True), norm_case("SD", 320, 16, 1, trained=True)]
        return cases + [geglu_case("SD", 256, 320, 1)]
    batches = (1, 64) if quick else (1, 4, 16, 64, 256)
    cases = [step_case(operator, *model, n) for operator in operators for model in (sd, sdxl) for n in batches]
    sizes = [("SD", 320, 64), ("SD", 640, 32), ("SD", 1280, 16), ("SD", 1280, 8)]
    sizes += [("SDXL", 320, 128), ("SDXL", 640, 64), ("SDXL", 1280, 32)]
    gates = [("SD", 4096, 1280), ("SD", 1024, 2560), ("SD", 256, 5120), ("SDXL", 4096, 2560), ("SDXL", 1024, 5120)]
    if quick:
        cases += [norm_case("SDXL", 640, 64, 8, last) for last in (False, True)]
        return cases + [geglu_case("SDXL", 4096, 2560, 8)]
    cases += [norm_case(*size, 8, last) for size in sizes for last in (False, True)]
    cases += [norm_case(*size, batch) for size in (sizes[0], sizes[3], sizes[5]) for batch in (2, 16)]
    cases += [norm_case(*sizes[i], 8, last, trained=True) for i in (0, 5) for last in (False, True)]
    return cases + [geglu_case(*gate, batch) for gate in gates for batch in (2, 16)]


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


def contenders(operator: str, device: torch.device) -> dict[str, Callable]:
    """Name to a function of the arguments; it returns a tensor or a tuple that starts with the differentiable one."""
    name = "triton" if device.type == "cuda" else "reference"
    function = getattr(backend(name, device), operator)
    found = {name: function, "eager": EAGER[operator]}
    if operator == "policy_loss":

        def loss(cond, uncond, guidance, clip_range, **columns):
            settings = {"guidance": guidance, "clip_range": clip_range, "objective": "clipped"}
            return (function(cond, uncond, MicroBatch(**columns), **settings).loss,)

        found[name] = loss
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


# --- the tables -------------------------------------------------------------------------------------------------------


def side_by_side(values: list[float | None], unit: float) -> str:
    return " / ".join("-" if value is None else f"{value / unit:.2f}" for value in values)


def table(operator: str, rows: list[dict]) -> str:
    """One operator as a Markdown table: a line for each size and pass, the contenders side by side."""
    rows = [row for row in rows if row["operator"] == operator]
    names = [name for name in ("triton", "reference", "eager", "compile") if any(row["contender"] == name for row in rows)]
    sides = " / ".join(name[0] for name in names)
    counts = ", ".join(f"{which} {count}" for which, count in TRAFFIC[operator].items())
    header = ["size", "pass", *(f"{name} ms" for name in names), "GB/s", "share", *(f"x {name}" for name in names[1:])]
    header += [f"call ms {sides}", f"peak MiB {sides}", f"saved MiB {sides}"]
    lines = [header]
    for size, which in dict.fromkeys((row["size"], row["which"]) for row in rows):
        found = {row["contender"]: row for row in rows if (row["size"], row["which"]) == (size, which)}
        one, all_of = found.get(names[0]), [found.get(name) for name in names]
        line = [size, which, *(f"{row['ms']:.4f}" if row else "-" for row in all_of)]
        line += [f"{one['gb_per_s']:.0f}", f"{one['share_of_copy']:.0%}"] if one else ["-"] * 2
        line += [f"{row['ms'] / one['ms']:.2f}" if one and row else "-" for row in all_of[1:]]
        for key, unit in (("call_ms", 1), ("peak_bytes", 2**20), ("saved_bytes", 2**20)):
            line.append(side_by_side([row and row[key] for row in all_of], unit))
        lines.append(line)
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    text = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines]
    text.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join([f"## {operator}: at least {counts} bytes per element", "", *text])


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
    notes += [problem] if (problem := compile_problem(device)) else []
    summary = {
        "command": shlex.join(["python", "bench/kernel_table.py", *(sys.argv[1:] if argv is None else argv)]),
        "machine": describe_machine(device),
        "versions": versions(),
        "copy_gb_per_s": copy / 1e9,
        "traffic_bytes_per_element": TRAFFIC,
        "notes": notes,
        "problems": [],
        "rows": [],
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    cases = cases_for(device, args.quick) if cases is None else cases
    for number, case in enumerate(cases, 1):
        rows, problems = measure(case, device, clock, copy)
        summary["rows"] += rows
        summary["problems"] += problems
        summary["seconds"] = time.perf_counter() - started
        args.out.write_text(json.dumps(summary, indent=1) + "\n")  # after each case: an interrupted run keeps what it has
        print(f"{number}/{len(cases)} {case.operator}, {case.size}: {summary['seconds']:.0f} s", file=sys.stderr, flush=True)

    found = summary["versions"]
    print(f"{summary['machine'].get('gpu', 'CPU')}, torch {found['torch']}, triton {found.get('triton', '-')}")
    print(f"copy bandwidth: {copy / 1e9:.0f} GB/s")
    for operator in dict.fromkeys(row["operator"] for row in summary["rows"]):
        print("\n" + table(operator, summary["rows"]))
    print("\n" + "\n".join([*notes, *summary["problems"], f"{summary['seconds']:.0f} s; every row: {args.out}"]))
    return 1 if summary["problems"] else 0


if __name__ == "__main__":
    sys.exit(main())
