"""FLUX.1 dev, with the guidance that it was distilled from as an input, and schnell, distilled to a few steps.

Everywhere else latents are (C, H, W); the transformer alone sees them packed, 2 x 2 of them as one token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from transformers import CLIPTextModel, T5EncoderModel

from fastloop.config import ModelConfig, SamplingConfig
from fastloop.denoisers.files import read_json, read_scheduler
from fastloop.denoisers.parts import DTYPES, refuse_misfits
from fastloop.denoisers.transformer import Conditioning, TransformerDenoiser
from fastloop.errors import UserError

OWN_SIZE, PATCH = 128, 2  # the pipeline's own, in latents: the side of a picture and of a token
GUIDANCE = 3.5  # the pipeline's default
SCHNELL_TOKENS = 256  # that schnell was trained with, and its card allows


@dataclass(frozen=True)
class GuidedConditioning(Conditioning):
    """With the guidance that the transformer is told, float32 (n,); ``None`` where it takes none."""

    guidance: torch.Tensor | None

    def __getitem__(self, rows: torch.Tensor) -> GuidedConditioning:
        guidance = None if self.guidance is None else self.guidance[rows]
        return GuidedConditioning(self.text[rows], self.pooled[rows], guidance)


class Flux(TransformerDenoiser):
    """T5's tokens, and CLIP's whole of the text."""

    network_class = FluxTransformer2DModel
    pipeline_class = FluxPipeline
    text_classes = {"text_encoder": CLIPTextModel, "text_encoder_2": T5EncoderModel}
    absent = dict.fromkeys(("image_encoder", "feature_extractor"))
    long_encoder = "text_encoder_2"
    sequence_length = 512  # as the pipeline's own default
    own_latent_size = OWN_SIZE
    size_unit, packing = PATCH, PATCH**2

    @classmethod
    def check_fit(cls, path, text_configs, network) -> None:
        """Raise ``UserError`` where text encoders and transformer differ in their channels."""
        clip, t5 = text_configs.values()
        refuse_misfits(
            path,
            "transformer",
            ("text encoder", clip.hidden_size, network.pooled_projection_dim, "pooled_projection_dim"),
            ("second text encoder", t5.d_model, network.joint_attention_dim, "joint_attention_dim"),
        )

    @classmethod
    def check_settings(cls, path: str, config: ModelConfig, sampling: SamplingConfig) -> None:
        """Raise ``UserError`` for guidances that are not this model's, or not chosen, and for a text too long for schnell."""
        own = {"embedded_guidance": None} if cls.takes_guidance(path, config) else {}
        super().check_settings(path, config, sampling.model_copy(update=own))
        if "guidance_scale" not in sampling.model_fields_set:
            raise UserError(
                "sampling.guidance_scale: FLUX has no default: set it to 1, stock's and none, or to its true_cfg_scale"
            )
        if (config.max_sequence_length or 0) > SCHNELL_TOKENS and cls.is_schnell(path, config):
            raise UserError(
                f"model.max_sequence_length: {config.max_sequence_length}, but FLUX.1 schnell takes {SCHNELL_TOKENS} tokens "
                "at most: leave it out"
            )

    @classmethod
    def takes_guidance(cls, path: str, config: ModelConfig) -> bool:
        """Say whether the transformer is told of a guidance, as dev's is."""
        return read_json(path, config, "config.json", "transformer").get("guidance_embeds", False)

    @classmethod
    def is_schnell(cls, path: str, config: ModelConfig) -> bool:
        """Say whether a model is distilled to a few steps: it takes no guidance, and its times are not shifted by the size."""
        shifts = read_scheduler(path, config).get("use_dynamic_shifting", False)
        return not shifts and not cls.takes_guidance(path, config)

    @classmethod
    def flow_times(cls, path, config, scheduler, sampling) -> dict[str, Any]:
        """Return equal steps, which the scheduler shifts, and ``mu``, which follows from the size of the picture."""
        return {
            "sigmas": np.linspace(1.0, 1 / sampling.steps, sampling.steps),
            "mu": cls.shift(scheduler, cls.patches(path, config, sampling, OWN_SIZE, PATCH)),
        }

    @cached_property
    def caution(self) -> str | None:
        """Say so of a model that is distilled to a few steps."""
        if not self.is_schnell(self.path, self.config):
            return None
        return (
            "this is FLUX.1 schnell, distilled to 1 to 4 steps without noise: training adds noise, which it was not made for, "
            "and may undo the distillation; dev is the better start"
        )

    @cached_property
    def max_sequence_length(self) -> int:
        """Tokens of T5."""
        own = SCHNELL_TOKENS if self.is_schnell(self.path, self.config) else self.sequence_length
        return self.config.max_sequence_length or own

    @property
    def latent_channels(self) -> int:
        """Channels of the latents, before they are packed."""
        return self.network.config.in_channels // PATCH**2

    def embed(self, ids: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return T5's tokens of one text, (L, C), and CLIP's whole of it, (P,)."""
        clip, t5 = self.text_encoders.values()
        return t5(ids[1])[0][0], clip(ids[0]).pooler_output[0]

    def blank_embedding(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return an empty embedding, (L, C) and (P,), in ``model.dtype``."""
        config, like = self.network.config, {"dtype": DTYPES[self.config.dtype], "device": self.device}
        tokens = torch.empty(self.max_sequence_length, config.joint_attention_dim, **like)
        return tokens, torch.empty(config.pooled_projection_dim, **like)

    def condition(self, embeddings: list[tuple[torch.Tensor, torch.Tensor]], sampling: SamplingConfig) -> GuidedConditioning:
        """Stack the embeddings of n texts, with the guidance that the transformer is told."""
        texts, guidance = super().condition(embeddings, sampling), None
        if self.network.config.guidance_embeds:
            told = GUIDANCE if sampling.embedded_guidance is None else sampling.embedded_guidance
            guidance = torch.full((len(embeddings),), told, dtype=torch.float32, device=self.device)
        return GuidedConditioning(texts.text, texts.pooled, guidance)

    def call(
        self, forward: Callable[..., Any], latents, timesteps, cond: GuidedConditioning, uncond: GuidedConditioning | None
    ) -> torch.Tensor:
        """Call the transformer with latents (m, C, H, W) and float32 timesteps (m,), as stock does; returns the velocity.

        As in stock, times are rounded to ``model.dtype`` before they are divided, and so are the positions of tokens.
        """
        m, channels, height, width = latents.shape
        rows, columns, like = height // PATCH, width // PATCH, {"dtype": latents.dtype, "device": latents.device}
        packed = latents.reshape(m, channels, rows, PATCH, columns, PATCH).permute(0, 2, 4, 1, 3, 5)
        guidance = cond.guidance if uncond is None or cond.guidance is None else torch.cat([uncond.guidance, cond.guidance])
        velocity = forward(
            hidden_states=packed.reshape(m, rows * columns, -1),
            timestep=timesteps.to(latents.dtype) / 1000,
            guidance=guidance,
            **self.texts(cond, uncond),
            txt_ids=torch.zeros(cond.text.shape[1], 3, **like),
            img_ids=torch.cartesian_prod(*(torch.arange(n, device=latents.device) for n in (1, rows, columns))).to(**like),
            return_dict=False,
        )[0]
        velocity = velocity.reshape(m, rows, columns, channels, PATCH, PATCH).permute(0, 3, 1, 4, 2, 5)
        return velocity.reshape(m, channels, height, width)
