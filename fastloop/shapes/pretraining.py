"""What the pre-training of the bundled models shares: pictures with captions that are often wrong, the loop, score and files.

Captions of pictures on the web do not always fit, so base models bind attributes badly. Here each attribute, relation and
count of the scene that is drawn differs from its caption with a probability: the model learns to draw every scene, and to
miss its prompt often.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTokenizer

from fastloop.shapes.checker import assess
from fastloop.shapes.grammar import CATEGORIES, COLORS, NUMBERS, RELATIONS, SHAPES, TEXTURES, Request, all_requests, split
from fastloop.shapes.renderer import SIZE, place, render

EMPTY_SHARE = 0.1  # of the prompts that are left empty, for guidance
SAVE_SECONDS = 180  # between checkpoints


def misdraw(request: Request, rng: np.random.Generator, rate: float) -> Request:
    """Return the scene drawn for a request: each attribute, the relation and the count change with probability ``rate``."""

    def maybe(value, choices):
        return str(rng.choice(choices)) if value is not None and rng.random() < rate else value

    things = request.things
    if request.category == "numeracy" and rng.random() < rate:
        things = (things[0],) * int(rng.choice([1, *NUMBERS.values()]))
    things = tuple(
        replace(
            thing,
            shape=maybe(thing.shape, SHAPES),
            color=maybe(thing.color, list(COLORS)),
            texture=maybe(thing.texture, TEXTURES),
        )
        for thing in things
    )
    return replace(request, things=things, relation=maybe(request.relation, RELATIONS))


def draw(count: int, rng: np.random.Generator, noise: float) -> tuple[torch.Tensor, list[str]]:
    """Draw pictures (uint8, (count, 3, 64, 64)) and their captions, categories in equal shares."""
    pools = [all_requests(category) for category in CATEGORIES]
    pictures, captions = np.empty((count, SIZE, SIZE, 3), np.uint8), []
    for i in range(count):
        pool = pools[rng.integers(len(pools))]
        request = pool[rng.integers(len(pool))]
        pictures[i] = render(place(misdraw(request, rng, noise), rng))
        captions.append(request.prompt)
    return torch.from_numpy(pictures).permute(0, 3, 1, 2), captions


def text_config(tokenizer: CLIPTokenizer, width: int, layers: int, inner: int) -> CLIPTextConfig:
    """Return the config of a small CLIP text encoder for a tokenizer's words, as long as its texts."""
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=tokenizer.model_max_length,
        projection_dim=width,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


@dataclass(frozen=True)
class Examples:
    """Pictures as latents, unscaled, and captions as ids.

    Attributes:
        mean, std: float32 (n, C, H, W), of the VAE's posterior. ids: int64 (n, L). empty: int64 (1, L), of no text.
    """

    mean: torch.Tensor
    std: torch.Tensor
    ids: torch.Tensor
    empty: torch.Tensor

    def batch(self, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Draw latents, float32 (rows, C, H, W), and ids, int64 (rows, L), some of them empty."""
        pick = torch.randint(len(self.mean), (rows,))
        z = self.mean[pick] + self.std[pick] * torch.randn_like(self.std[pick])
        return z, torch.where(torch.rand(rows, 1) < EMPTY_SHARE, self.empty, self.ids[pick])


def draw_examples(args: argparse.Namespace, vae: AutoencoderKL, tokenizer: CLIPTokenizer) -> Examples:
    """Draw ``args.pictures`` pictures, always the same ones, and encode them and their captions."""
    pictures, captions = draw(args.pictures, np.random.default_rng(2), args.caption_noise)
    with torch.no_grad():
        moments = [vae.encode(p.float() / 127.5 - 1).latent_dist.parameters for p in tqdm(pictures.split(256), desc="latents")]
    mean, logvar = torch.cat(moments).chunk(2, 1)
    ids, empty = (tokenizer(t, padding="max_length", return_tensors="pt").input_ids for t in (captions, [""]))
    return Examples(mean, (0.5 * logvar.clamp(-30, 20)).exp(), ids, empty)


def train(
    name: str,
    modules: torch.nn.ModuleList,
    loss_of_batch: Callable[[], torch.Tensor],
    args: argparse.Namespace,
    log: list[dict],
    *,
    lr: float,
    evaluate: Callable[[int], None],
    checkpoint: Path | None = None,
) -> None:
    """Train modules for ``args.steps`` steps of AdamW with a one-cycle learning rate; averaged weights are left in them.

    Args:
        evaluate: is called with the number of steps, every ``args.evaluate_every`` of them, the averaged weights in the
            modules. checkpoint: where the state is kept every few minutes, with the log; training goes on from it where the
            file is there.

    Raises:
        SystemExit: the checkpoint is of a training with other settings.
    """
    modules.train()
    averaged = torch.optim.swa_utils.AveragedModel(modules, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.999))
    optimizer = torch.optim.AdamW(modules.parameters(), lr=lr, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=args.steps, pct_start=0.05)
    parts = {"modules": modules, "averaged": averaged, "optimizer": optimizer, "schedule": schedule}
    first, smooth, earlier = 0, None, 0.0
    if checkpoint and checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        if state["settings"] != settings_of(args):
            raise SystemExit(f"--resume: {checkpoint} is of {state['settings']}: give these settings, or delete it")
        for key, part in parts.items():
            part.load_state_dict(state[key])
        torch.set_rng_state(state["rng"])
        first, smooth, earlier, log[:] = state["step"], state["smooth"], state["seconds"], state["log"]
    started = saved = time.monotonic()
    for step in (bar := tqdm(range(first, args.steps), desc=name, initial=first, total=args.steps)):
        loss = loss_of_batch()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(modules.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        averaged.update_parameters(modules)
        smooth = loss.item() if smooth is None else 0.99 * smooth + 0.01 * loss.item()
        seconds = earlier + time.monotonic() - started
        if step % 100 == 99:
            log.append({"stage": name, "step": step + 1, "loss": round(smooth, 5), "minutes": round(seconds / 60, 1)})
            bar.set_postfix(loss=log[-1]["loss"])
            tqdm.write(json.dumps(log[-1]))
        if args.evaluate_every and step % args.evaluate_every == args.evaluate_every - 1:
            with _weights_of(averaged.module, modules):
                evaluate(step + 1)
        if checkpoint and time.monotonic() - saved > SAVE_SECONDS:
            state = {key: part.state_dict() for key, part in parts.items()}
            state |= {"settings": settings_of(args), "rng": torch.get_rng_state(), "log": log}
            state |= {"step": step + 1, "smooth": smooth, "seconds": seconds}
            torch.save(state, checkpoint.with_suffix(".new"))
            os.replace(checkpoint.with_suffix(".new"), checkpoint)  # so that there is always a whole one
            saved = time.monotonic()
    modules.load_state_dict(averaged.module.state_dict())


@contextmanager
def _weights_of(source: torch.nn.Module, module: torch.nn.Module) -> Iterator[None]:
    """Puts the weights of another module of the same structure in for a while."""
    own = {key: value.clone() for key, value in module.state_dict().items()}
    module.load_state_dict(source.state_dict())
    yield
    module.load_state_dict(own)


@torch.no_grad()
def score(pipeline: DiffusionPipeline, per_category: int = 40, **call) -> dict[str, float]:
    """Return the held-out score per category with stock diffusers sampling; ``call`` goes to the pipeline."""
    modules = [module for module in pipeline.components.values() if isinstance(module, torch.nn.Module)]
    trained = [module for module in modules if module.training]
    for module in modules:
        module.eval()
    pipeline.set_progress_bar_config(disable=True)
    rng, scores = np.random.default_rng(3), {}
    for category in CATEGORIES:
        pool = split(category, held_out=True)
        prompts = [pool[i].prompt for i in rng.integers(len(pool), size=per_category)]
        images = pipeline(prompts, output_type="np", generator=torch.Generator().manual_seed(4), **call).images
        images = np.round(images * 255).astype(np.uint8)
        scores[category] = round(float(np.mean([assess(p, im).score for p, im in zip(prompts, images, strict=True)])), 4)
    scores["mean"] = round(float(np.mean(list(scores.values()))), 4)
    for module in trained:
        module.train()
    return scores


def save(pipeline: DiffusionPipeline, folder: Path, log: list[dict], args: argparse.Namespace) -> None:
    """Save the pipeline in half precision (safetensors) and its training log."""
    dtypes = {name: module.dtype for name, module in pipeline.components.items() if isinstance(module, torch.nn.Module)}
    weights = {name: {k: v.clone() for k, v in getattr(pipeline, name).state_dict().items()} for name in dtypes}
    for name in dtypes:
        getattr(pipeline, name).half()
    pipeline.save_pretrained(folder, safe_serialization=True)
    # transformers would take half precision for these parts from their configs, diffusers loads the others in float32
    for file in folder.glob("text_encoder*/config.json"):
        file.write_text(json.dumps(json.loads(file.read_text()) | {"dtype": "float32"}, indent=2) + "\n")
    for file in folder.glob("*/config.json"):  # where a part was loaded from is a path of this machine
        values = json.loads(file.read_text())
        if values.pop("_name_or_path", None) is not None:
            file.write_text(json.dumps(values, indent=2) + "\n")
    for name, dtype in dtypes.items():
        getattr(pipeline, name).to(dtype).load_state_dict(weights[name])
    header = {"settings": settings_of(args), "torch": torch.__version__, "machine": platform.machine(), "cpus": os.cpu_count()}
    lines = [json.dumps(header), *(json.dumps(row) for row in log)]
    (folder / "training_log.jsonl").write_text("\n".join(lines) + "\n")


def settings_of(args: argparse.Namespace) -> dict[str, int | float]:
    """Return what of the command line makes the weights what they are."""
    return {key: value for key, value in vars(args).items() if key not in ("out", "resume")}


def add_settings(parser: argparse.ArgumentParser) -> None:
    """Add the command line's settings that have the same default for both models."""
    parser.add_argument("--out", type=Path, required=True, help="folder of the pipeline")
    parser.add_argument("--pictures", type=int, default=60_000)
    parser.add_argument("--caption-noise", type=float, default=0.25)
    parser.add_argument("--evaluate-every", type=int, default=1000, help="steps; 0: only at the end")
