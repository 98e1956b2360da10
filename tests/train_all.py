"""A launcher's script for the tests: trains one configuration after the other, so that Python starts once for all of them.

deepspeed tests/train_all.py CONFIGS.json, a list of configurations. With "resume": true it goes on with the run and writes
resumed.json; every rank writes the trajectories of its last rollout.
"""

import json
import sys

import torch

from fastloop.config import parse_config
from fastloop.ranks import Ranks
from fastloop.trainer import Trainer

torch.set_num_threads(1)
with Ranks.join() as ranks, open(sys.argv[-1]) as file:
    for values in json.load(file):
        resume = values.pop("resume", False)
        trainer = Trainer(parse_config(values, "test"), resume, ranks)
        rollout = trainer._rollout

        def kept(*args, rollout=rollout, trainer=trainer):
            found = rollout(*args)
            torch.save([found.ids, found.latents, found.log_probs], trainer.folder / f"trajectories-{ranks.rank}.pt")
            return found

        trainer._rollout = kept
        if resume and ranks.main:
            (trainer.folder / "resumed.json").write_text(json.dumps([trainer.iteration, trainer.not_carried_over]))
        trainer.train()
