"""Rewards: a registry, weighted sums, and an executor that scores one batch while the next is sampled.

A reward is called as ``reward(images, prompts, metadata)`` with uint8 pictures (n, height, width, 3), n prompts and n
metadata dictionaries, and returns n finite numbers; higher is better. It may have ``validate(prompts, size)``, called
with all prompts and the pictures' (height, width) before any model loads, which raises ``ValueError`` for what it cannot
score, and ``explain(image, prompt)``, one line for the sample grids.
"""

from __future__ import annotations

import importlib
import inspect
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastloop.config import RewardConfig
from fastloop.errors import RunFailed, UserError
from fastloop.prompts import Prompt
from fastloop.rewards import jpeg, shapes

REGISTRY: dict[str, Callable[..., Any]] = {
    "jpeg_compressibility": jpeg.Compressibility,
    "jpeg_incompressibility": jpeg.Incompressibility,
    "shapes": shapes.Shapes,
    **{f"shapes_{category}": shapes.of_category(category) for category in shapes.CATEGORIES},
}


@dataclass(frozen=True)
class Scores:
    """Rewards of N pictures: the weighted sum and each term before its weight, float64 (N,)."""

    total: np.ndarray
    terms: dict[str, np.ndarray]


class Rewards:
    """The weighted sum of a configuration, scored in the background.

    Raises:
        UserError: an unknown name, bad parameters, or prompts or a picture size (height, width) that a reward refuses.
    """

    def __init__(
        self, configs: list[RewardConfig], prompts: list[Prompt], size: tuple[int, int], key: str = "rewards"
    ) -> None:
        self.terms: dict[str, tuple[float, Any]] = {}
        for i, config in enumerate(configs):
            if config.name in self.terms:
                raise UserError(f"{key}.{i}.name: {config.name} is listed twice: give it once, with its whole weight")
            reward = _build(config, f"{key}.{i}")
            if hasattr(reward, "validate"):
                try:
                    reward.validate([prompt.text for prompt in prompts], size)
                except ValueError as error:
                    raise UserError(f"{key}.{i}.name: {error}") from None
            self.terms[config.name] = (config.weight, reward)
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="reward")
        self._pending: list[Future] = []
        self._seconds = 0.0

    def submit(self, images: np.ndarray, prompts: list[Prompt]) -> None:
        """Starts scoring a batch: uint8 (n, height, width, 3)."""
        self._pending.append(self._executor.submit(self._score, images, prompts))

    def gather(self) -> Scores:
        """Waits for the batches submitted, in their order.

        Raises:
            RunFailed: a reward raised, or returned a wrong number of values or a non-finite one.
        """
        pending, self._pending = self._pending, []
        try:
            parts = [future.result() for future in pending]
        finally:
            for future in pending:
                future.cancel()
        return self.total({name: np.concatenate([np.empty(0), *(part[name] for part in parts)]) for name in self.terms})

    def total(self, terms: dict[str, np.ndarray]) -> Scores:
        """The weighted sum of terms, float64 (N,) each."""
        return Scores(sum(weight * terms[name] for name, (weight, _) in self.terms.items()), terms)

    def score(self, images: np.ndarray, prompts: list[Prompt]) -> Scores:
        """Scores one batch and waits for it."""
        self.submit(images, prompts)
        return self.gather()

    def explain(self, image: np.ndarray, prompt: str) -> str | None:
        """What the rewards that can explain themselves say of a picture."""
        lines = [reward.explain(image, prompt) for _, reward in self.terms.values() if hasattr(reward, "explain")]
        return "; ".join(lines) or None

    def take_seconds(self) -> float:
        """Seconds spent scoring since this was last asked."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    def close(self) -> None:
        self._executor.shutdown(wait=False, cancel_futures=True)

    def _score(self, images: np.ndarray, prompts: list[Prompt]) -> dict[str, np.ndarray]:
        started = time.perf_counter()
        texts, metadata = [p.text for p in prompts], [p.metadata for p in prompts]
        scored = {name: _call(name, reward, images, texts, metadata) for name, (_, reward) in self.terms.items()}
        self._seconds += time.perf_counter() - started
        return scored


def _call(name: str, reward: Any, images: np.ndarray, prompts: list[str], metadata: list[dict]) -> np.ndarray:
    try:
        values = _values(reward, images, prompts, metadata)
    except Exception as error:
        culprit = _first_failing(reward, images, prompts, metadata)
        cause = f"{type(error).__name__}: {error}"
        raise RunFailed(f"reward {name} failed for the prompt {prompts[culprit]!r}: {cause}") from error
    if values.shape != (len(images),):
        raise RunFailed(
            f"reward {name} returned shape {values.shape} for {len(images)} images (first prompt {prompts[0]!r}): "
            "return one number for each image"
        )
    if not np.isfinite(values).all():
        culprit = int(np.flatnonzero(~np.isfinite(values))[0])
        raise RunFailed(f"reward {name} returned {values[culprit]} for the prompt {prompts[culprit]!r}")
    return values


def _values(reward: Any, images: np.ndarray, prompts: list[str], metadata: list[dict]) -> np.ndarray:
    return np.asarray(reward(images, prompts, metadata), dtype=np.float64)


def _first_failing(reward: Any, images: np.ndarray, prompts: list[str], metadata: list[dict]) -> int:
    """The index of the first picture that fails alone; 0 where the failure needs the whole batch."""
    for i in range(len(images)):
        try:
            _values(reward, images[i : i + 1], prompts[i : i + 1], metadata[i : i + 1])
        except Exception:
            return i
    return 0


def _build(config: RewardConfig, key: str) -> Any:
    if config.name in REGISTRY:
        factory = REGISTRY[config.name]
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
    except (TypeError, ValueError) as error:
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
