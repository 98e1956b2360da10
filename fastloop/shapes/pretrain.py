"""Pre-trains the bundled model: VAE, then text encoder and UNet together, on captions that are often wrong.

    python -m fastloop.shapes.pretrain --out fastloop/assets/shapes

The result is an ordinary diffusers ``StableDiffusionPipeline`` folder. Data, loop, score and files: `pretraining`.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import CLIPTextModel, CLIPTokenizer

from fastloop.shapes.grammar import CATEGORIES, all_requests
from fastloop.shapes.pretraining import add_settings, draw, draw_examples, save, score, text_config, train
from fastloop.shapes.renderer import SIZE

TOKENS = 16  # the longest prompt of the grammar has 9 words
SAMPLING = {"num_inference_steps": 10, "eta": 1.0, "guidance_scale": 3.0}  # of the score


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
    text_encoder = CLIPTextModel(text_config(tokenizer, width=96, layers=2, inner=256))
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
    examples = draw_examples(args, vae, pipeline.tokenizer)
    unet.to(memory_format=torch.channels_last)

    def loss_of_batch() -> torch.Tensor:
        z, ids = examples.batch(args.batch)
        z = z * vae.config.scaling_factor
        t = torch.randint(1000, (args.batch,))
        noise = torch.randn_like(z)
        noisy = pipeline.scheduler.add_noise(z, noise, t).contiguous(memory_format=torch.channels_last)
        return F.mse_loss(unet(noisy, t, text_encoder(ids)[0]).sample, noise)

    def evaluate(step: int) -> None:
        log.append({"stage": "score", "step": step, **score(pipeline, **SAMPLING)})
        tqdm.write(json.dumps(log[-1]))
        save(pipeline, args.out, log, args)

    train("unet", torch.nn.ModuleList([unet, text_encoder]), loss_of_batch, args, log, lr=1.5e-3, evaluate=evaluate)


def main() -> None:
    """Train the bundled model from the command line's settings and save it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_settings(parser)
    parser.add_argument("--vae-steps", type=int, default=1800)
    parser.add_argument("--steps", type=int, default=6000, help="steps of UNet and text encoder")
    parser.add_argument("--batch", type=int, default=128)
    args = parser.parse_args()
    torch.manual_seed(0)
    started, log = time.time(), []
    pipeline = build_pipeline()
    for name in ("text_encoder", "unet", "vae"):
        print(f"{name}: {sum(p.numel() for p in getattr(pipeline, name).parameters()):,} parameters")
    train_vae(pipeline.vae, args.vae_steps, 32, log)
    train_denoiser(pipeline, args, log)
    log.append({"stage": "final", "minutes": round((time.time() - started) / 60, 1), **score(pipeline, 200, **SAMPLING)})
    save(pipeline, args.out, log, args)
    print(json.dumps(log[-1]))


if __name__ == "__main__":
    main()
