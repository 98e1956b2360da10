"""What tests see of a run: its weights, the rows of its updates, and its optimizer steps."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fastloop.trainer import Trainer

Weights = dict[str, torch.Tensor]


def weights(trainer: Trainer) -> Weights:
    return {name: p.detach().clone() for name, p in trainer.parameters.items()}


def same(one: Weights, other: Weights) -> bool:
    return one.keys() == other.keys() and all(one[name].equal(other[name]) for name in one)


@dataclass
class Step:
    """One optimizer step."""

    gradients: Weights
    before: Weights
    after: Weights


def record_steps(trainer: Trainer) -> list[Step]:
    steps, step = [], trainer.engine.step

    def recorded():
        before, gradients = weights(trainer), {name: p.grad.clone() for name, p in trainer.parameters.items()}
        norm = step()
        steps.append(Step(gradients, before, weights(trainer)))
        return norm

    trainer.engine.step = recorded
    return steps


def record_pairs(trainer: Trainer) -> list[list[tuple[int, int]]]:
    """The (trajectory, timestep) pairs of each micro-batch whose loss is computed."""
    batches, loss = [], trainer.update.loss

    def recorded(transitions, advantages, rows, text, **more):
        batches.append(list(zip(transitions.trajectory[rows].tolist(), transitions.step[rows].tolist(), strict=True)))
        return loss(transitions, advantages, rows, text, **more)

    trainer.update.loss = recorded
    return batches


def begin(trainer: Trainer):
    """Trajectories and advantages of the first iteration."""
    config = trainer.config
    prompts = trainer.prompts.draw(0, config.prompts_per_step)
    repeated = [prompt for prompt in prompts for _ in range(config.images_per_prompt)]
    trajectories = trainer.rollout(repeated, torch.arange(len(repeated)))
    return trajectories, trainer.advantages([prompt.text for prompt in prompts], trainer.rewards.gather())
