"""When a curve of scores over compute reaches a target, and by how much sooner than another, with an interval over seeds.

Curves are means over seeds, made isotonic (never falling) by pooling adjacent violators, which is their least-squares fit by
such a curve: one lucky evaluation is no crossing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

LAST = 3  # evaluations of the reference whose mean is the target
DRAWS = 2000
UNITS = ("equivalents", "cpu")


@dataclass(frozen=True)
class Curves:
    """Of one recipe: scores, float64 (S, E), of S seeds at E evaluations, and what had been spent, (S, E), by unit."""

    scores: np.ndarray
    spent: dict[str, np.ndarray]

    def of(self, seeds: np.ndarray) -> Curves:
        """Return those of some seeds, which may repeat."""
        return Curves(self.scores[seeds], {unit: values[seeds] for unit, values in self.spent.items()})

    def end(self) -> float:
        """Return the mean of the last evaluations."""
        return float(self.scores[:, -LAST:].mean())

    def reaches(self, target: float) -> dict[str, float]:
        """Return what is spent where the mean curve first crosses a target, by unit; infinity where it does not."""
        rising = isotonic(self.scores.mean(0))
        return {unit: crossing(values.mean(0), rising, target) for unit, values in self.spent.items()}


@dataclass(frozen=True)
class Comparison:
    """A recipe against the reference.

    Attributes:
        reached: what the recipe has spent at the target, by unit; infinity where it does not reach it.
        ratio: of what the reference has spent there to what the recipe has; 0 where the recipe does not reach the target.
        interval: of the ratio, 95 %, by unit; ``None`` with fewer than two seeds.
        reaching: share of the bootstrap's draws in which the recipe reaches the target.
    """

    reached: dict[str, float]
    ratio: dict[str, float]
    interval: dict[str, tuple[float, float]] | None
    reaching: float


def isotonic(values: np.ndarray) -> np.ndarray:
    """Fit values, float64 (E,), by a curve that never falls, in least squares: neighbours that fall become their mean."""
    blocks: list[tuple[float, int]] = []  # mean and length
    for value in values:
        mean, count = float(value), 1
        while blocks and blocks[-1][0] >= mean:
            before, length = blocks.pop()
            mean, count = (before * length + mean * count) / (length + count), length + count
        blocks.append((mean, count))
    return np.repeat([mean for mean, _ in blocks], [count for _, count in blocks])


def crossing(x: np.ndarray, rising: np.ndarray, target: float) -> float:
    """Return where a curve that never falls first reaches a target, linear between its points; infinity if nowhere."""
    there = np.flatnonzero(rising >= target - 1e-12)  # the mean of a block is rounded
    if not len(there):
        return math.inf
    i = there[0]
    if i == 0:
        return float(x[0])
    share = min(1.0, (target - rising[i - 1]) / (rising[i] - rising[i - 1]))
    return float(x[i - 1] + share * (x[i] - x[i - 1]))


def compare(reference: Curves, recipe: Curves, draws: int = DRAWS) -> Comparison:
    """Compare a recipe with the reference, whose last evaluations set the target.

    The interval is the bootstrap's: the seeds of both are drawn anew, each by itself, and with them the target. A draw in
    which the recipe does not reach the target counts as a ratio of 0, so that its end is the lower end of the interval.
    """
    reached, ratio = _ratios(reference, recipe)
    if min(len(reference.scores), len(recipe.scores)) < 2:
        return Comparison(reached, ratio, None, float(math.isfinite(reached[UNITS[0]])))
    rng, drawn, reaching = np.random.default_rng(0), [], 0
    for _ in range(draws):
        ours, theirs = (curves.of(rng.integers(0, len(curves.scores), len(curves.scores))) for curves in (recipe, reference))
        there, found = _ratios(theirs, ours)
        drawn.append(found)
        reaching += math.isfinite(there[UNITS[0]])
    interval = {unit: _percentiles([found[unit] for found in drawn]) for unit in ratio}
    return Comparison(reached, ratio, interval, reaching / draws)


def _ratios(reference: Curves, recipe: Curves) -> tuple[dict[str, float], dict[str, float]]:
    """What the recipe has spent at the target, and the reference's share of it."""
    target = reference.end()
    reached, theirs = recipe.reaches(target), reference.reaches(target)
    return reached, {unit: ratio(theirs[unit], reached[unit]) for unit in reached}


def ratio(reference: float, recipe: float) -> float:
    """Return reference / recipe; 1 where both are 0, since the target is then not above the score before training."""
    return 1.0 if reference == recipe else reference / recipe if recipe else math.inf


def _percentiles(values: list[float]) -> tuple[float, float]:
    low, high = (np.percentile(values, q, method=m) for q, m in ((2.5, "lower"), (97.5, "higher")))  # some are infinite
    return float(low), float(high)
