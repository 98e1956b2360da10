"""Stable Diffusion 1.x and 2.x: any diffusers-format folder or hub id, epsilon or v-prediction, LoRA or full.

Only safetensors are read. The model's own dtype is ``model.dtype``; what goes in and out as latents is float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.utils import logging as diffusers_logging
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer
from transformers.utils import logging as transformers_logging

from fastloop.config import ModelConfig, SamplingConfig
from fastloop.denoisers import build_part, read_json
from fastloop.errors import RunFailed, UserError
from fastloop.optimizers import holding

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
ADAPTER = "default"
CACHED_PROMPTS = 4096


def load(path: str, config: ModelConfig, device: torch.device) -> StableDiffusion:
    """Reads tokenizer, text encoder, VAE and UNet.

    Raises:
        UserError: a part is missing, is not in safetensors, or does not fit the library.
    """
    dtype = DTYPES[config.dtype]
    transformers_logging.disable_progress_bar()

    def part(cls, name, **kwargs):
        try:
            loaded = cls.from_pretrained(path, subfolder=name, revision=config.revision, **kwargs)
            if "output_loading_info" in kwargs:
                loaded, info = loaded
                if missing := sorted(info["missing_keys"]):  # the libraries would leave these weights random or empty
                    raise ValueError(f"its file lacks {missing[0]}" + (f" and {len(missing) - 1} more" if missing[1:] else ""))
            return loaded
        except Exception as error:  # diffusers and transformers raise many kinds
            first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise UserError(
                f"model.path: cannot load the {name} of {path} (safetensors only"
                f"{'' if config.variant is None else f', variant {config.variant}'}): {first}"
            ) from None

    weights = {"use_safetensors": True, "variant": config.variant, "output_loading_info": True}
    parts = {
        "tokenizer": part(CLIPTokenizer, "tokenizer"),
        "text_encoder": part(CLIPTextModel, "text_encoder", dtype=dtype, **weights),
        "vae": part(AutoencoderKL, "vae", torch_dtype=dtype, **weights),
        # a full fine-tune trains the weights of the file, not their rounding
        "unet": part(
            UNet2DConditionModel, "unet", torch_dtype=torch.float32 if config.adapter == "full" else dtype, **weights
        ),
    }
    tokenizer, text = parts["tokenizer"], parts["text_encoder"].config
    if not 3 <= len(tokenizer) <= text.vocab_size:  # without its files transformers makes an empty one
        raise UserError(
            f"model.path: the tokenizer of {path} has {len(tokenizer)} words and its text encoder {text.vocab_size}: "
            "are all files of the folder tokenizer there?"
        )
    tokenizer.model_max_length = min(tokenizer.model_max_length, text.max_position_embeddings)
    return StableDiffusion(path, config, device, **parts)


def skeleton(path: str, config: ModelConfig) -> StableDiffusion:
    """The model without weights, on the meta device, for planning. Raises ``UserError`` where a part's config is missing."""
    makers = {
        "text_encoder": lambda values: CLIPTextModel(CLIPTextConfig(**values)),
        "vae": AutoencoderKL.from_config,
        "unet": UNet2DConditionModel.from_config,
    }
    configs = {name: read_json(path, config, "config.json", name) for name in makers}
    with torch.device("meta"):
        parts = {name: build_part(name, path, make, configs[name]) for name, make in makers.items()}
    parts = {name: module.to(DTYPES[config.dtype]) for name, module in parts.items()}
    _check_fit(path, parts["text_encoder"].config, parts["vae"].config, parts["unet"].config)
    return StableDiffusion(path, config, torch.device("meta"), tokenizer=None, **parts)


def _check_fit(path: str, text, vae, unet) -> None:
    """Raises ``UserError`` where what one part gives is not what the next takes."""
    for what, gives, takes, key in (
        ("text encoder", text.hidden_size, unet.cross_attention_dim, "cross_attention_dim"),
        ("VAE", vae.latent_channels, unet.in_channels, "in_channels"),
    ):
        if gives != takes:
            raise UserError(f"model.path: the {what} of {path} gives {gives} channels, its UNet takes {takes} ({key})")


def add_lora(unet: UNet2DConditionModel, config: ModelConfig) -> None:
    """Puts fresh float32 adapters on the UNet. Raises ``UserError`` where no module has one of the names."""
    lora = config.lora
    modules = [f".{name}" for name, _ in unet.named_modules()]
    for target in lora.target_modules:  # peft only wants one of them to be there
        if not any(module.endswith(f".{target}") for module in modules):
            raise UserError(f"model.lora.target_modules: the UNet has no module {target!r}: name modules by their ending")
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
        self.model = unet  # what computes its forward: an engine may put its own around it
        self._embeddings: dict[str, torch.Tensor] = {}
        self._reference: dict[str, torch.Tensor] | None = None
        for module in (text_encoder, vae, unet):
            module.requires_grad_(False).to(device).eval()  # eval: no dropout, so that ratios start at 1
        unet.to(memory_format=torch.channels_last)

    def train_adapter(self, gradient_checkpointing: bool | list[str], seed: int) -> None:
        """Makes trainable what the configuration says, and sets the attention backend.

        Raises:
            UserError: LoRA targets, or blocks to checkpoint, that the UNet does not have.
        """
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
        if isinstance(gradient_checkpointing, list):
            self._checkpoint_only(gradient_checkpointing)

    def _checkpoint_only(self, chosen: list[str]) -> None:
        """Leaves gradient checkpointing on in the blocks named, and in what is inside them."""
        blocks = {name: m for name, m in self.unet.named_modules() if name and hasattr(m, "gradient_checkpointing")}
        for name in chosen:
            if not any(f"{block}.".startswith(f"{name}.") for block in blocks):
                outer = [block for block in blocks if block.count(".") <= 1]
                raise UserError(
                    f"memory.gradient_checkpointing: the UNet has no block {name!r}: its blocks are {', '.join(outer)}"
                )
        for block, module in blocks.items():
            module.gradient_checkpointing = any(f"{block}.".startswith(f"{name}.") for name in chosen)

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
        parameters = dict(self.unet.named_parameters())
        with holding(parameters, {name: self._reference[name].to(p.dtype) for name, p in parameters.items()}):
            yield

    def trainable(self) -> dict[str, torch.nn.Parameter]:
        return {name: p for name, p in self.unet.named_parameters() if p.requires_grad}

    def latent_shape(self, height: int | None, width: int | None) -> tuple[int, int, int]:
        """(C, H, W) of the latents of a picture size in pixels; the model's own size where it is not given.

        Raises:
            UserError: a size that the UNet cannot halve often enough.
        """
        size = self.unet.config.sample_size
        if size is None and (height is None or width is None):
            raise UserError("sampling: the model states no size of its own: set sampling.height and sampling.width")
        own = (size, size) if isinstance(size, int) else size
        unit = self.scale_factor * 2 ** (len(self.unet.config.block_out_channels) - 1)
        for key, value in (("height", height), ("width", width)):
            if value is not None and value % unit:
                raise UserError(f"sampling.{key}: {value} is not a multiple of {unit} pixels, which this model needs")
        return (
            self.unet.config.in_channels,
            own[0] if height is None else height // self.scale_factor,
            own[1] if width is None else width // self.scale_factor,
        )

    def image_size(self, sampling: SamplingConfig) -> tuple[int, int]:
        """(height, width) in pixels of the pictures. Raises ``UserError`` as `latent_shape`."""
        _, height, width = self.latent_shape(sampling.height, sampling.width)
        return height * self.scale_factor, width * self.scale_factor

    @torch.no_grad()
    def encode(self, prompts: list[str], sampling: SamplingConfig) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Embeddings (n, L, C) of prompts, and of the negative prompt where guidance is on; each text is encoded once."""
        guided = sampling.guidance_scale != 1
        found = {}  # of this call: the cache may hold fewer
        for text in dict.fromkeys([*prompts, sampling.negative_prompt] if guided else prompts):
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
            found[text] = self._embeddings[text]
        cond = torch.stack([found[prompt] for prompt in prompts])
        return cond, found[sampling.negative_prompt].expand_as(cond) if guided else None

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
        # without autocast where the whole UNet is in `dtype`: on the meta device of a plan, and in DeepSpeed
        mixed = dtype != torch.float32 and self.device.type != "meta" and self.model is self.unet
        with torch.autocast(self.device.type, dtype) if mixed else nullcontext():
            output = self.model(x, t, text.to(dtype), return_dict=False)[0]
        if uncond is None:
            return output, None
        without, with_prompt = output.chunk(2)
        return with_prompt, without

    @torch.no_grad()
    def decode(self, latents: torch.Tensor, batch: int) -> np.ndarray:
        """Pictures uint8 (n, height, width, 3) of latents float32 (n, C, H, W), ``batch`` at a time.

        Raises:
            RunFailed: values are not finite.
        """
        shift = getattr(self.vae.config, "shift_factor", None) or 0.0
        pictures = []
        for chunk in latents.split(batch):
            z = chunk / self.vae.config.scaling_factor + shift
            x = self.vae.decode(z.to(self.vae.dtype), return_dict=False)[0].float()
            if not x.isfinite().all():  # as uint8 they would pass for pictures, and be rewarded
                raise RunFailed(f"the decoded pictures are not finite with model.dtype={self.config.dtype}: use bf16 or fp32")
            x = (x / 2 + 0.5).clamp(0, 1) * 255
            pictures.append(x.round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy())
        return np.concatenate(pictures)

    def export(self, folder: Path) -> None:
        """What stock diffusers loads: adapters for ``load_lora_weights``, or a whole pipeline for ``from_pretrained``."""
        if self.config.adapter == "lora":
            self.pipeline_class.save_lora_weights(
                folder,
                # in peft's names: diffusers' older ones are for attention alone, mixed with others they are not loaded
                unet_lora_layers=get_peft_model_state_dict(self.unet),
                # without it diffusers takes alpha = rank, whatever was trained
                unet_lora_adapter_metadata=self.unet.peft_config[ADAPTER].to_dict(),
            )
            return
        diffusers_logging.disable_progress_bar()
        # The other parts come from the files again, all in float32: the dtype that was trained, and one dtype for all parts.
        self.pipeline_class.from_pretrained(
            self.path,
            revision=self.config.revision,
            variant=self.config.variant,
            use_safetensors=True,
            torch_dtype=torch.float32,
            tokenizer=self.tokenizer,
            unet=self.unet,
            safety_checker=None,
            feature_extractor=None,
            image_encoder=None,
            requires_safety_checker=False,
        ).save_pretrained(folder)
