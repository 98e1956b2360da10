"""What is logged of a rollout. Every name is defined in docs/metrics.md."""

from __future__ import annotations

from typing import Any

import numpy as np

from fastloop.prompts import Prompt
from fastloop.rewards.scoring import Scores


def reward_metrics(scores: Scores, prompts: list[Prompt], images_per_prompt: int) -> dict[str, float]:
    """Return the metrics ``reward/*`` of the scores of N pictures and their N prompts, those of one prompt together."""
    groups = scores.total.reshape(-1, images_per_prompt)
    metrics = {  # deviations of differences, so that equal rewards give exactly 0
        "reward/mean": float(scores.total.mean()),
        "reward/std": float((scores.total - scores.total[0]).std()),
        "reward/group_std": float((groups - groups[:, :1]).std(1).mean()),
    }
    metrics |= {f"reward/{name}": float(values.mean()) for name, values in scores.terms.items()}
    categories = np.array([prompt.metadata.get("category") for prompt in prompts])
    for category in sorted({c for c in categories if c is not None}):
        metrics[f"reward/category/{category}"] = float(scores.total[categories == category].mean())
    return metrics


def held_out_falling(
    rows: list[dict[str, Any]], evals: list[dict[str, Any]], weights: dict[str, float], errors: float
) -> list[str]:
    """Find the held-out rewards that fall while the training reward rises: reward hacking, or overfitting to the prompts.

    A held-out reward falls where its newest mean is below its best earlier one by more than ``errors`` standard errors of the
    difference, the two taken as independent. The training reward rises where it is higher now than it was then: the weighted
    sum of `reward/LABEL`, averaged over the iterations between two evaluations, and at the start that of the first iteration.

    Args:
        rows: of metrics.jsonl. evals: of eval.jsonl. weights: of the training rewards, by label.
    """
    if len(evals) < 2 or not rows:
        return []
    train = np.array([sum(weight * row[f"reward/{label}"] for label, weight in weights.items()) for row in rows])
    iterations = np.array([row["iteration"] for row in rows])
    ends = np.array([row["iteration"] for row in evals])

    def level(i: int) -> float:
        between = (iterations > ends[i - 1]) & (iterations <= ends[i]) if i else iterations == iterations[0]
        return train[between].mean() if between.any() else np.nan

    falling = []
    for name in evals[-1]["rewards"]:
        estimates = [row["rewards"][name] for row in evals]
        means = np.array([estimate["mean"] for estimate in estimates])
        spreads = np.array([estimate["stderr"] or 0.0 for estimate in estimates])  # null with one prompt
        best = int(means[:-1].argmax())
        bound = errors * np.hypot(spreads[best], spreads[-1])
        if means[best] - means[-1] > bound and level(len(evals) - 1) > level(best):
            falling.append(name)
    return falling


def image_statistics(images: np.ndarray) -> dict[str, np.ndarray]:
    """Measure signs of collapse of uint8 pictures (N, height, width, 3): float64 (N,), whose means are a run's metrics.

    ``image/saturation`` is the share of values at 0 or 255; ``image/entropy`` the Shannon entropy in bits of a
    picture's brightness levels (0 for a flat picture, at most 8).
    """
    luma = (images @ np.array([0.299, 0.587, 0.114], np.float32)).astype(np.uint8)
    entropies = []
    for picture in luma:
        share = np.bincount(picture.ravel(), minlength=256) / picture.size
        share = share[share > 0]
        entropies.append(-(share * np.log2(share)).sum())
    return {
        "image/saturation": ((images == 0) | (images == 255)).mean((1, 2, 3)),
        "image/entropy": np.array(entropies, np.float64),
    }
