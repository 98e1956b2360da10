"""Who watches a run from outside: the profile, the benchmarks, tests."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any


class Observer:
    """Told of what a run does, which it must not change. This one looks away.

    Phases nest: ``rollout`` and ``evaluation`` hold ``encode``, ``predict`` and ``decode``; ``reward`` waits for rewards;
    ``update`` holds ``replay`` in the first iteration, ``step``, and ``gradients``, which holds ``predict`` and ``backward``.
    """

    def phase(self, name: str) -> AbstractContextManager[Any]:
        """Watch a phase: entered where it begins, left where it ends."""
        return nullcontext()

    def on_iteration(self, number: int) -> None:
        """Take note of an iteration that begins.

        Called before iteration ``number``, counted from 1, and after the last one with the number that does not come.
        """


UNOBSERVED = Observer()
