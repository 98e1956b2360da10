"""What a run leaves behind while it trains: metrics.jsonl, eval.jsonl, TensorBoard, W&B, and the grids of pictures."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image, ImageDraw, ImageFont

from fastloop.errors import UserError

INK = "#1c1e21"
MUTED = "#667079"
HAIRLINE = "#d5d9dd"
MAX_LINES = 3  # of text to a picture

Picture = np.ndarray | Image.Image  # arrays are uint8, (H, W, 3)


class Tracker:
    """Writes the numbers and pictures of one run. Only the main process makes one.

    ``folder`` exists. ``wandb`` is a project name. ``resume_iteration`` = k drops what was logged after iteration k, so
    that a resumed run logs every iteration once; -1 starts over. Before it changes a file it raises ``FileExistsError``
    for a folder with rows and no ``resume_iteration``, and ``UserError`` for a missing tracking package.
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
        """Send a picture to TensorBoard and W&B. Files in the run folder are the caller's."""
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
    """The rows of a JSON-lines file, [] if it is absent, without a torn last line.

    Raises ``ValueError`` with path:line for any other line that is not a JSON object.
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
    """Write a file whole or not at all: a reader, or a kill at any instant, sees the old text or the new."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
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
    """A value as strict JSON has it: NumPy and 0-d tensors become numbers, NaN and infinities null."""
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
    """TensorBoard's writer class and the W&B module, ``None`` for what is not asked for.

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


def image_grid(images: Sequence[Picture], captions: Sequence[str], columns: int, cell: int = 128) -> Image.Image:
    """Pictures in rows of ``columns``, each fitted into ``cell`` x ``cell`` pixels, captions (up to 3 lines) below."""
    if not len(images) or len(images) != len(captions):
        raise ValueError(f"a grid needs a caption per picture, got {len(images)} pictures, {len(captions)} captions")
    columns = min(columns, len(images))
    gap, margin = max(8, cell // 12), max(10, cell // 10)
    font = _font(cell, 0.1, captions)
    fitted = [_fit(image, cell) for image in images]
    wrapped = [_wrap(caption, font, cell) for caption in captions]
    picture_height = max(image.height for image in fitted)
    rows = [range(start, min(start + columns, len(images))) for start in range(0, len(images), columns)]
    heights = [picture_height + _text_height(max(len(wrapped[i]) for i in row), font) for row in rows]
    width = 2 * margin + columns * cell + (columns - 1) * gap
    grid = Image.new("RGB", (width, 2 * margin + sum(heights) + (len(rows) - 1) * gap), "white")
    y = margin
    for row, height in zip(rows, heights, strict=True):
        for column, i in enumerate(row):
            x = margin + column * (cell + gap)
            _paste(grid, fitted[i], x, y)
            _write(grid, wrapped[i], x, y + picture_height, font, MUTED)
        y += height + gap
    return grid


def before_after_grid(
    prompts: Sequence[str],
    before_images: Sequence[Picture | Sequence[Picture]],
    after_images: Sequence[Picture | Sequence[Picture]],
    before_rewards: Sequence[float] | Sequence[Sequence[float]],
    after_rewards: Sequence[float] | Sequence[Sequence[float]],
    cell: int = 128,
    columns: int = 1,
) -> Image.Image:
    """For each prompt its text, the pictures before training left, those after it right, rewards below them.

    Each prompt has one picture and reward a side, or a list of each. The prompts stand below each other, in ``columns``.
    """
    if not prompts:
        raise ValueError("a before/after grid needs at least one prompt")
    if columns > 1:
        per_column = -(-len(prompts) // columns)
        everything = (prompts, before_images, after_images, before_rewards, after_rewards)
        starts = range(0, len(prompts), per_column)
        parts = [before_after_grid(*(values[i : i + per_column] for values in everything), cell) for i in starts]
        grid = Image.new("RGB", (sum(part.width for part in parts), max(part.height for part in parts)), "white")
        for i, part in enumerate(parts):
            grid.paste(part, (sum(before.width for before in parts[:i]), 0))
        return grid
    sides = [_pairs(before_images, before_rewards, cell), _pairs(after_images, after_rewards, cell)]
    if any(len(side) != len(prompts) for side in sides):
        raise ValueError(f"{len(prompts)} prompts, but pictures for {len(sides[0])} before and {len(sides[1])} after")
    gap, gutter, margin = max(6, cell // 20), max(20, cell // 5), max(12, cell // 8)
    small, text, header = _font(cell, 0.1), _font(cell, 0.11, prompts), _font(cell, 0.13)
    blocks = [max(len(pairs) for pairs in side) * (cell + gap) - gap for side in sides]
    lefts = [margin, margin + blocks[0] + gutter]
    width = lefts[1] + blocks[1] + margin
    wrapped = [_wrap(prompt, text, width - 2 * margin) for prompt in prompts]
    picture_height = max(image.height for side in sides for pairs in side for image, _ in pairs)
    heights = [_text_height(len(lines), text) + gap + picture_height + _text_height(1, small) for lines in wrapped]
    top = margin + _text_height(1, header) + gap
    grid = Image.new("RGB", (width, top + sum(heights) + (len(prompts) - 1) * gutter + margin), "white")
    for left, label in zip(lefts, ("Before", "After"), strict=True):
        _write(grid, [label], left, margin - 4, header, INK)
    y = top
    for row, lines in enumerate(wrapped):
        ImageDraw.Draw(grid).line((margin, y - 2, width - margin, y - 2), fill=HAIRLINE)
        _write(grid, lines, margin, y, text, INK)
        picture_top = y + _text_height(len(lines), text) + gap
        for left, side in zip(lefts, sides, strict=True):
            for column, (image, reward) in enumerate(side[row]):
                x = left + column * (cell + gap)
                _paste(grid, image, x, picture_top)
                _write(grid, [f"{reward:.2f}"], x, picture_top + picture_height, small, MUTED)
        y += heights[row] + gutter
    return grid


def _pairs(images: Sequence[Any], rewards: Sequence[Any], cell: int) -> list[list[tuple[Image.Image, float]]]:
    """Per prompt, its fitted pictures with their rewards; one picture counts as a list of one."""
    pairs = []
    for value, scores in zip(images, rewards, strict=True):
        alone = isinstance(value, Image.Image) or (isinstance(value, np.ndarray) and value.ndim == 3)
        pictures = [_fit(picture, cell) for picture in ([value] if alone else value)]
        pairs.append(list(zip(pictures, np.ravel(scores).tolist(), strict=True)))
    return pairs


def _font(cell: int, share: float, texts: Sequence[str] = ()) -> ImageFont.FreeTypeFont:
    size = min(max(12, round(cell * share)), 28)
    if all(text.isascii() for text in texts):
        return ImageFont.load_default(size=size)
    import matplotlib  # its DejaVu Sans has the accents, Greek and Cyrillic that Pillow's own font lacks

    return ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"), size)


def _line_height(font: ImageFont.FreeTypeFont) -> int:
    return math.ceil(font.size * 1.25)


def _text_height(lines: int, font: ImageFont.FreeTypeFont) -> int:
    return lines * _line_height(font) + (5 if lines else 0)


def _write(grid: Image.Image, lines: list[str], x: int, y: int, font: ImageFont.FreeTypeFont, color: str) -> None:
    draw = ImageDraw.Draw(grid)
    for number, line in enumerate(lines):
        draw.text((x, y + 4 + number * _line_height(font)), line, font=font, fill=color)


def _fit(picture: Picture, cell: int) -> Image.Image:
    """Scale the longer side to ``cell``. Small pictures keep hard pixels: the grid shows what the model drew."""
    if isinstance(picture, np.ndarray):
        if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3:
            raise ValueError(f"expected a uint8 picture of shape (H, W, 3), got {picture.dtype} {picture.shape}")
        picture = Image.fromarray(picture)
    scale = cell / max(picture.size)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    return picture.convert("RGB").resize(size, Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.LANCZOS)


def _paste(grid: Image.Image, picture: Image.Image, x: int, y: int) -> None:
    """Paste with a hairline around it: a white picture needs an edge on a white page."""
    grid.paste(picture, (x, y))
    ImageDraw.Draw(grid).rectangle((x - 1, y - 1, x + picture.width, y + picture.height), outline=HAIRLINE)


def _wrap(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """At most three lines of ``width`` pixels. What follows a line break (a reward) stays; what precedes it is cut."""
    first, *rest = text.strip().split("\n")
    tail = [_cut(part, font, width, 1)[0] for part in rest[-(MAX_LINES - 1) :] if part.strip()]
    return _cut(first, font, width, MAX_LINES - len(tail)) + tail


def _cut(text: str, font: ImageFont.FreeTypeFont, width: int, most: int) -> list[str]:
    """Break one paragraph into at most ``most`` lines, the last one ending in an ellipsis if text is left."""
    lines, line = [], ""
    for word in text.split():
        if font.getlength(f"{line} {word}".strip()) <= width:
            line = f"{line} {word}".strip()
            continue
        if line:
            lines.append(line)
        while font.getlength(word) > width and len(lines) <= most:  # one word wider than the picture
            fits = 1
            while font.getlength(word[: fits + 1]) <= width:
                fits += 1
            lines.append(word[:fits])
            word = word[fits:]
        line = word
    if line:
        lines.append(line)
    if len(lines) <= most:
        return lines
    last = lines[most - 1]
    while last and font.getlength(last + "…") > width:
        last = last[:-1]
    return [*lines[: most - 1], last.rstrip() + "…"]
