"""Textual inversion: words of the user's own, with vectors in a file that were trained for a model's text encoders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerBase

from fastloop.errors import UserError, one_line

NAMES = ("learned_embeds.safetensors", "learned_embeds.bin")  # in a folder, as diffusers writes it


def add_words(
    words: dict[str, str], tokenizers: dict[str, PreTrainedTokenizerBase], text_encoders: dict[str, torch.nn.Module]
) -> None:
    """Add words to tokenizers, and their vectors to the embeddings of text encoders, by the same names as stock does.

    A word of n vectors is n tokens, ``word``, ``word_1`` and so on, into which prompts are rewritten. Each text encoder takes
    those vectors of a file that are as wide as its own: of diffusers' files, A1111's, and SDXL's with ``clip_l`` and
    ``clip_g``.

    Args:
        words: files or folders by word. text_encoders: by the name of their part; on the meta device they stay as they are.

    Raises:
        UserError: a file is not there or has no vectors for a text encoder, or a word is there already.
    """
    for word, path in words.items():
        key = f"model.textual_inversion.{word}"
        found = _vectors(key, path)
        for name, encoder in text_encoders.items():
            tokenizer, width = tokenizers[name.replace("text_encoder", "tokenizer")], encoder.config.hidden_size
            of = next((vectors for vectors in found if vectors.shape[1] == width), None)
            if of is None:
                widths = ", ".join(str(vectors.shape[1]) for vectors in found)
                raise UserError(
                    f"{key}: {path} has vectors of {widths} numbers and the {name} {width}: it is of another model"
                )
            tokens = [word, *(f"{word}_{i}" for i in range(1, len(of)))]
            if known := [token for token in tokens if token in tokenizer.get_vocab()]:
                raise UserError(f"{key}: the tokenizer knows the word {known[0]!r} already: choose another")
            tokenizer.add_tokens(tokens)
            if encoder.device.type != "meta":
                encoder.resize_token_embeddings(len(tokenizer), mean_resizing=False)
                with torch.no_grad():
                    encoder.get_input_embeddings().weight[tokenizer.convert_tokens_to_ids(tokens)] = of.to(encoder.dtype)


def _vectors(key: str, path: str) -> list[torch.Tensor]:
    """All tables of vectors in a file, (n, width)."""
    file = Path(path).expanduser()
    if file.is_dir():
        file = next((file / name for name in NAMES if (file / name).exists()), file / NAMES[0])
    if not file.is_file():
        raise UserError(f"{key}: no file {file}: give a file of vectors, or a folder with {NAMES[0]}")
    try:
        of_tensors = file.suffix == ".safetensors"
        found = _tables(load_file(file) if of_tensors else torch.load(file, map_location="cpu", weights_only=True))
    except Exception as error:  # safetensors and pickle raise many kinds
        raise UserError(f"{key}: cannot read {file}: {one_line(error)[:200]}") from None
    if not found:
        raise UserError(f"{key}: {file} holds no vectors: give a file of textual inversion")
    return found


def _tables(value: Any) -> list[torch.Tensor]:
    if isinstance(value, dict):
        return [table for inner in value.values() for table in _tables(inner)]
    if isinstance(value, torch.Tensor) and value.is_floating_point() and value.dim() in (1, 2):
        return [value.detach().reshape(-1, value.shape[-1])]
    return []
