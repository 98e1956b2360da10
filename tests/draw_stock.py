"""Draw with stock diffusers, whatever version this Python has: used by test_old_stacks.py, in an environment of its own.

    python draw_stock.py CASES.json PICTURES.npz

A case has a pipeline's class and folder, and may have a file of adapters. Each is drawn from the same noise, without a VAE.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import diffusers
import numpy as np
import torch
import transformers


def draw(case: dict) -> np.ndarray:
    """Return the latents of one picture, float32 (1, 4, H, W), and of its decoded picture the mean, as another channel."""
    pipeline = getattr(diffusers, case["class"]).from_pretrained(case["folder"])
    pipeline.scheduler = diffusers.DDIMScheduler(beta_schedule="scaled_linear", steps_offset=1, clip_sample=False)
    pipeline.set_progress_bar_config(disable=True)
    if file := case.get("lora"):
        pipeline.load_lora_weights(str(Path(file).parent), weight_name=Path(file).name)
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    told = {"num_inference_steps": 3, "guidance_scale": 2.0, "latents": latents, "height": 16, "width": 16}
    found = pipeline("a photo of a cat", output_type="latent", **told).images.detach()
    with torch.no_grad():
        picture = pipeline.vae.decode(found, return_dict=False)[0]
    return np.concatenate([found.numpy().ravel(), picture.numpy().ravel()])


if __name__ == "__main__":
    cases = json.loads(Path(sys.argv[1]).read_text())
    np.savez(sys.argv[2], **{name: draw(case) for name, case in cases.items()})
    print(diffusers.__version__, transformers.__version__)
