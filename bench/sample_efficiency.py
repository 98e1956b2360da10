"""Held-out score against training images and against seconds: LOOP with several K, and its baselines.

    python bench/sample_efficiency.py --out runs/sample_efficiency --jobs 2 --results bench/results

Every method trains the same model on the same number of images from one recipe; they differ in `algorithm`, K and the
learning rate. PPO and REINFORCE draw each image from a prompt of its own (K = 1), as DDPO does. Two stages:

1. Search: each algorithm trains once at each learning rate of one grid, for half as many images, with a seed that the study
   does not use. While the best rate is at an end of the grid, the next one is tried, at most twice. The best held-out score
   decides. LOOP is searched at K = 4, as RLOO and GRPO are, and has that rate at every K.
2. Study: each method with the rate of its algorithm, several seeds.

Every run is one thread of `fastloop train RECIPE --resume`; what is finished is not run again, and what was interrupted goes
on where it stopped, so the same command continues a study. `--table` only reads what is there.

Prints Markdown tables; writes sample_efficiency_cpu.json, .md and .png (or _GPU) to the results folder. Seconds are CPU
seconds of the process in rollouts, rewards and updates (`time/cpu`), which other work on the machine disturbs less than wall
seconds; on a GPU they are wall seconds (`time/iteration`). Evaluations do not count.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import numpy as np
import torch

from fastloop import cli
from fastloop.config import Config
from fastloop.errors import UserError
from fastloop.machine import describe_machine, versions
from fastloop.recipes import dump_config, load_config
from fastloop.tracking import read_rows

METHODS = {  # name: (algorithm, K)
    "LOOP K=2": ("loop", 2),
    "LOOP K=3": ("loop", 3),
    "LOOP K=4": ("loop", 4),
    "LOOP K=8": ("loop", 8),
    "PPO": ("ppo", 1),
    "REINFORCE": ("reinforce", 1),
    "RLOO K=4": ("rloo", 4),
    "GRPO K=4": ("grpo", 4),
}
IMAGES_PER_STEP = 48  # every K divides it
SEARCHED = {"loop": "LOOP K=4", "ppo": "PPO", "reinforce": "REINFORCE", "rloo": "RLOO K=4", "grpo": "GRPO K=4"}
SEARCH_SEED = 1000
COLORS = ("#9ecae1", "#4292c6", "#08519c", "#08306b", "#d94801", "#238b45", "#6a51a3", "#a63603")
WATCHED = ("policy/clipfrac", "policy/approx_kl", "policy/ratio_max_dev", "policy/grad_norm", "advantage/std", "reward/std")


@dataclass(frozen=True)
class Study:
    """What is compared: the recipe with its overrides, where the runs are, and how many at a time."""

    recipe: Path
    overrides: tuple[str, ...]
    out: Path
    search_iterations: int
    rates: tuple[float, ...]

    def config(self, method: str, rate: float, seed: int) -> Config:
        """Of one run; those of the search are shorter. Raises ``UserError``."""
        algorithm, k = METHODS[method]
        search = seed == SEARCH_SEED
        own = [f"algorithm={algorithm}", f"images_per_prompt={k}", f"prompts_per_step={IMAGES_PER_STEP // k}"]
        own += [f"optimizer.lr={rate}", f"seed={seed}", "tracking.tensorboard=false"]
        own += [f"iterations={self.search_iterations}", f"eval.every={self.search_iterations}"] if search else []
        name = f"{method.replace(' ', '_').replace('=', '')}-lr{rate:g}-seed{seed}"
        return load_config(self.recipe, [*self.overrides, *own, f"output_dir={self.out / name}"])


def main(argv: list[str] | None = None) -> int:
    parser = cli.Parser(prog="bench/sample_efficiency.py", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--recipe", type=Path, default=Path("configs/shapes_study.yaml"), metavar="RECIPE.yaml")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="overrides for every run")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), metavar="NAME", help=f"any of {', '.join(METHODS)}")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--rates", nargs="+", type=float, default=[1.5e-3, 3e-3, 6e-3], help="the grid; one is not searched")
    parser.add_argument("--out", type=Path, default=Path("runs/sample_efficiency"), help="folder of the runs")
    parser.add_argument("--results", type=Path, help="folder of the tables and the plot (default: that of the runs)")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, of one thread each")
    parser.add_argument("--table", action="store_true", help="only the tables and the plot, of the runs that are finished")
    try:
        args = parser.parse_args(argv)
        if unknown := [name for name in args.methods if name not in METHODS]:
            raise UserError(f"--methods: unknown {unknown[0]!r}: any of {', '.join(METHODS)}")
        if SEARCH_SEED in args.seeds:
            raise UserError(f"--seeds: {SEARCH_SEED} is the search's: use others")
        iterations = load_config(args.recipe, args.set).iterations
        study = Study(args.recipe, tuple(args.set), args.out, max(1, iterations // 2), tuple(sorted(args.rates)))
        for name in args.methods:
            study.config(name, args.rates[0], 0)  # refuses before the first run what does not fit
    except UserError as error:
        return cli.fail(str(error), 2)
    args.out.mkdir(parents=True, exist_ok=True)

    def train(name: str, rate: float, seed: int) -> bool:
        return finished(study.config(name, rate, seed)) or (not args.table and run(study.config(name, rate, seed)))

    with ThreadPoolExecutor(max(1, args.jobs)) as pool:
        names = list(dict.fromkeys(SEARCHED[METHODS[name][0]] for name in args.methods))
        found = dict(zip(names, pool.map(lambda name: search(study, name, train), names), strict=True))
        searches = {name: found[SEARCHED[METHODS[name][0]]] for name in args.methods}
        chosen = {name: max(of_rate, key=of_rate.get) for name, of_rate in searches.items() if of_rate}
        runs = [(name, seed) for seed in args.seeds for name in chosen]
        done = list(pool.map(lambda pair: train(pair[0], chosen[pair[0]], pair[1]), runs))
    rows = {}
    for name in chosen:
        configs = [study.config(name, chosen[name], s) for (n, s), ok in zip(runs, done, strict=True) if ok and n == name]
        if configs:
            rows[name] = summarize(configs) | {
                "rate": chosen[name],
                "search": {f"{r:g}": s for r, s in searches[name].items()},
            }
    if not rows:
        return cli.fail(f"no run of the study has finished in {args.out}", 1)

    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    options = [text for text in (sys.argv[1:] if argv is None else argv) if text != "--table"]
    found = [
        *(study.config(name, rate, SEARCH_SEED) for name, of_rate in searches.items() for rate in of_rate),
        *(study.config(name, chosen[name], seed) for (name, seed), ok in zip(runs, done, strict=True) if ok),
    ]
    summary = {
        "command": shlex.join(["python", "bench/sample_efficiency.py", *options]),
        "machine": describe_machine(device),
        "versions": versions(),
        "recipe": study.config(args.methods[0], args.rates[0], args.seeds[0]).model_dump(mode="json"),
        "seconds_of": "time/iteration" if on_gpu else "time/cpu",
        **took({config.output_dir for config in found if finished(config)}),
        "unfinished": [f"{name}, seed {seed}" for (name, seed), ok in zip(runs, done, strict=True) if not ok],
        "methods": rows,
    }
    results = args.results or args.out
    results.mkdir(parents=True, exist_ok=True)
    stem = results / f"sample_efficiency_{describe_machine(device).get('gpu', 'cpu').replace(' ', '_')}"
    stem.with_suffix(".json").write_text(json.dumps(summary, indent=1) + "\n")
    stem.with_suffix(".md").write_text(tables(summary) + "\n")
    plot(summary, stem.with_suffix(".png"))
    print(tables(summary))
    return 1 if summary["unfinished"] and not args.table else 0


# --- runs -------------------------------------------------------------------------------------------------------------


def finished(config: Config) -> bool:
    """Whether the folder of a configuration holds its finished run."""
    folder = Path(config.output_dir)
    if not (folder / "run.json").exists():
        return False
    same = load_config(folder / "config.yaml").model_copy(update={"output_dir": config.output_dir}) == config
    return same and json.loads((folder / "run.json").read_text())["status"] == "finished"


def run(config: Config) -> bool:
    """Trains one run in a process of its own, or goes on with it."""
    folder = Path(config.output_dir)
    recipe = Path(f"{folder}.yaml")  # beside the folder, whose own config.yaml is the run's
    recipe.write_text(dump_config(config))
    with open(f"{folder}.log", "w") as log:
        command = [sys.executable, "-m", "fastloop.cli", "train", str(recipe), "--resume"]
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        code = subprocess.run(command, env=env, stdout=log, stderr=subprocess.STDOUT).returncode
    print(f"{folder.name}: {'done' if code == 0 else f'exit code {code}, see {log.name}'}", file=sys.stderr, flush=True)
    return code == 0


def search(study: Study, method: str, train) -> dict[float, float]:
    """Held-out score by learning rate, of one run each. ``train(method, rate, seed)`` says whether there is such a run."""
    if len(study.rates) == 1:
        return {study.rates[0]: float("nan")}
    found: dict[float, float] = {}
    tried, step = list(study.rates), study.rates[1] / study.rates[0]
    while tried:
        for rate in tried:
            if train(method, rate, SEARCH_SEED):
                folder = Path(study.config(method, rate, SEARCH_SEED).output_dir)
                found[rate] = read_rows(folder / "eval.jsonl")[-1]["score"]["mean"]
        if any(rate not in found for rate in tried) or len(found) >= len(study.rates) + 2:
            break
        tried = wider(found, step)
    return found


def wider(found: dict[float, float], step: float) -> list[float]:
    """The next learning rate where the best of those tried is at an end."""
    best = max(found, key=found.get)
    if best == max(found):
        return [float(f"{best * step:.3g}")]
    return [float(f"{best / step:.3g}")] if best == min(found) else []


# --- numbers ----------------------------------------------------------------------------------------------------------


def summarize(configs: list[Config]) -> dict:
    """Of one method, over its seeds: curves of score and seconds by images, the categories at both ends, what updates did."""
    folders = [Path(config.output_dir) for config in configs]
    evaluations = [read_rows(folder / "eval.jsonl") for folder in folders]
    metrics = [read_rows(folder / "metrics.jsonl") for folder in folders]
    ends = {"before": 0, "after": -1}
    return {
        "algorithm": configs[0].algorithm,
        "images_per_prompt": configs[0].images_per_prompt,
        "updates_per_rollout": configs[0].updates_per_rollout,
        "seeds": [config.seed for config in configs],
        "images": [row["images"] for row in evaluations[0]],
        "scores": [[round(row["score"]["mean"], 5) for row in rows] for rows in evaluations],
        "seconds": [
            [round(sum(seconds_of(row) for row in rows if row["iteration"] <= e["iteration"]), 2) for e in found]
            for rows, found in zip(metrics, evaluations, strict=True)
        ],
        "categories": {
            name: {
                end: [round(rows[place]["categories"][name]["mean"], 5) for rows in evaluations] for end, place in ends.items()
            }
            for name in evaluations[0][0]["categories"]
        },
        "watched": {name: float(np.mean([row[name] for rows in metrics for row in rows if name in row])) for name in WATCHED},
    }


def took(folders: set[str]) -> dict:
    """How many runs there were, hours from the first to the last, and hours of training in all of them."""
    facts = [json.loads((Path(folder) / "run.json").read_text()) for folder in folders]
    begin, end = (pick(datetime.fromisoformat(f[key]) for f in facts) for pick, key in ((min, "started"), (max, "finished")))
    seconds = sum(seconds_of(row) for folder in folders for row in read_rows(Path(folder) / "metrics.jsonl"))
    return {"runs": len(folders), "hours": (end - begin).total_seconds() / 3600, "training_hours": seconds / 3600}


def seconds_of(row: dict) -> float:
    return row["time/iteration" if torch.cuda.is_available() else "time/cpu"]


def over_seeds(values, digits: int = 3, sign: str = "") -> str:
    """Mean ± standard error of one value per seed."""
    values = np.asarray(values, dtype=float)
    error = f" ± {values.std(ddof=1) / len(values) ** 0.5:.{digits}f}" if len(values) > 1 else ""
    return f"{values.mean():{sign}.{digits}f}{error}"


def tables(summary: dict) -> str:
    """The summary as Markdown tables."""
    methods = summary["methods"]
    images = next(iter(methods.values()))["images"]
    rates = sorted({rate for row in methods.values() for rate in row["search"]}, key=float)
    categories = list(next(iter(methods.values()))["categories"])

    def line(cells):
        return "| " + " | ".join(cells) + " |"

    def made(head, body):
        return "\n".join([line(head), "|" + "---|" * len(head), *map(line, body)])

    main, by_images, by_category, searched = [], [], [], []
    for name, row in methods.items():
        scores, seconds, watched = np.array(row["scores"]), np.array(row["seconds"]), row["watched"]
        main.append(
            [
                name,
                f"{row['rate']:g}",
                over_seeds(scores[:, -1]),
                over_seeds(scores[:, -1] - scores[:, 0], sign="+"),
                over_seeds(area(images, scores)),
                over_seeds(1000 * seconds[:, -1] / images[-1], 1),
                f"{watched['policy/clipfrac']:.2%}",
                f"{watched['policy/approx_kl']:.1e}",
                f"{watched['advantage/std'] / watched['reward/std']:.2f}" if watched["reward/std"] else "-",
            ]
        )
        by_images.append([name, *(over_seeds(scores[:, i]) for i in range(len(images)))])
        by_category.append([name, *(over_seeds(row["categories"][c]["after"]) for c in categories)])
        searched.append([name, *(mark(row, rate) for rate in rates)])
    first = next(iter(methods.values()))
    before = ["before training", *(over_seeds(first["categories"][c]["before"][:1]) for c in categories)]
    head = ["method", "learning rate", "held-out score", "gain", "mean over training", "s per 1,000 images", "clipped"]
    parts = [
        made([*head, "approx. KL", "std of A / std of r"], main),
        "Score by training images:",
        made(["method", *(f"{n:,}" for n in images)], by_images),
        "Score by category at the end:",
        made(["method", *categories], [before, *by_category]),
        f"The search: score of one run of {search_images(summary):,} images by learning rate, the chosen in bold:",
        made(["method", *rates], searched),
    ]
    what = "processor" if summary["seconds_of"] == "time/cpu" else "wall"
    parts.append(
        f"{summary['runs']} runs with the search, {summary['hours']:.1f} hours from the first to the last; "
        f"{summary['training_hours']:.1f} hours of {what} time without evaluations."
    )
    if summary["unfinished"]:
        parts.append("Not finished, and not in the tables: " + "; ".join(summary["unfinished"]) + ".")
    return "\n\n".join(parts)


def mark(row: dict, rate: str) -> str:
    if rate not in row["search"] or np.isnan(row["search"][rate]):
        return "-"
    text = f"{row['search'][rate]:.3f}"
    return f"**{text}**" if float(rate) == row["rate"] else text


def search_images(summary: dict) -> int:
    return IMAGES_PER_STEP * max(1, summary["recipe"]["iterations"] // 2)


def area(images: list[int], scores: np.ndarray) -> np.ndarray:
    """Mean score over training, of each seed: the area under its curve over images, by trapezes, divided by the images."""
    return np.trapezoid(scores, images, axis=1) / (images[-1] - images[0])


def plot(summary: dict, path: Path) -> None:
    """Mean held-out score with its standard error over the seeds, against images and against seconds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for name, row in summary["methods"].items():
        scores, color = np.array(row["scores"]), COLORS[list(METHODS).index(name)]
        mean, error = scores.mean(0), scores.std(0, ddof=1) / len(scores) ** 0.5 if len(scores) > 1 else 0
        for axes, x in ((left, row["images"]), (right, np.mean(row["seconds"], 0))):
            axes.plot(x, mean, color=color, label=name, marker="o", markersize=3, linestyle="-" if "LOOP" in name else "--")
            axes.fill_between(x, mean - error, mean + error, color=color, alpha=0.12, linewidth=0)
    left.set_xlabel("training images")
    right.set_xlabel("CPU seconds, one thread" if summary["seconds_of"] == "time/cpu" else "seconds")
    left.set_ylabel("held-out score (mean ± standard error over seeds)")
    left.legend(fontsize=8)
    for axes in (left, right):
        axes.grid(alpha=0.25)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    sys.exit(main())
