"""What the tests of flow-matching families share: prompts, fastloop's own run, what tells families apart."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from fastloop.config import SamplingConfig
from fastloop.rollout import rollout, sampler_table

SEED, PROMPTS = 5, ["a red circle", "two dogs left of a circle " * 4, ""]
SIZE = {"height": 16, "width": 16}
FULL = {"adapter": "full"}


@dataclass(frozen=True)
class Family:
    """A tiny model: its fixture, and what is particular to it.

    Attributes:
        length: ``model.max_sequence_length``. latents: (C, H, W) of 16 px. layers: how many get an adapter. parts: that the
            plan has a line for. sampling: keys of its own.
    """

    fixture: str
    length: int
    latents: tuple[int, int, int]
    layers: int
    parts: tuple[str, ...]
    sampling: dict[str, Any] = field(default_factory=dict)


CLIPS_AND_T5 = ("transformer", "text_encoder", "text_encoder_2", "text_encoder_3")
JOINT = 3 * 4 - 2  # four more in each of SD3's joint attentions, less the last block's idle queries and missing output
FAMILIES = [
    Family("tiny_sd3", 12, (16, 8, 8), 4 * 5 + JOINT, CLIPS_AND_T5),
    # single blocks have queries, keys and values of all tokens together
    Family("tiny_flux", 12, (16, 8, 8), 2 * 8 + 2 * 3, CLIPS_AND_T5[:3], {"embedded_guidance": 2.0}),
    # single blocks have one projection in and one out
    Family("tiny_klein", 40, (32, 4, 4), 2 * 8 + 2 * 2, ("transformer", "text_encoder", "vae")),
]
WITHOUT_T5 = Family("tiny_sd3_plain", 12, (16, 8, 8), 4 * 3 + JOINT, ())


def our_run(denoiser, sampling: SamplingConfig, prompts=PROMPTS):
    """Sample as fastloop does."""
    table, ids = sampler_table(denoiser.config, sampling), torch.arange(len(prompts))
    settings = {"sampling": sampling, "seed": SEED, "batch": 2, "vae_batch": 2, "backend": "reference"}
    return rollout(denoiser, table, prompts, ids, **settings)
