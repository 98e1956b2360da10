"""One adapter per model family. An adapter knows its checkpoint format, its conditioning and its export, nothing of RL."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from fastloop.config import ModelConfig
from fastloop.errors import UserError

ASSETS = Path(__file__).resolve().parent.parent / "assets"
FAMILIES = {"StableDiffusionPipeline": "sd"}


def resolve_path(path: str) -> str:
    """A model path as diffusers takes it: ``assets:NAME``, a folder with model_index.json, or a hub id.

    Raises:
        UserError: the asset or the folder does not exist, or is no diffusers pipeline.
    """
    if path.startswith("assets:"):
        name = path.removeprefix("assets:")
        known = sorted(p.name for p in ASSETS.iterdir() if (p / "model_index.json").exists())
        if name not in known:
            raise UserError(f"model.path: no bundled model {name!r}: one of {', '.join(f'assets:{k}' for k in known)}")
        return str(ASSETS / name)
    folder = Path(path).expanduser()
    if folder.is_dir():
        if not (folder / "model_index.json").exists():
            raise UserError(f"model.path: {path} has no model_index.json: give the folder of a diffusers pipeline")
        return str(folder)
    if path.startswith(("/", ".", "~")) or path.count("/") != 1:
        raise UserError(f"model.path: no folder {path}: give a diffusers folder, a hub id OWNER/NAME, or assets:shapes")
    return path


def read_json(path: str, config: ModelConfig, name: str, subfolder: str | None = None) -> dict:
    """One small JSON file of a pipeline, from its folder or the hub; loads no weights.

    Raises:
        UserError: the file cannot be found, fetched or read.
    """
    where = f"{subfolder}/{name}" if subfolder else name
    try:
        if Path(path).is_dir():
            return json.loads((Path(path) / where).read_text())
        from huggingface_hub import hf_hub_download

        return json.loads(Path(hf_hub_download(path, name, subfolder=subfolder, revision=config.revision)).read_text())
    except Exception as error:  # the hub's client raises many kinds
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"model.path: cannot read {where} of {path}: {first}") from None


def family(path: str, config: ModelConfig):
    """The adapter module of a pipeline. Raises ``UserError`` where the pipeline's class is not supported."""
    name = read_json(path, config, "model_index.json").get("_class_name")
    if name not in FAMILIES:
        raise UserError(f"model.path: {path} is a {name}: supported are {', '.join(FAMILIES)}")
    if FAMILIES[name] == "sd":
        from fastloop.denoisers import sd

        return sd


def load_denoiser(config: ModelConfig, device: torch.device):
    """The adapter of ``config.path`` with its weights on a device. Raises ``UserError`` for anything that is not there."""
    path = resolve_path(config.path)
    return family(path, config).load(path, config, device)
