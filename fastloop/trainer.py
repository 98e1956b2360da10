"""The training loop, top to bottom: prompts -> rollout -> rewards -> advantages -> updates -> tracking and checkpoints.

What differs from the paper (arXiv 2503.00897) and from DDPO, whose settings it follows, is in docs/method.md.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Collection
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from fastloop.advantages import ADVANTAGES, finish
from fastloop.alarms import ALARMS, Alarms
from fastloop.batches import Batches
from fastloop.checkpoints import load_checkpoint, load_weights, save_checkpoint
from fastloop.compiling import decide
from fastloop.config import Config
from fastloop.denoisers import ready_denoiser
from fastloop.engines.deepspeed import DeepSpeedEngine
from fastloop.engines.torch import TorchEngine
from fastloop.errors import RewardFailed, UserError, described, one_line
from fastloop.evaluation import evaluate
from fastloop.machine import describe_machine
from fastloop.metrics import image_statistics, reward_metrics
from fastloop.objectives import OBJECTIVES
from fastloop.observer import UNOBSERVED, Observer
from fastloop.optimizers import Ema, holding
from fastloop.penalty import PENALTY
from fastloop.preflight import compile_problem, confirm, preflight
from fastloop.prompts import PromptStream, prompt_facts, score_name
from fastloop.ranks import ALONE, Ranks
from fastloop.records import Pace, save_samples
from fastloop.report import write_report
from fastloop.rewards.calls import save_unscored
from fastloop.rewards.scoring import Scores
from fastloop.rollout import Trajectories, gather_scores, scored_rollout
from fastloop.rundir import claim_run_dir, release_run_dir, rewrite_config, write_run
from fastloop.stopping import Stopped, StopRequest
from fastloop.tracking import Tracker, read_rows
from fastloop.update import PolicyUpdate


class Trainer:
    """One run of one configuration in one folder. Everything that can be refused is refused before the model loads.

    On several ranks each has its own Trainer: it draws its share of the trajectories and trains on their rows; the rewards,
    and with them advantages and decisions, are the same on all. The main rank writes the folder.
    """

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
        self.rewards, self.eval_rewards = checked.rewards, checked.eval_rewards
        self.prompts, self.eval_prompts = PromptStream(checked.prompts, config.seed), checked.eval_prompts
        facts = prompt_facts(checked.prompts, checked.eval_prompts)
        self.held_out = facts["eval.prompts"]["trained_too"] == 0  # whether training sees none of the evaluation's prompts
        self.folder, checkpoint, resumed = ranks.from_main(lambda: claim_run_dir(config, resume, facts))
        if not (self.folder / "config.yaml").exists():
            raise UserError(f"output_dir: this rank's machine does not see {self.folder}: put it where all machines see it")
        self.rewards.start()
        self.eval_rewards.start()

        self.denoiser = ready_denoiser(config, self.device, trained=True)
        self.denoiser.observer = observer
        if checked.chosen:
            self.config, self.chosen = config, _ = confirm(checked, self.denoiser, ranks)
            ranks.from_main(lambda: rewrite_config(self.folder, config))
        self.parameters = self.denoiser.trainable()
        saved = load_checkpoint(checkpoint, bool(config.ema.decay)) if checkpoint else None
        if saved:
            load_weights(self.parameters, saved[0])
        self.batches = batches = Batches(config, self.steps_trained, ranks.world)
        if config.engine.name == "deepspeed":
            parts = self.denoiser.trained_parts
            self.engine = DeepSpeedEngine(parts, self.parameters, config, self.device, ranks, batches)
        else:
            self.engine = TorchEngine(self.parameters, config, self.device)
        self.denoiser.forward = self.engine.forward
        self.compiling = None  # what was decided of it, in a line
        if config.model.compile == "auto":
            problem = compile_problem(config, self.device)
            self.config, self.compiling = config, _ = decide(self.denoiser, config, batches, problem)
            ranks.from_main(lambda: rewrite_config(self.folder, config))
        elif config.model.compile:
            self.denoiser.compile()
        self.ema = None
        if config.ema.decay:
            with self.engine.gathered(list(self.parameters.values())):
                self.ema = Ema(self.parameters, config.ema.decay, self.engine.masters)
        self.advantage = ADVANTAGES[config.advantage]()
        steps = self.steps_trained
        self.update = PolicyUpdate(config, self.denoiser, self.engine, self.table, steps, ranks, self.ema, observer)
        self.iteration = 0  # finished so far
        self.images = 0  # sampled for training so far
        self.seconds = 0.0  # spent so far, over all resumes
        self.not_carried_over = self._restore(checkpoint, *saved[1:]) if saved else None
        self.stop, self.alarms, self.pace = StopRequest(ranks), Alarms(config), Pace(config)
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

    # --- the loop ------------------------------------------------------------------------------------------------------

    def train(self) -> Path:
        """Run to ``config.iterations`` and return the run's folder.

        Raises:
            Stopped: on SIGINT or SIGTERM, after a checkpoint was written.
            RunFailed: a reward failed, or a value was not finite; the last good checkpoint is kept.
        """
        config = self.config
        self._started = time.perf_counter() - self.seconds
        if self.ranks.main:
            machine = describe_machine(self.device) | ({"ranks": self.ranks.world} if self.ranks.world > 1 else {})
            write_run(self.folder, status="running", machine=machine, batches=self.chosen)
        with self.stop.listening(), self._recorded():
            while True:
                last = self.iteration >= config.iterations
                self.observer.on_iteration(self.iteration + 1)
                if self.iteration % config.checkpoint.every == 0 or last:
                    self._save()
                if self.iteration % config.eval.every == 0 or last:
                    self._evaluate()
                if last:
                    break
                self._leave_if_asked()
                started, started_cpu = time.perf_counter(), time.process_time()
                # 1. prompts, each K times; trajectory numbers key the noise, whatever the batch or the process
                prompts = self.prompts.draw(self.iteration * config.prompts_per_step, config.prompts_per_step)
                repeated = [prompt for prompt in prompts for _ in range(config.images_per_prompt)]
                ids = torch.arange(len(repeated), device=self.device) + self.iteration * len(repeated)
                # 2. rollout of this rank's share; each batch is scored while the next one is sampled
                trajectories = self.rollout(repeated, ids)
                sampled = time.perf_counter()
                with self.observer.phase("reward"):
                    scores = gather_scores(self.rewards, self.ranks, len(repeated))
                scored = time.perf_counter()
                # 3. rewards to advantages, one for each trajectory, or for each of its trained steps
                errors = self.denoising_errors(trajectories, len(repeated))
                advantages = self.advantages([prompt.text for prompt in prompts], scores, errors)
                # 4. the first replay must give ratio 1, then the updates
                metrics = {} if errors is None else {"policy/denoising_loss": float(errors.mean())}
                with self.observer.phase("update"):
                    if self.iteration == 0 and OBJECTIVES[config.objective].stored_steps:
                        metrics["policy/replay_max_dev"] = self.update.check_replay(trajectories)
                    metrics |= self.update(trajectories, advantages, self.iteration)
                updated = time.perf_counter()
                # 5. tracking; checkpoints and evaluation are at the top
                self.iteration += 1
                self.images += len(repeated)
                self.seconds = updated - self._started
                metrics |= reward_metrics(scores, repeated, config.images_per_prompt) | self.rewards.take_times()
                metrics |= self._image_metrics(trajectories, len(repeated)) | {
                    "advantage/abs_mean": advantages.abs().mean().item(),
                    "advantage/std": advantages.std(correction=0).item(),
                    "time/rollout": sampled - started,
                    "time/reward_wait": scored - sampled,
                    "time/update": updated - scored,
                    "time/iteration": updated - started,
                    "time/cpu": time.process_time() - started_cpu,
                }
                self._log(metrics)
                del trajectories  # not beside those of the next iteration
            self._export()
        return self.folder

    def rollout(self, prompts, ids: torch.Tensor) -> Trajectories:
        """Sample this rank's share of the trajectories of prompts and numbers; their rewards are then on their way."""
        config = self.config
        with self.observer.phase("rollout"), self._rollout_weights():
            return scored_rollout(
                self.denoiser,
                self.table,
                prompts,
                ids,
                self.rewards,
                self.ranks,
                title="  rollout",
                leave=self._leave_if_asked,  # nothing has changed yet
                sampling=config.sampling,
                seed=config.seed,
                batch=self.batches.rollout,
                fill=True,
                vae_batch=config.memory.vae_batch,
                keep="all" if OBJECTIVES[config.objective].stored_steps else "final",
                trajectories_on=config.memory.trajectories,
                backend=config.kernels,
            )

    def denoising_errors(self, trajectories: Trajectories, n: int) -> np.ndarray | None:
        """Return DLPO's penalty of all n trajectories, float64 (n,); ``None`` where there is none for what was drawn."""
        if not self.config.dlpo.beta or self.config.dlpo.data is not None:
            return None
        with self.observer.phase("penalty"), self._rollout_weights():
            own = self.update.penalty(trajectories)
        return self.ranks.gather_shares(own[: len(self.ranks.share(n))], n)

    def advantages(self, prompts: list[str], scores: Scores, errors: np.ndarray | None = None) -> torch.Tensor:
        """Turn scores of P prompts with K images each into float32 (P K,), or (P K S,) where each trained step has its own.

        ``errors``: as from `denoising_errors`.
        """
        groups = -1, self.config.images_per_prompt
        terms = {label: torch.from_numpy(values).view(groups) for label, values in scores.normalized.items()}
        weights = {reward.key: self.config.dlpo.alpha * reward.weight for reward in self.config.rewards}
        if errors is not None:
            terms[PENALTY], weights[PENALTY] = torch.from_numpy(errors).view(groups), -self.config.dlpo.beta
        found = self.advantage(prompts, terms, weights)
        return finish(found, self.config.advantage_clamp, self.config.normalize_advantages).flatten()

    def _rollout_weights(self):
        """Weights that are shared out over ranks are whole during a rollout, unless memory is too short for that."""
        return nullcontext() if self.config.engine.rollout_parameters == "layerwise" else self.engine.gathered()

    def _leave_if_asked(self) -> None:
        self.stop.leave_if_asked(self.iteration)

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
            print(f"  alarm {name}: {one_line(text)}", flush=True)

    def _evaluate(self) -> None:
        """Scores the evaluation prompts, once per iteration, whatever was interrupted and resumed."""
        if "evaluation" in self.leave_out:
            return
        rows = self.folder / "eval.jsonl"
        if self.ranks.from_main(lambda: any(row["iteration"] == self.iteration for row in read_rows(rows))):
            return
        started = time.perf_counter()
        with self.observer.phase("evaluation"), self._rollout_weights(), self.ema.applied() if self.ema else nullcontext():
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
            "skipped": self.update.skipped,
            "ema_updates": self.ema.updates if self.ema else 0,
            "prompt_tracker": self.advantage.state_dict(),  # of any advantage; the name is that of the first with a memory
            "rewards": self.rewards.state_dict(),
            "rng": torch.get_rng_state(),
            "rng_cuda": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
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
            self.engine.save,
        )

    def _restore(self, checkpoint: Path, average: dict[str, torch.Tensor] | None, state: dict[str, Any]) -> str | None:
        """All but the weights. Returns what another engine or number of ranks has written and this one cannot take over."""
        if self.ema and average is not None:
            for name, value in average.items():
                self.ema.average[name].copy_(value)
            steps = state["iteration"] * self.config.updates_per_rollout
            self.ema.updates = state.get("ema_updates", steps)  # earlier versions did not count them
        self.iteration, self.images, self.seconds = state["iteration"], state["images"], state["seconds"]
        self.update.skipped = state["skipped"]
        if state["prompt_tracker"] is not None:
            self.advantage.load_state_dict(state["prompt_tracker"])
        self.rewards.load_state_dict(state["rewards"])
        torch.set_rng_state(state["rng"])
        if state["rng_cuda"] is not None and self.device.type == "cuda":
            torch.cuda.set_rng_state(state["rng_cuda"], self.device)
        return self.engine.load(checkpoint, state["engine"])

    def _export(self) -> None:
        """The trained weights, averaged where there is an average, as stock diffusers loads them."""
        if "export" in self.leave_out:
            return
        weights = self.ema.average if self.ema else self.engine.weights()
        if not self.ranks.main:
            return
        final, temporary = self.folder / "export", self.folder / ".export"
        shutil.rmtree(temporary, ignore_errors=True)
        with holding(self.parameters, weights):
            self.denoiser.export(temporary, self.config.export.dtype)
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
