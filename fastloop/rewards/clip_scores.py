"""Rewards on CLIP's embeddings: LAION aesthetic, CLIPScore, PickScore, HPSv2."""

from __future__ import annotations

import numpy as np
import torch

from fastloop.rewards.models import (
    ModelReward,
    Pixels,
    Predictor,
    file_or_id,
    folder_or_id,
    from_files,
    load_exactly,
    read_tensors,
)

VIT_L = "openai/clip-vit-large-patch14"
VIT_H = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"


class _Clip(ModelReward):
    """``model`` is a CLIP of transformers; ``processor`` has its tokenizer and preprocessing, the same by default."""

    def __init__(self, model: str, processor: str | None = None, **rest) -> None:
        super().__init__(**rest)
        self.model = folder_or_id(model)
        self.processor = folder_or_id(processor) if processor else self.model

    def load(self) -> None:
        from transformers import AutoTokenizer

        self.pixels = Pixels.of(self.processor)
        self.tokenizer = from_files(AutoTokenizer, self.processor)
        self.clip = self.load_clip()

    def load_clip(self):
        from transformers import CLIPModel

        return self.pretrained(CLIPModel, self.model)

    def of_images(self, images: np.ndarray) -> torch.Tensor:
        """Embeddings of length 1, float32 (n, width)."""
        pixels = self.pixels(images).to(self.device, self.dtype)
        pooled = self.clip.vision_model(pixel_values=pixels).pooler_output
        return torch.nn.functional.normalize(self.clip.visual_projection(pooled).float(), dim=-1)

    def of_prompts(self, prompts: list[str]) -> torch.Tensor:
        """Embeddings of length 1, float32 (n, width). Prompts are cut at the model's length, 77 tokens."""
        length = self.clip.config.text_config.max_position_embeddings
        tokens = self.tokenizer(prompts, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
        pooled = self.clip.text_model(**tokens.to(self.device)).pooler_output
        return torch.nn.functional.normalize(self.clip.text_projection(pooled).float(), dim=-1)

    def cosine(self, images: np.ndarray, prompts: list[str]) -> torch.Tensor:
        return (self.of_images(images) * self.of_prompts(prompts)).sum(-1)


class Aesthetic(_Clip):
    """LAION's aesthetic predictor V2 (improved-aesthetic-predictor): CLIP ViT-L/14's image embedding and a linear head.

    Trained on ratings from 1 to 10; photographs and paintings get 4 to 7. The prompt is not looked at.
    """

    def __init__(self, model: str = VIT_L, head: str = "trl-lib/ddpo-aesthetic-predictor/aesthetic-model.pth", **rest) -> None:
        super().__init__(model, **rest)
        self.head = file_or_id(head)

    def load(self) -> None:
        """Load CLIP and the linear head."""
        super().load()
        predictor = Predictor(self.clip.config.projection_dim)
        self.predictor = load_exactly(predictor, read_tensors(self.head), self.head).float().to(self.device)

    def score(self, images, prompts, metadata) -> torch.Tensor:
        """Return the predicted ratings, float32 (n,)."""
        return self.predictor(self.of_images(images))


class ClipScore(_Clip):
    """100 max(cosine, 0) of picture and prompt, as torchmetrics has it (Hessel et al. 2021, there with 2.5): 15 to 35."""

    def __init__(self, model: str = VIT_L, **rest) -> None:
        super().__init__(model, **rest)

    def score(self, images, prompts, metadata) -> torch.Tensor:
        """Return 100 max(cosine, 0), float32 (n,)."""
        return 100 * self.cosine(images, prompts).clamp(min=0)


class PickScore(_Clip):
    """PickScore v1 (Kirstain et al. 2023): cosine times the model's own scale, about 100; 18 to 24."""

    def __init__(self, model: str = "yuvalkirstain/PickScore_v1", processor: str | None = VIT_H, **rest) -> None:
        super().__init__(model, processor, **rest)

    def score(self, images, prompts, metadata) -> torch.Tensor:
        """Return the scaled cosines, float32 (n,)."""
        return self.clip.logit_scale.float().exp() * self.cosine(images, prompts)


class HPSv2(_Clip):
    """Human Preference Score v2.1 (Wu et al. 2023): the cosine of a ViT-H/14 tuned on preferences; 0.2 to 0.35.

    ``weights`` is the published open_clip checkpoint. ``model`` gives the sizes, tokenizer and normalisation of that
    architecture; none of its weights are loaded. As in the published code the longer side becomes 224 pixels, the rest black.
    """

    def __init__(self, weights: str = "xswu/HPSv2/HPS_v2.1_compressed.pt", model: str = VIT_H, **rest) -> None:
        super().__init__(model, **rest)
        self.weights = file_or_id(weights)

    def load(self) -> None:
        """Load CLIP, and pad pictures as the published code does."""
        super().load()
        self.pixels = Pixels(self.pixels.size, "pad", self.pixels.mean, self.pixels.std)

    def load_clip(self):
        """Make a CLIP of the model's sizes with the weights of the open_clip checkpoint."""
        from transformers import CLIPConfig, CLIPModel

        with torch.device("meta"):
            clip = CLIPModel(CLIPConfig.from_pretrained(self.model))
        tensors = from_open_clip(read_tensors(self.weights))
        return load_exactly(clip, tensors, self.weights).to(self.device, self.dtype)

    def score(self, images, prompts, metadata) -> torch.Tensor:
        """Return the cosines, float32 (n,)."""
        return self.cosine(images, prompts)


# Names in open_clip and in transformers, of a tower and of a block.
_TOWERS = {
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.ln_pre": "vision_model.pre_layrnorm",
    "visual.ln_post": "vision_model.post_layernorm",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final": "text_model.final_layer_norm",
    "logit_scale": "logit_scale",
}
_BLOCKS = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}


def from_open_clip(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the tensors of an open_clip model with a ViT under the names of transformers' CLIPModel.

    open_clip keeps query, key and value of a block in one matrix, and multiplies by the projections from the right.

    Raises:
        ValueError: a name that such a model does not have.
    """
    renamed: dict[str, torch.Tensor] = {}
    for name, value in tensors.items():
        if name == "attn_mask":  # a buffer that says causal
            continue
        if name in ("visual.proj", "text_projection"):
            side = "visual" if name == "visual.proj" else "text"
            renamed[f"{side}_projection.weight"] = value.T.contiguous()
        elif ".resblocks." in f".{name}":
            tower, _, rest = name.partition("transformer.resblocks.")
            number, _, inner = rest.partition(".")
            prefix = f"{'vision_model' if tower else 'text_model'}.encoder.layers.{number}"
            if inner.startswith("attn.in_proj_"):
                kind = inner.removeprefix("attn.in_proj_")
                for part, chunk in zip("qkv", value.chunk(3), strict=True):
                    renamed[f"{prefix}.self_attn.{part}_proj.{kind}"] = chunk.clone()
                continue
            stem, _, kind = inner.rpartition(".")
            if stem not in _BLOCKS:
                raise ValueError(f"{name} is no part of an open_clip ViT")
            renamed[f"{prefix}.{_BLOCKS[stem]}.{kind}"] = value
        else:
            stem, _, kind = name.rpartition(".")
            if name not in _TOWERS and stem not in _TOWERS:
                raise ValueError(f"{name} is no part of an open_clip ViT")
            renamed[_TOWERS[name] if name in _TOWERS else f"{_TOWERS[stem]}.{kind}"] = value
    return renamed
