"""Inputs of one denoising step and of its loss, for the tests of the operators; on a GPU where there is one."""

from __future__ import annotations

import itertools

import torch

from fastloop.kernels import fused, reference

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SEED, GUIDANCE, CLIP = 7, 3.0, 1e-3
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def pairwise(*axes) -> list[tuple]:
    """Cases in which each value of an axis meets each value of every other axis: far fewer than their product."""

    def pairs(case: tuple) -> set:
        return set(itertools.combinations(enumerate(map(str, case)), 2))

    product = list(itertools.product(*axes))
    missing, chosen = set().union(*map(pairs, product)), []
    while missing:
        chosen.append(max(product, key=lambda case: len(pairs(case) & missing)))
        missing -= pairs(chosen[-1])
    return chosen


def case(shape=(4, 16, 16), rows=5, dtype=torch.float32, guided=True, channels_last=False, sigma=None) -> dict:
    """Inputs of one denoising step on ``DEVICE``; the second row has sigma 0 unless ``sigma`` is given."""
    g = torch.Generator().manual_seed(1)
    cond, uncond, x_t = (torch.randn(rows, *shape, generator=g) for _ in range(3))
    if sigma is None:
        sigma = torch.rand(rows, generator=g) * 0.5 + 0.02
        sigma[1:2] = 0
    else:
        sigma = torch.full((rows,), sigma)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    cond, uncond = (t.to(DEVICE, dtype).contiguous(memory_format=layout) for t in (cond, uncond))
    return dict(
        cond=cond,
        uncond=uncond if guided else None,
        x_t=x_t.to(DEVICE),
        a=(torch.rand(rows, generator=g) + 0.5).to(DEVICE),
        b=(-torch.rand(rows, generator=g) - 0.1).to(DEVICE),
        sigma=sigma.to(DEVICE),
        guidance=GUIDANCE,
    )


def trajectories(rows: int) -> torch.Tensor:
    return (torch.arange(rows, device=DEVICE) * 3 + torch.tensor([0, 2**33], device=DEVICE)[torch.arange(rows) % 2]).long()


def sampled(inputs: dict, ops=fused, step: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    return ops.sample_transition(**inputs, seed=SEED, trajectory=trajectories(len(inputs["x_t"])), step=step)


def update(inputs: dict, move: float = 1e-2, advantage=None, **changes) -> dict:
    """The arguments of ``policy_loss`` after the policy has moved from where it sampled."""
    x_prev, log_prob_old = sampled(inputs)
    rows = len(x_prev)
    g = torch.Generator().manual_seed(2)
    drift = torch.randn(inputs["cond"].shape, generator=g).to(DEVICE) * torch.linspace(-1, 1, rows, device=DEVICE).view(
        -1, 1, 1, 1
    )
    moved = (inputs["cond"].float() + move * drift).to(inputs["cond"].dtype)
    layout = torch.channels_last if inputs["cond"].stride(1) == 1 else torch.contiguous_format
    if advantage is None:
        advantage = torch.tensor([1.0, -0.5, -2.0, 3.0, -1.0])[torch.arange(rows) % 5]
    return inputs | dict(
        cond=moved.contiguous(memory_format=layout),
        x_prev=x_prev,
        log_prob_old=log_prob_old,
        advantage=advantage.to(DEVICE),
        clip_range=CLIP,
        seed=SEED,
        trajectory=trajectories(rows),
        step=torch.full((rows,), 4, device=DEVICE),
    ) | changes  # fmt: skip


def policy_loss(ops, cond, uncond, *, guidance, clip_range, objective, seed=0, **columns):
    """``ops.policy_loss`` of a micro-batch of these columns."""
    settings = {"guidance": guidance, "clip_range": clip_range, "objective": objective, "seed": seed}
    return ops.policy_loss(cond, uncond, reference.MicroBatch(**columns), **settings)


def gradients(ops, arguments: dict, objective: str):
    """The terms, and the gradients of a weighted sum of the losses for cond and uncond."""
    leaves = {name: arguments[name].detach().requires_grad_() for name in ("cond", "uncond") if arguments[name] is not None}
    terms = policy_loss(ops, **arguments | leaves, objective=objective)
    weights = torch.arange(1.0, len(terms.loss) + 1, device=DEVICE)
    return terms, torch.autograd.grad((terms.loss * weights).sum(), list(leaves.values()))


def close(got: torch.Tensor, want: torch.Tensor, tolerance: float) -> bool:
    """Within a tolerance relative to the largest value."""
    return bool((got.double() - want.double()).abs().max() <= tolerance * want.double().abs().max().clamp_min(1e-30))
