"""Texts become conditions: each is tokenized and embedded once, and its embedding is kept."""

from __future__ import annotations

import re
from contextlib import nullcontext

import torch
from transformers import PreTrainedTokenizerBase

from fastloop.config import ModelConfig, SamplingConfig
from fastloop.denoisers.parts import read_tokenizer
from fastloop.denoisers.residence import upload
from fastloop.denoisers.textual_inversion import add_words

ENDS = 2  # tokens that CLIP's tokenizer puts around a text
Text = tuple[str | None, int]  # a prompt, or none, and the last layers of the text encoder that are skipped
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
            texts = [(prompt, self.config.clip_skip or 0) for prompt in prompts]
            found = self._embedded(texts)
        return torch.stack([_whole(found[text]) for text in texts])

    @property
    def feature_size(self) -> int:
        """F of `features`."""
        return len(_whole(self.blank_embedding()))

    @property
    def pools_texts(self) -> bool:
        """Whether `features` are the text encoders' vector of the whole text."""
        return any(tensor.dim() == 1 for tensor in self.blank_embedding())

    def _encode(self, prompts: list[str], sampling: SamplingConfig):
        negative = sampling.negative_prompt or None
        skip = self.config.clip_skip or 0  # of the negative prompt no layer is skipped, as in stock
        texts = [(prompt, skip) for prompt in prompts] + ([(negative, 0)] if sampling.guidance_scale != 1 else [])
        found = self._embedded(texts)
        cond = self.condition([found[text] for text in texts[: len(prompts)]], sampling)
        if len(texts) == len(prompts):
            return cond, None
        return cond, self.condition([found[texts[-1]]] * len(prompts), sampling)

    def _embedded(self, texts: list[Text]) -> dict[Text, tuple[torch.Tensor, ...]]:
        """The embeddings of texts, on the device."""
        distinct = dict.fromkeys(texts)
        known = self._embeddings  # of trained text encoders none
        for text in filter(known.__contains__, distinct):
            known[text] = known.pop(text)  # the last ones used stay longest
        found = {text: tuple(upload(tensor, self.device) for tensor in known[text]) for text in distinct if text in known}
        if len(found) < len(distinct):
            with self._present(*self.text_encoders.values()), nullcontext() if self.trains_text else torch.no_grad():
                # One text at a time: the result must not depend on which prompts came along.
                new = {(text, skip): self._embedding(text, skip) for text, skip in distinct if (text, skip) not in found}
            found |= new
            if not self.trains_text:
                self._keep(new)
        return found

    def _keep(self, new: dict[Text, tuple[torch.Tensor, ...]]) -> None:
        """Keeps embeddings in the host's memory, as many as there is room for; those used last stay."""
        for text, embedding in new.items():
            self._embeddings[text] = tuple(t.cpu() for t in embedding) if self.device.type == "cuda" else embedding
        most = CACHE_BYTES // sum(tensor.nbytes for tensor in embedding)
        while len(self._embeddings) > most:
            del self._embeddings[next(iter(self._embeddings))]

    def _embedding(self, text: str | None, skip: int) -> tuple[torch.Tensor, ...]:
        """Of one text; ``None`` is the absent negative prompt."""
        if text is None and self.absent_is_zero:
            return tuple(torch.zeros_like(tensor) for tensor in self.blank_embedding())
        ids = [self.tokens(name, text or "") for name in self.tokenizers]
        return self.embed(ids, skip=skip) if skip else self.embed(ids)

    @classmethod
    def read_tokenizers(
        cls, path: str, config: ModelConfig, text_encoders: dict[str, torch.nn.Module]
    ) -> dict[str, PreTrainedTokenizerBase]:
        """Read the tokenizers of text encoders, by part, and add the words of ``model.textual_inversion`` to both.

        Raises:
            UserError: one cannot be read, or a word does not fit.
        """
        tokenizers = {
            name.replace("text_encoder", "tokenizer"): read_tokenizer(name, path, config, encoder.config)
            for name, encoder in text_encoders.items()
        }
        add_words(config.textual_inversion, tokenizers, text_encoders)
        return tokenizers

    def cut(self, prompts: list[str], tokenizers: dict[str, PreTrainedTokenizerBase]) -> list[str]:
        """Return the prompts of which no text encoder sees the end; ``tokenizers`` by part, as in a pipeline."""
        whole = set()
        for name, tokenizer in tokenizers.items():
            most = self.config.prompt_chunks * (self._length(name, tokenizer) - ENDS) + ENDS
            found = self._ids(tokenizer, prompts)
            whole |= {prompt for prompt, ids in zip(prompts, found, strict=True) if len(ids) <= most}
        return [prompt for prompt in prompts if prompt not in whole]

    def chunks(self, texts: list[str], tokenizers: dict[str, PreTrainedTokenizerBase]) -> int:
        """Return how many chunks the longest text has, each of as many tokens as a text encoder takes."""
        return max(
            -(-(len(ids) - ENDS) // (self._length(name, tokenizer) - ENDS)) or 1
            for name, tokenizer in tokenizers.items()
            for ids in self._ids(tokenizer, texts)
        )

    def text_length(self, encoder: str) -> int:
        """Return the tokens that a text encoder takes."""
        return self.text_encoders[encoder].config.max_position_embeddings

    def tokens(self, name: str, text: str) -> torch.Tensor:
        """Return the ids that a tokenizer makes of a text, int64 (chunks, L), padded or cut to what its text encoder takes.

        Of ``model.prompt_chunks`` chunks each has a first and a last token of its own.
        """
        tokenizer = self.tokenizers[name]
        length = self._length(name, tokenizer)
        if self.config.prompt_chunks == 1:
            told = {"padding": "max_length", "max_length": length, "truncation": True, "return_tensors": "pt"}
            return upload(tokenizer(self._rewritten(tokenizer, text), **told).input_ids, self.device)
        first, *ids, last = self._ids(tokenizer, [text])[0]
        rows = [ids[i * (length - ENDS) : (i + 1) * (length - ENDS)] for i in range(self.config.prompt_chunks)]
        rows = [[first, *row, last] + [tokenizer.pad_token_id] * (length - ENDS - len(row)) for row in rows]
        return upload(torch.tensor(rows), self.device)

    def _length(self, name: str, tokenizer: PreTrainedTokenizerBase) -> int:
        return min(tokenizer.model_max_length, self.text_length(name.replace("tokenizer", "text_encoder")))

    def _ids(self, tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
        rewritten = [self._rewritten(tokenizer, text) for text in texts]
        return tokenizer(rewritten, verbose=False).input_ids  # it would warn of each that is longer

    @staticmethod
    def _rewritten(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
        """A text with the n tokens of a word that has n vectors, as stock's pipelines write it, in capitals or not."""
        added = {word.lower(): word for word in tokenizer.added_tokens_encoder}
        several = [word for word in added if f"{word}_1" in added]
        if not several:
            return text

        def tokens(match: re.Match) -> str:
            found = [added[match[0].lower()]]
            while (name := f"{match[0].lower()}_{len(found)}") in added:
                found.append(added[name])
            return " ".join(found)

        words = "|".join(re.escape(word) for word in sorted(several, key=len, reverse=True))
        return re.sub(rf"(?:{words})(?!_\d)", tokens, text, flags=re.IGNORECASE)


def _whole(embedding: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """One vector, float32 (F,), of what `Denoiser.embed` gives."""
    vectors = [tensor for tensor in embedding if tensor.dim() == 1]
    return (vectors[0] if vectors else embedding[0].float().mean(0)).float()
