"""Compute to a common held-out score: recipes against a plain PPO with DDPO's choices.

    python bench/time_to_score.py --out runs/time_to_score --results bench/results --jobs 2

Every recipe trains the bundled model until its budget is spent, and is evaluated in between. The reference is the plain PPO of
bench/baseline_ppo.py with DDPO's choices. The mean of its last three evaluations is the target; the result is how much
less a recipe spends until its mean curve over the seeds, made isotonic, first crosses it (bench/score_curves.py). The end of
PPO with the same engineering as LOOP fast is a second target.

- Spent: forwards of one row of the UNet, into which all else is converted (bench/forward_equivalents.py), and CPU seconds of
  iterations. Evaluations, checkpoints and loading do not count.
- Tasks: `color`, the category of the demo, and `mix`, all five. Training draws without guidance. `guided`, which is not
  among the default ones, is `color` with guidance 3 and 10 steps in training, and needs a budget of its own.
- Evaluations, all at the same moments, on the same held-out prompts and noise: `plain` as DDPO samples, and `guided` as
  the model's users draw, with guidance 3 and the deterministic solver in 10 steps. Each has a target of its own. The task
  `guided` has the second alone.
- Search: every recipe without an `optimizer.lr` of its own is tried once at each rate of one grid, on one task, with a seed
  and a budget of the search. While the best rate is at an end of the grid, the next one is tried, at most twice. The mean of
  a run's last three evaluations, of four, decides; they are plain ones, of `guided` guided ones.
- `--recipe NAME ITEM ...` adds a recipe, or replaces one: items are KEY=VALUE, `budget=FORWARDS`, `lever=NAME[:ARGUMENTS]` of
  bench/levers.py, or the name of a recipe whose items come first. So `--recipe "LOOP, no average" LOOP ema.decay=null`.

Every run is one thread of bench/time_to_score_run.py. What is finished is in time_to_score_cpu.jsonl of the results folder, a
line for each evaluation, and is not run again; an interrupted run of fastloop goes on where it was. `--table` only reads that
file. Prints Markdown tables; writes time_to_score_cpu.md and .png beside it (or _GPU).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import yaml
from forward_equivalents import Factors, measure_factors
from levers import Lever, parse_levers, planned, settings_of
from sample_efficiency import wider
from score_curves import LAST
from time_to_score_tables import plot, tables

from fastloop import cli
from fastloop.config import Config
from fastloop.errors import UserError
from fastloop.machine import describe_machine, versions
from fastloop.recipes import dump_config, load_config
from fastloop.tracking import read_rows

HERE = Path(__file__).resolve().parent
REFERENCE = "PPO (DDPO)"
LEVERED = "PPO with levers"  # with LOOP fast's engineering, so that what is LOOP and what is engineering can be told apart
SINGLES = ("images_per_prompt=1", "prompts_per_step=64")  # each image of a prompt of its own, as DDPO draws
GROUPS = ("images_per_prompt=4", "prompts_per_step=16")
PUBLISHED = ("last_steps.drop=0", "clip_range=1.0e-4", "optimizer.schedule=constant", "ema.decay=null")
OF_TRL = ("model.lora.rank=4", "memory.rollout_batch=32", "memory.update_batch=32")  # its rank; batches that divide updates
FAST = ("images_per_prompt=8", "prompts_per_step=2", "last_steps.drop=0")  # and what algorithm=loop_fast brings,
KL, NO_KL = ("kl.weight=0.15", "kl.of_advantages=true", "kl.every=4"), ("kl.weight=0",)  # the first of these too
OF_DPOK = ("timestep_fraction=0.5", "value.lr=1.0e-3", "value.updates=10")  # half of two rollouts; V learns in 50, not 2,000
LEVERS = ("last_steps.drop=3", "clip_range=1.0e-3", "optimizer.schedule=linear", "ema.decay=0.95")


@dataclass(frozen=True)
class Recipe:
    """What differs from the base recipe: KEY=VALUE, `lever=...`, `budget=FORWARDS` where it has one of its own; who trains."""

    items: tuple[str, ...]
    trainer: str = "fastloop"  # baseline: bench/baseline_ppo.py; trl: TRL's in an environment of its own


RECIPES = {
    REFERENCE: Recipe(("algorithm=ppo", *SINGLES, *PUBLISHED), "baseline"),
    "PPO (TRL)": Recipe(("algorithm=ppo", *SINGLES, *PUBLISHED, *OF_TRL), "trl"),
    LEVERED: Recipe(("algorithm=ppo", *SINGLES, *LEVERS)),
    "REINFORCE": Recipe(("algorithm=reinforce", *SINGLES, *PUBLISHED)),
    "RLOO": Recipe(("algorithm=rloo", *GROUPS, *PUBLISHED)),
    "GRPO": Recipe(("algorithm=grpo", *GROUPS, *PUBLISHED)),
    "LOOP": Recipe(("algorithm=loop", *GROUPS, *PUBLISHED)),
    "LOOP fast": Recipe(("algorithm=loop_fast", *FAST, *KL)),
    "LOOP fast, no KL": Recipe(("algorithm=loop_fast", *FAST, *NO_KL)),
    "DPOK": Recipe(("algorithm=dpok", *SINGLES, *PUBLISHED, *OF_DPOK)),
    "DLPO": Recipe(("algorithm=dlpo", *GROUPS, *PUBLISHED)),
}
COLOR = ("prompts.categories=[color]", "eval.prompts.categories=[color]", "eval.prompts.limit=100", "eval.images_per_prompt=5")
TASKS = {  # as many pictures in an evaluation that their noise is about 0.01
    "color": COLOR,
    "mix": ("eval.prompts.limit=200", "eval.images_per_prompt=3"),
    "guided": (*COLOR, "sampling.guidance_scale=3", "sampling.steps=10"),  # as configs/shapes_guided.yaml
}
EVALUATIONS = {  # what each has of its own in `eval`; a guided picture costs 20 forwards, a plain one 8
    "plain": {"sampling": {"steps": 8, "eta": 1.0, "guidance_scale": 1.0}},
    "guided": {"images_per_prompt": 1, "sampling": {"steps": 10, "eta": 0.0, "guidance_scale": 3.0}},
}
EVALUATIONS_OF = {task: EVALUATIONS for task in TASKS} | {  # the first one decides the search
    "guided": {"guided": {"sampling": EVALUATIONS["guided"]["sampling"]}}
}
COMMON = ("sampling.guidance_scale=1", "tracking.tensorboard=false", "checkpoint.keep=1")
SEARCH_SEED = 1000
SEARCH_EVALUATIONS = 4


@dataclass(frozen=True)
class Run:
    """What tells one run from another."""

    recipe: str
    task: str
    seed: int
    rate: float | None  # None: the recipe's own
    budget: float


class Study:
    """What is compared, with the rows of the runs that have finished."""

    def __init__(self, args: argparse.Namespace, recipes: dict[str, Recipe], rows_file: Path) -> None:
        self.args, self.recipes, self.file = args, recipes, rows_file
        self.rows, self._lock = read_rows(rows_file), threading.Lock()
        self.factors = Factors(**self.rows[0]["factors"]) if self.rows else None

    def measure_factors(self) -> None:
        """Have the factors of all runs: those of the rows that are there, or measured now."""
        if self.factors is None:
            torch.set_num_threads(1)
            found = asdict(measure_factors(load_config(self.args.base, [*COMMON, *self.args.set])))
            self.factors = Factors(**{name: round(value, 4) for name, value in found.items()})

    def items(self, recipe: str) -> list[str]:
        """Return a recipe's KEY=VALUE, those of its levers last."""
        own = [item for item in self.recipes[recipe].items if not item.startswith(("budget=", "lever="))]
        return [*own, *settings_of(self.levers(recipe))]

    def specs(self, recipe: str) -> list[str]:
        """Return a recipe's levers as they were given."""
        return specs_of(self.recipes[recipe].items)

    def levers(self, recipe: str) -> list[Lever]:
        """Return a recipe's levers."""
        return parse_levers(self.specs(recipe))

    def budget(self, recipe: str) -> float:
        """Return what a run of a recipe may spend, in forwards."""
        own = [item.removeprefix("budget=") for item in self.recipes[recipe].items if item.startswith("budget=")]
        return float(own[-1]) if own else self.args.budget

    def overrides(self, run: Run) -> list[str]:
        """Return all of a run's KEY=VALUE but for its length."""
        rate = [] if run.rate is None else [f"optimizer.lr={run.rate}"]
        return [*COMMON, *TASKS[run.task], *self.items(run.recipe), *self.args.set, *rate, f"seed={run.seed}"]

    def evaluations(self, run: Run) -> tuple[int, dict[str, dict]]:
        """Return how many times a run is evaluated, and how; those of the search less often and in one way."""
        ways = EVALUATIONS_OF[run.task]
        if run.seed == SEARCH_SEED:
            return SEARCH_EVALUATIONS, dict([next(iter(ways.items()))])
        return self.args.evaluations, ways

    def key(self, run: Run) -> str:
        """Return a name of all that a run is made of: the same again is not run again."""
        facts = [self.recipes[run.recipe].trainer, self.overrides(run), run.budget, *self.evaluations(run)]
        facts += [lever.text for lever in self.levers(run.recipe)]  # none: the keys of before there were any
        return hashlib.sha256(json.dumps([self.args.base.read_text(), *facts]).encode()).hexdigest()[:12]

    def config(self, run: Run) -> Config:
        """Return a run's configuration, as long as its budget lets it be. Raises ``UserError``."""
        overrides = self.overrides(run)
        config = load_config(self.args.base, overrides)
        if self.recipes[run.recipe].trainer == "baseline":
            from baseline_ppo import refuse_what_it_has_not  # with peft, which tables do without

            refuse_what_it_has_not(config)
        one = self.factors.equivalents(**planned(self.levers(run.recipe), config))
        iterations, every = schedule(run.budget / one, self.evaluations(run)[0])
        own = [f"iterations={iterations}", f"eval.every={every}", f"checkpoint.every={every}"]
        return load_config(self.args.base, [*overrides, *own, f"output_dir={self.folder(run) / 'run'}"])

    def folder(self, run: Run) -> Path:
        """Return where a run works."""
        name = "".join(letter if letter.isalnum() else "_" for letter in run.recipe)
        return self.args.out / f"{name}-{run.task}-seed{run.seed}-{self.key(run)}"

    def finished(self, run: Run) -> list[dict]:
        """Return the rows of a run; none where it has not finished."""
        key = self.key(run)
        return [row for row in self.rows if row["run"] == key]

    def train(self, run: Run) -> list[dict]:
        """Train a run in a process of its own, or go on with it, unless it has finished. Returns its rows."""
        if (rows := self.finished(run)) or self.args.table:
            return rows
        folder, config = self.folder(run), self.config(run)
        folder.mkdir(parents=True, exist_ok=True)
        trainer = self.recipes[run.recipe].trainer
        trainer = str(self.args.peer_python) if trainer == "trl" else trainer
        job = {"trainer": trainer, "config": yaml.safe_load(dump_config(config)), "evaluations": self.evaluations(run)[1]}
        job["levers"] = self.specs(run.recipe)
        (folder / "job.json").write_text(json.dumps(job, indent=1))
        with open(folder / "log", "w") as log:
            command = [sys.executable, str(HERE / "time_to_score_run.py"), str(folder)]
            env = {**os.environ, "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
            code = subprocess.run(command, env=env, stdout=log, stderr=subprocess.STDOUT).returncode
        print(f"{folder.name}: {'done' if code == 0 else f'exit code {code}, see {log.name}'}", file=sys.stderr, flush=True)
        return self._keep(run, config, read_rows(folder / "scores.jsonl")) if code == 0 else []

    def _keep(self, run: Run, config: Config, found: list[dict]) -> list[dict]:
        """Add a finished run's evaluations to the rows, and write the file anew."""
        items = " ".join(item for item in self.recipes[run.recipe].items if not item.startswith("budget="))
        about = {**asdict(run), "rate": config.optimizer.lr, "run": self.key(run), "items": items}
        rows = []
        for row in found:
            spent = self.factors.equivalents(row["sampled"], row["trained"], row.get("pictures", row["images"]))
            rows.append({**about, **row, "equivalents": round(spent), "factors": asdict(self.factors)})
        with self._lock:  # and in one piece, as other studies may add to the same file
            self.rows += rows
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with self.file.open("a") as file:
                file.write("".join(json.dumps(row) + "\n" for row in rows))
        return rows

    def search(self, recipe: str) -> dict[float, float]:
        """Return the score by learning rate, of one run each; empty where the recipe has a rate of its own."""
        if not self.searched(recipe):
            return {}
        rates, found, decides = sorted(set(self.args.rates)), {}, next(iter(EVALUATIONS_OF[self.args.search_task]))
        if len(rates) == 1:
            return {rates[0]: float("nan")}
        tried, budget = list(rates), min(self.budget(recipe), self.args.search_budget or self.args.budget / 2)
        while tried:
            for rate in tried:
                if rows := self.train(Run(recipe, self.args.search_task, SEARCH_SEED, rate, budget)):
                    found[rate] = float(np.mean([row["scores"][decides]["mean"] for row in rows[-LAST:]]))
            if any(rate not in found for rate in tried) or len(found) >= len(rates) + 2:
                break
            tried = wider(found, rates[1] / rates[0])
        return found

    def runs(self, searches: dict[str, dict[float, float]]) -> list[Run]:
        """Return the runs of the study, of every recipe whose rate is known; the seeds one after the other."""
        best = {name: max(found, key=found.get, default=None) for name, found in searches.items()}
        names = [name for name in self.args.recipes if best[name] is not None or not self.searched(name)]
        return [Run(n, t, s, best[n], self.budget(n)) for s in self.args.seeds for t in self.args.tasks for n in names]

    def searched(self, recipe: str) -> bool:
        """Say whether a recipe has no learning rate of its own."""
        return not any(item.startswith("optimizer.lr=") for item in self.items(recipe))


def schedule(iterations: float, evaluations: int) -> tuple[int, int]:
    """Return how many iterations there are and every how many an evaluation, so that the last one comes in turn."""
    every = max(1, round(iterations / evaluations))
    return every * max(1, round(iterations / every)), every


def specs_of(items: Iterable[str]) -> list[str]:
    """Return the levers among items."""
    return [item.removeprefix("lever=") for item in items if item.startswith("lever=")]


def with_recipes(given: list[list[str]]) -> dict[str, Recipe]:
    """Return the recipes with those of the command line. Raises ``UserError`` for an item that is none."""
    recipes = dict(RECIPES)
    for name, *items in given:
        found: list[str] = []
        for item in items:
            if "=" not in item and item not in recipes:
                raise UserError(f"--recipe {name!r}: {item!r} is neither KEY=VALUE nor one of {', '.join(recipes)}")
            found += [item] if "=" in item else recipes[item].items
            if item.startswith("budget="):
                try:
                    above_0(item.removeprefix("budget="))
                except argparse.ArgumentTypeError as error:
                    raise UserError(f"--recipe {name!r}: budget={error}, of forwards") from None
        recipes[name] = Recipe(tuple(found), RECIPES[name].trainer if name in RECIPES else "fastloop")
        if parse_levers(specs_of(found)) and recipes[name].trainer != "fastloop":
            raise UserError(f"--recipe {name!r}: levers are fastloop's: give it another name, so that fastloop trains it")
    return recipes


def above_0(text: str) -> float:
    """Parse a number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text}: give a number above 0")
    return value


def count(text: str) -> int:
    """Parse a whole number above 0."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: give a whole number above 0")
    return int(text)


def file_there(text: str) -> Path:
    """Parse the path of a file that is there."""
    if not Path(text).is_file():
        raise argparse.ArgumentTypeError(f"{text}: there is no such file")
    return Path(text)


def parser_of(name: str, text: str, budget: float, seeds: list[int]) -> argparse.ArgumentParser:
    """Return a parser of what all scripts of such studies take, with their own defaults."""
    parser = cli.Parser(prog=f"bench/{name}.py", description=text, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--base", type=file_there, default="configs/shapes_study.yaml", metavar="RECIPE.yaml")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="overrides for every run")
    parser.add_argument("--seeds", nargs="+", type=int, default=seeds)
    parser.add_argument("--budget", type=above_0, default=budget, help=f"of a run, in forwards (default: {budget:,.0f})")
    parser.add_argument("--out", type=Path, default=Path(f"runs/{name}"), help="folder of the runs")
    parser.add_argument("--results", type=Path, help="folder of rows, tables and plot (default: that of the runs)")
    parser.add_argument("--jobs", type=count, default=1, help="runs at a time, of one thread each")
    parser.add_argument("--table", action="store_true", help="only the tables and the plot, of the rows that are there")
    return parser


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = parser_of("time_to_score", __doc__, 1e5, [0, 1, 2, 3, 4])
    parser.add_argument("--recipes", nargs="+", metavar="NAME", help=f"default: all of {', '.join(RECIPES)}")
    parser.add_argument("--recipe", nargs="+", action="append", default=[], metavar=("NAME", "ITEM"))
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=["color", "mix"])
    parser.add_argument("--evaluations", type=count, default=8, help="of a run, beside that before training (default: 8)")
    parser.add_argument("--rates", nargs="+", type=above_0, default=[1.5e-3, 3e-3, 6e-3], help="the grid; one is not searched")
    parser.add_argument("--search-task", choices=list(TASKS), default="mix")
    parser.add_argument(
        "--search-budget", type=above_0, help="default: half of --budget, or the recipe's own where it is less"
    )
    parser.add_argument("--peer-python", type=Path, help="of an environment with TRL 0.23.1: adds TRL's trainer")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    machine = describe_machine(device)
    try:
        args = parse(argv)
        recipes = with_recipes(args.recipe)
        chosen = args.recipes or [name for name in recipes if recipes[name].trainer != "trl" or args.peer_python or args.table]
        args.recipes = list(dict.fromkeys([REFERENCE, *chosen]))
        if unknown := [name for name in args.recipes if name not in recipes]:
            raise UserError(f"--recipes: unknown {unknown[0]!r}: any of {', '.join(recipes)}")
        if not args.peer_python and not args.table and any(recipes[name].trainer == "trl" for name in args.recipes):
            raise UserError("--peer-python: TRL's trainer needs an environment of its own: see bench/README.md")
        if any((task == "guided") != (args.search_task == "guided") for task in args.tasks):
            raise UserError(
                "--search-task: guidance in training takes rates of its own: guided goes with --tasks guided alone"
            )
        if SEARCH_SEED in args.seeds:
            raise UserError(f"--seeds: {SEARCH_SEED} is the search's: use others")
        results = args.results or args.out
        stem = results / f"time_to_score_{machine.get('gpu', 'cpu').replace(' ', '_')}"
        study = Study(args, recipes, stem.with_suffix(".jsonl"))
        if not args.table:
            study.measure_factors()
            for name in args.recipes:  # refuses before the first run what does not fit
                study.config(Run(name, args.tasks[0], args.seeds[0], None, study.budget(name)))
    except UserError as error:
        return cli.fail(str(error), 2)

    with ThreadPoolExecutor(max(1, args.jobs)) as pool:
        searches = dict(zip(args.recipes, pool.map(study.search, args.recipes), strict=True))
        runs = study.runs(searches)
        done = list(pool.map(study.train, runs))
    if not any(done):
        return cli.fail(f"no run of the study has finished in {study.file}", 1)
    unfinished = [f"{name}, its search" for name in args.recipes if study.searched(name) and not searches[name]]
    missing: dict[tuple[str, str], list[int]] = {}
    for run in (run for run, rows in zip(runs, done, strict=True) if not rows):
        missing.setdefault((run.recipe, run.task), []).append(run.seed)
    unfinished += [f"{recipe}, {task}, seed {', '.join(map(str, seeds))}" for (recipe, task), seeds in missing.items()]
    found = {
        task: {
            name: [rows for run, rows in zip(runs, done, strict=True) if rows and (run.task, run.recipe) == (task, name)]
            for name in args.recipes
        }
        for task in args.tasks
    }
    facts = {"factors": study.factors, "searches": searches, "search_task": args.search_task, "unfinished": unfinished}
    facts |= {"machine": machine, "versions": versions(), "also": LEVERED}
    text = tables(found, **facts)
    stem.with_suffix(".md").write_text(text + "\n")
    plot(found, stem.with_suffix(".png"))
    print(text)
    return 1 if unfinished and not args.table else 0


if __name__ == "__main__":
    sys.exit(main())
