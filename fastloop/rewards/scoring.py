"""Weighted sums of rewards, and workers that score one batch while the next is sampled."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import astuple, dataclass, field
from functools import partial
from typing import Any

import numpy as np

from fastloop.config import RewardConfig
from fastloop.errors import UserError
from fastloop.prompts import Prompt
from fastloop.rewards.calls import call, read_only
from fastloop.rewards.registry import build
from fastloop.rewards.workers import Job, OwnProcess, Workers


@dataclass(frozen=True)
class Scores:
    """Rewards of N pictures, float64 (N,): the weighted sum, and each term before and after its normalisation."""

    total: np.ndarray
    terms: dict[str, np.ndarray]
    normalized: dict[str, np.ndarray]


@dataclass
class Moments:
    """Count, mean and sum of squared deviations of all values seen (Chan's update of Welford's).

    Values and mean are relative to ``origin``, the first value seen: equal values then have no deviation at all, and a large
    constant in them takes no digits from the rest.
    """

    count: float = 0.0
    mean: float = 0.0
    squares: float = 0.0
    origin: float = 0.0

    def add(self, values: np.ndarray) -> None:
        """Take in values, float64 (n,)."""
        if not self.count:
            self.origin = float(values[0])
        values = values - self.origin
        n, delta = len(values), float(values.mean()) - self.mean
        self.squares += float(((values - values.mean()) ** 2).sum()) + delta**2 * self.count * n / (self.count + n)
        self.mean += delta * n / (self.count + n)
        self.count += n

    def normalized(self, values: np.ndarray) -> np.ndarray:
        """Return (values - mean) / std, float64; 0 where all values seen are the same."""
        return (values - self.origin - self.mean) / ((self.squares / self.count) ** 0.5 + 1e-8)


@dataclass
class Term:
    """One reward of the sum. ``reward`` is this process's object, which may score in another one: only ``workers`` call."""

    config: RewardConfig
    reward: Any
    workers: Workers
    start: Callable[[], None]
    seen: Moments = field(default_factory=Moments)

    def normalized(self, values: np.ndarray) -> np.ndarray:
        """Normalise values, float64 (n,), as configured; running moments take them in first."""
        if self.config.normalize is None:
            return values
        moments = self.seen if self.config.normalize == "running" else Moments()
        moments.add(values)
        return moments.normalized(values)


class Rewards:
    """The weighted sum of a configuration, scored in the background.

    Args:
        size: (height, width), or ``None`` where prompts and sizes are not known yet. key: of the list, for messages.
        share: rewards of the same settings are taken from there, with model and worker.
        normalize: whether each term's ``normalize`` counts; only in training, so that held-out scores can be compared.

    Raises:
        UserError: an unknown name, bad parameters, or prompts or a picture size (height, width) that a reward refuses.
    """

    def __init__(
        self,
        configs: list[RewardConfig],
        prompts: list[Prompt],
        size: tuple[int, int] | None,
        key: str = "rewards",
        share: Rewards | None = None,
        normalize: bool = False,
    ) -> None:
        self.terms: dict[str, Term] = {}
        self.key, self.normalize = key, normalize
        for i, config in enumerate(configs):
            if config.key in self.terms:
                raise UserError(
                    f"{key}.{i}.name: {config.key} is listed twice: give it once, with its whole weight, or give each a label"
                )
            term = share.terms.get(config.key) if share else None
            if term and _settings(term.config) == _settings(config):
                term = Term(config, term.reward, term.workers, term.start)
            else:
                term = _term(config, f"{key}.{i}")
            try:
                if size is not None:
                    _validate(term.reward, prompts, size)
            except ValueError as error:
                raise UserError(f"{key}.{i}.name: {error}") from None
            self.terms[config.key] = term
        self._pending: list[dict[str, Job]] = []
        self._seconds = self._hidden = 0.0

    def start(self) -> None:
        """Load models and ask servers. Raises ``UserError`` where a reward cannot start."""
        for i, term in enumerate(self.terms.values()):
            try:
                term.start()
            except Exception as error:  # whatever a hub's client, a model's library or a user's reward raises
                reason = (str(error).strip() or type(error).__name__).splitlines()[0]
                raise UserError(f"{self.key}.{i}: {term.config.name} cannot start: {reason}") from error

    def submit(self, images: np.ndarray, prompts: list[Prompt]) -> None:
        """Start scoring a batch: uint8 (n, height, width, 3)."""
        texts, metadata = [p.text for p in prompts], [p.metadata for p in prompts]
        self._pending.append({label: term.workers.submit(images, texts, metadata) for label, term in self.terms.items()})

    def collect(self) -> dict[str, np.ndarray]:
        """Wait for the batches submitted. Returns each term's values in their order, float64 (N,).

        Raises:
            RewardFailed: a reward raised, took too long, or returned a wrong number of values or a non-finite one.
        """
        pending, self._pending = self._pending, []
        waiting_since = time.perf_counter()
        try:
            parts = [{label: self.terms[label].workers.result(job) for label, job in jobs.items()} for jobs in pending]
        finally:
            for jobs in pending:
                for job in jobs.values():
                    job.future.cancel()
        spans = [(job.began, job.ended) for jobs in pending for job in jobs.values()]
        self._seconds += sum(ended - began for began, ended in spans)
        self._hidden += _covered([(began, min(ended, waiting_since)) for began, ended in spans])
        return {label: np.concatenate([np.empty(0), *(part[label] for part in parts)]) for label in self.terms}

    def total(self, terms: dict[str, np.ndarray]) -> Scores:
        """Compute the weighted sum of terms, float64 (N,) each, normalised as configured: all of a rollout's at once."""
        normalized = {name: t.normalized(terms[name]) if self.normalize else terms[name] for name, t in self.terms.items()}
        return Scores(sum(term.config.weight * normalized[name] for name, term in self.terms.items()), terms, normalized)

    def gather(self) -> Scores:
        """Wait as `collect` does, and add the weighted sum."""
        return self.total(self.collect())

    def score(self, images: np.ndarray, prompts: list[Prompt]) -> Scores:
        """Score one batch and wait for it."""
        self.submit(images, prompts)
        return self.gather()

    def validate_any(self, images: list[np.ndarray], prompts: list[Prompt]) -> None:
        """Raise ``ValueError`` for prompts, or sizes of pictures, that a reward refuses. The pictures may differ in size."""
        for size, rows in _by_size(images).items():
            for term in self.terms.values():
                _validate(term.reward, [prompts[i] for i in rows], size)

    def score_any(self, images: list[np.ndarray], prompts: list[Prompt]) -> np.ndarray:
        """Return the weighted sums, float64 (n,), of pictures that may differ in size.

        Raises ``RewardFailed`` as `collect` does.
        """
        totals = np.zeros(len(images))
        for rows in _by_size(images).values():
            totals[rows] = self.score(np.stack([images[i] for i in rows]), [prompts[i] for i in rows]).total
        return totals

    def explain(self, image: np.ndarray, prompt: str) -> str | None:
        """Return what the rewards that can explain themselves say of a picture."""
        found = [term.reward for term in self.terms.values() if hasattr(term.reward, "explain")]
        return "; ".join(reward.explain(read_only(image), prompt) for reward in found) or None

    def take_times(self) -> dict[str, float]:
        """Return the seconds since this was last asked: inside rewards, and how long one worked while nobody waited for it."""
        times = {"time/reward": self._seconds, "time/reward_hidden": self._hidden}
        self._seconds = self._hidden = 0.0
        return times

    def state_dict(self) -> dict[str, list[float]]:
        """Return what running normalisation has seen."""
        return {label: list(astuple(term.seen)) for label, term in self.terms.items() if term.seen.count}

    def load_state_dict(self, state: dict[str, list[float]]) -> None:
        """Take back what `state_dict` gave."""
        for label, moments in state.items():
            self.terms[label].seen = Moments(*moments)

    def close(self) -> None:
        """End threads and processes."""
        for term in self.terms.values():
            term.workers.close()


def _by_size(images: list[np.ndarray]) -> dict[tuple[int, int], list[int]]:
    """Which of the pictures have each (height, width)."""
    sizes = [image.shape[:2] for image in images]
    return {size: [i for i, other in enumerate(sizes) if other == size] for size in dict.fromkeys(sizes)}


def _validate(reward: Any, prompts: list[Prompt], size: tuple[int, int]) -> None:
    if hasattr(reward, "validate"):
        reward.validate([prompt.text for prompt in prompts], size)


def _covered(spans: list[tuple[float, float]]) -> float:
    """The length of a union of intervals; those that end before they begin are empty."""
    length, reached = 0.0, float("-inf")
    for began, ended in sorted(spans):
        length += max(0.0, ended - max(began, reached))
        reached = max(reached, ended)
    return length


def _settings(config: RewardConfig) -> tuple:
    return config.name, config.params, config.worker, config.workers, config.timeout


def _term(config: RewardConfig, key: str) -> Term:
    reward = build(config, key)
    if config.worker == "process":
        processes = [OwnProcess(config.key, partial(_build_elsewhere, config, key)) for _ in range(config.workers)]
        return Term(config, reward, Workers(config.key, processes, config.timeout), lambda: [p.start() for p in processes])
    calls = [partial(call, config.key, reward)] * config.workers
    return Term(config, reward, Workers(config.key, calls, config.timeout), getattr(reward, "start", lambda: None))


def _build_elsewhere(config: RewardConfig, key: str) -> tuple[Callable, Callable]:
    """In the reward's own process: what starts it and what calls it."""
    reward = build(config, key)
    return getattr(reward, "start", lambda: None), partial(call, config.key, reward)
