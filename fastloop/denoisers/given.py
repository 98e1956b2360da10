"""What a configuration gives a model beside its own files: a VAE, adapters, words, and how texts are read."""

from __future__ import annotations

import hashlib
from pathlib import Path

from fastloop.config import Config, ModelConfig
from fastloop.denoisers.files import model_source, part_source
from fastloop.denoisers.lora_files import adapters_file
from fastloop.denoisers.single_file import is_single_file
from fastloop.denoisers.textual_inversion import vectors_file
from fastloop.denoisers.weights import choose_files


def given_notes(config: ModelConfig) -> tuple[str, ...]:
    """Say what a model is given that its files do not have, a line each."""
    notes = [f"the word {word} has the vectors of {path}" for word, path in config.textual_inversion.items()]
    if config.vae.path is not None:
        notes.append(f"the VAE is that of {config.vae.path}")
    if config.lora.path is not None:
        notes.append(f"adapters of {config.lora.path}, {'fused into the weights' if config.lora.fuse else 'trained on'}")
    if config.clip_skip is not None:
        notes.append(f"of prompts the last {config.clip_skip} layer{'s' if config.clip_skip > 1 else ''} of CLIP are skipped")
    if config.prompt_chunks > 1:
        notes.append(f"every text is encoded in {config.prompt_chunks} chunks")
    return tuple(notes)


def given_hashes(config: Config) -> dict[str, str]:
    """Return SHA-256 of the files that a run reads again whenever it goes on, by the key that names them.

    Not among them are adapters that are trained on, which are in its checkpoints, what is on the hub, and the model itself.

    Raises:
        UserError: there is no such file.
    """
    model, files = config.model, {}
    if model.vae.path is not None:
        where, folder, own = part_source("vae", model_source(model), model)
        if is_single_file(where):
            files["model.vae.path"] = [Path(where)]
        elif (folder := Path(where) / folder).is_dir():
            files["model.vae.path"] = [folder / name for name in ("config.json", *choose_files("vae", where, own).names)]
    if model.lora.fuse:
        files["model.lora.path"] = [adapters_file(model.lora.path)]
    for word, path in model.textual_inversion.items():
        files[f"model.textual_inversion.{word}"] = [vectors_file(f"model.textual_inversion.{word}", path)]
    if config.dlpo.data is not None:
        files["dlpo.data"] = [Path(config.dlpo.data).expanduser()]
    return {key: _sha256(of) for key, of in files.items()}


def _sha256(files: list[Path]) -> str:
    found = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                found.update(block)
    return found.hexdigest()
