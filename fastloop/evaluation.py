"""Held-out prompts on fixed seeds: the score that counts, with standard errors and per category."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from fastloop.batches import evaluation_batch
from fastloop.config import Config
from fastloop.prompts import Prompt
from fastloop.ranks import ALONE, Ranks
from fastloop.rewards.scoring import Rewards
from fastloop.rollout import gather_scores, sampler_table, scored_rollout

EVAL_STREAM = 1 << 32  # training seeds have 32 bits: no evaluation shares its noise with training


@dataclass(frozen=True)
class Evaluation:
    """Of P prompts with M images each: the weighted sum (P, M), each term (P, M), images (P, M, height, width, 3)."""

    prompts: list[Prompt]
    scores: np.ndarray
    terms: dict[str, np.ndarray]
    images: np.ndarray

    @property
    def mean(self) -> float:
        """The mean score over all images."""
        return float(self.scores.mean())

    @property
    def stderr(self) -> float:
        """The mean's standard error over the distinct prompts; NaN for a single one."""
        return self._summary(self.scores)["stderr"]

    def categories(self) -> dict[str, dict[str, float]]:
        """Return mean, standard error and number of prompts of each category, in the order of the prompts."""
        labels = [prompt.metadata.get("category") for prompt in self.prompts]
        named = [label for label in dict.fromkeys(labels) if label is not None]
        rows = {name: [i for i, label in enumerate(labels) if label == name] for name in named}
        return {name: self._summary(self.scores, chosen) for name, chosen in rows.items()}

    def row(self) -> dict:
        """Return what eval.jsonl records."""
        return {
            "score": self._summary(self.scores),
            "rewards": {name: self._summary(values) for name, values in self.terms.items()},
            "categories": self.categories(),
        }

    def _summary(self, scores: np.ndarray, rows: list[int] | slice = slice(None)) -> dict[str, float]:
        texts = np.array([prompt.text for prompt in self.prompts])
        return summarize(scores[rows], texts[rows])


def summarize(scores: np.ndarray, prompts: np.ndarray) -> dict[str, float]:
    """Return the mean of scores, float64 (P, M), its standard error and the number of distinct prompts, of P that may repeat.

    The images of one prompt are not independent, so the standard error is taken over the G distinct prompts: with
    deviations d_g = sum of (score - mean) over the images of prompt g, it is sqrt(G / (G - 1) sum d_g^2) / (P M). Where
    every prompt has as many images, that is the standard error of the prompts' means. NaN for a single prompt.
    """
    distinct, group = np.unique(prompts, return_inverse=True)
    n = len(distinct)
    deviations = np.bincount(group, (scores - scores.mean()).sum(1))
    stderr = (n / (n - 1) * np.square(deviations).sum()) ** 0.5 / scores.size if n > 1 else float("nan")
    return {"mean": float(scores.mean()), "stderr": float(stderr), "n": n}


def evaluate(
    denoiser,
    config: Config,
    prompts: list[Prompt],
    rewards: Rewards,
    ranks: Ranks = ALONE,
    leave: Callable[[], None] = lambda: None,
) -> Evaluation:
    """Sample ``eval.images_per_prompt`` images of each prompt, on noise that ``eval.seed`` alone decides, and score them.

    The sampler is that of `Config.eval_sampling`.

    All ranks call it and get the whole. ``leave`` is as for `scored_rollout`.

    Raises:
        RunFailed: a reward failed.
    """
    m = config.eval.images_per_prompt
    repeated = [prompt for prompt in prompts for _ in range(m)]
    share = len(ranks.padded(len(repeated)))
    sampling = config.eval_sampling
    sampled = scored_rollout(
        denoiser,
        sampler_table(config.model, sampling),
        repeated,
        torch.arange(len(repeated)),
        rewards,
        ranks,
        title="  evaluation",
        leave=leave,
        sampling=sampling,
        seed=EVAL_STREAM | config.eval.seed,
        batch=min(evaluation_batch(config, denoiser, config.memory.rollout_batch), share),
        fill=denoiser.compiled,
        vae_batch=config.memory.vae_batch,
        backend=config.kernels,
        keep="none",
    )
    scores = gather_scores(rewards, ranks, len(repeated))
    images = ranks.gather_shares(sampled.images[: len(ranks.share(len(repeated)))], len(repeated))
    shape = (len(prompts), m)
    terms = {name: values.reshape(shape) for name, values in scores.terms.items()}
    images = images.reshape(*shape, *images.shape[1:])
    return Evaluation(prompts, scores.total.reshape(shape), terms, images)
