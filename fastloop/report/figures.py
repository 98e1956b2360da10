"""The report's charts over the iterations, drawn with matplotlib as SVG."""

from __future__ import annotations

import io
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastloop.report.facts import Phase
from fastloop.report.formats import count, data_uri
from fastloop.report.run import Run, number

MAX_BARS = 60  # of the time chart
LINE, FAINT, REFERENCE, AXIS = "#2f5d8c", "#9db7d0", "#b3402e", "#9aa3ab"


@dataclass(frozen=True)
class Figure:
    """A captioned chart, ``source`` its data URI. Where that is "", ``missing`` says why there is no chart."""

    title: str
    note: str
    source: str
    missing: str = ""


def learning(run: Run) -> list[Figure]:
    """Draw what the run learns: the evaluations' score, the training rewards, and those that are only watched."""
    return [
        _score_figure(run),
        _metric_figure(run, "reward/mean", "Training reward", "mean reward", "Mean over the rollout's pictures."),
        _metric_figure(
            run,
            "reward/group_std",
            "Reward spread within a prompt",
            "standard deviation",
            "The signal LOOP learns from: near zero, all pictures of a prompt score alike.",
        ),
        *_part_figures(run),
        *(_watched_figure(run, name) for name in run.watched_rewards),
    ]


def policy_health(run: Run) -> list[Figure]:
    """Draw the metrics of the policy's updates: of their ratios, or of the noise's error where final latents are trained."""
    norm = _metric_figure(run, "policy/grad_norm", "Gradient norm", "L2 norm", "Of the trained weights.")
    parts = {"better": "Images better than their group.", "worse": "Images worse than their group."}
    names = {which: f"policy/denoising_loss_{which}" for which in parts}
    if any(np.isfinite(run.column(name)).any() for name in names.values()):
        unit = "mean squared error"
        return [*(_metric_figure(run, name, f"Error of the noise, {w}", unit, parts[w]) for w, name in names.items()), norm]
    clip_range = number(run.config.get("clip_range"))
    dashed = f" Dashed: the clip range, {clip_range:g}." if math.isfinite(clip_range) else ""
    return [
        _metric_figure(run, "policy/clipfrac", "Clip fraction", "share of samples", "Ratios outside the clip range."),
        _metric_figure(
            run, "policy/approx_kl", "Approximate KL", "approximate KL", "From the rollout's policy to the updated one."
        ),
        _metric_figure(
            run,
            "policy/ratio_max_dev",
            "Largest ratio deviation",
            "max |ratio − 1|",
            f"On a log scale.{dashed}",
            log=True,
            reference=clip_range,
        ),
        norm,
    ]


def image_statistics(run: Run) -> list[Figure]:
    """Draw the statistics of the rollout's pictures."""
    return [
        _metric_figure(run, "image/saturation", "Saturation", "mean saturation", "Of the rollout's pictures."),
        _metric_figure(run, "image/entropy", "Entropy", "mean entropy", "Of the rollout's pictures."),
    ]


def time_chart(run: Run, phases: list[Phase]) -> Figure | None:
    """Draw the seconds that an iteration spends in each phase; ``None`` without phases."""
    if not phases:
        return None
    groups = np.array_split(np.arange(len(run.metrics)), min(len(run.metrics), MAX_BARS))
    iterations = run.column("iteration")
    x = [np.nanmean(iterations[group]) for group in groups]
    figure, axes = _axes("seconds per iteration")
    bottom = np.zeros(len(groups))
    for phase in phases:
        if phase.seconds.any():
            heights = np.array([phase.seconds[group].mean() for group in groups])
            axes.bar(x, heights, bottom=bottom, width=0.85 * len(groups[0]), color=phase.color, label=phase.label)
            bottom += heights
    axes.set_ylim(0, 1.32 * max(bottom.max(), 1e-9))  # room for the legend
    axes.legend(loc="upper center", ncols=3, fontsize=8.5, frameon=False, handlelength=1, columnspacing=1.2)
    note = f"Each bar is the mean of about {len(groups[0])} iterations." if len(groups[0]) > 1 else ""
    return Figure("Where the time goes", note, _svg(figure))


def _score_figure(run: Run) -> Figure:
    means = np.array([score.estimate.mean for score in run.scores])
    errors = np.array([score.estimate.stderr for score in run.scores])
    if not np.isfinite(means).any():
        missing = "No evaluation has a finite score." if run.evals else "No evaluation yet."
        return Figure(run.score_title, "", "", missing)
    figure, axes = _axes("mean score")
    style = {"color": LINE, "marker": "o", "ms": 4, "lw": 1.6, "capsize": 3, "elinewidth": 1}
    axes.errorbar(run.eval_column("iteration"), means, yerr=np.nan_to_num(errors), **style)
    note = _sentences(f"{_which_prompts(run)}; bars are one standard error.", _not_shown(means))
    return Figure(run.score_title, note, _svg(figure))


def _which_prompts(run: Run) -> str:
    """What the evaluation's prompts are to training, as far as the run recorded it."""
    if run.trained_too == 0:
        return "On prompts that training never saw"
    if not math.isfinite(run.trained_too):
        return "On the evaluation prompts"
    if run.trained_too == run.eval_prompts:
        return "On prompts that are all trained on too"
    return f"On {count(run.eval_prompts)} prompts, {count(run.trained_too)} of which are trained on too"


def _part_figures(run: Run) -> list[Figure]:
    """One curve per reward, where a run mixes several."""
    names = run.trained_rewards
    if len(names) < 2:
        return []
    return [
        _metric_figure(run, f"reward/{name}", f"Training reward: {name}", "mean reward", "One part of the reward.")
        for name in names
        if np.isfinite(run.column(f"reward/{name}")).any()
    ]


def _watched_figure(run: Run, name: str) -> Figure:
    """A reward that is only watched, over the training reward: apart, they show a reward that is gamed."""
    title = f"Held-out {name} and training reward"
    estimates = run.estimates("rewards", name)
    means = np.array([estimate.mean for estimate in estimates])
    errors = np.array([estimate.stderr for estimate in estimates])
    if not np.isfinite(means).any():
        return Figure(title, "", "", "No evaluation has a finite score.")
    figure, axes = _axes(f"mean {name}, held out")
    style = {"color": REFERENCE, "marker": "o", "ms": 4, "lw": 1.6, "capsize": 3}
    axes.errorbar(run.eval_column("iteration"), means, yerr=np.nan_to_num(errors), **style)
    beside = axes.twinx()
    beside.plot(run.column("iteration"), _running_mean(run.column("reward/mean")), color=LINE, lw=1.4)
    beside.set_ylabel("training reward", fontsize=10, color=LINE)
    beside.spines[["top"]].set_visible(False)
    note = "Red, left: a reward that is not trained on. Blue, right: the one that is. Blue up and red down is reward hacking."
    return Figure(title, note, _svg(figure))


def _metric_figure(
    run: Run,
    metric: str,
    title: str,
    unit: str,
    note: str,
    log: bool = False,
    reference: float = math.nan,
) -> Figure:
    """One metric over the iterations, with its running mean once there are enough points for one."""
    x, y = run.column("iteration"), run.column(metric)
    if not np.isfinite(y).any():
        return Figure(title, note, "", f"No {metric} in metrics.jsonl yet.")
    if log := log and bool(np.any(y > 0)):
        y = np.where(y > 0, y, math.nan)
    figure, axes = _axes(unit)
    many = len(y) > 40
    axes.plot(x, y, color=FAINT if many else LINE, lw=0.9 if many else 1.6, marker=None if many else "o", ms=3)
    if many:
        axes.plot(x, _running_mean(y), color=LINE, lw=1.8)
    if log:
        axes.set_yscale("log")
    if math.isfinite(reference):
        axes.axhline(reference, color=REFERENCE, lw=1.2, ls="--")
    return Figure(title, _sentences(note, "Bold: running mean." if many else "", _not_shown(y)), _svg(figure))


def _running_mean(values: np.ndarray) -> np.ndarray:
    """Mean over a twentieth of the values around each, without the NaNs; of none where the run has no row yet."""
    if not len(values):
        return values
    window = np.ones(len(values) // 20 | 1)  # an odd length has a middle
    finite = np.isfinite(values)
    sums = np.convolve(np.where(finite, values, 0.0), window, "same")
    counts = np.convolve(finite, window, "same")
    return np.where(counts > 0, sums / np.maximum(counts, 1), math.nan)


def _not_shown(values: np.ndarray) -> str:
    missing = int((~np.isfinite(values)).sum())
    return f"{missing} of {len(values)} values are missing or cannot be drawn." if missing else ""


def _sentences(*sentences: str) -> str:
    return " ".join(filter(None, sentences))


def _axes(unit: str) -> tuple[Any, Any]:
    """A bare figure, without pyplot, whose global state is the caller's."""
    import matplotlib.figure
    from matplotlib.ticker import MaxNLocator

    figure = matplotlib.figure.Figure(figsize=(5.4, 2.9), layout="constrained")
    axes = figure.add_subplot()
    axes.set_xlabel("iteration", fontsize=10)
    drawable = unit.encode(errors="backslashreplace").decode()  # matplotlib refuses half of a surrogate pair
    axes.set_ylabel(drawable, fontsize=10, parse_math=False)  # a reward's name may hold a $
    axes.tick_params(labelsize=9.5, color=AXIS)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(AXIS)
    axes.grid(color="#e8ebee", lw=0.8)
    axes.set_axisbelow(True)
    return figure, axes


def _svg(figure: Any) -> str:
    """The drawn figure as a data URI, without the date that would make each one different."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    return data_uri("image/svg+xml", buffer.getvalue())
