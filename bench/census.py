"""What one call of the UNet launches, moves and saves on a GPU, counted without one: plain PPO beside fastloop.

    python bench/census.py [--models sd15,sdxl] [--adapters lora,full] [--by-kind | --by-operator] [--out bench/results]

Counts, not times. The call runs on fake tensors, which have shapes and dtypes but no values (bench/fake_gpu.py), with all
that CUDA's autocast, flash attention and memory layouts would do. It takes seconds for a model, needs no weights and gives the
same numbers on every machine with the same libraries.

**The call.** `plain PPO` is `BaselinePPO.predict` of bench/baseline_ppo.py; `fastloop` is a model from `ready_denoiser`
with the torch engine and the Triton kernels, and `Denoiser.predict` as updates call it. Both with guidance, so a row is half
a picture; in bf16, LoRA of rank 4 or all weights, without gradient checkpointing or compilation, with the batches of
bench/throughput.py. Conditions are there already: text encoders are not in it, even where they are trained. The backward
begins with gradients of the outputs and adds to gradients that are there, as in every micro-batch of an update but the first.
The loss, the optimizer and the VAE are not in it.

**A launch** is an operator that reaches the GPU: none for views, metadata and memory that is only allocated, one for any
other, but for these, by PyTorch's CUDA sources:

- a convolution: one, one for its bias, and one for each copy into the memory layout that it works in; its backward one for
  each gradient, and the copies likewise (cuDNN's in PyTorch 2.13);
- native group norm 3, backward 4, with gradients of weight and bias 5; layer norm 1, backward 1 and 2, and a copy of an input
  that is not contiguous;
- flash attention 1, backward 3; memory-efficient attention 1, backward 2;
- gradients of slices, and padding: 2, zeros and a copy;
- fastloop's own operators: what they launch. Their code runs, and launches of Triton kernels are counted instead of made.

What cuBLAS and cuDNN launch inside one call (split sums, transposes for NCHW weights) is one, and so is a concatenation.

**Bytes** are those of the tensors that an operator reads and writes, each once for the operator however many kernels it has.
An expanded tensor counts what is there in memory; what is changed in place is read and written. GB are 10^9 bytes.

**Saved** is what autograd keeps for the backward: the storages of the tensors it packs, each once, without those of the
model's parameters and buffers. GiB are 2^30 bytes.

Prints a Markdown table; with ``--out`` also writes census.json and census.md. tests/test_bench_census.py fails where a figure
of fastloop rises above the committed one.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

from fastloop import cli, denoisers  # isort: skip - first: it quiets what the libraries log when they are imported

import torch
from baseline_ppo import BaselinePPO, Settings, load_pipeline
from census_counter import Counted, Counter, Saved
from fake_gpu import DEVICE, fake_gpu
from markdown_tables import padded
from throughput_systems import FLOWS, LORA_RANK, case_config
from throughput_systems import MODELS as ALL
from torch.utils._python_dispatch import _disable_current_modes

from fastloop.config import Config, ModelConfig
from fastloop.engines.torch import TorchEngine
from fastloop.errors import UserError
from fastloop.machine import version_of
from fastloop.memory.traces import inputs, make_fake

OVERRIDES = ["model.dtype=bf16", "memory.gradient_checkpointing=false", "kernels=triton"]
MODELS = [name for name in ALL if name not in FLOWS]
ADAPTERS = ("lora", "full")
PACKAGES = ("torch", "diffusers", "peft", "transformers", "triton")  # whose versions the counts depend on
RECORD = "python bench/census.py --out bench/results"


# --- the calls ------------------------------------------------------------------------------------------------------------


def load_fake(config: ModelConfig, device: torch.device):
    """In place of `load_denoiser`: the model with fake weights on a device, within `fake_gpu`."""
    with _disable_current_modes():  # it is built on the meta device
        denoiser = denoisers.build_skeleton(config)
    if config.adapter == "full":
        denoiser.network.float()  # as `Denoiser.load` reads them
    with device:
        for module in denoiser.parts.values():
            make_fake(module)
    denoiser.device = device
    denoiser.tokenizers = denoiser.read_tokenizers(denoiser.path, config, denoiser.text_encoders)
    return denoiser


# The network, what calls it, what is stepped, and what is done with the gradients after each backward.
Call = tuple[torch.nn.Module, Callable[[], tuple], list[torch.nn.Parameter], Callable[[], None]]


def fastloop_call(config: Config) -> Call:
    denoiser = denoisers.ready_denoiser(config, DEVICE, trained=True)
    engine = TorchEngine(denoiser.trainable(), config, DEVICE)
    denoiser.forward = engine.forward
    given = inputs(denoiser, config.sampling, config.memory.update_batch)
    return denoiser.network, lambda: denoiser.predict(*given), list(engine.masters.values()), engine.add_up


def plain_call(config: Config) -> Call:
    batch = config.memory.update_batch
    settings = Settings(
        batch=batch,
        steps=config.sampling.steps,
        guidance_scale=config.sampling.guidance_scale,
        lora_rank=LORA_RANK if config.model.adapter == "lora" else 0,
        dtype="bfloat16",
    )
    trainer = BaselinePPO(load_pipeline(config.model, DEVICE), None, settings)
    text, side = trainer.encode(["a"] * batch), trainer.network.config.sample_size
    latents = torch.empty(batch, trainer.network.config.in_channels, side, side, device=DEVICE)
    timesteps = torch.zeros(batch, dtype=torch.int64, device=DEVICE)
    trained = [p for p in trainer.network.parameters() if p.requires_grad]
    return trainer.network, lambda: (trainer.predict(latents, timesteps, text),), trained, lambda: None


TRAINERS = {"plain PPO": plain_call, "fastloop": fastloop_call}


# --- counting -------------------------------------------------------------------------------------------------------------


def census(model: str, adapter: str, trainer: str) -> dict:
    """One row: a model of bench/throughput.py, ``lora`` or ``full``, ``plain PPO`` or ``fastloop``."""
    config = case_config(model, adapter, OVERRIDES)
    with uncollected(), fake_gpu(), patch("fastloop.denoisers.load_denoiser", load_fake):
        network, call, stepped, add_up = TRAINERS[trainer](config)
        for p in network.parameters():
            p.grad = torch.empty_like(p) if p.requires_grad else None
        add_up()
        if not set(stepped) & set(network.parameters()):  # masters, as an earlier micro-batch has left them
            network.zero_grad()
            for p in stepped:
                p.grad = torch.empty_like(p) if p.grad is None else p.grad
        model_tensors = [*network.parameters(), *network.buffers()]
        with Counter(model_tensors) as forward, Saved(model_tensors) as saved:
            outputs = [output for output in call() if output is not None]
        gradients = [torch.empty_like(output) for output in outputs]
        with Counter(model_tensors, [p.grad for p in stepped]) as backward:
            torch.autograd.backward(outputs, gradients)
            add_up()
    return {
        "model": model,
        "adapter": adapter,
        "trainer": trainer,
        "rows": (2 if config.sampling.guidance_scale != 1 else 1) * config.memory.update_batch,
        "forward": as_values(forward.counted),
        "backward": as_values(backward.counted),
        "saved_bytes": saved.bytes,
    }


@contextmanager
def uncollected() -> Iterator[None]:
    """Within it Python collects no garbage: searching the model's modules for some again and again doubles the time."""
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if before:
            gc.enable()


def as_values(counted: Counted) -> dict:
    kinds = {
        kind: {
            "launches": tally.launches,
            "bytes": tally.bytes,
            "operators": {
                name: [of.launches, of.bytes] for (its, name), of in sorted(counted.operators.items()) if its == kind
            },
        }
        for kind, tally in counted.by_kind().items()
    }
    return {"launches": counted.launches, "bytes": counted.bytes, "kinds": kinds}


def figures(row: dict) -> dict[str, int]:
    """The five figures of a row by name."""
    both = {
        f"{what} of the {way}": row[way][key]
        for what, key in (("launches", "launches"), ("bytes", "bytes"))
        for way in ("forward", "backward")
    }
    return {**both, "bytes saved": row["saved_bytes"]}


def changes(before: dict, now: dict) -> tuple[list[str], list[str]]:
    """What has risen and what has fallen from a row to another of the same case, in words."""
    found = {name: (value, figures(now)[name]) for name, value in figures(before).items()}
    words = {name: f"{name}: {old:,} -> {new:,}" for name, (old, new) in found.items()}
    return [words[name] for name, (old, new) in found.items() if new > old], [
        words[name] for name, (old, new) in found.items() if new < old
    ]


def counted_versions() -> dict[str, str | None]:
    """Of what the counts depend on, without the build (torch's +cpu)."""
    return {name: (version_of(name) or "").partition("+")[0] or None for name in PACKAGES}


# --- tables ---------------------------------------------------------------------------------------------------------------


def table(rows: list[dict]) -> str:
    head = ["model", "rows", "adapter", "trainer", "launches forward", "backward", "GB forward", "backward", "saved GiB"]
    lines = [
        [
            row["model"],
            str(row["rows"]),
            row["adapter"],
            row["trainer"],
            *(f"{row[way]['launches']:,}" for way in ("forward", "backward")),
            *(gb(row[way]["bytes"]) for way in ("forward", "backward")),
            f"{row['saved_bytes'] / 2**30:.3g}",
        ]
        for row in rows
    ]
    return padded([head, *lines])


def by_kind(rows: list[dict], operators: bool = False) -> str:
    """A table for each row: launches and GB of each kind of operator, and of each operator."""
    parts = []
    for row in rows:
        lines = [["kind of operator", "launches forward", "backward", "GB forward", "backward"]]
        ways = [row[way]["kinds"] for way in ("forward", "backward")]
        for kind in dict.fromkeys(name for kinds in ways for name in kinds):
            of_kind = [kinds.get(kind, {"launches": 0, "bytes": 0, "operators": {}}) for kinds in ways]
            lines.append([kind, *(f"{k['launches']:,}" for k in of_kind), *(gb(k["bytes"]) for k in of_kind)])
            for name in dict.fromkeys(name for k in of_kind for name in k["operators"]) if operators else ():
                both = [k["operators"].get(name, (0, 0)) for k in of_kind]
                lines.append([f"- {name}", *(f"{launches:,}" for launches, _ in both), *(gb(size) for _, size in both)])
        parts.append(f"### {row['model']}, {row['adapter']}, {row['trainer']}\n\n{padded(lines)}")
    return "\n\n".join(parts)


def gb(size: int) -> str:
    return f"{size / 1e9:.3g}" if size >= 1e6 or not size else "< 0.001"


def written(summary: dict) -> str:
    """JSON with an operator a line."""
    return re.sub(r"\[\s+(\d+),\s+(\d+)\s+\]", r"[\1, \2]", json.dumps(summary, indent=1)) + "\n"


def main(argv: list[str] | None = None) -> int:
    parser = cli.Parser(prog="bench/census.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS), help="default: all")
    parser.add_argument("--adapters", default=",".join(ADAPTERS))
    parser.add_argument("--trainers", default=",".join(TRAINERS))
    parser.add_argument("--by-kind", action="store_true", help="also print launches and bytes by kind of operator")
    parser.add_argument("--by-operator", action="store_true", help="also by operator")
    parser.add_argument("--out", type=Path, help="folder for census.json and census.md")
    try:
        args = parser.parse_args(argv)
        chosen = {key: getattr(args, key).split(",") for key in ("models", "adapters", "trainers")}
        for key, known in (("models", MODELS), ("adapters", ADAPTERS), ("trainers", TRAINERS)):
            if unknown := [name for name in chosen[key] if name not in known]:
                raise UserError(f"--{key}: unknown {unknown[0]!r}: any of {', '.join(known)}")
        if importlib.util.find_spec("triton") is None:
            raise UserError("triton is not installed, and fastloop's kernels are part of the census: pip install triton")
    except UserError as error:
        return cli.fail(str(error), 2)
    rows = []
    for model in chosen["models"]:
        for adapter in chosen["adapters"]:
            for trainer in chosen["trainers"]:
                rows.append(census(model, adapter, trainer))
                print(f"  {model}, {adapter}: {trainer} counted", file=sys.stderr, flush=True)
    text = table(rows)
    print(text)
    if args.by_kind or args.by_operator:
        print("\n" + by_kind(rows, args.by_operator))
    if args.out:
        summary = {
            "what": "counts on fake tensors, no measurement of a GPU",
            "command": shlex.join(["python", "bench/census.py", *(sys.argv[1:] if argv is None else argv)]),
            "versions": counted_versions(),
            "rows": rows,
        }
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "census.json").write_text(written(summary))
        versions = ", ".join(f"{name} {version}" for name, version in summary["versions"].items())
        note = (
            "One call of the UNet, counted on fake tensors: no GPU was measured. What is counted is said in "
            f"[bench/census.py](../census.py).\n`{summary['command']}`, {versions}."
        )
        (args.out / "census.md").write_text("\n\n".join([note, text, by_kind(rows)]) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
