"""Trees in place of single trajectories, for bench/levers.py: at chosen steps a state has several children.

A *segment* is what a branch has of its own, until the next branching. Its value is the mean reward of its leaves, and its
advantage that value less the mean of its siblings': leave-one-out, conditioned on the state that they share. So each of its
steps has the gradient of LOOP on average. A step weighs as much as any other, whatever the number of its edges. What is
before the first branching has its siblings in the other trees of the prompt, and is not trained where a prompt has one tree.

The noise of an edge is keyed by the number of its first leaf; so no two edges of a step share it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from fastloop import kernels
from fastloop.advantages import Advantage, leave_one_out, weighted_sum
from fastloop.batches import Rows
from fastloop.rollout import Transitions


@dataclass(frozen=True)
class Tree:
    """Where trees branch, for N leaves in the order of trajectories: those of a state stand together.

    Attributes:
        branches: the number of children by step, at least 2 each.
    """

    branches: dict[int, int]

    @property
    def leaves(self) -> int:
        """Leaves of a tree."""
        return math.prod(self.branches.values())

    def stride(self, step: int) -> int:
        """Return the leaves of an edge of a step; of step -1: those of a tree."""
        return self.leaves // math.prod(children for at, children in self.branches.items() if at <= step)

    def rows(self, leaves: int, steps: torch.Tensor) -> Rows:
        """Return the edges of these steps (int64 (S,)), each with its first leaf as its trajectory."""
        strides = np.array([self.stride(step) for step in steps.tolist()])
        leaf, column = np.nonzero(np.arange(leaves)[:, None] % strides == 0)
        return Rows(leaf, steps.numpy()[column])

    def advantages(self, rewards: torch.Tensor, rows: Rows) -> torch.Tensor:
        """Return the advantage of the segment of each row, float64 (R,), of rewards float64 (P, K)."""
        found = torch.zeros(len(rows), dtype=rewards.dtype)
        for step in np.unique(rows.step).tolist():
            stride, at = self.stride(step), torch.from_numpy(rows.step == step)
            branching = [children for when, children in sorted(self.branches.items()) if when <= step]
            siblings = branching[-1] if branching else rewards.shape[1] // self.leaves
            if siblings > 1:
                values = rewards.reshape(-1, siblings, stride).mean(2)
                found[at] = leave_one_out(values).flatten()[torch.from_numpy(rows.trajectory)[at] // stride]
        return found

    def weights(self, rows: Rows, steps: int) -> torch.Tensor:
        """Return the factor of each step's loss, float64 (``steps``,): of R rows, in S of the steps, R / (S edges of it)."""
        edges = np.bincount(rows.step, minlength=steps)
        return torch.from_numpy(np.where(edges > 0, len(rows) / (np.count_nonzero(edges) * np.maximum(edges, 1)), 1.0))

    def nodes(self, leaves: int, steps: int) -> int:
        """Return how often the network is called for a row in a rollout of so many steps, without guidance."""
        return sum(leaves // self.stride(step - 1) for step in range(steps))


class TreeAdvantage(Advantage):
    """The segments' advantages; ``tree`` and ``rows`` are put in before the first rollout."""

    needs_groups = True
    tree: Tree
    rows: Rows

    def __call__(self, prompts, terms, weights) -> torch.Tensor:
        """Return one for each row, float64 (R,)."""
        return self.tree.advantages(weighted_sum(terms, weights), self.rows)


@dataclass
class Grown:
    """A rollout of trees, in place of `Trajectories`.

    Attributes:
        states: float32 (M, C, H, W), those of x_T first. log_probs: of each step, float32 (edges,).
    """

    tree: Tree
    states: torch.Tensor
    log_probs: list[torch.Tensor]
    prompts: list[str]
    ids: torch.Tensor
    images: np.ndarray

    def transitions(self, steps: torch.Tensor) -> Transitions:
        """Return the edges of these steps (int64 (S,)), in the order of `Tree.rows`; they share states."""
        rows = self.tree.rows(len(self.prompts), steps)
        strides = [self.tree.stride(step - 1) for step in range(len(self.log_probs) + 1)]
        begins = np.cumsum([0, *(len(self.prompts) // stride for stride in strides)])
        leaf, step, strides = rows.trajectory, rows.step, np.array(strides)
        state = begins[step] + leaf // strides[step]
        next_state = begins[step + 1] + leaf // strides[step + 1]
        edge = np.cumsum([0, *map(len, self.log_probs)])[step] + leaf // strides[step + 1]
        columns = (torch.from_numpy(column) for column in (leaf, step, state, next_state))
        log_prob = torch.cat(self.log_probs)[torch.from_numpy(edge).to(self.ids.device)]
        return Transitions(self.states, *columns, log_prob=log_prob, ids=self.ids)


@torch.no_grad()
def grow(denoiser, table, tree: Tree, prompts: list[str], ids: torch.Tensor, config, batch: int, decode_batch: int) -> Grown:
    """Sample trees with a leaf for each prompt and number, step by step, at most ``batch`` rows in a call of the network."""
    device, sampling = denoiser.device, config.sampling
    ops = kernels.backend(config.kernels, device)
    a, b, sigma = (column.float().to(device) for column in (table.a, table.b, table.sigma))
    ids, timesteps = ids.to(device), table.timesteps.to(device)
    x = ops.initial_noise(config.seed, ids[:: tree.leaves], denoiser.latent_shape(sampling.height, sampling.width))
    states, log_probs = [x], []
    for step in range(len(table)):
        before, after = tree.stride(step - 1), tree.stride(step)
        texts, numbers, children = prompts[::before], ids[::after], before // after
        parts = []
        for start in range(0, len(x), batch):
            nodes = x[start : start + batch]
            n = len(nodes) * children
            conditions = denoiser.encode(texts[start : start + batch], sampling)
            outputs = denoiser.predict(nodes, timesteps[step].expand(len(nodes)), *conditions)
            outputs = [None if output is None else output.repeat_interleave(children, 0) for output in outputs]
            coefficients = (column[step].expand(n) for column in (a, b, sigma))
            number = numbers[start * children : start * children + n]
            nodes = nodes.repeat_interleave(children, 0)
            parts.append(
                ops.sample_transition(*outputs, nodes, *coefficients, sampling.guidance_scale, config.seed, number, step)
            )
        x, log_prob = (torch.cat(part) for part in zip(*parts, strict=True))
        states.append(x)
        log_probs.append(log_prob)
    return Grown(tree, torch.cat(states), log_probs, prompts, ids, denoiser.decode(x, decode_batch))
