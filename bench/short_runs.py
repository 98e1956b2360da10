"""Short runs of many recipes with one learning rate, evaluated without guidance: what sensitivity.py and ablation.py share."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from time_to_score import EVALUATIONS, Recipe, Run, Study
from time_to_score_tables import machine_line

from fastloop import cli
from fastloop.errors import UserError
from fastloop.machine import describe_machine, versions

TASK, RATE = "mix", "optimizer.lr"


class ShortRuns(Study):
    """Recipes that have a learning rate of their own, all with one budget.

    Attributes:
        times: evaluations of a run, beside that before training.
    """

    def __init__(self, args: argparse.Namespace, recipes: dict[str, Recipe], rows_file: Path, times: int) -> None:
        super().__init__(args, recipes, rows_file)
        self.times = times

    def budget(self, recipe: str) -> float:
        return self.args.budget

    def evaluations(self, run: Run) -> tuple[int, dict[str, dict]]:
        return self.times, {"plain": EVALUATIONS["plain"]}

    def run_of(self, recipe: str, seed: int) -> Run:
        """Return what tells a run of a recipe."""
        return Run(recipe, TASK, seed, None, self.args.budget)

    def scores(self, recipe: str) -> list[list[float]]:
        """Return the scores of a recipe's runs that have finished, of each at its evaluations."""
        runs = [self.finished(self.run_of(recipe, seed)) for seed in self.args.seeds]
        return [[row["scores"]["plain"]["mean"] for row in rows] for rows in runs if rows]


def carry_out(
    argv: list[str] | None,
    parser: argparse.ArgumentParser,
    recipes: dict[str, Recipe],
    times: int,
    show: Callable[[ShortRuns], list[str]],
    plot: Callable[[ShortRuns, Path], None],
) -> int:
    """Train what is missing, write tables and plot of all that is there, and return an exit status.

    Args:
        parser: as from `time_to_score.parser_of`. times: evaluations of a run. show: writes the tables. plot: draws into
            a file.
    """
    machine = describe_machine(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    parser.add_argument(
        "--only", nargs="+", metavar="NAME", help="train only these, by the names in its rows; tables have all"
    )
    try:
        args, name = parser.parse_args(argv), Path(parser.prog).stem
        if unknown := [name for name in args.only or () if name not in recipes]:
            raise UserError(f"--only: unknown {unknown[0]!r}: any of {', '.join(recipes)}")
        stem = (args.results or args.out) / f"{name}_{machine.get('gpu', 'cpu').replace(' ', '_')}"
        study = ShortRuns(args, recipes, stem.with_suffix(".jsonl"), times)
        runs = [study.run_of(recipe, seed) for seed in args.seeds for recipe in recipes]
        if not args.table:
            study.measure_factors()
            for run in runs[: len(recipes)]:  # refuses before the first run what does not fit
                study.config(run)
    except UserError as error:
        return cli.fail(str(error), 2)
    chosen = [run for run in runs if run.recipe in (args.only or recipes)]
    with ThreadPoolExecutor(max(1, args.jobs)) as pool:
        done = list(pool.map(study.train, chosen))  # all of them, whichever fails
    finished = [run for run in runs if study.finished(run)]
    if not finished:
        return cli.fail(f"no run has finished in {study.file}", 1)
    parts = show(study)
    parts.append(f"{args.budget:,.0f} forwards a run; mean ± standard error over at most {len(args.seeds)} seeds.")
    if len(finished) < len(runs):
        parts.append(f"{len(finished)} of {len(runs)} runs have finished: a line without an error is of one seed.")
    parts.append(machine_line(machine, versions()))
    text = "\n\n".join(parts)
    stem.with_suffix(".md").write_text(text + "\n")
    plot(study, stem.with_suffix(".png"))
    print(text)
    return 0 if all(done) or args.table else 1
