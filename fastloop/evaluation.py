"""Held-out prompts on fixed seeds: the score that counts, with standard errors and per category."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from tqdm import tqdm

from fastloop.config import Config
from fastloop.prompts import Prompt
from fastloop.rewards import Rewards
from fastloop.rollout import rollout, sampler_table

EVAL_STREAM = 1 << 32  # training seeds have 32 bits: no evaluation shares its noise with training


@dataclass(frozen=True)
class Evaluation:
    """Scores of P prompts with M images each: the weighted sum (P, M), each term (P, M), images (P, M, height, width, 3)."""

    prompts: list[Prompt]
    scores: np.ndarray
    terms: dict[str, np.ndarray]
    images: np.ndarray

    @property
    def mean(self) -> float:
        return float(self.scores.mean())

    @property
    def stderr(self) -> float:
        return summarize(self.scores)["stderr"]

    def categories(self) -> dict[str, dict[str, float]]:
        """Mean, standard error and number of prompts of each category, in the order of the prompts."""
        labels = [prompt.metadata.get("category") for prompt in self.prompts]
        named = [label for label in dict.fromkeys(labels) if label is not None]
        return {name: summarize(self.scores[[label == name for label in labels]]) for name in named}

    def row(self) -> dict:
        """What eval.jsonl records."""
        return {
            "score": summarize(self.scores),
            "rewards": {name: summarize(values) for name, values in self.terms.items()},
            "categories": self.categories(),
        }


def summarize(scores: np.ndarray) -> dict[str, float]:
    """Mean over (P, M) scores and its standard error over the P prompts, whose images are not independent."""
    per_prompt = scores.mean(1)
    stderr = per_prompt.std(ddof=1) / len(per_prompt) ** 0.5 if len(per_prompt) > 1 else float("nan")
    return {"mean": float(per_prompt.mean()), "stderr": float(stderr), "n": len(per_prompt)}


def evaluate(
    denoiser,
    config: Config,
    prompts: list[Prompt],
    rewards: Rewards,
    on_step: Callable[[int], None] = lambda trajectories: None,
) -> Evaluation:
    """Samples ``eval.images_per_prompt`` images of each prompt with noise that depends on ``eval.seed`` alone, and scores them.

    Raises:
        RunFailed: a reward failed.
    """
    m = config.eval.images_per_prompt
    repeated = [prompt for prompt in prompts for _ in range(m)]
    table = sampler_table(config.model, config.sampling, config.eval.steps)
    with tqdm(total=len(repeated) * len(table), desc="  evaluation", leave=False, disable=None) as bar:

        def advance(n: int) -> None:
            bar.update(n)
            on_step(n)

        sampled = rollout(
            denoiser,
            table,
            [prompt.text for prompt in repeated],
            torch.arange(len(repeated)),
            sampling=config.sampling,
            seed=EVAL_STREAM | config.eval.seed,
            batch=config.memory.rollout_batch,
            vae_batch=config.memory.vae_batch,
            backend=config.kernels,
            keep_latents=False,
            on_images=lambda start, images: rewards.submit(images, repeated[start : start + len(images)]),
            on_step=advance,
        )
    scores = rewards.gather()
    shape = (len(prompts), m)
    terms = {name: values.reshape(shape) for name, values in scores.terms.items()}
    return Evaluation(prompts, scores.total.reshape(shape), terms, sampled.images.reshape(*shape, *sampled.images.shape[1:]))
