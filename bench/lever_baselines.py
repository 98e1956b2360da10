"""Advantages with other baselines than LOOP's, for bench/levers.py. Rewards are float64 (P, K): P prompts, K images each.

A baseline leaves the gradient's mean as it is where nothing in it follows from the noise of the step that it corrects: so each
part of `james_stein` leaves the sample out, its weights too, and a `ControlVariate` knows the state before the step only.
"""

from __future__ import annotations

import torch

from fastloop.advantages import Advantage, leave_one_out, weighted_sum
from fastloop.kernels.reference import normal
from fastloop.rollout import Trajectories
from fastloop.transitions import TransitionTable

KEPT = 0.9  # share of earlier rollouts in what the factors of a control variate are fitted to


def james_stein(rewards: torch.Tensor) -> torch.Tensor:
    """Return r_i - (1 - w_i) (mean of its prompt's others) - w_i (mean of the other prompts), float64 (P, K); unbiased.

    w = n / (n + d), for the variance n = s^2 / (K - 1) of the mean of a prompt's others and the variance d between prompts.
    Both are estimated without the sample itself, so that its baseline does not depend on its reward. Leave-one-out alone
    where there is only one prompt.
    """
    (p, k), own = rewards.shape, leave_one_out(rewards)
    if p == 1:
        return own
    relative = rewards - rewards[0, 0]
    group = relative.mean(1, keepdim=True)
    rest = (group * k - relative) / (k - 1)
    others = (group.sum(0) - group) / (p - 1)
    deviations = (relative - group).square()
    within = ((deviations.sum() - deviations * k / (k - 1)) / (p * (k - 1) - 1)).clamp(min=0)
    centred = (group - group.mean(0)).square()
    of_others = centred.sum() - centred * p / (p - 1)  # squares of the other prompts' means around their own mean
    spread = of_others / (p - 1) + (rest - others).square() / p  # variance of the means, of which one has K - 1 samples
    between = (spread - within * ((p - 1) / k + 1 / (k - 1)) / p).clamp(min=0)
    noise = within / (k - 1)
    weight = torch.where(noise > 0, noise / (noise + between), 0.0)
    return own + weight * (rest - others)


def best_and_worst(rewards: torch.Tensor) -> torch.Tensor:
    """Return leave-one-out advantages of the best and the worst of each prompt, and 0 for the others.

    This changes the objective: extreme rewards count more than they would on average. Rows of advantage 0 are not run.
    """
    ends = torch.stack([rewards.argmax(1), rewards.argmin(1)], 1)
    return leave_one_out(rewards) * torch.zeros_like(rewards).scatter(1, ends, 1.0)


class ControlVariate(Advantage):
    """Leave-one-out advantages less beta_t times those of a prediction of the reward, made of the state before step t.

    Unbiased: the prediction does not know the noise of the step, and beta is given, or fitted to earlier rollouts (0 in the
    first one): the least squares of a step's advantages, over a moving average.

    Attributes:
        beta: given, or ``None``. predicted: float64 (N, S), of the rollout that is looked at next.
    """

    needs_groups = True

    def __init__(self, beta: float | None = None) -> None:
        self.beta, self.predicted = beta, None
        self.moments: list[list[float]] | None = None  # of each step: products of both, and squares of the prediction

    def __call__(self, prompts, terms, weights) -> torch.Tensor:
        """Return advantages of each trained step, (P, K, S), and remember the moments."""
        rewards = weighted_sum(terms, weights)
        own = leave_one_out(rewards)[..., None]
        predicted = torch.stack([leave_one_out(step.view_as(rewards)) for step in self.predicted.T], -1)
        found = own - self.factors(predicted.shape[-1]) * predicted
        seen = torch.stack([(own * predicted).mean((0, 1)), predicted.square().mean((0, 1))])
        before = seen if self.moments is None else torch.tensor(self.moments, dtype=seen.dtype)
        self.moments = (KEPT * before + (1 - KEPT) * seen).tolist()
        return found

    def factors(self, steps: int) -> torch.Tensor:
        """Return beta of each step, float64 (S,)."""
        if self.beta is not None:
            return torch.full((steps,), self.beta, dtype=torch.float64)
        if self.moments is None:
            return torch.zeros(steps, dtype=torch.float64)
        products, squares = torch.tensor(self.moments, dtype=torch.float64)
        return torch.where(squares > 0, products / squares, 0.0)

    def state_dict(self):
        """Return the moments."""
        return {"moments": self.moments}

    def load_state_dict(self, state) -> None:
        """Take them back."""
        self.moments = state["moments"]


def predicted_x0(trajectories: Trajectories, table: TransitionTable, step: int, seed: int) -> torch.Tensor:
    """Return x_0 as the (guided) model predicts it from the state before a step, float32 (N, C, H, W), without calling it.

    What it gave at the rollout follows from the stored latents: m = (x' - sigma z - a x) / b, and z is drawn again.
    """
    x, after = (trajectories.latents[i].to(trajectories.ids.device) for i in (step, step + 1))
    a, b, sigma = (column[step].item() for column in (table.a, table.b, table.sigma))
    noise = normal(seed, trajectories.ids, step, x[0].numel()).view_as(x)
    alpha = table.schedule.alphas[table.timesteps[step]]
    signal, output = (factor.item() for factor in table.schedule.conversions(alpha)[:2])
    return signal * x + output * ((after - sigma * noise - a * x) / b)
