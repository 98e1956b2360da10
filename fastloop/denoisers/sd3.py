"""Stable Diffusion 3 medium, 3.5 medium and large: flows with a joint transformer, two CLIPs and, where it is there, T5."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from transformers import CLIPTextModelWithProjection, T5EncoderModel

from fastloop.config import ModelConfig
from fastloop.denoisers.files import read_json
from fastloop.denoisers.parts import DTYPES, refuse_misfits
from fastloop.denoisers.transformer import Conditioning, TransformerDenoiser
from fastloop.errors import UserError

T5 = "text_encoder_3"


class StableDiffusion3(TransformerDenoiser):
    """Three text encoders, of which T5 may be left out of the pipeline: its tokens are zeros then.

    Tokens are those of both CLIPs side by side, zeros up to T5's width, and then T5's; ``pooled`` both CLIPs' projections.
    """

    network_class = SD3Transformer2DModel
    pipeline_class = StableDiffusion3Pipeline
    text_classes = {
        "text_encoder": CLIPTextModelWithProjection,
        "text_encoder_2": CLIPTextModelWithProjection,
        T5: T5EncoderModel,
    }
    long_encoder = T5
    sequence_length = 256  # as the pipeline's own default

    @classmethod
    def encoders_of(cls, path: str, config: ModelConfig) -> dict[str, type]:
        """Return the classes of the text encoders that a pipeline has, by the name of their part."""
        absent = read_json(path, config, "model_index.json").get(T5) in (None, [None, None])
        return {name: kind for name, kind in cls.text_classes.items() if name != T5 or not absent}

    @classmethod
    def check_fit(cls, path, text_configs, network) -> None:
        """Raise ``UserError`` where text encoders and transformer differ in their channels."""
        clips = [text_configs[name] for name in cls.text_classes if name != T5]
        pooled, width = (sum(getattr(clip, key) for clip in clips) for key in ("projection_dim", "hidden_size"))
        wide = network.joint_attention_dim
        t5 = [("third text encoder", text_configs[T5].d_model, wide, "joint_attention_dim")] if T5 in text_configs else []
        refuse_misfits(
            path,
            "transformer",
            ("pair of CLIPs", pooled, network.pooled_projection_dim, "pooled_projection_dim"),
            ("pair of CLIPs", width, min(width, wide), "joint_attention_dim"),
            *t5,
        )

    @classmethod
    def flow_times(cls, path, config, scheduler, sampling) -> dict[str, Any]:
        """Return the number of steps, and with dynamic shifting ``mu``, which follows from the size of the picture."""
        times = {"num_inference_steps": sampling.steps}
        if scheduler.get("use_dynamic_shifting"):
            network = read_json(path, config, "config.json", "transformer")
            tokens = cls.patches(path, config, sampling, network["sample_size"], network["patch_size"])
            times["mu"] = cls.shift(scheduler, tokens)
        return times

    @property
    def caution(self) -> str | None:
        """Say so of a turbo, which is distilled to a few steps; nothing but its name tells of it."""
        if "turbo" not in Path(self.config.path or "").name.lower():
            return None
        return (
            "this is a turbo, distilled to 4 steps without noise: training adds noise, which it was not made for, and may "
            "undo the distillation; the model without turbo in its name is the better start"
        )

    @property
    def absent(self) -> dict[str, None]:
        """Arguments of the pipeline for the parts that are left out."""
        without_t5 = () if T5 in self.text_encoders else (T5, "tokenizer_3")
        return dict.fromkeys(("image_encoder", "feature_extractor", *without_t5))

    @property
    def latent_channels(self) -> int:
        """Channels of the latents."""
        return self.network.config.in_channels

    @property
    def own_latent_size(self) -> int:
        """The latents' size that the transformer was trained at."""
        return self.network.config.sample_size

    @property
    def size_unit(self) -> int:
        """Height and width of latents must be multiples of this: the side of a patch."""
        return self.network.config.patch_size

    def latent_shape(self, height: int | None, width: int | None) -> tuple[int, int, int]:
        """Return (C, H, W) of the latents; raises ``UserError`` for sizes beyond the transformer's positions too."""
        shape = super().latent_shape(height, width)
        most = self.network.config.pos_embed_max_size * self.size_unit
        for key, size in zip(("height", "width"), shape[1:], strict=True):
            if size > most:
                pixels = size * self.scale_factor
                raise UserError(
                    f"sampling.{key}: {pixels} pixels: this model has positions for {most * self.scale_factor} at most"
                )
        return shape

    def prepare_network(self) -> None:
        """Name the transformer's repeated blocks, which diffusers does not, for ``model.compile: regional``."""
        self.network._repeated_blocks = ["JointTransformerBlock"]

    def idle_modules(self, part: str) -> str:
        """Name the last block's queries of the text, whose outputs are dropped."""
        return rf"transformer_blocks\.{self.network.config.num_layers - 1}\.attn\.add_q_proj"

    def embed(self, ids: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the tokens of one text, (L, C), and its projections, (P,)."""
        *clips, t5 = (self.text_encoders.get(name) for name in self.text_classes)
        outputs = [clip(of_clip, output_hidden_states=True) for clip, of_clip in zip(clips, ids, strict=False)]
        tokens = torch.cat([output.hidden_states[-2][0] for output in outputs], -1)
        wide = self.network.config.joint_attention_dim
        more = tokens.new_zeros(self.max_sequence_length, wide) if t5 is None else t5(ids[-1])[0][0]
        tokens = torch.nn.functional.pad(tokens, (0, wide - tokens.shape[-1]))
        return torch.cat([tokens, more]), torch.cat([output.text_embeds[0] for output in outputs], -1)

    def blank_embedding(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return an empty embedding, (L, C) and (P,), in ``model.dtype``."""
        config, like = self.network.config, {"dtype": DTYPES[self.config.dtype], "device": self.device}
        length = self.text_length("text_encoder") + self.max_sequence_length
        return torch.empty(length, config.joint_attention_dim, **like), torch.empty(config.pooled_projection_dim, **like)

    def call(
        self, forward: Callable[..., Any], latents, timesteps, cond: Conditioning, uncond: Conditioning | None
    ) -> torch.Tensor:
        """Call the transformer with latents (m, 16, H, W) and float32 timesteps (m,), as stock does; returns the velocity."""
        texts = self.texts(cond, uncond)
        return forward(hidden_states=latents, timestep=timesteps, **texts, return_dict=False)[0]
