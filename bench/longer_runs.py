"""Whether LOOP fast holds in longer runs: the demo, with settings changed one at a time, and LOOP with as many pictures.

    python bench/longer_runs.py [KEY=VALUE ...] --out runs/longer_runs --seeds 0 1 [--only NAME ...]
    python bench/longer_runs.py --table

Each run is configs/shapes_demo.yaml over 12,800 pictures, with what its variant changes, and is evaluated five times on the
demo's held-out prompts. One after the other, in processes of one thread, each about 12 minutes; an interrupted one goes on.
Its evaluations are then lines of bench/results/longer_runs_cpu.jsonl, beside those of runs with code that is no longer here,
which say so.
What KEY=VALUE changes in every run is part of a variant's name there.
Prints the table of all lines: scores by share of the run, and by how much the error d with which the model denoises its own
better pictures has grown, its mean over 40 iterations against that of the first 20.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

from markdown_tables import padded

from fastloop import cli
from fastloop.errors import UserError
from fastloop.recipes import load_config
from fastloop.tracking import read_rows

DEMO = Path(__file__).resolve().parent.parent / "configs" / "shapes_demo.yaml"
ROWS = Path(__file__).resolve().parent / "results" / "longer_runs_cpu.jsonl"
OWN = "iterations=800 eval.every=160 checkpoint.every=80"  # a quarter longer than the demo
PLAIN = "kl.of_advantages=false kl.every"
VARIANTS = {
    "LOOP fast": "",
    "LOOP": "algorithm=loop prompts_per_step=16 images_per_prompt=4 last_steps.drop=3 clip_range=1e-3 ema.decay=0.95 "
    "optimizer.schedule=linear optimizer.lr=2.5e-3 iterations=200 eval.every=40 checkpoint.every=20",
    "LOOP fast, rate 0.006": "optimizer.lr=6e-3",
    "no KL": "kl.weight=0",
    "KL of 0.03, every 4th iteration": f"kl.weight=0.03 {PLAIN}=4",
    "KL of 0.03": f"kl.weight=0.03 {PLAIN}=1",
    "KL of 0.01": f"kl.weight=0.01 {PLAIN}=1",
    "KL of 0.003": f"kl.weight=0.003 {PLAIN}=1",
    "no KL, rate 0.001": "kl.weight=0 optimizer.lr=1e-3",
    "no KL, weight decay 0.3": "kl.weight=0 optimizer.weight_decay=0.3",
}
SPAN, FIRST, FIFTHS = 40, 20, 5


def settings(variant: str, overrides: list[str]) -> list[str]:
    """Return all that a variant and the command line change in the demo."""
    return [*OWN.split(), *VARIANTS[variant].split(), *overrides]


def named(variant: str, overrides: list[str]) -> str:
    """Return the name of a variant in the lines: what the command line changes makes it another one."""
    return ", ".join([variant, *overrides])


def train(variant: str, seed: int, overrides: list[str], out: Path) -> list[dict]:
    """Train a variant, or go on with it, and return its rows; none where the run has failed or was stopped."""
    name = named(variant, overrides)
    folder = out / f"{name.replace(' ', '_').replace('/', '_')}-{seed}"
    program = "import sys; from fastloop.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", program, "train", str(DEMO), "--resume", *settings(variant, overrides)]
    command += [f"seed={seed}", f"output_dir={folder}"]
    if subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}).returncode:
        return []
    return rows_of(folder, name, seed)


def rows_of(folder: Path, variant: str, seed: int) -> list[dict]:
    """Return a row for each evaluation of a run, after which share of it, with the growth of d until then."""
    found, iterations = [], read_rows(folder / "metrics.jsonl")
    errors = [row.get("policy/denoising_loss_better") for row in iterations]

    def mean(part: list[float | None]) -> float:
        known = [error for error in part if error is not None]  # none where no image was better than its group
        return sum(known) / len(known)

    for row in read_rows(folder / "eval.jsonl"):
        done = row["iteration"]
        own = {"variant": variant, "seed": seed, "iteration": done, "images": done * iterations[0]["images"]}
        own |= {name: round(row["score"][name], 4) for name in ("mean", "stderr")}
        if done:
            if any(errors):  # where final latents are trained
                own["growth"] = round(mean(errors[max(0, done - SPAN) : done]) / mean(errors[:FIRST]), 2)
            own["cpu_seconds"] = round(sum(of["time/cpu"] for of in iterations[:done]))
        found.append(own)
    return found


def table(rows: list[dict]) -> str:
    """Write the rows as Markdown: a variant a line, its seeds side by side; a dash where a run was stopped before."""
    lines = [["variant", "seeds", *(f"{share}/{FIFTHS}" for share in range(1, FIFTHS + 1)), "growth of d", "CPU s"]]
    for variant in dict.fromkeys(row["variant"] for row in rows):
        seeds = sorted({row["seed"] for row in rows if row["variant"] == variant})
        runs = [[row for row in rows if (row["variant"], row["seed"]) == (variant, seed)] for seed in seeds]
        most = max(map(len, runs))
        scores = [[f"{run[i]['mean']:.3f}" if i < len(run) else "-" for run in runs] for i in range(1, most)]
        shown = [" ".join(of) for of in scores] + [""] * (FIFTHS + 1 - most)
        ends = [" ".join(str(run[-1].get(name, "-")) for run in runs) for name in ("growth", "cpu_seconds")]
        lines.append([variant, " ".join(map(str, seeds)), *shown, *ends])
    return padded(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="of every run")
    parser.add_argument("--only", nargs="+", choices=list(VARIANTS), default=list(VARIANTS), metavar="NAME")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--out", type=Path, default=Path("runs/longer_runs"), help="folder of the runs")
    parser.add_argument("--rows", type=Path, default=ROWS, help="the file of the lines")
    parser.add_argument("--table", action="store_true", help="only print the table of the lines that are there")
    args = parser.parse_intermixed_args(argv)
    known = {(row["variant"], row["seed"]) for row in read_rows(args.rows)} if args.rows.exists() else set()
    runs = [] if args.table else [(variant, seed) for seed in args.seeds for variant in args.only]
    try:
        for variant, _ in runs:  # refuses before the first run what does not fit
            load_config(DEMO, settings(variant, args.overrides))
    except UserError as error:
        return cli.fail(str(error), 2)
    for variant, seed in runs:
        if (named(variant, args.overrides), seed) not in known:
            if not (rows := train(variant, seed, args.overrides, args.out)):
                return 1  # the run has said why
            args.rows.parent.mkdir(parents=True, exist_ok=True)
            with args.rows.open("a") as file:
                file.write("".join(json.dumps(row) + "\n" for row in rows))
    print(table(read_rows(args.rows)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
