"""Where a model's files are, and the small ones among them: nothing here loads weights or runs code that came with a model."""

from __future__ import annotations

import difflib
import importlib.util
import inspect
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import diffusers

from fastloop.config import ModelConfig
from fastloop.denoisers.single_file import is_single_file, unfold
from fastloop.errors import UserError, one_line

ASSETS = Path(__file__).resolve().parent.parent / "assets"
ARCHITECTURES = ASSETS / "architectures"  # published configs, without weights


def model_source(config: ModelConfig) -> str:
    """Return where a model's configs are, and its weights unless they are random: a folder or a hub id.

    Raises as `resolve_path` does.
    """
    return str(ARCHITECTURES / config.random_init) if config.random_init else resolve_path(config.path)


def resolve_path(path: str, alone: bool = False) -> str:
    """Return where a model is, ``assets:NAME`` or an address of the hub: a folder with model_index.json, a file, or a hub id.

    ``alone``: of a folder a config.json is enough, that of a single part.

    Raises:
        UserError: the asset, the folder or the file does not exist, or is no diffusers pipeline.
    """
    if path.startswith("assets:"):
        name = path.removeprefix("assets:")
        known = sorted(p.parent.name for p in ASSETS.glob("*/model_index.json"))
        if name not in known:
            raise UserError(f"model.path: no bundled model {name!r}: one of {', '.join(f'assets:{k}' for k in known)}")
        return str(ASSETS / name)
    path = _hub_id(path)
    folder = Path(path).expanduser()
    try:
        if folder.is_file():
            return str(folder)
        found = folder.is_dir()
    except (OSError, ValueError) as error:
        raise UserError(f"model.path: {getattr(error, 'strerror', None) or error}: {path[:80]!r}") from None
    if found:
        if not (folder / "model_index.json").exists() and not (alone and (folder / "config.json").exists()):
            raise UserError(f"model.path: {path} has no model_index.json: give the folder of a diffusers pipeline")
        return str(folder)
    if path.startswith(("/", ".", "~")) or path.count("/") != 1:
        raise UserError(
            f"model.path: no folder or file {path}: give a diffusers folder, a .safetensors or .ckpt file, a hub id "
            "OWNER/NAME, or assets:shapes"
        )
    return path


def _hub_id(path: str) -> str:
    """Of the hub's address of a repository its id; what is no address stays as it is."""
    address = re.fullmatch(r"(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)/([^/?#]+/[^/?#]+)(?:/([^?#]*))?.*", path)
    if not address:
        return path
    name, rest = address.groups()
    if name.startswith(("datasets/", "spaces/")):
        raise UserError(f"model.path: {path} is no model's address: give a model's, or its id OWNER/NAME")
    if file := re.fullmatch(r"(?:blob|resolve)/[^/]+/(.+)", rest or ""):
        raise UserError(
            f"model.path: {path} is the address of a file: run hf download {name} {file[1]} --local-dir . and set "
            f"model.path=./{file[1]}"
        )
    if (branch := re.fullmatch(r"tree/([^/]+)/?", rest or "")) and branch[1] != "main":
        raise UserError(f"model.path: {path} is the address of a branch: set model.path={name} model.revision={branch[1]}")
    return name


def config_folder(path: str) -> Path:
    """Return the folder of a model with its configs and tokenizers; of a single file one is made, without weights."""
    return unfold(path, ARCHITECTURES) if is_single_file(path) else Path(path)


def part_source(name: str, path: str, config: ModelConfig) -> tuple[str, str, ModelConfig]:
    """Return where the files of a part are: a path, the folder in it, and the configuration with the revision that it has.

    That of the model, unless ``model.vae.path`` says another of a VAE: the folder of one, a file, a pipeline, or a hub id.
    """
    if name != "vae" or config.vae.path is None:
        return path, name, config
    with naming_key(name, config):
        where = resolve_path(config.vae.path, alone=True)
        own = config.model_copy(update={"revision": None})
        if is_single_file(where):
            return where, name, own
        try:
            read_json(where, own, "model_index.json")
        except UserError:
            read_json(where, own, "config.json")
            return where, "", own
        return where, name, own


@contextmanager
def naming_key(name: str, config: ModelConfig) -> Iterator[None]:
    """Has a refusal of a part name ``model.vae.path`` where that is where the part is from."""
    try:
        yield
    except UserError as error:
        if name != "vae" or config.vae.path is None:
            raise
        raise UserError(str(error).replace("model.path:", "model.vae.path:", 1)) from None


def read_part_config(name: str, path: str, config: ModelConfig) -> dict:
    """Read the config.json of a part. Raises as `read_json` does."""
    where, folder, own = part_source(name, path, config)
    if where != path and is_single_file(where):  # which has none: it is of the kind of the model's own
        where, folder, own = path, name, config
    return read_json(where, own, "config.json", folder)


def read_json(path: str, config: ModelConfig, name: str, subfolder: str | None = None) -> dict:
    """Read one small JSON file of a pipeline, from its folder or the hub; loads no weights.

    Raises:
        UserError: the file cannot be found, fetched or read.
    """
    where, folder = f"{subfolder}/{name}" if subfolder else name, config_folder(path)
    try:
        file = folder / where
        if not folder.is_dir():
            from huggingface_hub import hf_hub_download

            file = Path(hf_hub_download(path, name, subfolder=subfolder, revision=config.revision))
        values = json.loads(file.read_text())
        if not isinstance(values, dict):
            raise ValueError("it holds no JSON object")
        return values
    except Exception as error:  # the hub's client raises many kinds
        reason = getattr(error, "strerror", None) or str(error).strip() or type(error).__name__
        beside = "" if Path(path).is_dir() or not Path(path).parent.is_dir() else f", and there is no folder {path} here"
        raise UserError(f"model.path: cannot read {where} of {path}: {one_line(reason)}{beside}") from None


def read_scheduler(path: str, config: ModelConfig) -> dict:
    """Read the config of a pipeline's scheduler, with the keys of ``model.scheduler`` over it.

    Raises:
        UserError: as `read_json`; a key that no scheduler of this class has.
    """
    found = read_json(path, config, "scheduler_config.json", "scheduler")
    kind = getattr(diffusers, str(found.get("_class_name")), diffusers.DDIMScheduler)
    known = {*inspect.signature(kind.__init__).parameters, *found} - {"self"}
    for key in config.scheduler:
        if key not in known or key.startswith("_"):
            close = difflib.get_close_matches(key, [name for name in known if not name.startswith("_")], n=1)
            remedy = f"; did you mean {close[0]}?" if close else ""
            raise UserError(f"model.scheduler.{key}: a {kind.__name__} has no such key{remedy}")
    return found | config.scheduler


def small_files(path: str, config: ModelConfig) -> Path:
    """Return the folder of a pipeline with its scheduler and tokenizers; of a hub id what is not there is fetched.

    Raises:
        UserError: the hub cannot be asked, and has not been before.
    """
    if (folder := config_folder(path)).is_dir():
        return folder
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(path, revision=config.revision, allow_patterns=["tokenizer*/*", "scheduler/*"]))
    except Exception as error:  # the hub's client raises many kinds
        reason = str(error).strip() or type(error).__name__
        raise UserError(f"model.path: cannot fetch the tokenizer of {path}: {one_line(reason)}") from None


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
