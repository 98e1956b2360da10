"""Stable Diffusion 1.x and 2.x: any diffusers-format folder or hub id, epsilon or v-prediction, LoRA or full.

Only safetensors are read. The model's own dtype is ``model.dtype``; what goes in and out as latents is float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from transformers import CLIPTextModel, CLIPTokenizer

from fastloop.config import ModelConfig, SamplingConfig
from fastloop.errors import UserError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
ADAPTER = "default"
CACHED_PROMPTS = 4096


def load(path: str, config: ModelConfig, device: torch.device) -> StableDiffusion:
    """Reads tokenizer, text encoder, VAE and UNet.

    Raises:
        UserError: a part is missing, is not in safetensors, or does not fit the library.
    """
    dtype = DTYPES[config.dtype]

    def part(cls, name, **kwargs):
        try:
            return cls.from_pretrained(path, subfolder=name, revision=config.revision, **kwargs)
        except Exception as error:  # diffusers and transformers raise many kinds
            first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise UserError(
                f"model.path: cannot load the {name} of {path} (safetensors only"
                f"{'' if config.variant is None else f', variant {config.variant}'}): {first}"
            ) from None

    weights = {"use_safetensors": True, "variant": config.variant}
    parts = {
        "tokenizer": part(CLIPTokenizer, "tokenizer"),
        "text_encoder": part(CLIPTextModel, "text_encoder", dtype=dtype, **weights),
        "vae": part(AutoencoderKL, "vae", torch_dtype=dtype, **weights),
        "unet": part(UNet2DConditionModel, "unet", torch_dtype=dtype, **weights),
    }
    return StableDiffusion(path, config, device, **parts)


def add_lora(unet: UNet2DConditionModel, config: ModelConfig) -> None:
    """Puts fresh float32 adapters on the UNet. Raises ``UserError`` where no module has the given names."""
    lora = config.lora
    try:
        unet.add_adapter(
            LoraConfig(
                r=lora.rank,
                lora_alpha=lora.alpha or lora.rank,
                target_modules=lora.target_modules,
                init_lora_weights="gaussian",
            ),
            adapter_name=ADAPTER,
        )
    except ValueError as error:
        raise UserError(f"model.lora.target_modules: {str(error).splitlines()[0]}") from None
    for parameter in unet.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


class StableDiffusion:
    """UNet, VAE and text encoder behind `encode`, `predict` and `decode`; the UNet is what is trained."""

    pipeline_class = StableDiffusionPipeline

    def __init__(self, path, config: ModelConfig, device: torch.device, *, tokenizer, text_encoder, vae, unet) -> None:
        self.path, self.config, self.device = path, config, device
        self.tokenizer, self.text_encoder, self.vae, self.unet = tokenizer, text_encoder, vae, unet
        self.scale_factor = 2 ** (len(vae.config.block_out_channels) - 1)
        self._embeddings: dict[str, torch.Tensor] = {}
        self._reference: dict[str, torch.Tensor] | None = None
        for module in (text_encoder, vae, unet):
            module.requires_grad_(False).to(device).eval()  # eval: no dropout, so that ratios start at 1
        unet.to(memory_format=torch.channels_last)

    def train_adapter(self, gradient_checkpointing: bool, seed: int) -> None:
        """Makes trainable what the configuration says, and sets the attention backend."""
        if self.config.attention == "xformers":
            self.unet.enable_xformers_memory_efficient_attention()
        if self.config.adapter == "lora":
            torch.manual_seed(seed)
            add_lora(self.unet, self.config)
        else:
            # a full fine-tune keeps float32 weights; the forward runs in `model.dtype` under autocast
            self.unet.float().requires_grad_(True)
        if gradient_checkpointing:
            self.unet.enable_gradient_checkpointing()

    def keep_reference(self) -> None:
        """Freezes a copy of the weights for the KL; LoRA needs none, its adapter is switched off."""
        if self.config.adapter == "full":
            self._reference = {name: p.detach().clone() for name, p in self.unet.named_parameters()}

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Within it `predict` gives the outputs of the model before training."""
        if self.config.adapter == "lora":
            self.unet.disable_adapters()
            try:
                yield
            finally:
                self.unet.enable_adapters()
            return
        trained = {name: p.data for name, p in self.unet.named_parameters()}
        for name, p in self.unet.named_parameters():
            p.data = self._reference[name]
        try:
            yield
        finally:
            for name, p in self.unet.named_parameters():
                p.data = trained[name]

    def trainable(self) -> dict[str, torch.nn.Parameter]:
        return {name: p for name, p in self.unet.named_parameters() if p.requires_grad}

    def latent_shape(self, height: int | None, width: int | None) -> tuple[int, int, int]:
        """(C, H, W) of the latents of a picture size in pixels; the model's own size where it is not given.

        Raises:
            UserError: a size that the UNet cannot halve often enough.
        """
        size = self.unet.config.sample_size
        own = (size, size) if isinstance(size, int) else tuple(size)
        unit = self.scale_factor * 2 ** (len(self.unet.config.block_out_channels) - 1)
        for key, value in (("height", height), ("width", width)):
            if value is not None and value % unit:
                raise UserError(f"sampling.{key}: {value} is not a multiple of {unit} pixels, which this model needs")
        return (
            self.unet.config.in_channels,
            own[0] if height is None else height // self.scale_factor,
            own[1] if width is None else width // self.scale_factor,
        )

    @torch.no_grad()
    def encode(self, prompts: list[str], sampling: SamplingConfig) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Embeddings (n, L, C) of prompts, and of the negative prompt where guidance is on; each text is encoded once."""
        texts = [*prompts, sampling.negative_prompt]
        for text in dict.fromkeys(texts):
            if text not in self._embeddings:
                # One text at a time: the result must not depend on which prompts came along.
                ids = self.tokenizer(
                    text,
                    padding="max_length",
                    max_length=self.tokenizer.model_max_length,
                    truncation=True,
                    return_tensors="pt",
                ).input_ids
                if len(self._embeddings) >= CACHED_PROMPTS:
                    del self._embeddings[next(iter(self._embeddings))]
                self._embeddings[text] = self.text_encoder(ids.to(self.device))[0][0]
        cond = torch.stack([self._embeddings[prompt] for prompt in prompts])
        if sampling.guidance_scale == 1:
            return cond, None
        return cond, self._embeddings[sampling.negative_prompt].expand_as(cond)

    def predict(
        self, latents: torch.Tensor, timesteps: torch.Tensor, cond: torch.Tensor, uncond: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The UNet's outputs for prompts and, with guidance, for the negative prompt; both in one forward.

        Args:
            latents: float32 (n, C, H, W). timesteps: int64 (n,). cond, uncond: (n, L, C) as from `encode`.
        """
        dtype = DTYPES[self.config.dtype]
        x, t, text = latents, timesteps, cond
        if uncond is not None:
            x, t, text = torch.cat([x, x]), torch.cat([t, t]), torch.cat([uncond, cond])
        x = x.to(dtype).contiguous(memory_format=torch.channels_last)
        with torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32):
            output = self.unet(x, t, text.to(dtype), return_dict=False)[0]
        if uncond is None:
            return output, None
        without, with_prompt = output.chunk(2)
        return with_prompt, without

    @torch.no_grad()
    def decode(self, latents: torch.Tensor, batch: int) -> np.ndarray:
        """Pictures uint8 (n, height, width, 3) of latents float32 (n, C, H, W), ``batch`` at a time."""
        shift = getattr(self.vae.config, "shift_factor", None) or 0.0
        pictures = []
        for chunk in latents.split(batch):
            z = chunk / self.vae.config.scaling_factor + shift
            x = self.vae.decode(z.to(self.vae.dtype), return_dict=False)[0].float()
            x = (x / 2 + 0.5).clamp(0, 1) * 255
            pictures.append(x.round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy())
        return np.concatenate(pictures)

    def export(self, folder: Path) -> None:
        """What stock diffusers loads: adapters for ``load_lora_weights``, or a whole pipeline for ``from_pretrained``."""
        if self.config.adapter == "lora":
            self.pipeline_class.save_lora_weights(
                folder,
                unet_lora_layers=convert_state_dict_to_diffusers(get_peft_model_state_dict(self.unet)),
                # without it diffusers takes alpha = rank, whatever was trained
                unet_lora_adapter_metadata=self.unet.peft_config[ADAPTER].to_dict(),
            )
            return
        self.pipeline_class.from_pretrained(
            self.path,
            revision=self.config.revision,
            tokenizer=self.tokenizer,
            text_encoder=self.text_encoder,
            vae=self.vae,
            unet=self.unet,
            safety_checker=None,
            feature_extractor=None,
            image_encoder=None,
            requires_safety_checker=False,
        ).save_pretrained(folder)
