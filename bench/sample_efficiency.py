"""Held-out score against training images: several recipes, several seeds, the same number of images each.

    python bench/sample_efficiency.py configs/shapes_{loop,ppo,reinforce,rloo}.yaml --seeds 0 1 2 --out runs/comparison

Every run is `fastloop train RECIPE seed=S output_dir=OUT/RECIPE-S --resume`, so an interrupted comparison goes on where it
stopped. Prints a Markdown table and writes OUT/summary.json: per recipe the held-out score of each seed before and after,
the mean gain, and its standard error over the seeds.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from fastloop.config import load_config
from fastloop.errors import UserError
from fastloop.machine import describe_machine, versions
from fastloop.tracking import read_rows


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="+", type=Path, metavar="RECIPE.yaml")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="overrides for every run")
    parser.add_argument("--out", type=Path, default=Path("runs/comparison"))
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time; each gets an equal share of the CPU cores")
    args = parser.parse_args(argv)
    try:
        configs = {path: load_config(path, args.set) for path in args.recipes}
    except UserError as error:
        parser.error(str(error))
    images = {config.iterations * config.images_per_rollout for config in configs.values()}
    if len(images) > 1:
        parser.error(f"the recipes train on different numbers of images ({sorted(images)}): set iterations to compare them")

    args.out.mkdir(parents=True, exist_ok=True)
    runs = [(path, seed, args.out / f"{path.stem}-{seed}") for seed in args.seeds for path in args.recipes]
    threads = str(max(1, len(os.sched_getaffinity(0)) // args.jobs))

    def train(run: tuple[Path, int, Path]) -> None:
        path, seed, folder = run
        command = [sys.executable, "-m", "fastloop.cli", "train", str(path), *args.set]
        command += [f"seed={seed}", f"output_dir={folder}", "--resume"]
        with open(f"{folder}.log", "w") as log:
            env = {**os.environ, "OMP_NUM_THREADS": threads}
            code = subprocess.run(command, env=env, stdout=log, stderr=subprocess.STDOUT).returncode
        print(f"{folder.name}: {'done' if code == 0 else f'exit code {code}, see {folder}.log'}", flush=True)
        if code:
            raise SystemExit(code)

    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(train, runs))

    summary = {
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "machine": describe_machine(torch.device("cuda" if torch.cuda.is_available() else "cpu")),
        "versions": versions(),
        "images": images.pop(),
        "seeds": args.seeds,
        "recipes": {path.stem: summarize(path.stem, args.out, args.seeds) for path in args.recipes},
    }
    (args.out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    print(table(summary))
    return 0


def summarize(recipe: str, out: Path, seeds: list[int]) -> dict:
    """Of one recipe: held-out scores by iteration for each seed, and the gain from first to last over the seeds."""
    evaluations = [read_rows(out / f"{recipe}-{seed}" / "eval.jsonl") for seed in seeds]
    curves = np.array([[row["score"]["mean"] for row in rows] for rows in evaluations])
    gains = curves[:, -1] - curves[:, 0]
    return {
        "images": [row["images"] for row in evaluations[0]],
        "scores": curves.round(4).tolist(),
        "before": float(curves[:, 0].mean()),
        "after": float(curves[:, -1].mean()),
        "gain": float(gains.mean()),
        "gain_stderr": float(gains.std(ddof=1) / len(seeds) ** 0.5) if len(seeds) > 1 else None,
    }


def table(summary: dict) -> str:
    """The summary as a Markdown table."""
    seeds = " | ".join(f"seed {seed}" for seed in summary["seeds"])
    lines = [f"| recipe | before | after | gain | {seeds} |", "|---" * (4 + len(summary["seeds"])) + "|"]
    for name, row in summary["recipes"].items():
        error = "" if row["gain_stderr"] is None else f" ± {row['gain_stderr']:.3f}"
        finals = " | ".join(f"{curve[-1]:.3f}" for curve in row["scores"])
        lines.append(f"| {name} | {row['before']:.3f} | {row['after']:.3f} | {row['gain']:+.3f}{error} | {finals} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
