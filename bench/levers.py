"""Levers of the policy gradient that are tried before any of them becomes a key: what a recipe of bench/time_to_score.py asks
for by `lever=NAME[:ARGUMENTS]`, and what it puts into a run of fastloop.

    steps:FIRST:LAST     only these steps are trained, counted from 0 (`steps:N`: that one); of those that last_steps leaves
    weights:equal        the loss of a step times sigma / |b|, so that all have gradients of one size (PCPO)
    weights:noise        the loss of a step times sigma (TempFlow-GRPO); both are 1 on average
    james_stein          a baseline between leave-one-out and the other prompts' mean
    best_and_worst       only the best and the worst of a prompt are trained. Changes the objective
    control[:BETA]       leave-one-out less that of the reward of x_0 as predicted before the step; BETA is fitted if left out
    tree:STEPxN[:...]    before step STEP a state has N children; advantages among siblings
    redraw:TIMES[:MOST]  prompts whose images all have the same reward make room for others, at most so often. With MOST those
                         too whose rewards lie no further apart than that, which changes the objective
    redraw_same:TIMES[:MOST]  images of the same prompt instead. Changes the objective: hard prompts count more
    by_spread[:SHARE]    prompts are drawn by the spread that their category's rewards had lately, SHARE of them evenly (0.25)
    ratio:trajectory     one clipped ratio for the trained steps of a trajectory
    ratio:total          clip_range in units of the latent's whole log-prob, not of its mean
    ratio:trajectory_total

Chosen or weighted steps are a choice of the gradient's parts: each keeps its direction, their sum does not. The others have
the gradient of LOOP on average unless they say so (`redraw`: times one factor). A lever given twice counts as given last.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch
from forward_equivalents import rows_of_iteration
from lever_baselines import ControlVariate, best_and_worst, james_stein, predicted_x0
from lever_prompts import BySpread, hand_over, redrawn, total
from lever_ratio import RATIOS, whole_trajectories
from lever_tree import Tree, TreeAdvantage, grow

from fastloop import preflight, update
from fastloop.advantages import ADVANTAGES, OfReward
from fastloop.batches import Batches, evened, trained_steps
from fastloop.config import Config
from fastloop.errors import UserError
from fastloop.objectives import OBJECTIVES
from fastloop.rollout import Texts, sampler_table
from fastloop.trainer import Trainer
from fastloop.transitions import TransitionTable


class Lever:
    """One lever of a recipe. This one does nothing.

    Attributes:
        settings: KEY=VALUE that it brings. text: as it was given, for messages. of_steps: whether it is of the sampler's
            steps, and so has no meaning where noise levels are trained.
    """

    settings: tuple[str, ...] = ()
    text = ""
    of_steps = False

    def __init__(self, *arguments: str) -> None:
        """Raises ``ValueError`` for arguments that are none."""
        if arguments:
            raise ValueError("it has no arguments")

    def check(self, config: Config) -> None:
        """Raise ``ValueError`` for a configuration that it does not go with, with the remedy."""

    def steps(self, table: TransitionTable, steps: torch.Tensor, config: Config) -> torch.Tensor:
        """Return which of the steps are trained; none where nothing is left."""
        return steps

    def plan(self, planned: dict[str, int], config: Config, table: TransitionTable, steps: torch.Tensor) -> dict[str, int]:
        """Return what an iteration takes with it: rows sampled and trained, pictures."""
        return planned

    def patches(self) -> list[tuple[ModuleType, str, Any]]:
        """Return what stands in for what in fastloop's modules while a run is made and trained."""
        return []

    def attach(self, trainer: Trainer) -> None:
        """Put itself into a run."""


class Steps(Lever):
    of_steps = True

    def __init__(self, first: str, last: str | None = None) -> None:
        self.first, self.last = int(first), int(first if last is None else last)

    def steps(self, table, steps, config):
        return steps[(steps >= self.first) & (steps <= self.last)]


class Weights(Lever):
    of_steps = True

    def __init__(self, kind: str) -> None:
        self.kind = {"equal": "equal", "noise": "noise"}[kind]

    def attach(self, trainer) -> None:
        _weigh(trainer, step_factors(self.kind, trainer.table, trainer.steps_trained))


def step_factors(kind: str, table: TransitionTable, steps: torch.Tensor) -> torch.Tensor:
    """Return the factor of each step's loss, float64 (T,), with mean 1 over the trained ones."""
    factors = table.sigma / table.b.abs() if kind == "equal" else table.sigma.clone()
    return factors / factors[steps].mean()


class JamesStein(Lever):
    settings = ("advantage=james_stein",)


class BestAndWorst(Lever):
    settings = ("advantage=best_and_worst",)

    def plan(self, planned, config, table, steps):
        return {**planned, "trained": round(planned["trained"] * 2 / config.images_per_prompt)}


class Control(Lever):
    settings, of_steps = ("advantage=control_variate",), True

    def __init__(self, beta: str | None = None) -> None:
        self.beta = None if beta is None else float(beta)

    def plan(self, planned, config, table, steps):
        return {**planned, "images": planned["images"] * (1 + len(steps))}

    def attach(self, trainer) -> None:
        trainer.advantage.beta, inner, config = self.beta, trainer.rollout, trainer.config

        def rollout(prompts, ids):
            trajectories, terms = inner(prompts, ids), trainer.rewards.collect()
            for step in trainer.steps_trained.tolist():
                latents = predicted_x0(trajectories, trainer.table, step, config.seed)
                trainer.rewards.submit(trainer.denoiser.decode(latents, config.memory.vae_batch), prompts)
            predicted = torch.from_numpy(total(trainer, trainer.rewards.collect()))
            trainer.advantage.predicted = predicted.view(-1, len(prompts)).T
            hand_over(trainer.rewards, terms)
            return trajectories

        trainer.rollout = rollout


class Trees(Lever):
    settings, of_steps = ("advantage=tree",), True

    def __init__(self, *branches: str) -> None:
        found = [tuple(map(int, branch.split("x"))) for branch in branches]
        self.tree = Tree(dict(found))
        if not found or len(self.tree.branches) < len(found) or min(children for _, children in found) < 2:
            raise ValueError

    def check(self, config) -> None:
        if config.images_per_prompt % self.tree.leaves:
            raise ValueError(f"trees of {self.tree.leaves} leaves: set images_per_prompt to a multiple of it")
        if not set(self.tree.branches) <= set(range(config.sampling.steps)):
            raise ValueError(f"it branches at a step that is not one of 0 to {config.sampling.steps - 1}")
        if config.timestep_fraction != 1 or config.memory.trajectories != "device":
            raise ValueError("it trains all edges, on the device: leave timestep_fraction and memory.trajectories out")

    def steps(self, table, steps, config):
        alone = config.images_per_prompt == self.tree.leaves  # before its first branching a tree has no siblings
        return steps[steps >= min(self.tree.branches)] if alone else steps

    def plan(self, planned, config, table, steps):
        rows, n = self.tree.rows(config.images_per_rollout, steps), config.images_per_rollout
        trained = _calls(config, len(rows), 1) * config.sampling.branches
        return {**planned, "sampled": self.tree.nodes(n, len(table)) * config.sampling.branches, "trained": trained}

    def attach(self, trainer) -> None:
        config, tree, policy = trainer.config, self.tree, trainer.update
        policy.rows = rows = tree.rows(config.images_per_rollout, trainer.steps_trained)
        policy.check_replay = lambda grown: _replay(policy, grown)
        trainer.advantage.tree, trainer.advantage.rows = tree, rows
        _weigh(trainer, tree.weights(rows, len(trainer.table)))
        _batch(trainer, len(rows), 1)

        def rollout(prompts, ids):
            texts, sizes = [prompt.text for prompt in prompts], (config.memory.rollout_batch, config.memory.vae_batch)
            with trainer.observer.phase("rollout"):
                grown = grow(trainer.denoiser, trainer.table, tree, texts, ids, config, *sizes)
            trainer.rewards.submit(grown.images, prompts)
            return grown

        trainer.rollout = rollout


def _replay(policy: update.PolicyUpdate, grown) -> float:
    """As `PolicyUpdate.check_replay`, of edges; calls have other shapes than in the rollout, so rounding differs."""
    transitions, text = grown.transitions(policy.steps), Texts(policy.denoiser, grown.prompts, policy.config.sampling)
    rows, zeros = torch.arange(min(len(transitions), policy.batches.update)), torch.zeros(len(transitions))
    with torch.no_grad():
        return (policy.loss(transitions, zeros.to(policy.device), rows, text)[0].ratio - 1).abs().max().item()


class Redraw(Lever):
    same = False

    def __init__(self, times: str, most: str = "0") -> None:
        self.times, self.most = int(times), float(most)

    def attach(self, trainer) -> None:
        trainer.rollout = redrawn(trainer, self.times, self.most, self.same)


class RedrawSame(Redraw):
    same = True


class PromptsBySpread(Lever):
    settings = ("advantage=by_spread",)

    def __init__(self, share: str = "0.25") -> None:
        self.share = float(share)
        if not 0 < self.share <= 1:
            raise ValueError

    def attach(self, trainer) -> None:
        trainer.prompts.draw = trainer.advantage.draws(trainer.prompts, self.share)


class Ratio(Lever):
    def __init__(self, kind: str) -> None:
        self.ratio = RATIOS[kind]
        self.settings = (f"objective={self.ratio.name}",)

    def check(self, config) -> None:
        updates = config.updates_per_rollout // config.passes_per_rollout
        if self.ratio.trajectory and config.images_per_rollout % updates:
            raise ValueError(f"an update takes whole trajectories: {config.images_per_rollout} are not shared by {updates}")

    def plan(self, planned, config, table, steps):
        if not self.ratio.trajectory:
            return planned
        kept = Batches(config, steps).kept
        trained = _calls(config, config.images_per_rollout * kept, kept) * config.sampling.branches
        return {**planned, "trained": trained}

    def patches(self):
        return [(update, "shuffled", whole_trajectories)] if self.ratio.trajectory else []

    def attach(self, trainer) -> None:
        if self.ratio.trajectory:
            kept = trainer.update.batches.kept
            _batch(trainer, trainer.config.images_per_rollout * kept, kept)


LEVERS: dict[str, type[Lever]] = {  # in the order in which they are put in: what wraps rollouts comes last
    "steps": Steps,
    "weights": Weights,
    "james_stein": JamesStein,
    "tree": Trees,
    "ratio": Ratio,
    "by_spread": PromptsBySpread,
    "best_and_worst": BestAndWorst,
    "redraw": Redraw,
    "redraw_same": RedrawSame,
    "control": Control,
}
EXCLUDED = (("tree", "redraw"), ("tree", "redraw_same"), ("redraw", "redraw_same"), ("by_spread", "redraw"))


def parse_levers(specs: list[str]) -> list[Lever]:
    """Make the levers of `NAME[:ARGUMENTS]`, and have fastloop know the names that their settings take.

    Raises:
        UserError: an unknown name, arguments that are none, or levers that do not go together.
    """
    found: dict[str, Lever] = {}
    for spec in specs:
        name, *arguments = spec.split(":")
        if name not in LEVERS:
            raise UserError(f"lever={spec}: unknown: one of {', '.join(LEVERS)}")
        try:
            found[name] = LEVERS[name](*arguments)
        except (ValueError, TypeError, KeyError):
            raise UserError(f"lever={spec}: not its arguments: see the list in bench/levers.py") from None
        found[name].text = f"lever={spec}"
    levers = [found[name] for name in LEVERS if name in found]
    brought = [setting.split("=")[0] for lever in levers for setting in lever.settings]
    trajectory = "ratio" in found and found["ratio"].ratio.trajectory
    excluded = (*EXCLUDED, *((other, "ratio") for other in ("tree", "weights") if trajectory))
    if clash := next((pair for pair in excluded if set(pair) <= set(found)), None):
        raise UserError(f"{found[clash[0]].text}: does not go with {found[clash[1]].text}: leave one out")
    if len(set(brought)) < len(brought):
        raise UserError(f"{' '.join(lever.text for lever in levers)}: two of them set advantage: leave one out")
    if levers:  # a configuration may then have their names
        ADVANTAGES["james_stein"] = lambda: OfReward(james_stein, needs_groups=True)
        ADVANTAGES["best_and_worst"] = lambda: OfReward(best_and_worst, needs_groups=True)
        ADVANTAGES.update(control_variate=ControlVariate, tree=TreeAdvantage, by_spread=BySpread)
        OBJECTIVES.update({ratio.name: ratio for ratio in RATIOS.values()})
    return levers


def settings_of(levers: list[Lever]) -> list[str]:
    """Return all KEY=VALUE that levers bring."""
    return [setting for lever in levers for setting in lever.settings]


def steps_of(levers: list[Lever], table: TransitionTable, config: Config) -> torch.Tensor:
    """Return what `trained_steps` does, of what the levers leave. Raises ``UserError`` where they do not fit the run."""
    steps = trained_steps(table, config)
    for lever in levers:
        try:
            if lever.of_steps and not OBJECTIVES[config.objective].stored_steps:
                raise ValueError(f"it is of the sampler's steps, and objective={config.objective} trains none: leave it out")
            lever.check(config)
        except ValueError as error:
            raise UserError(f"{lever.text}: {error}") from None
        steps = lever.steps(table, steps, config)
        if len(steps) == 0:
            raise UserError(f"{lever.text}: none of the steps that can be trained is left: choose others")
    return steps


def planned(levers: list[Lever], config: Config) -> dict[str, int]:
    """Return what an iteration takes, in rows sampled and trained and in pictures; of groups without spread too."""
    table = sampler_table(config.model, config.sampling)
    steps = steps_of(levers, table, config)
    found = rows_of_iteration(config, steps) | {"images": config.images_per_rollout}
    for lever in levers:
        found = lever.plan(found, config, table, steps)
    return found


@contextmanager
def in_place(levers: list[Lever]) -> Iterator[None]:
    """Have a run made and trained with levers; they are still to be attached to it."""
    with ExitStack() as stack:
        chosen = [(preflight, "trained_steps", lambda table, config: steps_of(levers, table, config))]
        for module, name, value in (*chosen, *(one for lever in levers for one in lever.patches())):
            stack.enter_context(patch.object(module, name, value))
        yield


def attach(levers: list[Lever], trainer: Trainer) -> None:
    """Put levers into a run that was made `in_place`."""
    for lever in levers:
        lever.attach(trainer)


def _weigh(trainer: Trainer, factors: torch.Tensor) -> None:
    """Multiply the loss of each step, float64 (T,)."""
    columns = trainer.update._columns
    columns["weight"] = columns["weight"] * factors.float().to(trainer.device)


def _shape(config: Config, rows: int, unit: int) -> tuple[int, int]:
    """Of the largest update of a pass of ``rows``: its rows, and those of its calls, each a multiple of ``unit``."""
    updates = config.updates_per_rollout // config.passes_per_rollout
    units = -(-rows // (updates * unit))
    return units * unit, evened(units, max(1, config.memory.update_batch // unit)) * unit


def _calls(config: Config, rows: int, unit: int) -> int:
    """Rows of an iteration's calls with gradients, those that fill up included."""
    largest, size = _shape(config, rows, unit)
    return -(-largest // size) * size * config.updates_per_rollout


def _batch(trainer: Trainer, rows: int, unit: int) -> None:
    """Give the calls of updates another shape than a rollout of single trajectories and single rows has."""
    batches = trainer.update.batches
    batches.__dict__["_shapes"] = (batches.rollout, _shape(trainer.config, rows, unit)[1])  # where the property keeps it
