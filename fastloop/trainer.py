"""The training loop, top to bottom: prompts -> rollout -> rewards -> advantages -> updates -> tracking and checkpoints.

What it shares with other kinds of training is in `training_run.py`. What differs from the paper (arXiv 2503.00897) and from
DDPO, whose settings it follows, is in docs/method.md.
"""

from __future__ import annotations

import time
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastloop.checkpoints import load_weights
from fastloop.compiling import decide
from fastloop.engines.deepspeed import DeepSpeedEngine
from fastloop.engines.torch import TorchEngine
from fastloop.metrics import reward_metrics
from fastloop.objectives import OBJECTIVES
from fastloop.optimizers import Ema, holding
from fastloop.preflight import compile_problem
from fastloop.replay import Replay
from fastloop.rollout import Trajectories, gather_scores, scored_rollout
from fastloop.rundir import rewrite_config
from fastloop.training_run import TrainingRun
from fastloop.update import PolicyUpdate


class Trainer(TrainingRun):
    """Trains the network, or adapters on it, on single denoising steps or on noised final latents."""

    def _prepare(self, weights: dict[str, torch.Tensor] | None) -> None:
        config, ranks, batches = self.config, self.ranks, self.batches
        self.parameters = self.denoiser.trainable()
        if weights is not None:
            load_weights(self.parameters, weights)
        if config.engine.name == "deepspeed":
            parts = self.denoiser.trained_parts
            self.engine = DeepSpeedEngine(parts, self.parameters, config, self.device, ranks, batches)
        else:
            self.engine = TorchEngine(self.parameters, config, self.device)
        self.denoiser.forward = self.engine.forward
        if config.model.compile == "auto":
            problem = compile_problem(config, self.device)
            self.config, self.compiling = config, _ = decide(self.denoiser, config, batches, problem)
            ranks.from_main(lambda: rewrite_config(self.folder, config))
        elif config.model.compile:
            self.denoiser.compile()
        if config.ema.decay:
            with self.engine.gathered(list(self.parameters.values())):
                self.ema = Ema(self.parameters, config.ema.decay, self.engine.masters)
        steps = self.steps_trained
        self.advantage.prepare(config, self.denoiser, steps, ranks)
        kept = config.replay.rollouts
        self.replay = Replay(kept, ranks, config.images_per_rollout) if kept > 1 else None
        self.update = PolicyUpdate(config, self.denoiser, self.engine, self.table, steps, ranks, self.ema, self.observer)

    # --- the loop ------------------------------------------------------------------------------------------------------

    def train(self) -> Path:
        """Run to ``config.iterations`` and return the run's folder; raises as `TrainingRun.train`."""
        config = self.config
        with self._running():
            while self._goes_on():
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
                # 3. rewards to advantages, one for each trajectory, or for each of its trained steps; rollouts that are kept
                errors = self.denoising_errors(trajectories, len(repeated))
                advantages, trained = self.advantages([prompt.text for prompt in prompts], scores, errors), trajectories
                if self.replay:
                    trained, advantages = self.replay.add(trajectories, advantages, self.iteration)
                with self.observer.phase("baseline"):
                    advantages, metrics = self.advantage.of_rows(trained, advantages, self.iteration)
                # 4. the first replay must give ratio 1, then the updates
                metrics |= {} if errors is None else {"policy/denoising_loss": float(errors.mean())}
                with self.observer.phase("update"):
                    if self.iteration == 0 and OBJECTIVES[config.objective].stored_steps:
                        metrics["policy/replay_max_dev"] = self.update.check_replay(trajectories)
                    metrics |= self.update(trained, advantages, self.iteration)
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
                del trajectories, trained  # not beside those of the next iteration
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
        if not self.config.dlpo.denoises_drawn:
            return None
        with self.observer.phase("penalty"), self._rollout_weights():
            own = self.update.penalty(trajectories)
        return self.ranks.gather_shares(own[: len(self.ranks.share(n))], n)

    def _rollout_weights(self):
        """Weights that are shared out over ranks are whole during a rollout, unless memory is too short for that."""
        return nullcontext() if self.config.engine.rollout_parameters == "layerwise" else self.engine.gathered()

    @contextmanager
    def _evaluated_weights(self):
        with self._rollout_weights(), super()._evaluated_weights():
            yield

    # --- checkpoints and export ------------------------------------------------------------------------------------------

    def _own_state(self) -> dict[str, Any]:
        return {"skipped": self.update.skipped}

    def _save_part(self, folder: Path) -> Any:
        if self.replay:
            self.replay.save(folder, self.iteration)
        return super()._save_part(folder)

    def _restore_own(self, checkpoint: Path, state: dict[str, Any]) -> None:
        self.update.skipped = state["skipped"]
        if self.replay:
            self.replay.load(checkpoint, self.device, self.config.memory.trajectories == "host")

    def _export_to(self, folder: Path, weights: dict[str, torch.Tensor]) -> None:
        """The trained weights as stock diffusers loads them."""
        with holding(self.parameters, weights):
            self.denoiser.export(folder, self.config.export.dtype, self.config.export.format)
