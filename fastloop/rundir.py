"""A run's folder: who may write into it, and its run.json."""

from __future__ import annotations

import json
import shlex
import sys
import tempfile
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import yaml

from fastloop.checkpoints import list_checkpoints, remove_leftovers
from fastloop.config import Config, dump_config, parse_config
from fastloop.errors import UserError
from fastloop.machine import versions
from fastloop.tracking import replace_text

# What may change between the two halves of a run; everything else would make it another run.
MAY_CHANGE = ("iterations", "output_dir", "checkpoint", "tracking", "safety", "engine.device")


def claim_run_dir(config: Config, resume: bool) -> tuple[Path, Path | None, bool]:
    """Makes or takes over the folder of a run.

    Returns:
        The folder, the checkpoint to go on from (``None``: from the start), and whether a run was there before.

    Raises:
        UserError: the folder cannot be written, holds a run and ``resume`` is false, or holds a run of another configuration.
    """
    folder = Path(config.output_dir).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"output_dir: cannot write to {folder}: {error.strerror}; choose another with output_dir=") from None
    existing = folder / "config.yaml"
    if not existing.exists():
        replace_text(existing, dump_config(config))
        return folder, None, False
    if not resume:
        raise UserError(f"output_dir: {folder} already holds a run: add --resume to go on, or choose another output_dir=")
    before = _flat(parse_config(yaml.safe_load(existing.read_text()), str(existing)).model_dump(mode="json"))
    now = _flat(config.model_dump(mode="json"))
    for key in sorted({*before, *now}):
        if before.get(key) != now.get(key) and not key.startswith(MAY_CHANGE):
            raise UserError(
                f"--resume: {key} is {before.get(key)!r} in {existing} and {now.get(key)!r} now: "
                "set it back, or start a new run with another output_dir="
            )
    replace_text(existing, dump_config(config))
    checkpoints = folder / "checkpoints"
    remove_leftovers(checkpoints)
    found = list_checkpoints(checkpoints)
    return folder, (found[-1] if found else None), True


def read_run_config(folder: Path) -> Config:
    """The configuration of a run. Raises ``UserError`` where the folder holds none."""
    path = folder / "config.yaml"
    if not path.exists():
        raise UserError(f"{folder} holds no run: it has no config.yaml")
    return parse_config(yaml.safe_load(path.read_text()), str(path))


def write_run(folder: Path, *, status: str, message: str | None = None, machine: dict[str, Any] | None = None) -> None:
    """Updates run.json: status is running, finished, stopped or failed."""
    path = folder / "run.json"
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    facts = json.loads(path.read_text()) if path.exists() else {"started": now}
    facts |= {"status": status, "message": message, "finished": now if status != "running" else None}
    if machine is not None:
        facts |= {"machine": machine, "versions": versions(), "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])}
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
