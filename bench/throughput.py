"""Images per second of whole iterations, and where the time goes: plain PPO, fastloop, TRL's trainer, identical mathematics.

    python bench/throughput.py [--models shapes,sd15] [--adapters lora,full] [--peer-python peer/bin/python] [--scale]

Systems: `baseline` is bench/baseline_ppo.py, or baseline_flow.py, eager PyTorch; `reference` is fastloop with its PyTorch
kernels; `fastloop` has the kernels of the machine; `compile` and `regional` add model.compile=true and regional; `trl` is TRL
0.23.1's DDPOTrainer in an environment of its own (bench/peer_trl.py says how to make it). All do `algorithm: ppo` on the same
model, prompts, steps, guidance, images, updates, batch sizes and LoRA rank. `dpok`, `dlpo` and `noise_ppo` are other methods
at the same sizes, for `--systems`. Models beside the bundled ones are full-size architectures with random weights, without
downloads.

- An iteration is all that a trainer does between two rollouts: text encoding, sampling, decoding, rewards, updates, metrics.
  Checkpoints and evaluations are left out. The first one of every process is not counted, but in a column of its own: what it
  takes longer is compilation, with what is in torch.compile's cache (TORCHINDUCTOR_CACHE_DIR) left out.
- Each system is a process of its own. On a CPU all are alive and take turns, an iteration each; on a GPU they are started one
  after the other, in `--repeats` rounds. Medians, with the smallest and largest value beside them; `x baseline` is the median
  of the ratios within a round.
- Phases do not overlap: what a phase calls counts for the inner one. `reward` is the time that the loop waits for rewards. On
  a GPU they come from iterations of their own that wait for the device at every border.
- TFLOP/s: of the UNet, from PyTorch's flop counter on the architecture, over the seconds of `rollout`, and of `loss` and
  `backward`. The share is of the matrix product that this machine does in that dtype, measured here, the best of all rounds.
- `--scale` adds one table for batch, K and T, each changed alone from the first case.

Prints Markdown tables; writes throughput_cpu.json and .md, or throughput_GPU.json and .md.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

import torch
from throughput_systems import (
    LORA_RANK,
    MODELS,
    RELATIVES,
    SYSTEMS,
    Worker,
    case_config,
    command_of,
    for_peer,
    save_for_peer,
    work,
)
from worker import PHASES

from fastloop import cli
from fastloop.batches import trained_steps
from fastloop.config import Config
from fastloop.denoisers import build_skeleton
from fastloop.denoisers.parts import DTYPES
from fastloop.errors import UserError
from fastloop.kernels import choose
from fastloop.machine import describe_machine, versions
from fastloop.rollout import sampler_table

SCALES = {"batch": (4, 32), "K": (2, 8), "T": (4, 16)}


# --- one case -------------------------------------------------------------------------------------------------------------


def measure(model: str, adapter: str, systems: list[str], args: argparse.Namespace, overrides: list[str]) -> dict:
    """All systems on one case: raw iterations, and what follows from them."""
    config = case_config(model, adapter, overrides)
    rows = {system: {"system": system, "iterations": [], "exact": [], "problem": None} for system in systems}
    with tempfile.TemporaryDirectory(prefix="fastloop-throughput-") as temporary, ExitStack() as stack:
        folder = Path(temporary)
        if "trl" in systems and for_peer(model):
            save_for_peer(config, folder / "pipeline")

        def start(system: str) -> Worker | None:
            try:
                command = command_of(system, model, adapter, overrides, folder, args)
                worker = Worker(system, command, folder / f"{system}.log", args.threads)
                stack.callback(worker.close)
                rows[system].setdefault("first_seconds", worker.iterate()["seconds"])
                return worker
            except (UserError, RuntimeError) as error:
                rows[system]["problem"] = str(error)
                print(f"  {system}: {error}", file=sys.stderr, flush=True)

        workers = {} if args.on_gpu else {system: start(system) for system in systems}
        flops, matmul = unet_flops(config), []
        for repeat in range(args.repeats):
            matmul.append(matmul_tflops(config.model.dtype, args.on_gpu))
            for system in systems:
                worker = start(system) if args.on_gpu and not rows[system]["problem"] else workers.get(system)
                if worker is None:
                    continue
                try:
                    for _ in range(args.iterations):
                        rows[system]["iterations"].append({**worker.iterate(), "round": repeat})
                    if args.on_gpu:
                        rows[system]["exact"].append(worker.iterate("exact"))
                        worker.close()
                except RuntimeError as error:
                    rows[system]["problem"], workers[system] = str(error), None
            print(f"  {model}, {adapter}: round {repeat + 1} of {args.repeats}", file=sys.stderr, flush=True)
    for row in rows.values():
        summarize(row, config, flops, max(matmul), rows.get("baseline"))
    return {
        "model": model,
        "adapter": adapter,
        "images": config.images_per_rollout,
        "images_per_prompt": config.images_per_prompt,
        "steps": config.sampling.steps,
        "guidance_scale": config.sampling.guidance_scale,
        "updates": config.updates_per_rollout,
        "batch": config.memory.rollout_batch,
        "dtype": config.model.dtype,
        "gradient_checkpointing": bool(config.memory.gradient_checkpointing),
        "lora_rank": LORA_RANK if adapter == "lora" else None,
        "unet_gflops": {name: value / 1e9 for name, value in flops.items()},
        "matmul_tflops": max(matmul),
        "rows": list(rows.values()),
    }


def unet_flops(config: Config) -> dict[str, int]:
    """Floating point operations of the UNet for one image and step: a forward, and a forward with its backward.

    With guidance that is two rows. Counted on the meta device; what gradient checkpointing computes again is not counted.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    plain = config.model.model_copy(update={"dtype": "fp32", "attention": "sdpa"})
    denoiser = build_skeleton(plain)
    denoiser.train_adapter(gradient_checkpointing=False, seed=0)
    shape = denoiser.latent_shape(config.sampling.height, config.sampling.width)
    latents, timesteps = torch.zeros(1, *shape, device="meta"), torch.zeros(1, dtype=denoiser.timestep_dtype, device="meta")
    cond = denoiser.condition([denoiser.blank_embedding()], config.sampling)
    uncond = cond if config.sampling.guidance_scale != 1 else None
    counted = {}
    with sdpa_kernel(SDPBackend.MATH):  # the fused ones have no formula on every device
        for name in ("forward", "forward_backward"):
            with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(name != "forward"):
                outputs = denoiser.predict(latents, timesteps, cond, uncond)
                if name != "forward":
                    sum(output.sum() for output in outputs if output is not None).backward()
            counted[name] = counter.get_total_flops()
    return counted


def matmul_tflops(dtype: str, on_gpu: bool, seconds: float = 0.3) -> float:
    """Rate of a large square matrix product, the best of several."""
    size, device = (8192, "cuda") if on_gpu else (1024, "cpu")
    a, b = (torch.randn(size, size, device=device).to(DTYPES[dtype]) for _ in range(2))
    best, end = float("inf"), time.perf_counter() + seconds
    a @ b
    while time.perf_counter() < end:
        if on_gpu:
            torch.cuda.synchronize()
        started = time.perf_counter()
        a @ b
        if on_gpu:
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best / 1e12


def summarize(row: dict, config: Config, flops: dict, matmul: float, baseline: dict | None) -> None:
    """Adds medians and shares to a row with raw iterations."""
    iterations = row["iterations"]
    if row["problem"] or not iterations:
        return
    images = config.images_per_rollout
    rates = [images / each["seconds"] for each in iterations]
    phases = {name: median(each["phases"].get(name, 0.0) for each in row["exact"] or iterations) for name in PHASES}
    trained = len(trained_steps(sampler_table(config.model, config.sampling), config))
    work = {"rollout": config.sampling.steps * flops["forward"], "update": trained * flops["forward_backward"]}
    if row["system"] in RELATIVES:  # whose updates are others, or none of the network
        del work["update"]
    spent = {"rollout": phases["rollout"], "update": phases["loss"] + phases["backward"]}
    tflops = {name: images * of / spent[name] / 1e12 for name, of in work.items()}
    row |= {
        "images_per_s": median(rates),
        "images_per_s_range": [min(rates), max(rates)],
        "cpu_seconds_per_image": median(each["cpu_seconds"] for each in iterations) / images,
        "phases": phases,
        "tflops": tflops,
        "share_of_matmul": {name: value / matmul for name, value in tflops.items()},
        "peak_bytes": max(each["peak_bytes"] for each in iterations),
    }
    if baseline and not baseline["problem"]:
        row["x_baseline"] = ratio(baseline["iterations"], iterations, "seconds")
        row["x_baseline_cpu"] = ratio(baseline["iterations"], iterations, "cpu_seconds")


def ratio(baseline: list[dict], other: list[dict], key: str) -> float:
    """Median over the rounds of baseline seconds by other seconds: above 1 the other is faster."""
    rounds = sorted({each["round"] for each in baseline} & {each["round"] for each in other})

    def of(rows, number):
        return median(each[key] for each in rows if each["round"] == number)

    return median(of(baseline, number) / of(other, number) for number in rounds)


def median(values) -> float:
    return statistics.median(list(values))


# --- tables -----------------------------------------------------------------------------------------------------------------


def tables(summary: dict) -> str:
    """The summary as Markdown."""
    parts = []
    for case in summary["cases"]:
        parts += [title(case), table(case)]
    if summary["scaling"]:
        unit = "images per CPU second" if summary["machine"]["device"] == "cpu" else "images/s"
        parts += [f"### Scaling: {unit} when one number changes", scaling_table(summary)]
    parts += [f"- {note}" for note in summary["notes"]]
    return "\n\n".join(parts)


def title(case: dict) -> str:
    what = "LoRA of rank 4" if case["adapter"] == "lora" else "all weights"
    checkpointing = ", gradient checkpointing" if case["gradient_checkpointing"] else ""
    return (
        f"### {case['model']}, {what}\n\n"
        f"{case['images']} images of K = {case['images_per_prompt']}, T = {case['steps']}, "
        f"guidance {case['guidance_scale']:g}, {case['updates']} updates over all steps, batches of {case['batch']}, "
        f"{case['dtype']}{checkpointing}. Matrix product of this machine: {case['matmul_tflops']:.3g} TFLOP/s."
    )


def table(case: dict) -> str:
    head = ["system", "images/s", "x baseline", "by CPU seconds", *(f"{name} s" for name in PHASES)]
    head += ["rollout TFLOP/s", "update TFLOP/s", "peak memory", "first iteration s"]
    lines = []
    for row in case["rows"]:
        if row["problem"]:
            lines.append([row["system"], f"not measured: {row['problem']}", *["-"] * (len(head) - 2)])
            continue
        low, high = row["images_per_s_range"]
        rates = [
            f"{row['tflops'][name]:.3g} ({row['share_of_matmul'][name]:.0%})" if name in row["tflops"] else "-"
            for name in ("rollout", "update")
        ]
        lines.append(
            [
                row["system"],
                f"{row['images_per_s']:.3g} ({low:.3g} to {high:.3g})",
                f"{row['x_baseline']:.2f}" if "x_baseline" in row else "-",
                f"{row['x_baseline_cpu']:.2f}" if "x_baseline_cpu" in row else "-",
                *(f"{row['phases'][name]:.2f}" for name in PHASES),
                *rates,
                f"{row['peak_bytes'] / 2**30:.2f} GiB",
                f"{row['first_seconds']:.1f}",
            ]
        )
    return markdown(head, lines)


def scaling_table(summary: dict) -> str:
    systems = list(dict.fromkeys(row["system"] for case in summary["scaling"] for row in case["rows"]))
    lines = []
    for case in summary["scaling"]:
        measured = [row for row in case["rows"] if not row["problem"]]
        by_cpu = summary["machine"]["device"] == "cpu"
        rates = {r["system"]: 1 / r["cpu_seconds_per_image"] if by_cpu else r["images_per_s"] for r in measured}
        lines.append([case["changed"], *(f"{rates[name]:.3g}" if name in rates else "-" for name in systems)])
    return markdown(["changed", *systems], lines)


def markdown(head: list[str], lines: list[list[str]]) -> str:
    rows = ["| " + " | ".join(line) + " |" for line in [head, *lines]]
    return "\n".join([rows[0], "|" + "---|" * len(head), *rows[1:]])


def scaling(model: str, adapter: str, first: dict, args: argparse.Namespace) -> list[dict]:
    """The first case with one number changed: batch, K with as many images, T. The baseline has no K."""
    systems = ("baseline", "fastloop")
    found = [first | {"changed": "nothing", "rows": [row for row in first["rows"] if row["system"] in systems]}]
    keys = ("rollout_batch", "update_batch", "vae_batch")
    changes = [(f"batch {n}", [f"memory.{key}={n}" for key in keys]) for n in SCALES["batch"]]
    changes += [(f"K {k}", [f"images_per_prompt={k}", f"prompts_per_step={first['images'] // k}"]) for k in SCALES["K"]]
    changes += [(f"T {n}", [f"sampling.steps={n}"]) for n in SCALES["T"]]
    for name, overrides in changes:
        chosen = [system for system in systems if system == "fastloop" or not name.startswith("K ")]
        found.append(measure(model, adapter, chosen, args, [*args.set, *overrides]) | {"changed": name})
    return found


def main(argv: list[str] | None = None) -> int:
    parser = cli.Parser(prog="bench/throughput.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    on_gpu = torch.cuda.is_available()
    parser.add_argument("--models", default=",".join(MODELS) if on_gpu else "shapes", help="default: all, or shapes on a CPU")
    parser.add_argument("--adapters", default="lora,full")
    parser.add_argument("--systems", default=",".join(name for name in SYSTEMS if name not in RELATIVES))
    parser.add_argument("--peer-python", type=Path, help="of an environment with TRL 0.23.1: adds the system trl")
    parser.add_argument("--repeats", type=int, default=5, help="rounds (default: 5)")
    parser.add_argument("--iterations", type=int, default=1, help="of each system in a round (default: 1)")
    parser.add_argument("--threads", type=int, default=cpu_count(), help="of each process (default: the CPU's cores)")
    parser.add_argument("--scale", action="store_true", help="also batch, K and T, for baseline and fastloop")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="overrides for every system")
    parser.add_argument("--out", type=Path, default=Path("bench/results"), help="folder (default: bench/results)")
    parser.add_argument("--work", help=argparse.SUPPRESS)  # this process serves that system
    parser.add_argument("--config", type=Path, help=argparse.SUPPRESS)
    try:
        args = parser.parse_args(argv)
        if args.work:
            work(args.work, args.config)
            return 0
        args.on_gpu = on_gpu
        chosen = {key: getattr(args, key).split(",") for key in ("models", "adapters", "systems")}
        for key, known in (("models", MODELS), ("adapters", ("lora", "full")), ("systems", SYSTEMS)):
            if unknown := [name for name in chosen[key] if name not in known]:
                raise UserError(f"--{key}: unknown {unknown[0]!r}: any of {', '.join(known)}")
        if args.peer_python and not args.peer_python.exists():
            raise UserError(f"--peer-python: no file {args.peer_python}")
        for model in chosen["models"]:
            for adapter in chosen["adapters"]:
                case_config(model, adapter, args.set)
    except UserError as error:
        return cli.fail(str(error), 2)

    device = torch.device("cuda" if on_gpu else "cpu")
    torch.set_num_threads(args.threads)
    systems, notes = chosen["systems"], []
    if "trl" in systems and not args.peer_python:
        systems.remove("trl")
    if "reference" in systems and "fastloop" in systems and choose("auto", device) == "reference":
        systems.remove("reference")
        notes.append("Without a GPU fastloop's kernels are the reference ones: one row for both.")
    started = time.perf_counter()
    cases = [measure(m, a, systems, args, args.set) for m in chosen["models"] for a in chosen["adapters"]]
    scaled = scaling(chosen["models"][0], chosen["adapters"][0], cases[0], args) if args.scale else []
    summary = {
        "command": shlex.join(["python", "bench/throughput.py", *(sys.argv[1:] if argv is None else argv)]),
        "machine": describe_machine(device) | {"threads": args.threads},
        "versions": versions() | peer_versions(args.peer_python if "trl" in systems else None),
        "seconds": time.perf_counter() - started,
        "notes": notes,
        "cases": cases,
        "scaling": scaled,
    }
    args.out.mkdir(parents=True, exist_ok=True)
    stem = args.out / f"throughput_{summary['machine'].get('gpu', 'cpu').replace(' ', '_')}"
    stem.with_suffix(".json").write_text(json.dumps(summary, indent=1) + "\n")
    stem.with_suffix(".md").write_text(tables(summary) + "\n")
    print(tables(summary))
    return 0


def peer_versions(python: Path | None) -> dict[str, str]:
    """Versions of the peer's packages, as `trl: torch` and so on."""
    if python is None:
        return {}
    names = ("trl", "torch", "diffusers", "transformers", "accelerate", "peft")
    code = f"import importlib.metadata as m, json; print(json.dumps({{n: m.version(n) for n in {names}}}))"
    found = json.loads(subprocess.run([str(python), "-c", code], capture_output=True, text=True, check=True).stdout)
    return {f"trl: {name}": version for name, version in found.items()}


def cpu_count() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


if __name__ == "__main__":
    sys.exit(main())
