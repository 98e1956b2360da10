"""A learned value as the baseline, as in DPOK (arXiv 2305.16381) and its public code:

    A(x_t, t, c) = r(x_0, c) - V(x_t, t, c),    V minimises (V(x_t, t, c) - r)^2 over the transitions that are kept

V is a small network of the latent, the step and the prompt; it is trained beside the policy, before each rollout's updates.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastloop.advantages import Advantage, finish, weighted_sum
from fastloop.batches import Rows, micro_batches
from fastloop.config import Config
from fastloop.denoisers.residence import upload
from fastloop.errors import RunFailed
from fastloop.ranks import Ranks
from fastloop.rollout import At, Trajectories

ROWS = 256  # of one call of the network, which bounds its inputs in memory
STREAM = 1  # of the draws of its rows, beside that of the policy's


class ValueNetwork(nn.Module):
    """Three layers h <- relu(e[step] * (W h + b)) on (x_t, prompt) and a last linear one, as in DPOK's code.

    The embeddings e of a step begin as uniform numbers in [0, 1).
    """

    def __init__(self, inputs: int, steps: int, width: int) -> None:
        """Args:
        inputs: elements of a latent and of a prompt's features, together. steps: of the sampler.
        """
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(size, width) for size in (inputs, width, width))
        self.steps = nn.ParameterList(torch.rand(steps, width) for _ in self.layers)
        self.last = nn.Linear(width, 1)

    def forward(self, latents: Tensor, step: Tensor, features: Tensor) -> Tensor:
        """Return the predicted rewards, float32 (B,), of latents (B, C, H, W), steps int64 (B,), features float32 (B, F)."""
        h = torch.cat([latents.flatten(1), features], 1)
        for layer, embedding in zip(self.layers, self.steps, strict=True):
            h = torch.relu(embedding[step] * layer(h))
        return self.last(h)[:, 0]


def new_network(config: Config, denoiser) -> ValueNetwork:
    """Make the value network of a model."""
    latent = math.prod(denoiser.latent_shape(config.sampling.height, config.sampling.width))
    return ValueNetwork(latent + denoiser.feature_size, config.sampling.steps, config.value.width)


class ValueBaseline(Advantage):
    """The reward less what a `ValueNetwork`, trained on the rewards so far, predicts of it at each step."""

    learned = True

    def __call__(self, prompts, terms, weights) -> Tensor:
        """Return the reward itself, float64 (P, K): what is predicted is subtracted by `of_rows`."""
        return weighted_sum(terms, weights)

    def prepare(self, config: Config, denoiser, steps: Tensor, ranks: Ranks) -> None:
        """Make the network, the same on all ranks."""
        self.config, self.denoiser, self.trained, self.ranks = config, denoiser, steps, ranks
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.network = new_network(config, denoiser).to(denoiser.device)
        self.optimizer = torch.optim.AdamW(self.network.parameters(), lr=config.value.lr)

    def of_rows(self, trajectories: Trajectories, found: Tensor, iteration: int) -> tuple[Tensor, dict[str, float]]:
        """Train the network on trajectories, then return the advantage of each of their rows.

        Args:
            trajectories: of this rank. found: their rewards, float32 (N,), of all ranks.

        Returns:
            float32 (N S,), of all ranks, for the S trained steps of each trajectory; and the metrics ``value/*``: its squared
            error before its training, and the share of the rewards' variance that it explains after it.
        """
        n, s, prompts = self.config.images_per_rollout, len(self.trained), trajectories.prompts
        rollouts = len(found) // n
        rows = Rows.of(n, self.trained).of_rollouts(rollouts)
        own = rows.own(self.ranks, n)
        transitions = trajectories.transitions(self.trained)
        rewards = found[rows.trajectory[own]].to(self.denoiser.device)
        distinct = list(dict.fromkeys(prompts))
        numbers = {prompt: i for i, prompt in enumerate(distinct)}
        of_prompt = upload(torch.tensor([numbers[prompt] for prompt in prompts]), self.denoiser.device)
        features = self.denoiser.features(distinct)

        def predicted(chosen: np.ndarray) -> tuple[At, Tensor]:
            at = transitions.at(torch.from_numpy(chosen))
            return at, self.network(transitions.latents(at)[0], at.step, features[of_prompt[at.trajectory]])

        rng = np.random.default_rng([self.config.seed, iteration, STREAM])
        losses = []
        for _ in range(self.config.value.updates):
            batch = rng.permutation(len(rows))[: self.config.value.batch]
            loss = torch.zeros((), device=self.denoiser.device)
            self.optimizer.zero_grad()
            for part in micro_batches(batch, rows, self.ranks, n, ROWS):
                if len(part):
                    at, value = predicted(part)
                    error = (value - rewards[at.row]).square().sum() / len(batch)
                    error.backward()
                    loss += error.detach()
            losses.append(self._of_ranks(loss))
            self._step()
        with torch.no_grad():
            parts = np.array_split(np.arange(len(own)), -(-len(own) // ROWS))
            value = torch.cat([predicted(part)[1] for part in parts])
        mine = value.cpu().view(rollouts, -1, s)[:, : len(self.ranks.share(n))].transpose(0, 1).numpy()
        values = torch.from_numpy(self.ranks.gather_shares(mine, n)).transpose(0, 1).flatten()
        advantages = found.repeat_interleave(s) - values
        spread = found.var(correction=0).item()
        metrics = {"value/loss": losses[0], "value/explained": 1 - advantages.var(correction=0).item() / max(spread, 1e-12)}
        return finish(advantages, self.config.advantage_clamp, self.config.normalize_advantages), metrics

    def _of_ranks(self, loss: Tensor) -> float:
        """The sum of the ranks' parts of a loss."""
        found = float(self.ranks.gather(np.array(loss.item())).sum())
        if not math.isfinite(found):
            raise RunFailed("the value network's loss is not finite: start a new run with a lower value.lr")
        return found

    def _step(self) -> None:
        """One step with the sum of the ranks' gradients, the same on all of them."""
        parameters = list(self.network.parameters())
        own = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters])
        if self.ranks.world > 1:
            own = torch.from_numpy(self.ranks.gather(own.cpu().numpy())).sum(0).to(self.denoiser.device)
        for p, gradient in zip(parameters, own.split([p.numel() for p in parameters]), strict=True):
            p.grad = gradient.view_as(p)
        self.optimizer.step()

    def state_dict(self) -> dict[str, Any]:
        """Return network and optimizer, in the host's memory."""
        return _on_host({"network": self.network.state_dict(), "optimizer": self.optimizer.state_dict()})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])


def _on_host(state: Any) -> Any:
    """The same with its tensors in the host's memory."""
    if isinstance(state, dict):
        return {key: _on_host(value) for key, value in state.items()}
    return state.cpu() if isinstance(state, Tensor) else state
