"""Text in pictures: how much of what was asked for can be read."""

from __future__ import annotations

import logging
import re

import numpy as np


class Ocr:
    """1 - edit distance / length of the text asked for, at least 0, in [0, 1]; letter case and spaces do not count.

    The text is the prompt's metadata under ``text``, or what stands in quotes in the prompt. The distance is that of all that
    is read in the picture, line after line: more than the text asked for costs too. RapidOCR on the CPU, with the models of
    its package.
    """

    def __init__(self) -> None:
        try:
            import onnxruntime  # noqa: F401
            import rapidocr  # noqa: F401
        except ImportError:
            raise ValueError("RapidOCR is not installed: pip install fastloop[ocr]") from None
        self._engine = None

    def start(self) -> None:
        """Load RapidOCR's models, once."""
        if self._engine is None:
            from rapidocr import RapidOCR

            self._engine = RapidOCR(params={"Global.log_level": "error"})
            logging.getLogger("RapidOCR").setLevel(logging.ERROR)  # it warns of every picture without text

    def __call__(self, images: np.ndarray, prompts: list[str], metadata: list[dict]) -> np.ndarray:
        """Score pictures, uint8 (n, height, width, 3): float64 (n,)."""
        self.start()
        wanted = [asked_text(prompt, more) for prompt, more in zip(prompts, metadata, strict=True)]
        return np.array([accuracy(self.read(image), text) for image, text in zip(images, wanted, strict=True)])

    def read(self, image: np.ndarray) -> str:
        """Read all lines in a uint8 (height, width, 3) RGB picture, from top to bottom."""
        found = self._engine(np.ascontiguousarray(image[..., ::-1]))  # as OpenCV has it, BGR
        return " ".join(found.txts or ())


def asked_text(prompt: str, metadata: dict) -> str:
    """Return the text that a prompt asks for. Raises ``ValueError`` where it asks for none."""
    text = metadata.get("text")
    if text is None:
        quoted = re.findall(r"\"([^\"]+)\"|“([^”]+)”|(?<!\w)'((?:[^']|'(?=\w))+)'(?!\w)", prompt)
        text = " ".join(next(filter(None, groups)) for groups in quoted)
    if not isinstance(text, str) or not _plain(text):
        raise ValueError(f"no text to read for the prompt {prompt!r}: put it in quotes there, or under text in the metadata")
    return text


def accuracy(read: str, wanted: str) -> float:
    """Return 1 - Levenshtein(read, wanted) / len(wanted), at least 0, of lower-case texts without spaces."""
    read, wanted = _plain(read), _plain(wanted)
    row = list(range(len(read) + 1))
    for i, letter in enumerate(wanted, 1):
        above, row = row, [i]
        for j, other in enumerate(read, 1):
            row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (letter != other)))
    return max(0.0, 1 - row[-1] / len(wanted))


def _plain(text: str) -> str:
    return re.sub(r"\s", "", text.lower())
