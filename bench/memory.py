"""Peak memory of one LOOP iteration under one memory choice after another, each added to those before it.

    python bench/memory.py [--model mid] [--rows plain,checkpointing] [--out bench/results]

Every row is the same iteration of a full fine-tune: K = 4 images of each prompt, the same prompts, noise, steps and number of
updates. The model has random weights: `sd15` and `sdxl` are the full architectures, for a GPU; `mid` has about a quarter of
SD 1.5's channels and is made anew in a temporary folder. Prints a Markdown table; writes memory_cpu.json, .md and .png, or
memory_GPU.json and so on.

- Rows are processes of their own. Those with ZeRO are started by `deepspeed`: one rank for each GPU, two ranks on a CPU.
- peak: of the rank that needs most. On a GPU torch.cuda.max_memory_allocated. On a CPU the resident size (VmHWM, so Linux
  only) less what the process had after its imports; freed memory goes back to the system at once (MALLOC_ variables).
- The iteration is the rollout, the check of the first ratios and the updates. Loading (model, optimizer, engine) has a column
  of its own. Evaluation, checkpoints and the export are left out.
- plan: what `fastloop plan` estimates for one process.
- The ranks share out the trajectories of the iteration, so each samples and trains on fewer; micro-batches are as large.
- DeepSpeed's buffers are made for models of SD 1.5's size and larger. For the smaller models here they are scaled down by the
  number of parameters, in a JSON as engine.deepspeed_config takes it.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from markdown_tables import padded
from memory_rows import FULL, MODELS, PHASES, ROWS, configs_for, make_model, work

from fastloop import cli
from fastloop.config import Config
from fastloop.denoisers import build_skeleton
from fastloop.errors import UserError
from fastloop.machine import describe_machine, versions
from fastloop.plan import planned_memory
from fastloop.recipes import dump_config

# glibc keeps freed blocks, and raises the size from which it does not: with these only small ones, in one arena
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "131072", "MALLOC_ARENA_MAX": "1"}


def measure(name: str, size: str, config: Config, folder: Path, on_gpu: bool) -> dict:
    """Runs a row in processes of its own."""
    ranks = 1 if config.engine.name == "torch" else torch.cuda.device_count() if on_gpu else 2
    (folder / f"{name}.yaml").write_text(dump_config(config))
    command = [sys.executable]
    if config.engine.name == "deepspeed":
        command += ["-m", "deepspeed.launcher.runner", f"--num_accelerators={ranks}", f"--master_port={free_port()}"]
    command += [str(Path(__file__).resolve()), "--row", name, "--folder", str(folder), "--model", size]
    env = {**os.environ, **MALLOC, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    if not on_gpu:
        env |= {"DS_ACCELERATOR": "cpu"}
    log = folder / f"{name}.log"
    with open(log, "w") as output:
        code = subprocess.run(command, env=env, stdout=output, stderr=subprocess.STDOUT).returncode
    row = {"row": name, "label": ROWS[name][0], "ranks": ranks, "problem": None}
    files = [folder / f"{name}-{rank}.json" for rank in range(ranks)]
    if code or not all(file.exists() for file in files):
        error = folder / f"{name}.error"
        return row | {"problem": error.read_text() if error.exists() else f"exit code {code}"}
    found = [json.loads(file.read_text()) for file in files]
    largest = max(found, key=lambda rank: max(rank[phase] for phase in PHASES) - rank["baseline"])
    beyond = {phase: largest[phase] - largest["baseline"] for phase in ("loading", *PHASES)}
    return row | {
        "peak_bytes": max(beyond[phase] for phase in PHASES),
        "baseline_bytes": largest["baseline"],
        **{f"{phase}_bytes": size for phase, size in beyond.items()},
        "seconds": largest["seconds"],
        "per_rank": found,
    }


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def estimate(config: Config) -> str | None:
    """The peak of `fastloop plan`, which counts one process; ``None`` where ranks share things out."""
    return None if config.engine.name != "torch" else size_text(planned_memory(config).peak)


def notes_for(rows: list[dict], size: str, on_gpu: bool) -> list[str]:
    """What a reader of the table has to know."""
    notes = []
    if any(row["ranks"] > 1 for row in rows):
        notes.append(
            "Ranks share out the iteration's trajectories: each samples and trains on its part. Micro-batches are equal."
        )
    if any(row["row"].startswith(("zero", "offload")) for row in rows) and size not in FULL:
        notes.append("DeepSpeed's buckets are scaled by the number of parameters, from SD 1.5's size to this model's.")
    if any(row["row"] == "offload" for row in rows):
        also = (
            ""
            if on_gpu
            else " On a CPU offload moves nothing out of the memory that is measured: it shows only what it costs."
        )
        notes.append("Offload replaces 8-bit AdamW by float32 CPU AdamW, which steps in the CPU's memory." + also)
    if not on_gpu and any(row["row"].startswith("zero") for row in rows):
        notes.append(
            "On a CPU bitsandbytes unpacks the state of a whole tensor to float32 for its step, and ZeRO hands it a rank's "
            "weights as one tensor: that is the step of the 8-bit rows with ZeRO. Its kernels for GPUs unpack nothing."
        )
    if not on_gpu:
        notes.append(
            "Resident size beyond that after the imports. Small freed blocks may stay with the process: an upper bound."
        )
    if any(not rank["restartable"] for row in rows for rank in row.get("per_rank", [])):
        notes.append("This system cannot restart VmHWM: every phase includes those before it, and loading.")
    return notes


def size_text(size: float) -> str:
    return f"{size / 2**20:.0f} MiB" if size < 2**30 else f"{size / 2**30:.2f} GiB"


def table(rows: list[dict]) -> str:
    """The rows as a Markdown table."""
    lines = [["choices", "ranks", "peak per rank", "share of plain", "loading", *PHASES, "plan", "s"]]
    for row in rows:
        line = [row["label"], str(row["ranks"])]
        if row["problem"]:
            line += [f"not measured: {row['problem']}", *["-"] * (len(lines[0]) - 3)]
        else:
            line += [size_text(row["peak_bytes"]), share_text(row)]
            line += [size_text(row[f"{phase}_bytes"]) for phase in ("loading", *PHASES)]
            line += [row["plan"] or "-", f"{row['seconds']:.0f}"]
        lines.append(line)
    return padded(lines)


def share_text(row: dict) -> str:
    return "-" if row["share_of_plain"] is None else f"{row['share_of_plain']:.0%}"


def plot(rows: list[dict], title: str, path: Path) -> None:
    """A bar for each row that was measured: the peak of an iteration, and a line where loading needed more or less."""
    from matplotlib.figure import Figure

    rows = [row for row in rows if row["problem"] is None]
    figure = Figure(figsize=(8, 1.4 + 0.45 * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    unit = 2**30 if max(row["peak_bytes"] for row in rows) >= 2**30 else 2**20
    bars = axes.barh(range(len(rows)), [row["peak_bytes"] / unit for row in rows], height=0.62, color="#2f5d8c")
    axes.bar_label(bars, [f"{size_text(row['peak_bytes'])}  {share_text(row)}" for row in rows], padding=4, fontsize=9)
    loading = [row["loading_bytes"] / unit for row in rows]
    axes.scatter(loading, range(len(rows)), marker="|", s=260, color="#d1495b", zorder=3, label="while loading")
    axes.set_yticks(range(len(rows)), [f"{row['label']}  ({row['ranks']} rank{'s' * (row['ranks'] > 1)})" for row in rows])
    axes.invert_yaxis()
    axes.set_xlim(0, 1.25 * max(row["peak_bytes"] / unit for row in rows))
    axes.set_xlabel(f"peak of one iteration, of the rank that needs most, {'GiB' if unit == 2**30 else 'MiB'}")
    axes.set_title(title, fontsize=10, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower right", frameon=False, fontsize=9)
    figure.savefig(path, dpi=150)


def main(argv: list[str] | None = None) -> int:
    parser = cli.Parser(prog="bench/memory.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    on_gpu = torch.cuda.is_available()
    parser.add_argument(
        "--model", choices=MODELS, default="sd15" if on_gpu else "mid", help="default: sd15 on a GPU, else mid"
    )
    parser.add_argument("--rows", default=",".join(ROWS), help=f"default: {','.join(ROWS)}")
    parser.add_argument("--out", type=Path, default=Path("bench/results"), help="folder (default: bench/results)")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="overrides for every row")
    parser.add_argument("--row", help=argparse.SUPPRESS)  # this process is a rank of this row
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # of deepspeed's launcher, which also sets LOCAL_RANK
    try:
        args = parser.parse_args(argv)
        if args.row:
            work(args.row, args.folder, args.model)
            return 0
        names = args.rows.split(",")
        if unknown := [name for name in names if name not in ROWS]:
            raise UserError(f"--rows: unknown row {unknown[0]!r}: any of {', '.join(ROWS)}")
        if not on_gpu and args.model in FULL:
            raise UserError(f"--model: {args.model} at full size is for a GPU: use mid")
        if not on_gpu and sys.platform != "linux":
            raise UserError("a CPU's memory is read from /proc, which only Linux has")
    except UserError as error:
        return cli.fail(str(error), 2)

    started = time.perf_counter()
    machine = describe_machine(torch.device("cuda" if on_gpu else "cpu"))
    rows = []
    with tempfile.TemporaryDirectory(prefix="fastloop-memory-") as temporary:
        folder = Path(temporary)
        if args.model in FULL:
            model = build_skeleton(Config.model_validate({"rewards": [{"name": "shapes"}], **MODELS[args.model]["run"]}).model)
            parameters = sum(p.numel() for p in model.network.parameters())
        else:
            parameters = make_model(args.model, folder / "model")
        configs = configs_for(args.model, folder, parameters, args.set)
        for name in filter(names.__contains__, ROWS):
            row = measure(name, args.model, configs[name], folder, on_gpu) | {"plan": estimate(configs[name])}
            rows.append(row)
            said = row["problem"] or size_text(row["peak_bytes"])
            print(f"{row['label']}: {said}, {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)
    plain = next((row["peak_bytes"] for row in rows if row["row"] == "plain" and not row["problem"]), None)
    for row in rows:
        row["share_of_plain"] = row["peak_bytes"] / plain if plain and not row["problem"] else None
    summary = {
        "command": shlex.join(["python", "bench/memory.py", *(sys.argv[1:] if argv is None else argv)]),
        "machine": machine,
        "versions": versions(),
        "model": args.model,
        "unet_parameters": parameters,
        "notes": notes_for(rows, args.model, on_gpu),
        "seconds": time.perf_counter() - started,
        "rows": rows,
    }
    place = machine["gpu"] if on_gpu else f"CPU, {machine['cpus']} cores"
    title = f"{args.model}: UNet of {parameters / 1e6:.0f} million parameters, all trained, {place}"
    text = "\n".join(
        [
            f"# Peak memory of one LOOP iteration. {title}",
            "",
            f"    {summary['command']}",
            "",
            f"torch {summary['versions']['torch']}, deepspeed {summary['versions'].get('deepspeed', '-')}, "
            f"bitsandbytes {summary['versions'].get('bitsandbytes', '-')}; {summary['seconds']:.0f} s.",
            "",
            table(rows),
            "",
            *(f"- {note}" for note in summary["notes"]),
        ]
    )
    print(text)
    args.out.mkdir(parents=True, exist_ok=True)
    base = args.out / f"memory_{machine['gpu'].replace(' ', '_') if on_gpu else 'cpu'}"
    base.with_suffix(".json").write_text(json.dumps(summary, indent=1) + "\n")
    base.with_suffix(".md").write_text(text + "\n")
    if any(row["problem"] is None for row in rows):
        plot(rows, title, base.with_suffix(".png"))
    print(f"\n{base}.json, .md, .png")
    return 1 if any(row["problem"] for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
