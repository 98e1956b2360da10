"""Draws the scenes of the shapes world: 64 x 64 RGB, anti-aliased, objects apart from each other on a dark ground."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fastloop.shapes.grammar import COLORS, TEXTURES, Request

SIZE = 64
BACKGROUND = (30, 30, 36)
DARK = 0.45  # brightness of the dark part of a texture, as a share of the colour
PERIOD = 8  # pixels, of stripes and dots


@dataclass(frozen=True)
class Placed:
    """One object as drawn: centre and radius in pixels."""

    shape: str
    color: str
    texture: str
    x: float
    y: float
    radius: float


def coverage(shape: str, x: np.ndarray, y: np.ndarray, radius: float) -> np.ndarray:
    """Return the share of each pixel that a shape covers, in [0, 1]; ``x`` and ``y`` are pixel offsets from its centre."""
    if shape == "circle":
        distance = np.hypot(x, y) - radius
    elif shape == "square":
        distance = np.maximum(abs(x), abs(y)) - 0.88 * radius
    elif shape == "triangle":  # upright, base 2 r, height 2 r
        distance = np.maximum(y - radius, (2 * abs(x) - y - radius) / 5**0.5)
    elif shape == "ring":
        distance = abs(np.hypot(x, y) - 0.75 * radius) - 0.28 * radius
    elif shape == "cross":
        arm = 0.36 * radius
        upright = np.maximum(abs(x) - arm, abs(y) - radius)
        distance = np.minimum(upright, np.maximum(abs(y) - arm, abs(x) - radius))
    else:
        raise ValueError(f"unknown shape {shape!r}")
    return np.clip(0.5 - distance, 0, 1)


def brightness(texture: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return the brightness of a texture at pixel offsets from the object's centre, between ``DARK`` and 1."""
    if texture == "plain":
        return np.ones_like(x)
    if texture == "striped":  # horizontal, anti-aliased square wave
        wave = abs((y / PERIOD) % 1 - 0.5) * PERIOD - PERIOD / 4
    elif texture == "dotted":
        u, v = ((x / PERIOD) % 1 - 0.5) * PERIOD, ((y / PERIOD) % 1 - 0.5) * PERIOD
        wave = np.hypot(u, v) - PERIOD * 0.34
    else:
        raise ValueError(f"unknown texture {texture!r}")
    return DARK + (1 - DARK) * np.clip(0.5 + wave, 0, 1)


def render(objects: list[Placed]) -> np.ndarray:
    """Draw the picture of some objects: uint8 (64, 64, 3)."""
    grid = np.arange(SIZE) + 0.5
    image = np.empty((SIZE, SIZE, 3))
    image[:] = BACKGROUND
    for o in objects:
        x, y = np.broadcast_arrays(grid[None, :] - o.x, grid[:, None] - o.y)
        cover = coverage(o.shape, x, y, o.radius)[..., None]
        image += cover * (brightness(o.texture, x, y)[..., None] * COLORS[o.color] - image)
    return np.round(image).astype(np.uint8)


def place(request: Request, rng: np.random.Generator) -> list[Placed]:
    """Place objects at random so that they fulfil a request; what it leaves free is drawn at random."""
    while True:
        largest = 13.0 if len(request.things) <= 2 else 10.0
        radii = rng.uniform(largest - 2.5, largest, len(request.things))
        centres = rng.uniform(radii[:, None] + 1, SIZE - 1 - radii[:, None], (len(radii), 2))
        gaps = np.abs(centres[:, None] - centres[None]).max(-1) - (radii[:, None] + radii[None]) - 2
        if (gaps[np.triu_indices(len(radii), 1)] > 0).all() and _holds(request.relation, centres):
            break
    free = list(rng.permutation([c for c in COLORS if c not in {t.color for t in request.things}]))
    return [
        Placed(t.shape, t.color or free.pop(), t.texture or TEXTURES[0], *map(float, centre), float(radius))
        for t, centre, radius in zip(request.things, centres, radii, strict=True)
    ]


def _holds(relation: str | None, centres: np.ndarray) -> bool:
    """Whether two centres stand in a relation, 4 pixels to spare: a triangle's centre of mass is below its centre."""
    if relation is None:
        return True
    dx, dy = centres[1] - centres[0]
    shorter = (dx - 4 * np.sign(dx), dy) if "of" in relation else (dx, dy - 4 * np.sign(dy))
    return relation_credit(relation, (0, 0), shorter) == 1


def relation_credit(relation: str, first: tuple[float, float], second: tuple[float, float]) -> float:
    """Return 1 where the relation holds along the larger offset, 1/2 where it holds along the smaller one, else 0."""
    dx, dy = second[0] - first[0], second[1] - first[1]
    along, across = {"left of": (dx, dy), "right of": (-dx, dy), "above": (dy, dx), "below": (-dy, dx)}[relation]
    return 0.0 if along <= 0 else 1.0 if along >= abs(across) else 0.5
