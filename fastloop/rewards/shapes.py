"""The exact checker of the bundled world as a reward in [0, 1]."""

from __future__ import annotations

from functools import partial

import numpy as np

from fastloop.shapes.checker import assess
from fastloop.shapes.grammar import CATEGORIES, parse
from fastloop.shapes.renderer import SIZE


class Shapes:
    """How far a picture fulfils its prompt, in [0, 1]; with ``category`` only prompts of that category are taken."""

    def __init__(self, category: str | None = None) -> None:
        if category not in (None, *CATEGORIES):
            raise ValueError(f"unknown category {category!r}: one of {', '.join(CATEGORIES)}")
        self.category = category

    def validate(self, prompts: list[str], size: tuple[int, int]) -> None:
        """Raise ``ValueError`` for pictures of another size, and for the first prompt outside the grammar or category."""
        if size != (SIZE, SIZE):
            raise ValueError(
                f"the shapes reward scores pictures of {SIZE} x {SIZE} pixels, these have {size[1]} x {size[0]}: "
                "use model.path=assets:shapes, or another reward"
            )
        for prompt in prompts:
            found = parse(prompt).category
            if self.category not in (None, found):
                raise ValueError(
                    f"shapes_{self.category} cannot score the prompt {prompt!r} of the category {found}: "
                    f"set prompts.categories to [{self.category}], or use the reward shapes"
                )

    def __call__(self, images, prompts, metadata) -> np.ndarray:
        """Score pictures, uint8 (n, 64, 64, 3): float64 (n,)."""
        return np.array([assess(prompt, image).score for prompt, image in zip(prompts, images, strict=True)])

    def explain(self, image: np.ndarray, prompt: str) -> str:
        """Say in one line what of a prompt a picture, uint8 (64, 64, 3), fulfils."""
        return assess(prompt, image).reason


def of_category(category: str) -> partial:
    """Return the factory of the reward ``shapes_CATEGORY``."""
    return partial(Shapes, category)


__all__ = ["CATEGORIES", "Shapes", "of_category"]
