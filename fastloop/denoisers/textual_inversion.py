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
        if not word.strip():
            raise UserError(f"{key}: {word!r} is no word: give a name for the vectors of {path}")
        found, used = _vectors(key, word, path), set()
        for name, encoder in text_encoders.items():
            tokenizer, width = tokenizers[name.replace("text_encoder", "tokenizer")], encoder.config.hidden_size
            i = next((i for i, vectors in enumerate(found) if vectors.shape[1] == width), None)
            if i is not None:
                used.add(i)
                _add(key, word, found[i], tokenizer, encoder)
            else:
                raise UserError(
                    f"{key}: {path} has vectors of {_widths(found)} numbers and the {name} {width}: it is of another model"
                )
        if len(used) < len(found):
            raise UserError(
                f"{key}: {path} has vectors of {_widths(found)} numbers, for more text encoders: it is of another model"
            )


def _add(key: str, word: str, vectors: torch.Tensor, tokenizer: PreTrainedTokenizerBase, encoder: torch.nn.Module) -> None:
    tokens = [word, *(f"{word}_{i}" for i in range(1, len(vectors)))]
    if known := [token for token in tokens if token in tokenizer.get_vocab()]:
        raise UserError(f"{key}: the tokenizer knows the word {known[0]!r} already: choose another")
    tokenizer.add_tokens(tokens)
    inner = getattr(encoder, "text_model", encoder)
    if getattr(inner, "eos_token_id", None) == 2:  # as in old configs: CLIP's whole vector is then that of the largest id
        inner.eos_token_id = tokenizer.eos_token_id
    if encoder.device.type != "meta":
        encoder.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        with torch.no_grad():
            encoder.get_input_embeddings().weight[tokenizer.convert_tokens_to_ids(tokens)] = vectors.to(encoder.dtype)


def vectors_file(key: str, path: str) -> Path:
    """Return the file with the vectors of a word. Raises ``UserError`` where there is none."""
    file = Path(path).expanduser()
    if file.is_dir():
        file = next((file / name for name in NAMES if (file / name).exists()), file / NAMES[0])
    if not file.is_file():
        raise UserError(f"{key}: no file {file}: give a file of vectors, or a folder with {NAMES[0]}")
    return file


def _widths(found: list[torch.Tensor]) -> str:
    return ", ".join(str(vectors.shape[1]) for vectors in found)


def _vectors(key: str, word: str, path: str) -> list[torch.Tensor]:
    """The tables of vectors that a file has for a word, (n, width), one for each text encoder."""
    file = vectors_file(key, path)
    try:
        of_tensors = file.suffix.lower() == ".safetensors"
        held = load_file(file) if of_tensors else torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # safetensors and pickle raise many kinds
        raise UserError(f"{key}: cannot read {file}: {one_line(error)[:200]}") from None
    tables = _tables(held, word)
    good = all(isinstance(t, torch.Tensor) and t.is_floating_point() and t.dim() in (1, 2) and len(t) for t in tables)
    if not tables or not good or not all(t.isfinite().all() for t in tables):
        names = f", it has {', '.join(map(str, list(held)[:3]))}" if isinstance(held, dict) else ""
        raise UserError(f"{key}: {file} holds no vectors for such a word{names}: give a file of textual inversion")
    return [table.detach().reshape(-1, table.shape[-1]) for table in tables]


def _tables(held: Any, word: str) -> list[Any]:
    """Of SDXL's files, A1111's and diffusers', the last by the word or of the only one."""
    if not isinstance(held, dict):
        return [held]
    if sided := [held[side] for side in ("clip_l", "clip_g") if side in held]:
        return sided
    if "string_to_param" in held:
        return list(dict(held["string_to_param"]).values())
    if "emb_params" in held:
        return [held["emb_params"]]
    return [held[word]] if word in held else list(held.values()) if len(held) == 1 else []
