"""Which prompts a rollout trains, for bench/levers.py: others in place of those without spread, or drawn by their spread.

A prompt whose images all have the same reward has no gradient. Redrawing such prompts counts the others more often, by one
factor where they come from the whole set; drawing by spread is corrected by the probability of each draw.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from fastloop.advantages import Advantage, leave_one_out, weighted_sum
from fastloop.prompts import Prompt, PromptStream
from fastloop.rollout import Trajectories
from fastloop.trainer import Trainer

KEPT = 0.9  # share of what was known of a category's spread when another rollout is seen
OTHER_NUMBERS = 1 << 40  # a redrawn trajectory's number is so far from the one whose place it takes
OTHER_PROMPTS = 1 << 33  # seeds have 32 bits


class BySpread(Advantage):
    """Leave-one-out advantages of prompts that are drawn with probability q, times 1 / (N q) for N prompts; unbiased.

    q is the same for all prompts of a category (of a text, where prompts have no category): a share is even, the rest goes by
    the spread of rewards within a prompt, the root of a moving average of their variance in earlier rollouts. With K images a
    gradient's noise grows with that spread, and the variance of the corrected mean is least for q in proportion to it.

    Attributes:
        variance: by category, of those that have been seen.
    """

    needs_groups = True

    def __init__(self) -> None:
        self.variance: dict[str, float] = {}

    def draws(self, stream: PromptStream, share: float) -> Callable[[int, int], list[Prompt]]:
        """Return what stands for the stream's ``draw``: its prompts by their spread, ``share`` of them evenly."""
        self.category = {prompt.text: prompt.metadata.get("category", prompt.text) for prompt in stream.prompts}

        def draw(start: int, count: int) -> list[Prompt]:
            q = self.probabilities(stream.prompts, share)
            chosen = np.random.default_rng([OTHER_PROMPTS | stream.seed, start]).choice(len(q), count, p=q)
            self.factors = torch.from_numpy(1 / (len(q) * q[chosen]))
            return [stream.prompts[i] for i in chosen]

        return draw

    def probabilities(self, prompts: list[Prompt], share: float) -> np.ndarray:
        """Return q, float64 (N,). A category that has not been seen counts as the mean of those that have."""
        known = np.sqrt(list(self.variance.values()))
        unseen = known.mean() if known.any() else 1.0
        spread = {name: self.variance[name] ** 0.5 if name in self.variance else unseen for name in self.category.values()}
        by_spread = np.array([spread[self.category[prompt.text]] for prompt in prompts])
        if not by_spread.any():  # nothing differs anywhere
            by_spread += 1
        return share / len(prompts) + (1 - share) * by_spread / by_spread.sum()

    def __call__(self, prompts, terms, weights) -> torch.Tensor:
        """Return advantages (P, K), and remember the variances."""
        rewards = weighted_sum(terms, weights)
        categories = np.array([self.category[text] for text in prompts])
        for name in sorted(set(categories)):
            seen = rewards[torch.from_numpy(categories == name)].var(1).mean().item()
            self.variance[name] = KEPT * self.variance.get(name, seen) + (1 - KEPT) * seen
        return self.factors[:, None] * leave_one_out(rewards)

    def state_dict(self):
        """Return the variances."""
        return {"variance": self.variance}

    def load_state_dict(self, state) -> None:
        """Take them back."""
        self.variance = state["variance"]


def redrawn(trainer: Trainer, times: int, most: float, same: bool) -> Callable[[list[Prompt], torch.Tensor], Trajectories]:
    """Return a rollout in which groups whose rewards lie within ``most`` make room for others, at most ``times`` times.

    ``same``: for other images of the same prompt, in place of another prompt.
    """
    inner, k, p = trainer.rollout, trainer.config.images_per_prompt, trainer.config.prompts_per_step
    stream = PromptStream(trainer.prompts.prompts, OTHER_PROMPTS | trainer.config.seed)

    def rollout(prompts, ids):
        trajectories, terms = inner(prompts, ids), trainer.rewards.collect()
        for attempt in range(times):
            rewards = total(trainer, terms).reshape(-1, k)
            flat = np.flatnonzero(np.ptp(rewards, 1) <= most)
            if len(flat) == 0:
                break
            rows = (flat[:, None] * k + np.arange(k)).ravel()
            drawn = [prompts[i * k] for i in flat]
            if not same:
                drawn = stream.draw((trainer.iteration * times + attempt) * p, len(flat))
            again = [prompt for prompt in drawn for _ in range(k)]
            fresh = inner(again, ids[torch.from_numpy(rows)] + (attempt + 1) * OTHER_NUMBERS)
            _put(trajectories, fresh, rows)
            for label, values in trainer.rewards.collect().items():
                terms[label][rows] = values
            for row, prompt in zip(rows.tolist(), again, strict=True):
                prompts[row] = prompt  # in the trainer's own list, which its metrics look at
        hand_over(trainer.rewards, terms)
        return trajectories

    return rollout


def _put(into: Trajectories, fresh: Trajectories, rows: np.ndarray) -> None:
    """Replace trajectories."""
    at = torch.from_numpy(rows)
    into.latents[:, at], into.log_probs[:, at], into.ids[at] = fresh.latents, fresh.log_probs, fresh.ids
    into.images[rows] = fresh.images
    for row, prompt in zip(rows.tolist(), fresh.prompts, strict=True):
        into.prompts[row] = prompt


def total(trainer: Trainer, terms: dict[str, np.ndarray]) -> np.ndarray:
    """Return the weighted sum of terms as they are, float64 (n,)."""
    return weighted_sum(terms, {reward.key: reward.weight for reward in trainer.config.rewards})


def hand_over(rewards, terms: dict[str, np.ndarray]) -> None:
    """Have rewards that were collected already collected once more, by the trainer."""

    def collect() -> dict[str, np.ndarray]:
        del rewards.collect
        return terms

    rewards.collect = collect
