"""Plain PPO for diffusers pipelines (DDPO, arXiv 2305.13301): the control of bench/throughput.py.

    python bench/baseline_ppo.py [--model assets:shapes] [--reward shapes] [--iterations 10] [--set steps=8 lora_rank=16]

Written from the published description, in eager PyTorch, as one would write it without fastloop; of fastloop it takes the
loading of the model and the reward, nothing else. One iteration:

1. Sample `images` pictures by DDIM with eta, one prompt each; keep latents and log-probs of every step.
2. Score them; normalise the rewards by the running mean and standard deviation of their prompt, or those of the batch while
   a prompt has been seen fewer than 16 times; clamp to +-5.
3. Shuffle the images, and the timesteps of each image for itself. For each of `updates` equal parts of the images: accumulate
   the gradients of the clipped loss over all timesteps, clip them, one AdamW step.

The log-prob of a step is the mean over the latent's elements; guidance is part of the policy, in sampling and training.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections import defaultdict, deque
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from peft import LoraConfig
from torch import Tensor

TEXT = ("cond", "uncond", "pooled", "pooled_uncond")  # in the order of diffusers' encode_prompt


@dataclass
class Settings:
    """Defaults are DDPO's for LoRA, but for the sizes of batches."""

    images: int = 64  # per iteration
    batch: int = 16  # images per forward, in sampling and in training
    updates: int = 2  # optimizer steps per iteration
    steps: int = 50
    eta: float = 1.0
    guidance_scale: float = 5.0
    clip_range: float = 1e-4
    advantage_clip: float = 5.0
    lr: float = 3e-4
    weight_decay: float = 1e-4
    max_grad_norm: float = 1.0
    lora_rank: int = 16  # 0: train all weights of the network
    dtype: str = "float32"  # of the forward passes; what is trained stays float32
    gradient_checkpointing: bool = False
    max_sequence_length: int | None = None  # tokens of T5, for a flow
    seed: int = 0


class BaselinePPO:
    """Trains the UNet of a StableDiffusionPipeline or StableDiffusionXLPipeline.

    Attributes:
        steps: of the sampler, those that are trained.

    Args:
        pipe: a pipeline with a DDIMScheduler, on its device, in float32 where all weights are trained.
        reward: a function of pictures uint8 (n, height, width, 3) and their prompts that gives n numbers.
    """

    network_name = "unet"
    targets = {"target_modules": ["to_q", "to_k", "to_v", "to_out.0"]}

    def __init__(self, pipe, reward: Callable[[np.ndarray, list[str]], np.ndarray], settings: Settings) -> None:
        self.pipe, self.reward, self.settings = pipe, reward, settings
        self.network, self.scheduler = getattr(pipe, self.network_name), pipe.scheduler
        self.device, self.dtype = self.network.device, getattr(torch, settings.dtype)
        self.guided = settings.guidance_scale != 1
        torch.manual_seed(settings.seed)
        pipe.vae.requires_grad_(False)
        self.network.requires_grad_(settings.lora_rank == 0)
        if settings.lora_rank:
            lora = {"r": settings.lora_rank, "lora_alpha": settings.lora_rank, "init_lora_weights": "gaussian"}
            self.network.add_adapter(LoraConfig(**lora, **self.targets))
        if settings.gradient_checkpointing:
            self.network.enable_gradient_checkpointing()
        self.parameters = [p for p in self.network.parameters() if p.requires_grad]
        for p in self.parameters:
            p.data = p.data.float()
        self.optimizer = torch.optim.AdamW(self.parameters, settings.lr, weight_decay=settings.weight_decay)
        self.history: dict[str, deque[float]] = defaultdict(lambda: deque(maxlen=32))
        self.scheduler.set_timesteps(settings.steps)
        self.steps = self.make_steps()

    @property
    def side(self) -> int:
        """Of the pictures, in pixels."""
        return self.network.config.sample_size * self.pipe.vae_scale_factor

    def make_steps(self) -> int:
        """Prepare for ``step``; return how many of the steps are trained, from the first."""
        self.alphas = self.scheduler.alphas_cumprod.to(self.device)
        self.stride = self.scheduler.config.num_train_timesteps // self.settings.steps
        return self.settings.steps

    def iteration(self, prompts: list[str]) -> dict[str, float]:
        """Samples one image of each prompt and trains on them."""
        samples = self.sample(prompts)
        rewards = self.score(samples["images"], prompts)
        samples["advantages"] = self.advantages(prompts, rewards).to(self.device)
        return {"reward": float(rewards.mean())} | self.update(samples)

    # --- sampling ------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def sample(self, prompts: list[str]) -> dict:
        """Latents (N, T + 1, ...), log-probs (N, steps), embeddings (N, ...) and images uint8 (N, height, width, 3)."""
        size = self.network.config.sample_size
        parts = defaultdict(list)
        for start in range(0, len(prompts), self.settings.batch):
            text = self.encode(prompts[start : start + self.settings.batch])
            n = len(text["cond"])
            latents = torch.randn(n, self.network.config.in_channels, size, size, device=self.device)
            path, log_probs = [latents], []
            for t in self.scheduler.timesteps:
                timestep = t.expand(n).to(self.device)
                latents, log_prob = self.step(self.predict(latents, timestep, text), timestep, latents)
                path.append(latents)
                log_probs.append(log_prob)
            parts["images"].append(self.decode(latents))
            parts["latents"].append(torch.stack(path, 1))
            parts["log_probs"].append(torch.stack(log_probs[: self.steps], 1))
            for name, value in text.items():
                parts[name].append(value)
        images = np.concatenate(parts.pop("images"))
        return {"images": images} | {name: torch.cat(values) for name, values in parts.items()}

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> dict[str, Tensor]:
        """Embeddings of prompts and of the empty prompt, with SDXL's pooled ones."""
        options = {"device": self.device, "num_images_per_prompt": 1, "do_classifier_free_guidance": self.guided}
        found = self.pipe.encode_prompt(prompts, **options)
        return {name: value for name, value in zip(TEXT, found, strict=False) if value is not None}

    def predict(self, latents: Tensor, timesteps: Tensor, text: dict[str, Tensor]) -> Tensor:
        """The guided output of the UNet."""
        hidden, pooled = text["cond"], text.get("pooled")
        if self.guided:
            latents, timesteps = torch.cat([latents, latents]), torch.cat([timesteps, timesteps])
            hidden = torch.cat([text["uncond"], hidden])
            pooled = None if pooled is None else torch.cat([text["pooled_uncond"], pooled])
        added = None
        if pooled is not None:
            side = float(self.side)
            ids = torch.tensor([side, side, 0.0, 0.0, side, side], device=self.device)
            added = {"text_embeds": pooled, "time_ids": ids.expand(len(pooled), -1)}
        with self.mixed():
            output = self.network(latents.to(self.dtype), timesteps, hidden, added_cond_kwargs=added).sample.float()
        return self.guide(output)

    def mixed(self):
        """The forward's precision."""
        return torch.autocast(self.device.type, self.dtype) if self.dtype != torch.float32 else nullcontext()

    def guide(self, output: Tensor) -> Tensor:
        """Put both branches together."""
        if not self.guided:
            return output
        uncond, cond = output.chunk(2)
        return uncond + self.settings.guidance_scale * (cond - uncond)

    def step(self, output: Tensor, timesteps: Tensor, latents: Tensor, following: Tensor | None = None):
        """One DDIM step (arXiv 2010.02502, equations 12 and 16) and the log-prob of its result, or of ``following``."""
        shape = (-1, *[1] * (latents.dim() - 1))
        alpha = self.alphas[timesteps].view(shape)
        alpha_next = self.alphas[(timesteps - self.stride).clamp(min=0)].view(shape)
        kind = self.scheduler.config.prediction_type
        if kind == "epsilon":
            noise = output
            original = (latents - (1 - alpha).sqrt() * noise) / alpha.sqrt()
        elif kind == "v_prediction":
            original = alpha.sqrt() * latents - (1 - alpha).sqrt() * output
            noise = alpha.sqrt() * output + (1 - alpha).sqrt() * latents
        else:
            original = output
            noise = (latents - alpha.sqrt() * original) / (1 - alpha).sqrt()
        sigma = self.settings.eta * ((1 - alpha_next) / (1 - alpha) * (1 - alpha / alpha_next)).sqrt()
        mean = alpha_next.sqrt() * original + (1 - alpha_next - sigma**2).clamp(min=0).sqrt() * noise
        if following is None:
            following = mean + sigma * torch.randn_like(mean)
        log_prob = -((following - mean) ** 2) / (2 * sigma**2) - sigma.log() - 0.5 * math.log(2 * math.pi)
        return following, log_prob.flatten(1).mean(1)

    def decode(self, latents: Tensor) -> np.ndarray:
        """Pictures uint8 (n, height, width, 3)."""
        vae = self.pipe.vae
        pictures = vae.decode((latents / vae.config.scaling_factor).to(vae.dtype)).sample.float()
        pictures = ((pictures / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
        return pictures.permute(0, 2, 3, 1).cpu().numpy()

    # --- training ------------------------------------------------------------------------------------------------------

    def score(self, images: np.ndarray, prompts: list[str]) -> np.ndarray:
        return np.asarray(self.reward(images, prompts), dtype=np.float64)

    def advantages(self, prompts: list[str], rewards: np.ndarray) -> Tensor:
        """Rewards normalised by the statistics of their prompt or of the batch, float32 (N,)."""
        for prompt, reward in zip(prompts, rewards, strict=True):
            self.history[prompt].append(reward)
        found = np.empty(len(rewards))
        for i, prompt in enumerate(prompts):
            known = self.history[prompt] if len(self.history[prompt]) >= 16 else rewards
            found[i] = (rewards[i] - np.mean(known)) / (np.std(known) + 1e-4)
        return torch.from_numpy(found).float()

    def update(self, samples: dict) -> dict[str, float]:
        """``updates`` optimizer steps, each over its share of the images and all of their timesteps."""
        n, steps = samples["log_probs"].shape
        images = torch.randperm(n)
        order = torch.stack([torch.randperm(steps) for _ in range(n)])
        timesteps = self.scheduler.timesteps.to(self.device)
        logged = defaultdict(list)
        for part in images.tensor_split(self.settings.updates):
            for chosen in part.split(self.settings.batch):
                text = {name: samples[name][chosen] for name in TEXT if name in samples}
                for j in range(steps):
                    t = order[chosen, j]
                    loss, terms = self.loss(
                        samples["latents"][chosen, t],
                        samples["latents"][chosen, t + 1],
                        timesteps[t],
                        samples["log_probs"][chosen, t],
                        samples["advantages"][chosen],
                        text,
                    )
                    self.backward(loss.sum() / (len(part) * steps))
                    for name, value in terms.items():
                        logged[name].append(value)
            self.optimizer_step()
        return {name: torch.cat(values).mean().item() for name, values in logged.items()}

    def loss(self, latents: Tensor, following: Tensor, timesteps: Tensor, old: Tensor, advantages: Tensor, text):
        """The clipped loss of n steps, float32 (n,), and what is logged of it."""
        _, log_prob = self.step(self.predict(latents, timesteps, text), timesteps, latents, following)
        ratio = (log_prob - old).exp()
        limit, clip = self.settings.advantage_clip, self.settings.clip_range
        advantages = advantages.clamp(-limit, limit)
        loss = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip))
        with torch.no_grad():
            clipped = ((ratio - 1).abs() > clip).float()
            terms = {"loss": loss.detach(), "clipfrac": clipped, "approx_kl": 0.5 * (log_prob - old) ** 2}
        return loss, terms

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def optimizer_step(self) -> None:
        torch.nn.utils.clip_grad_norm_(self.parameters, self.settings.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()


def settings_of(config) -> Settings:
    """The settings that do what a configuration of fastloop says, as far as the baseline can."""
    from fastloop.denoisers.parts import DTYPES

    return Settings(
        images=config.images_per_rollout,
        batch=config.memory.rollout_batch,
        updates=config.updates_per_rollout,
        steps=config.sampling.steps,
        eta=config.sampling.eta,
        guidance_scale=config.sampling.guidance_scale,
        clip_range=config.clip_range,
        lr=config.optimizer.lr,
        lora_rank=config.model.lora.rank if config.model.adapter == "lora" else 0,
        max_sequence_length=config.model.max_sequence_length,
        dtype=str(DTYPES[config.model.dtype]).removeprefix("torch."),
        gradient_checkpointing=bool(config.memory.gradient_checkpointing),
        seed=config.seed,
    )


TAKEN = (  # keys of a configuration that the baseline follows, and those of what stands around it
    *("prompts", "rewards", "eval", "iterations", "checkpoint", "tracking", "safety", "output_dir", "seed", "kernels"),
    *("prompts_per_step", "updates_per_rollout", "clip_range", "optimizer.lr", "memory", "engine.device"),
    *("sampling.steps", "sampling.eta", "sampling.guidance_scale", "model.path", "model.revision", "model.variant"),
    *("model.random_init", "model.adapter", "model.dtype", "model.lora.rank", "model.max_sequence_length"),
)


def refuse_what_it_has_not(config) -> None:
    """Raise ``UserError`` for a key of fastloop that asks for something else than what the baseline does in its place."""
    from fastloop.errors import UserError
    from fastloop.rundir import flat

    rest = {"model": config.model.model_dump(include={"path", "random_init"}), "rewards": config.rewards}
    plain = type(config).model_validate({"algorithm": "ppo", "images_per_prompt": 1, **rest})
    does, asked = (flat(of.model_dump(mode="json")) for of in (plain, config))
    for key, value in asked.items():
        if value != does.get(key) and not any(key == taken or key.startswith(f"{taken}.") for taken in TAKEN):
            raise UserError(f"{key}: {value}, which the plain trainer, bench/baseline_ppo.py, does not do: leave it out")


def load_pipeline(config, device: torch.device):
    """fastloop's parts of a model (its ModelConfig) in diffusers' own pipeline class, with DDIM's scheduler, or a flow's."""
    from fastloop.denoisers import load_denoiser

    return pipeline_of(load_denoiser(config, device))


def pipeline_of(denoiser):
    """The modules of fastloop's denoiser, which share what is trained, as `load_pipeline` has them."""
    import diffusers

    from fastloop.denoisers.files import model_source, read_json

    config = denoiser.config
    denoiser.network.to(memory_format=torch.contiguous_format)  # channels_last is fastloop's choice
    values = read_json(model_source(config), config, "scheduler_config.json", "scheduler")
    flow = denoiser.network_name == "transformer"
    scheduler = (diffusers.FlowMatchEulerDiscreteScheduler if flow else diffusers.DDIMScheduler).from_config(values)
    parts = {**denoiser.parts, **denoiser.tokenizers, **denoiser.absent}
    return denoiser.pipeline_class(**parts, scheduler=scheduler)


def main() -> int:
    from fastloop.config import ModelConfig, PromptsConfig, RewardConfig
    from fastloop.engines.torch import pick_device
    from fastloop.prompts import PromptStream, load_prompts
    from fastloop.rewards.scoring import Rewards

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="assets:shapes", help="as fastloop's model.path")
    parser.add_argument("--prompts", default="shapes_train", help="as fastloop's prompts.source")
    parser.add_argument("--reward", default="shapes", help="as a name in fastloop's rewards")
    parser.add_argument("--iterations", type=int, default=10)
    parser.add_argument(
        "--set", nargs="*", default=[], metavar="NAME=VALUE", help="settings: " + ", ".join(f.name for f in fields(Settings))
    )
    args = parser.parse_args()
    settings = Settings()
    for name, _, value in (text.partition("=") for text in args.set):
        settings = replace(settings, **{name: type(getattr(settings, name))(value)})
    prompts = load_prompts(PromptsConfig(source=args.prompts))
    dtype = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}[settings.dtype]
    config = ModelConfig(path=args.model, dtype=dtype, adapter="lora" if settings.lora_rank else "full")
    pipe = load_pipeline(config, pick_device("auto"))
    known = {prompt.text: prompt for prompt in prompts}
    trainer = BaselinePPO(pipe, lambda images, texts: rewards.score(images, [known[t] for t in texts]).total, settings)
    rewards = Rewards([RewardConfig(name=args.reward)], prompts, (trainer.side, trainer.side))
    stream = PromptStream(prompts, settings.seed)
    for i in range(args.iterations):
        started = time.perf_counter()
        drawn = stream.draw(i * settings.images, settings.images)
        found = trainer.iteration([prompt.text for prompt in drawn])
        row = "  ".join(f"{name} {value:.3g}" for name, value in found.items())
        print(f"[{i + 1}/{args.iterations}] {row}  {time.perf_counter() - started:.1f} s", flush=True)
    rewards.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
