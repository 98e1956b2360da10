"""The arithmetic of an iteration: which steps are trained, how many rows an update covers, in which order and micro-batches.

Plan, memory estimate, engines and trainer all take these numbers from here. A *row* is one denoising transition of a rollout
(see `Transitions`), or its final latents at one noise level, which takes the place of a step. The rows of a trajectory stand
together, in the order of its steps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from fastloop.config import Config
from fastloop.errors import UserError
from fastloop.objectives import OBJECTIVES
from fastloop.ranks import Ranks
from fastloop.transitions import TransitionTable

# What a call of the network costs beside its rows, in rows: of the bundled model on a CPU, from the batches of 4, 16 and 32 in
# bench/results/throughput_cpu.md.
CALL_ROWS = 6
ONE_SHAPE_MAY_COST = 1 / 16  # in float32, where rows of another shape differ by 2e-6 at most


def trained_steps(table: TransitionTable, config: Config) -> torch.Tensor:
    """Return the indices (int64) of the steps that updates draw from: those with noise, less the last ``last_steps.drop``.

    For objectives of final latents those of the noise levels; one where the initial noise is trained.

    Raises:
        UserError: no step is left, fewer rows than updates, or noise levels that the model does not know.
    """
    if config.trains_noise:
        steps = torch.zeros(1, dtype=torch.int64)  # a picture is one decision, its initial noise
    elif OBJECTIVES[config.objective].stored_steps:
        steps = torch.nonzero(table.trainable)[:, 0]
        steps = steps[: len(steps) - config.last_steps.drop]
    else:
        steps, last, known = torch.arange(config.forward.levels), config.forward.window[1], table.schedule.last
        if last > known:
            raise UserError(f"forward.window: ends at {last}, the model's timesteps at {known}: lower it")
    if len(steps) == 0:
        remedy = "raise it or lower last_steps.drop"
        remedy += "" if config.sampling.noise_steps is None else ", or widen sampling.noise_steps"
        raise UserError(f"sampling.steps: none of {len(table)} steps can be trained: {remedy}")
    pairs = config.passes_per_rollout * Batches(config, steps).rows // config.replay.rollouts  # of the first, which is alone
    if config.updates_per_rollout > pairs:
        raise UserError(
            f"updates_per_rollout: {config.updates_per_rollout} updates, but a rollout has only {pairs} (trajectory, "
            "timestep) pairs: use fewer"
        )
    return steps


def kept_steps(steps: int, fraction: float) -> int:
    """Return how many of so many trained steps a pass takes of each trajectory: this fraction of them, at least one."""
    return max(1, round(fraction * steps))


def step_weights(table: TransitionTable, steps: torch.Tensor, config: Config) -> torch.Tensor:
    """Return the factor of the loss of each step, float64 (T,): ``last_steps.weight`` on the last trained ones, else 1."""
    weights = torch.ones(len(table), dtype=torch.float64)
    weights[steps[-config.last_steps.count :]] = config.last_steps.weight
    return weights


@dataclass(frozen=True)
class Batches:
    """The sizes of an iteration on one of ``world`` ranks; of the largest share where shares differ.

    Args:
        steps: int64 (S,), as from `trained_steps`.
    """

    config: Config
    steps: torch.Tensor
    world: int = 1

    @property
    def kept(self) -> int:
        """Steps of each trajectory that a pass takes."""
        return kept_steps(len(self.steps), self.config.timestep_fraction)

    @property
    def trajectories(self) -> int:
        """Trajectories that are trained on, on all ranks: those of as many rollouts as are kept."""
        return self.config.images_per_rollout * self.config.replay.rollouts

    @property
    def rows(self) -> int:
        """Of one pass over the rollouts that are kept, on all ranks."""
        return self.trajectories * self.kept

    @property
    def updates_per_pass(self) -> int:
        """Optimizer steps of one pass over the rollout."""
        return self.config.updates_per_rollout // self.config.passes_per_rollout

    @property
    def update_rows(self) -> list[int]:
        """Rows of each update of a pass, on all ranks, the largest first."""
        even, more = divmod(self.rows, self.updates_per_pass)
        return [even + (i < more) for i in range(self.updates_per_pass)]

    @property
    def largest_update(self) -> int:
        """Rows of the largest update, on all ranks."""
        return self.update_rows[0]

    @property
    def rows_of_rank(self) -> int:
        """Rows of the largest update on one rank, at most: `shuffled` has all trajectories once, then all once again."""
        n, share, start, most = self.trajectories, self.share * self.config.replay.rollouts, 0, 0
        for size in self.update_rows:
            before = min(size, -start % n)  # of trajectories that another update has begun with
            whole, after = divmod(size - before, n)
            most = max(most, whole * share + min(before, share) + min(after, share))
            start += size
        return most

    @property
    def share(self) -> int:
        """Trajectories of a rollout on one rank."""
        return -(-self.config.images_per_rollout // self.world)

    @property
    def rollout(self) -> int:
        """Rows of every call of the network in a rollout: fewer trajectories are filled up with copies."""
        return self._shapes[0]

    @property
    def update(self) -> int:
        """Rows of every call of the network in an update: smaller micro-batches are filled up with copies."""
        return self._shapes[1]

    @property
    def vae(self) -> int:
        """Pictures in a micro-batch of the VAE."""
        return min(self.config.memory.vae_batch, self.rollout, self.share)

    @property
    def micro_batches(self) -> int:
        """Micro-batches of the largest update."""
        return -(-self.rows_of_rank // self.update)

    @cached_property
    def _shapes(self) -> tuple[int, int]:
        """Of rollouts and of updates: what is configured at most, evened out, so that few rows are filled up.

        A row's bits depend on the rows of its call. Where both batches are configured the same, both get one shape, so that
        ratios start at exactly 1: in half precision always, in float32 where it costs little.
        """
        memory = self.config.memory
        if self.config.trains_noise:  # updates do not call the network
            return evened(self.share, memory.rollout_batch), self.largest_update
        own = evened(self.share, memory.rollout_batch), evened(self.rows_of_rank, memory.update_batch)
        if memory.rollout_batch != memory.update_batch:
            return own
        sizes = range(min(memory.update_batch, max(own)), 0, -1)
        one = min(((size, size) for size in sizes), key=self._work)
        allowed = self._work(own) * (1 + ONE_SHAPE_MAY_COST)
        return one if self.config.model.dtype != "fp32" or self._work(one) <= allowed else own

    def _work(self, shapes: tuple[int, int]) -> int:
        """What an iteration costs on one rank, in rows of a forward; a backward costs two."""
        rollout, update = (size + CALL_ROWS for size in shapes)
        calls = -(-self.share // shapes[0]), -(-self.rows_of_rank // shapes[1])
        return self.config.sampling.steps * calls[0] * rollout + 3 * self.config.updates_per_rollout * calls[1] * update


def evaluation_batch(config: Config, denoiser, most: int) -> int:
    """Return the trajectories per call of the network in evaluations, where rollouts may have so many at most.

    As many, but fewer where only evaluations are guided or their pictures are larger: half, or by the latents' size.
    """
    training, own = (
        of.branches * math.prod(denoiser.latent_shape(of.height, of.width)) for of in (config.sampling, config.eval_sampling)
    )
    return min(most, max(1, most * training // own))


def evened(rows: int, most: int) -> int:
    """Return the size of the fewest batches of at most ``most`` rows, as even as they can be."""
    return -(-rows // -(-rows // most))


@dataclass(frozen=True, eq=False)
class Rows:
    """The rows of a rollout on all ranks, int64 (R,) each: the trajectory, counted over all ranks, and the sampler's step.

    Of several rollouts that are kept the rows of each stand together; ``rollouts`` is their number.
    """

    trajectory: np.ndarray
    step: np.ndarray
    rollouts: int = 1

    @classmethod
    def of(cls, trajectories: int, steps: torch.Tensor) -> Rows:
        """Pair every trajectory with every step (int64 (S,))."""
        return cls(np.repeat(np.arange(trajectories), len(steps)), np.tile(steps.numpy(), trajectories))

    def of_rollouts(self, rollouts: int) -> Rows:
        """Return the rows of so many rollouts like this one."""
        if rollouts == 1:
            return self
        n, first = int(self.trajectory.max()) + 1, np.arange(rollouts)[:, None]
        return Rows((self.trajectory + n * first).ravel(), np.tile(self.step, rollouts), rollouts)

    def own(self, ranks: Ranks, trajectories: int) -> np.ndarray:
        """Return the rows, int64, of the trajectories that a rank drew, in their order; of rollouts of so many trajectories.

        With those that it drew twice to keep in step with the other ranks.
        """
        first, drawn = np.arange(self.rollouts)[:, None] * trajectories, np.array(ranks.padded(trajectories))
        begins, ends = (np.searchsorted(self.trajectory, (first + drawn).ravel(), side=side) for side in ("left", "right"))
        return np.concatenate([np.arange(*of_one) for of_one in zip(begins, ends, strict=True)])

    def __len__(self) -> int:
        return len(self.step)


def shuffled(rng: np.random.Generator, rows: Rows, fraction: float) -> np.ndarray:
    """Draw a pass over the rows of a rollout: int64 (M,), of each trajectory a fraction of its rows, at least one.

    Each trajectory has its own order of its rows. The k-th rows of all trajectories stand together, the trajectories shuffled,
    so that every stretch of rows covers trajectories and groups as evenly as can be.
    """
    counts = np.bincount(rows.trajectory)
    orders = [
        start + rng.permutation(count)[: kept_steps(count, fraction)]
        for start, count in zip(np.cumsum(counts) - counts, counts, strict=True)
    ]
    columns = []
    for k in range(max(map(len, orders))):
        column = np.array([order[k] for order in orders if len(order) > k])
        columns.append(column[rng.permutation(len(column))])
    return np.concatenate(columns)


def micro_batches(update: np.ndarray, rows: Rows, ranks: Ranks, trajectories: int, size: int) -> list[np.ndarray]:
    """Split this rank's rows of an update, at most ``size`` at a time, numbered within those of its share of the trajectories.

    Args:
        update: int64 (M,), of rows. trajectories: of a rollout.

    Returns:
        int64 (m,) each, as many on every rank: the last may be empty where a rank has fewer rows.
    """
    rollout, within = np.divmod(rows.trajectory[update], trajectories)
    owner = np.searchsorted(ranks.bounds(trajectories), within, side="right") - 1
    rounds = -(-np.bincount(owner).max() // size)
    mine = owner == ranks.rank
    elsewhere = (len(rows) - len(rows.own(ranks, trajectories))) // rows.rollouts  # rows of a rollout
    own = update[mine] - rollout[mine] * elsewhere - np.searchsorted(rows.trajectory, ranks.share(trajectories).start)
    return [own[k * size : (k + 1) * size] for k in range(rounds)]
