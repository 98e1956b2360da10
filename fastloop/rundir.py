"""A run's folder: who may write into it, its run.json, and the prompts that it began with."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shlex
import socket
import sys
import tempfile
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, TextIO

from fastloop.checkpoints import check_checkpoint, iteration_of, list_checkpoints, remove_leftovers
from fastloop.config import Config
from fastloop.errors import UserError
from fastloop.machine import versions
from fastloop.recipes import dump_config, load_config
from fastloop.tracking import read_rows, replace_text

# What may change between the two halves of a run; everything else would make it another run.
MAY_CHANGE = ("iterations", "output_dir", "checkpoint", "tracking", "safety", "engine", "model.compile")
# What earlier versions wrote for a key that is null now, and means the same to their models.
FORMER_DEFAULTS = {"model.lora.target_modules": ["to_q", "to_k", "to_v", "to_out.0"]}


_held: dict[Path, TextIO] = {}  # the lock files of the folders that this process holds


def claim_run_dir(
    config: Config, resume: bool, prompts: dict[str, dict[str, Any]], files: dict[str, str]
) -> tuple[Path, Path | None, bool]:
    """Make or take over the folder of a run, and hold it until `release_run_dir` or the end of this process.

    Args:
        prompts: as from `prompt_facts`. files: as from `given_hashes`.

    Returns:
        The folder, the checkpoint to go on from (``None``: from the start), and whether a run was there before.

    Raises:
        UserError: the folder cannot be written, another process holds it, or it holds a run that ``resume`` does not ask for,
            that has another configuration, other prompts or files, that has gone further than ``iterations``, or whose
            records or newest checkpoint are damaged.
    """
    folder = Path(config.output_dir).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"output_dir: cannot write to {folder}: {reason}; choose another output_dir=") from None
    _hold(folder)
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
        _write_inputs(folder, prompts, files)
        replace_text(existing, dump_config(config))
        return folder, None, False
    if not resume:
        raise UserError(f"output_dir: {folder} already holds a run: add --resume, or choose another output_dir=")
    try:
        for name in ("metrics.jsonl", "eval.jsonl"):
            read_rows(folder / name)
    except ValueError as error:
        raise UserError(f"--resume: {error}: mend or remove that line") from None
    before = flat(earlier.model_dump(mode="json"))
    now = flat(config.model_dump(mode="json"))
    for key, default in FORMER_DEFAULTS.items():
        if now.get(key) is None and before.get(key) == default:
            before[key] = None
    changed = [key for key in sorted({*before, *now}) if before.get(key) != now.get(key) and not key.startswith(MAY_CHANGE)]
    if changed in ([], ["model.prompt_chunks"]):  # which follows from the prompts
        _check_prompts(folder, config, prompts)
    if changed:
        key = changed[0]
        raise UserError(
            f"--resume: {key} is {before.get(key)!r} in {existing} and {now.get(key)!r} now: "
            "set it back, or start a new run with another output_dir="
        )
    _check_files(folder, files)
    found = list_checkpoints(folder / "checkpoints")
    if found:
        check_checkpoint(found[-1], averaged=config.ema.decay is not None)
    done = iteration_of(found[-1]) if found else 0
    if config.iterations < done:
        raise UserError(f"iterations: {config.iterations}, but the run in {folder} has finished {done}: set at least {done}")
    remove_leftovers(folder / "checkpoints")
    _write_inputs(folder, prompts, files)
    replace_text(existing, dump_config(config))
    return folder, (found[-1] if found else None), True


def release_run_dir(folder: Path) -> None:
    """Let other processes have the folder of a run that has ended."""
    if file := _held.pop(folder.resolve(), None):
        file.close()


def _hold(folder: Path) -> None:
    """Takes the lock of a folder, which the kernel gives back when this process ends, however it ends.

    Raises:
        UserError: another process holds it.
    """
    held = _held.get(folder.resolve())
    if held and os.fstat(held.fileno()).st_nlink:  # and the folder has not been removed and made again since
        return
    file = (folder / ".lock").open("a+", encoding="utf-8")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        with file:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                file.seek(0)
                holder = file.read().strip() or "another process"
                raise UserError(
                    f"output_dir: {folder} is in use by {holder}: wait until it ends, stop it, or choose another output_dir="
                ) from None
        print(
            f"fastloop: warning: output_dir: the file system of {folder} has no locks ({error.strerror}), so a second run in "
            "this folder would not be noticed",
            file=sys.stderr,
        )
        return
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()} since {_now()}\n")
    file.flush()
    _held[folder.resolve()] = file


def _check_prompts(folder: Path, config: Config, prompts: dict[str, dict[str, Any]]) -> None:
    """Raises ``UserError`` where a run began with other prompts than it would go on with. Earlier versions recorded none."""
    path = folder / "prompts.json"
    if not path.exists():
        return
    try:
        before = {key: (facts["count"], facts["sha256"]) for key, facts in json.loads(path.read_text()).items()}
    except (ValueError, AttributeError, TypeError, KeyError):
        raise UserError(f"--resume: {path} is damaged: remove it to go on with the prompts as they are now") from None
    for key, source in (("prompts", config.prompts.source), ("eval.prompts", config.eval.prompts.source)):
        now = prompts[key]["count"], prompts[key]["sha256"]
        if before.get(key) != now:
            began = f" (then {before[key][0]}, now {now[0]})" if key in before and before[key][0] != now[0] else ""
            raise UserError(
                f"--resume: {key}: the prompts of {source} are not those that the run in {folder} began with{began}: "
                "put them back, or start a new run with another output_dir="
            )


def _check_files(folder: Path, files: dict[str, str]) -> None:
    """Raises ``UserError`` where a run began with other files than it would go on with. Earlier versions recorded none."""
    path = folder / "files.json"
    if not path.exists():
        return
    try:
        before = dict(json.loads(path.read_text()))
    except (ValueError, TypeError):
        raise UserError(f"--resume: {path} is damaged: remove it to go on with the files as they are now") from None
    for key, sha256 in files.items():
        if before.get(key) != sha256:
            raise UserError(
                f"--resume: {key}: what is there is not what the run in {folder} began with: put it back, or start a new run "
                "with another output_dir="
            )


def _write_inputs(folder: Path, prompts: dict[str, dict[str, Any]], files: dict[str, str]) -> None:
    _write_json(folder / "prompts.json", prompts)
    if files:
        _write_json(folder / "files.json", files)


def read_run_config(folder: Path) -> Config:
    """Read the configuration of a run. Raises ``UserError`` where the folder holds none."""
    path = folder / "config.yaml"
    if not path.exists():
        raise UserError(f"{folder} holds no run: it has no config.yaml")
    return load_config(path)


def rewrite_config(folder: Path, config: Config) -> None:
    """Write the resolved configuration of a run that has not begun."""
    replace_text(folder / "config.yaml", dump_config(config))


def write_run(
    folder: Path,
    *,
    status: str,
    message: str | None = None,
    machine: dict[str, Any] | None = None,
    batches: dict[str, float] | None = None,
) -> None:
    """Update run.json: status is running, finished, stopped or failed; batches are those chosen by the free memory."""
    path, now = folder / "run.json", _now()
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
    _write_json(path, facts)


def _write_json(path: Path, facts: dict[str, Any]) -> None:
    replace_text(path, json.dumps(facts, indent=1))


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def flat(values: Any, prefix: str = "") -> dict[str, Any]:
    """Return nested dictionaries as one with dotted keys."""
    found = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found
