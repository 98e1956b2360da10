"""What of the initial noise a reward depends on, before any training: why Noise PPO's network is coarse, and what bounds it.

    python bench/noise_probe.py [--config configs/shapes_noise_ppo.yaml] [--prompts 2000] [--images 4] [--set KEY=VALUE ...]

The model draws pictures of training prompts from N(0, I), with the recipe's deterministic sampler, and scores them.

- Signal: the squared norm of the gradient of the expected reward with respect to mu, given on a grid of G x G means in each
  channel (1: the channel's mean), and with respect to the logarithm of each channel's spread. mu may follow the prompt along a
  direction of its features: that of most signal is taken, of the constant one and their first eight principal ones. For
  advantages A (leave-one-out) and noise z in units of its spread, g = mean(A z) over pictures; |g|^2 is the mean of g_i . g_j
  over pairs of different prompts, which has no bias; its standard error is that of uncorrelated noise.
- Ceiling: held-out scores with mu moved along that gradient, of the channels' means, to lengths of the whole latent, and with
  the spread scaled. The same noise for all.

Prints Markdown tables.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from fastloop import cli, kernels
from fastloop.advantages import leave_one_out
from fastloop.denoisers import ready_denoiser
from fastloop.engines.torch import pick_device
from fastloop.errors import UserError
from fastloop.prompts import Prompt, PromptStream, load_prompts
from fastloop.recipes import load_config
from fastloop.rewards.scoring import Rewards
from fastloop.rollout import rollout, sampler_table

DIRECTIONS = 8  # of the features, beside the constant one


class Probe:
    """A model that draws from noise given to it, with a recipe's sampler, and scores what it drew."""

    def __init__(self, config) -> None:
        self.config = config
        self.denoiser = ready_denoiser(config, pick_device(config.engine.device))
        self.ops = kernels.backend(config.kernels, self.denoiser.device)
        self.table = sampler_table(config.model, config.sampling)
        self.shape = self.denoiser.latent_shape(config.sampling.height, config.sampling.width)

    def noise(self, n: int, seed: int) -> torch.Tensor:
        """Draw z ~ N(0, I), float32 (n, C, H, W)."""
        return self.ops.initial_noise(seed, torch.arange(n, device=self.denoiser.device), self.shape)

    def scores(self, prompts: list[Prompt], latents: torch.Tensor, rewards) -> torch.Tensor:
        """Draw a picture from each of the initial latents and score it: float64 (n,)."""
        remaining = iter(latents.split(self.config.memory.rollout_batch))
        self.denoiser.initial_latents = lambda noise, texts: next(remaining)
        scorer = Rewards(rewards, prompts, self.denoiser.image_size(self.config.sampling))
        drawn = rollout(
            self.denoiser,
            self.table,
            [prompt.text for prompt in prompts],
            torch.arange(len(prompts)),
            sampling=self.config.sampling,
            seed=0,
            batch=self.config.memory.rollout_batch,
            vae_batch=self.config.memory.vae_batch,
            backend=self.config.kernels,
            keep="none",
        )
        found = torch.from_numpy(scorer.score(drawn.images, prompts).total)
        scorer.close()
        return found


def directions(features: torch.Tensor) -> torch.Tensor:
    """Return functions of the prompts with unit mean square: 1, and the first principal components of features, (n, 1 + K)."""
    centred = F.layer_norm(features.double(), features.shape[1:])
    centred = centred - centred.mean(0)
    components = torch.linalg.svd(centred, full_matrices=False)[0][:, :DIRECTIONS] * len(features) ** 0.5
    return torch.cat([torch.ones(len(features), 1, dtype=torch.float64, device=features.device), components], 1)


def on_grid(noise: torch.Tensor, grid: int) -> torch.Tensor:
    """Return noise averaged over the cells of a grid, in units of its spread there: float64 (n, C G G)."""
    height, width = noise.shape[2:]
    means = F.adaptive_avg_pool2d(noise.double(), grid)
    return (means * (height * width / grid**2) ** 0.5).flatten(1)


def signal(noise: torch.Tensor, advantages: torch.Tensor, weights: torch.Tensor, images: int) -> tuple[float, float]:
    """Return |g|^2 of g = mean(A w z) without bias, and its standard error without signal.

    Args:
        noise: float64 (n, E). advantages, weights: (n,). images: of each prompt, which stand together.
    """
    each = ((advantages * weights)[:, None] * noise).view(-1, images, noise.shape[1]).sum(1)
    total, own, n = each.sum(0).square().sum(), each.square().sum(), len(noise)
    return ((total - own) / n**2).item(), (own / n**2 * (2 / noise.shape[1]) ** 0.5).item()


def main(argv: list[str] | None = None) -> int:
    """Measure, and print both tables; returns the exit code."""
    parser = cli.Parser(prog="bench/noise_probe.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path("configs/shapes_noise_ppo.yaml"))
    parser.add_argument("--prompts", type=int, default=2000, help="training prompts (default: 2000)")
    parser.add_argument("--images", type=int, default=4, help="of each (default: 4)")
    parser.add_argument("--lengths", type=float, nargs="+", default=[0, 3, 6, 9], help="of mu, of the whole latent")
    parser.add_argument("--scales", type=float, nargs="+", default=[1.1, 0.9, 0.8], help="of the spread")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE")
    try:
        args = parser.parse_args(argv)
        config = load_config(args.config, args.set)
        prompts, held_out = load_prompts(config.prompts), load_prompts(config.eval.prompts, "eval.prompts")
    except UserError as error:
        return cli.fail(str(error), 2)
    probe, k = Probe(config), args.images
    drawn = [prompt for prompt in PromptStream(prompts, config.seed).draw(0, args.prompts) for _ in range(k)]
    noise = probe.noise(len(drawn), config.seed)
    rewards = probe.scores(drawn, noise, config.rewards)
    advantages = leave_one_out(rewards.view(-1, k)).flatten()
    features = probe.denoiser.features([prompt.text for prompt in drawn])
    along = directions(features)
    print(f"{len(drawn)} pictures of {args.prompts} prompts, mean score {rewards.mean():.3f}\n")
    print("| given | outputs | squared norm of the gradient, 1e-5 | its direction |\n|---|---|---|---|")
    sides = [grid for grid in (noise.shape[2], 4, 2, 1) if grid <= noise.shape[2]]
    views = {f"mu on {grid} x {grid}": on_grid(noise, grid) for grid in dict.fromkeys(sides)}
    views["log s of each channel"] = on_grid((noise.square() - 1) / 2**0.5, 1)
    for name, view in views.items():
        found = [signal(view, advantages, along[:, i], k) for i in range(along.shape[1])]
        best = max(range(len(found)), key=lambda i: found[i][0])
        value, error = (1e5 * number for number in found[best])
        print(f"| {name} | {view.shape[1]} | {value:.0f} ± {error:.0f} | {best or 'the same for all prompts'} |")
    # a linear map from features to the channels' means, with the gradient of the expected reward
    centred = F.layer_norm(features.double(), features.shape[1:])
    gradient = centred.T @ (advantages[:, None] * on_grid(noise, 1)) / len(drawn)
    m = config.eval.images_per_prompt
    evaluated = [prompt for prompt in held_out for _ in range(m)]
    own = F.layer_norm(probe.denoiser.features([prompt.text for prompt in evaluated]).double(), features.shape[1:]) @ gradient
    own = own / own.norm(dim=1).square().mean().sqrt()
    start, side = probe.noise(len(evaluated), 1 << 33), noise.shape[2] * noise.shape[3]
    print("\n| mu's length | s | held-out score |\n|---|---|---|")
    for length, scale in [(length, 1.0) for length in args.lengths] + [(0, scale) for scale in args.scales]:
        mean = (own * length / side**0.5).float()[:, :, None, None]
        scores = probe.scores(evaluated, scale * start + mean, config.eval.rewards or config.rewards).view(-1, m).mean(1)
        print(f"| {length:g} | {scale:g} | {scores.mean():.3f} ± {scores.std() / np.sqrt(len(scores)):.3f} |", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
