"""What a run will do and need, before anything is loaded: derived numbers, parameters, memory by part."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from fastloop import kernels
from fastloop.batches import Batches, trained_steps
from fastloop.config import Config, MemoryConfig
from fastloop.denoisers import build_skeleton
from fastloop.denoisers.base import Denoiser
from fastloop.engines.deepspeed import deepspeed_problem, deepspeed_settings
from fastloop.engines.torch import pick_device
from fastloop.errors import UserError
from fastloop.machine import compiler_problem, flash_problem
from fastloop.memory import Chosen, Estimate, Traced, choose, estimate, free_bytes, probed_factor, with_batches
from fastloop.optimizers import optimizer_problem
from fastloop.prompts import Prompt, load_prompts, prompt_facts
from fastloop.ranks import ALONE, Ranks
from fastloop.recipes import load_config
from fastloop.rewards import Rewards
from fastloop.rollout import sampler_table
from fastloop.tracking import tracking_packages
from fastloop.transitions import TransitionTable


def derived_lines(batches: Batches) -> list[str]:
    """The arithmetic of an iteration, as the trainer runs it."""
    config, n, kept, micro = batches.config, batches.config.images_per_rollout, batches.kept, batches.micro_batches
    branches = 1 if config.sampling.guidance_scale == 1 else 2
    rollout_forwards = branches * config.sampling.steps
    update_forwards = branches * kept * config.passes_per_rollout
    return [
        f"algorithm    {config.algorithm}: advantage {config.advantage}, objective {config.objective}",
        *([f"engine       {_engine_text(config)}"] if config.engine.name == "deepspeed" else []),
        f"rollout      {config.prompts_per_step} prompts x {config.images_per_prompt} images = {n} trajectories of "
        f"{config.sampling.steps} steps, at most {min(config.memory.rollout_batch, n)} at a time",
        f"pairs        {n} trajectories x {kept} of {len(batches.steps)} trainable steps = {batches.rows} a pass, "
        f"{config.passes_per_rollout} pass{'es' if config.passes_per_rollout > 1 else ''}",
        f"updates      {config.updates_per_rollout} optimizer steps of "
        f"{' or '.join(map(str, sorted(set(batches.update_rows))))} pairs, each in "
        f"{micro} micro-batch{'es' if micro > 1 else ''} of at most "
        f"{min(config.memory.update_batch, batches.largest_update)}",
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


def plan(config: Config, ranks: int = 1, gpu: bool = False, it_per_s: float | None = None) -> list[str]:
    """Lines of text for a configuration. Reads configs and prompts, loads no weights.

    Args:
        ranks: processes of the run. gpu: plan for a GPU, though there is none here. it_per_s: UNet forwards a second at
            batch 1, for an estimate of the time.

    Raises:
        UserError: whatever `fastloop train` would refuse before it loads the model.
    """
    if ranks > 1 and config.engine.name == "torch":
        raise UserError(f"--ranks: {ranks}, but engine.name=torch is for one process: set engine.name=deepspeed")
    checked = check(config, gpu=gpu)
    config = checked.config
    checked.rewards.close()
    checked.eval_rewards.close()
    lines = overview(checked, ranks)
    lines += [] if it_per_s is None else time_lines(checked.batches(ranks), it_per_s)
    lines += ["", *_parameter_lines(config, checked.skeleton)]
    return lines + _memory_lines(config, checked, ranks, gpu or checked.device.type == "cuda")


def overview(checked: Checked, ranks: int = 1) -> list[str]:
    """The model, the prompts and the arithmetic of an iteration."""
    config = checked.config
    height, width = checked.skeleton.image_size(config.sampling)
    name = config.model.path or f"{config.model.random_init} with random weights"
    return [
        f"model        {name}, {config.model.adapter}, {config.model.dtype}, {width} x {height} pixels",
        prompts_line(checked.prompts, checked.eval_prompts),
        *derived_lines(checked.batches(ranks)),
    ]


def prompts_line(prompts: list[Prompt], eval_prompts: list[Prompt]) -> str:
    """How many prompts there are, and whether those of the evaluation are trained on."""
    facts = prompt_facts(prompts, eval_prompts)["eval.prompts"]
    shared, distinct = facts["trained_too"], facts["distinct"]
    line = f"prompts      {len(prompts)} for training, {len(eval_prompts)} for evaluation"
    if not shared:
        return line
    which = "all of them" if shared == distinct else f"{shared} of these {distinct}"
    return f"{line}, {which} training prompts too: the score is not held out (set eval.prompts.source to others)"


def time_lines(batches: Batches, it_per_s: float) -> list[str]:
    """Seconds of an iteration in the UNet, from its forwards a second at batch 1.

    A backward costs two forwards, or one where only adapters are trained, since the frozen weights get no gradients;
    checkpointing adds the forward that is done again. Rewards, decoding and the optimizer are not in it.
    """
    config, n, kept, ranks = batches.config, batches.config.images_per_rollout, batches.kept, batches.world
    branches = 1 if config.sampling.guidance_scale == 1 else 2
    backward = (1 if config.model.adapter == "lora" else 2) + (1 if config.memory.gradient_checkpointing else 0)
    rollout = n * config.sampling.steps * branches / (it_per_s * ranks)
    update = n * kept * config.passes_per_rollout * branches * (1 + backward) / (it_per_s * ranks)
    if config.kl.weight:
        update *= (2 + backward) / (1 + backward)
    return [
        f"time         at {it_per_s:g} forwards/s: {rollout:.1f} s rollout + {update:.1f} s update = {rollout + update:.1f} s "
        f"an iteration, {n / (rollout + update):.3g} images/s, {config.iterations * (rollout + update) / 3600:.1f} h in all"
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
    skeleton: Denoiser  # with what is trained, on the meta device
    config: Config  # with numbers where it had `auto`
    asked: MemoryConfig  # as it was given
    chosen: Chosen | None  # those that were chosen just now, and from what
    traced: Traced | None  # what they were chosen by; the skeleton is then its

    def batches(self, ranks: int) -> Batches:
        """The arithmetic of an iteration on so many ranks."""
        return Batches(self.config, self.steps_trained, ranks)


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
    if config.model.attention == "flash" and (problem := flash_problem(config.model.dtype, device)):
        raise UserError(f"model.attention: {problem}; or set model.attention=sdpa")
    if config.model.compile and (problem := _compile_problem(config, device)):
        raise UserError(f"model.compile: {problem}; or set model.compile=false")
    return device


def _compile_problem(config: Config, device: torch.device) -> str | None:
    """Why a configuration cannot have its UNet compiled, with the remedy."""
    if config.engine.zero_stage == 3:
        return "engine.zero_stage=3 gathers weights in hooks, which compiled code leaves out: set zero_stage=2"
    if config.model.attention == "xformers":
        return "xformers' operators are not compiled: set model.attention=sdpa"
    return compiler_problem(device)


def check(config: Config, ranks: Ranks = ALONE, resume: bool = False, gpu: bool = False) -> Checked:
    """Everything that can be refused before the model loads; and the batches that are chosen by the free memory.

    Args:
        resume: whether a run may be in the folder, whose batches are then kept. gpu: as for `plan`.

    Raises:
        UserError: whatever in the configuration does not fit the machine, the ranks, the files or the model.
    """
    asked = config.memory
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
    texts = distinct_texts(config, prompts, eval_prompts)
    config, chosen, traced = _settle(config, skeleton, steps_trained, texts, device, ranks, resume, gpu)
    if config.engine.name == "deepspeed":
        deepspeed_settings(Batches(config, steps_trained, ranks.world), 1)
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
        config=config,
        asked=asked,
        chosen=chosen,
        traced=traced,
    )


def _settle(config: Config, skeleton: Denoiser, steps_trained, texts: int, device, ranks: Ranks, resume: bool, gpu: bool):
    """The configuration with numbers for batches that are ``auto``: those of the run that is resumed, else those that fit.

    Returns:
        The configuration; and, where they were chosen now, what was `Chosen` and the trace that it was chosen by.
    """
    if not config.memory.automatic:
        return config, None, None
    folder = Path(config.output_dir).expanduser()
    earlier = ranks.from_main(
        lambda: load_config(folder / "config.yaml") if resume and (folder / "config.yaml").exists() else None
    )
    if earlier and not earlier.memory.automatic:
        kept = {name: getattr(earlier.memory, name) for name in config.memory.automatic}
        return config.model_copy(update={"memory": config.memory.model_copy(update=kept)}), None, None
    on_gpu, batches = gpu or device.type == "cuda", Batches(config, steps_trained, ranks.world)
    traced = Traced(config, skeleton, accumulates=True, on_gpu=on_gpu)
    free = free_bytes(device, int(os.environ.get("LOCAL_WORLD_SIZE", ranks.world)))
    chosen = choose(batches, traced, texts, ranks, on_gpu, free)
    return with_batches(config, chosen), chosen, traced


def confirm(checked: Checked, denoiser: Denoiser, ranks: Ranks) -> tuple[Config, dict[str, float]]:
    """Chosen batches checked by a probe on the real model: smaller ones where it needs more than was traced.

    Returns:
        The configuration, and facts for run.json: what was free, planned, and the probe's factor.
    """
    config, chosen, traced = checked.config, checked.chosen, checked.traced
    factor = float(ranks.gather(np.array(probed_factor(denoiser, config, traced))).max())
    if factor > 1.0:
        texts = distinct_texts(config, checked.prompts, checked.eval_prompts)
        auto = config.model_copy(update={"memory": checked.asked})
        on_gpu = checked.device.type == "cuda"
        batches = Batches(auto, checked.steps_trained, ranks.world)
        chosen = choose(batches, traced, texts, ranks, on_gpu, chosen.free, factor)
    return with_batches(config, chosen), asdict(chosen) | {"probed_factor": factor}


def _parameter_lines(config: Config, skeleton: Denoiser) -> list[str]:
    lines = ["parameters"]
    trained = sum(p.numel() for p in skeleton.trainable().values())
    for name, module in skeleton.parts.items():
        own = [p for p in module.parameters() if config.model.adapter == "full" or not p.requires_grad]  # without adapters
        lines.append(f"  {name.replace('_', ' '):<15}{sum(p.numel() for p in own):>15,}")
    lines.append(f"  {'trained':<15}{trained:>15,}")
    return lines


def memory(config: Config, ranks: int = 1, gpu: bool = False) -> Estimate:
    """Memory of an iteration on one rank; raises and reads what `plan` does."""
    checked = check(config, gpu=gpu)
    checked.rewards.close()
    checked.eval_rewards.close()
    return _estimate(checked.config, checked, ranks, gpu or checked.device.type == "cuda")[0]


def _estimate(config: Config, checked: Checked, ranks: int, on_gpu: bool) -> tuple[Estimate, Traced]:
    batches = Batches(config, checked.steps_trained, ranks)
    traced = checked.traced or Traced(config, checked.skeleton, batches.micro_batches > 1, on_gpu)
    texts = distinct_texts(config, checked.prompts, checked.eval_prompts)
    return estimate(batches, traced, texts, on_gpu), traced


def distinct_texts(config: Config, prompts: list[Prompt], eval_prompts: list[Prompt]) -> int:
    """Texts that a run encodes, at most: its prompts, the held-out ones and the negative prompt."""
    drawn = min(len({prompt.text for prompt in prompts}), config.iterations * config.prompts_per_step)
    return drawn + len({prompt.text for prompt in eval_prompts}) + 1


def _memory_lines(config: Config, checked: Checked, ranks: int, on_gpu: bool) -> list[str]:
    """Memory by part and by phase."""
    found, traced = _estimate(config, checked, ranks, on_gpu)
    lines = ["memory" + (" of one rank" if ranks > 1 else "") + ("" if on_gpu else " (of the CPU; --gpu: of a GPU)")]
    lines += [f"  {name:<26}{size_text(size):>12}" for name, size in found.parts.items()]
    lines += ["peak by phase"]
    lines += [f"  {name:<26}{size_text(size):>12}" for name, size in found.phases.items()]
    lines.append(f"  {'peak':<26}{size_text(found.peak):>12}")
    if found.host:
        lines += ["in the host's memory", *(f"  {name:<26}{size_text(size):>12}" for name, size in found.host.items())]
    lines.append("not counted: work space of operators, the allocator's slack, the reward's own model")
    lines.append("activations by memory.gradient_checkpointing")
    batch = Batches(config, checked.steps_trained, ranks).update
    own = traced.update
    for choice in (False, True):
        getattr(checked.skeleton.unet, f"{'enable' if choice else 'disable'}_gradient_checkpointing")()
        traced.update = own if config.memory.gradient_checkpointing is choice else traced.new_update()
        lines.append(f"  {str(choice).lower():<26}{size_text(traced.activations(batch)):>12}")
    return lines


def size_text(size: float) -> str:
    """Bytes for people: 1.2 MiB."""
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.2f} GiB"
