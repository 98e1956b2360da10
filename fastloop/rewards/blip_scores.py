"""Rewards on BLIP: ImageReward, and T2I-CompBench's BLIP-VQA for attribute binding."""

from __future__ import annotations

import re
from functools import cache

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
from fastloop.rewards.noun_phrases import BySpacy, by_rule

MAX_TOKENS = 35  # of a prompt or a question, as both were trained


class ImageReward(ModelReward):
    """ImageReward v1.0 (Xu et al. 2023): BLIP's text encoder looks at the picture, and a head scores its first token.

    Standardised to mean 0 and deviation 1 over the authors' data: about -2 to 2. ``weights`` is the published checkpoint,
    whose sizes are read off it; ``tokenizer`` is that of BERT.
    """

    MEAN, STD = 0.16717362830052426, 1.0333394966054072

    def __init__(
        self,
        weights: str = "THUDM/ImageReward/ImageReward.pt",
        tokenizer: str = "google-bert/bert-base-uncased",
        **rest,
    ) -> None:
        super().__init__(**rest)
        self.weights, self.tokenizer_path = file_or_id(weights), folder_or_id(tokenizer)

    def load(self) -> None:
        """Load both encoders and the head from the checkpoint, and the tokenizer."""
        from transformers import AutoTokenizer

        self.tokenizer = from_files(AutoTokenizer, self.tokenizer_path)
        parts = split_image_reward(read_tensors(self.weights))
        vision, text = blip_encoders(parts)
        self.vision = load_exactly(vision, parts["vision"], self.weights).to(self.device, self.dtype)
        self.text = load_exactly(text, parts["text"], self.weights).to(self.device, self.dtype)
        head = Predictor(self.text.config.hidden_size)
        self.head = load_exactly(head, parts["head"], self.weights).float().to(self.device)
        self.pixels = Pixels(self.vision.config.image_size, "crop")

    def score(self, images: np.ndarray, prompts: list[str], metadata: list[dict]) -> torch.Tensor:
        """Return the standardised scores, float32 (n,)."""
        tokens = self.tokenizer(prompts, padding="max_length", truncation=True, max_length=MAX_TOKENS, return_tensors="pt")
        tokens = tokens.to(self.device)
        seen = self.vision(self.pixels(images).to(self.device, self.dtype)).last_hidden_state
        states = self.text(tokens.input_ids, tokens.attention_mask, encoder_hidden_states=seen).last_hidden_state
        return (self.head(states[:, 0].float()) - self.MEAN) / self.STD


# Parts of a block, in the published checkpoint and in transformers.
_BLOCK = {
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
    "attn.qkv": "self_attn.qkv",
    "attn.proj": "self_attn.projection",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
_AROUND = {
    "cls_token": "embeddings.class_embedding",
    "pos_embed": "embeddings.position_embedding",
    "patch_embed.proj.weight": "embeddings.patch_embedding.weight",
    "patch_embed.proj.bias": "embeddings.patch_embedding.bias",
    "norm.weight": "post_layernorm.weight",
    "norm.bias": "post_layernorm.bias",
}


def split_image_reward(tensors: dict[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    """Rename the tensors of ImageReward.pt as those of transformers' BlipVisionModel and BlipTextModel and of the head.

    Raises:
        ValueError: a name that the checkpoint does not have.
    """
    parts: dict[str, dict[str, torch.Tensor]] = {"vision": {}, "text": {}, "head": {}}
    for name, value in tensors.items():
        if name.startswith("mlp."):
            parts["head"][name.removeprefix("mlp.")] = value
        elif name.startswith("blip.text_encoder."):
            if not name.endswith("position_ids"):  # a buffer of numbers
                parts["text"][name.removeprefix("blip.text_encoder.")] = value
        elif match := re.fullmatch(r"blip\.visual_encoder\.blocks\.(\d+)\.(.+)\.(weight|bias)", name):
            number, inner, kind = match.groups()
            parts["vision"][f"encoder.layers.{number}.{_BLOCK.get(inner, inner)}.{kind}"] = value
        elif (inner := name.removeprefix("blip.visual_encoder.")) in _AROUND:
            parts["vision"][_AROUND[inner]] = value
        else:
            raise ValueError(f"{name} is no part of ImageReward")
    if not all(parts.values()):
        raise ValueError(f"the checkpoint of ImageReward lacks its {next(k for k, part in parts.items() if not part)} part")
    return parts


def blip_encoders(parts: dict[str, dict[str, torch.Tensor]]) -> tuple[torch.nn.Module, torch.nn.Module]:
    """Make the vision and text encoder in the sizes of their tensors, on the meta device.

    Heads have 64 channels, as in every BLIP.
    """
    from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

    vision, text = parts["vision"], parts["text"]
    try:
        width, positions = vision["embeddings.class_embedding"].shape[-1], vision["embeddings.position_embedding"].shape[1]
        patch = vision["embeddings.patch_embedding.weight"].shape[-1]
        vocabulary, hidden = text["embeddings.word_embeddings.weight"].shape
        vision_config = BlipVisionConfig(
            hidden_size=width,
            intermediate_size=vision["encoder.layers.0.mlp.fc1.weight"].shape[0],
            num_hidden_layers=_layers(vision, "encoder.layers."),
            num_attention_heads=max(1, width // 64),
            image_size=patch * round((positions - 1) ** 0.5),
            patch_size=patch,
            layer_norm_eps=1e-6,  # of the published code; that of transformers' own conversions is 1e-5
        )
        text_config = BlipTextConfig(
            vocab_size=vocabulary,
            hidden_size=hidden,
            encoder_hidden_size=width,
            intermediate_size=text["encoder.layer.0.intermediate.dense.weight"].shape[0],
            num_hidden_layers=_layers(text, "encoder.layer."),
            num_attention_heads=max(1, hidden // 64),
            max_position_embeddings=text["embeddings.position_embeddings.weight"].shape[0],
        )
    except KeyError as error:
        raise ValueError(f"the checkpoint of ImageReward lacks {error.args[0]}") from None
    with torch.device("meta"):
        return BlipVisionModel(vision_config), BlipTextModel(text_config, add_pooling_layer=False)


def _layers(tensors: dict[str, torch.Tensor], prefix: str) -> int:
    return len({name.removeprefix(prefix).split(".")[0] for name in tensors if name.startswith(prefix)})


class BlipVqa(ModelReward):
    """T2I-CompBench's BLIP-VQA (Huang et al. 2023): the product over a prompt's noun phrases of P(yes | "PHRASE?"), in [0, 1].

    P(yes) is yes / (yes + no) of the answer's first token, as in its code. The phrases are those of a light rule, or with
    ``noun_phrases: spacy`` of en_core_web_sm as published; at most ``max_phrases`` of a prompt count. Differs from the
    published code in the picture's size: that of the model's processor (384) instead of 480.
    """

    def __init__(
        self,
        model: str = "Salesforce/blip-vqa-capfilt-large",
        noun_phrases: str = "rule",
        max_phrases: int = 8,
        **rest,
    ) -> None:
        super().__init__(**rest)
        self.model_path, self.max_phrases = folder_or_id(model), max_phrases
        if noun_phrases not in ("rule", "spacy"):
            raise ValueError(f"noun_phrases {noun_phrases!r} is not rule or spacy")
        self._find = cache(by_rule if noun_phrases == "rule" else BySpacy())

    def phrases(self, prompt: str) -> list[str]:
        """Return the noun phrases of a prompt that are asked about, at most ``max_phrases``."""
        return self._find(prompt)[: self.max_phrases]

    def validate(self, prompts: list[str], size: tuple[int, int]) -> None:
        """Raise ``ValueError`` for the first prompt that names nothing."""
        for prompt in prompts:
            if not self.phrases(prompt):
                raise ValueError(
                    f"blip_vqa finds nothing to ask about in the prompt {prompt!r}: name things, as in 'a red cup'"
                )

    def load(self) -> None:
        """Load model and tokenizer. Raises ``ValueError`` where the tokenizer does not know yes and no."""
        from transformers import AutoTokenizer, BlipForQuestionAnswering

        self.model = self.pretrained(BlipForQuestionAnswering, self.model_path)
        self.tokenizer = from_files(AutoTokenizer, self.model_path)
        self.pixels = Pixels.of(self.model_path)
        self.answers = self.tokenizer.convert_tokens_to_ids(["yes", "no"])
        if self.tokenizer.unk_token_id in self.answers:
            raise ValueError(f"the tokenizer of {self.model_path} does not know yes and no as words")

    def score(self, images: np.ndarray, prompts: list[str], metadata: list[dict]) -> torch.Tensor:
        """Return the products of P(yes), float64 (n,), each over the phrases of a prompt."""
        seen = self.model.vision_model(self.pixels(images).to(self.device, self.dtype)).last_hidden_state
        # by their length: transformers' cross attention looks at the padding of a shorter question
        asked: dict[int, list[tuple[int, list[int]]]] = {}
        for i, prompt in enumerate(prompts):
            for phrase in self.phrases(prompt):
                ids = self._question(phrase)
                asked.setdefault(len(ids), []).append((i, ids))
        product = torch.ones(len(images), dtype=torch.float64)
        for same in asked.values():
            for start in range(0, len(same), self.batch):
                rows, ids = zip(*same[start : start + self.batch], strict=True)
                answers = self._yes(seen[list(rows)], torch.tensor(ids, device=self.device))
                for row, p in zip(rows, answers.double().cpu(), strict=True):
                    product[row] *= p
        return product

    def _question(self, phrase: str) -> list[int]:
        """The tokens of "PHRASE?", cleaned as BLIP's training questions were."""
        text = re.sub(r"[.!\"()*#:;~]", "", phrase.lower()) + "?"
        ids = self.tokenizer(text, truncation=True, max_length=MAX_TOKENS).input_ids
        return [self.model.config.text_config.vocab_size - 1, *ids[1:]]  # [ENC], BLIP's last token, for [CLS]

    def _yes(self, seen: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """P(yes), float32 (n,), of questions (n, length) about pictures already encoded."""
        states = self.model.text_encoder(ids, encoder_hidden_states=seen).last_hidden_state
        start = torch.full((len(ids), 1), self.model.config.text_config.bos_token_id, device=self.device)
        logits = self.model.text_decoder(start, encoder_hidden_states=states).logits[:, 0]
        return logits[:, self.answers].float().softmax(-1)[:, 0]
