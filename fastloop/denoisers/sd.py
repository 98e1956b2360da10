"""Stable Diffusion 1.x and 2.x: any diffusers-format folder or hub id, epsilon or v-prediction."""

from __future__ import annotations

import json
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from packaging.version import Version
from transformers import CLIPTextModel

from fastloop.config import SamplingConfig
from fastloop.denoisers.files import read_scheduler
from fastloop.denoisers.parts import DTYPES, refuse_misfits
from fastloop.denoisers.unet import UNetDenoiser
from fastloop.transitions.ddim import with_defaults


class StableDiffusion(UNetDenoiser):
    """One text encoder, whose last hidden states are the whole conditioning: (n, L, C)."""

    pipeline_class = StableDiffusionPipeline
    text_classes = {"text_encoder": CLIPTextModel}
    kohya_names = {"unet": "lora_unet", "text_encoder": "lora_te"}
    absent = {**dict.fromkeys(("safety_checker", "feature_extractor", "image_encoder")), "requires_safety_checker": False}

    @classmethod
    def check_fit(cls, path, text_configs, network) -> None:
        """Raise ``UserError`` where text encoder and UNet do not fit, or the UNet takes more than a text."""
        cls.refuse_other_unets(path, network)
        refuse_misfits(
            path,
            "UNet",
            ("text encoder", text_configs["text_encoder"].hidden_size, network.cross_attention_dim, "cross_attention_dim"),
        )

    @classmethod
    def as_in_stock(cls, scheduler: dict[str, Any]) -> dict[str, Any]:
        """Return the config of a scheduler with the two corrections that stock's pipeline makes to early ones."""
        return scheduler | {"steps_offset": 1, "clip_sample": False}

    @property
    def own_latent_size(self) -> int | tuple[int, int] | None:
        """The latents' size that the UNet was trained at; from 64 in files before diffusers 0.9, as in stock."""
        size = super().own_latent_size
        return 64 if self._of_early_files and isinstance(size, int) and size < 64 else size

    @property
    def _of_early_files(self) -> bool:
        written = getattr(self.network.config, "_diffusers_version", None)
        return written is not None and Version(Version(written).base_version) < Version("0.9.0.dev0")

    @property
    def notes(self) -> tuple[str, ...]:
        """What stock's pipeline corrects in early files, and this one with it."""
        scheduler = with_defaults(read_scheduler(self.path, self.config))
        sizes = [("sample_size", super().own_latent_size, self.own_latent_size)]
        found = sizes + [(key, scheduler[key], now) for key, now in self.as_in_stock({}).items()]
        changed = [f"{key} {json.dumps(now)} for {json.dumps(before)}" for key, before, now in found if before != now]
        early = (f"early files: {', '.join(changed)}, as stock's pipeline takes them",) if changed else ()
        return super().notes + early

    def embed(self, ids: list[torch.Tensor], skip: int = 0) -> tuple[torch.Tensor]:
        """Return the last hidden states of one text, in a tuple of one: (L, C), of its chunks one after the other."""
        encoder = self.text_encoders["text_encoder"]
        if not skip:
            return (encoder(ids[0])[0].flatten(0, 1),)
        hidden = encoder(ids[0], output_hidden_states=True).hidden_states[-1 - skip]
        norm = getattr(encoder, "text_model", encoder).final_layer_norm  # as in stock
        return (norm(hidden).flatten(0, 1),)

    def blank_embedding(self) -> tuple[torch.Tensor]:
        """Return an empty embedding, in a tuple of one: (L, C) in ``model.dtype``."""
        config = self.text_encoders["text_encoder"].config
        size = self.config.prompt_chunks * config.max_position_embeddings, config.hidden_size
        return (torch.empty(size, dtype=DTYPES[self.config.dtype], device=self.device),)

    def condition(self, embeddings: list[tuple[torch.Tensor]], sampling: SamplingConfig) -> torch.Tensor:
        """Stack the embeddings of n texts: (n, L, C)."""
        return torch.stack([hidden for (hidden,) in embeddings])

    def network_arguments(self, cond: torch.Tensor, uncond: torch.Tensor | None) -> dict[str, Any]:
        """Return ``encoder_hidden_states`` in ``model.dtype``, the unconditional rows first."""
        text = cond if uncond is None else torch.cat([uncond, cond])
        return {"encoder_hidden_states": text.to(DTYPES[self.config.dtype])}
