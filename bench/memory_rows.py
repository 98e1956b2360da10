"""The rows of bench/memory.py: its models, their configurations, and what the processes of a row run and note."""

from __future__ import annotations

import ctypes
import gc
import io
import json
import re
import time
from contextlib import contextmanager, redirect_stdout
from importlib import import_module
from pathlib import Path

import torch

from fastloop import cli, denoisers  # noqa: F401 - cli first: it quiets what the libraries log when they are imported
from fastloop.config import Config
from fastloop.denoisers import load_denoiser
from fastloop.denoisers.files import ASSETS
from fastloop.denoisers.parts import DTYPES
from fastloop.observer import Observer
from fastloop.ranks import Ranks
from fastloop.recipes import apply_overrides, load_config, parse_config
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
