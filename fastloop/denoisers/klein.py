"""FLUX.2 klein: latents that are 2 x 2 patches of the VAE's already, a language model as text encoder, true guidance."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKLFlux2, Flux2KleinPipeline, Flux2Transformer2DModel
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu
from transformers import Qwen3ForCausalLM

from fastloop.config import ModelConfig, SamplingConfig
from fastloop.denoisers.files import read_json
from fastloop.denoisers.parts import DTYPES, refuse_misfits
from fastloop.denoisers.transformer import TransformerDenoiser
from fastloop.errors import UserError

OWN_SIZE, PATCH = 128, 2  # the pipeline's own, in the VAE's latents: the side of a picture and of a patch
LAYERS = 27, 3  # of the text encoder: the last one that is taken, and how many


class Klein(TransformerDenoiser):
    """A condition is a tensor, the tokens (n, L, C); latents are (128, H, W), whose every pixel is a token."""

    network_class = Flux2Transformer2DModel
    pipeline_class = Flux2KleinPipeline
    vae_class = AutoencoderKLFlux2
    text_classes = {"text_encoder": Qwen3ForCausalLM}
    absent: dict[str, Any] = {}
    long_encoder = "text_encoder"
    sequence_length = 512  # as the pipeline's own default
    lora_targets = [*TransformerDenoiser.lora_targets, "to_qkv_mlp_proj", "to_out"]
    own_latent_size, packing = OWN_SIZE // PATCH, PATCH**2
    size_unit = 1
    encodes_pictures = False

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.scale_factor *= PATCH  # pixels of a latent's side

    @classmethod
    def check_fit(cls, path, text_configs, network) -> None:
        """Raise ``UserError`` where text encoder and transformer differ in their channels, or layers are missing."""
        (encoder,) = text_configs.values()
        last, taken = LAYERS
        if encoder.num_hidden_layers < last:
            raise UserError(
                f"model.path: the text encoder of {path} has {encoder.num_hidden_layers} layers: it must have {last}"
            )
        refuse_misfits(
            path,
            "transformer",
            (
                "text encoder, three layers of it,",
                taken * encoder.hidden_size,
                network.joint_attention_dim,
                "joint_attention_dim",
            ),
        )

    @classmethod
    def check_settings(cls, path: str, config: ModelConfig, sampling: SamplingConfig) -> None:
        """Raise ``UserError`` for a guidance of a distilled model, which stock draws without, and for an embedded one."""
        super().check_settings(path, config, sampling)
        if sampling.guidance_scale != 1 and cls.is_distilled(path, config):
            raise UserError(
                "sampling.guidance_scale: this klein is distilled, and stock draws it without guidance: set it to 1"
            )

    @classmethod
    def is_distilled(cls, path: str, config: ModelConfig) -> bool:
        """Say whether a model is distilled to a few steps, as its model_index.json says."""
        return read_json(path, config, "model_index.json").get("is_distilled", False)

    @property
    def caution(self) -> str | None:
        """Say so of a model that is distilled to a few steps."""
        if not self.is_distilled(self.path, self.config):
            return None
        return (
            "this klein is distilled to 4 steps without noise: training adds noise, which it was not made for, and may undo "
            "the distillation; klein-base is the better start"
        )

    @classmethod
    def flow_times(cls, path, config, scheduler, sampling) -> dict[str, Any]:
        """Return equal steps, which the scheduler shifts, and ``mu``, which follows from picture size and number of steps."""
        tokens = cls.patches(path, config, sampling, OWN_SIZE, PATCH)
        return {
            "sigmas": np.linspace(1.0, 1 / sampling.steps, sampling.steps),
            "mu": compute_empirical_mu(tokens, sampling.steps),
        }

    @property
    def latent_channels(self) -> int:
        """Channels of the latents."""
        return self.network.config.in_channels

    def _embedding(self, text: str | None, skip: int) -> tuple[torch.Tensor]:
        """By the pipeline's own code, which writes the text into the language model's dialogue and masks the padding."""
        (encoder,), (tokenizer,) = self.text_encoders.values(), self.tokenizers.values()
        length = self.max_sequence_length
        tokens = Flux2KleinPipeline._get_qwen3_prompt_embeds(encoder, tokenizer, text or "", max_sequence_length=length)
        return (tokens[0],)

    def blank_embedding(self) -> tuple[torch.Tensor]:
        """Return an empty embedding, (L, C), in ``model.dtype``."""
        width, like = self.network.config.joint_attention_dim, {"dtype": DTYPES[self.config.dtype], "device": self.device}
        return (torch.empty(self.max_sequence_length, width, **like),)

    def condition(self, embeddings: list[tuple[torch.Tensor]], sampling: SamplingConfig) -> torch.Tensor:
        """Stack the embeddings of n texts, (n, L, C)."""
        return torch.stack([tokens for (tokens,) in embeddings])

    def idle_modules(self, part: str) -> str:
        """Name the lists of modules in double blocks that are called as a module of the single ones is."""
        return r"transformer_blocks\.\d+\.attn\.to_out"

    def call(
        self, forward: Callable[..., Any], latents, timesteps, cond: torch.Tensor, uncond: torch.Tensor | None
    ) -> torch.Tensor:
        """Call the transformer with latents (m, 128, H, W) and float32 timesteps (m,), as stock does; returns the velocity.

        As in stock, times are rounded to ``model.dtype`` before they are divided.
        """
        text = (cond if uncond is None else torch.cat([uncond, cond])).to(latents.dtype)
        axes = ((1, *latents.shape[2:], 1), (1, 1, 1, text.shape[1]))
        img_ids, txt_ids = (torch.cartesian_prod(*(torch.arange(n, device=latents.device) for n in axis)) for axis in axes)
        velocity = forward(
            hidden_states=latents.flatten(2).transpose(1, 2),
            timestep=timesteps.to(latents.dtype) / 1000,
            guidance=None,
            encoder_hidden_states=text,
            txt_ids=txt_ids,
            img_ids=img_ids,
            return_dict=False,
        )[0]
        return velocity.transpose(1, 2).reshape(latents.shape)

    def _unscaled(self, latents: torch.Tensor) -> torch.Tensor:
        """The VAE's own latents: with the statistics of its batch norm, and patches apart."""
        mean, variance = (x.float().view(1, -1, 1, 1) for x in (self.vae.bn.running_mean, self.vae.bn.running_var))
        latents = latents * (variance + self.vae.config.batch_norm_eps).sqrt() + mean
        n, channels, height, width = latents.shape
        apart = latents.reshape(n, channels // PATCH**2, PATCH, PATCH, height, width).permute(0, 1, 4, 2, 5, 3)
        return apart.reshape(n, -1, PATCH * height, PATCH * width)
