"""The loop of `algorithm: noise_ppo`: prompts -> rollout -> rewards -> advantages -> updates of a policy over x_T -> tracking.

The network stays as it is and sampling is deterministic, so that a picture is one decision, its initial noise. What it shares
with the other kind of training is in `training_run.py`; the policy and its loss are in `noise_policy.py`.
"""

from __future__ import annotations

import math
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from fastloop import kernels
from fastloop.checkpoints import load_weights
from fastloop.engines.torch import TorchEngine
from fastloop.errors import RunFailed
from fastloop.metrics import reward_metrics
from fastloop.noise_policy import log_prob, noise_terms
from fastloop.optimizers import Ema
from fastloop.rollout import Trajectories, gather_scores, scored_rollout
from fastloop.training_run import TrainingRun

FILE = "noise_policy.safetensors"
REMEDY = "the last good checkpoint is kept. Start a new run with a lower optimizer.lr or a smaller clip_range"


class NoiseTrainer(TrainingRun):
    """Trains a `NoisePolicy` over the initial noise by one-step PPO; the model itself is never differentiated.

    Initial noise follows from the number of its trajectory, so that every rank can draw that of all trajectories again and
    compute the whole of each update: they stay alike without exchanging anything but the rewards.
    """

    def _prepare(self, weights: dict[str, torch.Tensor] | None) -> None:
        config = self.config
        self.policy, self.parameters = self.denoiser.noise_policy, self.denoiser.trainable()
        if weights is not None:
            load_weights(self.parameters, weights)
        in_float32 = config.model.model_copy(update={"dtype": "fp32"})  # the policy is, whatever the model computes in
        self.engine = TorchEngine(self.parameters, config.model_copy(update={"model": in_float32}), self.device)
        if config.model.compile:
            self.denoiser.compile()
        if config.ema.decay:
            self.ema = Ema(self.parameters, config.ema.decay)
        self.ops = kernels.backend(config.kernels, self.device)

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
                # 3. rewards to advantages, one for each initial noise
                advantages = self.advantages([prompt.text for prompt in prompts], scores).to(self.device)
                # 4. updates of the policy alone
                with self.observer.phase("update"):
                    metrics = self.update([prompt.text for prompt in repeated], ids, advantages)
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
            self._export()
        return self.folder

    def rollout(self, prompts, ids: torch.Tensor) -> Trajectories:
        """Draw this rank's share of the pictures of prompts and numbers; their rewards are then on their way."""
        config = self.config
        with self.observer.phase("rollout"):
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
                keep="none",
                backend=config.kernels,
            )

    def update(self, prompts: list[str], ids: torch.Tensor, advantages: torch.Tensor) -> dict[str, float]:
        """Take ``updates_per_rollout`` optimizer steps over the shuffled initial noises of a rollout, all on every rank.

        Args:
            prompts, ids: of all N trajectories. advantages: float32 (N,), on the device.

        Returns:
            The metrics ``policy/*``.

        Raises:
            RunFailed: a loss or gradient is not finite.
        """
        config, rng = self.config, np.random.default_rng([self.config.seed, self.iteration])
        lr = config.optimizer.lr_at(self.iteration, config.iterations)
        self.engine.set_lr(lr)
        features = self.denoiser.features(prompts)
        shape = self.denoiser.latent_shape(config.sampling.height, config.sampling.width)
        noise = self.ops.initial_noise(config.seed, ids, shape)
        with torch.no_grad():
            latents = self.policy.sample(noise, features)  # once more, as in the rollout
            old = log_prob(latents, *self.policy(features, shape[1:]))
        found, norms, clipped = [], [], []
        for _ in range(config.passes_per_rollout):
            order = rng.permutation(len(prompts))
            for rows in np.array_split(order, config.updates_per_rollout // config.passes_per_rollout):
                own = torch.from_numpy(rows).to(self.device)
                terms = noise_terms(
                    latents[own],
                    *self.policy(features[own], shape[1:]),
                    old[own],
                    advantages[own],
                    config.objective,
                    config.clip_range,
                    config.kl.weight,
                )
                norms.append(self._step(terms.loss.mean()))
                found.append(terms)
                clipped.append(torch.stack([terms.ratio > 1 + config.clip_range, terms.ratio < 1 - config.clip_range]))
        ratio = torch.cat([terms.ratio for terms in found])
        # in the first update the policy is still the old one: whether the clip binds shows in the later ones
        high, low = torch.cat(clipped[1:] or clipped, 1).double().mean(1).tolist()
        later = torch.cat([terms.ratio for terms in found[1:] or found])
        with torch.no_grad():
            scale = self.policy(features, shape[1:])[1].exp().mean().item()
        return {
            "policy/loss": torch.cat([terms.loss for terms in found]).mean().item(),
            "policy/lr": lr,
            "policy/grad_norm": float(np.mean(norms)),
            "policy/ratio_mean": ratio.mean().item(),
            "policy/ratio_max_dev": (ratio - 1).abs().max().item(),
            "policy/ratio_first_dev": (found[0].ratio - 1).abs().max().item(),
            "policy/clipfrac": high + low,
            "policy/clipfrac_high": high,
            "policy/clipfrac_low": low,
            "policy/approx_kl": (later.log().square() / 2).mean().item(),
            "policy/kl_reference": torch.cat([terms.kl for terms in found]).mean().item(),
            "policy/noise_scale": scale,
        }

    def _step(self, loss: torch.Tensor) -> float:
        """One optimizer step. Raises ``RunFailed`` where loss or gradients are not finite; the weights are then untouched."""
        if not math.isfinite(loss.item()):
            raise RunFailed(f"the loss is not finite in iteration {self.iteration + 1}: {REMEDY}")
        self.engine.backward(loss, last=True)
        norm = self.engine.step()
        if norm is None:
            raise RunFailed(f"the gradients are not finite in iteration {self.iteration + 1}: {REMEDY}")
        if self.ema:
            self.ema.update()
        return norm

    # --- export ----------------------------------------------------------------------------------------------------------

    def _export_to(self, folder: Path, weights: dict[str, torch.Tensor]) -> None:
        """The policy in one file, whose metadata says how to build it and what of a prompt it takes."""
        folder.mkdir()
        facts = {
            "channels": str(self.policy.channels),
            "grid": str(self.policy.grid),
            "features": "pooled" if self.denoiser.pools_texts else "mean of tokens",
        }
        tensors = {name: value.detach().cpu().contiguous() for name, value in weights.items()}
        save_file(tensors, folder / FILE, facts)
