"""What a run leaves behind while it trains: metrics.jsonl, eval.jsonl, TensorBoard and W&B."""

from __future__ import annotations

import json
import math
import os
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from fastloop.errors import UserError


class Tracker:
    """Writes the numbers and pictures of one run. Only the main process makes one.

    Args:
        folder: the run's; it exists.
        tensorboard: whether to write RUN/tensorboard too.
        wandb: the project of W&B to log to, ``None`` for none.
        config: what TensorBoard and W&B show as the run's configuration.
        resume_iteration: k drops what was logged after iteration k, so that a resumed run logs every iteration once;
            -1 starts over; ``None`` is for a new run.

    Raises:
        FileExistsError: a new run's folder has rows already. No file has changed then.
        UserError: a tracking package is not installed, before any file changes, or W&B cannot start.
        ValueError: a line of a resumed run, other than a torn last one, is not a JSON object.
    """

    def __init__(
        self,
        folder: Path,
        *,
        tensorboard: bool,
        wandb: str | None,
        config: dict[str, Any],
        resume_iteration: int | None = None,
    ) -> None:
        metrics, evals = folder / "metrics.jsonl", folder / "eval.jsonl"
        writer_class, wandb_module = tracking_packages(tensorboard, wandb)
        if resume_iteration is None:
            for path in (metrics, evals):
                if path.exists() and path.stat().st_size:
                    raise FileExistsError(f"{path} has rows already: resume that run or choose another output_dir")
        else:
            for path in (metrics, evals):
                _drop_rows_after(path, resume_iteration)
        self._wandb = wandb_module
        self._wandb_run = _start_wandb(wandb_module, wandb, folder, config, resume_iteration) if wandb_module else None
        self._metrics = metrics.open("a", encoding="utf-8")
        self._evals = evals.open("a", encoding="utf-8")
        self._writer = None
        if writer_class:
            purge = None if resume_iteration is None else resume_iteration + 1
            self._writer = writer_class(str(folder / "tensorboard"), purge_step=purge)
            self._writer.add_text("config", f"```\n{yaml.safe_dump(config, sort_keys=False)}```", max(purge or 0, 0))

    def log(self, row: dict[str, Any]) -> None:
        """Append the row of a training iteration; its numbers go out at ``row["iteration"]``."""
        _append(self._metrics, row)
        self._log_scalars(row["iteration"], row)

    def log_eval(self, row: dict[str, Any]) -> None:
        """Append the row of an evaluation; its means go out as eval/score, eval/<category> and eval/reward/<name>."""
        _append(self._evals, row)
        scalars = {"eval/score": row["score"]["mean"]}
        scalars |= {f"eval/{name}": estimate["mean"] for name, estimate in row["categories"].items()}
        scalars |= {f"eval/reward/{name}": estimate["mean"] for name, estimate in row["rewards"].items()}
        self._log_scalars(row["iteration"], scalars)

    def log_image(self, name: str, iteration: int, image: Image.Image) -> None:
        """Send a picture of any mode to TensorBoard and W&B. Files in the run folder are the caller's."""
        if self._writer:
            self._writer.add_image(name, np.asarray(image.convert("RGB")), iteration, dataformats="HWC")
            self._writer.flush()
        if self._wandb_run:
            self._wandb_run.log({name: self._wandb.Image(image), "iteration": iteration})

    def close(self) -> None:
        """Flush and close everything; a second call does nothing."""
        self._metrics.close()
        self._evals.close()
        if self._writer:
            self._writer.close()
            self._writer = None
        if self._wandb_run:
            self._wandb_run.finish()
            self._wandb_run = None

    def _log_scalars(self, iteration: int, values: dict[str, Any]) -> None:
        absent = (str, dict, list, type(None))
        scalars = {k: float(v) for k, v in values.items() if k != "iteration" and not isinstance(v, absent)}
        if self._writer:
            for name, value in scalars.items():
                self._writer.add_scalar(name, value, iteration)
            self._writer.flush()  # a killed run resumes without these rows: what its checkpoint covers must be on disk
        if self._wandb_run:
            self._wandb_run.log({**scalars, "iteration": iteration})


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Read the rows of a JSON-lines file, [] if it is absent, without a torn last line.

    Raises:
        ValueError: any other line is not a JSON object; the message has path:line.
    """
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")  # after a whole last line comes an empty one
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode("utf-8"))
            if not isinstance(row, dict):
                raise ValueError("not an object")
        except ValueError as error:
            if number == len(lines):
                break
            raise ValueError(f"{path}:{number}: not a JSON row ({error})") from error
        rows.append(row)
    return rows


def replace_text(path: Path, text: str) -> None:
    """Write a file whole or not at all: a reader, or a kill at any instant, sees the old text or the new.

    Half of a surrogate pair, which UTF-8 cannot hold, is written as an escape such as \\udcff.
    """
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8", errors="backslashreplace") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _append(file: Any, row: dict[str, Any]) -> None:
    file.write(json.dumps(plain(row), allow_nan=False) + "\n")
    file.flush()


def _drop_rows_after(path: Path, iteration: int) -> None:
    """Also drops a torn last line, onto which the next row would be glued."""
    if path.exists():
        kept = [row for row in read_rows(path) if row["iteration"] <= iteration]
        replace_text(path, "".join(json.dumps(row) + "\n" for row in kept))


def plain(value: Any) -> Any:
    """Turn a value into what strict JSON has: NumPy and 0-d tensors become numbers, NaN and infinities ``None``.

    Raises:
        TypeError: something in it is no text, number, list, tuple or dict.
    """
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, Integral):
        return int(value)
    number = float(value)
    return number if math.isfinite(number) else None


def tracking_packages(tensorboard: bool, wandb: str | None) -> tuple[Any, Any]:
    """Import TensorBoard's writer class and the W&B module, ``None`` for what is not asked for.

    Raises:
        UserError: a package that is asked for is not installed.
    """
    writer_class = wandb_module = None
    if tensorboard:
        try:
            from torch.utils.tensorboard import SummaryWriter as writer_class
        except ImportError:
            raise UserError("tracking.tensorboard: pip install tensorboard, or set it to false") from None
    if wandb:
        try:
            import wandb as wandb_module
        except ImportError:
            raise UserError("tracking.wandb: pip install fastloop[wandb], or set it to null") from None
    return writer_class, wandb_module


def _start_wandb(module: Any, project: str, folder: Path, config: dict[str, Any], resume_iteration: int | None) -> Any:
    """Start a W&B run, or go on with the one whose id the folder keeps."""
    id_file = folder / "wandb" / "id"
    known = id_file.read_text().strip() if resume_iteration is not None and id_file.exists() else None
    try:
        run = module.init(project=project, name=folder.name, dir=str(folder), config=config, id=known, resume="allow")
    except Exception as error:  # not logged in, no network
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"tracking.wandb: cannot start: {first}; run wandb login, set WANDB_MODE=offline, or set the key to null"
        ) from None
    id_file.parent.mkdir(exist_ok=True)
    replace_text(id_file, run.id + "\n")
    # W&B's own step only goes up and would swallow the iterations that a resumed run repeats: the x axis is a metric.
    run.define_metric("iteration")
    run.define_metric("*", step_metric="iteration")
    return run
