"""Each lever alone and left out: what it adds to LOOP and to LOOP fast at equal compute, one at a time.

    python bench/ablation.py --out runs/ablation --results bench/results --jobs 2

Two bases, with the learning rates that the search of bench/time_to_score.py found, 0.003 and 0.006:

- `LOOP with levers`: the policy gradient, with what `PPO with levers` has beside its advantages: the last three steps are not
  trained, clip range 0.001, linear schedule, averaged weights. Each of these is left out once; each lever of bench/levers.py,
  and some keys, are added once.
- `LOOP fast`: each of what `algorithm: loop_fast` brings is left out once, and what else was thought of is added once.

Every run trains the task `mix` without guidance until its budget is spent, in forwards of the UNet, and is evaluated half-way
and at its end. Runs that have finished are lines of ablation_cpu.jsonl in the results folder and are not run again; an
interrupted one goes on. Prints a Markdown table, and writes it and a plot beside that file. A difference is that to the base
with the same seed, so that what the seeds share does not count; its error is over the seeds.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from sample_efficiency import over_seeds
from short_runs import RATE, ShortRuns, carry_out
from time_to_score import FAST, GROUPS, KL, LEVERS, NO_KL, Recipe, parser_of
from time_to_score_tables import COLORS, markdown

CALLS = "memory.update_batch=20"  # where fewer rows are left of an update, calls that are not filled up with copies
VARIANTS: dict[str, tuple[tuple[str, ...], dict[str, tuple[str, ...]]]] = {  # base: its items, what is added by name
    "LOOP with levers": (
        ("algorithm=loop", *GROUPS, *LEVERS, f"{RATE}=3e-3"),
        {
            "all steps trained": ("last_steps.drop=0",),
            "clip range 1e-4": ("clip_range=1.0e-4",),
            "constant rate": ("optimizer.schedule=constant",),
            "no averaged weights": ("ema.decay=null",),
            "steps 0 to 2": ("lever=steps:0:2",),
            "noise in steps 0 to 4 alone": ("last_steps.drop=0", "sampling.noise_steps=[0,4]"),
            "noise in steps 1 to 3 alone": ("last_steps.drop=0", "sampling.noise_steps=[1,3]"),
            "5 sampler steps, noise in 0 to 2 alone": ("last_steps.drop=0", "sampling.steps=5", "sampling.noise_steps=[0,2]"),
            "b / sigma equal (PCPO)": ("lever=weights:equal",),
            "weighted by noise (TempFlow)": ("lever=weights:noise",),
            "James-Stein baseline": ("lever=james_stein",),
            "control variate of predicted x_0": ("lever=control",),
            "tree: 2 children at step 0, 4 at step 2": ("lever=tree:0x2:2x4", "images_per_prompt=8", "prompts_per_step=8"),
            "tree: 2 at step 3, 2 at step 5, of steps 3 to 5": ("last_steps.drop=2", "lever=steps:3:5", "lever=tree:3x2:5x2"),
            "ratio of a trajectory, clip 0.05": ("lever=ratio:trajectory_total", "clip_range=0.05"),
            "4 updates a rollout": ("updates_per_rollout=4",),
            "K = 8": ("images_per_prompt=8", "prompts_per_step=8"),
            "16 images a rollout": ("prompts_per_step=4",),
            "16 images a rollout, 1 update": ("prompts_per_step=4", "updates_per_rollout=1"),
            "5 sampler steps": ("sampling.steps=5", "last_steps.drop=1"),
            "gradients of one size": ("optimizer.max_grad_norm=1.0e-5",),
            "best and worst alone *": ("lever=best_and_worst", CALLS),
            "groups without spread drawn again *": ("lever=redraw:2:0.05",),
            "prompts drawn by their spread": ("lever=by_spread",),
        },
    ),
    "LOOP fast": (
        ("algorithm=loop_fast", *FAST, *KL, f"{RATE}=6e-3"),
        {
            "no KL": NO_KL,
            "KL in every iteration": ("kl.every=1",),
            "constant rate": ("optimizer.schedule=constant",),
            "no averaged weights": ("ema.decay=null",),
            "gradients as they are": ("optimizer.max_grad_norm=1",),
            "AdamW's eps 1e-12": ("optimizer.eps=1.0e-12",),
            "K = 4": ("images_per_prompt=4", "prompts_per_step=4"),
            "8 images a rollout": ("prompts_per_step=1",),
            "32 images a rollout": ("prompts_per_step=4",),
            "levels of the whole schedule": ("forward.window=[20,980]",),
            "3 levels": ("forward.levels=3",),
            "10 levels": ("forward.levels=10",),
            "2 updates a rollout": ("updates_per_rollout=2",),
            "5 sampler steps": ("sampling.steps=5",),
            "advantages over their std (GRPO)": ("advantage=group_norm",),
            "James-Stein baseline": ("lever=james_stein",),
            "prompts drawn by their spread": ("lever=by_spread",),
            "LoRA of rank 4": ("model.lora.rank=4",),
            "LoRA of rank 64": ("model.lora.rank=64",),
            "LoRA on feed-forward layers too": ("model.lora.target_modules=[to_q,to_k,to_v,to_out.0,ff.net.0.proj,ff.net.2]",),
            "best and worst alone *": ("lever=best_and_worst", CALLS),
        },
    ),
}


def recipes() -> dict[str, Recipe]:
    """Return the bases and their variants, by name."""
    found = {}
    for base, (items, variants) in VARIANTS.items():
        found[base] = Recipe(items)
        found |= {f"{base}: {name}": Recipe((*items, *changes)) for name, changes in variants.items()}
    return found


def differences(study: ShortRuns, base: str, name: str) -> np.ndarray:
    """Return final scores less those of the base with the same seed, float64 (S,), where both have finished."""
    both = [[study.finished(study.run_of(recipe, seed)) for recipe in (f"{base}: {name}", base)] for seed in study.args.seeds]
    ends = [[rows[-1]["scores"]["plain"]["mean"] for rows in of_seed] for of_seed in both if all(of_seed)]
    return np.array([ours - theirs for ours, theirs in ends])


def table(study: ShortRuns, base: str) -> str:
    """Write a base and its variants, the best first."""
    variants = VARIANTS[base][1]
    found = {name: study.scores(base if name is None else f"{base}: {name}") for name in (None, *variants)}
    lines = []
    for name in sorted((name for name, scores in found.items() if scores), key=lambda name: -np.mean(found[name], axis=0)[-1]):
        scores = np.array(found[name])
        difference = "" if name is None or not len(of := differences(study, base, name)) else over_seeds(of)
        lines.append(
            [f"**{base}**" if name is None else name, over_seeds(scores[:, -2]), over_seeds(scores[:, -1]), difference]
        )
    return markdown([base, "half-way", "at the end", "difference"], lines)


def plot(study: ShortRuns, path: Path) -> None:
    """Draw the differences with their errors, a panel for each base."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 6), layout="constrained")
    for axes, (base, (_, variants)), color in zip(
        figure.subplots(1, len(VARIANTS)), VARIANTS.items(), COLORS[1:], strict=False
    ):
        found = {name: of for name in variants if len(of := differences(study, base, name))}
        names = sorted(found, key=lambda name: found[name].mean())
        error = [found[name].std(ddof=1) / len(found[name]) ** 0.5 if len(found[name]) > 1 else 0.0 for name in names]
        axes.errorbar([found[name].mean() for name in names], names, xerr=error, fmt="o", color=color, capsize=2)
        axes.axvline(0, color=COLORS[0], linewidth=0.8, linestyle=":")
        axes.set(title=base, xlabel="held-out score, less that of the base")
        axes.grid(alpha=0.25)
    figure.savefig(path, dpi=150)


def show(study: ShortRuns) -> list[str]:
    """Write both tables, and what the star means."""
    return [*(table(study, base) for base in VARIANTS), "\\* changes the objective (bench/levers.py)."]


def main(argv: list[str] | None = None) -> int:
    return carry_out(argv, parser_of("ablation", __doc__, 40_000, [0, 1, 2]), recipes(), 2, show, plot)


if __name__ == "__main__":
    sys.exit(main())
