"""Grids of pictures with their prompts and rewards, as a run's folder, TensorBoard and the report show them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

INK = "#1c1e21"
MUTED = "#667079"
HAIRLINE = "#d5d9dd"
MAX_LINES = 3  # of text to a picture

Picture = np.ndarray | Image.Image  # arrays are uint8, (H, W, 3)
Pairs = list[tuple[Image.Image, float]]  # pictures fitted into a cell, with their rewards


def image_grid(images: Sequence[Picture], captions: Sequence[str], columns: int, cell: int = 128) -> Image.Image:
    """Draw pictures in rows of ``columns``, each with its caption (up to 3 lines) below.

    Each picture is fitted into ``cell`` x ``cell`` pixels: a PIL image, or an array of uint8, (H, W, 3). The grid is RGB.

    Raises:
        ValueError: there is no picture, not one caption to each, or an array of another shape or dtype.
    """
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
    """Draw for each prompt its text, the pictures before training left, those after it right, rewards below them.

    Each prompt has one picture and reward a side, or a list of each. The prompts stand below each other, in ``columns``.
    Each picture is fitted into ``cell`` x ``cell`` pixels: a PIL image, or an array of uint8, (H, W, 3). The grid is RGB.

    Raises:
        ValueError: there is no prompt, not one picture or list of them to each, or an array of another shape or dtype.
    """
    if not prompts:
        raise ValueError("a before/after grid needs at least one prompt")
    if not len(prompts) == len(before_images) == len(after_images):
        raise ValueError(f"{len(prompts)} prompts, but pictures for {len(before_images)} before and {len(after_images)} after")
    before, after = _pairs(before_images, before_rewards, cell), _pairs(after_images, after_rewards, cell)
    share = -(-len(prompts) // columns)
    parts = [slice(start, start + share) for start in range(0, len(prompts), share)]
    drawn = [_before_after_column(prompts[part], before[part], after[part], cell) for part in parts]
    grid = Image.new("RGB", (sum(column.width for column in drawn), max(column.height for column in drawn)), "white")
    x = 0
    for column in drawn:
        grid.paste(column, (x, 0))
        x += column.width
    return grid


def _before_after_column(prompts: Sequence[str], before: list[Pairs], after: list[Pairs], cell: int) -> Image.Image:
    """The prompts below each other, under a header."""
    sides = [before, after]
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


def _pairs(images: Sequence[Any], rewards: Sequence[Any], cell: int) -> list[Pairs]:
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
