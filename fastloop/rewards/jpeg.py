"""JPEG size as a reward (DDPO): no model, deterministic, and easy to see in the pictures."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

QUALITY = 95  # as in DDPO


def kilobytes(image: np.ndarray) -> float:
    """Return the size of a uint8 (height, width, 3) picture as JPEG of quality 95, in kB (1000 bytes)."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="JPEG", quality=QUALITY)
    return buffer.tell() / 1000


class Compressibility:
    """-kB: smooth, empty pictures win."""

    def __call__(self, images, prompts, metadata) -> np.ndarray:
        """Score pictures, uint8 (n, height, width, 3): float64 (n,)."""
        return np.array([-kilobytes(image) for image in images])


class Incompressibility:
    """+kB: detail and noise win."""

    def __call__(self, images, prompts, metadata) -> np.ndarray:
        """Score pictures, uint8 (n, height, width, 3): float64 (n,)."""
        return np.array([kilobytes(image) for image in images])
