"""Pre-trains the bundled flow model: a small Stable Diffusion 3 on the same pictures and captions, in the same latents.

    python -m fastloop.shapes.pretrain_flow --out fastloop/assets/shapes_flow

VAE and words are those of the bundled model of Stable Diffusion's layout (`pretrain`). The result is an ordinary diffusers
``StableDiffusion3Pipeline`` folder without T5. Until it is whole a checkpoint lies beside it, from which ``--resume`` goes on.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from tqdm import tqdm
from transformers import CLIPTextModelWithProjection, CLIPTokenizer

from fastloop.shapes.pretraining import add_settings, draw_examples, save, score, text_config, train

SHAPES = Path(__file__).resolve().parent.parent / "assets" / "shapes"
PATCHES = 16  # 4 x 4 of the latents
TOKENS = 12  # the longest prompt of the grammar has 9 words, and two tokens stand around it
T5_TOKENS = 1  # zeros, which stand for the T5 that is not there and are attended to
OTHER_LENGTHS = 1 / 8  # share of the batches with more of them, up to the 256 of the pipeline's default
SAMPLING = {"num_inference_steps": 10, "max_sequence_length": T5_TOKENS}  # of the score
GUIDANCE = (1.0, 3.0)  # without, and with


def build_pipeline() -> StableDiffusion3Pipeline:
    """Build the untrained pipeline with the bundled VAE: 64 px pictures, 8 x 8 x 8 latents, 2.9 million parameters."""
    tokenizer = CLIPTokenizer.from_pretrained(SHAPES / "tokenizer", model_max_length=TOKENS)
    first, second = text_config(tokenizer, width=64, layers=2, inner=128), text_config(tokenizer, width=32, layers=1, inner=64)
    vae = AutoencoderKL.from_pretrained(SHAPES / "vae")
    vae.register_to_config(shift_factor=0.3)  # the mean of its latents
    width = first.hidden_size + second.hidden_size
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=8,
        out_channels=8,
        num_layers=4,
        attention_head_dim=32,
        num_attention_heads=4,
        caption_projection_dim=128,
        joint_attention_dim=width,
        pooled_projection_dim=width,
        pos_embed_max_size=4,
        qk_norm="rms_norm",
    )
    for name, module in transformer.named_modules():  # at first each block changes nothing, and the velocity is 0, as in DiT
        if name.endswith(("norm1.linear", "norm1_context.linear", "norm_out.linear", "proj_out")):
            torch.nn.init.zeros_(module.weight)
            torch.nn.init.zeros_(module.bias)
    return StableDiffusion3Pipeline(
        vae=vae,
        text_encoder=CLIPTextModelWithProjection(first),
        text_encoder_2=CLIPTextModelWithProjection(second),
        text_encoder_3=None,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        tokenizer_3=None,
        transformer=transformer,
        # Real models shift times towards noise, the more the larger the picture, since neighbouring pixels tell of each other:
        # in 8 x 8 latents they hardly do. The last step, which fastloop's samplers take without noise, starts at s = 0.1 and
        # cleans what earlier noise left; without a terminal it would start at 0.001.
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0, shift_terminal=0.1),
    )


def encode(pipeline: StableDiffusion3Pipeline, ids: torch.Tensor, zeros: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what the pipeline's own ``encode_prompt`` does: tokens (n, L + zeros, C), projections of the texts (n, P).

    Args:
        ids: int64 (n, L). zeros: tokens of T5.
    """
    outputs = [clip(ids, output_hidden_states=True) for clip in (pipeline.text_encoder, pipeline.text_encoder_2)]
    tokens = torch.cat([output.hidden_states[-2] for output in outputs], -1)
    return F.pad(tokens, (0, 0, 0, zeros)), torch.cat([output.text_embeds for output in outputs], -1)


def train_transformer(pipeline: StableDiffusion3Pipeline, args: argparse.Namespace, log: list[dict], checkpoint: Path) -> None:
    """Train the velocity v = eps - x_0 at logit-normal times s, and the text encoders along; keep averaged weights."""
    transformer, vae = pipeline.transformer, pipeline.vae
    examples = draw_examples(args, vae, pipeline.tokenizer)

    def loss_of_batch() -> torch.Tensor:
        zeros = int(256 ** torch.rand(())) if torch.rand(()) < OTHER_LENGTHS else T5_TOKENS
        rows = max(1, args.batch * (PATCHES + TOKENS + T5_TOKENS) // (PATCHES + TOKENS + zeros))  # of about the same cost
        z, ids = examples.batch(rows)
        z = (z - vae.config.shift_factor) * vae.config.scaling_factor
        s = torch.randn(rows).sigmoid()
        noise = torch.randn_like(z)
        noisy = torch.lerp(z, noise, s.view(-1, 1, 1, 1))
        text, pooled = encode(pipeline, ids, zeros)
        velocity = transformer(noisy, encoder_hidden_states=text, pooled_projections=pooled, timestep=1000 * s).sample
        return F.mse_loss(velocity, noise - z)

    def evaluate(step: int) -> None:
        log_scores(pipeline, log, {"stage": "score", "step": step}, per_category=40)

    modules = torch.nn.ModuleList([transformer, pipeline.text_encoder, pipeline.text_encoder_2])
    train("transformer", modules, loss_of_batch, args, log, lr=2e-3, evaluate=evaluate, checkpoint=checkpoint)


def log_scores(pipeline: StableDiffusion3Pipeline, log: list[dict], row: dict, per_category: int) -> None:
    """Log held-out scores of stock's 10 steps, without and with guidance, a row for each, and print them."""
    for scale in GUIDANCE:
        scores = score(pipeline, per_category, guidance_scale=scale, **SAMPLING)
        log.append({**row, "guidance": scale, **scores})
        tqdm.write(json.dumps(log[-1]))


def main() -> None:
    """Train the bundled flow model from the command line's settings and save it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_settings(parser)
    parser.set_defaults(evaluate_every=2000)
    parser.add_argument("--steps", type=int, default=26_000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint, where there is one")
    args = parser.parse_args()
    checkpoint = args.out.with_name(f"{args.out.name}.checkpoint")
    if checkpoint.exists() and not args.resume:
        parser.error(f"--out: {checkpoint} is of a training that is not done: give --resume, or delete it")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    log: list[dict] = []
    pipeline = build_pipeline()
    for name in ("text_encoder", "text_encoder_2", "transformer", "vae"):
        print(f"{name}: {sum(p.numel() for p in getattr(pipeline, name).parameters()):,} parameters")
    train_transformer(pipeline, args, log, checkpoint)
    log_scores(pipeline, log, {"stage": "final"}, per_category=200)
    save(pipeline, args.out, log, args)
    checkpoint.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
