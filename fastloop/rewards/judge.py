"""A vision-language model that is asked about each picture and answers yes or no."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image

from fastloop.rewards.models import ModelReward, folder_or_id, from_files

QUESTION = 'Does this picture show "{prompt}"? Answer with yes or no.'


class VlmJudge(ModelReward):
    """P(yes) / (P(yes) + P(no)) of the first token that a vision-language model answers with, in [0, 1].

    Any model of transformers' AutoModelForImageTextToText whose processor has a chat template: Qwen2.5-VL, SmolVLM, LLaVA,
    InternVL ... ``question`` may hold {prompt} and the keys of a prompt's metadata, as {text}.
    """

    def __init__(self, model: str = "HuggingFaceTB/SmolVLM-500M-Instruct", question: str = QUESTION, **rest) -> None:
        super().__init__(**{"batch": 4, **rest})
        self.model_path, self.question = folder_or_id(model), question
        try:
            question.format_map(_Anything())
        except (ValueError, IndexError, AttributeError) as error:
            raise ValueError(f"question {question!r} is no template: {error}; braces are for {{prompt}}") from None

    def load(self) -> None:
        """Load model and processor. Raises ``ValueError`` where they cannot chat or do not tell yes from no."""
        from transformers import AutoModelForImageTextToText, AutoProcessor

        self.processor = from_files(AutoProcessor, self.model_path)
        if not self.processor.chat_template:
            raise ValueError(f"the processor of {self.model_path} has no chat template: choose a model tuned to instructions")
        self.processor.tokenizer.padding_side = "left"  # so that the answer follows each question
        if self.processor.tokenizer.pad_token is None:
            self.processor.tokenizer.pad_token = self.processor.tokenizer.eos_token
        self.model = self.pretrained(AutoModelForImageTextToText, self.model_path)
        self.yes, self.no = self._first_tokens("yes"), self._first_tokens("no")
        if self.yes & self.no or not self.yes or not self.no:
            raise ValueError(f"the tokenizer of {self.model_path} does not tell yes from no by their first token")

    def _first_tokens(self, answer: str) -> set[int]:
        """The first tokens of an answer as models write it: with or without a capital or a space before it."""
        tokenizer = self.processor.tokenizer
        forms = [space + word for space in ("", " ") for word in (answer, answer.capitalize(), answer.upper())]
        ids = [tokenizer(form, add_special_tokens=False).input_ids for form in forms]
        # a lone space is no answer: where the tokenizer cuts it off, the word behind it counts
        firsts = {next((t for t in form if tokenizer.decode([t]).strip()), None) for form in ids}
        return firsts - {None, tokenizer.unk_token_id}

    def score(self, images: np.ndarray, prompts: list[str], metadata: list[dict]) -> torch.Tensor:
        """Return P(yes) / (P(yes) + P(no)) of each answer's first token, float32 (n,)."""
        chats = []
        for image, prompt, more in zip(images, prompts, metadata, strict=True):
            asked = self.question.format_map({**more, "prompt": prompt})
            content = [{"type": "image", "image": Image.fromarray(image)}, {"type": "text", "text": asked}]
            chats.append([{"role": "user", "content": content}])
        inputs = self.processor.apply_chat_template(
            chats, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt", padding=True
        )
        inputs = {k: v.to(self.device, self.dtype if v.is_floating_point() else v.dtype) for k, v in inputs.items()}
        logits = self.model(**inputs, use_cache=False).logits[:, -1].float()
        yes, no = (logits[:, sorted(tokens)].logsumexp(-1) for tokens in (self.yes, self.no))
        return torch.sigmoid(yes - no)


class _Anything(dict):
    """Stands for metadata that is not known yet."""

    def __missing__(self, key: str) -> str:
        return key
