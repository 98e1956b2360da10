"""An algorithm is a name for an advantage, an objective and defaults: the one value between LOOP and its baselines."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Algorithm:
    """How a reward becomes an advantage, what is maximised with it, and how often a rollout is used."""

    advantage: str
    objective: str
    updates_per_rollout: int
    advantage_clamp: float | None = None


ALGORITHMS = {
    # leave-one-out PPO, arXiv 2503.00897; whether the paper takes the min or the clipped term alone could not be read
    "loop": Algorithm("leave_one_out", "clipped", 2),
    # REINFORCE leave-one-out, arXiv 2402.14740
    "rloo": Algorithm("leave_one_out", "score_function", 1),
    # DDPO-IS, arXiv 2305.13301: per-prompt running mean and std, clamp 5 as in ddpo-pytorch
    "ppo": Algorithm("prompt_tracker", "clipped", 2, advantage_clamp=5.0),
    # DDPO-SF with the batch mean as baseline
    "reinforce": Algorithm("batch_mean", "score_function", 1),
    # group-relative advantages as DanceGRPO and Flow-GRPO use them
    "grpo": Algorithm("group_norm", "clipped", 2, advantage_clamp=5.0),
    # LOOP's advantages on noised final latents, as DiffusionNFT (arXiv 2509.16117) and AWM train: docs/method.md
    "loop_forward": Algorithm("leave_one_out", "forward_process", 1),
}
