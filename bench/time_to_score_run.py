"""One run of bench/time_to_score.py, in a process of its own: trains, counts, and evaluates at intervals.

    python bench/time_to_score_run.py FOLDER

FOLDER holds job.json: who trains (`fastloop`, `baseline` of bench/baseline_ppo.py, or the Python of an environment with TRL),
the configuration, the levers of fastloop's run (bench/levers.py), if any, and what each evaluation has of its own in `eval`,
by name. Every `eval.every` iterations all of them are
made, of the same weights on the same held-out prompts, by `fastloop.evaluation.evaluate` for all trainers; of averaged weights
where there are any. It writes

    counts.jsonl    of each iteration: images, pictures decoded (some levers: more), rows of the network's calls, CPU seconds
    scores.jsonl    of each evaluation: what has been spent before it, and the scores

CPU seconds are those of iterations: without evaluations, checkpoints and loading. A run of fastloop that was interrupted goes
on from its checkpoint; the other trainers have none and begin again.
"""

from __future__ import annotations

import json
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import torch
from baseline_ppo import BaselinePPO, pipeline_of, settings_of
from forward_equivalents import PictureCounter, RowCounter
from levers import Lever, attach, in_place, parse_levers
from safetensors.torch import load_file
from throughput_systems import Worker, peer_case, save_for_peer

from fastloop import cli
from fastloop.checkpoints import load_weights
from fastloop.config import Config
from fastloop.denoisers import load_denoiser
from fastloop.engines.torch import pick_device
from fastloop.evaluation import evaluate
from fastloop.observer import Observer
from fastloop.prompts import PromptStream, load_prompts
from fastloop.recipes import parse_config
from fastloop.rewards.scoring import Rewards
from fastloop.stopping import Stopped
from fastloop.tracking import read_rows
from fastloop.trainer import Trainer

HERE = Path(__file__).resolve().parent


class Record:
    """What a run leaves in its folder: a row of counts for each iteration, and one of scores for each evaluation."""

    def __init__(self, folder: Path, config: Config, evaluations: dict[str, dict]) -> None:
        self.config, self.counts, self.scores = config, folder / "counts.jsonl", folder / "scores.jsonl"
        values = config.model_dump(mode="json")
        values["sampling"]["noise_steps"] = None  # whatever training draws with, all recipes are evaluated alike
        self.configs = {
            name: parse_config({**values, "eval": {**values["eval"], **changes}}, f"evaluation {name}")
            for name, changes in evaluations.items()
        }

    def begin_again(self) -> None:
        """Forget an earlier attempt."""
        for path in (self.counts, self.scores):
            path.unlink(missing_ok=True)

    def count(self, iteration: int, rows: dict[str, int], cpu: float) -> None:
        """Take down what an iteration was; again if it was done again after an interruption."""
        images = self.config.images_per_rollout
        row = {"iteration": iteration, "images": images, "pictures": images, **rows, "cpu": cpu}
        append(self.counts, row)

    def evaluate(self, iteration: int, denoiser, prompts, rewards: Rewards) -> None:
        """Make the evaluations of an iteration, where it has any and they have not been made."""
        due = iteration % self.config.eval.every == 0 or iteration == self.config.iterations
        if not due or any(row["iteration"] == iteration for row in read_rows(self.scores)):
            return
        before = {row["iteration"]: row for row in read_rows(self.counts) if row["iteration"] <= iteration}.values()
        spent = {name: sum(row[name] for row in before) for name in ("images", "sampled", "trained", "cpu")}
        spent["pictures"] = sum(row.get("pictures", row["images"]) for row in before)  # a run may be older than that count
        found = {name: evaluate(denoiser, config, prompts, rewards).row()["score"] for name, config in self.configs.items()}
        scores = {name: {key: round(score[key], 5) for key in ("mean", "stderr")} for name, score in found.items()}
        append(self.scores, {"iteration": iteration, **spent, "cpu": round(spent["cpu"], 2), "scores": scores})
        said = ", ".join(f"{name} {score['mean']:.3f}" for name, score in scores.items())
        print(f"after {iteration} iterations and {spent['images']} images: {said}", flush=True)


def append(path: Path, row: dict) -> None:
    """Add a row to a file of JSON lines."""
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")


def run_fastloop(config: Config, record: Record, levers: list[Lever]) -> None:
    """Train with fastloop, or go on with it."""

    class Watching(Observer):
        """Counts each iteration and evaluates between them."""

        def on_iteration(self, number: int) -> None:
            done = number - 1
            if done > self.began_at:
                cpu = read_rows(trainer.folder / "metrics.jsonl")[-1]["time/cpu"]
                record.count(done, {**self.counter.take(), **self.pictures.take()}, cpu)
            with trainer.ema.applied() if trainer.ema else nullcontext():
                record.evaluate(done, trainer.denoiser, trainer.eval_prompts, trainer.eval_rewards)
            self.counter.take()
            self.pictures.take()

    watching = Watching()
    left_out = ("evaluation", "export", "report")
    resume = (Path(config.output_dir) / "config.yaml").exists()
    with in_place(levers):
        trainer = Trainer(config, resume=resume, observer=watching, leave_out=left_out)
        attach(levers, trainer)
        watching.began_at, watching.counter = trainer.iteration, RowCounter(trainer.denoiser.network)
        watching.pictures = PictureCounter(trainer.denoiser)
        trainer.train()


def run_baseline(config: Config, record: Record) -> None:
    """Train with the plain PPO of bench/baseline_ppo.py, whose weights fastloop's denoiser shares."""
    record.begin_again()
    denoiser = load_denoiser(config.model, pick_device(config.engine.device))
    stream, prompts = PromptStream(load_prompts(config.prompts), config.seed), load_prompts(config.eval.prompts)
    known = {prompt.text: prompt for prompt in stream.prompts}
    size = denoiser.image_size(config.sampling)
    rewards, held_out = Rewards(config.rewards, stream.prompts, size), Rewards(config.rewards, prompts, size)
    for each in (rewards, held_out):
        each.start()

    def reward(images, texts):
        return rewards.score(images, [known[text] for text in texts]).total

    trainer = BaselinePPO(pipeline_of(denoiser), reward, settings_of(config))
    counter, n = RowCounter(denoiser.network), config.images_per_rollout
    for done in range(config.iterations + 1):
        record.evaluate(done, denoiser, prompts, held_out)
        if done < config.iterations:
            counter.take()
            started = time.process_time()
            trainer.iteration([prompt.text for prompt in stream.draw(done * n, n)])
            record.count(done + 1, counter.take(), time.process_time() - started)
    for each in (rewards, held_out):
        each.close()


def run_trl(config: Config, record: Record, python: str) -> None:
    """Train with TRL's trainer (bench/peer_trl.py), which hands over its adapter after each iteration."""
    record.begin_again()
    folder, n = record.scores.parent, config.images_per_rollout
    save_for_peer(config, folder / "pipeline")
    prompts = load_prompts(config.eval.prompts, "eval.prompts")
    drawn = PromptStream(load_prompts(config.prompts), config.seed).draw(0, n * config.iterations)
    case = peer_case(config, folder / "pipeline", threads=1) | {
        "prompts": [prompt.text for prompt in drawn],
        "seed": config.seed,
        "weights": str(folder / "weights.safetensors"),
    }
    (folder / "case.json").write_text(json.dumps(case))
    denoiser = load_denoiser(config.model, pick_device(config.engine.device))
    denoiser.train_adapter(gradient_checkpointing=False, seed=config.seed)
    held_out = Rewards(config.rewards, prompts, denoiser.image_size(config.sampling))
    held_out.start()
    rows = n * config.sampling.steps * config.sampling.branches  # of every step, sampled and trained
    worker = Worker("trl", [python, str(HERE / "peer_trl.py"), str(folder / "case.json")], folder / "trl.log", threads=1)
    for done in range(config.iterations + 1):
        if done:
            cpu = worker.iterate()["cpu_seconds"]
            record.count(done, {"sampled": rows, "trained": rows}, cpu)
            load_weights(denoiser.trainable(), load_file(case["weights"]))
        record.evaluate(done, denoiser, prompts, held_out)
    worker.close()
    held_out.close()


def main(folder: Path) -> int:
    job = json.loads((folder / "job.json").read_text())
    levers = parse_levers(job.get("levers", []))  # before the configuration, which may have names of theirs
    config = parse_config(job["config"], str(folder / "job.json"))
    torch.set_num_threads(1)
    record = Record(folder, config, job["evaluations"])
    try:
        if job["trainer"] == "fastloop":
            run_fastloop(config, record, levers)
        elif job["trainer"] == "baseline":
            run_baseline(config, record)
        else:
            run_trl(config, record, job["trainer"])
    except Stopped as stop:
        return cli.fail(str(stop), 130)
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
