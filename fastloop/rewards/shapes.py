"""The exact checker of the bundled world as a reward in [0, 1]."""

from __future__ import annotations

from functools import partial

import numpy as np

from fastloop.shapes.checker import check
from fastloop.shapes.grammar import CATEGORIES, parse


class Shapes:
    """How far a picture fulfils its prompt, in [0, 1]; with ``category`` only prompts of that category are taken."""

    def __init__(self, category: str | None = None) -> None:
        self.category = category

    def validate(self, prompts: list[str]) -> None:
        """Raises ``ValueError`` for the first prompt outside the grammar, or of another category."""
        for prompt in prompts:
            found = parse(prompt).category
            if self.category not in (None, found):
                raise ValueError(
                    f"shapes_{self.category} cannot score the prompt {prompt!r} of the category {found}: "
                    f"set prompts.categories to [{self.category}], or use the reward shapes"
                )

    def __call__(self, images, prompts, metadata) -> np.ndarray:
        return np.array([check(prompt, image).score for prompt, image in zip(prompts, images, strict=True)])

    def explain(self, image: np.ndarray, prompt: str) -> str:
        return check(prompt, image).reason


def of_category(category: str) -> partial:
    """The reward ``shapes_CATEGORY``."""
    return partial(Shapes, category)


__all__ = ["CATEGORIES", "Shapes", "of_category"]
