"""What every kind of training shares: a folder, prompts, rewards, a model, and what a run leaves behind.

The loop itself is in `trainer.py`.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Collection
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from fastloop.advantages import ADVANTAGES, finish
from fastloop.alarms import ALARMS, Alarms
from fastloop.batches import Batches
from fastloop.checkpoints import load_checkpoint, save_checkpoint
from fastloop.config import Config
from fastloop.denoisers import ready_denoiser
from fastloop.denoisers.given import given_hashes
from fastloop.errors import RewardFailed, UserError, described, one_line
from fastloop.evaluation import evaluate
from fastloop.machine import describe_machine
from fastloop.metrics import image_statistics
from fastloop.observer import UNOBSERVED, Observer
from fastloop.optimizers import Ema
from fastloop.penalty import PENALTY
from fastloop.preflight import confirm, preflight
from fastloop.prompts import PromptStream, prompt_facts, score_name
from fastloop.ranks import ALONE, Ranks
from fastloop.records import Pace, save_samples
from fastloop.report import write_report
from fastloop.rewards.calls import save_unscored
from fastloop.rewards.scoring import Scores
from fastloop.rollout import Trajectories
from fastloop.rundir import claim_run_dir, release_run_dir, rewrite_config, write_run
from fastloop.stopping import Stopped, StopRequest
from fastloop.tracking import Tracker, read_rows


class TrainingRun:
    """One run of one configuration in one folder. Everything that can be refused is refused before the model loads.

    A kind of training says what is trained (`_prepare`), what its checkpoints hold beside the rest (`_own_state`,
    `_restore_own`), what it exports (`_export_to`), and has the loop, `train`.

    On several ranks each has its own: it draws its share of the trajectories; the rewards, and with them advantages and
    decisions, are the same on all. The main rank writes the folder.

    Attributes:
        engine: as `TorchEngine`, of what is trained. ema: its moving average, or ``None``.
        compiling: what was decided of compiling the network, in a line, or ``None``.
        iteration, images: finished and sampled for training so far. seconds: spent so far, over all resumes.
    """

    engine: Any
    ema: Ema | None = None
    compiling: str | None = None

    def __init__(
        self,
        config: Config,
        resume: bool = False,
        ranks: Ranks = ALONE,
        observer: Observer = UNOBSERVED,
        leave_out: Collection[Literal["checkpoints", "evaluation", "export", "report"]] = (),
    ) -> None:
        """Args:
            observer: is told of iterations and phases. leave_out: what is not done, for benchmarks and tests.

        Raises:
            UserError: anything in the configuration does not fit the machine, the files or the model.
        """
        self.leave_out = leave_out
        checked = preflight(config, ranks, resume)
        self.config, self.ranks, self.observer, self.chosen = checked.config, ranks, observer, None
        config = self.config
        self.device, self.table, self.steps_trained = checked.device, checked.table, checked.steps_trained
        self.rewards, self.eval_rewards, self.cut = checked.rewards, checked.eval_rewards, checked.cut
        self.prompts, self.eval_prompts = PromptStream(checked.prompts, config.seed), checked.eval_prompts
        facts = prompt_facts(checked.prompts, checked.eval_prompts)
        self.held_out = facts["eval.prompts"]["trained_too"] == 0  # whether training sees none of the evaluation's prompts
        claim = ranks.from_main(lambda: claim_run_dir(config, resume, facts, given_hashes(config)))
        self.folder, checkpoint, resumed = claim
        if not (self.folder / "config.yaml").exists():
            raise UserError(f"output_dir: this rank's machine does not see {self.folder}: put it where all machines see it")
        self.rewards.start()
        self.eval_rewards.start()

        self.denoiser = ready_denoiser(config, self.device, trained=True, fresh=checkpoint is None)
        self.denoiser.observer = observer
        if checked.chosen:
            self.config, self.chosen = config, _ = confirm(checked, self.denoiser, ranks)
            ranks.from_main(lambda: rewrite_config(self.folder, config))
        self.batches = Batches(config, self.steps_trained, ranks.world)
        self.advantage = ADVANTAGES[config.advantage]()
        self.iteration, self.images, self.seconds = 0, 0, 0.0
        saved = load_checkpoint(checkpoint, bool(config.ema.decay)) if checkpoint else None
        self._prepare(saved[0] if saved else None)
        config = self.config
        self.not_carried_over = self._restore(checkpoint, *saved[1:]) if saved else None
        self.stop, self.alarms, self.pace = StopRequest(ranks), Alarms(config), Pace(config)
        self._fired: dict[str, str] = {}  # the alarms of the last iteration
        self.tracker = None
        if ranks.main:
            self.tracker = Tracker(
                self.folder,
                tensorboard=config.tracking.tensorboard,
                wandb=config.tracking.wandb,
                config=config.model_dump(mode="json"),
                resume_iteration=None if not resumed else -1 if checkpoint is None else self.iteration,
            )
            self.alarms.look_at(self.folder)

    # --- what a kind of training says ------------------------------------------------------------------------------------

    def _prepare(self, weights: dict[str, torch.Tensor] | None) -> None:
        """Makes ready what is trained, with an engine, from these saved weights where there are any."""
        raise NotImplementedError

    def _own_state(self) -> dict[str, Any]:
        """What a checkpoint holds of this kind of training alone, as plain values and tensors."""
        return {}

    def _save_part(self, folder: Path) -> Any:
        """Writes each rank's own part into the folder of a checkpoint; returns what the engine wants in the state."""
        return self.engine.save(folder)

    def _restore_own(self, checkpoint: Path, state: dict[str, Any]) -> None:
        """Takes back what `_own_state` and `_save_part` wrote, but for the engine's."""

    def _evaluated_weights(self) -> AbstractContextManager:
        """Within it the model draws with the weights that are evaluated."""
        return self.ema.applied() if self.ema else nullcontext()

    def _export_to(self, folder: Path, weights: dict[str, torch.Tensor]) -> None:
        """Writes the result into a new folder; the main rank alone. ``weights``: averaged where there is an average."""
        raise NotImplementedError

    def train(self) -> Path:
        """Run to ``config.iterations`` and return the run's folder.

        Raises:
            Stopped: on SIGINT or SIGTERM, after a checkpoint was written.
            RunFailed: a reward failed, or a value was not finite; the last good checkpoint is kept.
        """
        raise NotImplementedError

    # --- around the iterations -------------------------------------------------------------------------------------------

    @contextmanager
    def _running(self):
        """Says in run.json that the run goes, and in the end how it went; listens to signals meanwhile."""
        self._started = time.perf_counter() - self.seconds
        if self.ranks.main:
            machine = describe_machine(self.device) | ({"ranks": self.ranks.world} if self.ranks.world > 1 else {})
            write_run(self.folder, status="running", machine=machine, batches=self.chosen)
        with self.stop.listening(), self._recorded():
            yield

    def _goes_on(self) -> bool:
        """Saves and evaluates where it is time, leaves if asked, and says whether another iteration follows."""
        last = self.iteration >= self.config.iterations
        self.observer.on_iteration(self.iteration + 1)
        if self.iteration % self.config.checkpoint.every == 0 or last:
            self._save()
        if self.iteration % self.config.eval.every == 0 or last:
            self._evaluate()
        if not last:
            self._leave_if_asked()
        return not last

    def _leave_if_asked(self) -> None:
        self.stop.leave_if_asked(self.iteration)

    def advantages(self, prompts: list[str], scores: Scores, errors: np.ndarray | None = None) -> torch.Tensor:
        """Turn scores of P prompts with K images each into float32 (P K,), or (P K S,) where each trained step has its own.

        ``errors``: DLPO's penalty of each, float64 (P K,), where there is one.
        """
        groups = -1, self.config.images_per_prompt
        terms = {label: torch.from_numpy(values).view(groups) for label, values in scores.normalized.items()}
        weights = {reward.key: self.config.dlpo.alpha * reward.weight for reward in self.config.rewards}
        if errors is not None:
            terms[PENALTY], weights[PENALTY] = torch.from_numpy(errors).view(groups), -self.config.dlpo.beta
        found = self.advantage(prompts, terms, weights)
        if self.advantage.learned:
            return found.float().flatten()
        return finish(found, self.config.advantage_clamp, self.config.normalize_advantages).flatten()

    # --- records -------------------------------------------------------------------------------------------------------

    def _image_metrics(self, trajectories: Trajectories, n: int) -> dict[str, float]:
        values = image_statistics(trajectories.images[: len(self.ranks.share(n))])
        return {name: float(self.ranks.gather_shares(of_share, n).mean()) for name, of_share in values.items()}

    def _log(self, metrics: dict[str, float]) -> None:
        if not self.ranks.main:
            return
        fired = self.alarms.of(metrics)
        metrics |= {f"alarm/{name}": float(name in fired) for name in ALARMS}
        self.tracker.log({"iteration": self.iteration, "images": self.images, "seconds": self.seconds, **metrics})
        print(self.pace.line(self.iteration, metrics), flush=True)
        for name, text in fired.items():
            if text != self._fired.get(name):  # when it begins; the metrics have it in every iteration
                print(f"  alarm {name}: {one_line(text)}", flush=True)
        self._fired = fired

    def _evaluate(self) -> None:
        """Scores the evaluation prompts, once per iteration, whatever was interrupted and resumed."""
        if "evaluation" in self.leave_out:
            return
        rows = self.folder / "eval.jsonl"
        if self.ranks.from_main(lambda: any(row["iteration"] == self.iteration for row in read_rows(rows))):
            return
        started = time.perf_counter()
        with self.observer.phase("evaluation"), self._evaluated_weights():
            result = evaluate(
                self.denoiser, self.config, self.eval_prompts, self.eval_rewards, self.ranks, leave=self._leave_if_asked
            )
        if not self.ranks.main:
            return
        shown = self.eval_prompts[: self.config.eval.grid]
        save_samples(self.folder / "samples", self.iteration, result, shown, self.eval_rewards, self.tracker)
        self.seconds = time.perf_counter() - self._started
        row = result.row() | {"iteration": self.iteration, "images": self.images, "seconds": self.seconds}
        self.pace.evaluation = time.perf_counter() - started
        self.tracker.log_eval(row | {"time/eval": self.pace.evaluation})
        self.alarms.look_at(self.folder)
        name = score_name(self.held_out)
        print(f"  {name} {result.mean:.3f} ± {result.stderr:.3f} after {self.images} images", flush=True)

    def _save(self) -> None:
        if "checkpoints" in self.leave_out:
            return
        state = {
            "iteration": self.iteration,
            "images": self.images,
            "seconds": self.seconds,
            "ema_updates": self.ema.updates if self.ema else 0,
            "prompt_tracker": self.advantage.state_dict(),  # of any advantage; the name is that of the first with a memory
            "rewards": self.rewards.state_dict(),
            "rng": torch.get_rng_state(),
            "rng_cuda": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
            **self._own_state(),
        }
        average = self.ema.average if self.ema else None
        save_checkpoint(
            self.folder / "checkpoints",
            self.iteration,
            self.engine.weights(),
            average,
            state,
            self.config.checkpoint.keep,
            self.ranks,
            self._save_part,
        )

    def _restore(self, checkpoint: Path, average: dict[str, torch.Tensor] | None, state: dict[str, Any]) -> str | None:
        """All but the weights. Returns what another engine or number of ranks has written and this one cannot take over."""
        if self.ema and average is not None:
            for name, value in average.items():
                self.ema.average[name].copy_(value)
            steps = state["iteration"] * self.config.updates_per_rollout
            self.ema.updates = state.get("ema_updates", steps)  # earlier versions did not count them
        self.iteration, self.images, self.seconds = state["iteration"], state["images"], state["seconds"]
        if state["prompt_tracker"] is not None:
            self.advantage.load_state_dict(state["prompt_tracker"])
        self.rewards.load_state_dict(state["rewards"])
        self._restore_own(checkpoint, state)
        torch.set_rng_state(state["rng"])
        if state["rng_cuda"] is not None and self.device.type == "cuda":
            torch.cuda.set_rng_state(state["rng_cuda"], self.device)
        return self.engine.load(checkpoint, state["engine"])

    def _export(self) -> None:
        """The result, in place of an earlier one."""
        if "export" in self.leave_out:
            return
        weights = self.ema.average if self.ema else self.engine.weights()
        if not self.ranks.main:
            return
        final, temporary = self.folder / "export", self.folder / ".export"
        shutil.rmtree(temporary, ignore_errors=True)
        self._export_to(temporary, weights)
        shutil.rmtree(final, ignore_errors=True)
        os.replace(temporary, final)

    @contextmanager
    def _recorded(self):
        """Writes how the run ended, its report, and a checkpoint where the state is whole."""
        status, message = "failed", None
        if self.ranks.main:
            self.ranks.on_failure = lambda reason: write_run(self.folder, status="failed", message=reason)
        try:
            yield
            status = "finished"
        except Stopped as stop:
            status, message = "stopped", str(stop)
            self._save()
            raise
        except RewardFailed as failure:
            message = str(failure)
            if failure.unscored is not None:
                save_unscored(failure, self.folder / "unscored")
            self._save()  # nothing has changed since the iteration before
            raise
        except BaseException as error:
            message = self.ranks.failure() or described(error)
            raise
        finally:
            self.rewards.close()
            self.eval_rewards.close()
            if self.ranks.main:
                self.tracker.close()
                write_run(self.folder, status=status, message=message)
                if "report" not in self.leave_out:
                    write_report(self.folder)
                release_run_dir(self.folder)
