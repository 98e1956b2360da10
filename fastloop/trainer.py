"""The training loop, top to bottom: prompts -> rollout -> rewards -> advantages -> updates -> tracking and checkpoints.

What differs from the paper (arXiv 2503.00897) and from DDPO, whose settings it follows, is in docs/method.md.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import time
from collections import deque
from contextlib import contextmanager, nullcontext
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from fastloop import kernels
from fastloop.advantages import ADVANTAGES, PromptTracker, finish
from fastloop.checkpoints import load_checkpoint, load_weights, save_checkpoint
from fastloop.config import Config
from fastloop.denoisers import load_denoiser
from fastloop.denoisers.base import upload
from fastloop.engines.deepspeed import DeepSpeedEngine
from fastloop.engines.torch import TorchEngine
from fastloop.errors import RewardFailed, RunFailed, UserError
from fastloop.evaluation import Evaluation, evaluate
from fastloop.kernels.reference import STATISTICS, transition_mean
from fastloop.machine import describe_machine
from fastloop.metrics import held_out_falling, image_statistics, reward_metrics
from fastloop.objectives import gaussian_kl
from fastloop.optimizers import Ema, holding
from fastloop.pairs import micro_batch_sizes, micro_batches, shuffled_pairs, step_weights
from fastloop.plan import check, confirm, largest_update
from fastloop.prompts import PromptStream, prompt_facts, score_name
from fastloop.ranks import ALONE, Ranks
from fastloop.report import write_report
from fastloop.rewards import save_unscored
from fastloop.rollout import Texts, Trajectories, gather_scores, scored_rollout
from fastloop.rundir import claim_run_dir, release_run_dir, rewrite_config, write_run
from fastloop.tracking import Tracker, before_after_grid, image_grid, read_rows

DEVIATION = STATISTICS.index("ratio_max_dev")  # a maximum; the other statistics are sums
ALARMS = ("group_std", "clipfrac", "entropy", "saturation", "held_out")
MAX_SKIPPED = 8  # non-finite updates in a row that loss scaling may skip while it finds its scale


class Stopped(Exception):
    """A signal asked the run to stop; the iteration under way is left out and done again on resume."""

    def __init__(self, signal_name: str, iteration: int) -> None:
        super().__init__(f"stopped by {signal_name} after iteration {iteration}")
        self.signal_name = signal_name


class Trainer:
    """One run of one configuration in one folder. Everything that can be refused is refused before the model loads.

    On several ranks each has its own Trainer: it draws its share of the trajectories and trains on their pairs; the rewards,
    and with them advantages and decisions, are the same on all. The main rank writes the folder.
    """

    def __init__(self, config: Config, resume: bool = False, ranks: Ranks = ALONE) -> None:
        """Raises ``UserError`` for anything in the configuration that does not fit the machine, the files or the model."""
        checked = check(config, ranks, resume)
        self.config, self.ranks, self.chosen = checked.config, ranks, None
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

        self.denoiser = load_denoiser(config.model, self.device)
        if config.memory.offload_frozen:
            self.denoiser.offload_frozen()
        self.denoiser.train_adapter(config.memory.gradient_checkpointing, seed=config.seed)
        kernels.fuse(self.denoiser.unet, config.kernels, self.device)
        if config.kl.weight:
            self.denoiser.keep_reference()
        if checked.chosen:
            self.config, self.chosen = config, _ = confirm(checked, self.denoiser, ranks)
            ranks.from_main(lambda: rewrite_config(self.folder, config))
        self.parameters = self.denoiser.trainable()
        weights, average, state = load_checkpoint(checkpoint, bool(config.ema.decay)) if checkpoint else (None, None, None)
        if weights is not None:
            load_weights(self.parameters, weights)
        if config.engine.name == "deepspeed":
            pairs = largest_update(config, self.steps_trained)
            parts = self.denoiser.trained_parts
            self.engine = DeepSpeedEngine(parts, self.parameters, config, self.device, ranks, pairs)
        else:
            self.engine = TorchEngine(self.denoiser.unet, self.parameters, config, self.device)
        self.denoiser.model = self.engine.model
        if config.model.compile:
            self.denoiser.compile(micro_batch_sizes(config, len(self.eval_prompts), self.steps_trained, ranks))
        self.ema = None
        if config.ema.decay:
            with self.engine.whole(list(self.parameters.values())):
                self.ema = Ema(self.parameters, config.ema.decay)
        self.prompt_tracker = PromptTracker() if config.advantage == "prompt_tracker" else None
        self.iteration = 0  # finished so far
        self.images = 0  # sampled for training so far
        self.seconds = 0.0  # spent so far, over all resumes
        self.skipped = 0
        self.not_carried_over = self._restore(checkpoint, average, state) if checkpoint else None
        self.tracker = None
        if ranks.main:
            self.tracker = Tracker(
                self.folder,
                tensorboard=config.tracking.tensorboard,
                wandb=config.tracking.wandb,
                config=config.model_dump(mode="json"),
                resume_iteration=None if not resumed else -1 if checkpoint is None else self.iteration,
            )
            self._look_for_hacking()
        self._stop_signal: int | None = None
        self._paces, self._eval_seconds = deque(maxlen=20), 0.0  # for the time left
        columns = (self.table.a, self.table.b, self.table.sigma, step_weights(self.table, self.steps_trained, config))
        self._columns = [column.float().to(self.device) for column in columns]
        self._timesteps = self.table.timesteps.to(self.device)

    # --- the loop ------------------------------------------------------------------------------------------------------

    def train(self) -> Path:
        """Runs to ``config.iterations`` and returns the run's folder.

        Raises:
            Stopped: on SIGINT or SIGTERM, after a checkpoint was written.
            RunFailed: a reward failed, or a value was not finite; the last good checkpoint is kept.
        """
        config = self.config
        self._started = time.perf_counter() - self.seconds
        if self.ranks.main:
            machine = describe_machine(self.device) | ({"ranks": self.ranks.world} if self.ranks.world > 1 else {})
            write_run(self.folder, status="running", machine=machine, batches=self.chosen)
        with self._signals(), self._recorded():
            while True:
                last = self.iteration >= config.iterations
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
                trajectories = self._rollout(repeated, ids)
                sampled = time.perf_counter()
                scores = gather_scores(self.rewards, self.ranks, len(repeated))
                scored = time.perf_counter()
                # 3. rewards (P, K) to advantages (N,)
                rewards = torch.from_numpy(scores.total).view(-1, config.images_per_prompt)
                advantages = self._advantages([p.text for p in prompts], rewards).flatten().to(self.device)
                # 4. the first replay must give ratio 1, then the updates
                metrics = {}
                if self.iteration == 0:
                    metrics["policy/replay_max_dev"] = self._check_ratio(trajectories)
                metrics |= self._update(trajectories, advantages)
                updated = time.perf_counter()
                # 5. tracking; checkpoints and evaluation are at the top
                self.iteration += 1
                self.images += len(repeated)
                self.seconds = updated - self._started
                metrics |= reward_metrics(rewards, scores, repeated) | self._image_metrics(trajectories, len(repeated))
                metrics |= self.rewards.take_times()
                metrics |= {
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

    def _rollout(self, prompts, ids: torch.Tensor) -> Trajectories:
        config = self.config
        with self._rollout_weights():
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
                batch=config.memory.rollout_batch,
                vae_batch=config.memory.vae_batch,
                trajectories_on=config.memory.trajectories,
                backend=config.kernels,
            )

    def _rollout_weights(self):
        """Weights that are shared out over ranks are whole during a rollout, unless memory is too short for that."""
        return nullcontext() if self.config.engine.rollout_parameters == "layerwise" else self.engine.whole()

    def _advantages(self, prompts: list[str], rewards: torch.Tensor) -> torch.Tensor:
        if self.prompt_tracker is not None:
            advantages = self.prompt_tracker(prompts, rewards)
        else:
            advantages = ADVANTAGES[self.config.advantage](rewards)
        return finish(advantages, self.config.advantage_clamp, self.config.normalize_advantages)

    def _update(self, trajectories: Trajectories, advantages: torch.Tensor) -> dict[str, float]:
        """``updates_per_rollout`` optimizer steps over shuffled (trajectory, timestep) pairs.

        A pair whose advantage is 0 has no gradient, unless there is a KL, and is not run; an update of such pairs alone takes
        no step. They still count in what an update averages over.
        """
        config = self.config
        rng = np.random.default_rng([config.seed, self.iteration])
        lr = config.optimizer.lr_at(self.iteration, config.iterations)
        self.engine.set_lr(lr)
        per_pass = config.updates_per_rollout // config.passes_per_rollout
        updates = []
        for _ in range(config.passes_per_rollout):
            pairs = shuffled_pairs(rng, len(advantages), self.steps_trained, config.timestep_fraction)
            updates += np.array_split(pairs, per_pass)
        n = len(advantages)
        teaches = (advantages != 0).cpu().numpy() | (config.kl.weight > 0)
        advantages = advantages[self.ranks.padded(n)]  # as the trajectories here
        text = Texts(self.denoiser, trajectories.prompts, config.sampling)
        norms, sums, deviations, ran = [], [], [], []  # of each update that took a step
        total = sum(map(len, updates))
        skipped = total - sum(int(teaches[update[:, 0]].sum()) for update in updates)
        quiet = None if self.ranks.main else True  # None: only where there is a terminal
        with tqdm(total=total - skipped, desc="  update", leave=False, disable=quiet) as bar:
            for whole in updates:
                update = whole[teaches[whole[:, 0]]]
                if len(update) == 0:
                    continue
                batches = micro_batches(update, self.ranks, n, config.memory.update_batch)
                seen = self._add_gradients(batches, len(whole), trajectories, advantages, text, bar)
                rows = seen.cpu().double().numpy()
                of_ranks = self.ranks.gather(np.append(rows.sum(0), rows[:, DEVIATION].max()))
                ran.append(len(update))
                sums.append(of_ranks[:, :-1].sum(0))
                deviations.append(float(of_ranks[:, -1].max()))
                if len(ran) == 1:
                    self._check_first_ratio(deviations[0])
                norms.append(self._step(sums[-1][len(STATISTICS)]))
        metrics = {
            "policy/pairs_skipped": skipped,
            "policy/grad_norm": float(np.mean([norm for norm in norms if norm is not None] or [0.0])),
            "policy/lr": lr,
            "policy/loss": sum(of_update[len(STATISTICS)] for of_update in sums) / total,
        }
        if not ran:
            return metrics
        # in the first update the policy is still the old one: whether the clip binds shows in the later ones
        later = slice(1, None) if len(ran) > 1 else slice(None)
        high, low = (np.sum(sums[later], 0) / sum(ran[later]))[:2].tolist()
        _, _, approx_kl, ratio, _, _, *kl = (np.sum(sums, 0) / sum(ran)).tolist()
        metrics |= {
            "policy/ratio_mean": ratio,
            "policy/ratio_max_dev": max(deviations),
            "policy/ratio_first_dev": deviations[0],
            "policy/clipfrac": high + low,
            "policy/clipfrac_high": high,
            "policy/clipfrac_low": low,
            "policy/approx_kl": approx_kl,
        }
        if config.kl.weight:
            metrics["policy/kl_reference"] = kl[0]
        return metrics

    def _add_gradients(self, batches, pairs: int, trajectories, advantages, text, bar) -> torch.Tensor:
        """Adds up the gradients of an update's micro-batches; nothing in here waits for the device.

        Args:
            pairs: what the sum is divided by; those that are not run count too.

        Returns:
            Sums over each micro-batch, float32 (micro-batches, S), on the device: ``STATISTICS``, the loss, the KL.
        """
        seen = []
        for batch in batches:
            real = len(batch) > 0  # else any pair, with weight 0, to keep in step with the other ranks
            at = torch.from_numpy(batch) if real else torch.tensor([[0, self.steps_trained[0]]])
            terms, loss, kl = self._loss(trajectories, advantages, at, text)
            self.engine.backward(loss.sum() * real / pairs, last=batch is batches[-1])
            sums = torch.cat([terms.statistics, *(value.sum()[None] for value in (loss.detach(), *kl))])
            seen.append(sums if real else torch.zeros_like(sums))
            bar.update(len(batch))
        return torch.stack(seen)

    def _loss(self, trajectories, advantages, at, text: Texts):
        """Of (trajectory, step) pairs, float32 (B,): policy terms, the whole loss, and in a list the KL where there is one.

        Args:
            at: int64 (B, 2), on the host.
        """
        config = self.config
        i, step = upload(at, self.device).unbind(1)
        x_t, x_prev = trajectories.pairs(at, i, step)
        a, b, sigma, weight = (column[step] for column in self._columns)
        outputs = self.denoiser.predict(x_t, self._timesteps[step], *text.of(at, i))
        terms = kernels.backend(config.kernels, self.device).policy_loss(
            *outputs,
            x_t,
            x_prev,
            a,
            b,
            sigma,
            config.sampling.guidance_scale,
            trajectories.log_probs[step, i],
            advantages[i],
            config.clip_range,
            config.objective,
            config.seed,
            trajectories.ids[i],
            step,
        )
        loss, kl = terms.loss, []
        if config.kl.weight:
            with torch.no_grad(), self.denoiser.reference():
                reference = self.denoiser.predict(x_t, self._timesteps[step], *text.of(at, i))
            means = (transition_mean(*o, x_t, a, b, config.sampling.guidance_scale) for o in (outputs, reference))
            distance = gaussian_kl(*means, sigma)
            loss, kl = loss + config.kl.weight * distance, [distance.detach()]
        return terms, weight * loss, kl

    def _step(self, loss: float) -> float | None:
        """One optimizer step. Raises ``RunFailed`` where loss or gradients are not finite; the weights are then untouched."""
        if not math.isfinite(loss):
            raise RunFailed(f"the loss is not finite in iteration {self.iteration + 1}: {self._nan_hint()}")
        norm = self.engine.step()
        self.skipped = self.skipped + 1 if norm is None else 0
        if self.skipped > (MAX_SKIPPED if self.engine.scales_loss else 0):
            raise RunFailed(f"the gradients are not finite in iteration {self.iteration + 1}: {self._nan_hint()}")
        if norm is not None and self.ema is not None:
            with self.engine.whole(list(self.parameters.values())):
                self.ema.update()
        return norm

    # --- trust ---------------------------------------------------------------------------------------------------------

    def _check_ratio(self, trajectories: Trajectories) -> float:
        """Replays the first rollout batch of each rank as it was sampled: every ratio must be 1.

        With gradients on where an update's micro-batch is as large, so that what differs with them shows.
        """
        n = min(self.config.memory.rollout_batch, len(trajectories.prompts))
        text = Texts(self.denoiser, trajectories.prompts[:n], self.config.sampling)
        zeros, worst = torch.zeros(len(trajectories.prompts), device=self.device), 0.0
        with nullcontext() if n <= self.config.memory.update_batch else torch.no_grad():
            for step in sorted({int(self.steps_trained[0]), int(self.steps_trained[-1])}):
                at = torch.stack([torch.arange(n), torch.full((n,), step)], 1)
                ratio = self._loss(trajectories, zeros, at, text)[0].ratio  # and nothing of the graph
                worst = max(worst, (ratio - 1).abs().nan_to_num(math.inf).max().item())
        worst = float(self.ranks.gather(np.array(worst)).max())
        if math.isinf(worst):
            raise RunFailed(f"the model's outputs are not finite in the first replay: {self._nan_hint()}")
        if worst > self.config.safety.max_ratio_dev:
            raise RunFailed(
                f"ratio check: replaying the first rollout batch gives |ratio - 1| = {worst:.1e}, over "
                f"safety.max_ratio_dev = {self.config.safety.max_ratio_dev:.1e}. Likely causes: model.dtype, an attention "
                "backend that is not deterministic (model.attention), dropout, or compiled code that differs with gradients"
            )
        return worst

    def _check_first_ratio(self, deviation: float) -> None:
        """Before the first optimizer step of a rollout the policy is the old one: what differs from 1 is rounding."""
        if self.config.objective in ("clipped", "clip_only") and deviation > self.config.clip_range:
            raise RunFailed(
                f"ratio check: before any update |ratio - 1| reaches {deviation:.1e}, over clip_range = "
                f"{self.config.clip_range:.1e}, so rounding alone clips. Likely causes: model.dtype, or update batches "
                "computed differently from rollout batches (set memory.update_batch = memory.rollout_batch)"
            )

    def _nan_hint(self) -> str:
        return (
            "the last good checkpoint is kept. Try a lower optimizer.lr, model.dtype=fp32 or bf16, last_steps.drop=2, "
            "then --resume"
        )

    def _alarms(self, metrics: dict[str, float]) -> dict[str, str]:
        """Signs of collapse or reward hacking, with what they mean."""
        safety, clipped = self.config.safety, self.config.objective != "score_function"
        grouped = self.config.images_per_prompt > 1
        found = {
            "group_std": (
                grouped and metrics["reward/group_std"] < safety.min_group_std,
                "images of one prompt get the same reward",
            ),
            "clipfrac": (
                clipped and metrics.get("policy/clipfrac", 0.0) > safety.max_clipfrac,
                "nearly every pair is clipped",
            ),
            "entropy": (metrics["image/entropy"] < safety.min_image_entropy, "pictures go flat"),
            "saturation": (metrics["image/saturation"] > safety.max_image_saturation, "pictures are burnt out"),
            "held_out": (
                bool(self._falling),
                f"held out, {', '.join(self._falling)} fell by more than its error while the training reward rose",
            ),
        }
        return {name: text for name, (fired, text) in found.items() if fired}

    def _look_for_hacking(self) -> None:
        """At the start, and after each evaluation: what `alarm/held_out` says until the next one."""
        errors, weights = self.config.safety.held_out_errors, {r.key: r.weight for r in self.config.rewards}
        rows, evals = (read_rows(self.folder / f"{name}.jsonl") for name in ("metrics", "eval"))
        self._falling = [] if errors is None else held_out_falling(rows, evals, weights, errors)

    # --- records -------------------------------------------------------------------------------------------------------

    def _image_metrics(self, trajectories: Trajectories, n: int) -> dict[str, float]:
        values = image_statistics(trajectories.images[: len(self.ranks.share(n))])
        return {name: float(self.ranks.whole(of_share, n).mean()) for name, of_share in values.items()}

    def _log(self, metrics: dict[str, float]) -> None:
        if not self.ranks.main:
            return
        alarms = self._alarms(metrics)
        metrics |= {f"alarm/{name}": float(name in alarms) for name in ALARMS}
        self.tracker.log({"iteration": self.iteration, "images": self.images, "seconds": self.seconds, **metrics})
        self._paces.append(metrics["time/iteration"])
        left = self.config.iterations - self.iteration
        seconds_left = left * float(np.mean(self._paces)) + math.ceil(left / self.config.eval.every) * self._eval_seconds
        if "policy/clipfrac" in metrics:
            policy = (
                f"clipped {metrics['policy/clipfrac']:.0%}  kl {metrics['policy/approx_kl']:.1e}  "
                f"grad {metrics['policy/grad_norm']:.2g}"
            )
        else:
            policy = "no update: every advantage is 0"
        print(
            f"[{self.iteration:>{len(str(self.config.iterations))}}/{self.config.iterations}] "
            f"reward {metrics['reward/mean']:.3f}  {policy}  "
            f"{metrics['time/iteration']:.1f} s  {duration(seconds_left)} left",
            flush=True,
        )
        for name, text in alarms.items():
            print(f"  alarm {name}: {text}", flush=True)

    def _evaluate(self) -> None:
        """Scores the held-out prompts, once per iteration, whatever was interrupted and resumed."""
        rows = self.folder / "eval.jsonl"
        if self.ranks.from_main(lambda: any(row["iteration"] == self.iteration for row in read_rows(rows))):
            return
        started = time.perf_counter()
        with self._rollout_weights(), self.ema.applied() if self.ema else nullcontext():
            result = evaluate(
                self.denoiser, self.config, self.eval_prompts, self.eval_rewards, self.ranks, leave=self._leave_if_asked
            )
        if not self.ranks.main:
            return
        self._save_samples(result)
        self.seconds = time.perf_counter() - self._started
        row = result.row() | {"iteration": self.iteration, "images": self.images, "seconds": self.seconds}
        self._eval_seconds = time.perf_counter() - started
        self.tracker.log_eval(row | {"time/eval": self._eval_seconds})
        self._look_for_hacking()
        print(f"  {score_name(self.held_out)} {result.mean:.3f} ± {result.stderr:.3f} after {self.images} images", flush=True)

    def _save_samples(self, result: Evaluation) -> None:
        """The first image of each grid prompt as its own file, all of them as a grid, and before/after."""
        folder, name = self.folder / "samples", f"{self.iteration:06d}"
        folder.mkdir(exist_ok=True)
        shown = range(min(self.config.eval.grid, len(self.eval_prompts)))
        rows = []
        for p in shown:
            file = f"{name}_{p:02d}.png"
            image, prompt, reward = result.images[p, 0], self.eval_prompts[p].text, result.scores[p, 0]
            Image.fromarray(image).save(folder / file)
            note = self.eval_rewards.explain(image, prompt)
            rows.append({"prompt": prompt, "reward": float(reward), "file": file, "note": note})
        (folder / f"{name}.json").write_text(json.dumps(rows, indent=1))
        captions = [f"{row['prompt']}\n{row['reward']:.2f}" for row in rows]
        grid = image_grid([result.images[p, 0] for p in shown], captions, columns=6)
        grid.save(folder / f"{name}.png")
        self.tracker.log_image("samples", self.iteration, grid)
        if self.iteration and (folder / "000000.json").exists():
            before = json.loads((folder / "000000.json").read_text())
            before_after_grid(
                [row["prompt"] for row in before],
                [[Image.open(folder / row["file"])] for row in before],
                [[Image.open(folder / row["file"])] for row in rows],
                [[row["reward"]] for row in before],
                [[row["reward"]] for row in rows],
                columns=3,
            ).save(folder / "before_after.png")

    def _save(self) -> None:
        state = {
            "iteration": self.iteration,
            "images": self.images,
            "seconds": self.seconds,
            "skipped": self.skipped,
            "prompt_tracker": self.prompt_tracker.state_dict() if self.prompt_tracker else None,
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

    def _restore(self, checkpoint: Path, average: dict[str, torch.Tensor] | None, state: dict) -> str | None:
        """All but the weights. Returns what another engine or number of ranks has written and this one cannot take over."""
        if self.ema and average is not None:
            for name, value in average.items():
                self.ema.average[name].copy_(value)
        self.iteration, self.images, self.seconds = state["iteration"], state["images"], state["seconds"]
        self.skipped = state["skipped"]
        if self.prompt_tracker:
            self.prompt_tracker.load_state_dict(state["prompt_tracker"])
        self.rewards.load_state_dict(state["rewards"])
        torch.set_rng_state(state["rng"])
        if state["rng_cuda"] is not None and self.device.type == "cuda":
            torch.cuda.set_rng_state(state["rng_cuda"], self.device)
        return self.engine.load(checkpoint, state["engine"])

    def _export(self) -> None:
        """The trained weights, averaged where there is an average, as stock diffusers loads them."""
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
            own = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
            message = self.ranks.failure() or own
            raise
        finally:
            self.rewards.close()
            self.eval_rewards.close()
            if self.ranks.main:
                self.tracker.close()
                write_run(self.folder, status=status, message=message)
                write_report(self.folder)
                release_run_dir(self.folder)

    def _leave_if_asked(self) -> None:
        """Called only where the state is that of ``iteration`` finished iterations, and by all ranks at the same place."""
        if number := self.ranks.highest(self._stop_signal or 0):
            raise Stopped(signal.Signals(number).name, self.iteration)

    @contextmanager
    def _signals(self):
        """The first SIGINT or SIGTERM asks for a clean stop; a second SIGINT ends at once."""

        def ask(number, frame):
            if self._stop_signal is not None and number == signal.SIGINT:
                raise KeyboardInterrupt
            self._stop_signal = number
            if self.ranks.main:
                print(f"\n{signal.Signals(number).name}: saving and leaving; press Ctrl-C again to leave at once", flush=True)

        before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def duration(seconds: float) -> str:
    """A length of time for people: 45 s, 3 min 20 s, 2 h 05 min."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 1:
        return f"{rest} s"
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
