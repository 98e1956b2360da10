"""What `forward_process` could be: other losses of the same noised latents, at equal compute on the bundled model.

    python bench/forward_forms.py --forms signed average --seeds 0 1 [--out FILE.jsonl] [KEY=VALUE ...]
    python bench/forward_forms.py --table [--out FILE.jsonl]

Each run trains `configs/shapes_study.yaml` (all five categories, no guidance) with leave-one-out advantages A, 16 images of 4
prompts an iteration, 5 noise levels an image, a constant rate and averaged weights (decay 0.95), for as many iterations as
33,400 forwards of the UNet pay: the rollout's steps, 3 for each trained row (its backward counts as two), 2 for decoding and
scoring an image, and 1 more for each row where a form needs an old prediction. The averaged weights are then scored on the 200
held-out prompts, 3 images each, on the noise that all evaluations share.

The forms, with d = |eps_hat - eps|^2, eps_old the prediction of an older model, computed once for each rollout, and S from
`--strength`:

    group      A d, with the levels and the noise shared by the images of a prompt: what fastloop has
    signed     A d, with levels and noise of each image's own; so are the following
    nft        2 A (eps_old - eps) eps_hat + S |eps_hat - eps_old|^2: DiffusionNFT's implicit negative policy, where its
               b A_max is S; eps_old of the weights averaged with decay 0.95
    average    A d + S |eps_hat - eps_old|^2, of the same old model: the KL of AWM
    clipped    -min(rho A, clip(rho, 1 - S, 1 + S) A) with rho = exp(d_old - d), of the same old model: the clip of AWM
    reference  as average, of the model before training: what `kl.weight: S` does
    offset     (A + S) d: no advantage below -S is left
    v          A d / alpha_t: the error of v in place of that of the noise
    guided     A d of the guided prediction, where `sampling.guidance_scale` is not 1: both branches have a gradient

A row is written for each run, with the means over the quarters of its iterations, and the table is made of the rows. One
thread, about a minute a run.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from markdown_tables import padded

from fastloop.evaluation import evaluate
from fastloop.kernels.reference import STATISTICS, PolicyTerms, transition_mean
from fastloop.losses import update_sampling
from fastloop.optimizers import Ema
from fastloop.preflight import preflight
from fastloop.recipes import load_config
from fastloop.rollout import Texts
from fastloop.tracking import read_rows
from fastloop.trainer import Trainer
from fastloop.update import PolicyUpdate

RECIPE = "configs/shapes_study.yaml"
OWN = ("algorithm=loop_forward", "last_steps.drop=0", "prompts_per_step=4", "images_per_prompt=4", "ema.decay=0.95")
OWN += ("optimizer.lr=3e-3", "optimizer.schedule=constant", "eval.images_per_prompt=3")
OLD = ("nft", "average", "clipped", "reference")  # the forms that need an old prediction
FORMS = ("group", "signed", *OLD, "offset", "v", "guided")
OLD_DECAY, BUDGET = 0.95, 33_400


class Form(PolicyUpdate):
    """Updates with another loss; the rows, their order and the engine are fastloop's."""

    form, strength = "signed", 0.0

    def __call__(self, trajectories, advantages, iteration):
        if self.form in OLD:
            if not hasattr(self, "average"):
                self.average = Ema(self.engine.parameters, OLD_DECAY)
            self.old = self.predictions(trajectories)
        return super().__call__(trajectories, advantages, iteration)

    @torch.no_grad()
    def predictions(self, trajectories) -> torch.Tensor:
        """Return the old model's predictions of the noise, float32 (R, C, H, W), of all rows."""
        transitions, found = trajectories.transitions(self.steps), []
        text = Texts(self.denoiser, trajectories.prompts, update_sampling(self.config))
        with self.denoiser.reference() if self.form == "reference" else self.average.applied():
            for rows in torch.arange(len(transitions)).split(self.batches.update):
                at = transitions.at(rows)
                number = transitions.ids[at.trajectory] * self.config.images_per_prompt
                row = self.forward.rows(transitions.latents(at)[1], number, at.step)
                output = self.denoiser.predict(row["x_t"], row["timestep"], *text.of(at), self.batches.update)
                found.append(transition_mean(*output, row["x_t"], row["a"], row["b"], 1.0))
        return torch.cat(found)

    def loss(self, transitions, advantages, rows, text, full=None):
        """As `PolicyUpdate.loss`, with the form's loss."""
        if self.form == "group":
            return super().loss(transitions, advantages, rows, text, full)
        transitions = replace(transitions, ids=transitions.ids * self.config.images_per_prompt)
        if self.form == "signed":
            return super().loss(transitions, advantages, rows, text, full)
        at, b = transitions.at(rows), self.strength
        row = self.forward.rows(transitions.latents(at)[1], transitions.ids[at.trajectory], at.step)
        condition = Texts(self.denoiser, text.prompts, self.config.sampling) if self.form == "guided" else text
        output = self.denoiser.predict(row["x_t"], row["timestep"], *condition.of(at), full or self.batches.update)
        guidance, noise = self.config.sampling.guidance_scale, row["x_prev"]
        predicted = transition_mean(*output, row["x_t"], row["a"], row["b"], guidance)
        advantage, error, old = advantages[at.row], mean_square(predicted - noise), None
        if self.form in OLD:
            old = self.old[at.row]
        if self.form == "nft":
            loss = 2 * advantage * ((old - noise) * predicted).flatten(1).mean(1) + b * mean_square(predicted - old)
        elif self.form == "clipped":
            ratio = (mean_square(old - noise) - error).exp()
            loss = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - b, 1 + b))
        elif self.form == "guided":
            loss = advantage * error
        elif self.form == "offset":
            loss = (advantage + b) * error
        elif self.form == "v":
            loss = advantage * error / self.forward._signal[row["timestep"]].square()
        else:
            loss = advantage * error + b * mean_square(predicted - old)
        logged = {"better": error.detach() * (advantage > 0), "worse": error.detach() * (advantage < 0)}
        terms = PolicyTerms(loss, -error.detach(), torch.ones_like(error), torch.zeros(len(STATISTICS)))
        return terms, loss, {f"denoising_loss_{name}": values for name, values in logged.items()}

    def _step(self, loss, iteration):
        norm = super()._step(loss, iteration)
        if norm is not None and hasattr(self, "average"):
            self.average.update()
        return norm


def mean_square(x: torch.Tensor) -> torch.Tensor:
    """Return the mean of the squares of each row."""
    return x.square().flatten(1).mean(1)


def run(form: str, strength: float, seed: int, overrides: list[str], folder: str, budget: int) -> dict:
    """Train once and return the row: what was run, the held-out score, the rewards of the quarters of the run."""
    settings = [*OWN, f"seed={seed}", f"output_dir={folder}/run", *overrides]
    config = load_config(RECIPE, settings)
    branches = 1 if config.sampling.guidance_scale == 1 else 2
    row = 3 * (branches if form == "guided" else 1) + (form in OLD)
    image = config.sampling.steps * branches + 2 + config.forward.levels * row
    iterations = budget // (image * config.images_per_rollout)
    config = load_config(RECIPE, [*settings, f"iterations={iterations}"])
    trainer = Trainer(config, leave_out=("checkpoints", "evaluation", "export", "report"))
    parts = (trainer.denoiser, trainer.engine, trainer.table, trainer.steps_trained, trainer.ranks, trainer.ema)
    trainer.update = Form(config, *parts)
    trainer.update.form, trainer.update.strength = form, strength
    started = time.process_time()
    rows = read_rows(trainer.train() / "metrics.jsonl")
    seconds, rewards = time.process_time() - started, preflight(config).eval_rewards
    rewards.start()
    with trainer.ema.applied() if trainer.ema else nullcontext():
        found = evaluate(trainer.denoiser, config, trainer.eval_prompts, rewards)
    rewards.close()

    def quarters(name: str) -> list[float]:
        values = np.array([row.get(name, np.nan) for row in rows])
        return [float(f"{np.nanmean(part):.4g}") for part in np.array_split(values, 4)]

    own = {"form": form, "strength": strength, "overrides": overrides, "seed": seed, "budget": budget}
    own |= {"iterations": iterations, "images": iterations * config.images_per_rollout, "cpu_seconds": round(seconds, 1)}
    own |= {"score": round(found.mean, 4), "reward": quarters("reward/mean"), "grad_norm": quarters("policy/grad_norm")}
    return own | {"error_of_worse": quarters("policy/denoising_loss_worse")}


def table(rows: list[dict]) -> str:
    """Write the rows as Markdown: runs that differ in their seed alone are one line, the best first."""
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault((row["budget"], row["form"], row["strength"], " ".join(row["overrides"])), []).append(row)
    lines = [["form", "strength", "settings", "forwards", "score, mean", "of each seed", "training reward, last quarter"]]
    mean = {key: sum(row["score"] for row in group) / len(group) for key, group in groups.items()}
    for key in sorted(groups, key=lambda key: (key[0], -mean[key])):
        budget, form, strength, settings = key
        group = sorted(groups[key], key=lambda row: row["seed"])
        scores = " ".join(f"{row['score']:.3f}" for row in group)
        last = " ".join(f"{row['reward'][-1]:.3f}" for row in group)
        lines.append([form, f"{strength:g}" if strength else "", settings, f"{budget:,}", f"{mean[key]:.3f}", scores, last])
    return padded(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="of every run")
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=["group"])
    parser.add_argument("--strength", type=float, default=0.0, help="S of the forms that have one")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--budget", type=int, default=BUDGET, help="forwards of the UNet")
    parser.add_argument("--out", type=Path, default=Path("bench/results/forward_forms_cpu.jsonl"), help="where rows are added")
    parser.add_argument("--table", action="store_true", help="only print the table of the rows that are there")
    args = parser.parse_intermixed_args(argv)
    torch.set_num_threads(1)
    for form in [] if args.table else args.forms:
        for seed in args.seeds:
            with tempfile.TemporaryDirectory() as folder:
                row = run(form, args.strength, seed, args.overrides, folder, args.budget)
            args.out.parent.mkdir(parents=True, exist_ok=True)
            with args.out.open("a") as file:
                file.write(json.dumps(row) + "\n")
    print(table(read_rows(args.out)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
