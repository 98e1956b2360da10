"""What is refused before a run: everything that does not fit the machine, the ranks, the files or the model.

Nothing here loads weights. What passes is a `Checked`: the run's parts as far as they can be made without them.
"""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from fastloop import kernels
from fastloop.batches import Batches, trained_steps
from fastloop.checkpoints import list_checkpoints
from fastloop.compiling import with_compile
from fastloop.config import Config, MemoryConfig
from fastloop.denoisers import build_skeleton, make_trainable
from fastloop.denoisers.base import Denoiser
from fastloop.denoisers.weights import check_files
from fastloop.engines.deepspeed import deepspeed_problem, deepspeed_settings
from fastloop.engines.torch import pick_device
from fastloop.errors import UserError, one_line
from fastloop.machine import compiler_problem, flash_problem
from fastloop.memory.choosing import Chosen, choose, free_bytes, probed_factor, with_batches
from fastloop.memory.traces import Traced
from fastloop.optimizers import optimizer_problem
from fastloop.penalty import check_pictures
from fastloop.prompts import Prompt, load_prompts
from fastloop.ranks import ALONE, Ranks
from fastloop.recipes import load_config
from fastloop.rewards.scoring import Rewards
from fastloop.rollout import sampler_table
from fastloop.tracking import tracking_packages
from fastloop.transitions import TransitionTable


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
    cut: list[str]  # lines about prompts of which the model sees no end
    chosen: Chosen | None  # those that were chosen just now, and from what
    traced: Traced | None  # what they were chosen by; the skeleton is then its

    def batches(self, ranks: int) -> Batches:
        """Return the arithmetic of an iteration on so many ranks."""
        return Batches(self.config, self.steps_trained, ranks)


def check_device(config: Config, local_rank: int = 0) -> torch.device:
    """Return the device of a run, made the current one of its kind, since Triton launches on that.

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
    if config.model.compile not in (False, "auto") and (problem := compile_problem(config, device)):
        raise UserError(f"model.compile: {problem}; or set model.compile=false")
    return device


def compile_problem(config: Config, device: torch.device) -> str | None:
    """Say why a configuration cannot have its UNet compiled, with the remedy; ``None`` where it can."""
    if config.engine.zero_stage == 3:
        return "engine.zero_stage=3 gathers weights in hooks, which compiled code leaves out: set zero_stage=2"
    if config.model.attention == "xformers":
        return "xformers' operators are not compiled: set model.attention=sdpa"
    return compiler_problem(device)


def preflight(config: Config, ranks: Ranks = ALONE, resume: bool = False, gpu: bool = False) -> Checked:
    """Refuse what can be refused before the model loads, and choose batches by the free memory where they are ``auto``.

    Args:
        resume: whether a run may be in the folder, whose batches and whose ``model.compile`` are then kept where they are
            ``auto``. gpu: as for `plan`.

    Raises:
        UserError: whatever in the configuration does not fit the machine, the ranks, the files or the model.
    """
    asked = config.memory
    if ranks.world > 1 and config.engine.name == "torch" and not config.trains_noise:
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
    steps_trained = trained_steps(table, config)
    earlier = _earlier(config, ranks) if resume else None
    if config.model.compile == "auto" and earlier and earlier.model.compile != "auto":
        config = with_compile(config, earlier.model.compile if compile_problem(config, device) is None else False)
    skeleton = build_skeleton(config.model)
    if not config.model.random_init:
        check_files(skeleton.parts, skeleton.path, config.model)
    size = skeleton.image_size(config.sampling)
    try:
        sampler_table(config.model, config.eval_sampling)
        eval_size = skeleton.image_size(config.eval_sampling)
    except UserError as error:  # what training has in common with it has passed
        raise UserError(f"eval.{error}" if str(error).startswith("sampling.") else str(error)) from None
    if config.export.format == "kohya" and not skeleton.kohya_names:
        raise UserError(f"export.format: kohya has no names for a {skeleton.pipeline_class.__name__}: set it to diffusers")
    if config.dlpo.data is not None:
        check_pictures(config.dlpo.data, prompts, skeleton, config.sampling)
    tokenizers = skeleton.read_tokenizers(skeleton.path, config.model, skeleton.text_encoders)
    config = _with_chunks(config, skeleton, [prompt.text for prompt in (*prompts, *eval_prompts)], tokenizers)
    cut = _cut_lines(config, skeleton, {"prompts": prompts, "eval.prompts": eval_prompts}, tokenizers)
    checkpoints = Path(config.output_dir).expanduser() / "checkpoints"
    make_trainable(skeleton, config, fresh=not (resume and ranks.from_main(lambda: list_checkpoints(checkpoints))))
    texts = distinct_texts(config, prompts, eval_prompts)
    config, chosen, traced = _settle(config, skeleton, steps_trained, texts, device, ranks, earlier, gpu)
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
        eval_rewards=Rewards(own or config.rewards, eval_prompts, eval_size, eval_key, share=rewards),
        table=table,
        steps_trained=steps_trained,
        skeleton=skeleton,
        config=config,
        asked=asked,
        cut=cut,
        chosen=chosen,
        traced=traced,
    )


def _with_chunks(config: Config, skeleton: Denoiser, texts: list[str], tokenizers: dict) -> Config:
    """The configuration with as many chunks as the longest text has, where it asks for them; and the skeleton with it."""
    lists = {"prompts": config.prompts, "eval.prompts": config.eval.prompts}
    if not (asked := [key for key, of in lists.items() if of.too_long == "chunk"]):
        return config
    if not skeleton.chunks_texts:
        raise UserError(f"{asked[0]}.too_long: chunk is for Stable Diffusion 1.x, 2.x and XL: set it to warn")
    negative = [config.sampling.negative_prompt, config.eval_sampling.negative_prompt]
    most = max(config.model.prompt_chunks, skeleton.chunks([*texts, *negative], tokenizers))
    config = config.model_copy(update={"model": config.model.model_copy(update={"prompt_chunks": most})})
    skeleton.config = config.model
    return config


def _cut_lines(config: Config, skeleton: Denoiser, lists: dict[str, list[Prompt]], tokenizers: dict) -> list[str]:
    """Lines about prompts that are too long for the model. Raises ``UserError`` where ``too_long`` is error."""
    lines = []
    for key, prompts in lists.items():
        texts = list(dict.fromkeys(prompt.text for prompt in prompts))
        if not (cut := skeleton.cut(texts, tokenizers)):
            continue
        said = (
            f"{len(cut)} of {len(texts)} have more tokens than the text encoders take, so that the model does not see their "
            f"end, which rewards do: {one_line(cut[0])[:120]!r}"
        )
        if (config.prompts if key == "prompts" else config.eval.prompts).too_long == "error":
            raise UserError(f"{key}.too_long: {said}: shorten them, or set it to warn or chunk")
        lines.append(f"{key}: {said}")
    return lines


def _earlier(config: Config, ranks: Ranks) -> Config | None:
    """The configuration of the run that is resumed, if there is one and something of it is to be kept."""
    path = Path(config.output_dir).expanduser() / "config.yaml"
    if not config.memory.automatic and config.model.compile != "auto":
        return None
    return ranks.from_main(lambda: load_config(path) if path.exists() else None)


def _settle(config: Config, skeleton: Denoiser, steps_trained, texts: int, device, ranks: Ranks, earlier, gpu: bool):
    """The configuration with numbers for batches that are ``auto``: those of the run that is resumed, else those that fit.

    Returns:
        The configuration; and, where they were chosen now, what was `Chosen` and the trace that it was chosen by.
    """
    if not config.memory.automatic:
        return config, None, None
    if earlier and not earlier.memory.automatic:
        kept = {name: getattr(earlier.memory, name) for name in config.memory.automatic}
        return config.model_copy(update={"memory": config.memory.model_copy(update=kept)}), None, None
    on_gpu, batches = gpu or device.type == "cuda", Batches(config, steps_trained, ranks.world)
    traced = Traced(config, skeleton, accumulates=True, on_gpu=on_gpu)
    free = free_bytes(device, int(os.environ.get("LOCAL_WORLD_SIZE", ranks.world)))
    chosen = choose(batches, traced, texts, ranks, on_gpu, free)
    return with_batches(config, chosen), chosen, traced


def confirm(checked: Checked, denoiser: Denoiser, ranks: Ranks) -> tuple[Config, dict[str, float]]:
    """Check chosen batches by a probe on the real model: smaller ones are chosen where it needs more than was traced.

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


def distinct_texts(config: Config, prompts: list[Prompt], eval_prompts: list[Prompt]) -> int:
    """Count the texts that a run encodes, at most: its prompts, the held-out ones and the negative prompts."""
    drawn = min(len({prompt.text for prompt in prompts}), config.iterations * config.prompts_per_step)
    negative = {config.sampling.negative_prompt, config.eval_sampling.negative_prompt}
    return drawn + len({prompt.text for prompt in eval_prompts}) + len(negative)
