"""Which (trajectory, timestep) pairs an update covers, in which order, in which micro-batches, with which weights."""

from __future__ import annotations

import numpy as np
import torch

from fastloop.config import Config
from fastloop.plan import largest_update
from fastloop.ranks import Ranks
from fastloop.rollout import kept_steps
from fastloop.transitions import TransitionTable


def shuffled_pairs(rng: np.random.Generator, n: int, steps: torch.Tensor, fraction: float) -> np.ndarray:
    """One pass over (trajectory, timestep) pairs: int64 (n S, 2), S = fraction of the trained steps, at least one.

    Each trajectory has its own order of its timesteps. The k-th timesteps of all trajectories stand together, the trajectories
    shuffled, so that every stretch of pairs covers trajectories and groups as evenly as can be.
    """
    kept = kept_steps(steps, fraction)
    orders = np.stack([rng.permutation(steps.numpy())[:kept] for _ in range(n)])
    rows = [np.stack([i, orders[i, k]], 1) for k in range(kept) for i in [rng.permutation(n)]]
    return np.concatenate(rows)


def micro_batches(update: np.ndarray, ranks: Ranks, n: int, size: int) -> list[np.ndarray]:
    """This rank's pairs of an update, at most ``size`` at a time, the trajectories numbered within its share of the n.

    Args:
        update: int64 (M, 2), of pairs (trajectory, step).

    Returns:
        int64 (m, 2) each, as many on every rank: the last may be empty where a rank has fewer pairs.
    """
    owner = np.searchsorted(ranks.bounds(n), update[:, 0], side="right") - 1
    rounds = -(-np.bincount(owner).max() // size)
    own = update[owner == ranks.rank] - [ranks.share(n).start, 0]
    return [own[k * size : (k + 1) * size] for k in range(rounds)]


def micro_batch_sizes(config: Config, eval_prompts: int, steps_trained: torch.Tensor, ranks: Ranks) -> list[int]:
    """Rows of the largest calls of the UNet that a rank makes in rollouts, evaluations and updates."""
    images = (config.images_per_rollout, eval_prompts * config.eval.images_per_prompt)
    sizes = [min(config.memory.rollout_batch, len(ranks.padded(n))) for n in images]
    return [*sizes, min(config.memory.update_batch, -(-largest_update(config, steps_trained) // ranks.world))]


def step_weights(table: TransitionTable, steps: torch.Tensor, config: Config) -> torch.Tensor:
    """Factor of the loss of each step, float64 (T,): ``last_steps.weight`` on the last trained ones, else 1."""
    weights = torch.ones(len(table), dtype=torch.float64)
    weights[steps[-config.last_steps.count :]] = config.last_steps.weight
    return weights
