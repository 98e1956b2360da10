"""What all model families share: a text becomes a condition, latents become the network's outputs, and latents pictures.

Of its files nothing but tensors is read. The model's own dtype is ``model.dtype``; what goes in and out as latents is float32.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from fastloop.config import ModelConfig, SamplingConfig
from fastloop.denoisers.adapters import Adapters
from fastloop.denoisers.export import Export
from fastloop.denoisers.files import read_json, read_part_config, small_files
from fastloop.denoisers.given import given_notes
from fastloop.denoisers.parts import DTYPES, build_part, maker, random_part, read_part, refuse_other_vae
from fastloop.denoisers.quantised import quantise_parts
from fastloop.denoisers.residence import Residence
from fastloop.denoisers.texts import Text, TextEncoding
from fastloop.denoisers.weights import file_notes
from fastloop.errors import RunFailed, UserError
from fastloop.observer import UNOBSERVED

MOST_COMPILED = 128  # graphs of one piece of code


class Denoiser(TextEncoding, Adapters, Residence, Export):
    """Network, VAE and text encoders behind `encode`, `predict` and `decode`.

    The network, which denoises, is what is trained, and with ``model.lora.text_encoders`` the text encoders.

    A family says which parts it has and how latents are laid out, how a text becomes an embedding, how embeddings condition
    the network, and checks that its parts fit each other.
    """

    network_class: type
    network_name: str  # its folder in a pipeline
    vae_class: type = AutoencoderKL
    pipeline_class: type
    text_classes: dict[str, type]  # of the text encoders, by the name of their part
    absent: dict[str, Any]  # arguments of the pipeline for the parts that are left out
    upcasts_vae = False  # whether the family's pipeline decodes in float32 where the VAE's config has force_upcast
    rescales_guidance = False  # whether the family's pipeline takes a ``guidance_rescale``
    sizes_condition = False  # whether the network is told of picture sizes
    timestep_dtype = torch.int64  # of the scheduler's timesteps, which the network is called with; of a flow float32
    sequence_length: int | None = None  # the pipeline's default of ``model.max_sequence_length``, where it has one
    lora_targets = ["to_q", "to_k", "to_v", "to_out.0"]  # modules of the network that adapters are for
    text_targets: list[str] | None = ["q_proj", "k_proj", "v_proj", "out_proj"]  # and of text encoders, CLIP's attention
    chunks_texts = False  # whether `embed` takes several chunks of a text, and layers to skip
    encodes_pictures = True  # by `encode_picture`
    caution: str | None = None  # what `plan` and a run's start say against training this model, in one line
    absent_is_zero = False  # whether an absent negative prompt is zeros, not the embedding of an empty text

    def __init__(
        self,
        path: str,
        config: ModelConfig,
        device: torch.device,
        *,
        tokenizers: dict[str, PreTrainedTokenizerBase],
        text_encoders: dict[str, torch.nn.Module],
        vae: AutoencoderKL,
        network: torch.nn.Module,
    ) -> None:
        self.path, self.config, self.device = path, config, device
        self.tokenizers, self.text_encoders, self.vae, self.network = tokenizers, text_encoders, vae, network
        self.scale_factor = 2 ** (len(vae.config.block_out_channels) - 1)
        self.forward: Callable[..., Any] | None = None  # an engine's own way to call the network
        self._embeddings: dict[Text, tuple[torch.Tensor, ...]] = {}
        self.compiled = False
        self.observer = UNOBSERVED
        for module in self.parts.values():
            module.requires_grad_(False).to(device).eval()  # eval: no dropout, so that ratios start at 1
        self.prepare_network()
        vae.to(memory_format=torch.channels_last)
        if config.vae.tile:
            vae.enable_tiling()
            vae.tile_sample_min_size, vae.tile_latent_min_size = config.vae.tile, config.vae.tile // self.scale_factor

    @property
    def parts(self) -> dict[str, torch.nn.Module]:
        """The modules by the names of their folders in a pipeline."""
        return {self.network_name: self.network, **self.text_encoders, "vae": self.vae}

    @property
    def notes(self) -> tuple[str, ...]:
        """What is taken otherwise than the model's files say, a line each."""
        found, own = read_json(self.path, self.config, "model_index.json")["_class_name"], self.pipeline_class.__name__
        files = () if self.config.random_init else file_notes(list(self.parts), self.path, self.config)
        other = () if found == own else (f"a {found}, opened as the {own} of its parts",)
        return (*other, *files, *given_notes(self.config))

    @property
    def max_sequence_length(self) -> int | None:
        """Tokens of the text encoder whose length is free, ``None`` where there is none."""
        return self.config.max_sequence_length or self.sequence_length

    # --- what a family adds ----------------------------------------------------------------------------------------------

    @classmethod
    def encoders_of(cls, path: str, config: ModelConfig) -> dict[str, type]:
        """Return the classes of the text encoders that a pipeline has, by the name of their part."""
        return cls.text_classes

    @classmethod
    def check_fit(cls, path: str, text_configs: dict[str, Any], network) -> None:
        """Raise ``UserError`` where what one part gives is not what the next takes, by their configs."""
        raise NotImplementedError

    @classmethod
    def flow_times(
        cls, path: str, config: ModelConfig, scheduler: dict[str, Any], sampling: SamplingConfig
    ) -> dict[str, Any] | None:
        """Return what the pipeline of a flow calls its scheduler's ``set_timesteps`` with; ``None``: the model is no flow."""
        return None

    @classmethod
    def as_in_stock(cls, scheduler: dict[str, Any]) -> dict[str, Any]:
        """Return the config of a scheduler as the family's pipeline takes it."""
        return scheduler

    @classmethod
    def check_settings(cls, path: str, config: ModelConfig, sampling: SamplingConfig) -> None:
        """Raise ``UserError`` for settings that are not for this model, by its configs."""
        if sampling.guidance_rescale is not None and not cls.rescales_guidance:
            raise UserError(f"sampling.guidance_rescale: {path} is a flow, whose pipeline has none: leave it out")
        for key, plain in (("clip_skip", None), ("prompt_chunks", 1)):
            if getattr(config, key) != plain and not cls.chunks_texts:
                raise UserError(f"model.{key}: only the text encoders of Stable Diffusion 1.x, 2.x and XL: leave it out")
        if sampling.embedded_guidance is not None:
            raise UserError(
                f"sampling.embedded_guidance: {path} is not told of a guidance, only FLUX.1 dev is: leave it out "
                "(sampling.guidance_scale is another)"
            )

    latent_channels: int
    own_latent_size: int | tuple[int, int] | None  # of the network's own picture size, or height and width
    size_unit: int  # what height and width of latents must be multiples of
    packing = 1  # elements of the VAE's latents in one channel of the network's

    def prepare_network(self) -> None:
        """Lay out the network's weights as its operators want them."""

    def set_attention(self, backend: str) -> None:
        """Set the attention backend of ``model.attention``; ``sdpa`` is the network's own."""
        if backend != "sdpa":
            raise UserError(f"model.attention: {backend} is not for this model: set it to sdpa")

    def embed(self, ids: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """Embed one text, of its ids for each text encoder, int64 (1, L): tensors without a batch dimension.

        Where ``chunks_texts``: of (chunks, L), and with ``skip``, how many of the last layers are skipped.
        """
        raise NotImplementedError

    def blank_embedding(self) -> tuple[torch.Tensor, ...]:
        """Return what `embed` does, without values: for planning."""
        raise NotImplementedError

    def condition(self, embeddings: list[tuple[torch.Tensor, ...]], sampling: SamplingConfig):
        """Return what `predict` takes for these embeddings: rows can be taken by indexing it with a tensor."""
        raise NotImplementedError

    def call(self, forward: Callable[..., Any], latents: torch.Tensor, timesteps: torch.Tensor, cond, uncond) -> torch.Tensor:
        """Return the network's output for latents in ``model.dtype``; unconditional rows, where there are any, come first.

        Args:
            forward: takes what the network's own forward takes. latents (m, C, H, W), timesteps ``timestep_dtype``
                (m,): of m = n rows, or 2 n with guidance. cond, uncond: of n rows each, ``uncond`` may be ``None``.
        """
        raise NotImplementedError

    def idle_modules(self, part: str) -> str | None:
        """Return a regular expression of a part's modules whose outputs nothing uses: adapters would never learn there."""
        return None

    # --- parts -----------------------------------------------------------------------------------------------------------

    @classmethod
    def load(cls, path: str, config: ModelConfig, device: torch.device) -> Denoiser:
        """Read the parts, or make them with random weights where ``model.random_init`` says so.

        Raises:
            UserError: a part is missing, is not in safetensors, or does not fit the library.
        """
        transformers_logging.disable_progress_bar()
        dtype = DTYPES[config.dtype]
        get = random_part if config.random_init else read_part
        first = torch.device("cpu") if config.base_precision else device  # whole it might not fit onto the device
        if config.adapter == "full" and not config.random_init:
            small_files(path, config)  # which the export copies: what cannot be had is missed now, not then
        text_encoders = {
            name: get(name, kind, path, config, dtype, first) for name, kind in cls.encoders_of(path, config).items()
        }
        tokenizers = cls.read_tokenizers(path, config, text_encoders)
        vae = get("vae", cls.vae_class, path, config, torch.float32, device)
        vae.to(cls.vae_dtype(config, vae))
        # a full fine-tune trains the weights of the file, not their rounding
        trained = torch.float32 if config.adapter == "full" else dtype
        network = get(cls.network_name, cls.network_class, path, config, trained, first)
        cls.fuse_into({cls.network_name: network, **text_encoders}, config, network)
        quantise_parts(config, device, network, text_encoders)
        return cls(path, config, device, tokenizers=tokenizers, text_encoders=text_encoders, vae=vae, network=network)

    @classmethod
    def skeleton(cls, path: str, config: ModelConfig) -> Denoiser:
        """Build the model without weights, on the meta device, for planning.

        Raises ``UserError`` where a config is missing.
        """
        encoders = cls.encoders_of(path, config)
        kinds = {**encoders, "vae": cls.vae_class, cls.network_name: cls.network_class}
        configs = {name: read_part_config(name, path, config) for name in kinds}
        with torch.device("meta"):
            parts = {name: build_part(name, path, maker(kind), configs[name]) for name, kind in kinds.items()}
        text_encoders = {name: parts[name] for name in encoders}
        vae, network = parts["vae"], parts[cls.network_name]
        cls.check_fit(path, {name: module.config for name, module in text_encoders.items()}, network.config)
        channels = vae.config.latent_channels, network.config.in_channels
        refuse_other_vae(path, config, cls.network_name, *channels, cls.packing)
        cls.fuse_into({cls.network_name: network, **text_encoders}, config, network)
        for name, module in parts.items():
            module.to(cls.vae_dtype(config, vae) if name == "vae" else DTYPES[config.dtype])
            if config.dtype == "fp16":  # of T5 some layers overflow in it, and transformers loads them so
                for inner in module.modules():
                    for kept in getattr(module, "_keep_in_fp32_modules", None) or ():
                        getattr(inner, kept, torch.nn.Identity()).float()
        quantise_parts(config, torch.device("meta"), network, text_encoders)
        return cls(path, config, torch.device("meta"), tokenizers={}, text_encoders=text_encoders, vae=vae, network=network)

    @classmethod
    def vae_dtype(cls, config: ModelConfig, vae: AutoencoderKL) -> torch.dtype:
        """Return what the VAE computes in: ``model.vae.dtype``, or as the family's pipeline does."""
        if config.vae.dtype != "auto":
            return DTYPES[config.vae.dtype]
        upcast = cls.upcasts_vae and vae.config.force_upcast and config.dtype == "fp16"
        return torch.float32 if upcast else DTYPES[config.dtype]

    # --- sizes -----------------------------------------------------------------------------------------------------------

    def latent_shape(self, height: int | None, width: int | None) -> tuple[int, int, int]:
        """Return (C, H, W) of the latents of a picture size in pixels; the model's own size where it is not given.

        Raises:
            UserError: a size that the network cannot take.
        """
        size = self.own_latent_size
        if size is None and (height is None or width is None):
            raise UserError("sampling: the model states no size of its own: set sampling.height and sampling.width")
        own = (size, size) if isinstance(size, int) else size
        unit = self.scale_factor * self.size_unit
        for key, value in (("height", height), ("width", width)):
            if value is not None and value % unit:
                raise UserError(f"sampling.{key}: {value} is not a multiple of {unit} pixels, which this model needs")
        return (
            self.latent_channels,
            own[0] if height is None else height // self.scale_factor,
            own[1] if width is None else width // self.scale_factor,
        )

    def image_size(self, sampling: SamplingConfig) -> tuple[int, int]:
        """Return (height, width) of the pictures, in pixels.

        Raises:
            UserError: as `latent_shape`, and for sizes as a condition where the model takes none.
        """
        if not self.sizes_condition:
            for key in ("original_size", "crop_top_left", "target_size"):
                if getattr(sampling, key) != SamplingConfig.model_fields[key].default:
                    raise UserError(f"sampling.{key}: only SDXL is told of picture sizes: leave it out")
        _, height, width = self.latent_shape(sampling.height, sampling.width)
        return height * self.scale_factor, width * self.scale_factor

    def compile(self) -> None:
        """Compile the network, or its transformer blocks, in place; names and saved weights stay as they are.

        Compiled code is for one shape: `predict` must be told to fill up what is smaller.
        """
        self.compiled = True
        # One code for each width and size of a block, micro-batch, and with and without gradients or adapters: 22 in a run
        # of SD's four widths. After 8 PyTorch would go on uncompiled, with no more than a warning.
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MOST_COMPILED)
        # In half precision every operator rounds, as in eager code: fused ones leave roundings out, and not the same ones
        # with gradients as without, which alone would move ratios past the clip range.
        options = None if self.config.dtype == "fp32" else {"emulate_precision_casts": True}
        compile_ = self.network.compile if self.config.compile is True else self.network.compile_repeated_blocks
        compile_(dynamic=False, options=options)

    def uncompile(self) -> None:
        """Take back what `compile` did."""
        self.compiled = False
        for module in self.network.modules():
            module._compiled_call_impl = None

    # --- predictions -----------------------------------------------------------------------------------------------------

    def predict(
        self, latents: torch.Tensor, timesteps: torch.Tensor, cond, uncond, full: int = 0
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the network's outputs for prompts and, with guidance, for the negative prompt; both in one forward.

        Args:
            latents: float32 (n, C, H, W). timesteps: ``timestep_dtype`` (n,). cond, uncond: of n rows, as from
                `encode`. full: rows that the network computes at least: copies of the last one are added, and what comes of
                them is dropped.
        """
        dtype, n = DTYPES[self.config.dtype], len(latents)
        if full > n:
            rows = torch.arange(full, device=latents.device).clamp(max=n - 1)
            latents, timesteps, cond = latents[rows], timesteps[rows], cond[rows]
            uncond = None if uncond is None else uncond[rows]
        x, t = latents, timesteps
        if uncond is not None:
            x, t = torch.cat([x, x]), torch.cat([t, t])
        x = x.to(dtype)
        forward = self.forward or self._mixed_forward
        with self.observer.phase("predict"):
            output = self.call(forward, x, t, cond, uncond)
        if uncond is None:
            return output[:n], None
        without, with_prompt = output.chunk(2)
        return with_prompt[:n], without[:n]

    def _mixed_forward(self, *args, **kwargs):
        """The network's forward, under autocast where an engine has not yet put its weights into half precision."""
        dtype = DTYPES[self.config.dtype]
        mixed = self.network.dtype != dtype and self.device.type != "meta"  # of which a plan only wants the shapes
        with torch.autocast(self.device.type, dtype) if mixed else nullcontext():
            return self.network(*args, **kwargs)

    # --- pictures --------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def decode(self, latents: torch.Tensor, batch: int) -> np.ndarray:
        """Decode latents, float32 (n, C, H, W), ``batch`` at a time, to pictures, uint8 (n, height, width, 3).

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
            raise RunFailed("the decoded pictures are not finite, in float32 either: mend the VAE, or lower optimizer.lr")
        return self.to_bytes(x).cpu().numpy()

    @torch.no_grad()
    def encode_picture(self, picture: np.ndarray) -> torch.Tensor:
        """Return the latents, float32 (C, H, W), of a picture, uint8 (height, width, 3): what `decode` makes it of, about."""
        pixels = torch.tensor(picture, device=self.device).permute(2, 0, 1)[None] / 127.5 - 1
        with self._present(self.vae):
            latents = self.vae.encode(pixels.to(self.vae.dtype)).latent_dist.mode().float()
        return self._scaled(latents)[0]

    def to_pictures(self, latents: torch.Tensor) -> torch.Tensor:
        """Return what the VAE makes of latents, in its dtype, as float32 (n, 3, height, width) in about [-1, 1]."""
        return self.vae.decode(self._unscaled(latents).to(self.vae.dtype), return_dict=False)[0].float()

    @staticmethod
    def to_bytes(pictures: torch.Tensor) -> torch.Tensor:
        """Turn pictures, float32 (n, 3, height, width) in [-1, 1], into uint8 (n, height, width, 3)."""
        x = (pictures / 2 + 0.5).clamp(0, 1) * 255
        return x.round().to(torch.uint8).permute(0, 2, 3, 1)

    def _unscaled(self, latents: torch.Tensor) -> torch.Tensor:
        """The VAE's own latents of those that are denoised."""
        scale, shift = self._scaling(latents)
        return latents * scale / self.vae.config.scaling_factor + shift

    def _scaled(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents to be denoised of the VAE's own."""
        scale, shift = self._scaling(latents)
        return (latents - shift) * self.vae.config.scaling_factor / scale

    def _scaling(self, latents: torch.Tensor) -> tuple:
        """Factor, beside ``scaling_factor``, and summand from latents that are denoised to the VAE's own."""
        config = self.vae.config
        if config.latents_mean is not None and config.latents_std is not None:
            return tuple(latents.new_tensor(v).view(1, -1, 1, 1) for v in (config.latents_std, config.latents_mean))
        return 1.0, config.shift_factor or 0.0
