"""What a run will do and need, before anything is loaded: derived numbers, parameters, memory by part."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch.overrides import TorchFunctionMode

from fastloop import kernels
from fastloop.config import Config
from fastloop.denoisers import build_skeleton
from fastloop.denoisers.sd import DTYPES, StableDiffusion
from fastloop.engines.deepspeed import deepspeed_problem, deepspeed_settings
from fastloop.engines.torch import pick_device
from fastloop.errors import UserError
from fastloop.optimizers import optimizer_problem, state_bytes
from fastloop.prompts import Prompt, load_prompts
from fastloop.ranks import ALONE, Ranks
from fastloop.rewards import Rewards
from fastloop.rollout import kept_steps, sampler_table, trained_steps
from fastloop.tracking import tracking_packages
from fastloop.transitions import TransitionTable


def derived_lines(config: Config, steps_trained: torch.Tensor, world: int = 1) -> list[str]:
    """The arithmetic of an iteration, as the trainer runs it on so many ranks."""
    n, kept = config.images_per_rollout, kept_steps(steps_trained, config.timestep_fraction)
    pairs = n * kept
    per_pass = config.updates_per_rollout // config.passes_per_rollout
    per_update = sorted({len(part) for part in torch.arange(pairs).tensor_split(per_pass)})
    micro = math.ceil(per_update[-1] / (world * config.memory.update_batch))
    branches = 1 if config.sampling.guidance_scale == 1 else 2
    rollout_forwards = branches * config.sampling.steps
    update_forwards = branches * kept * config.passes_per_rollout
    return [
        f"algorithm    {config.algorithm}: advantage {config.advantage}, objective {config.objective}",
        *([f"engine       {_engine_text(config)}"] if config.engine.name == "deepspeed" else []),
        f"rollout      {config.prompts_per_step} prompts x {config.images_per_prompt} images = {n} trajectories of "
        f"{config.sampling.steps} steps, at most {min(config.memory.rollout_batch, n)} at a time",
        f"pairs        {n} trajectories x {kept} of {len(steps_trained)} trainable steps = {pairs} a pass, "
        f"{config.passes_per_rollout} pass{'es' if config.passes_per_rollout > 1 else ''}",
        f"updates      {config.updates_per_rollout} optimizer steps of {' or '.join(map(str, per_update))} pairs, each in "
        f"{micro} micro-batch{'es' if micro > 1 else ''} of at most {min(config.memory.update_batch, per_update[-1])}",
        f"work         per image: {rollout_forwards} UNet forwards in the rollout, {update_forwards} forwards and backwards "
        f"in the updates",
        f"in all       {config.iterations} iterations, {config.iterations * n:,} images, "
        f"{config.iterations * config.updates_per_rollout:,} optimizer steps",
    ]


def _engine_text(config: Config) -> str:
    engine = config.engine
    parts = [f"DeepSpeed, ZeRO {engine.zero_stage}"]
    if engine.rollout_parameters == "gathered":
        parts.append("weights whole on every rank during a rollout")
    if engine.rollout_parameters == "layerwise":
        parts.append("weights gathered a layer at a time in a rollout")
    if engine.offload_optimizer:
        parts.append(f"optimizer{' and weights' * engine.offload_parameters} in the CPU's memory")
    return ", ".join(parts)


def largest_update(config: Config, steps_trained: torch.Tensor) -> int:
    """(trajectory, timestep) pairs of the largest update."""
    pairs = config.images_per_rollout * kept_steps(steps_trained, config.timestep_fraction)
    return -(-pairs * config.passes_per_rollout // config.updates_per_rollout)


def plan(config: Config) -> list[str]:
    """Lines of text for a configuration. Reads configs and prompts, loads no weights.

    Raises:
        UserError: whatever `fastloop train` would refuse before it loads the model.
    """
    checked = check(config)
    checked.rewards.close()
    checked.eval_rewards.close()
    height, width = checked.skeleton.image_size(config.sampling)
    return [
        f"model        {config.model.path}, {config.model.adapter}, {config.model.dtype}, {width} x {height} pixels",
        f"prompts      {len(checked.prompts)} for training, {len(checked.eval_prompts)} for evaluation",
        *derived_lines(config, checked.steps_trained),
        "",
        *_memory_lines(config, checked.skeleton, checked.steps_trained),
    ]


@dataclass(frozen=True)
class Checked:
    """What a configuration comes to on this machine, with these files and this model, before any weights are loaded."""

    device: torch.device
    prompts: list[Prompt]
    eval_prompts: list[Prompt]
    rewards: Rewards
    eval_rewards: Rewards
    table: TransitionTable
    steps_trained: torch.Tensor  # int64, indices into the table
    skeleton: StableDiffusion  # with what is trained, on the meta device


def check_device(config: Config, local_rank: int = 0) -> torch.device:
    """The device of a run, made the current one of its kind, since Triton launches on that.

    Raises:
        UserError: this machine lacks it, or it cannot run the kernels asked for.
    """
    device = pick_device(config.engine.device, local_rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    try:
        kernels.choose(config.kernels, device)
    except ValueError as error:
        raise UserError(str(error)) from None
    return device


def check(config: Config, ranks: Ranks = ALONE) -> Checked:
    """Everything that can be refused before the model loads.

    Raises:
        UserError: whatever in the configuration does not fit the machine, the ranks, the files or the model.
    """
    if ranks.world > 1 and config.engine.name == "torch":
        raise UserError(f"engine.name: torch is for one process, the launcher started {ranks.world}: set it to deepspeed")
    if ranks.world > 1 and ":" in config.engine.device:
        raise UserError(f"engine.device: {config.engine.device} for {ranks.world} processes: set auto, one GPU for each")
    device = check_device(config, ranks.local_rank)
    if config.engine.name == "deepspeed" and (problem := deepspeed_problem(config, device)):
        raise UserError(problem)
    if problem := optimizer_problem(config.optimizer.name, device):
        raise UserError(f"optimizer.name: {problem}")
    tracking_packages(config.tracking.tensorboard, config.tracking.wandb)
    prompts = load_prompts(config.prompts)
    eval_prompts = load_prompts(config.eval.prompts, "eval.prompts")
    table = sampler_table(config.model, config.sampling)
    if config.eval.steps is not None:
        sampler_table(config.model, config.sampling, config.eval.steps)
    steps_trained = trained_steps(table, config)
    skeleton = build_skeleton(config.model)
    size = skeleton.image_size(config.sampling)
    skeleton.train_adapter(config.memory.gradient_checkpointing, seed=config.seed)
    if config.engine.name == "deepspeed":
        deepspeed_settings(config, ranks.world, largest_update(config, steps_trained), 1)
    own = config.eval.rewards
    rewards = Rewards(config.rewards, prompts, size, normalize=True)
    eval_key = "eval.rewards" if own else "rewards, on eval.prompts"
    return Checked(
        device=device,
        prompts=prompts,
        eval_prompts=eval_prompts,
        rewards=rewards,
        eval_rewards=Rewards(own or config.rewards, eval_prompts, size, eval_key, share=rewards),
        table=table,
        steps_trained=steps_trained,
        skeleton=skeleton,
    )


def _memory_lines(config: Config, skeleton: StableDiffusion, steps_trained: torch.Tensor) -> list[str]:
    """Memory by part, in bytes counted from shapes."""
    lines = ["parameters"]
    trained = sum(p.numel() for p in skeleton.trainable().values())
    for name, module in (("unet", skeleton.unet), ("text encoder", skeleton.text_encoder), ("vae", skeleton.vae)):
        added = trained if name == "unet" and config.model.adapter == "lora" else 0
        lines.append(f"  {name:<14}{sum(p.numel() for p in module.parameters()) - added:>15,}")
    lines.append(f"  {'trained':<14}{trained:>15,}")
    shape = skeleton.latent_shape(config.sampling.height, config.sampling.width)
    batch = min(config.memory.update_batch, largest_update(config, steps_trained))
    modules = (skeleton.unet, skeleton.text_encoder, skeleton.vae)
    parts = {
        "weights": sum(p.numel() * p.element_size() for module in modules for p in module.parameters()),
        "gradients": 4 * trained,
        "optimizer": state_bytes(config.optimizer.name, (p.numel() for p in skeleton.trainable().values())),
        "moving average": 4 * trained if config.ema.decay else 0,
        "KL reference": 4 * trained if config.kl.weight and config.model.adapter == "full" else 0,
        "trajectories": 4 * (config.sampling.steps + 1) * config.images_per_rollout * math.prod(shape),
        f"activations of {batch} pairs": activation_bytes(skeleton, config, batch),
    }
    lines += ["memory", *(f"  {name:<26}{_size(size):>12}" for name, size in parts.items() if size)]
    lines.append(f"  {'sum':<26}{_size(sum(parts.values())):>12}")
    lines.append("  not counted: work space of operators, decoding, the allocator's slack, the reward's own model")
    lines.append("activations by memory.gradient_checkpointing")
    for choice, switch in (("false", "disable"), ("true", "enable")):
        getattr(skeleton.unet, f"{switch}_gradient_checkpointing")()
        lines.append(f"  {choice:<26}{_size(activation_bytes(skeleton, config, batch)):>12}")
    return lines


def activation_bytes(skeleton, config: Config, batch: int) -> int:
    """Bytes that autograd keeps for the backward of one micro-batch of pairs, weights not counted."""
    sampling = config.sampling
    tokens, width = skeleton.text_encoder.config.max_position_embeddings, skeleton.unet.config.cross_attention_dim
    text = torch.empty(batch, tokens, width, device="meta")
    latents = torch.empty(batch, *skeleton.latent_shape(sampling.height, sampling.width), device="meta")
    timesteps = torch.empty(batch, dtype=torch.int64, device="meta")
    skeleton.unet.to(DTYPES[config.model.dtype])
    weights = {p.untyped_storage()._cdata for p in skeleton.unet.parameters()}
    kept: dict[int, torch.Tensor] = {}  # by storage, so that views count once; holding the tensors keeps storages apart

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()._cdata
        if storage not in weights:
            kept[storage] = tensor
        return tensor

    with _FusedAttention(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        skeleton.predict(latents, timesteps, text, None if sampling.guidance_scale == 1 else text)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


class _FusedAttention(TorchFunctionMode):
    """Attention that keeps what the fused operators of real devices keep; on meta, PyTorch keeps the whole matrices."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.nn.functional.scaled_dot_product_attention:
            return _Attention.apply(*args[:3])
        return func(*args, **(kwargs or {}))


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value):
        output, log_sums = torch.empty_like(query), query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, output, log_sums)
        return output


def _size(size: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.2f} GiB"
