"""Pre-trains the bundled model: VAE, then text encoder and UNet together, on captions that are often wrong.

    python -m fastloop.shapes.pretrain --out fastloop/assets/shapes

Captions of pictures on the web do not always fit, so base models bind attributes badly. Here each attribute, relation and
count of the scene that is drawn differs from its caption with probability ``--caption-noise``: the model learns to draw every
scene, and to miss its prompt often. The result is an ordinary diffusers ``StableDiffusionPipeline`` folder.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from fastloop.shapes.grammar import CATEGORIES, COLORS, NUMBERS, RELATIONS, SHAPES, TEXTURES, Request, all_requests
from fastloop.shapes.renderer import SIZE, place, render

TOKENS = 16  # the longest prompt of the grammar has 8 words


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


def build_tokenizer() -> CLIPTokenizer:
    """Build a CLIP tokenizer in which every word of the grammar is one token; other text falls back to pieces.

    The library breaks ties between merges at random, so the ids of two calls differ: a model needs its own tokenizer's files.
    """
    words = {word for category in CATEGORIES for request in all_requests(category) for word in request.prompt.split()}
    pieces = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token="<|endoftext|>"))
    pieces.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(
        vocab_size=4096,
        special_tokens=["<|startoftext|>", "<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    letters = [chr(c) for c in range(ord("!"), ord("~") + 1)]
    pieces.train_from_iterator([" ".join(sorted(words))] * 10 + [" ".join(letters)] * 2, trainer)
    with tempfile.TemporaryDirectory() as folder:
        vocab, merges = pieces.model.save(folder)
        return CLIPTokenizer.from_pretrained(folder, vocab_file=vocab, merges_file=merges, model_max_length=TOKENS)


def build_pipeline() -> StableDiffusionPipeline:
    """Build the untrained pipeline: 64 px pictures, 8 x 8 x 8 latents, 2.8 million parameters."""
    tokenizer = build_tokenizer()
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=96,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=TOKENS,
            projection_dim=96,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=8,
        out_channels=8,
        block_out_channels=(64, 88),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4,
        cross_attention_dim=96,
        norm_num_groups=8,
    )
    vae = AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=8,
        block_out_channels=(16, 24, 32, 48),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        norm_num_groups=8,
        sample_size=SIZE,
        mid_block_add_attention=False,
    )
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def train_vae(vae: AutoencoderKL, steps: int, batch: int, log: list[dict]) -> None:
    """Train with L1 + squared error + a light KL on fresh pictures; then scale the latents to unit variance."""
    rng = np.random.default_rng(1)
    pool, _ = draw(20_000, rng, noise=1.0)
    vae.to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.05)
    for step in (bar := tqdm(range(steps), desc="vae")):
        x = pool[torch.randint(len(pool), (batch,))].float() / 127.5 - 1
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(x.contiguous(memory_format=torch.channels_last)).latent_dist
            y = vae.decode(posterior.sample()).sample.float()
        kl = posterior.kl().float().mean() / (8 * 8 * 8)
        loss = F.l1_loss(y, x) + F.mse_loss(y, x) + 1e-4 * kl
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 49:
            log.append({"stage": "vae", "step": step + 1, "loss": round(loss.item(), 5)})
            bar.set_postfix(log[-1])
    vae.eval()
    with torch.no_grad():
        z = torch.cat([vae.encode(p.float() / 127.5 - 1).latent_dist.mean for p in pool[:1024].split(128)])
    vae.register_to_config(scaling_factor=round(1 / z.std().item(), 5))


def train_denoiser(pipeline: StableDiffusionPipeline, args: argparse.Namespace, log: list[dict]) -> None:
    """Train noise prediction and the text encoder along, one prompt in ten left empty; the averaged weights are kept."""
    unet, text_encoder, vae = pipeline.unet, pipeline.text_encoder, pipeline.vae
    pictures, captions = draw(args.pictures, np.random.default_rng(2), args.caption_noise)
    with torch.no_grad():
        moments = [vae.encode(p.float() / 127.5 - 1).latent_dist.parameters for p in tqdm(pictures.split(256), desc="latents")]
    mean, logvar = torch.cat(moments).chunk(2, 1)
    std = (0.5 * logvar.clamp(-30, 20)).exp()
    ids = pipeline.tokenizer(captions, padding="max_length", max_length=TOKENS, return_tensors="pt").input_ids
    empty = pipeline.tokenizer("", padding="max_length", max_length=TOKENS, return_tensors="pt").input_ids
    unet.to(memory_format=torch.channels_last).train()
    text_encoder.train()
    pair = torch.nn.ModuleList([unet, text_encoder])
    averaged = torch.optim.swa_utils.AveragedModel(pair, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.999))
    optimizer = torch.optim.AdamW(pair.parameters(), lr=1.5e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1.5e-3, total_steps=args.steps, pct_start=0.05)
    smooth = None
    for step in (bar := tqdm(range(args.steps), desc="unet")):
        pick = torch.randint(len(mean), (args.batch,))
        z = (mean[pick] + std[pick] * torch.randn_like(std[pick])) * vae.config.scaling_factor
        t = torch.randint(1000, (args.batch,))
        noise = torch.randn_like(z)
        noisy = pipeline.scheduler.add_noise(z, noise, t).contiguous(memory_format=torch.channels_last)
        tokens = torch.where(torch.rand(args.batch, 1) < 0.1, empty, ids[pick])
        loss = F.mse_loss(unet(noisy, t, text_encoder(tokens)[0]).sample, noise)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(pair.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        averaged.update_parameters(pair)
        smooth = loss.item() if smooth is None else 0.99 * smooth + 0.01 * loss.item()
        if step % 100 == 99:
            log.append({"stage": "unet", "step": step + 1, "loss": round(smooth, 5)})
            bar.set_postfix(log[-1])
        if args.evaluate_every and step % args.evaluate_every == args.evaluate_every - 1:
            pair_now = [{k: v.clone() for k, v in m.state_dict().items()} for m in pair]
            for module, source in zip(pair, averaged.module, strict=True):
                module.load_state_dict(source.state_dict())
            log.append({"stage": "score", "step": step + 1, **score(pipeline)})
            tqdm.write(json.dumps(log[-1]))
            save(pipeline, args.out, log, args)
            for module, state in zip(pair, pair_now, strict=True):
                module.load_state_dict(state)
    for module, source in zip(pair, averaged.module, strict=True):
        module.load_state_dict(source.state_dict())


@torch.no_grad()
def score(pipeline: StableDiffusionPipeline, per_category: int = 40) -> dict[str, float]:
    """Return the held-out score per category with stock diffusers sampling: 10 DDIM steps, eta 1, guidance 3."""
    from fastloop.shapes.checker import assess
    from fastloop.shapes.grammar import split

    modules = (pipeline.unet, pipeline.text_encoder, pipeline.vae)
    for module in modules:
        module.eval()
    pipeline.set_progress_bar_config(disable=True)
    rng, scores = np.random.default_rng(3), {}
    for category in CATEGORIES:
        pool = split(category, held_out=True)
        prompts = [pool[i].prompt for i in rng.integers(len(pool), size=per_category)]
        images = pipeline(
            prompts,
            num_inference_steps=10,
            eta=1.0,
            guidance_scale=3.0,
            output_type="np",
            generator=torch.Generator().manual_seed(4),
        ).images
        images = np.round(images * 255).astype(np.uint8)
        scores[category] = round(float(np.mean([assess(p, im).score for p, im in zip(prompts, images, strict=True)])), 4)
    scores["mean"] = round(float(np.mean(list(scores.values()))), 4)
    for module in modules[:2]:
        module.train()
    return scores


def save(pipeline: StableDiffusionPipeline, folder: Path, log: list[dict], args: argparse.Namespace) -> None:
    """Save the pipeline in half precision (safetensors) and its training log."""
    dtypes = {name: module.dtype for name, module in pipeline.components.items() if isinstance(module, torch.nn.Module)}
    weights = {name: {k: v.clone() for k, v in getattr(pipeline, name).state_dict().items()} for name in dtypes}
    for name in dtypes:
        getattr(pipeline, name).half()
    pipeline.save_pretrained(folder, safe_serialization=True)
    # transformers would take half precision for this part from its config, diffusers loads the others in float32
    text_config = folder / "text_encoder" / "config.json"
    text_config.write_text(json.dumps(json.loads(text_config.read_text()) | {"dtype": "float32"}, indent=2) + "\n")
    for name, dtype in dtypes.items():
        getattr(pipeline, name).to(dtype).load_state_dict(weights[name])
    settings = {k: v for k, v in vars(args).items() if k != "out"}
    header = {"settings": settings, "torch": torch.__version__, "machine": platform.machine(), "cpus": os.cpu_count()}
    lines = [json.dumps(header), *(json.dumps(row) for row in log)]
    (folder / "training_log.jsonl").write_text("\n".join(lines) + "\n")


def main() -> None:
    """Train the bundled model from the command line's settings and save it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the pipeline")
    parser.add_argument("--vae-steps", type=int, default=1800)
    parser.add_argument("--steps", type=int, default=6000, help="steps of UNet and text encoder")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--pictures", type=int, default=60_000)
    parser.add_argument("--caption-noise", type=float, default=0.25)
    parser.add_argument("--evaluate-every", type=int, default=1000, help="steps; 0: only at the end")
    args = parser.parse_args()
    torch.manual_seed(0)
    started, log = time.time(), []
    pipeline = build_pipeline()
    for name in ("text_encoder", "unet", "vae"):
        print(f"{name}: {sum(p.numel() for p in getattr(pipeline, name).parameters()):,} parameters")
    train_vae(pipeline.vae, args.vae_steps, 32, log)
    train_denoiser(pipeline, args, log)
    log.append({"stage": "final", "minutes": round((time.time() - started) / 60, 1), **score(pipeline, 200)})
    save(pipeline, args.out, log, args)
    print(json.dumps(log[-1]))


if __name__ == "__main__":
    main()
