"""Which keys of a configuration go together. Each rule gives one line that names the key and the remedy."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastloop.advantages import ADVANTAGES
from fastloop.objectives import OBJECTIVES

if TYPE_CHECKING:  # which asks here
    from fastloop.config import Config


def problem(config: Config) -> str | None:
    """Find the first rule that a configuration breaks; ``None`` where it breaks none."""
    of_kind = _of_noise if config.trains_noise else _of_rows
    return _of_names(config) or _of_model(config) or _of_algorithm(config) or of_kind(config) or _of_engine(config)


def _changed(config: Config, section: str) -> str | None:
    """The first key of a section that is not as where it is left out."""
    part = config
    for name in section.split("."):
        part = getattr(part, name)
    default = type(part)()
    return next((f"{section}.{k}" for k in type(part).model_fields if getattr(part, k) != getattr(default, k)), None)


def _of_names(config: Config) -> str | None:
    for key, known in (("advantage", ADVANTAGES), ("objective", OBJECTIVES)):
        if getattr(config, key) not in known:
            return f"{key}: unknown name {getattr(config, key)!r}: one of {', '.join(known)}"
    return None


def _of_model(config: Config) -> str | None:
    model = config.model
    if config.sampling.guidance_rescale is not None:
        return (
            "sampling.guidance_rescale: a step is then not affine in the model's outputs and has no density to train: set "
            "eval.sampling.guidance_rescale"
        )
    if model.lora.text_encoders and model.adapter == "full":
        return "model.lora.text_encoders: model.adapter=full trains the UNet alone: set it to false, or model.adapter=lora"
    if model.lora.fuse and model.lora.path is None:
        return "model.lora.fuse: there is nothing to fuse: set model.lora.path, or leave it out"
    if model.lora.path is not None and model.adapter == "full" and not model.lora.fuse:
        return "model.lora.path: model.adapter=full trains no adapters: set model.lora.fuse=true, or model.adapter=lora"
    if model.clip_skip is not None and model.lora.text_encoders:
        return (
            "model.clip_skip: layers that are skipped would have adapters: set model.lora.text_encoders=false, or this to null"
        )
    if config.export.format == "kohya" and model.adapter == "full":
        return "export.format: kohya is a format of adapters: set model.adapter=lora, or format to diffusers"
    if model.base_precision and model.adapter == "full":
        return (
            f"model.base_precision: {model.base_precision} is for weights that stay as they are, and model.adapter=full "
            "trains them: set model.adapter=lora, or base_precision to null"
        )
    if model.random_init is None:
        return "model.path: no model: give assets:shapes, a folder, a file or a hub id" if model.path is None else None
    files = {key: getattr(model, key) for key in ("path", "revision", "variant")} | {"vae.path": model.vae.path}
    for key, value in files.items():
        if value is not None:
            random = f"model.random_init={model.random_init}"
            return f"model.{key}: {value}, but {random} reads no files: set one of them to null"
    return None


def _of_algorithm(config: Config) -> str | None:
    objective = OBJECTIVES[config.objective]
    if ADVANTAGES[config.advantage]().needs_groups and config.images_per_prompt < 2:
        return (
            f"images_per_prompt: {config.advantage} compares the images of one prompt: set at least 2, "
            "or choose algorithm=ppo or algorithm=reinforce"
        )
    if config.updates_per_rollout % config.passes_per_rollout:
        return (
            f"updates_per_rollout: {config.updates_per_rollout} optimizer steps cannot be shared equally by "
            f"passes_per_rollout={config.passes_per_rollout}: use a multiple of it"
        )
    if config.last_steps.drop >= config.sampling.steps:
        return f"last_steps.drop: {config.last_steps.drop} leaves none of sampling.steps={config.sampling.steps} to train"
    if not objective.uses_ratio and config.passes_per_rollout > 1:
        return (
            f"passes_per_rollout: {config.objective} has no importance ratio, so a second pass over the same "
            "trajectories is biased: set 1, or choose algorithm=loop"
        )
    for i, reward in enumerate(config.eval.rewards or ()):
        if reward.normalize is not None:
            return f"eval.rewards.{i}.normalize: held-out scores are as they are, so that they can be compared: remove it"
    return None


def _of_rows(config: Config) -> str | None:
    """What of the sampler's steps and of noise levels does not go with the objective, which trains one or the other."""
    if key := _changed(config, "noise_policy"):
        return f"{key}: only algorithm=noise_ppo has a policy over the initial noise: leave it out"
    if found := _of_noise_steps(config) or _of_penalty(config):
        return found
    name, forward = config.objective, config.forward
    if found := _of_value(config):
        return found
    if config.replay.rollouts > 1 and not OBJECTIVES[name].uses_ratio:
        return (
            f"replay.rollouts: {name} has no importance ratio, so training on an older policy's rollouts is biased: set 1, or "
            "choose algorithm=loop"
        )
    if OBJECTIVES[name].stored_steps:
        if config.sampling.eta == 0:
            return f"sampling.eta: objective={name} needs the noise of the steps, of which 0 leaves none: set it to 1"
        if key := _changed(config, "forward"):
            return f"{key}: objective={name} trains the sampler's steps: set algorithm=loop_forward, or leave it out"
        return None
    off = {"timestep_fraction": (config.timestep_fraction, 1)}
    off |= {"last_steps.drop": (config.last_steps.drop, 0), "last_steps.weight": (config.last_steps.weight, 1)}
    for key, (value, without) in off.items():
        if value != without:
            return (
                f"{key}: objective={name} trains noise levels (forward.levels, forward.window), not the sampler's steps: "
                f"set it to {without}"
            )
    if config.advantage == "none":
        return f"advantage: none, with which objective={name} imitates whatever is drawn: set leave_one_out"
    if config.kl.form != "gaussian":
        return f"kl.form: {config.kl.form}, but objective={name} has the KL of noise levels alone: set it to gaussian"
    if forward.window[1] < forward.window[0]:
        return f"forward.window: {list(forward.window)} ends before it begins: give its first timestep first"
    if forward.window[1] - forward.window[0] + 1 < forward.levels:
        return f"forward.window: {list(forward.window)} has fewer timesteps than forward.levels={forward.levels}: widen it"
    return None


def _of_value(config: Config) -> str | None:
    if config.advantage != "value":
        key = _changed(config, "value")
        return key and f"{key}: advantage={config.advantage} has no value network: set advantage=value, or leave it out"
    if not OBJECTIVES[config.objective].stored_steps:
        return f"advantage: value is of a step's latents, and objective={config.objective} trains none: set leave_one_out"
    return None


def _of_noise(config: Config) -> str | None:
    """What does not go with a policy over the initial noise, beside which nothing of the model is trained."""
    if OBJECTIVES[config.objective].uses_kl or not OBJECTIVES[config.objective].stored_steps:
        return f"objective: {config.objective} is not for the initial noise: set clipped, clip_only or score_function"
    frozen = "algorithm=noise_ppo trains no weights of the model"
    if config.model.adapter == "full":
        return f"model.adapter: {frozen}: leave it out, or choose another algorithm"
    if key := _changed(config, "model.lora"):
        return f"{key}: {frozen}, so it has no adapters: leave it out, or choose another algorithm"
    if config.sampling.eta != 0:
        return (
            f"sampling.eta: {config.sampling.eta:g}, but with algorithm=noise_ppo a picture must follow from its initial "
            "noise: set it to 0"
        )
    without = "algorithm=noise_ppo has none"
    one = "algorithm=noise_ppo trains the initial noise, not single steps or noise levels: leave it out"
    if config.advantage == "value":
        return f"advantage: value is of single steps, and {one.replace(': leave it out', ': set leave_one_out')}"
    for section in ("last_steps", "forward", "dlpo", "replay", "value"):
        if key := _changed(config, section):
            return f"{key}: {one}"
    if config.timestep_fraction != 1:
        return f"timestep_fraction: {one}"
    if config.sampling.noise_steps is not None:
        return f"sampling.noise_steps: {one}"
    if config.kl.form != "gaussian":
        return f"kl.form: {config.kl.form}, but with algorithm=noise_ppo the KL is that of two Gaussians: set it to gaussian"
    for key in ("every", "of_advantages"):
        if getattr(config.kl, key) != type(config.kl).model_fields[key].default:
            return f"kl.{key}: algorithm=noise_ppo has the KL of its policy in every update, as it is: leave it out"
    if config.engine.name != "torch":
        return "engine.name: algorithm=noise_ppo has no gradients of the model to share out: set it to torch, on any ranks"
    if config.memory.automatic:
        return f"memory.{config.memory.automatic[0]}: auto goes by the model's gradients, and {without}: give a number"
    for key in ("gradient_checkpointing", "update_batch", "trajectories"):
        if getattr(config.memory, key) != type(config.memory).model_fields[key].default:
            return f"memory.{key}: updates of algorithm=noise_ppo do not run the model: leave it out"
    if config.model.compile == "auto":
        return f"model.compile: auto goes by the model's updates, and {without}: set it to false, true or regional"
    if key := _changed(config, "export"):
        return f"{key}: the policy of algorithm=noise_ppo is exported in float32 and one format: leave it out"
    return None


def _of_penalty(config: Config) -> str | None:
    dlpo = config.dlpo
    if dlpo.beta == 0:
        for key, default in (("gradient", False), ("data", None)):
            if getattr(dlpo, key) != default:
                return f"dlpo.{key}: dlpo.beta=0 is no penalty: set beta, or leave it out"
        return None
    if not OBJECTIVES[config.objective].stored_steps:
        return f"dlpo.beta: objective={config.objective} trains on denoising errors itself: set it to 0, or algorithm=dlpo"
    if dlpo.data is not None and not dlpo.gradient:
        return "dlpo.data: how your pictures are denoised says nothing of those drawn: set dlpo.gradient=true, or leave it out"
    if dlpo.gradient and config.engine.zero_stage == 3:
        return (
            "dlpo.gradient: engine.zero_stage=3 gathers weights for one forward and its backward: set zero_stage=2, or "
            "gradient to false"
        )
    return None


def _of_noise_steps(config: Config) -> str | None:
    sampling, own = config.sampling, config.eval_sampling
    if sampling.noise_steps is None:
        return None
    first, last = sampling.noise_steps
    if not first <= last < sampling.steps:
        return f"sampling.noise_steps: [{first}, {last}] is no range of the steps 0 to {sampling.steps - 1}: count from 0"
    if own.noise_steps and own.steps != sampling.steps:
        return (
            f"eval.sampling.eta: sampling.noise_steps counts training's {sampling.steps} steps, and evaluations have "
            f"{own.steps}: set it to 0, the deterministic solver"
        )
    return None


def _of_engine(config: Config) -> str | None:
    """What of the engine, the optimizer and the rest does not go together, by the table in docs/multi_gpu.md."""
    engine, optimizer = config.engine, config.optimizer.name
    if engine.name == "torch":
        for key in ("zero_stage", "offload_optimizer", "offload_parameters", "rollout_parameters", "deepspeed_config"):
            if getattr(engine, key) != type(engine).model_fields[key].default:
                return f"engine.{key}: only DeepSpeed has it: set engine.name=deepspeed, or leave it out"
        if optimizer == "cpu_adamw":
            return "optimizer.name: cpu_adamw is for engine.name=deepspeed engine.offload_optimizer=true: set it to adamw"
        return None
    stage = engine.zero_stage
    if engine.offload_optimizer and stage == 0:
        return "engine.offload_optimizer: engine.zero_stage=0 keeps the optimizer on the device: set it to 1, 2 or 3"
    if engine.offload_optimizer and optimizer != "cpu_adamw":
        return (
            f"optimizer.name: {optimizer} does not step in the CPU's memory, as engine.offload_optimizer=true wants: "
            "set it to cpu_adamw"
        )
    if optimizer == "cpu_adamw" and not engine.offload_optimizer:
        return "optimizer.name: cpu_adamw steps in the CPU's memory: set engine.offload_optimizer=true, or adamw"
    if engine.offload_parameters and stage != 3:
        return f"engine.offload_parameters: engine.zero_stage={stage} keeps the weights on every device: set zero_stage=3"
    if engine.offload_parameters and not engine.offload_optimizer:
        return "engine.offload_parameters: the optimizer goes first: set engine.offload_optimizer=true and cpu_adamw"
    if engine.rollout_parameters is not None and stage != 3:
        return f"engine.rollout_parameters: with engine.zero_stage={stage} the weights are always whole: leave it out"
    if stage == 3 and config.model.base_precision:
        return (
            "model.base_precision: engine.zero_stage=3 gathers weights of the dtype that it computes in: set zero_stage=2, "
            "which leaves the frozen weights whole, or base_precision to null"
        )
    if stage == 3 and config.model.lora.text_encoders:
        return "model.lora.text_encoders: engine.zero_stage=3 shares out the UNet alone: set it to false, or zero_stage=2"
    if stage == 3 and config.kl.weight and config.model.adapter == "full":
        return "kl.weight: a full fine-tune's frozen copy is not shared out: set engine.zero_stage=2, or model.adapter=lora"
    if stage == 3 and config.ema.decay and engine.rollout_parameters == "layerwise":
        return "ema.decay: the average is put in for evaluation as a whole: set engine.rollout_parameters=gathered"
    return None
