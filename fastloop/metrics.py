"""What is logged of a rollout. Every name is defined in docs/metrics.md."""

from __future__ import annotations

import numpy as np
import torch

from fastloop.prompts import Prompt
from fastloop.rewards import Scores


def reward_metrics(rewards: torch.Tensor, scores: Scores, prompts: list[Prompt]) -> dict[str, float]:
    """Of the rewards (P, K), their terms (N = P K) and the N prompts."""
    metrics = {
        "reward/mean": rewards.mean().item(),
        "reward/std": rewards.std(correction=0).item(),
        "reward/group_std": rewards.std(1, correction=0).mean().item(),
    }
    metrics |= {f"reward/{name}": float(values.mean()) for name, values in scores.terms.items()}
    categories = np.array([prompt.metadata.get("category") for prompt in prompts])
    for category in sorted({c for c in categories if c is not None}):
        metrics[f"reward/category/{category}"] = float(scores.total[categories == category].mean())
    return metrics


def image_statistics(images: np.ndarray) -> dict[str, np.ndarray]:
    """Of uint8 pictures (N, height, width, 3), signs of collapse, float64 (N,); a run's metrics are their means.

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
