"""Texts become conditions: each is tokenized and embedded once, and its embedding is kept."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from transformers import PreTrainedTokenizerBase

from fastloop.config import SamplingConfig
from fastloop.denoisers.residence import upload

CACHE_BYTES = 8 * 2**30  # of embeddings that are kept, in the host's memory


class TextEncoding:
    """The part of a `Denoiser` that deals with texts."""

    def encode(self, prompts: list[str], sampling: SamplingConfig):
        """Return the conditioning of n prompts and, where guidance is on, of the negative prompt; each text is encoded once.

        Where text encoders are trained: once a call, with gradients where they are on. Else once and for all.
        """
        with self.observer.phase("encode"):
            return self._encode(prompts, sampling)

    @torch.no_grad()
    def features(self, prompts: list[str]) -> torch.Tensor:
        """Return one vector for each of n prompts, float32 (n, F), without gradients, for small networks beside the model.

        The text encoders' vector of the whole text where the family has one, else the mean of the tokens' vectors.
        """
        with self.observer.phase("encode"):
            found = self._embedded(prompts)
        return torch.stack([_whole(found[prompt]) for prompt in prompts])

    @property
    def feature_size(self) -> int:
        """F of `features`."""
        return len(_whole(self.blank_embedding()))

    @property
    def pools_texts(self) -> bool:
        """Whether `features` are the text encoders' vector of the whole text."""
        return any(tensor.dim() == 1 for tensor in self.blank_embedding())

    def _encode(self, prompts: list[str], sampling: SamplingConfig):
        texts = [*prompts, sampling.negative_prompt or None] if sampling.guidance_scale != 1 else prompts
        found = self._embedded(texts)
        cond = self.condition([found[prompt] for prompt in prompts], sampling)
        if len(texts) == len(prompts):
            return cond, None
        return cond, self.condition([found[texts[-1]]] * len(prompts), sampling)

    def _embedded(self, texts: list[str | None]) -> dict[str | None, tuple[torch.Tensor, ...]]:
        """The embeddings of texts, on the device."""
        distinct = dict.fromkeys(texts)
        known = self._embeddings  # of trained text encoders none
        for text in filter(known.__contains__, distinct):
            known[text] = known.pop(text)  # the last ones used stay longest
        found = {text: tuple(upload(tensor, self.device) for tensor in known[text]) for text in distinct if text in known}
        if len(found) < len(distinct):
            with self._present(*self.text_encoders.values()), nullcontext() if self.trains_text else torch.no_grad():
                # One text at a time: the result must not depend on which prompts came along.
                new = {text: self._embedding(text) for text in distinct if text not in found}
            found |= new
            if not self.trains_text:
                self._keep(new)
        return found

    def _keep(self, new: dict[str | None, tuple[torch.Tensor, ...]]) -> None:
        """Keeps embeddings in the host's memory, as many as there is room for; those used last stay."""
        for text, embedding in new.items():
            self._embeddings[text] = tuple(t.cpu() for t in embedding) if self.device.type == "cuda" else embedding
        most = CACHE_BYTES // sum(tensor.nbytes for tensor in embedding)
        while len(self._embeddings) > most:
            del self._embeddings[next(iter(self._embeddings))]

    def _embedding(self, text: str | None) -> tuple[torch.Tensor, ...]:
        """Of one text; ``None`` is the absent negative prompt."""
        if text is None and self.absent_is_zero:
            return tuple(torch.zeros_like(tensor) for tensor in self.blank_embedding())
        return self.embed([self.tokens(name, text or "") for name in self.tokenizers])

    def cut(self, prompts: list[str], tokenizers: dict[str, PreTrainedTokenizerBase]) -> list[str]:
        """Return the prompts of which no text encoder sees the end; ``tokenizers`` by part, as in a pipeline."""
        whole = set()
        for name, tokenizer in tokenizers.items():
            length = min(tokenizer.model_max_length, self.text_length(name.replace("tokenizer", "text_encoder")))
            found = tokenizer(prompts, verbose=False).input_ids  # it would warn of each that is longer
            whole |= {prompt for prompt, ids in zip(prompts, found, strict=True) if len(ids) <= length}
        return [prompt for prompt in prompts if prompt not in whole]

    def text_length(self, encoder: str) -> int:
        """Return the tokens that a text encoder takes."""
        return self.text_encoders[encoder].config.max_position_embeddings

    def tokens(self, name: str, text: str) -> torch.Tensor:
        """Return the ids that a tokenizer makes of a text, int64 (1, L), padded or cut to what its text encoder takes."""
        tokenizer = self.tokenizers[name]
        length = min(tokenizer.model_max_length, self.text_length(name.replace("tokenizer", "text_encoder")))
        ids = tokenizer(text, padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids
        return upload(ids, self.device)


def _whole(embedding: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """One vector, float32 (F,), of what `Denoiser.embed` gives."""
    vectors = [tensor for tensor in embedding if tensor.dim() == 1]
    return (vectors[0] if vectors else embedding[0].float().mean(0)).float()
