"""Stable Diffusion XL: any diffusers-format folder or hub id, epsilon or v-prediction, any size the UNet can halve."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from diffusers import StableDiffusionXLPipeline
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from fastloop.config import SamplingConfig
from fastloop.denoisers.files import read_json
from fastloop.denoisers.parts import DTYPES, refuse_misfits
from fastloop.denoisers.residence import upload
from fastloop.denoisers.unet import UNetDenoiser

TIME_IDS = 6  # original height and width, crop from the top and the left, target height and width


@dataclass(frozen=True)
class Conditioning:
    """What the UNet is told of n pictures.

    Attributes:
        text: (n, L, C), the last but one hidden states of both text encoders side by side.
        pooled: (n, P), the second encoder's projection of the whole text.
        time_ids: float32 (n, 6), pixels: original size, crop and target size, vertical before horizontal.
    """

    text: torch.Tensor
    pooled: torch.Tensor
    time_ids: torch.Tensor

    def __getitem__(self, rows: torch.Tensor) -> Conditioning:
        return Conditioning(self.text[rows], self.pooled[rows], self.time_ids[rows])


class StableDiffusionXL(UNetDenoiser):
    """Two text encoders, and sizes as a condition (arXiv 2307.01952, section 2.2)."""

    pipeline_class = StableDiffusionXLPipeline
    text_classes = {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}
    absent = dict.fromkeys(("image_encoder", "feature_extractor"))
    kohya_names = {"unet": "lora_unet", "text_encoder": "lora_te1", "text_encoder_2": "lora_te2"}
    upcasts_vae = True
    sizes_condition = True
    known_embeddings = {"addition_embed_type": "text_time"}

    @classmethod
    def check_fit(cls, path, text_configs, network) -> None:
        """Raise ``UserError`` where text encoders, sizes and UNet do not fit, or the UNet takes no sizes."""
        cls.refuse_other_unets(path, network)
        first, second = text_configs.values()
        pooled = TIME_IDS * network.addition_time_embed_dim + second.projection_dim
        refuse_misfits(
            path,
            "UNet",
            (
                "pair of text encoders",
                first.hidden_size + second.hidden_size,
                network.cross_attention_dim,
                "cross_attention_dim",
            ),
            (
                "second text encoder, with six sizes,",
                pooled,
                network.projection_class_embeddings_input_dim,
                "projection_class_embeddings_input_dim",
            ),
        )

    @cached_property
    def absent_is_zero(self) -> bool:
        """As the pipeline's ``force_zeros_for_empty_prompt``."""
        return read_json(self.path, self.config, "model_index.json").get("force_zeros_for_empty_prompt", True)

    def embed(self, ids: list[torch.Tensor], skip: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the last but one hidden states of both encoders, (L, C), and the second's projection of the text, (P,).

        The hidden states are of a text's chunks one after the other, the projection is of its first one.
        """
        outputs = [
            encoder(of_encoder, output_hidden_states=True)
            for of_encoder, encoder in zip(ids, self.text_encoders.values(), strict=True)
        ]
        hidden = [output.hidden_states[-2 - skip].flatten(0, 1) for output in outputs]
        return torch.cat(hidden, -1), outputs[1].text_embeds[0]

    def blank_embedding(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return an empty embedding, (L, C) and (P,), in ``model.dtype``."""
        first, second = (encoder.config for encoder in self.text_encoders.values())
        like = {"dtype": DTYPES[self.config.dtype], "device": self.device}
        length, width = self.config.prompt_chunks * first.max_position_embeddings, first.hidden_size + second.hidden_size
        return torch.empty(length, width, **like), torch.empty(second.projection_dim, **like)

    def idle_modules(self, part: str) -> str | None:
        """Name the last layer of the first text encoder: the one before is taken, and no projection of the whole text."""
        if part != "text_encoder":
            return None
        return rf".*\.layers\.{self.text_encoders[part].config.num_hidden_layers - 1}\..*"

    def condition(self, embeddings: list[tuple[torch.Tensor, torch.Tensor]], sampling: SamplingConfig) -> Conditioning:
        """Stack the embeddings of n texts, with the sizes that the UNet is told of."""
        size = self.image_size(sampling)
        sizes = (*(sampling.original_size or size), *sampling.crop_top_left, *(sampling.target_size or size))
        texts, pooled = zip(*embeddings, strict=True)
        ids = upload(torch.tensor(sizes, dtype=torch.float32), self.device)
        return Conditioning(torch.stack(texts), torch.stack(pooled), ids.repeat(len(texts), 1))

    def network_arguments(self, cond: Conditioning, uncond: Conditioning | None) -> dict[str, Any]:
        """Return ``encoder_hidden_states`` and ``added_cond_kwargs``, the unconditional rows first."""
        both = [cond] if uncond is None else [uncond, cond]
        dtype = DTYPES[self.config.dtype]
        return {
            "encoder_hidden_states": torch.cat([c.text for c in both]).to(dtype),
            "added_cond_kwargs": {
                "text_embeds": torch.cat([c.pooled for c in both]).to(dtype),
                "time_ids": torch.cat([c.time_ids for c in both]),
            },
        }
