"""What the families with a UNet share: its sizes, memory layout, attention backends and compiled blocks."""

from __future__ import annotations

import json
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor2_0
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastloop.config import ModelConfig, SamplingConfig
from fastloop.denoisers.base import Denoiser
from fastloop.denoisers.files import read_part_config
from fastloop.errors import UserError


class FlashAttention(AttnProcessor2_0):
    """Attention by the flash backend alone; also where a backward with checkpointing computes it again."""

    def __call__(self, *args, **kwargs) -> torch.Tensor:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return super().__call__(*args, **kwargs)


class UNetDenoiser(Denoiser):
    """A denoiser whose network is diffusers' UNet2DConditionModel, in the folder ``unet``."""

    network_class = UNet2DConditionModel
    network_name = "unet"
    rescales_guidance = True
    chunks_texts = True
    known_embeddings: dict[str, Any] = {"addition_embed_type": None}  # what the UNet is told beside timestep and text

    @classmethod
    def check_settings(cls, path: str, config: ModelConfig, sampling: SamplingConfig) -> None:
        """Raise ``UserError`` as `Denoiser` does, and for more layers to skip than text encoders have."""
        super().check_settings(path, config, sampling)
        if config.clip_skip is not None:
            layers = min(read_part_config(name, path, config)["num_hidden_layers"] for name in cls.text_classes)
            if config.clip_skip > layers - 2:
                raise UserError(f"model.clip_skip: {config.clip_skip} of {layers} layers: at most {layers - 2} can be skipped")

    @classmethod
    def refuse_other_unets(cls, path: str, network) -> None:
        """Raise ``UserError`` where a UNet, by its config, is told more than its family says, or predicts another thing."""
        absent = {"time_cond_proj_dim": None, "class_embed_type": None, "num_class_embeds": None, "encoder_hid_dim": None}
        for key, known in (absent | cls.known_embeddings).items():
            if (found := getattr(network, key, known)) != known:
                raise UserError(
                    f"model.path: the UNet of {path} has {key}={found}, which this trainer knows nothing to give to: "
                    f"choose a model with {key}={json.dumps(known)}"
                )
        if network.out_channels != network.in_channels:
            raise UserError(
                f"model.path: the UNet of {path} takes {network.in_channels} channels and gives {network.out_channels}: it "
                "is made for inpainting or predicts a variance, and is no text-to-image model"
            )

    def prepare_network(self) -> None:
        """Lay out the UNet's weights in channels_last."""
        self.network.to(memory_format=torch.channels_last)

    def set_attention(self, backend: str) -> None:
        """Set the attention backend of the UNet: sdpa, flash or xformers."""
        if backend == "xformers":
            self.network.enable_xformers_memory_efficient_attention()
        if backend == "flash":
            self.network.set_attn_processor(FlashAttention())

    def network_arguments(self, cond, uncond) -> dict[str, Any]:
        """Return the UNet's keyword arguments beside latents and timesteps; unconditional rows, where there are any, first."""
        raise NotImplementedError

    def call(self, forward, latents, timesteps, cond, uncond) -> torch.Tensor:
        """Call the UNet with latents in channels_last, (m, C, H, W), and return its output, of the same shape."""
        latents = latents.contiguous(memory_format=torch.channels_last)
        return forward(latents, timesteps, **self.network_arguments(cond, uncond), return_dict=False)[0]

    @property
    def latent_channels(self) -> int:
        """Channels of the latents."""
        return self.network.config.in_channels

    @property
    def own_latent_size(self) -> int | tuple[int, int] | None:
        """The latents' size that the UNet was trained at, or height and width; ``None`` where its config has none."""
        return self.network.config.sample_size

    @property
    def size_unit(self) -> int:
        """Height and width of latents must be multiples of this: each block but the last halves them."""
        return 2 ** (len(self.network.config.block_out_channels) - 1)
