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

import argparse
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from sample_efficiency import over_seeds
from time_to_score import EVALUATIONS, RECIPES, REFERENCE, Recipe, Run, Study
from time_to_score_tables import COLORS, markdown

from fastloop import cli
from fastloop.errors import UserError
from fastloop.machine import describe_machine, versions

TASK, RATE, K = "mix", "optimizer.lr", "images_per_prompt"
OWN_RATE = 3e-3
OF = {"PPO": REFERENCE, "LOOP": "LOOP", "LOOP fast": "LOOP fast"}  # a name here: that of its recipe there
RATES, CLIPS, GROUPS = (7.5e-4, 1.5e-3, 3e-3, 6e-3, 1.2e-2), (1e-5, 1e-4, 1e-3, 1e-2), (1, 2, 4, 8, 16)
AXES = {  # key: its title, and the values by recipe
    RATE: ("learning rate", dict.fromkeys(OF, RATES)),
    "clip_range": ("clip range", dict.fromkeys(("PPO", "LOOP"), CLIPS)),
    K: ("K, images per prompt", {"PPO": GROUPS, "LOOP": GROUPS[1:], "LOOP fast": GROUPS[1:]}),
}


class Sensitivity(Study):
    """Runs of recipes with one setting changed, each evaluated once, without guidance."""

    def __init__(self, args: argparse.Namespace, rows_file: Path) -> None:
        cells = [(name, key, value) for key, (_, of) in AXES.items() for name, values in of.items() for value in values]
        super().__init__(args, {cell_name(*cell): Recipe(tuple(items_of(*cell))) for cell in cells}, rows_file)

    def budget(self, recipe: str) -> float:
        return self.args.budget

    def evaluations(self, run: Run) -> tuple[int, dict[str, dict]]:
        return 1, {"plain": EVALUATIONS["plain"]}

    def scores(self, cell: str) -> list[float]:
        """Return the final scores of a cell's runs that have finished."""
        runs = [self.finished(Run(cell, TASK, seed, None, self.args.budget)) for seed in self.args.seeds]
        return [rows[-1]["scores"]["plain"]["mean"] for rows in runs if rows]


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


def table(study: Sensitivity, key: str) -> str:
    """Write the scores of one axis: a line for each recipe, a column for each value."""
    title, of = AXES[key]
    values = sorted({value for values in of.values() for value in values})
    lines = []
    for name, its in of.items():
        found = {value: study.scores(cell_name(name, key, value)) for value in its}
        cells = [over_seeds(np.array(found[value])) if found.get(value) else "-" for value in values]
        means = [float(np.mean(scores)) for scores in found.values() if scores]
        lines.append([name, *cells, f"{max(means) - min(means):.3f}" if means else "-"])
    return markdown([title, *(f"{value:g}" for value in values), "best - worst"], lines)


def plot(study: Sensitivity, path: Path) -> None:
    """Draw a panel for each axis: the mean final score with its standard error over the seeds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5 * len(AXES), 4), layout="constrained")
    panels = figure.subplots(1, len(AXES), sharey=True)
    for axes, (key, (title, of)) in zip(panels, AXES.items(), strict=True):
        axes.set(xlabel=title, xscale="log")
        axes.grid(alpha=0.25)
        for color, (name, values) in zip(COLORS[1:], of.items(), strict=False):
            found = {value: np.array(scores) for value in values if (scores := study.scores(cell_name(name, key, value)))}
            mean = [scores.mean() for scores in found.values()]
            error = [scores.std(ddof=1) / len(scores) ** 0.5 if len(scores) > 1 else 0.0 for scores in found.values()]
            axes.errorbar(list(found), mean, yerr=error, color=color, label=name, marker="o", markersize=4, capsize=2)
    if before := [row["scores"]["plain"]["mean"] for row in study.rows if row["iteration"] == 0]:
        for axes in panels:
            axes.axhline(before[0], color=COLORS[0], linewidth=0.8, linestyle=":", label="before training")
    panels[0].set_ylabel("held-out score")
    panels[0].legend(fontsize=8)
    figure.savefig(path, dpi=150)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = cli.Parser(prog="bench/sensitivity.py", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--base", type=Path, default=Path("configs/shapes_study.yaml"), metavar="RECIPE.yaml")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="overrides for every run")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--budget", type=float, default=25_000, help="of a run, in forwards (default: 25,000)")
    parser.add_argument("--out", type=Path, default=Path("runs/sensitivity"), help="folder of the runs")
    parser.add_argument("--results", type=Path, help="folder of rows, tables and plot (default: that of the runs)")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, of one thread each")
    parser.add_argument("--table", action="store_true", help="only the tables and the plot, of the rows that are there")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    machine = describe_machine(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    try:
        args = parse(argv)
        stem = (args.results or args.out) / f"sensitivity_{machine.get('gpu', 'cpu').replace(' ', '_')}"
        study = Sensitivity(args, stem.with_suffix(".jsonl"))
        runs = [Run(cell, TASK, seed, None, args.budget) for seed in args.seeds for cell in study.recipes]
        if not args.table:
            study.measure_factors()
            for run in runs[: len(study.recipes)]:  # refuses before the first run what does not fit
                study.config(run)
    except UserError as error:
        return cli.fail(str(error), 2)
    with ThreadPoolExecutor(max(1, args.jobs)) as pool:
        done = list(pool.map(study.train, runs))
    if not any(done):
        return cli.fail(f"no run has finished in {study.file}", 1)
    parts = [table(study, key) for key in AXES]
    parts.append(f"{args.budget:,.0f} forwards a run; mean ± standard error over {len(args.seeds)} seeds.")
    if unfinished := [f"{run.recipe}, seed {run.seed}" for run, rows in zip(runs, done, strict=True) if not rows]:
        parts.append("Not finished: " + "; ".join(unfinished) + ".")
    where = ", ".join(str(machine[key]) for key in ("gpu", "system", "cpus") if key in machine)
    parts.append(f"Machine: {where} CPUs; torch {versions()['torch']}. Each run has one thread.")
    text = "\n\n".join(parts)
    stem.with_suffix(".md").write_text(text + "\n")
    plot(study, stem.with_suffix(".png"))
    print(text)
    return 1 if unfinished and not args.table else 0


if __name__ == "__main__":
    sys.exit(main())
