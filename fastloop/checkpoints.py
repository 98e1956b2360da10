"""Checkpoints: complete, atomic, newest last. A killed run leaves whole checkpoints or none, never half of one.

checkpoints/iteration-000010/weights.safetensors   the trained weights
                             ema.safetensors       their moving average, where there is one
                             state.pt              optimizer, tracker, counters, RNG (tensors and plain values only)
                             deepspeed/            with engine.name=deepspeed: each rank's part of the optimizer
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from fastloop.errors import UserError
from fastloop.ranks import ALONE, Ranks

_PREFIX = "iteration-"


def save_checkpoint(
    folder: Path,
    iteration: int,
    weights: dict[str, torch.Tensor],
    ema: dict[str, torch.Tensor] | None,
    state: dict[str, Any],
    keep: int,
    ranks: Ranks = ALONE,
    save_engine: Callable[[Path], Any] | None = None,
) -> Path:
    """Writes ``folder/iteration-NNNNNN`` (temporary folder, fsync, rename) and removes all but the ``keep`` newest.

    All ranks call it. Each writes its part by ``save_engine(folder)``, whose result becomes ``state["engine"]``; the main rank
    writes the rest.
    """
    final = folder / f"{_PREFIX}{iteration:06d}"
    temporary = folder / f".writing-{iteration}-{ranks.from_main(os.getpid)}"

    def begin() -> bool:
        folder.mkdir(parents=True, exist_ok=True)
        if final.exists():  # the same iteration again, after a resume: same content
            return False
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        return True

    if ranks.from_main(begin):
        if save_engine is not None:
            state = {**state, "engine": save_engine(temporary)}
        ranks.wait()
        if ranks.main:
            _finish(temporary, final, weights, ema, state, keep)
    ranks.wait()
    return final


def _finish(temporary: Path, final: Path, weights, ema, state, keep: int) -> None:
    """The main rank's part, once every rank has written its own."""
    for name, tensors in (("weights", weights), ("ema", ema)):
        if tensors is not None:
            tensors = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
            save_file(tensors, temporary / f"{name}.safetensors")
    torch.save(state, temporary / "state.pt")
    for path in (*temporary.rglob("*"), temporary):
        _sync(path)
    os.replace(temporary, final)
    _sync(final.parent)
    for old in list_checkpoints(final.parent)[:-keep]:
        leaving = old.with_name(f".writing-old-{old.name}")  # never half of one under its name
        os.replace(old, leaving)
        shutil.rmtree(leaving)


def list_checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints, oldest first."""
    return sorted(p for p in folder.glob(f"{_PREFIX}*") if p.is_dir() and p.name.removeprefix(_PREFIX).isdecimal())


def iteration_of(checkpoint: Path) -> int:
    """The number of finished iterations that a checkpoint holds."""
    return int(checkpoint.name.removeprefix(_PREFIX))


def remove_leftovers(folder: Path) -> None:
    """Removes what a killed process was writing or removing."""
    for path in folder.glob(".writing-*"):
        shutil.rmtree(path, ignore_errors=True)


def load_checkpoint(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor] | None, dict[str, Any]]:
    """Weights, their average or ``None``, and the state. Nothing is unpickled but tensors and plain values.

    Raises:
        UserError: the folder is no checkpoint or is damaged.
    """
    try:
        weights = load_file(path / "weights.safetensors")
        ema = load_file(path / "ema.safetensors") if (path / "ema.safetensors").exists() else None
        return weights, ema, torch.load(path / "state.pt", weights_only=True)
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"cannot read the checkpoint {path}: {reason}; remove it to resume from the one before") from None


def load_weights(parameters: dict[str, torch.nn.Parameter], weights: dict[str, torch.Tensor]) -> None:
    """Copies saved weights into parameters. Raises ``UserError`` where names or shapes differ."""
    saved = {name: tuple(value.shape) for name, value in weights.items()}
    wanted = {name: tuple(p.shape) for name, p in parameters.items()}
    if saved != wanted:
        odd = next(name for name in sorted({*saved, *wanted}) if saved.get(name) != wanted.get(name))
        raise UserError(
            f"the checkpoint does not fit the model at {odd} ({saved.get(odd)} saved, {wanted.get(odd)} here): "
            "model.path, model.adapter and model.lora must be as in the run"
        )
    with torch.no_grad():
        for name, p in parameters.items():
            p.copy_(weights[name])


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
