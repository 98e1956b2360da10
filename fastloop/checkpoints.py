"""Checkpoints: complete, atomic, newest last. A killed run leaves whole checkpoints or none, never half of one.

checkpoints/iteration-000010/weights.safetensors   the trained weights
                             ema.safetensors       their moving average, where there is one
                             state.pt              optimizer, tracker, counters, RNG (tensors and plain values only)
                             deepspeed/            with engine.name=deepspeed: each rank's part of the optimizer
                             replay-0.pt           of each rank, with replay.rollouts: what is trained on again
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fastloop.errors import UserError
from fastloop.ranks import ALONE, Ranks

_PREFIX = "iteration-"
_WEIGHTS = ("weights.safetensors", "ema.safetensors")


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
    """Write ``folder/iteration-NNNNNN`` (temporary folder, fsync, rename) and remove all but the ``keep`` newest.

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
    of = {"iteration": str(iteration_of(final))}
    for name, tensors in zip(_WEIGHTS, (weights, ema), strict=True):
        if tensors is not None:
            tensors = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
            save_file(tensors, temporary / name, of)
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
    """List whole checkpoints, oldest first."""
    return sorted(p for p in folder.glob(f"{_PREFIX}*") if p.is_dir() and p.name.removeprefix(_PREFIX).isdecimal())


def iteration_of(checkpoint: Path) -> int:
    """Return the number of finished iterations that a checkpoint holds."""
    return int(checkpoint.name.removeprefix(_PREFIX))


def remove_leftovers(folder: Path) -> None:
    """Remove what a killed process was writing or removing."""
    for path in folder.glob(".writing-*"):
        shutil.rmtree(path, ignore_errors=True)


def check_checkpoint(path: Path, averaged: bool) -> None:
    """Read what says whether a checkpoint is whole and of one piece, and none of its weights.

    Args:
        averaged: whether its run keeps a moving average.

    Raises:
        UserError: a file is missing, damaged, or that of another iteration than its folder.
    """
    with readable(path):
        for name in _WEIGHTS[: 1 + averaged]:
            with safe_open(path / name, "pt") as file:  # those of earlier versions do not say which iteration they are of
                same_iteration(path, name, (file.metadata() or {}).get("iteration", iteration_of(path)))
        state = torch.load(path / "state.pt", weights_only=True, mmap=True)
        same_iteration(path, "state.pt", state["iteration"])


def load_checkpoint(
    path: Path, averaged: bool
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor] | None, dict[str, Any]]:
    """Read weights, their average where ``averaged``, else ``None``, and the state.

    Nothing is unpickled but tensors and plain values. Raises as `check_checkpoint`.
    """
    check_checkpoint(path, averaged)
    with readable(path):
        weights, *average = (load_file(path / name) for name in _WEIGHTS[: 1 + averaged])
        return weights, average[0] if averaged else None, torch.load(path / "state.pt", weights_only=True)


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Make one line, a ``UserError``, of whatever reading a checkpoint raises."""
    try:
        yield
    except Exception as error:  # safetensors, pickle and zip raise many kinds
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"cannot read the checkpoint {path}: {reason}; remove it to resume from the one before") from None


def same_iteration(path: Path, name: str, found: Any) -> None:
    """Raise ``ValueError`` where a file of a checkpoint is of another iteration than its folder."""
    if int(found) != iteration_of(path):
        raise ValueError(f"{name} is of iteration {found}")


def load_weights(parameters: dict[str, torch.nn.Parameter], weights: dict[str, torch.Tensor]) -> None:
    """Copy saved weights into parameters. Raises ``UserError`` where names or shapes differ."""
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
