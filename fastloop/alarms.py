"""Signs of collapse and of reward hacking in a run's metrics. They are printed and logged, and never stop a run."""

from __future__ import annotations

from pathlib import Path

from fastloop.config import Config
from fastloop.metrics import held_out_falling
from fastloop.objectives import OBJECTIVES
from fastloop.tracking import read_rows

ALARMS = ("group_std", "clipfrac", "entropy", "saturation", "held_out", "denoising")
SPAN = 20  # iterations over which denoising errors are averaged


class Alarms:
    """The alarms of ``safety``; that of held-out rewards lasts from one evaluation to the next."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self._falling: list[str] = []
        self._errors: list[float] = []  # of each iteration's own pictures, where they are noised and denoised

    def look_at(self, folder: Path) -> None:
        """Read the run's records: at the start, and after each evaluation, whose held-out rewards may have fallen."""
        errors, weights = self.config.safety.held_out_errors, {r.key: r.weight for r in self.config.rewards}
        rows, evals = (read_rows(folder / f"{name}.jsonl") for name in ("metrics", "eval"))
        self._errors = [error for row in rows if (error := denoising_error(row)) is not None]
        self._falling = [] if errors is None else held_out_falling(rows, evals, weights, errors)

    def of(self, metrics: dict[str, float]) -> dict[str, str]:
        """Return the alarms that an iteration's metrics fire, with what they mean."""
        safety, grouped = self.config.safety, self.config.images_per_prompt > 1
        clips = OBJECTIVES[self.config.objective].uses_ratio and "policy/clipfrac" in metrics
        if (error := denoising_error(metrics)) is not None:
            self._errors.append(error)
        first, last = self._errors[:SPAN], self._errors[-SPAN:]
        bound = safety.max_denoising_growth if len(self._errors) >= 2 * SPAN else None
        found = {
            "denoising": (
                bound is not None and sum(last) > bound * sum(first),
                "the model denoises its own pictures much worse than at the start, which comes before a collapse: stop "
                "(Ctrl-C), and start a new run with a lower optimizer.lr or a larger kl.weight",
            ),
            "group_std": (
                grouped and metrics["reward/group_std"] < safety.min_group_std,
                "images of one prompt get the same reward",
            ),
            "clipfrac": (
                clips and metrics["policy/clipfrac"] > safety.max_clipfrac,
                "nearly every pair is clipped",
            ),
            "entropy": (metrics["image/entropy"] < safety.min_image_entropy, "pictures go flat"),
            "saturation": (metrics["image/saturation"] > safety.max_image_saturation, "pictures are burnt out"),
            "held_out": (
                bool(self._falling),
                f"held out, {', '.join(self._falling)} fell by more than its error while the training reward rose",
            ),
        }
        return {name: text for name, (fired, text) in found.items() if fired}


def denoising_error(metrics: dict[str, float]) -> float | None:
    """Return the mean error of a rollout's own pictures noised and denoised, ``None`` where that is not trained on."""
    found = [metrics[name] for name in ("policy/denoising_loss_better", "policy/denoising_loss_worse") if name in metrics]
    return sum(found) / len(found) if found else None
