"""TRL's DDPOTrainer as a system of bench/throughput.py, in an environment of its own without fastloop's dependencies:

    python -m venv peer
    peer/bin/pip install trl==0.23.1 'transformers<5' 'diffusers<0.37' torch==2.13.0 peft scipy
    python bench/throughput.py --peer-python peer/bin/python

bench/time_to_score.py trains with it too, and evaluates the adapter that it leaves after each iteration.

TRL had this trainer from 0.6.0 to 0.23.1. It trains the same pipeline folder on the same prompts, with the settings of the
case; what it does itself (its LoRA has rank 4, so all systems of throughput.py have) is left as it is.
"""

# ruff: noqa: E402

from __future__ import annotations

import io
import itertools
import json
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]

import numpy as np
import torch
from accelerate import PartialState
from PIL import Image
from safetensors.torch import save_file
from trl import DDPOConfig, DDPOTrainer, DefaultDDPOStableDiffusionPipeline
from worker import Server

from fastloop.shapes.checker import assess  # needs no more than numpy and scipy


def score(reward: str, images: np.ndarray, prompts: list[str]) -> list[float]:
    """The rewards `shapes` and `jpeg_incompressibility` of fastloop."""
    if reward == "shapes":
        return [assess(prompt, image).score for prompt, image in zip(prompts, images, strict=True)]
    sizes = []
    for image in images:
        file = io.BytesIO()
        Image.fromarray(image).save(file, "JPEG", quality=95)
        sizes.append(file.tell() / 1000)
    return sizes


def complete(encoder, folder: str) -> None:
    """Exit where transformers made up weights that it has not found, which it does with a warning that nobody reads."""
    _, found = type(encoder).from_pretrained(folder, subfolder="text_encoder", output_loading_info=True)
    if found["missing_keys"]:
        sys.exit(f"{folder}: its text encoder lacks {sorted(found['missing_keys'])[0]} and others as transformers names them")


def main() -> int:
    server = Server()
    PartialState()  # TRL's pipeline logs through it
    given = sys.argv[1]
    case = json.loads(given if given.startswith("{") else Path(given).read_text())  # long lists of prompts come in a file
    torch.set_num_threads(case["threads"])
    prompts = itertools.cycle(case["prompts"])

    def reward(images, texts, metadata):
        pictures = (images.float().clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
        return torch.tensor(score(case["reward"], pictures, texts)), {}

    config = DDPOConfig(
        num_epochs=1,
        seed=case.get("seed", 0),
        log_with=None,
        mixed_precision={"fp32": "no", "bf16": "bf16", "fp16": "fp16"}[case["dtype"]],
        sample_num_steps=case["steps"],
        sample_guidance_scale=case["guidance_scale"],
        sample_batch_size=case["batch"],
        sample_num_batches_per_epoch=case["images"] // case["batch"],
        train_batch_size=case["batch"],
        train_gradient_accumulation_steps=case["images"] // case["updates"] // case["batch"],
        train_learning_rate=case["lr"],
        train_cfg=case["guidance_scale"] != 1,
        train_clip_range=case["clip_range"],
        per_prompt_stat_tracking=True,
        per_prompt_stat_tracking_buffer_size=32,
        per_prompt_stat_tracking_min_count=16,
        save_freq=10**9,
        tracker_project_name="throughput",
        project_kwargs={"project_dir": case["folder"], "logging_dir": case["folder"]},
    )
    pipeline = DefaultDDPOStableDiffusionPipeline(case["folder"], use_lora=case["adapter"] == "lora")
    complete(pipeline.text_encoder, case["folder"])
    if case["guidance_scale"] == 1:  # TRL hands over both conditions all the same, and diffusers would concatenate them
        pipeline.sd_pipeline._encode_prompt = lambda *_, prompt_embeds, **__: prompt_embeds
    if case["gradient_checkpointing"]:
        pipeline.unet.enable_gradient_checkpointing()
    trainer = DDPOTrainer(config, reward, lambda: (next(prompts), {}), pipeline)
    phases = server.phases
    phases.watch(trainer, "_generate_samples", "rollout")
    phases.watch(pipeline.text_encoder, "forward", "encode")
    phases.watch(pipeline.vae, "decode", "decode")
    phases.watch(trainer, "compute_rewards", "reward")
    phases.watch(trainer, "calculate_loss", "loss")
    phases.watch(trainer.accelerator, "backward", "backward")
    phases.watch(trainer.accelerator, "clip_grad_norm_", "optimizer")
    phases.watch(trainer.optimizer, "step", "optimizer")
    phases.watch(trainer.optimizer, "zero_grad", "optimizer")
    epoch = 0
    while server.wait():
        trainer.step(epoch, epoch * case["updates"])
        if "weights" in case:
            save_file({name: p.detach() for name, p in pipeline.unet.named_parameters() if p.requires_grad}, case["weights"])
        server.answer()
        epoch += 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
