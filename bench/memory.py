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
import ctypes
import gc
import io
import json
import os
import re
import shlex
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager, redirect_stdout
from importlib import import_module
from pathlib import Path

import torch

from fastloop import cli, denoisers
from fastloop.config import Config
from fastloop.denoisers import build_skeleton, load_denoiser
from fastloop.denoisers.files import ASSETS
from fastloop.denoisers.parts import DTYPES
from fastloop.errors import UserError
from fastloop.machine import describe_machine, versions
from fastloop.observer import Observer
from fastloop.plan import planned_memory
from fastloop.ranks import Ranks
from fastloop.recipes import apply_overrides, dump_config, load_config, parse_config
from fastloop.trainer import Trainer

ROWS = {  # name: (label, overrides beyond those of the rows above it)
    "plain": ("plain", []),
    "checkpointing": ("+ gradient checkpointing", ["memory.gradient_checkpointing=true"]),
    "adamw8bit": ("+ 8-bit AdamW", ["optimizer.name=adamw8bit"]),
    "zero2": ("+ ZeRO-2", ["engine.name=deepspeed", "engine.zero_stage=2"]),
    "zero3-gathered": ("+ ZeRO-3, gathered rollout", ["engine.zero_stage=3", "engine.rollout_parameters=gathered"]),
    "zero3": ("+ ZeRO-3, layerwise rollout", ["engine.rollout_parameters=layerwise"]),
    "offload": (
        "+ offload, CPU AdamW",
        ["engine.offload_optimizer=true", "engine.offload_parameters=true", "optimizer.name=cpu_adamw"],
    ),
}
PHASES = ("rollout", "check", "gradients", "step")  # of an iteration; "loading" comes before
FULL_SIZE = 859_520_964  # parameters of SD 1.5's UNet
DEEPSPEED = {  # what DeepSpeed keeps whole beside the shards, in elements: fastloop's bucket and DeepSpeed's own defaults
    "reduce_bucket_size": 5e7,
    "allgather_bucket_size": 5e7,
    "stage3_prefetch_bucket_size": 5e7,
    "stage3_param_persistence_threshold": 1e5,
    "stage3_max_live_parameters": 1e9,
    "stage3_max_reuse_distance": 1e9,
}
# glibc keeps freed blocks, and raises the size from which it does not: with these only small ones, in one arena
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "131072", "MALLOC_ARENA_MAX": "1"}

MODELS = {
    "tiny": {
        "unet": dict(block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, attention_head_dim=2, sample_size=8),
        "vae": dict(block_out_channels=(8, 8), norm_num_groups=4),
        "text": dict(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2),
        "run": {"model": {"dtype": "fp32"}, "sampling": {"steps": 2}, "prompts_per_step": 1},
    },
    "mid": {
        "unet": dict(block_out_channels=(80, 160, 320, 320), norm_num_groups=16, sample_size=24),
        "vae": dict(block_out_channels=(16, 32, 32, 32), norm_num_groups=16),
        "text": dict(hidden_size=192, intermediate_size=768, num_hidden_layers=4, num_attention_heads=3),
        "run": {"model": {"dtype": "bf16"}, "sampling": {"steps": 2}, "prompts_per_step": 2},
    },
    "sd15": {
        "run": {"model": {"random_init": "sd15", "dtype": "bf16"}, "sampling": {"steps": 4}, "prompts_per_step": 4},
    },
    "sdxl": {
        "run": {"model": {"random_init": "sdxl", "dtype": "bf16"}, "sampling": {"steps": 4}, "prompts_per_step": 2},
    },
}
FULL = ("sd15", "sdxl")  # by model.random_init, on a GPU


# --- what is run ------------------------------------------------------------------------------------------------------


def make_parts(size: str) -> dict:
    """The parts of a pipeline, with random weights."""
    # not above: cli quiets what these log when they are imported
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    sizes = MODELS[size]
    unet, vae, text = sizes["unet"], sizes["vae"], sizes["text"]
    levels, depth = len(unet["block_out_channels"]), len(vae["block_out_channels"])
    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(ASSETS / "shapes" / "tokenizer")
    tokenizer.model_max_length = 77
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    text = {"vocab_size": len(tokenizer), "projection_dim": text["hidden_size"], **ids, **text}
    return {
        "tokenizer": tokenizer,
        "text_encoder": CLIPTextModel(CLIPTextConfig(**text)),
        "unet": UNet2DConditionModel(
            # as in SD 1.5: no attention at the innermost level
            down_block_types=(*["CrossAttnDownBlock2D"] * (levels - 1), "DownBlock2D"),
            up_block_types=("UpBlock2D", *["CrossAttnUpBlock2D"] * (levels - 1)),
            cross_attention_dim=text["hidden_size"],
            **unet,
        ),
        "vae": AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * depth,
            up_block_types=("UpDecoderBlock2D",) * depth,
            latent_channels=4,
            sample_size=unet["sample_size"] * 2 ** (depth - 1),
            **vae,
        ),
        "scheduler": DDIMScheduler.from_pretrained(ASSETS / "shapes" / "scheduler"),
    }


def make_model(size: str, folder: Path) -> int:
    """Saves a pipeline with random weights; the number of parameters of its UNet."""
    from diffusers import StableDiffusionPipeline

    parts = make_parts(size)
    absent = dict.fromkeys(("safety_checker", "feature_extractor"))
    pipeline = StableDiffusionPipeline(**parts, **absent, requires_safety_checker=False)
    with redirect_stdout(io.StringIO()):  # saving imports DeepSpeed, which prints what it finds
        pipeline.save_pretrained(folder)
    return sum(p.numel() for p in parts["unet"].parameters())


def configs_for(size: str, folder: Path, parameters: int, more=()) -> dict[str, Config]:
    """The configuration of every row."""
    run = MODELS[size]["run"]
    made = {} if size in FULL else {"path": str(folder / "model")}
    values = {
        "model": {"adapter": "full", **made, **run["model"]},
        "prompts": {"source": "animals"},
        "rewards": [{"name": "jpeg_incompressibility"}],
        "eval": {"prompts": {"source": "animals", "limit": 1}, "images_per_prompt": 1},
        "sampling": run["sampling"],
        "prompts_per_step": run["prompts_per_step"],
        "images_per_prompt": 4,
        # the rollout and the check, without gradients, and one picture at a time in the VAE: updates set the peak
        "memory": {"rollout_batch": 4, "update_batch": 3, "vae_batch": 1},
        "optimizer": {"lr": 1e-5},
        "clip_range": 1.0,  # random weights in bfloat16: rounding must not end the run
        "safety": {"max_ratio_dev": 1.0},
        "tracking": {"tensorboard": False},
        "iterations": 1,
    }
    configs, overrides = {}, [*more]
    if parameters < FULL_SIZE:
        scaled = {key: 2 * max(1, round(value * parameters / FULL_SIZE / 2)) for key, value in DEEPSPEED.items()}
        (folder / "deepspeed.json").write_text(json.dumps({"zero_optimization": scaled}))
    for name, (_, more) in ROWS.items():
        overrides = [*overrides, *more]
        own = [f"output_dir={folder / name}"]
        if parameters < FULL_SIZE and "engine.name=deepspeed" in overrides:
            own.append(f"engine.deepspeed_config={folder / 'deepspeed.json'}")
        configs[name] = parse_config(apply_overrides(values, [*overrides, *own]), name)
    return configs


# --- one rank of a row ------------------------------------------------------------------------------------------------


def warm_up(config: Config, size: str) -> None:
    """Passes through such a model, so that the libraries' code and compiled operators do not count as its memory."""
    parts, dtype = make_parts(size), DTYPES[config.model.dtype]
    unet, text = parts["unet"].to(memory_format=torch.channels_last), parts["text_encoder"]
    side = unet.config.sample_size
    for n in {2 * config.memory.rollout_batch, 2 * config.memory.update_batch}:
        x = torch.randn(n, 4, side, side).contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            hidden = text(torch.ones(n, 77, dtype=torch.int64))[0].detach()
            unet(x, torch.arange(n), hidden, return_dict=False)[0].float().sum().backward()
    torch.optim.AdamW(unet.parameters()).step()
    with torch.no_grad():
        parts["vae"].to(dtype).decode(x[:1].to(dtype))


def load_unmapped(*args):
    """A denoiser whose weights are not mapped from their file: its pages would count as resident beside the copies."""
    denoiser = load_denoiser(*args)
    for module in denoiser.parts.values():
        for tensor in (*module.parameters(), *module.buffers()):
            tensor.data = tensor.data.clone()
    return denoiser


class HostMemory:
    """Resident size of this process: now, and at most since `restart`."""

    def __init__(self) -> None:
        self.restartable = True

    def restart(self) -> None:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:  # a container may forbid it
            self.restartable = False

    def now(self) -> int:
        return self._read("VmRSS")

    def peak(self) -> int:
        return self._read("VmHWM")

    @staticmethod
    def _read(name: str) -> int:
        return 1024 * int(re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


class GpuMemory:
    """Memory allocated by PyTorch on this rank's GPU."""

    restartable = True

    def restart(self) -> None:
        gc.collect()
        torch.cuda.reset_peak_memory_stats()

    def now(self) -> int:
        return torch.cuda.memory_allocated()

    def peak(self) -> int:
        return torch.cuda.max_memory_allocated()


class Peaks(Observer):
    """Notes the peak of each phase."""

    NOTED = {"rollout": "rollout", "replay": "check", "gradients": "gradients", "step": "step"}

    def __init__(self, memory: HostMemory | GpuMemory) -> None:
        self.memory, self.peaks = memory, {}

    def note(self, phase: str) -> None:
        self.peaks[phase] = max(self.peaks.get(phase, 0), self.memory.peak())
        self.memory.restart()

    @contextmanager
    def phase(self, name: str):
        yield
        if name in self.NOTED:
            self.note(self.NOTED[name])


def work(name: str, folder: Path, size: str) -> None:
    """Trains as one rank of a row and leaves its numbers in the folder."""
    config = load_config(folder / f"{name}.yaml")
    torch.set_num_threads(1)
    try:
        with Ranks.join() as ranks:
            if config.engine.name == "deepspeed":
                import_module("deepspeed")
            if config.optimizer.name.endswith("8bit"):
                import_module("bitsandbytes")
            if torch.cuda.is_available():
                memory = GpuMemory()
            else:
                memory, denoisers.load_denoiser = HostMemory(), load_unmapped
                warm_up(config, size)
            memory.restart()
            found = {"baseline": memory.now()}
            started = time.perf_counter()
            observer = Peaks(memory)
            left_out = ("checkpoints", "evaluation", "export", "report")  # what is no part of an iteration
            trainer = Trainer(config, ranks=ranks, observer=observer, leave_out=left_out)
            observer.note("loading")
            trainer.train()
            found |= observer.peaks | {"seconds": time.perf_counter() - started, "restartable": memory.restartable}
            (folder / f"{name}-{ranks.rank}.json").write_text(json.dumps(found))
    except Exception as error:
        (folder / f"{name}.error").write_text(f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}")
        raise


# --- all rows ---------------------------------------------------------------------------------------------------------


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
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    text = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines]
    text.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(text)


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
