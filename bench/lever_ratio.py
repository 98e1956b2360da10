"""Trust regions whose ratio is another one than a step's mean over the elements of a latent, for bench/levers.py.

At the policy that sampled their gradients are those of `clipped`; they differ in what the clip bounds, and so in the units of
``clip_range``:

- `total`: exp of the log-prob's *sum* over the D elements, the true importance ratio of a step. A window of eps is about that
  of eps / D for the mean: 0.05 with the bundled model (D = 512) is about 1e-4 there, and 0.2 with SD 1.5 (D = 16,384) 1.2e-5.
- `trajectory`: one ratio for all trained steps of a trajectory, the geometric mean of theirs, as in GCPO.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from fastloop.batches import kept_steps
from fastloop.objectives import Objective, clipped


@dataclass(frozen=True)
class ClippedRatio(Objective):
    """The clipped loss of another ratio; computed from the log-prob, so from the fused one on a GPU.

    Attributes:
        total: whether log-probs are sums over the latent's elements; the loss is then divided by D. trajectory: whether the
            rows of a trajectory, which must be in one micro-batch, share their ratio.
    """

    total: bool = False
    trajectory: bool = False

    def terms(self, ops, predict, batch, config):
        """Compute the loss as any objective does; clip fractions and log ratios are those of this ratio."""
        outputs = predict(batch.x_t, batch.timestep)
        one = replace(batch, advantage=-torch.ones_like(batch.advantage))  # the score function's loss is then the log-prob
        shared = {"guidance": config.sampling.guidance_scale, "clip_range": config.clip_range, "seed": config.seed}
        terms = ops.policy_loss(*outputs, one, objective="score_function", **shared)
        change, size = terms.loss - batch.log_prob_old, batch.x_t[0].numel() if self.total else 1
        if self.trajectory:
            same = (batch.trajectory[:, None] == batch.trajectory).float()
            change = same @ change / same.sum(1)
        change = size * change
        loss = self.loss(change, torch.zeros_like(change), batch.advantage, config.clip_range, None) / size
        change = change.detach()
        ratio, eps = change.exp(), config.clip_range
        outside = ((ratio > 1 + eps).sum(), (ratio < 1 - eps).sum())
        statistics = torch.stack([*outside, 0.5 * change.square().sum(), ratio.sum(), (ratio - 1).abs().max()])
        return replace(terms, loss=loss, statistics=statistics), outputs  # terms.ratio stays that of the replay's check


RATIOS = {
    "total": ClippedRatio("ratio_total", clipped, total=True),
    "trajectory": ClippedRatio("ratio_trajectory", clipped, trajectory=True),
    "trajectory_total": ClippedRatio("ratio_trajectory_total", clipped, total=True, trajectory=True),
}


def whole_trajectories(rng: np.random.Generator, rows, fraction: float) -> np.ndarray:
    """Draw a pass over the rows of a rollout as `batches.shuffled` does, but keep those of each trajectory together."""
    counts = np.bincount(rows.trajectory)
    orders = [
        start + rng.permutation(count)[: kept_steps(count, fraction)]
        for start, count in zip(np.cumsum(counts) - counts, counts, strict=True)
    ]
    return np.concatenate([orders[i] for i in rng.permutation(len(orders))])
