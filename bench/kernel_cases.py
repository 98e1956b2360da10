"""The cases of bench/kernel_table.py: operators and their sizes, inputs and least traffic, and the eager formulas."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

# bytes per element in bfloat16, latents float32. Per element of a latent: forward reads cond, uncond, x_t and x_prev, backward
# writes two gradients as well; sampling reads three and writes x_prev. group_norm_silu: x read, y written; x and dy read, dx
# written. geglu, per output: two read, one written; three read, two written
TRAFFIC = {
    "policy_loss": {"forward": 12, "backward": 16},
    "sample_transition": {"forward": 12},
    "group_norm_silu": {"forward": 4, "backward": 6},
    "geglu": {"forward": 6, "backward": 10},
}


# --- the baselines ----------------------------------------------------------------------------------------------------


def eager_log_prob(mean, x_prev, sigma):
    log_prob = -((x_prev - mean) ** 2) / (2 * sigma**2) - torch.log(sigma) - 0.5 * math.log(2 * math.pi)
    return log_prob.mean(dim=(1, 2, 3))


def eager_mean(cond, uncond, x_t, a, b, guidance):
    guided = uncond.float() + guidance * (cond.float() - uncond.float())
    return a.view(-1, 1, 1, 1) * x_t + b.view(-1, 1, 1, 1) * guided


def eager_policy_loss(cond, uncond, x_t, x_prev, a, b, sigma, guidance, log_prob_old, advantage, clip_range):
    """DDPO's loss before its mean over the batch, with the two statistics that DDPO logs."""
    log_prob = eager_log_prob(eager_mean(cond, uncond, x_t, a, b, guidance), x_prev, sigma.view(-1, 1, 1, 1))
    ratio = torch.exp(log_prob - log_prob_old)
    loss = torch.maximum(-advantage * ratio, -advantage * torch.clamp(ratio, 1 - clip_range, 1 + clip_range))
    with torch.no_grad():
        approx_kl = 0.5 * torch.mean((log_prob - log_prob_old) ** 2)
        clip_fraction = torch.mean((torch.abs(ratio - 1) > clip_range).float())
    return loss, approx_kl, clip_fraction


def eager_sample_transition(cond, uncond, x_t, a, b, sigma, guidance, seed, trajectory, step):
    """Noise from torch's generator: seed, trajectory and step key the kernel's alone."""
    mean, sigma = eager_mean(cond, uncond, x_t, a, b, guidance), sigma.view(-1, 1, 1, 1)
    x_prev = mean + sigma * torch.randn_like(mean)
    return x_prev, eager_log_prob(mean, x_prev, sigma)


def eager_group_norm_silu(x, groups, weight, bias, eps):
    return F.silu(F.group_norm(x, groups, weight, bias, eps))


def eager_geglu(projected):
    hidden, gate = projected.chunk(2, dim=-1)
    return hidden * F.gelu(gate)


EAGER = {
    "policy_loss": eager_policy_loss,
    "sample_transition": eager_sample_transition,
    "group_norm_silu": eager_group_norm_silu,
    "geglu": eager_geglu,
}


# --- what is measured -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One operator at one size. ``elements``: what `TRAFFIC` counts; ``inputs``: makes its arguments on a device."""

    operator: str
    size: str
    elements: int
    inputs: Callable[[torch.device], dict]

    def bytes_moved(self, which: str) -> int:
        counts = TRAFFIC[self.operator]
        return self.elements * (sum(counts.values()) if which == "both" else counts[which])

    @property
    def passes(self) -> tuple[str, ...]:
        return ("forward", "backward", "both") if "backward" in TRAFFIC[self.operator] else ("forward",)


def step_case(operator: str, model: str, shape: tuple[int, int, int], batch: int, last: bool = True) -> Case:
    def inputs(device: torch.device) -> dict:
        g = torch.Generator(device).manual_seed(0)
        cond, uncond, x_t, noise = (torch.randn(batch, *shape, generator=g, device=device) for _ in range(4))
        layout = torch.channels_last if last else torch.contiguous_format  # a UNet's outputs are channels_last
        cond, uncond = (output.bfloat16().contiguous(memory_format=layout) for output in (cond, uncond))
        a, b, sigma = (torch.full((batch,), value, device=device) for value in (1.01, -0.05, 0.02))
        step = dict(cond=cond, uncond=uncond, x_t=x_t, a=a, b=b, sigma=sigma, guidance=5.0)
        if operator == "sample_transition":
            return step | dict(seed=7, trajectory=torch.arange(batch, device=device), step=4)
        mean = eager_mean(cond, uncond, x_t, a, b, 5.0)
        x_prev = mean + 0.02 * noise
        # some pairs inside the window and some outside, none near its edges
        offset = torch.linspace(-0.02, 0.02, batch, device=device)
        log_prob_old = eager_log_prob(mean, x_prev, sigma.view(-1, 1, 1, 1)) + offset
        cond.requires_grad_(), uncond.requires_grad_()
        advantage = 1.0 - 2.0 * (torch.arange(batch, device=device) % 2)
        return step | dict(x_prev=x_prev, log_prob_old=log_prob_old, advantage=advantage, clip_range=1e-2)

    size = f"{model} {'x'.join(map(str, shape))}, batch {batch}{', NHWC' if last else ''}"
    return Case(operator, size, batch * math.prod(shape), inputs)


def norm_case(model: str, channels: int, side: int, batch: int, last: bool = False, trained: bool = False) -> Case:
    def inputs(device: torch.device) -> dict:
        g = torch.Generator(device).manual_seed(0)
        layout = torch.channels_last if last else torch.contiguous_format
        x = torch.randn(batch, channels, side, side, generator=g, device=device).bfloat16().contiguous(memory_format=layout)
        weight = 1 + 0.1 * torch.randn(channels, generator=g, device=device)
        bias = 0.1 * torch.randn(channels, generator=g, device=device)
        weight, bias = (parameter.bfloat16().requires_grad_(trained) for parameter in (weight, bias))
        return dict(x=x.requires_grad_(), groups=32, weight=weight, bias=bias, eps=1e-5)

    size = f"{model} {channels}@{side}x{side}, batch {batch}{', NHWC' if last else ''}{', trained' if trained else ''}"
    return Case("group_norm_silu", size, batch * channels * side * side, inputs)


def geglu_case(model: str, tokens: int, inner: int, batch: int) -> Case:
    def inputs(device: torch.device) -> dict:
        g = torch.Generator(device).manual_seed(0)
        projected = torch.randn(batch, tokens, 2 * inner, generator=g, device=device, dtype=torch.bfloat16)
        return dict(projected=projected.requires_grad_())

    return Case("geglu", f"{model} {tokens} x 2*{inner}, batch {batch}", batch * tokens * inner, inputs)


def cases_for(device: torch.device, quick: bool) -> list[Case]:
    """What the table has on a device; trained: weight and bias need gradients as well (not so with LoRA)."""
    sd, sdxl = ("SD", (4, 64, 64)), ("SDXL", (4, 128, 128))
    operators = ("policy_loss", "sample_transition")
    if device.type != "cuda":
        steps = [(sd, 1)] if quick else [(sd, 1), (sd, 4), (sdxl, 1)]
        cases = [step_case(operator, *model, batch) for operator in operators for model, batch in steps]
        cases += [norm_case("SD", 320, 16, 1, last=True)]
        if not quick:
            cases += [step_case(operator, *sd, 1, last=False) for operator in operators]
            cases += [norm_case("SD", 320, 32, 2), norm_case("SD", 320, 16, 1, last=True, trained=True)]
        return cases + [geglu_case("SD", 256, 320, 1)]
    batches = (1, 64) if quick else (1, 4, 16, 64, 256)
    cases = [step_case(operator, *model, n) for operator in operators for model in (sd, sdxl) for n in batches]
    sizes = [("SD", 320, 64), ("SD", 640, 32), ("SD", 1280, 16), ("SD", 1280, 8)]
    sizes += [("SDXL", 320, 128), ("SDXL", 640, 64), ("SDXL", 1280, 32), ("VAE", 128, 512)]
    gates = [("SD", 4096, 1280), ("SD", 1024, 2560), ("SD", 256, 5120), ("SDXL", 4096, 2560), ("SDXL", 1024, 5120)]
    if quick:
        cases += [norm_case("SDXL", 640, 64, 8, last) for last in (False, True)]
        return cases + [geglu_case("SDXL", 4096, 2560, 8)]
    cases += [step_case(operator, *model, 16, last=False) for operator in operators for model in (sd, sdxl)]
    cases += [norm_case(*size, 8, last) for size in sizes for last in (False, True)]
    cases += [norm_case(*size, batch) for size in (sizes[0], sizes[3], sizes[5]) for batch in (2, 16)]
    cases += [norm_case(*sizes[i], 8, last, trained=True) for i in (0, 5) for last in (False, True)]
    return cases + [geglu_case(*gate, batch) for gate in gates for batch in (2, 16)]
