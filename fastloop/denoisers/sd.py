"""Stable Diffusion 1.x and 2.x: any diffusers-format folder or hub id, epsilon or v-prediction."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from transformers import CLIPTextModel

from fastloop.config import SamplingConfig
from fastloop.denoisers.parts import DTYPES, refuse_misfits
from fastloop.denoisers.unet import UNetDenoiser


class StableDiffusion(UNetDenoiser):
    """One text encoder, whose last hidden states are the whole conditioning: (n, L, C)."""

    pipeline_class = StableDiffusionPipeline
    text_classes = {"text_encoder": CLIPTextModel}
    absent = {**dict.fromkeys(("safety_checker", "feature_extractor", "image_encoder")), "requires_safety_checker": False}

    @classmethod
    def check_fit(cls, path, text_configs, vae, network) -> None:
        """Raise ``UserError`` where text encoder, VAE and UNet differ in their channels."""
        refuse_misfits(
            path,
            "UNet",
            ("text encoder", text_configs["text_encoder"].hidden_size, network.cross_attention_dim, "cross_attention_dim"),
            ("VAE", vae.latent_channels, network.in_channels, "in_channels"),
        )

    def embed(self, ids: list[torch.Tensor]) -> tuple[torch.Tensor]:
        """Return the last hidden states of one text, in a tuple of one: (L, C)."""
        return (self.text_encoders["text_encoder"](ids[0])[0][0],)

    def blank_embedding(self) -> tuple[torch.Tensor]:
        """Return an empty embedding, in a tuple of one: (L, C) in ``model.dtype``."""
        config = self.text_encoders["text_encoder"].config
        size = config.max_position_embeddings, config.hidden_size
        return (torch.empty(size, dtype=DTYPES[self.config.dtype], device=self.device),)

    def condition(self, embeddings: list[tuple[torch.Tensor]], sampling: SamplingConfig) -> torch.Tensor:
        """Stack the embeddings of n texts: (n, L, C)."""
        return torch.stack([hidden for (hidden,) in embeddings])

    def network_arguments(self, cond: torch.Tensor, uncond: torch.Tensor | None) -> dict[str, Any]:
        """Return ``encoder_hidden_states`` in ``model.dtype``, the unconditional rows first."""
        text = cond if uncond is None else torch.cat([uncond, cond])
        return {"encoder_hidden_states": text.to(DTYPES[self.config.dtype])}
