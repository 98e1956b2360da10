"""Where a model's files are, and the small ones among them: nothing here loads weights or runs code that came with a model."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

from fastloop.config import ModelConfig
from fastloop.errors import UserError

ASSETS = Path(__file__).resolve().parent.parent / "assets"
ARCHITECTURES = ASSETS / "architectures"  # published configs, without weights


def model_source(config: ModelConfig) -> str:
    """Return where a model's configs are, and its weights unless they are random: a folder or a hub id.

    Raises as `resolve_path` does.
    """
    return str(ARCHITECTURES / config.random_init) if config.random_init else resolve_path(config.path)


def resolve_path(path: str) -> str:
    """Return a model path as diffusers takes it: ``assets:NAME``, a folder with model_index.json, or a hub id.

    Raises:
        UserError: the asset or the folder does not exist, or is no diffusers pipeline.
    """
    if path.startswith("assets:"):
        name = path.removeprefix("assets:")
        known = sorted(p.parent.name for p in ASSETS.glob("*/model_index.json"))
        if name not in known:
            raise UserError(f"model.path: no bundled model {name!r}: one of {', '.join(f'assets:{k}' for k in known)}")
        return str(ASSETS / name)
    folder = Path(path).expanduser()
    try:
        found, beside = folder.is_dir(), folder.parent.is_dir()
    except (OSError, ValueError) as error:
        raise UserError(f"model.path: {getattr(error, 'strerror', None) or error}: {path[:80]!r}") from None
    if found:
        if not (folder / "model_index.json").exists():
            raise UserError(f"model.path: {path} has no model_index.json: give the folder of a diffusers pipeline")
        return str(folder)
    if path.startswith(("/", ".", "~")) or path.count("/") != 1 or beside:
        raise UserError(f"model.path: no folder {path}: give a diffusers folder, a hub id OWNER/NAME, or assets:shapes")
    return path


def read_json(path: str, config: ModelConfig, name: str, subfolder: str | None = None) -> dict:
    """Read one small JSON file of a pipeline, from its folder or the hub; loads no weights.

    Raises:
        UserError: the file cannot be found, fetched or read.
    """
    where = f"{subfolder}/{name}" if subfolder else name
    try:
        file = Path(path) / where
        if not Path(path).is_dir():
            from huggingface_hub import hf_hub_download

            file = Path(hf_hub_download(path, name, subfolder=subfolder, revision=config.revision))
        values = json.loads(file.read_text())
        if not isinstance(values, dict):
            raise ValueError("it holds no JSON object")
        return values
    except Exception as error:  # the hub's client raises many kinds
        reason = getattr(error, "strerror", None) or str(error).strip() or type(error).__name__
        raise UserError(f"model.path: cannot read {where} of {path}: {reason.splitlines()[0]}") from None


def refuse_own_code(path: str, index: dict) -> None:
    """Raise ``UserError`` where a part of a pipeline is of a class that is not of diffusers or transformers.

    Its code would stand beside the weights, or be any module that Python finds. It is never run here, and stock diffusers,
    which writes and reads a full fine-tune, does not load such a part either.
    """
    for part, named in index.items():
        if part.startswith("_") or not isinstance(named, list) or named == [None, None]:
            continue
        library = named[0] if len(named) == 2 and all(isinstance(name, str) for name in named) else None
        own = library and library.isidentifier() and importlib.util.find_spec(f"diffusers.pipelines.{library}")
        if library not in ("diffusers", "transformers") and not own:
            raise UserError(
                f"model.path: model_index.json of {path} takes its {part} from {named}, which is no class of diffusers or "
                "transformers: code that comes with a model is not run; name a class of theirs there, or choose another model"
            )
