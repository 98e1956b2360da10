"""What the families with a joint transformer share, and how flows are told of a text by its tokens and the whole of it.

What is written for UNets does not apply to them: of the modules that launch less only LoRA's layers and the frozen convolution
are in them, fused kernels find nothing, and their attention is PyTorch's own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift

from fastloop.config import ModelConfig, SamplingConfig
from fastloop.denoisers.base import Denoiser
from fastloop.denoisers.files import read_json
from fastloop.denoisers.parts import DTYPES


@dataclass(frozen=True)
class Conditioning:
    """What a transformer is told of n pictures.

    Attributes:
        text: (n, L, C), tokens. pooled: (n, P), of the whole text.
    """

    text: torch.Tensor
    pooled: torch.Tensor

    def __getitem__(self, rows: torch.Tensor) -> Conditioning:
        return Conditioning(self.text[rows], self.pooled[rows])


class TransformerDenoiser(Denoiser):
    """A flow whose network is a joint transformer, in the folder ``transformer``."""

    network_name = "transformer"
    timestep_dtype = torch.float32
    lora_targets = [*Denoiser.lora_targets, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]
    text_targets = None
    long_encoder: str  # the text encoder that gets `model.max_sequence_length` tokens

    @classmethod
    def patches(cls, path: str, config: ModelConfig, sampling: SamplingConfig, own: int, patch: int) -> int:
        """Count the patches of a picture.

        Args:
            own, patch: sides in the VAE's latents, of a picture of the model's own size and of a patch.
        """
        scale = 2 ** (len(read_json(path, config, "config.json", "vae")["block_out_channels"]) - 1)
        height, width = (own if size is None else size // scale for size in (sampling.height, sampling.width))
        return (height // patch) * (width // patch)

    @staticmethod
    def shift(scheduler: Mapping[str, Any], tokens: int) -> float:
        """Return ``mu`` of dynamic shifting, as SD3's and FLUX.1's pipelines do."""
        of = FlowMatchEulerDiscreteScheduler.from_config(scheduler).config
        return calculate_shift(tokens, of.base_image_seq_len, of.max_image_seq_len, of.base_shift, of.max_shift)

    def text_length(self, encoder: str) -> int:
        """Return the tokens that a text encoder gets: one of them ``model.max_sequence_length``."""
        return self.max_sequence_length if encoder == self.long_encoder else super().text_length(encoder)

    def condition(self, embeddings: list[tuple[torch.Tensor, torch.Tensor]], sampling: SamplingConfig) -> Conditioning:
        """Stack the embeddings of n texts."""
        texts, pooled = zip(*embeddings, strict=True)
        return Conditioning(torch.stack(texts), torch.stack(pooled))

    def texts(self, cond: Conditioning, uncond: Conditioning | None) -> dict[str, torch.Tensor]:
        """Return the texts as the transformer takes them, in ``model.dtype``; unconditional rows, if there are any, first."""
        both, dtype = [cond] if uncond is None else [uncond, cond], DTYPES[self.config.dtype]
        return {
            "encoder_hidden_states": torch.cat([c.text for c in both]).to(dtype),
            "pooled_projections": torch.cat([c.pooled for c in both]).to(dtype),
        }
