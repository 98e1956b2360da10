"""Rewards to advantages: pure functions of the rewards of a rollout, float64 (P, K), of P prompts with K images each, and the
objects of the registry, which may remember what they have seen.

Rewards are first taken relative to one of them, in float64: equal ones then give exactly 0, and a large constant in them takes
no digits from their differences. (The rounded mean of equal values need not be that value, and an optimizer that divides by
the gradient's own size would train on the rest.) `finish` gives float32, which the loss takes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from fastloop.config import Config
    from fastloop.ranks import Ranks
    from fastloop.rollout import Trajectories

EPSILON = 1e-4  # beside a standard deviation, as in DanceGRPO and Flow-GRPO


def leave_one_out(rewards: torch.Tensor) -> torch.Tensor:
    """Return A_i = r_i - mean of the other K - 1 rewards of its prompt, which sum to zero in each group (LOOP, RLOO)."""
    k, relative = rewards.shape[1], _relative_in_groups(rewards)
    return (relative - relative.mean(1, keepdim=True)) * (k / (k - 1))


def group_norm(rewards: torch.Tensor) -> torch.Tensor:
    """Return A_i = (r_i - group mean) / (group std + 1e-4), the std with K in its denominator (GRPO)."""
    relative = _relative_in_groups(rewards)
    return (relative - relative.mean(1, keepdim=True)) / (relative.std(1, correction=0, keepdim=True) + EPSILON)


def batch_norm(rewards: torch.Tensor) -> torch.Tensor:
    """Return A_i = (r_i - mean) / (std + 1e-4) over the whole rollout (DDPO without its tracker)."""
    relative = rewards - rewards[0, 0]
    return (relative - relative.mean()) / (relative.std(correction=0) + EPSILON)


def batch_mean(rewards: torch.Tensor) -> torch.Tensor:
    """Return A_i = r_i - mean over the whole rollout (REINFORCE with the simplest baseline)."""
    relative = rewards - rewards[0, 0]
    return relative - relative.mean()


def none(rewards: torch.Tensor) -> torch.Tensor:
    """Return A_i = r_i."""
    return rewards.clone()


def _relative_in_groups(rewards: torch.Tensor) -> torch.Tensor:
    return rewards - rewards[:, :1]


class Advantage:
    """Turns the rewards of a rollout into what its rows are trained with.

    One of your own is a class and a line in ``ADVANTAGES``.

    Attributes:
        needs_groups: whether it compares the images of one prompt, so that K must be at least 2.
        learned: whether what it gives for trajectories is a reward, and their rows' advantages come of `of_rows` alone.
    """

    needs_groups = False
    learned = False

    def prepare(self, config: Config, denoiser, steps: torch.Tensor, ranks: Ranks) -> None:
        """Make ready for a run with a loaded model, which trains these steps, int64 (S,)."""

    def of_rows(
        self, trajectories: Trajectories, found: torch.Tensor, iteration: int
    ) -> tuple[torch.Tensor, dict[str, float]]:
        """Turn what was found for trajectories into what their rows are trained with: the same, unless latents count.

        Args:
            trajectories: of this rank, of a rollout or of all that a `Replay` keeps. found: float32, of all ranks, of these
                trajectories. iteration: finished so far.

        Returns:
            float32, of all ranks, for each trajectory or each of its S steps; and metrics.
        """
        return found, {}

    def __call__(self, prompts: list[str], terms: dict[str, torch.Tensor], weights: dict[str, float]) -> torch.Tensor:
        """Return the advantages of P prompts with K images each.

        Args:
            prompts: P texts. terms: of the reward, by label, float64 (P, K) each, normalised. weights: by label.

        Returns:
            float64 (P, K), one for each trajectory, or (P, K, S), one for each of its S trained steps.
        """
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any] | None:
        """Return what it remembers, as plain values; ``None`` where it remembers nothing."""
        return None

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""


def weighted_sum(terms: dict[str, torch.Tensor], weights: dict[str, float]) -> torch.Tensor:
    """Return the reward, the sum of weight x term, of the terms' shape."""
    return sum(weights[label] * values for label, values in terms.items())


@dataclass(frozen=True)
class OfReward(Advantage):
    """A function of the weighted sum alone, without a memory."""

    function: Callable[[torch.Tensor], torch.Tensor]
    needs_groups: bool = False

    def __call__(self, prompts, terms, weights) -> torch.Tensor:
        """Return the function of the weighted sum, float64 (P, K)."""
        return self.function(weighted_sum(terms, weights))


class PromptTracker(Advantage):
    """DDPO's per-prompt running mean and std: the last ``buffer`` rewards of each prompt.

    A prompt with fewer than ``minimum`` rewards uses the mean and std of the rollout, as in ddpo-pytorch.
    """

    def __init__(self, buffer: int = 32, minimum: int = 16) -> None:
        self.buffer, self.minimum = buffer, minimum
        self.history: dict[str, deque[float]] = {}

    def __call__(self, prompts, terms, weights) -> torch.Tensor:
        """Record the rewards, and return their advantages (P, K)."""
        rewards = weighted_sum(terms, weights)
        for prompt, group in zip(prompts, rewards.tolist(), strict=True):
            self.history.setdefault(prompt, deque(maxlen=self.buffer)).extend(group)
        advantages = batch_norm(rewards)
        for i, prompt in enumerate(prompts):
            if len(self.history[prompt]) >= self.minimum:
                first = rewards[i, 0]
                seen = torch.tensor(list(self.history[prompt]), dtype=rewards.dtype) - first
                advantages[i] = (rewards[i] - first - seen.mean()) / (seen.std(correction=0) + EPSILON)
        return advantages

    def state_dict(self) -> dict[str, list[float]]:
        """Return the rewards that are remembered of each prompt, oldest first."""
        return {prompt: list(seen) for prompt, seen in self.history.items()}

    def load_state_dict(self, state: dict[str, list[float]]) -> None:
        """Take back what `state_dict` gave."""
        self.history = {prompt: deque(seen, maxlen=self.buffer) for prompt, seen in state.items()}


def _value() -> Advantage:
    from fastloop.values import ValueBaseline  # with the rollout's rows, which only a run needs

    return ValueBaseline()


ADVANTAGES: dict[str, Callable[[], Advantage]] = {
    "leave_one_out": lambda: OfReward(leave_one_out, needs_groups=True),
    "group_norm": lambda: OfReward(group_norm, needs_groups=True),
    "batch_norm": lambda: OfReward(batch_norm),
    "batch_mean": lambda: OfReward(batch_mean),
    "prompt_tracker": PromptTracker,
    "value": _value,
    "none": lambda: OfReward(none),
}


def finish(advantages: torch.Tensor, clamp: float | None, normalize: bool) -> torch.Tensor:
    """Divide by the global std where ``normalize`` says so, then clamp to +-``clamp`` unless that is ``None``.

    Returns float32, of the shape given.
    """
    if normalize:
        advantages = advantages / (advantages.std(correction=0) + EPSILON)
    return (advantages if clamp is None else advantages.clamp(-clamp, clamp)).float()
