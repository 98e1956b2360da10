"""Which files hold the weights of a part: with a variant or without, safetensors or pickled tensors, as diffusers chooses."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from safetensors import safe_open

from fastloop.config import ModelConfig
from fastloop.denoisers.files import naming_key, part_source
from fastloop.denoisers.single_file import check_single_part, is_pointer, is_single_file, single_file_notes
from fastloop.errors import UserError, one_line

_SHARD = r"(?:-\d{5}-of-\d{5})?"
_FILE = re.compile(rf"(?:diffusion_pytorch_model|pytorch_model|model){_SHARD}(?:\.(\w[\w-]*?))?{_SHARD}\.(safetensors|bin)")


@dataclass(frozen=True)
class WeightFiles:
    """The files of a part that are read: those of a variant, or of none; safetensors, or pickled tensors."""

    variant: str | None
    safetensors: bool
    names: tuple[str, ...]


def choose_files(part: str, path: str, config: ModelConfig) -> WeightFiles:
    """Choose the files of a part of a pipeline: safetensors before pickled ones, of each those of ``model.variant`` first.

    Raises:
        UserError: there are none, or none but those of a variant, which is named.
    """
    found: dict[tuple[str | None, bool], list[str]] = {}
    path, folder, own = part_source(part, path, config)
    for name in _names(path, folder, own.revision):
        if match := _FILE.fullmatch(name):
            found.setdefault((match[1], match[2] == "safetensors"), []).append(name)
    for safetensors in (True, False):
        for variant in (config.variant, None):
            if names := found.get((variant, safetensors)):
                return WeightFiles(variant, safetensors, tuple(sorted(names)))
    variants = sorted({variant for variant, _ in found})
    with naming_key(part, config):
        if variants:
            raise UserError(
                f"model.variant: the {part} of {path} has files of the variant {' and '.join(variants)} alone: set "
                f"model.variant={variants[0]}"
            )
        raise UserError(
            f"model.path: cannot load the {part} of {path}: there are no weights in its folder, .safetensors or .bin"
        )


def file_notes(parts: list[str], path: str, config: ModelConfig) -> tuple[str, ...]:
    """Say of which parts other files are read than ``model.variant`` and safetensors; a line each."""
    notes = [*single_file_notes(path)] if is_single_file(path) else []
    for part in parts:
        if is_single_file(part_source(part, path, config)[0]):
            continue
        chosen = choose_files(part, path, config)
        if chosen.variant != config.variant:
            notes.append(f"the {part} has no files of the variant {config.variant}: those without one are read")
        if not chosen.safetensors:
            notes.append(f"the {part} has no safetensors: its .bin is read, of which nothing but tensors is unpickled")
    return tuple(notes)


def check_files(parts: dict[str, torch.nn.Module], path: str, config: ModelConfig) -> None:
    """Look into the files of parts, given without weights; of those in a folder at their names too. Reads no weights.

    Raises:
        UserError: as `choose_files`; no part has the variant; a file is a pointer of git-LFS, damaged, or another part's;
            a single file lacks a part.
    """
    sources = {part: part_source(part, path, config)[:2] for part in parts}
    for part, (where, _) in sources.items():
        if is_single_file(where):
            with naming_key(part, config):
                check_single_part(part, where, parts[part])
    chosen = {part: choose_files(part, path, config) for part, (where, _) in sources.items() if not is_single_file(where)}
    if config.variant is not None and all(files.variant is None for files in chosen.values()):
        raise UserError(f"model.variant: no part of {path} has files of the variant {config.variant}: leave it out")
    for part, files in chosen.items():
        path, folder = sources[part]
        with naming_key(part, config):
            _check_part(part, path, Path(path) / folder, files, parts[part])


def _check_part(part: str, path: str, folder: Path, chosen: WeightFiles, skeleton: torch.nn.Module) -> None:
    if not folder.is_dir():
        return
    keys: set[str] = set()
    for name in chosen.names:
        if is_pointer(folder / name):
            raise UserError(f"model.path: cannot load the {part} of {path}: {name} is a pointer of git-LFS: run git lfs pull")
        if chosen.safetensors:
            try:
                with safe_open(folder / name, "pt") as file:
                    keys |= set(file.keys())
            except Exception as error:  # safetensors raises its own kinds
                raise UserError(f"model.path: cannot load the {part} of {path}: {name}: {one_line(error)}") from None
    # without the levels that some classes of a part have above it
    wanted, bare = (
        {name.removeprefix("model.").removeprefix("text_model.") for name in of} for of in (skeleton.state_dict(), keys)
    )
    if chosen.safetensors and len(wanted & bare) < len(wanted) / 2:
        raise UserError(
            f"model.path: cannot load the {part} of {path}: {chosen.names[0]} has other weights than such a part, "
            f"{sorted(keys)[0] if keys else 'none'} for one: is it another model's?"
        )


def _names(path: str, folder: str, revision: str | None) -> list[str]:
    """The names of the files in a folder of a folder or of a hub id."""
    if Path(path).is_dir():
        return [file.name for file in (Path(path) / folder).glob("*")]
    inside = f"{folder}/" if folder else ""
    return [name.removeprefix(inside) for name in _hub_files(path, revision) if name.startswith(inside)]


@lru_cache(maxsize=8)
def _hub_files(path: str, revision: str | None) -> list[str]:
    """The files of a hub id, asked for once; where the hub cannot be asked, what was fetched before.

    Raises ``UserError`` where there is none of them.
    """
    from huggingface_hub import list_repo_files, snapshot_download

    try:
        return list_repo_files(path, revision=revision)
    except Exception as error:  # the hub's client raises many kinds
        try:
            folder = Path(snapshot_download(path, revision=revision, local_files_only=True))
        except Exception:
            raise UserError(f"model.path: cannot list the files of {path}: {one_line(error)}") from None
        return [file.relative_to(folder).as_posix() for file in folder.rglob("*")]
