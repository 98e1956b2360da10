"""What the families with a UNet share: its sizes, memory layout, attention backends and compiled blocks."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor2_0
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastloop.denoisers.base import Denoiser
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

    def prepare_network(self) -> None:
        self.network.to(memory_format=torch.channels_last)

    def set_attention(self, backend: str) -> None:
        if backend == "xformers":
            self.network.enable_xformers_memory_efficient_attention()
        if backend == "flash":
            self.network.set_attn_processor(FlashAttention())

    def network_arguments(self, cond, uncond) -> dict[str, Any]:
        """Keyword arguments of the UNet beside latents and timesteps; unconditional rows, where there are any, first."""
        raise NotImplementedError

    def call(self, forward, latents, timesteps, cond, uncond) -> torch.Tensor:
        latents = latents.contiguous(memory_format=torch.channels_last)
        return forward(latents, timesteps, **self.network_arguments(cond, uncond), return_dict=False)[0]

    @property
    def latent_channels(self) -> int:
        return self.network.config.in_channels

    @property
    def own_latent_size(self) -> int | tuple[int, int] | None:
        return self.network.config.sample_size

    @property
    def size_unit(self) -> int:
        return 2 ** (len(self.network.config.block_out_channels) - 1)


def refuse_misfits(path: str, *rows: tuple[str, int, int, str]) -> None:
    """Of (part, channels it gives, channels the UNet takes, the UNet's key): ``UserError`` where they differ."""
    for what, gives, takes, key in rows:
        if gives != takes:
            raise UserError(f"model.path: the {what} of {path} gives {gives} channels, its UNet takes {takes} ({key})")
