"""Rewards: a registry, weighted sums, and workers that score one batch while the next is sampled.

A reward is called as ``reward(images, prompts, metadata)`` with uint8 pictures (n, height, width, 3), n prompts and n
metadata dictionaries, and returns n finite numbers; higher is better. The pictures are read-only, and all that it is given is
its own: nothing that it does to it reaches other rewards, metrics or saved samples. It may have

- ``validate(prompts, size)``, called with all prompts and the pictures' (height, width) before any model loads, which
  raises ``ValueError`` for what it cannot score;
- ``start()``, called once before the first call: loads its model, asks its server;
- ``explain(image, prompt)``, one line for the sample grids.
"""

from __future__ import annotations

import importlib
import inspect
import json
import os
import sys
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import astuple, dataclass, field
from functools import partial
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fastloop.config import RewardConfig
from fastloop.errors import RewardFailed, RunFailed, Unscored, UserError
from fastloop.prompts import Prompt
from fastloop.rewards import jpeg, shapes
from fastloop.rewards.workers import Job, OwnProcess, Workers

# A factory, or where to import it from: the rewards with models need packages that the others do not.
REGISTRY: dict[str, Callable[..., Any] | str] = {
    "jpeg_compressibility": jpeg.Compressibility,
    "jpeg_incompressibility": jpeg.Incompressibility,
    "shapes": shapes.Shapes,
    **{f"shapes_{category}": shapes.of_category(category) for category in shapes.CATEGORIES},
    "aesthetic": "fastloop.rewards.clip_scores:Aesthetic",
    "clipscore": "fastloop.rewards.clip_scores:ClipScore",
    "pickscore": "fastloop.rewards.clip_scores:PickScore",
    "hpsv2": "fastloop.rewards.clip_scores:HPSv2",
    "imagereward": "fastloop.rewards.blip_scores:ImageReward",
    "blip_vqa": "fastloop.rewards.blip_scores:BlipVqa",
    "vlm_judge": "fastloop.rewards.judge:VlmJudge",
    "ocr": "fastloop.rewards.ocr:Ocr",
    "http": "fastloop.rewards.remote:Remote",
}


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
        if not self.count:
            self.origin = float(values[0])
        values = values - self.origin
        n, delta = len(values), float(values.mean()) - self.mean
        self.squares += float(((values - values.mean()) ** 2).sum()) + delta**2 * self.count * n / (self.count + n)
        self.mean += delta * n / (self.count + n)
        self.count += n

    def normalized(self, values: np.ndarray) -> np.ndarray:
        """(values - mean) / std; 0 where all values seen are the same."""
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
        """Loads models and asks servers. Raises ``UserError`` where a reward cannot start."""
        for i, term in enumerate(self.terms.values()):
            try:
                term.start()
            except Exception as error:  # whatever a hub's client, a model's library or a user's reward raises
                reason = (str(error).strip() or type(error).__name__).splitlines()[0]
                raise UserError(f"{self.key}.{i}: {term.config.name} cannot start: {reason}") from error

    def submit(self, images: np.ndarray, prompts: list[Prompt]) -> None:
        """Starts scoring a batch: uint8 (n, height, width, 3)."""
        texts, metadata = [p.text for p in prompts], [p.metadata for p in prompts]
        self._pending.append({label: term.workers.submit(images, texts, metadata) for label, term in self.terms.items()})

    def collect(self) -> dict[str, np.ndarray]:
        """Waits for the batches submitted: each term's values in their order, float64 (N,).

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
        """The weighted sum of terms, float64 (N,) each, normalised as configured: all of a rollout's at once."""
        normalized = {name: t.normalized(terms[name]) if self.normalize else terms[name] for name, t in self.terms.items()}
        return Scores(sum(term.config.weight * normalized[name] for name, term in self.terms.items()), terms, normalized)

    def gather(self) -> Scores:
        """As `collect`, with the weighted sum."""
        return self.total(self.collect())

    def score(self, images: np.ndarray, prompts: list[Prompt]) -> Scores:
        """Scores one batch and waits for it."""
        self.submit(images, prompts)
        return self.gather()

    def validate_any(self, images: list[np.ndarray], prompts: list[Prompt]) -> None:
        """Raises ``ValueError`` for prompts, or sizes of pictures, that a reward refuses. The pictures may differ in size."""
        for size, rows in _by_size(images).items():
            for term in self.terms.values():
                _validate(term.reward, [prompts[i] for i in rows], size)

    def score_any(self, images: list[np.ndarray], prompts: list[Prompt]) -> np.ndarray:
        """The weighted sums, float64 (n,), of pictures that may differ in size. Raises ``RewardFailed`` as `collect` does."""
        totals = np.zeros(len(images))
        for rows in _by_size(images).values():
            totals[rows] = self.score(np.stack([images[i] for i in rows]), [prompts[i] for i in rows]).total
        return totals

    def explain(self, image: np.ndarray, prompt: str) -> str | None:
        """What the rewards that can explain themselves say of a picture."""
        found = [term.reward for term in self.terms.values() if hasattr(term.reward, "explain")]
        return "; ".join(reward.explain(read_only(image), prompt) for reward in found) or None

    def take_times(self) -> dict[str, float]:
        """Seconds since this was last asked: inside rewards, and how long one worked while nobody waited for it."""
        times = {"time/reward": self._seconds, "time/reward_hidden": self._hidden}
        self._seconds = self._hidden = 0.0
        return times

    def state_dict(self) -> dict[str, list[float]]:
        """What running normalisation has seen."""
        return {label: list(astuple(term.seen)) for label, term in self.terms.items() if term.seen.count}

    def load_state_dict(self, state: dict[str, list[float]]) -> None:
        for label, moments in state.items():
            self.terms[label].seen = Moments(*moments)

    def close(self) -> None:
        for term in self.terms.values():
            term.workers.close()


def save_unscored(failure: RewardFailed, folder: Path) -> None:
    """Writes the pictures that a reward could not score, with prompts and the reason, as PNG files and failure.json."""
    folder.mkdir(parents=True, exist_ok=True)
    unscored, rows = failure.unscored, []
    for i, (image, prompt, metadata) in enumerate(zip(unscored.images, unscored.prompts, unscored.metadata, strict=True)):
        Image.fromarray(image).save(folder / f"{i:03d}.png")
        rows.append({"file": f"{i:03d}.png", "prompt": prompt, "metadata": metadata})
    facts = {"reward": unscored.reward, "error": str(failure), "pictures": rows}
    (folder / "failure.json").write_text(json.dumps(facts, indent=1, default=str))


def call(label: str, reward: Any, images: np.ndarray, prompts: list[str], metadata: list[dict]) -> np.ndarray:
    """The reward's values, float64 (n,). Raises ``RewardFailed`` for whatever else it does."""

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


def _by_size(images: list[np.ndarray]) -> dict[tuple[int, int], list[int]]:
    """Which of the pictures have each (height, width)."""
    sizes = [image.shape[:2] for image in images]
    return {size: [i for i, other in enumerate(sizes) if other == size] for size in dict.fromkeys(sizes)}


def _validate(reward: Any, prompts: list[Prompt], size: tuple[int, int]) -> None:
    if hasattr(reward, "validate"):
        reward.validate([prompt.text for prompt in prompts], size)


def _values(reward: Any, images: np.ndarray, prompts: list[str], metadata: list[dict]) -> np.ndarray:
    """One call, on pictures, lists and dictionaries of its own: nothing that a reward does to them reaches anything else."""
    return numbers(reward(read_only(images), list(prompts), deepcopy(metadata)))


def read_only(images: np.ndarray) -> np.ndarray:
    """A copy that cannot be written to by way of NumPy; what writes past it, as PyTorch may, reaches the copy alone."""
    images = images.copy()
    images.flags.writeable = False
    return images


def numbers(values: Any) -> np.ndarray:
    """What a reward returned as float64, of the same shape: numbers, booleans, arrays, tensors of any dtype and device.

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


def build(config: RewardConfig, key: str) -> Any:
    """The reward of a configuration, not started yet. Raises ``UserError`` naming ``key`` where it cannot be made."""
    if config.name in REGISTRY:
        factory = REGISTRY[config.name]
        if isinstance(factory, str):
            module, _, name = factory.partition(":")
            factory = getattr(importlib.import_module(module), name)
    elif ":" in config.name:
        function = _import(config.name, key)

        def factory(**params):
            inspect.signature(function).bind(None, None, None, **params)  # TypeError now, not after the first rollout
            return lambda images, prompts, metadata: function(images, prompts, metadata, **params)
    else:
        raise UserError(
            f"{key}.name: unknown reward {config.name!r}: one of {', '.join(REGISTRY)}, or MODULE:FUNCTION of your own"
        )
    try:
        return factory(**config.params)
    except (TypeError, ValueError, OSError) as error:
        raise UserError(f"{key}.params: {config.name}: {error}") from None


def _import(name: str, key: str) -> Callable[..., Any]:
    module_name, _, function = name.partition(":")
    # as `python -m` would: a module beside the config's user is found too, after installed ones
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        found = getattr(importlib.import_module(module_name), function)
    except (Exception, SystemExit) as error:  # whatever the user's module raises while it is imported
        raise UserError(f"{key}.name: cannot import {name}: {type(error).__name__}: {error}") from None
    if not callable(found):
        raise UserError(f"{key}.name: {name} is of type {type(found).__name__}, not a function")
    return found
