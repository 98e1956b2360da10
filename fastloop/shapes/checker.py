"""The exact checker: finds the objects in a picture and says how far it fulfils its prompt, and why.

score = (sum of the credits of the matched objects) / max(objects asked for, objects found)
        * (1 + relation credit) / 2 in the spatial category

An object's credit is half for its attributes one by one and half for all of them together, so that binding counts.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import ndimage
from scipy.optimize import linear_sum_assignment

from fastloop.shapes.grammar import COLORS, SHAPES, Thing, parse
from fastloop.shapes.renderer import BACKGROUND, SIZE, coverage, relation_credit

MIN_AREA = 40  # pixels: the smallest object that the renderer draws covers more than 60
MIN_OVERLAP = 0.6  # intersection over union with the ideal shape: below it an object has no shape

_PALETTE = np.array(list(COLORS.values()), float) - BACKGROUND
_LENGTH = np.linalg.norm(_PALETTE, axis=1)
_DIRECTION = _PALETTE / _LENGTH[:, None]


@dataclass(frozen=True)
class Found:
    """One object found in a picture. ``shape`` is ``None`` for a blob that no shape fits."""

    shape: str | None
    color: str
    texture: str
    center: tuple[float, float]
    area: int

    def __str__(self) -> str:
        return f"{self.color} {self.texture} {self.shape or 'blob'}"


@dataclass(frozen=True)
class Verdict:
    """A score in [0, 1] with what was found and one line of reasons."""

    score: float
    category: str
    found: tuple[Found, ...]
    reason: str


def find_objects(image: np.ndarray) -> list[Found]:
    """Find the objects in a picture (uint8, (64, 64, 3)), largest first.

    A pixel belongs to the colour whose direction from the background it lies on (so dark stripes and soft edges keep
    their colour); connected pixels of one colour are an object.
    """
    if image.shape != (SIZE, SIZE, 3) or image.dtype != np.uint8:
        raise ValueError(f"expected a uint8 image of {SIZE} x {SIZE} x 3, got {image.dtype} {image.shape}")
    offset = image.astype(float) - BACKGROUND
    strength = np.linalg.norm(offset, axis=-1)
    along = offset @ _DIRECTION.T
    # what is darker than the background has no colour: a black picture is empty
    color = np.where((strength > 45) & (along.max(-1) > 0), along.argmax(-1), -1)
    found = []
    for index, name in enumerate(COLORS):
        labels, count = ndimage.label(color == index, structure=np.ones((3, 3)))
        for k in range(1, count + 1):
            mask = labels == k
            if (area := int(mask.sum())) < MIN_AREA:
                continue
            level = along[..., index] / _LENGTH[index]
            y, x = ndimage.center_of_mass(mask)
            found.append(Found(_shape(mask, level), name, _texture(mask, level), (x + 0.5, y + 0.5), area))
    return sorted(found, key=lambda o: -o.area)


def assess(prompt: str, image: np.ndarray) -> Verdict:
    """Say how far a picture (uint8, (64, 64, 3)) fulfils a prompt. Raises ``ValueError`` for one outside the grammar."""
    request = parse(prompt)
    found = find_objects(image)
    credit = np.array([[_credit(thing, o)[0] for o in found] for thing in request.things])
    rows, columns = linear_sum_assignment(credit, maximize=True)
    matched = {row: column for row, column in zip(rows, columns, strict=True) if credit[row, column] > 0}
    score = sum(credit[row, column] for row, column in matched.items()) / max(len(request.things), len(found))
    reasons = [
        f"{thing}: {_credit(thing, found[matched[i]])[1]}" if i in matched else f"{thing}: missing"
        for i, thing in enumerate(request.things)
    ]
    if len(found) > len(request.things):
        reasons.append(f"{len(found)} objects instead of {len(request.things)}")
    if request.relation:
        holds = 0.0
        if len(matched) == 2:
            holds = relation_credit(request.relation, found[matched[0]].center, found[matched[1]].center)
        score *= (1 + holds) / 2
        reasons.append(f"{request.relation}: {'yes' if holds == 1 else 'partly' if holds else 'no'}")
    return Verdict(float(score), request.category, tuple(found), "; ".join(reasons))


def _credit(thing: Thing, found: Found) -> tuple[float, str]:
    hits = {
        key: getattr(found, key) == getattr(thing, key)
        for key in ("shape", "color", "texture")
        if getattr(thing, key) is not None
    }
    wrong = ", ".join(f"{key} is {getattr(found, key)}" for key, hit in hits.items() if not hit)
    return (sum(hits.values()) / len(hits) + all(hits.values())) / 2, wrong or "right"


def _shape(mask: np.ndarray, level: np.ndarray) -> str | None:
    """The shape whose ideal outline, stretched to the object's bounding box, overlaps it best."""
    rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
    (top, bottom), (left, right) = (rows[0], rows[-1] + 1), (columns[0], columns[-1] + 1)
    height, width = bottom - top, right - left
    if not 0.6 < width / height < 1 / 0.6:
        return None
    box = mask[top:bottom, left:right]
    radius = 16.0
    overlaps = []
    for shape in SHAPES:
        reach = {"square": 0.88, "ring": 1.03}.get(shape, 1.0) * radius  # half the ideal shape's extent
        x = ((np.arange(width) + 0.5) / width * 2 - 1)[None, :] * reach
        y = ((np.arange(height) + 0.5) / height * 2 - 1)[:, None] * reach
        ideal = coverage(shape, *np.broadcast_arrays(x, y), radius) > 0.5
        overlaps.append((ideal & box).sum() / (ideal | box).sum())
    best = int(np.argmax(overlaps))
    return SHAPES[best] if overlaps[best] >= MIN_OVERLAP else None


def _texture(mask: np.ndarray, level: np.ndarray) -> str:
    """Plain where the brightness hardly varies inside; striped where rows explain the variation; dotted otherwise."""
    inside = ndimage.binary_erosion(mask, np.ones((3, 3)))
    if inside.sum() < 12:
        inside = mask
    values = level[inside]
    if values.std() < 0.1:
        return "plain"
    row = np.nonzero(inside)[0]
    sums, counts = np.bincount(row, values), np.bincount(row)
    between = np.var((sums / np.maximum(counts, 1))[row])
    return "striped" if between / values.var() > 0.6 else "dotted"
