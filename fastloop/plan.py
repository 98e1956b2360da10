"""What a run will do and need, in lines of text, before anything is loaded: derived numbers, parameters, memory by part."""

from __future__ import annotations

from fastloop.algorithms import ALGORITHMS
from fastloop.batches import Batches, evaluation_batch
from fastloop.compiling import planned_line
from fastloop.config import Config
from fastloop.denoisers.base import Denoiser
from fastloop.denoisers.quantised import packed_away
from fastloop.errors import UserError
from fastloop.losses import update_sampling
from fastloop.memory.estimates import MemoryNeeds, memory_needs
from fastloop.memory.traces import Traced
from fastloop.objectives import OBJECTIVES
from fastloop.preflight import Checked, compile_problem, distinct_texts, preflight
from fastloop.prompts import Prompt, prompt_facts

CARDS = (8, 12, 16, 24, 32, 40, 48, 80, 96, 141, 180)  # GiB of memory of GPUs, about


def plan(config: Config, ranks: int = 1, gpu: bool = False, it_per_s: float | None = None) -> list[str]:
    """Write lines of text about a configuration. Reads configs and prompts, loads no weights.

    Args:
        ranks: processes of the run. gpu: plan for a GPU, though there is none here. it_per_s: UNet forwards a second at
            batch 1, for an estimate of the time.

    Raises:
        UserError: whatever `fastloop train` would refuse before it loads the model.
    """
    if ranks > 1 and config.engine.name == "torch" and not config.trains_noise:
        raise UserError(f"--ranks: {ranks}, but engine.name=torch is for one process: set engine.name=deepspeed")
    checked = preflight(config, gpu=gpu)
    config = checked.config
    checked.rewards.close()
    checked.eval_rewards.close()
    lines = overview(checked, ranks)
    lines += [] if it_per_s is None else time_lines(checked.batches(ranks), it_per_s)
    if config.model.compile == "auto":
        seconds = None if it_per_s is None else sum(network_seconds(checked.batches(ranks), it_per_s))
        problem = None if gpu else compile_problem(config, checked.device)
        lines.append(planned_line(config, checked.batches(ranks), checked.skeleton, problem, seconds))
    lines += ["", *_parameter_lines(config, checked.skeleton)]
    return lines + _memory_lines(config, checked, ranks, gpu or checked.device.type == "cuda")


def overview(checked: Checked, ranks: int = 1) -> list[str]:
    """Write lines about the model, the prompts and the arithmetic of an iteration."""
    config = checked.config
    height, width = checked.skeleton.image_size(config.sampling)
    name = config.model.path or f"{config.model.random_init} with random weights"
    trained = "as it is" if config.trains_noise else config.model.adapter
    return [
        f"model        {name}, {trained}, {config.model.dtype}, {_held_text(config)}{width} x {height} pixels",
        *caution_lines(checked.skeleton),
        prompts_line(checked.prompts, checked.eval_prompts),
        *(f"warning      {line}" for line in checked.cut),
        *derived_lines(checked.batches(ranks), checked.skeleton),
    ]


def caution_lines(denoiser: Denoiser) -> list[str]:
    """Write what speaks against training this model, and what is taken otherwise than its files say."""
    cautions = [] if denoiser.caution is None else [f"warning      {denoiser.caution}"]
    return cautions + [f"note         {line}" for line in denoiser.notes]


def _held_text(config: Config) -> str:
    return f"frozen weights in {config.model.base_precision}, " if config.model.base_precision else ""


def derived_lines(batches: Batches, denoiser: Denoiser) -> list[str]:
    """Write lines about the arithmetic of an iteration, as the trainer runs it."""
    config, n = batches.config, batches.config.images_per_rollout
    window = "" if config.sampling.noise_steps is None else ", noise in {} to {} of them".format(*config.sampling.noise_steps)
    return [
        f"algorithm    {config.algorithm}: advantage {config.advantage}, objective {config.objective}",
        *_settings_line(config),
        *([f"engine       {_engine_text(config)}"] if config.engine.name == "deepspeed" else []),
        f"rollout      {config.prompts_per_step} prompts x {config.images_per_prompt} images = {n} trajectories of "
        f"{config.sampling.steps} steps{window}, {batches.rollout} at a time"
        f"{_copies(batches.share, batches.rollout)}",
        *(_noise_update_lines(batches, denoiser) if config.trains_noise else _update_lines(batches)),
        *_evaluation_line(config, denoiser),
        f"in all       {config.iterations} iterations, {config.iterations * n:,} images, "
        f"{config.iterations * config.updates_per_rollout:,} optimizer steps",
    ]


def _noise_update_lines(batches: Batches, denoiser: Denoiser) -> list[str]:
    """Say what updates of a policy over the initial noise are."""
    config, weights = batches.config, sum(p.numel() for p in denoiser.trainable().values())
    rows, forwards = " or ".join(map(str, sorted(set(batches.update_rows)))), config.sampling.branches * config.sampling.steps
    return [
        f"policy       {weights:,} weights: from {denoiser.feature_size} features of a prompt to mean and spread of its noise",
        f"updates      {config.updates_per_rollout} optimizer steps of {rows} initial noises, of the policy alone",
        f"work         per image: {forwards} forwards in the rollout, none in the updates",
    ]


def _update_lines(batches: Batches) -> list[str]:
    """Say what updates of the network are."""
    config, kept, micro = batches.config, batches.kept, batches.micro_batches
    rollout_forwards = config.sampling.branches * config.sampling.steps + config.dlpo.denoises_drawn
    update_forwards = (update_sampling(config).branches + config.dlpo.gradient) * kept * config.passes_per_rollout
    update_forwards *= config.replay.rollouts
    of_each = f"{kept} of {len(batches.steps)} trainable steps"
    if not OBJECTIVES[config.objective].stored_steps:
        of_each = f"{kept} noise levels in timesteps {config.forward.window[0]} to {config.forward.window[1]}"
    kept_rollouts = config.replay.rollouts
    of_rollouts = f" of the newest {kept_rollouts} rollouts" if kept_rollouts > 1 else ""
    return [
        f"pairs        {batches.trajectories} trajectories{of_rollouts} x {of_each} = {batches.rows} a pass, "
        f"{config.passes_per_rollout} pass{'es' if config.passes_per_rollout > 1 else ''}",
        f"updates      {config.updates_per_rollout} optimizer steps of "
        f"{' or '.join(map(str, sorted(set(batches.update_rows))))} pairs, each in "
        f"{micro} micro-batch{'es' if micro > 1 else ''} of {batches.update}{_copies(batches.rows_of_rank, batches.update)}",
        f"work         per image: {rollout_forwards} forwards in the rollout, {update_forwards} forwards and backwards "
        f"in the updates{f', {update_forwards / config.kl.every:g} forwards for the KL' if config.kl.weight else ''}",
    ]


def _settings_line(config: Config) -> list[str]:
    """Say what else the algorithm sets, as far as the file has left it."""
    sections = ALGORITHMS[config.algorithm].settings
    brought = [(section, key, value) for section, settings in sections.items() for key, value in settings.items()]
    left = [
        f"{section}.{key}={value:g}" if isinstance(value, float) else f"{section}.{key}={value}"
        for section, key, value in brought
        if getattr(getattr(config, section), key) == value
    ]
    return [f"             and, as the recipe leaves them to it, {', '.join(left)}"] if left else []


def _evaluation_line(config: Config, denoiser: Denoiser) -> list[str]:
    """Say how evaluations sample, where training samples otherwise."""
    own = config.eval_sampling
    if own == config.sampling:
        return []
    guidance = "no guidance" if own.branches == 1 else f"guidance {own.guidance_scale:g}"
    guidance += f" rescaled by {own.guidance_rescale:g}" if own.guidance_rescale else ""
    negative = f", negative prompt {own.negative_prompt!r}" if own.branches == 2 and own.negative_prompt else ""
    (height, width), training = denoiser.image_size(own), denoiser.image_size(config.sampling)
    size = "" if (height, width) == training else f", {width} x {height} pixels"
    batch = evaluation_batch(config, denoiser, config.memory.rollout_batch)
    return [f"evaluation   {own.steps} steps, eta {own.eta:g}, {guidance}{negative}{size}, {batch} at a time"]


def _copies(rows: int, size: int) -> str:
    """Say how many rows of the last call are copies, on one rank."""
    copies = -rows % size
    return f", the last filled up with {copies} cop{'ies' if copies > 1 else 'y'}" if copies else ""


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


def prompts_line(prompts: list[Prompt], eval_prompts: list[Prompt]) -> str:
    """Say how many prompts there are, and whether those of the evaluation are trained on."""
    facts = prompt_facts(prompts, eval_prompts)["eval.prompts"]
    shared, distinct = facts["trained_too"], facts["distinct"]
    line = f"prompts      {len(prompts)} for training, {len(eval_prompts)} for evaluation"
    if not shared:
        return line
    which = "all of them" if shared == distinct else f"{shared} of these {distinct}"
    return f"{line}, {which} training prompts too: the score is not held out (set eval.prompts.source to others)"


def network_seconds(batches: Batches, it_per_s: float) -> tuple[float, float]:
    """Estimate the seconds of rollout and updates in the UNet, from its forwards a second at batch 1; copies count too.

    A backward costs two forwards, or one where only adapters are trained, since the frozen weights get no gradients;
    checkpointing adds the forward that is done again. Rewards, decoding and the optimizer are not in it.
    """
    config = batches.config
    backward = (1 if config.model.adapter == "lora" else 2) + (1 if config.memory.gradient_checkpointing else 0)
    sampled, trained = -(-batches.share // batches.rollout) * batches.rollout, batches.micro_batches * batches.update
    rollout = sampled * (config.sampling.steps * config.sampling.branches + config.dlpo.denoises_drawn) / it_per_s
    if config.trains_noise:
        return rollout, 0.0
    branches = update_sampling(config).branches + config.dlpo.gradient
    update = trained * config.updates_per_rollout * branches * (1 + backward) / it_per_s
    if config.kl.weight:
        update *= (1 + 1 / config.kl.every + backward) / (1 + backward)
    return rollout, update


def time_lines(batches: Batches, it_per_s: float) -> list[str]:
    """Write what `network_seconds` estimates, and what follows for the run."""
    config, n = batches.config, batches.config.images_per_rollout
    rollout, update = network_seconds(batches, it_per_s)
    return [
        f"time         at {it_per_s:g} forwards/s: {rollout:.1f} s rollout + {update:.1f} s update = {rollout + update:.1f} s "
        f"an iteration, {n / (rollout + update):.3g} images/s, {config.iterations * (rollout + update) / 3600:.1f} h in all"
    ]


def _parameter_lines(config: Config, skeleton: Denoiser) -> list[str]:
    lines = ["parameters"]
    trained = sum(p.numel() for p in skeleton.trainable().values())
    for name, module in skeleton.parts.items():
        own = [p for p in module.parameters() if config.model.adapter == "full" or not p.requires_grad]  # without adapters
        lines.append(f"  {name.replace('_', ' '):<15}{sum(p.numel() for p in own) + packed_away(module):>15,}")
    lines.append(f"  {'trained':<15}{trained:>15,}")
    return lines


def planned_memory(config: Config, ranks: int = 1, gpu: bool = False) -> MemoryNeeds:
    """Estimate the memory of an iteration on one rank; raises and reads what `plan` does."""
    checked = preflight(config, gpu=gpu)
    checked.rewards.close()
    checked.eval_rewards.close()
    return _needs(checked.config, checked, ranks, gpu or checked.device.type == "cuda")[0]


def _needs(config: Config, checked: Checked, ranks: int, on_gpu: bool) -> tuple[MemoryNeeds, Traced]:
    batches = Batches(config, checked.steps_trained, ranks)
    traced = checked.traced or Traced(config, checked.skeleton, batches.micro_batches > 1, on_gpu)
    texts = distinct_texts(config, checked.prompts, checked.eval_prompts)
    return memory_needs(batches, traced, texts, on_gpu), traced


def _memory_lines(config: Config, checked: Checked, ranks: int, on_gpu: bool) -> list[str]:
    """Memory by part and by phase."""
    found, traced = _needs(config, checked, ranks, on_gpu)
    lines = ["memory" + (" of one rank" if ranks > 1 else "") + ("" if on_gpu else " (of the CPU; --gpu: of a GPU)")]
    lines += [f"  {name:<26}{size_text(size):>12}" for name, size in found.parts.items()]
    lines += ["peak by phase"]
    lines += [f"  {name:<26}{size_text(size):>12}" for name, size in found.phases.items()]
    lines.append(f"  {'peak':<26}{size_text(found.peak):>12}")
    if on_gpu:
        card = next((f"{gib} GB" for gib in CARDS if found.peak <= gib * 2**30), "none")
        lines.append(f"  {'smallest card with that':<26}{card:>12}")
    if found.host:
        lines += ["in the host's memory", *(f"  {name:<26}{size_text(size):>12}" for name, size in found.host.items())]
    lines.append("not counted: work space of operators, the allocator's slack, the reward's own model")
    if config.trains_noise:
        return lines
    lines.append("activations by memory.gradient_checkpointing")
    batch = Batches(config, checked.steps_trained, ranks).update
    own = traced.update
    for choice in (False, True):
        getattr(checked.skeleton.network, f"{'enable' if choice else 'disable'}_gradient_checkpointing")()
        traced.update = own if config.memory.gradient_checkpointing is choice else traced.new_update()
        lines.append(f"  {str(choice).lower():<26}{size_text(traced.activations(batch)):>12}")
    return lines


def size_text(size: float) -> str:
    """Write bytes for people: 1.2 MiB."""
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.2f} GiB"
