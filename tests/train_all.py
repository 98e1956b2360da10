"""A launcher's script for the tests: trains one configuration after the other, so that Python starts once for all of them.

deepspeed tests/train_all.py CONFIGS.json, a list of configurations. With "resume": FOLDER it goes on with a copy of that run
as it was when its first iteration was saved, and writes resumed.json. With "refused": true that may be refused by all ranks:
what is said goes to refused.txt. Every rank writes the trajectories of its last rollout, and with model.compile its counts;
"traced": true has graphs run as they are traced.
"""

import json
import os
import shutil
import sys
from pathlib import Path

import torch

from fastloop.errors import UserError
from fastloop.observer import UNOBSERVED
from fastloop.ranks import Ranks
from fastloop.recipes import parse_config
from fastloop.trainer import Trainer

torch.set_num_threads(1)
with Ranks.join() as ranks, open(sys.argv[-1]) as file:
    any_refused = False
    for values in json.load(file):
        resume = values.pop("resume", None)
        if resume and ranks.main:
            later = [f"iteration-{i:06d}" for i in range(2, 10)]
            shutil.copytree(resume, values["output_dir"], ignore=shutil.ignore_patterns(*later, "export", "trajectories-*"))
        ranks.wait()
        observer, traced, refused = UNOBSERVED, values.pop("traced", False), values.pop("refused", False)
        if values["model"].get("compile"):
            from compile_counts import Counts, compile_as_traced, forget

            observer = Counts()
            if not resume:
                forget()
            torch.compile = compile_as_traced if traced else compile_as_traced.func
        try:
            # without the report, which is half of the time of such a run
            trainer = Trainer(parse_config(values, "test"), resume is not None, ranks, observer, leave_out=("report",))
        except UserError as error:
            if not refused:
                raise
            if ranks.main:
                Path(values["output_dir"], "refused.txt").write_text(str(error))
            any_refused = True
            continue
        rollout = trainer.rollout

        def kept(*args, rollout=rollout, trainer=trainer):
            found = rollout(*args)
            torch.save([found.ids, found.latents, found.log_probs], trainer.folder / f"trajectories-{ranks.rank}.pt")
            return found

        trainer.rollout = kept
        if resume and ranks.main:
            (trainer.folder / "resumed.json").write_text(json.dumps([trainer.iteration, trainer.not_carried_over]))
        trainer.train()
        if observer is not UNOBSERVED:
            (trainer.folder / f"counts-{ranks.rank}.json").write_text(json.dumps(observer.counts))
    if any_refused:  # their engines are left as they were, and ending Python with them can abort the process
        ranks.wait()
        sys.stdout.flush()
        os._exit(0)
