"""What a run shows while it trains: the line of an iteration, and the pictures of an evaluation."""

from __future__ import annotations

import json
import math
from collections import deque
from pathlib import Path

import numpy as np
from PIL import Image

from fastloop.config import Config
from fastloop.evaluation import Evaluation
from fastloop.grids import before_after_grid, image_grid
from fastloop.prompts import Prompt
from fastloop.report.formats import SPACE, duration
from fastloop.rewards.scoring import Rewards
from fastloop.tracking import Tracker


class Pace:
    """How long iterations and evaluations take, for the time that is left."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self._iterations: deque[float] = deque(maxlen=20)  # seconds each
        self.evaluation = 0.0  # seconds of the last one

    def line(self, iteration: int, metrics: dict[str, float]) -> str:
        """Return what is printed of a finished iteration; its pace counts from now on."""
        self._iterations.append(metrics["time/iteration"])
        left = self.config.iterations - iteration
        seconds = left * float(np.mean(self._iterations)) + math.ceil(left / self.config.eval.every) * self.evaluation
        time = duration(seconds).replace(SPACE, " ")  # no-break spaces are for the page
        policy = "no update: every advantage is 0"
        grad = f"grad {metrics['policy/grad_norm']:.2g}"
        if "policy/clipfrac" in metrics:
            policy = f"clipped {metrics['policy/clipfrac']:.0%}  kl {metrics['policy/approx_kl']:.1e}  {grad}"
        elif any(name.startswith("policy/denoising_loss") for name in metrics):
            policy = grad
        return (
            f"[{iteration:>{len(str(self.config.iterations))}}/{self.config.iterations}] "
            f"reward {metrics['reward/mean']:.3f}  {policy}  {metrics['time/iteration']:.1f} s  {time} left"
        )


def save_samples(
    folder: Path, iteration: int, result: Evaluation, prompts: list[Prompt], rewards: Rewards, tracker: Tracker
) -> None:
    """Write the first image of each of these prompts as its own file, all of them as a grid, and before/after.

    Args:
        folder: RUN/samples. prompts: the first ones of the evaluation. rewards: those of the evaluation.
    """
    folder.mkdir(exist_ok=True)
    name, rows = f"{iteration:06d}", []
    for p, prompt in enumerate(prompts):
        file = f"{name}_{p:02d}.png"
        image, reward = result.images[p, 0], result.scores[p, 0]
        Image.fromarray(image).save(folder / file)
        note = rewards.explain(image, prompt.text)
        rows.append({"prompt": prompt.text, "reward": float(reward), "file": file, "note": note})
    (folder / f"{name}.json").write_text(json.dumps(rows, indent=1))
    captions = [f"{row['prompt']}\n{row['reward']:.2f}" for row in rows]
    grid = image_grid([result.images[p, 0] for p in range(len(prompts))], captions, columns=6)
    grid.save(folder / f"{name}.png")
    tracker.log_image("samples", iteration, grid)
    if iteration and (folder / "000000.json").exists():
        before = json.loads((folder / "000000.json").read_text())
        before_after_grid(
            [row["prompt"] for row in before],
            [[Image.open(folder / row["file"])] for row in before],
            [[Image.open(folder / row["file"])] for row in rows],
            [[row["reward"]] for row in before],
            [[row["reward"]] for row in rows],
            columns=3,
        ).save(folder / "before_after.png")
