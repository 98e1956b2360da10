"""Updates: the rows of a rollout become gradients, and gradients optimizer steps; the checks that the ratio starts at 1."""

from __future__ import annotations

import math
from contextlib import nullcontext

import numpy as np
import torch
from tqdm import tqdm

from fastloop import kernels
from fastloop.batches import Batches, Rows, micro_batches, shuffled, step_weights
from fastloop.config import Config
from fastloop.errors import RunFailed
from fastloop.forward import ForwardProcess
from fastloop.kernels.reference import STATISTICS, MicroBatch, PolicyTerms
from fastloop.losses import micro_batch_loss, update_sampling, weight_of_kl
from fastloop.objectives import OBJECTIVES, kl_factors
from fastloop.observer import UNOBSERVED, Observer
from fastloop.optimizers import Ema
from fastloop.penalty import DenoisingPenalty
from fastloop.ranks import Ranks
from fastloop.rollout import Texts, Trajectories, Transitions
from fastloop.transitions import TransitionTable

MAX_SKIPPED = 8  # non-finite updates in a row that loss scaling may skip while it finds its scale
DENOISING = ("denoising_loss_better", "denoising_loss_worse")  # sums of the rows with a positive and a negative advantage
MAXIMA = ("ratio_max_dev",)  # of a micro-batch's statistics; the others are sums
REMEDY = (
    "the last good checkpoint is kept. Start a new run with a lower optimizer.lr, model.dtype=fp32 or bf16, or where steps "
    "are trained last_steps.drop=2"
)


class PolicyUpdate:
    """Trains on a rollout: rows to gradients to optimizer steps, and the statistics of all of it.

    Attributes:
        skipped: non-finite updates in a row so far, which loss scaling left out.
        kl_weight: of the rollout that is trained on.
    """

    def __init__(
        self,
        config: Config,
        denoiser,
        engine,
        table: TransitionTable,
        steps: torch.Tensor,
        ranks: Ranks,
        ema: Ema | None = None,
        observer: Observer = UNOBSERVED,
    ) -> None:
        """``steps`` are those that are trained, as from `trained_steps`."""
        self.config, self.denoiser, self.engine, self.steps = config, denoiser, engine, steps
        self.ranks, self.ema, self.observer = ranks, ema, observer
        self.device = denoiser.device
        self.ops = kernels.backend(config.kernels, self.device)
        self.rows, self.batches = Rows.of(config.images_per_rollout, steps), Batches(config, steps, ranks.world)
        self.skipped, self.kl_weight = 0, config.kl.weight
        self.penalty = DenoisingPenalty(config, denoiser, table.schedule, self.ops) if config.dlpo.beta else None
        self.forward = None  # where rows are steps of the sampler
        if not OBJECTIVES[config.objective].stored_steps:
            self.forward = ForwardProcess(config, table.schedule, self.ops, self.device)
            return
        columns = {"a": table.a, "b": table.b, "sigma": table.sigma, "weight": step_weights(table, steps, config)}
        columns["kl"] = kl_factors(table, config.kl.form)
        self._columns = {name: column.float().to(self.device) for name, column in columns.items()}
        self._columns["timestep"] = table.timesteps.to(self.device)

    def __call__(self, trajectories: Trajectories, advantages: torch.Tensor, iteration: int) -> dict[str, float]:
        """Take ``updates_per_rollout`` optimizer steps over the shuffled rows of a rollout, or of all that a `Replay` keeps.

        A row whose advantage is 0 has no gradient, unless there is a KL, and is not run; an update of such rows alone takes no
        step. They still count in what an update averages over.

        Args:
            advantages: float32, of all ranks: (N,), one for each trajectory, or (R,), one for each row.
            iteration: finished so far; keys the order of the rows.

        Returns:
            The metrics ``policy/*``.

        Raises:
            RunFailed: the ratio does not start at 1, or a loss or gradient is not finite.
        """
        config, n = self.config, self.config.images_per_rollout
        all_rows = self.rows.of_rollouts(len(trajectories.prompts) // len(self.ranks.padded(n)))
        rng = np.random.default_rng([config.seed, iteration])
        lr = config.optimizer.lr_at(iteration, config.iterations)
        self.engine.set_lr(lr)
        updates = []
        for _ in range(config.passes_per_rollout):
            order = shuffled(rng, all_rows, config.timestep_fraction)
            updates += np.array_split(order, config.updates_per_rollout // config.passes_per_rollout)
        of_row = advantages.cpu()
        if len(of_row) != len(all_rows):
            of_row = of_row[all_rows.trajectory]
        self.kl_weight = weight_of_kl(config.kl, of_row, iteration)
        teaches = (of_row != 0).numpy() | (self.kl_weight > 0) | config.dlpo.gradient
        transitions = trajectories.transitions(self.steps)
        own = of_row[all_rows.own(self.ranks, n)].to(self.device)
        text = Texts(self.denoiser, trajectories.prompts, update_sampling(config))
        names = [
            *STATISTICS,
            "loss",
            *([] if self.forward is None else DENOISING),
            *(["kl_reference"] if self.kl_weight else []),
            *(["denoising_loss"] if config.dlpo.gradient else []),
        ]
        found, norms, ran = [], [], []  # of each update that took a step: statistics, gradient norm, rows
        total = sum(map(len, updates))
        skipped = total - sum(int(teaches[update].sum()) for update in updates)
        quiet = None if self.ranks.main else True  # None: only where there is a terminal
        with tqdm(total=total - skipped, desc="  update", leave=False, disable=quiet) as bar:
            for rows in updates:
                update = rows[teaches[rows]]
                if len(update) == 0:
                    continue
                batches = micro_batches(update, all_rows, self.ranks, n, self.batches.update)
                seen = self.add_gradients(batches, len(rows), transitions, own, text, bar)
                found.append(self._of_ranks(dict(zip(names, seen.cpu().double().numpy().T, strict=True))))
                ran.append(update)
                if len(ran) == 1 and all_rows.rollouts == 1:  # else some rows are of an older policy
                    self._check_first_ratio(found[0]["ratio_max_dev"])
                norms.append(self._step(found[-1]["loss"], iteration))
        metrics = {
            "policy/pairs_skipped": skipped,
            "policy/grad_norm": float(np.mean([norm for norm in norms if norm is not None] or [0.0])),
            "policy/lr": lr,
            "policy/loss": sum(of_update["loss"] for of_update in found) / total,
        }
        if not ran:
            return metrics
        if self.kl_weight:
            metrics["policy/kl_reference"] = sum(update["kl_reference"] for update in found) / sum(map(len, ran))
        if config.dlpo.gradient:
            metrics["policy/denoising_loss"] = sum(update["denoising_loss"] for update in found) / sum(map(len, ran))
        if self.forward is None:
            return metrics | _ratio_metrics(found, [len(rows) for rows in ran])
        return metrics | _denoising_metrics(found, of_row[np.concatenate(ran)])

    def add_gradients(
        self,
        batches: list[np.ndarray],
        rows: int,
        transitions: Transitions,
        advantages: torch.Tensor,
        text: Texts,
        bar: tqdm | None = None,
    ) -> torch.Tensor:
        """Add up the gradients of an update's micro-batches; nothing in here waits for the device.

        Args:
            batches: of rows of ``transitions``, as from `micro_batches`. rows: what the sum is divided by; those that are not
                run count too. advantages: float32 (R,), of the rows of ``transitions``.

        Returns:
            Of each micro-batch, float32 (micro-batches, S), on the device: ``STATISTICS``, then sums of the loss and of what
            else is logged.
        """
        seen = []
        with self.observer.phase("gradients"):
            for batch in batches:
                real = len(batch) > 0  # else any row, with weight 0, to keep in step with the other ranks
                chosen = torch.from_numpy(batch) if real else torch.tensor([0])
                terms, loss, logged = self.loss(transitions, advantages, chosen, text)
                with self.observer.phase("backward"):
                    self.engine.backward(loss.sum() * real / rows, last=batch is batches[-1])
                sums = torch.cat([terms.statistics, *(value.sum()[None] for value in (loss.detach(), *logged.values()))])
                seen.append(sums if real else torch.zeros_like(sums))
                if bar is not None:
                    bar.update(len(batch))
        return torch.stack(seen)

    def loss(
        self, transitions: Transitions, advantages: torch.Tensor, rows: torch.Tensor, text: Texts, full: int | None = None
    ) -> tuple[PolicyTerms, torch.Tensor, dict[str, torch.Tensor]]:
        """Compute `micro_batch_loss` of rows (int64 (B,), on the host) of ``transitions``.

        ``full``: rows of the network's call; ``None``: as in all calls of an update.
        """
        at = transitions.at(rows)
        before, after = transitions.latents(at)
        number, log_prob_old = transitions.ids[at.trajectory], transitions.log_prob[at.row]
        if self.forward:
            columns = self.forward.rows(after, number, at.step) | {"weight": torch.ones_like(log_prob_old)}
        else:
            columns = {name: column[at.step] for name, column in self._columns.items()} | {"x_t": before, "x_prev": after}
        batch = MicroBatch(**columns, log_prob_old=log_prob_old, advantage=advantages[at.row], trajectory=number, step=at.step)
        noised = None
        if self.config.dlpo.gradient:
            if self.config.dlpo.data is None:
                latents = transitions.final(at)
            else:
                places = at.on_host[:, 1].tolist()
                numbers = [transitions.numbers[k] for k in places]
                latents = self.penalty.pictures([text.prompts[k] for k in places], numbers)
            noised = self.penalty.rows(latents, number)
        full = full or self.batches.update
        given = (self.denoiser, self.ops, self.config, batch, *text.of(at))
        return micro_batch_loss(*given, full, noised, self.kl_weight)

    def check_replay(self, trajectories: Trajectories) -> float:
        """Replay the first rollout batch of each rank as it was sampled: every ratio must be 1. Returns max |ratio - 1|.

        With gradients on where an update's micro-batch is as large, so that what differs with them shows.

        Raises:
            RunFailed: a ratio is further from 1 than ``safety.max_ratio_dev``, or outputs are not finite.
        """
        full = self.batches.rollout
        n = min(full, len(trajectories.prompts))
        text = Texts(self.denoiser, trajectories.prompts[:n], self.config.sampling)
        transitions, worst = trajectories.transitions(self.steps), 0.0
        zeros = torch.zeros(len(transitions), device=self.device)
        gradients = nullcontext() if full <= self.config.memory.update_batch else torch.no_grad()
        with self.observer.phase("replay"), gradients:
            for step in sorted({0, len(self.steps) - 1}):
                rows = torch.arange(n) * len(self.steps) + step
                ratio = self.loss(transitions, zeros, rows, text, full=full)[0].ratio  # and nothing of the graph
                worst = max(worst, (ratio - 1).abs().nan_to_num(math.inf).max().item())
        worst = float(self.ranks.gather(np.array(worst)).max())
        bound = self.config.safety.max_ratio_dev
        if math.isinf(worst):
            raise RunFailed(f"the model's outputs are not finite in the first replay: {REMEDY}")
        if worst > bound:
            raise RunFailed(
                f"ratio check: replaying the first rollout batch gives |ratio - 1| = {worst:.1e}, over "
                f"safety.max_ratio_dev = {bound:.1e}. Likely causes: model.dtype, an attention "
                "backend that is not deterministic (model.attention), dropout, or compiled code that differs with gradients"
            )
        return worst

    def _of_ranks(self, seen: dict[str, np.ndarray]) -> dict[str, float]:
        """Statistics of an update over all micro-batches and ranks."""
        own = np.array([values.max() if name in MAXIMA else values.sum() for name, values in seen.items()])
        of_ranks = dict(zip(seen, self.ranks.gather(own).T, strict=True))
        return {name: float(values.max() if name in MAXIMA else values.sum()) for name, values in of_ranks.items()}

    def _check_first_ratio(self, deviation: float) -> None:
        """Before the first optimizer step of a rollout the policy is the old one: what differs from 1 is rounding."""
        objective = OBJECTIVES[self.config.objective]
        if objective.uses_ratio and not objective.uses_kl and deviation > self.config.clip_range:
            raise RunFailed(
                f"ratio check: before any update |ratio - 1| reaches {deviation:.1e}, over clip_range = "
                f"{self.config.clip_range:.1e}, so rounding alone clips. Likely causes: model.dtype, or update batches "
                "computed differently from rollout batches (set memory.update_batch = memory.rollout_batch)"
            )

    def _step(self, loss: float, iteration: int) -> float | None:
        """One optimizer step. Raises ``RunFailed`` where loss or gradients are not finite; the weights are then untouched."""
        if not math.isfinite(loss):
            raise RunFailed(f"the loss is not finite in iteration {iteration + 1}: {REMEDY}")
        with self.observer.phase("step"):
            norm = self.engine.step()
        self.skipped = self.skipped + 1 if norm is None else 0
        if self.skipped > (MAX_SKIPPED if self.engine.scales_loss else 0):
            raise RunFailed(f"the gradients are not finite in iteration {iteration + 1}: {REMEDY}")
        if norm is not None and self.ema is not None:
            with self.engine.gathered(list(self.engine.parameters.values())):
                self.ema.update()
        return norm


def _ratio_metrics(found: list[dict[str, float]], ran: list[int]) -> dict[str, float]:
    """Means over the rows that ran, of the updates that took a step."""
    # in the first update the policy is still the old one: whether the clip binds shows in the later ones
    later = slice(1, None) if len(ran) > 1 else slice(None)

    def mean(name: str, of: slice = slice(None)) -> float:
        return sum(update[name] for update in found[of]) / sum(ran[of])

    high, low = mean("clipped_high", later), mean("clipped_low", later)
    return {
        "policy/ratio_mean": mean("ratio"),
        "policy/ratio_max_dev": max(update["ratio_max_dev"] for update in found),
        "policy/ratio_first_dev": found[0]["ratio_max_dev"],
        "policy/clipfrac": high + low,
        "policy/clipfrac_high": high,
        "policy/clipfrac_low": low,
        "policy/approx_kl": mean("approx_kl"),
    }


def _denoising_metrics(found: list[dict[str, float]], advantages: torch.Tensor) -> dict[str, float]:
    """Means of the noise's squared error over the rows that ran, of images better and worse than their baseline.

    Args:
        advantages: float32, of these rows.
    """
    rows = {"better": int((advantages > 0).sum()), "worse": int((advantages < 0).sum())}
    sums = {name: sum(update[f"denoising_loss_{name}"] for update in found) for name in rows}
    return {f"policy/denoising_loss_{name}": sums[name] / n for name, n in rows.items() if n}
