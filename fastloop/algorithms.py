"""An algorithm is a name for an advantage, an objective and defaults: the one value between LOOP and its baselines."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Algorithm:
    """How a reward becomes an advantage, what is maximised with it, and how often a rollout is used.

    Attributes:
        clip_range: its default of the key, where it is not that of log-probs that are means.
        trains_noise: whether a policy over the initial noise is trained, and no weights of the model.
        settings: defaults of its own for keys of sections, by section and key.
    """

    advantage: str
    objective: str
    updates_per_rollout: int
    advantage_clamp: float | None = None
    clip_range: float = 1e-4
    trains_noise: bool = False
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def of_keys(self) -> dict[str, Any]:
        """Return its defaults of keys that stand in no section."""
        keys = "advantage", "objective", "updates_per_rollout", "advantage_clamp", "clip_range"
        return {key: getattr(self, key) for key in keys}


FAST = {
    "ema": {"decay": 0.95},
    "optimizer": {"schedule": "linear", "max_grad_norm": 1e-5},
    "kl": {"weight": 0.15, "of_advantages": True, "every": 4},
}

# a deterministic sampler, so that a picture follows from its initial noise
NOISE = {"sampling": {"eta": 0.0}, "kl": {"weight": 3e-4}, "optimizer": {"lr": 1e-3, "weight_decay": 0.0}}

DLPO = {"dlpo": {"alpha": 5.0, "beta": 1.0}}  # its code's, for rewards of about 1 to 5

# its code's weights for one prompt, 0.01 beside a reward weighed with 10; and a buffer of two rollouts
DPOK = {"kl": {"form": "epsilon", "weight": 1e-3}, "replay": {"rollouts": 2}}

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
    # DPOK, arXiv 2305.16381, as its public code trains: a learned value, the clip without the min, its own form of the KL
    "dpok": Algorithm("value", "clip_only", 5, settings=DPOK),
    # DLPO, arXiv 2405.14632, with the true ratio: rewards less a denoising penalty
    "dlpo": Algorithm("leave_one_out", "clipped", 2, settings=DLPO),
    # LOOP's advantages on noised final latents, as DiffusionNFT (arXiv 2509.16117) and AWM train: docs/method.md
    "loop_forward": Algorithm("leave_one_out", "forward_process", 1),
    # the same with the settings that learned most from little compute on the bundled model: docs/comparison.md
    "loop_fast": Algorithm("leave_one_out", "forward_process", 1, settings=FAST),
    # one-step PPO on the initial noise (arXiv 2506.12036, reconstructed from its abstract)
    "noise_ppo": Algorithm("leave_one_out", "clipped", 2, clip_range=0.2, trains_noise=True, settings=NOISE),
}


def settable() -> dict[str, set[str]]:
    """Return the keys of sections for which some algorithm has a default of its own, by section."""
    found: dict[str, set[str]] = {}
    for algorithm in ALGORITHMS.values():
        for section, settings in algorithm.settings.items():
            found.setdefault(section, set()).update(settings)
    return found
