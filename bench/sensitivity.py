"""How much luck with settings a recipe takes: held-out score against learning rate, clip range and K, on a short budget.

    python bench/sensitivity.py --out runs/sensitivity --results bench/results --jobs 2

PPO, LOOP and LOOP fast are those of bench/time_to_score.py, PPO trained by fastloop as the others are. One setting is changed
at a time, the others stay as they are there, the learning rate at 0.003:

- learning rate: five values, over a factor of 16;
- clip range: four values, over a factor of 1,000; LOOP fast has none;
- K, the images of a prompt, with as many images a rollout.

Each run trains the task `mix` until the budget is spent, a quarter of that study's, and is evaluated once, at its end, on the
held-out prompts, drawn as training draws. Runs that have finished are lines of sensitivity_cpu.jsonl in the results folder
and are not run again; an interrupted one goes on. Prints Markdown tables, and writes them and a plot beside that file: means
over the seeds with their standard errors.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from sample_efficiency import over_seeds
from short_runs import RATE, ShortRuns, carry_out
from time_to_score import RECIPES, REFERENCE, Recipe, parser_of
from time_to_score_tables import COLORS, markdown

K, OWN_RATE = "images_per_prompt", 3e-3
OF = {"PPO": REFERENCE, "LOOP": "LOOP", "LOOP fast": "LOOP fast"}  # a name here: that of its recipe there
RATES, CLIPS, GROUPS = (7.5e-4, 1.5e-3, 3e-3, 6e-3, 1.2e-2), (1e-5, 1e-4, 1e-3, 1e-2), (1, 2, 4, 8, 16)
AXES = {  # key: its title, and the values by recipe
    RATE: ("learning rate", dict.fromkeys(OF, RATES)),
    "clip_range": ("clip range", dict.fromkeys(("PPO", "LOOP"), CLIPS)),
    K: ("K, images per prompt", {"PPO": GROUPS, "LOOP": GROUPS[1:], "LOOP fast": GROUPS[1:]}),
}


def own_items(name: str) -> dict[str, str]:
    """Return what a recipe sets, by key."""
    items = [item for item in RECIPES[OF[name]].items if not item.startswith("budget=")]
    return {RATE: f"{OWN_RATE:g}"} | dict(item.split("=", 1) for item in items)


def items_of(name: str, key: str, value: float) -> list[str]:
    """Return a recipe's items with one setting changed; with K, the prompts of a rollout too."""
    items = own_items(name)
    if float(items[key]) != value:
        if key == K:
            items["prompts_per_step"] = str(int(items[K]) * int(items["prompts_per_step"]) // int(value))
        items[key] = f"{value:g}"
    return [f"{own}={its}" for own, its in items.items()]


def cell_name(name: str, key: str, value: float) -> str:
    """Return a name of a recipe with one setting changed; of the recipe as it is on every axis the same."""
    return name if float(own_items(name)[key]) == value else f"{name}, {key}={value:g}"


def final(study: ShortRuns, name: str, key: str, value: float) -> np.ndarray:
    """Return the final scores of a cell's runs that have finished, float64 (S,)."""
    return np.array([scores[-1] for scores in study.scores(cell_name(name, key, value))])


def values_of(of: dict[str, tuple[float, ...]]) -> list[float]:
    """Return all values of an axis, of whichever recipe, in order."""
    return sorted({value for values in of.values() for value in values})


def table(study: ShortRuns, key: str) -> str:
    """Write the scores of one axis: a line for each recipe, a column for each value."""
    title, of = AXES[key]
    values, lines = values_of(of), []
    for name, its in of.items():
        found = {value: scores for value in its if len(scores := final(study, name, key, value))}
        cells = [over_seeds(found[value]) if value in found else "-" for value in values]
        means = [scores.mean() for scores in found.values()]
        lines.append([name, *cells, f"{max(means) - min(means):.3f}" if means else "-"])
    return markdown([title, *(f"{value:g}" for value in values), "best - worst"], lines)


def plot(study: ShortRuns, path: Path) -> None:
    """Draw a panel for each axis: the mean final score with its standard error over the seeds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5 * len(AXES), 4), layout="constrained")
    panels = figure.subplots(1, len(AXES), sharey=True)
    for axes, (key, (title, of)) in zip(panels, AXES.items(), strict=True):
        axes.set(xlabel=title, xscale="log")
        axes.set_xticks(values_of(of), [f"{value:g}" for value in values_of(of)])
        axes.minorticks_off()
        axes.grid(alpha=0.25)
        for color, (name, values) in zip(COLORS[1:], of.items(), strict=False):
            found = {value: scores for value in values if len(scores := final(study, name, key, value))}
            mean = [scores.mean() for scores in found.values()]
            error = [scores.std(ddof=1) / len(scores) ** 0.5 if len(scores) > 1 else 0.0 for scores in found.values()]
            axes.errorbar(list(found), mean, yerr=error, color=color, label=name, marker="o", markersize=4, capsize=2)
    if before := [row["scores"]["plain"]["mean"] for row in study.rows if row["iteration"] == 0]:
        for axes in panels:
            axes.axhline(before[0], color=COLORS[0], linewidth=0.8, linestyle=":", label="before training")
    panels[0].set_ylabel("held-out score")
    panels[0].legend(fontsize=8)
    figure.savefig(path, dpi=150)


def main(argv: list[str] | None = None) -> int:
    parser = parser_of("sensitivity", __doc__, 25_000, [0, 1, 2])
    cells = [(name, key, value) for key, (_, of) in AXES.items() for name, values in of.items() for value in values]
    recipes = {cell_name(*cell): Recipe(tuple(items_of(*cell))) for cell in cells}
    return carry_out(argv, parser, recipes, 1, lambda study: [table(study, key) for key in AXES], plot)


if __name__ == "__main__":
    sys.exit(main())
