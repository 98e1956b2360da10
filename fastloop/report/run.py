"""What a run has left in its folder so far. What is missing or damaged is read as NaN, "" or an empty collection."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml

from fastloop.prompts import score_name
from fastloop.tracking import read_rows

MARKS = ("config.yaml", "run.json", "metrics.jsonl", "eval.jsonl")  # a folder with one of them is a run's


class Estimate(NamedTuple):
    """A mean over prompts; NaN for what was not recorded."""

    mean: float
    stderr: float
    n: float  # distinct prompts

    def minus(self, other: Estimate) -> Estimate:
        """Subtract another estimate, over as many prompts and taken as independent of this one."""
        return Estimate(self.mean - other.mean, math.hypot(self.stderr, other.stderr), self.n)


class Score(NamedTuple):
    """The whole score at one evaluation."""

    iteration: float
    estimate: Estimate


@dataclass(frozen=True)
class Run:
    """A run's files, parsed. ``metrics`` has a row per training iteration, ``evals`` one per evaluation."""

    folder: Path  # absolute
    info: dict[str, Any]  # run.json
    config: dict[str, Any]
    config_text: str
    metrics: list[dict[str, Any]]
    evals: list[dict[str, Any]]
    eval_prompts: float  # distinct prompts of the evaluation
    trained_too: float  # those of them that are training prompts; NaN where the run did not record it

    def column(self, name: str) -> np.ndarray:
        """Collect one metric over the training iterations: float64 (iterations,), NaN where a row lacks it."""
        return np.array([number(row.get(name)) for row in self.metrics], float)

    def eval_column(self, name: str) -> np.ndarray:
        """Collect one number over the evaluations: float64 (evaluations,), NaN where a row lacks it."""
        return np.array([number(row.get(name)) for row in self.evals], float)

    @property
    def scores(self) -> list[Score]:
        """The score of each evaluation."""
        return [Score(number(row.get("iteration")), _estimate(row.get("score"))) for row in self.evals]

    def names(self, group: str) -> list[str]:
        """List what ``group`` ("categories" or "rewards") holds over all evaluations, in order of appearance."""
        return list(dict.fromkeys(name for row in self.evals for name in (row.get(group) or {})))

    def estimates(self, group: str, name: str) -> list[Estimate]:
        """Collect the estimates of one category or reward over the evaluations."""
        return [_estimate((row.get(group) or {}).get(name)) for row in self.evals]

    @property
    def score_title(self) -> str:
        """What the score is called: held out only where the run recorded that training saw none of its prompts."""
        return score_name(self.trained_too == 0).capitalize()

    @property
    def trained_rewards(self) -> list[str]:
        """The names in the metrics of the rewards that are trained on."""
        return _reward_names(self.config)

    @property
    def watched_rewards(self) -> list[str]:
        """The names of the evaluation's rewards that are not trained on."""
        return [name for name in _reward_names(self.config.get("eval")) if name not in self.trained_rewards]


def read_run(folder: Path) -> Run:
    """Read a run's folder.

    Raises:
        FileNotFoundError: the folder is absent or is no run's.
        ValueError: a line of metrics.jsonl or eval.jsonl other than the last is not a JSON object.
    """
    folder = folder.resolve()
    if not any((folder / mark).is_file() for mark in MARKS):
        raise FileNotFoundError(f"{folder} is not a run folder: it has none of {', '.join(MARKS)}")
    config_text = _read_text(folder / "config.yaml")
    try:
        config = yaml.safe_load(config_text)
    except yaml.YAMLError:  # the page still shows the text
        config = None
    eval_facts = _dict(_dict(read_json(folder / "prompts.json")).get("eval.prompts"))
    return Run(
        folder=folder,
        info=_dict(read_json(folder / "run.json")),
        config=_dict(config),
        config_text=config_text,
        metrics=read_rows(folder / "metrics.jsonl"),
        evals=read_rows(folder / "eval.jsonl"),
        eval_prompts=number(eval_facts.get("distinct")),
        trained_too=number(eval_facts.get("trained_too")),
    )


def read_json(path: Path) -> Any:
    """Read a JSON file; ``None`` if it is absent or not JSON."""
    try:
        return json.loads(_read_text(path))
    except ValueError:
        return None


def number(value: Any) -> float:
    """Turn a logged value into a float, NaN for null and for anything that is not a finite number."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else math.nan


def _read_text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _estimate(value: Any) -> Estimate:
    value = _dict(value)
    return Estimate(number(value.get("mean")), number(value.get("stderr")), number(value.get("n")))


def _reward_names(section: Any) -> list[str]:
    """The names in metrics of the ``rewards`` of a section of the configuration."""
    rewards = _dict(section).get("rewards")
    found = [r for r in rewards if isinstance(r, dict) and "name" in r] if isinstance(rewards, list) else []
    return [str(reward.get("label") or reward["name"]) for reward in found]
