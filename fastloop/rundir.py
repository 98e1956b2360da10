"""A run's folder: who may write into it, and its run.json."""

from __future__ import annotations

import json
import shlex
import sys
import tempfile
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from fastloop.checkpoints import iteration_of, list_checkpoints, remove_leftovers
from fastloop.config import Config, dump_config, load_config
from fastloop.errors import UserError
from fastloop.machine import versions
from fastloop.tracking import read_rows, replace_text

# What may change between the two halves of a run; everything else would make it another run.
MAY_CHANGE = ("iterations", "output_dir", "checkpoint", "tracking", "safety", "engine", "model.compile")


def claim_run_dir(config: Config, resume: bool) -> tuple[Path, Path | None, bool]:
    """Makes or takes over the folder of a run.

    Returns:
        The folder, the checkpoint to go on from (``None``: from the start), and whether a run was there before.

    Raises:
        UserError: the folder cannot be written, or holds a run that ``resume`` does not ask for, that has another
            configuration, that has gone further than ``iterations``, or whose records are damaged.
    """
    folder = Path(config.output_dir).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"output_dir: cannot write to {folder}: {reason}; choose another output_dir=") from None
    existing = folder / "config.yaml"
    earlier = load_config(existing) if existing.exists() else None
    # Training begins with run.json: where there is none, a start was refused (model.path, say) and nothing is lost.
    # A config.yaml that is not as we write it is the user's own.
    refused = earlier and not (folder / "run.json").exists() and existing.read_text() == dump_config(earlier)
    if earlier is None or refused:
        left = [
            name for name in ("metrics.jsonl", "eval.jsonl") if (folder / name).exists() and (folder / name).stat().st_size
        ]
        left += [path.name for path in list_checkpoints(folder / "checkpoints")]
        if left:
            raise UserError(f"output_dir: {folder} holds {left[0]} of a run, but not its config: choose another output_dir=")
        replace_text(existing, dump_config(config))
        return folder, None, False
    if not resume:
        raise UserError(f"output_dir: {folder} already holds a run: add --resume, or choose another output_dir=")
    try:
        for name in ("metrics.jsonl", "eval.jsonl"):
            read_rows(folder / name)
    except ValueError as error:
        raise UserError(f"--resume: {error}: mend or remove that line") from None
    before = _flat(earlier.model_dump(mode="json"))
    now = _flat(config.model_dump(mode="json"))
    for key in sorted({*before, *now}):
        if before.get(key) != now.get(key) and not key.startswith(MAY_CHANGE):
            raise UserError(
                f"--resume: {key} is {before.get(key)!r} in {existing} and {now.get(key)!r} now: "
                "set it back, or start a new run with another output_dir="
            )
    found = list_checkpoints(folder / "checkpoints")
    done = iteration_of(found[-1]) if found else 0
    if config.iterations < done:
        raise UserError(f"iterations: {config.iterations}, but the run in {folder} has finished {done}: set at least {done}")
    remove_leftovers(folder / "checkpoints")
    replace_text(existing, dump_config(config))
    return folder, (found[-1] if found else None), True


def read_run_config(folder: Path) -> Config:
    """The configuration of a run. Raises ``UserError`` where the folder holds none."""
    path = folder / "config.yaml"
    if not path.exists():
        raise UserError(f"{folder} holds no run: it has no config.yaml")
    return load_config(path)


def rewrite_config(folder: Path, config: Config) -> None:
    """The resolved configuration of a run that has not begun."""
    replace_text(folder / "config.yaml", dump_config(config))


def write_run(
    folder: Path,
    *,
    status: str,
    message: str | None = None,
    machine: dict[str, Any] | None = None,
    batches: dict[str, float] | None = None,
) -> None:
    """Updates run.json: status is running, finished, stopped or failed; batches are those chosen by the free memory."""
    path = folder / "run.json"
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    try:
        facts = json.loads(path.read_text())
    except (FileNotFoundError, ValueError):  # a damaged one holds nothing that a run needs
        facts = {"started": now}
    facts |= {"status": status, "message": message, "finished": now if status != "running" else None}
    if batches is not None:
        facts["batches"] = batches
    if machine is not None:
        command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
        facts |= {"machine": machine, "versions": versions(), "command": command}
    replace_text(path, json.dumps(facts, indent=1))


def _flat(values: Any, prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as one with dotted keys."""
    flat = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
