"""The tables and the plot of bench/time_to_score.py, from the rows of its runs.

A run is the list of its evaluations; runs stand by recipe, the first being the reference, one for each seed.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from forward_equivalents import Factors
from sample_efficiency import over_seeds
from score_curves import LAST, UNITS, Curves, compare

Runs = dict[str, list[list[dict]]]
COLORS = ("#444444", "#d94801", "#238b45", "#6a51a3", "#a63603", "#4292c6", "#08519c", "#c51b8a", "#b8860b", "#1b9e77")


def curves_of(runs: list[list[dict]], evaluation: str) -> Curves:
    """Return the curves of a recipe's runs, by one of the evaluations."""
    scores = np.array([[row["scores"][evaluation]["mean"] for row in rows] for rows in runs])
    return Curves(scores, {unit: np.array([[row[unit] for row in rows] for rows in runs], dtype=float) for unit in UNITS})


def evaluations_of(runs: Runs) -> list[str]:
    """Return the names of the evaluations of a task's runs."""
    return next((list(rows[0]["scores"]) for of_recipe in runs.values() for rows in of_recipe), [])


def tables(
    found: dict[str, Runs],
    *,
    factors: Factors,
    searches: dict[str, dict[float, float]],
    search_task: str,
    unfinished: list[str],
    machine: dict,
    versions: dict[str, str],
    also: str | None = None,
) -> str:
    """Write Markdown: a table for each task and evaluation, what a run costs, and the search.

    ``also``: a recipe whose end, in the first evaluation, is a target too.
    """
    parts = []
    for task, runs in found.items():
        evaluations = evaluations_of(runs)
        parts += [text for evaluation in evaluations for text in _results(task, runs, evaluation)]
        if runs.get(also):
            title, *rest = _results(task, {also: runs[also]} | runs, evaluations[0])
            parts += [f"{title}, against {also}", *rest]
    parts += ["### What a run costs", _costs(found), _factors(factors)]
    if any(len(of_rate) > 1 for of_rate in searches.values()):
        parts += [f"### The search: score on {search_task} by learning rate, the chosen in bold", _search(searches)]
    if unfinished:
        parts.append("Not finished, and not in the tables: " + "; ".join(unfinished) + ".")
    parts.append(machine_line(machine, versions))
    return "\n\n".join(parts)


def machine_line(machine: dict, versions: dict[str, str]) -> str:
    """Say where the runs were."""
    where = ", ".join(str(machine[key]) for key in ("gpu", "system", "cpus") if key in machine)
    return f"Machine: {where} CPUs; torch {versions['torch']}. Each run has one thread."


def _results(task: str, runs: Runs, evaluation: str) -> list[str]:
    """The table of one task and evaluation, with a heading that says the target."""
    name, *_ = runs
    if not runs[name]:
        return [f"### {task}, {evaluation}", f"No run of {name} has finished, so there is no target."]
    reference = curves_of(runs[name], evaluation)
    target, before = reference.end(), reference.scores[:, 0].mean()
    error = runs[name][0][0]["scores"][evaluation]["stderr"]
    learned = target > before
    lines = []
    for recipe, of_recipe in runs.items():
        if of_recipe:
            ours, rate = curves_of(of_recipe, evaluation), of_recipe[0][0]["rate"]
            scores = over_seeds(ours.scores[:, -LAST:].mean(1))
            lines.append([recipe, f"{rate:g}", str(len(of_recipe)), scores, *_compared(reference, ours, learned)])
    head = ["recipe", "learning rate", "seeds", f"mean of the last {LAST}", "target after forwards", "CPU s"]
    head += ["times less compute", "times fewer CPU s", "draws that reach it"]
    said = (
        f"Target {target:.3f}, the mean of the last {LAST} evaluations of {name}; {before:.3f} ± {error:.3f} before training."
    )
    if not learned:
        said += " The reference has not learned here, so there is nothing to reach."
    return [f"### {task}, {evaluation}", said, markdown(head, lines)]


def _compared(reference: Curves, ours: Curves, learned: bool) -> list[str]:
    """What a recipe spends until the target, and the reference's multiple of it with its interval."""
    if not learned:
        return ["-"] * 5
    found = compare(reference, ours)
    reached = [f"{found.reached[unit]:,.0f}" if math.isfinite(found.reached[unit]) else "not reached" for unit in UNITS]
    ratios = []
    for unit in UNITS:
        text = f"{found.ratio[unit]:.2f}" if found.ratio[unit] else "not reached"
        if found.interval is not None:
            text += " ({:.2f} to {:.2f})".format(*found.interval[unit])
        ratios.append(text)
    return [*reached, *ratios, f"{found.reaching:.0%}" if found.interval else "-"]


def _costs(found: dict[str, Runs]) -> str:
    """Of each recipe, over the runs of all tasks: how long they are, and what they spend."""
    lines = []
    for recipe in next(iter(found.values())):
        last = [rows[-1] for runs in found.values() for rows in runs[recipe]]
        if last:
            forwards, images, cpu = (np.array([row[key] for row in last]) for key in ("equivalents", "images", "cpu"))
            each = [f"{forwards.mean():,.0f}", f"{images.mean():,.0f}", f"{(forwards / images).mean():.1f}"]
            lines.append([recipe, *each, over_seeds(cpu, 0), over_seeds(1e4 * cpu / forwards, 1)])
    return markdown(["recipe", "forwards", "images", "forwards an image", "CPU s", "CPU s per 10,000 forwards"], lines)


def _factors(factors: Factors) -> str:
    return (
        f"In forwards of one row: a row with its backward {factors.trained:.2f}, decoding a picture {factors.decoded:.2f} "
        f"(both by the flop counter), its reward {factors.scored:.2f} (by CPU seconds). An interval is of 95 %, by a "
        "bootstrap over seeds; a draw that does not reach the target counts as 0."
    )


def _search(searches: dict[str, dict[float, float]]) -> str:
    rates = sorted({rate for of_rate in searches.values() for rate in of_rate})
    lines = []
    for recipe, of_rate in searches.items():
        best = max(of_rate, key=of_rate.get, default=None)
        cells = ["-" if rate not in of_rate else f"{of_rate[rate]:.3f}" for rate in rates]
        lines.append([recipe, *(f"**{cell}**" if rate == best else cell for rate, cell in zip(rates, cells, strict=True))])
    return markdown(["recipe", *(f"{rate:g}" for rate in rates)], lines)


def markdown(head: list[str], lines: list[list[str]]) -> str:
    """Write a table."""
    rows = ["| " + " | ".join(line) + " |" for line in [head, *lines]]
    return "\n".join([rows[0], "|" + "---|" * len(head), *rows[1:]])


def plot(found: dict[str, Runs], path: Path) -> None:
    """Draw mean scores with their standard errors over the seeds against forwards: a panel for each task and evaluation."""
    from matplotlib.figure import Figure

    drawn = {task: evaluations_of(runs) for task, runs in found.items()}
    wide = max(map(len, drawn.values()))
    figure = Figure(figsize=(5.5 * wide, 4.2 * len(found)), layout="constrained")
    panels = figure.subplots(len(found), wide, squeeze=False)
    for row, (task, runs) in zip(panels, found.items(), strict=True):
        for axes in row[len(drawn[task]) :]:
            axes.remove()
        for axes, evaluation in zip(row, drawn[task], strict=False):
            axes.set(title=f"{task}, {evaluation}", xlabel="thousand forwards", ylabel="held-out score")
            axes.grid(alpha=0.25)
            for i, (recipe, of_recipe) in enumerate(runs.items()):
                if of_recipe:
                    again, of = divmod(i, len(COLORS))
                    style = "--" if i == 0 else ("-", ":", "-.")[min(again, 2)]  # colors come round again
                    _draw(axes, curves_of(of_recipe, evaluation), recipe, COLORS[of], style, target=i == 0)
    of_all = {line.get_label(): line for axes in figure.axes for line in axes.get_legend_handles_labels()[0]}
    names = [name for name in next(iter(found.values())) if name in of_all]  # some may have runs of one task alone
    figure.legend([of_all[name] for name in names], names, fontsize=8, loc="outside lower center", ncols=2 * wide)
    figure.savefig(path, dpi=150)


def _draw(axes, curves: Curves, name: str, color: str, style: str, target: bool) -> None:
    """The mean curve of a recipe; of the reference the target too."""
    x, mean, n = curves.spent["equivalents"].mean(0) / 1000, curves.scores.mean(0), len(curves.scores)
    error = curves.scores.std(0, ddof=1) / n**0.5 if n > 1 else 0 * mean
    axes.plot(x, mean, color=color, label=name, marker="o", markersize=3, linestyle=style)
    axes.fill_between(x, mean - error, mean + error, color=color, alpha=0.12, linewidth=0)
    if target:
        axes.axhline(curves.end(), color=color, linewidth=0.8, linestyle=":")
