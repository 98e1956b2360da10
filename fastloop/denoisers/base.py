"""What all model families share: parts from files or from published configs, adapters, decoding, export.

Only safetensors are read. The model's own dtype is ``model.dtype``; what goes in and out as latents is float32.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor2_0
from diffusers.utils import logging as diffusers_logging
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import CLIPTextConfig, CLIPTokenizer
from transformers.utils import logging as transformers_logging

from fastloop.config import ModelConfig, SamplingConfig
from fastloop.denoisers import ASSETS, build_part, read_json
from fastloop.errors import RunFailed, UserError
from fastloop.observer import UNOBSERVED
from fastloop.optimizers import holding

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
ADAPTER = "default"
TEXT_TARGETS = ["q_proj", "k_proj", "v_proj", "out_proj"]  # of CLIP's attention
CACHED_PROMPTS = 4096
MOST_COMPILED = 128  # graphs of one piece of code


class FlashAttention(AttnProcessor2_0):
    """Attention by the flash backend alone; also where a backward with checkpointing computes it again."""

    def __call__(self, *args, **kwargs) -> torch.Tensor:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return super().__call__(*args, **kwargs)


def upload(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A copy of host values on a device, which the host does not wait for: a copy from pageable memory would hold it up."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values.to(device)


class Denoiser:
    """UNet, VAE and text encoders behind `encode`, `predict` and `decode`.

    The UNet is what is trained, and with ``model.lora.text_encoders`` the text encoders.

    A family says which parts it has, how a text becomes an embedding, how embeddings condition the UNet, and checks that
    its parts fit each other.
    """

    pipeline_class: type
    text_classes: dict[str, type]  # of the text encoders, by the name of their part
    absent: dict[str, Any]  # arguments of the pipeline for the parts that are left out
    upcasts_vae = False  # whether the family's pipeline decodes in float32 where the VAE's config has force_upcast
    sizes_condition = False  # whether the UNet is told of picture sizes
    absent_is_zero = False  # whether an absent negative prompt is zeros, not the embedding of an empty text

    def __init__(
        self,
        path: str,
        config: ModelConfig,
        device: torch.device,
        *,
        tokenizers: dict[str, CLIPTokenizer],
        text_encoders: dict[str, torch.nn.Module],
        vae: AutoencoderKL,
        unet: UNet2DConditionModel,
    ) -> None:
        self.path, self.config, self.device = path, config, device
        self.tokenizers, self.text_encoders, self.vae, self.unet = tokenizers, text_encoders, vae, unet
        self.scale_factor = 2 ** (len(vae.config.block_out_channels) - 1)
        self.model = unet  # what computes its forward: an engine may put its own around it
        self._embeddings: dict[str | None, tuple[torch.Tensor, ...]] = {}
        self._reference: dict[str, torch.Tensor] | None = None
        self._resting: tuple[torch.nn.Module, ...] = ()  # what is on the device only while it computes
        self._compiled_batches: list[int] = []
        self.observer = UNOBSERVED
        for module in self.parts.values():
            module.requires_grad_(False).to(device).eval()  # eval: no dropout, so that ratios start at 1
        unet.to(memory_format=torch.channels_last)
        if config.vae.tile:
            vae.enable_tiling()
            vae.tile_sample_min_size, vae.tile_latent_min_size = config.vae.tile, config.vae.tile // self.scale_factor

    @property
    def parts(self) -> dict[str, torch.nn.Module]:
        """The modules by the names of their folders in a pipeline."""
        return {"unet": self.unet, **self.text_encoders, "vae": self.vae}

    @property
    def trains_text(self) -> bool:
        """Whether embeddings change with training, and updates reach the text encoders through them."""
        return self.config.adapter == "lora" and self.config.lora.text_encoders

    @property
    def trained_parts(self) -> dict[str, torch.nn.Module]:
        """Those of `parts` that have trained weights."""
        return {"unet": self.unet, **(self.text_encoders if self.trains_text else {})}

    # --- what a family adds ----------------------------------------------------------------------------------------------

    @classmethod
    def check_fit(cls, path: str, text_configs: dict[str, Any], vae, unet) -> None:
        """Raises ``UserError`` where what one part gives is not what the next takes."""
        raise NotImplementedError

    def embed(self, ids: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """The embedding of one text, each tensor without a batch dimension, of its ids for each text encoder, int64 (1, L)."""
        raise NotImplementedError

    def blank_embedding(self) -> tuple[torch.Tensor, ...]:
        """As `embed`, without values: for planning."""
        raise NotImplementedError

    def condition(self, embeddings: list[tuple[torch.Tensor, ...]], sampling: SamplingConfig):
        """What `predict` takes for these embeddings: rows can be taken by indexing it with a tensor."""
        raise NotImplementedError

    def unet_arguments(self, cond, uncond) -> dict[str, Any]:
        """Keyword arguments of the UNet beside latents and timesteps; the unconditional rows, where there are any, first."""
        raise NotImplementedError

    def idle_modules(self, part: str) -> str | None:
        """A regular expression of modules of a part whose outputs nothing uses, which adapters would never learn in."""
        return None

    # --- parts -----------------------------------------------------------------------------------------------------------

    @classmethod
    def load(cls, path: str, config: ModelConfig, device: torch.device) -> Denoiser:
        """Reads the parts, or makes them with random weights where ``model.random_init`` says so.

        Raises:
            UserError: a part is missing, is not in safetensors, or does not fit the library.
        """
        transformers_logging.disable_progress_bar()
        dtype = DTYPES[config.dtype]
        get = _random_part if config.random_init else _read_part
        text_encoders = {name: get(name, kind, path, config, dtype, device) for name, kind in cls.text_classes.items()}
        tokenizers = {
            name.replace("text_encoder", "tokenizer"): _tokenizer(name, path, config, encoder.config)
            for name, encoder in text_encoders.items()
        }
        vae = get("vae", AutoencoderKL, path, config, torch.float32, device)
        vae.to(cls.vae_dtype(config, vae))
        # a full fine-tune trains the weights of the file, not their rounding
        trained = torch.float32 if config.adapter == "full" else dtype
        unet = get("unet", UNet2DConditionModel, path, config, trained, device)
        return cls(path, config, device, tokenizers=tokenizers, text_encoders=text_encoders, vae=vae, unet=unet)

    @classmethod
    def skeleton(cls, path: str, config: ModelConfig) -> Denoiser:
        """The model without weights, on the meta device, for planning. Raises ``UserError`` where a config is missing."""
        kinds = {**cls.text_classes, "vae": AutoencoderKL, "unet": UNet2DConditionModel}
        configs = {name: read_json(path, config, "config.json", name) for name in kinds}
        with torch.device("meta"):
            parts = {name: build_part(name, path, _maker(kind), configs[name]) for name, kind in kinds.items()}
        text_encoders = {name: parts[name] for name in cls.text_classes}
        vae, unet = parts["vae"], parts["unet"]
        cls.check_fit(path, {name: module.config for name, module in text_encoders.items()}, vae.config, unet.config)
        for name, module in parts.items():
            module.to(cls.vae_dtype(config, vae) if name == "vae" else DTYPES[config.dtype])
        return cls(path, config, torch.device("meta"), tokenizers={}, text_encoders=text_encoders, vae=vae, unet=unet)

    @classmethod
    def vae_dtype(cls, config: ModelConfig, vae: AutoencoderKL) -> torch.dtype:
        """What the VAE computes in: ``model.vae.dtype``, or as the family's pipeline does."""
        if config.vae.dtype != "auto":
            return DTYPES[config.vae.dtype]
        upcast = cls.upcasts_vae and vae.config.force_upcast and config.dtype == "fp16"
        return torch.float32 if upcast else DTYPES[config.dtype]

    # --- what is trained -------------------------------------------------------------------------------------------------

    def train_adapter(self, gradient_checkpointing: bool | list[str], seed: int) -> None:
        """Makes trainable what the configuration says, and sets the attention backend.

        Raises:
            UserError: LoRA targets, or blocks to checkpoint, that the UNet does not have.
        """
        if self.config.attention == "xformers":
            self.unet.enable_xformers_memory_efficient_attention()
        if self.config.attention == "flash":
            self.unet.set_attn_processor(FlashAttention())
        if self.config.adapter == "lora":
            torch.manual_seed(seed)
            self._add_lora("unet", self.config.lora.target_modules)
            for name in self.text_encoders if self.trains_text else ():
                self._add_lora(name, TEXT_TARGETS)
        else:
            # a full fine-tune keeps float32 weights; the forward runs in `model.dtype` under autocast
            self.unet.float().requires_grad_(True)
        if gradient_checkpointing:
            self.unet.enable_gradient_checkpointing()
        if isinstance(gradient_checkpointing, list):
            self._checkpoint_only(gradient_checkpointing)

    def _add_lora(self, part: str, targets: list[str]) -> None:
        """Puts fresh float32 adapters on a part. Raises ``UserError`` where no module has one of the names."""
        model, lora, what = self.parts[part], self.config.lora, part.replace("unet", "UNet").replace("_", " ")
        modules = [f".{name}" for name, _ in model.named_modules()]
        for target in targets:  # peft only wants one of them to be there
            if not any(module.endswith(f".{target}") for module in modules):
                raise UserError(
                    f"model.lora.target_modules: the {what} has no module {target!r}: name modules by their ending"
                )
        try:
            model.add_adapter(
                LoraConfig(
                    r=lora.rank,
                    lora_alpha=lora.alpha or lora.rank,
                    target_modules=targets,
                    exclude_modules=self.idle_modules(part),
                    init_lora_weights="gaussian",
                ),
                adapter_name=ADAPTER,
            )
        except ValueError as error:
            raise UserError(f"model.lora.target_modules: {str(error).splitlines()[0]}") from None
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()

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
        """Within it `predict` gives the outputs of the model before training, and `encode` its embeddings."""
        if self.config.adapter == "lora":
            for part in self.trained_parts.values():
                part.disable_adapters()
            try:
                yield
            finally:
                for part in self.trained_parts.values():
                    part.enable_adapters()
            return
        parameters = dict(self.unet.named_parameters())
        with holding(parameters, {name: self._reference[name].to(p.dtype) for name, p in parameters.items()}):
            yield

    def trainable(self) -> dict[str, torch.nn.Parameter]:
        """By name; those of a text encoder begin with the name of their part."""
        named = [
            (name if part == "unet" else f"{part}.{name}", p)
            for part, module in self.trained_parts.items()
            for name, p in module.named_parameters()
        ]
        return {name: p for name, p in named if p.requires_grad}

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
        """(height, width) in pixels of the pictures.

        Raises:
            UserError: as `latent_shape`, and for sizes as a condition where the model takes none.
        """
        if not self.sizes_condition:
            for key in ("original_size", "crop_top_left", "target_size"):
                if getattr(sampling, key) != SamplingConfig.model_fields[key].default:
                    raise UserError(f"sampling.{key}: only SDXL is told of picture sizes: leave it out")
        _, height, width = self.latent_shape(sampling.height, sampling.width)
        return height * self.scale_factor, width * self.scale_factor

    def compile(self, batches: Iterable[int]) -> None:
        """Compiles the UNet, or its transformer blocks, in place; names and saved weights stay as they are.

        Compiled code is for one shape. So `predict` fills a smaller micro-batch up to the next of these sizes with copies of
        its last row, and drops what comes of them: nothing is compiled again for the last batch of a rollout or an update.
        """
        self._compiled_batches = sorted(set(batches))
        # One code for each width and size of a block, micro-batch, and with and without gradients or adapters: 22 in a run
        # of SD's four widths. After 8 PyTorch would go on uncompiled, with no more than a warning.
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MOST_COMPILED)
        # In half precision every operator rounds, as in eager code: fused ones leave roundings out, and not the same ones
        # with gradients as without, which alone would move ratios past the clip range.
        options = None if self.config.dtype == "fp32" else {"emulate_precision_casts": True}
        compile_ = self.unet.compile_repeated_blocks if self.config.compile == "regional" else self.unet.compile
        compile_(dynamic=False, options=options)

    def offload_frozen(self) -> None:
        """From now on what is not trained of text encoders and VAE is on the device only while it computes.

        It rests in the host's memory. Its weights never change, so they are copied one way only. Nothing to do on a CPU.
        """
        if self.device.type == "cpu":
            return
        self._resting = (*(() if self.trains_text else self.text_encoders.values()), self.vae)
        for module in self._resting:
            module.to("cpu")
            if self.device.type == "cuda":  # pinned, so that the host does not wait for the copy
                for tensor in (*module.parameters(), *module.buffers()):
                    tensor.data = tensor.data.pin_memory()

    @contextmanager
    def _present(self, *modules: torch.nn.Module) -> Iterator[None]:
        """Within it these parts are on the device."""
        inner = [m for module in modules if module in self._resting for m in module.modules()]
        resting = [(of, dict(of)) for m in inner for of in (m._parameters, m._buffers)]
        for of, tensors in resting:
            for name, tensor in tensors.items():
                if tensor is not None:
                    copy = tensor.detach().to(self.device, non_blocking=True)
                    of[name] = torch.nn.Parameter(copy, False) if isinstance(tensor, torch.nn.Parameter) else copy
        try:
            yield
        finally:
            for of, tensors in resting:
                of.update(tensors)

    def encode(self, prompts: list[str], sampling: SamplingConfig):
        """Conditioning of n prompts and, where guidance is on, of the negative prompt; each text is encoded once.

        Where text encoders are trained: once a call, with gradients where they are on. Else once and for all.
        """
        with self.observer.phase("encode"):
            return self._encode(prompts, sampling)

    def _encode(self, prompts: list[str], sampling: SamplingConfig):
        texts = [*prompts, sampling.negative_prompt or None] if sampling.guidance_scale != 1 else prompts
        distinct = dict.fromkeys(texts)
        known = {} if self.trains_text else self._embeddings
        found = {text: known[text] for text in distinct if text in known}
        if len(found) < len(distinct):
            with self._present(*self.text_encoders.values()), nullcontext() if self.trains_text else torch.no_grad():
                # One text at a time: the result must not depend on which prompts came along.
                found |= {text: self._embedding(text) for text in distinct if text not in found}
            known |= found
            while len(known) > CACHED_PROMPTS:
                del known[next(iter(known))]
        cond = self.condition([found[prompt] for prompt in prompts], sampling)
        if len(texts) == len(prompts):
            return cond, None
        return cond, self.condition([found[texts[-1]]] * len(prompts), sampling)

    def _embedding(self, text: str | None) -> tuple[torch.Tensor, ...]:
        """Of one text; ``None`` is the absent negative prompt."""
        if text is None and self.absent_is_zero:
            return tuple(torch.zeros_like(tensor) for tensor in self.blank_embedding())
        return self.embed([self.tokens(tokenizer, text or "") for tokenizer in self.tokenizers.values()])

    def tokens(self, tokenizer: CLIPTokenizer, text: str) -> torch.Tensor:
        """Its ids, int64 (1, L), padded or cut to the length that the text encoder takes."""
        length = tokenizer.model_max_length
        ids = tokenizer(text, padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids
        return upload(ids, self.device)

    def predict(
        self, latents: torch.Tensor, timesteps: torch.Tensor, cond, uncond
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The UNet's outputs for prompts and, with guidance, for the negative prompt; both in one forward.

        Args:
            latents: float32 (n, C, H, W). timesteps: int64 (n,). cond, uncond: of n rows, as from `encode`.
        """
        dtype, n = DTYPES[self.config.dtype], len(latents)
        full = next((size for size in self._compiled_batches if size >= n), n)
        if full > n:
            rows = torch.arange(full, device=latents.device).clamp(max=n - 1)
            latents, timesteps, cond = latents[rows], timesteps[rows], cond[rows]
            uncond = None if uncond is None else uncond[rows]
        x, t = latents, timesteps
        if uncond is not None:
            x, t = torch.cat([x, x]), torch.cat([t, t])
        x = x.to(dtype).contiguous(memory_format=torch.channels_last)
        # without autocast where the whole UNet is in `dtype`: on the meta device of a plan, and in DeepSpeed
        mixed = dtype != torch.float32 and self.device.type != "meta" and self.model is self.unet
        with self.observer.phase("predict"), torch.autocast(self.device.type, dtype) if mixed else nullcontext():
            output = self.model(x, t, **self.unet_arguments(cond, uncond), return_dict=False)[0]
        if uncond is None:
            return output[:n], None
        without, with_prompt = output.chunk(2)
        return with_prompt[:n], without[:n]

    # --- pictures --------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def decode(self, latents: torch.Tensor, batch: int) -> np.ndarray:
        """Pictures uint8 (n, height, width, 3) of latents float32 (n, C, H, W), ``batch`` at a time.

        A picture that overflows the VAE's dtype is decoded again in float32.

        Raises:
            RunFailed: values are not finite in float32 either.
        """
        with self.observer.phase("decode"), self._present(self.vae):
            return np.concatenate([self._decode(chunk) for chunk in latents.split(batch)])

    def _decode(self, latents: torch.Tensor) -> np.ndarray:
        x = self.to_pictures(latents)
        finite = x.isfinite().flatten(1).all(1)  # as uint8 the others would pass for pictures, and be rewarded
        if self.vae.dtype != torch.float32 and not finite.all():
            before = self.vae.dtype
            self.vae.float()
            x[~finite] = self.to_pictures(latents[~finite])
            finite = x.isfinite().flatten(1).all(1)
            self.vae.to(before)  # the same weights again: rounding them twice changes nothing
        if not finite.all():
            raise RunFailed("the decoded pictures are not finite, in float32 either: the latents or the VAE are broken")
        return self.to_bytes(x).cpu().numpy()

    def to_pictures(self, latents: torch.Tensor) -> torch.Tensor:
        """What the VAE makes of latents, in its dtype, as float32 (n, 3, height, width) in about [-1, 1]."""
        return self.vae.decode(self._unscaled(latents).to(self.vae.dtype), return_dict=False)[0].float()

    @staticmethod
    def to_bytes(pictures: torch.Tensor) -> torch.Tensor:
        """uint8 (n, height, width, 3) of pictures in [-1, 1]."""
        x = (pictures / 2 + 0.5).clamp(0, 1) * 255
        return x.round().to(torch.uint8).permute(0, 2, 3, 1)

    def _unscaled(self, latents: torch.Tensor) -> torch.Tensor:
        """The VAE's own latents of those that are denoised."""
        config, scale, shift = self.vae.config, 1.0, self.vae.config.shift_factor or 0.0
        if config.latents_mean is not None and config.latents_std is not None:
            scale, shift = (latents.new_tensor(v).view(1, -1, 1, 1) for v in (config.latents_std, config.latents_mean))
        return latents * scale / config.scaling_factor + shift

    # --- export ----------------------------------------------------------------------------------------------------------

    def export(self, folder: Path, dtype: str = "fp32") -> None:
        """What stock diffusers loads: adapters for ``load_lora_weights``, or a whole pipeline for ``from_pretrained``.

        Args:
            dtype: of all weights in the files; those of the UNet are rounded from float32.
        """
        to = DTYPES[dtype]
        if self.config.adapter == "lora":
            adapters = {}
            for name, part in self.trained_parts.items():
                # in peft's names: diffusers' older ones are for attention alone, mixed with others they are not loaded
                state = get_peft_model_state_dict(part, save_embedding_layers=False)
                adapters[f"{name}_lora_layers"] = {key: value.to(to) for key, value in state.items()}
                # without it diffusers takes alpha = rank, whatever was trained
                adapters[f"{name}_lora_adapter_metadata"] = part.peft_config[ADAPTER].to_dict()
            self.pipeline_class.save_lora_weights(folder, **adapters)
            return
        diffusers_logging.disable_progress_bar()
        # The other parts come from the files again, in the same dtype, where there are files.
        own = self.parts if self.config.random_init else {"unet": self.unet}
        parameters = {f"{part}.{name}": p for part, module in own.items() for name, p in module.named_parameters()}
        with holding(parameters, {name: p.detach().to(to) for name, p in parameters.items()}):
            self._pipeline(to).save_pretrained(folder)

    def _pipeline(self, dtype: torch.dtype):
        """Stock diffusers' pipeline around this UNet."""
        if self.config.random_init:
            values = read_json(self.path, self.config, "scheduler_config.json", "scheduler")
            scheduler = getattr(diffusers, values["_class_name"]).from_config(values)
            return self.pipeline_class(**self.parts, **self.tokenizers, scheduler=scheduler, **self.absent)
        return self.pipeline_class.from_pretrained(
            self.path,
            revision=self.config.revision,
            variant=self.config.variant,
            use_safetensors=True,
            torch_dtype=dtype,
            **self.tokenizers,
            unet=self.unet,
            **self.absent,
        )


def refuse_misfits(path: str, *rows: tuple[str, int, int, str]) -> None:
    """Of (part, channels it gives, channels the UNet takes, the UNet's key): ``UserError`` where they differ."""
    for what, gives, takes, key in rows:
        if gives != takes:
            raise UserError(f"model.path: the {what} of {path} gives {gives} channels, its UNet takes {takes} ({key})")


def _maker(kind: type):
    """Makes a part from the values of its config.json."""
    return kind.from_config if hasattr(kind, "from_config") else lambda values: kind(CLIPTextConfig(**values))


def _read_part(name: str, kind: type, path: str, config: ModelConfig, dtype: torch.dtype, _: torch.device) -> torch.nn.Module:
    key = "torch_dtype" if hasattr(kind, "from_config") else "dtype"  # diffusers, transformers
    weights = {"use_safetensors": True, "variant": config.variant, "output_loading_info": True, key: dtype}
    with _refusing(name, path, config):
        part, info = kind.from_pretrained(path, subfolder=name, revision=config.revision, **weights)
        if missing := sorted(info["missing_keys"]):  # the libraries would leave these weights random or empty
            raise ValueError(f"its file lacks {missing[0]}" + (f" and {len(missing) - 1} more" if missing[1:] else ""))
    return part


def _random_part(
    name: str, kind: type, path: str, config: ModelConfig, dtype: torch.dtype, device: torch.device
) -> torch.nn.Module:
    """Made on its device from its config, with the libraries' initial weights from seed 0: the same in every process."""
    values = read_json(path, config, "config.json", name)
    before = torch.get_default_dtype()
    with torch.random.fork_rng([device] if device.type == "cuda" else []), device:
        torch.manual_seed(0)
        torch.set_default_dtype(dtype)
        try:
            return build_part(name, path, _maker(kind), values)
        finally:
            torch.set_default_dtype(before)


def _tokenizer(encoder: str, path: str, config: ModelConfig, text_config: CLIPTextConfig) -> CLIPTokenizer:
    """The tokenizer of a text encoder. Beside random weights it is the bundled model's, at the length of the real one."""
    name = encoder.replace("text_encoder", "tokenizer")
    if config.random_init:
        tokenizer = CLIPTokenizer.from_pretrained(ASSETS / "shapes" / "tokenizer")
        tokenizer.model_max_length = text_config.max_position_embeddings
        return tokenizer
    with _refusing(name, path, config):
        tokenizer = CLIPTokenizer.from_pretrained(path, subfolder=name, revision=config.revision)
    if not 3 <= len(tokenizer) <= text_config.vocab_size:  # without its files transformers makes an empty one
        raise UserError(
            f"model.path: the {name} of {path} has {len(tokenizer)} words and its text encoder {text_config.vocab_size}: "
            f"are all files of the folder {name} there?"
        )
    tokenizer.model_max_length = min(tokenizer.model_max_length, text_config.max_position_embeddings)
    return tokenizer


@contextmanager
def _refusing(name: str, path: str, config: ModelConfig) -> Iterator[None]:
    """Makes one line of whatever the libraries raise when they load a part."""
    try:
        yield
    except Exception as error:  # diffusers and transformers raise many kinds
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"model.path: cannot load the {name} of {path} (safetensors only"
            f"{'' if config.variant is None else f', variant {config.variant}'}): {first}"
        ) from None
