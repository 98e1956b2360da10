"""One call of a reward: what it is given is its own, and what it returns is checked."""

from __future__ import annotations

import json
from copy import deepcopy
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fastloop.errors import RewardFailed, RunFailed, Unscored


def call(label: str, reward: Any, images: np.ndarray, prompts: list[str], metadata: list[dict]) -> np.ndarray:
    """Return a reward's values for n pictures, float64 (n,). Raises ``RewardFailed`` for whatever else it does."""

    def failed(says: str, culprit: int | None) -> RewardFailed:
        chosen = slice(None) if culprit is None else slice(culprit, culprit + 1)
        return RewardFailed(says, Unscored(label, images[chosen], prompts[chosen], metadata[chosen]))

    try:
        values = _values(reward, images, prompts, metadata)
    except RunFailed as error:  # it says itself what is wrong, and a second attempt was its own affair
        raise failed(f"reward {label} failed (first prompt {prompts[0]!r}): {error}", None) from error
    except (Exception, SystemExit) as error:
        culprit = _first_failing(reward, images, prompts, metadata)
        cause = f"{type(error).__name__}: {error}"
        if isinstance(error, ValueError) and "read-only" in str(error):
            cause += "; the pictures are not the reward's own: change a copy of them, images.copy()"
        raise failed(f"reward {label} failed for the prompt {prompts[culprit]!r}: {cause}", culprit) from error
    if values.shape != (len(images),):
        raise failed(
            f"reward {label} returned shape {values.shape} for {len(images)} images (first prompt {prompts[0]!r}): "
            "return one number for each image",
            None,
        )
    if not np.isfinite(values).all():
        culprit = int(np.flatnonzero(~np.isfinite(values))[0])
        raise failed(f"reward {label} returned {values[culprit]} for the prompt {prompts[culprit]!r}", culprit)
    return values


def read_only(images: np.ndarray) -> np.ndarray:
    """Return a copy that cannot be written to by way of NumPy; what writes past it, as PyTorch may, reaches the copy alone."""
    images = images.copy()
    images.flags.writeable = False
    return images


def numbers(values: Any) -> np.ndarray:
    """Turn what a reward returned (numbers, booleans, arrays, tensors of any dtype and device) into float64 of its shape.

    Raises:
        TypeError: they are no real numbers; texts that look like numbers are none.
    """
    if isinstance(values, (list, tuple)):
        values = [_plain(value) for value in values]
    array = np.asarray(_plain(values))
    if array.dtype == object and array.size and all(isinstance(value, Real) for value in array.flat):
        array = array.astype(np.float64)  # fractions, whole numbers of any size
    if isinstance(values, np.ma.MaskedArray):
        raise TypeError("it returned a masked array: return one number for each image")
    if not np.can_cast(array.dtype, np.float64, "same_kind"):
        odd = next((type(value) for value in array.flat if not isinstance(value, Real)), array.dtype.type)
        raise TypeError(f"it returned values of type {odd.__name__.rstrip('_')}: return one number for each image")
    return array.astype(np.float64)  # a copy: the reward may fill the same array again at its next call


def save_unscored(failure: RewardFailed, folder: Path) -> None:
    """Write the pictures that a reward could not score, with prompts and the reason, as PNG files and failure.json."""
    folder.mkdir(parents=True, exist_ok=True)
    unscored, rows = failure.unscored, []
    for i, (image, prompt, metadata) in enumerate(zip(unscored.images, unscored.prompts, unscored.metadata, strict=True)):
        Image.fromarray(image).save(folder / f"{i:03d}.png")
        rows.append({"file": f"{i:03d}.png", "prompt": prompt, "metadata": metadata})
    facts = {"reward": unscored.reward, "error": str(failure), "pictures": rows}
    (folder / "failure.json").write_text(json.dumps(facts, indent=1, default=str))


def _values(reward: Any, images: np.ndarray, prompts: list[str], metadata: list[dict]) -> np.ndarray:
    """One call, on pictures, lists and dictionaries of its own: nothing that a reward does to them reaches anything else."""
    return numbers(reward(read_only(images), list(prompts), deepcopy(metadata)))


def _plain(value: Any) -> Any:
    """A tensor as an array: on the CPU, without gradient; dtypes that NumPy lacks as float64."""
    if not hasattr(value, "detach"):
        return value
    value = value.detach().cpu()
    return (value if value.is_complex() else value.double()).numpy()


def _first_failing(reward: Any, images: np.ndarray, prompts: list[str], metadata: list[dict]) -> int:
    """The index of the first picture that fails alone; 0 where the failure needs the whole batch."""
    for i in range(len(images)):
        try:
            _values(reward, images[i : i + 1], prompts[i : i + 1], metadata[i : i + 1])
        except (Exception, SystemExit):
            return i
    return 0
