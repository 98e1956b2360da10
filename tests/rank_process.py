"""One rank of the runs that `ranks_of_runs` starts. Its imports are those that a server makes once, before it forks."""

from __future__ import annotations

import json
import os
import runpy
import shutil
import sys
from pathlib import Path

import accelerate  # noqa: F401  # like the others below, imported only when a model is loaded or trained
import deepspeed  # noqa: F401
import diffusers.loaders.peft  # noqa: F401
import peft  # noqa: F401
import torch
import transformers.models.clip.modeling_clip  # noqa: F401
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel  # noqa: F401

import fastloop.cli
import fastloop.engines.deepspeed  # noqa: F401
from fastloop.errors import UserError
from fastloop.observer import UNOBSERVED
from fastloop.ranks import Ranks
from fastloop.recipes import parse_config
from fastloop.trainer import Trainer


def run(variables: dict[str, str], log: str, function, *args) -> None:
    """Makes this process a rank: a launcher's variables, output to files, then the function."""
    os.environ.update(variables)
    for stream, end in ((sys.stdout, "out"), (sys.stderr, "err")):
        stream.flush()
        os.dup2(os.open(f"{log}.{end}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream.fileno())
    torch.set_num_threads(1)
    function(*args)


def run_script(path: str, *args: str) -> None:
    """As `python PATH ARGS` does."""
    sys.argv = [path, *args]
    runpy.run_path(path, run_name="__main__")


def train_all(configs: list[dict]) -> None:
    """Trains one configuration after the other, without the report, which is half of the time of such a run.

    With "resume": FOLDER it goes on with a copy of that run as it was when its first iteration was saved, and writes
    resumed.json. With "refused": true that may be refused by all ranks: what is said goes to refused.txt. Every rank writes
    the trajectories of its last rollout, and with model.compile its counts; "traced": true has graphs run as they are traced.
    """
    with Ranks.join() as ranks:
        for values in configs:
            train(values, ranks)


def train(values: dict, ranks: Ranks) -> None:
    resume, traced, refused = (values.pop(key, None) for key in ("resume", "traced", "refused"))
    if resume and ranks.main:
        later = [f"iteration-{i:06d}" for i in range(2, 10)]
        shutil.copytree(resume, values["output_dir"], ignore=shutil.ignore_patterns(*later, "export", "trajectories-*"))
    ranks.wait()
    observer = UNOBSERVED
    if values["model"].get("compile"):
        from compile_counts import Counts, compile_as_traced, forget

        observer = Counts()
        if not resume:
            forget()
        torch.compile = compile_as_traced if traced else compile_as_traced.func
    try:
        trainer = Trainer(parse_config(values, "test"), resume is not None, ranks, observer, leave_out=("report",))
    except UserError as error:
        if not refused:
            raise
        if ranks.main:
            Path(values["output_dir"], "refused.txt").write_text(str(error))
        return
    rollout = trainer.rollout

    def kept(*args):
        found = rollout(*args)
        torch.save([found.ids, found.latents, found.log_probs], trainer.folder / f"trajectories-{ranks.rank}.pt")
        return found

    trainer.rollout = kept
    if resume and ranks.main:
        (trainer.folder / "resumed.json").write_text(json.dumps([trainer.iteration, trainer.not_carried_over]))
    trainer.train()
    if observer is not UNOBSERVED:
        (trainer.folder / f"counts-{ranks.rank}.json").write_text(json.dumps(observer.counts))
