"""The run configuration: strict models, the rules between their keys, and the numbers derived from them."""

from __future__ import annotations

import re
from dataclasses import asdict
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from fastloop.algorithms import ALGORITHMS

Positive = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(gt=0, le=1)]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_switch_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        annotation = cls.model_fields[info.field_name].annotation
        if isinstance(value, bool) and bool not in (annotation, *get_args(annotation)):
            raise ValueError(f"cannot be {str(value).lower()}; YAML also reads yes, no, on and off so: put text in quotes")
        return value


class LoraConfig(Strict):
    """Low-rank adapters on the UNet, and on the text encoders if wanted (peft)."""

    rank: Positive = 16
    alpha: Annotated[float, Field(gt=0)] | None = Field(None, description="scale is alpha / rank; default: the rank")
    target_modules: list[str] = Field(
        ["to_q", "to_k", "to_v", "to_out.0"], min_length=1, description="modules of the UNet by the ending of their names"
    )
    text_encoders: bool = Field(False, description="adapters of the same rank on the attention of the text encoders too")


class VaeConfig(Strict):
    """How latents become pictures. A picture that overflows in half precision is decoded again in float32."""

    dtype: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto", description="auto: model.dtype, and fp32 where the VAE's config has force_upcast and model.dtype is fp16"
    )
    tile: Annotated[int, Field(ge=64, multiple_of=64)] | None = Field(
        None, description="pixels; larger pictures are decoded in overlapping tiles of this side; default: whole"
    )


class ModelConfig(Strict):
    """Which model, and what of it is trained."""

    path: str | None = Field("assets:shapes", min_length=1, description="assets:shapes, a diffusers folder, or a hub id")
    random_init: Literal["sd15", "sd2", "sdxl"] | None = Field(
        None, description="in place of path: the full-size architecture with random weights, for benchmarks"
    )
    revision: str | None = Field(None, description="of a hub id")
    variant: str | None = Field(None, description="file variant, such as fp16")
    adapter: Literal["lora", "full"] = "lora"
    lora: LoraConfig = LoraConfig()
    dtype: Literal["fp32", "bf16", "fp16"] = Field("fp32", description="latents and log-probs stay float32")
    attention: Literal["sdpa", "flash", "xformers"] = Field("sdpa", description="flash: sdpa with no other of its backends")
    compile: bool | Literal["regional"] = Field(
        False, description="torch.compile of the UNet, or regional: of its transformer blocks, which compiles much faster"
    )
    vae: VaeConfig = VaeConfig()

    @model_validator(mode="before")
    @classmethod
    def _no_default_path_beside_random_weights(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("random_init") is not None:
            return {"path": None, **values}
        return values


class PromptsConfig(Strict):
    """Where prompts come from."""

    source: str = Field(
        "shapes_train",
        description="shapes_train, shapes_heldout, animals, FILE.txt, .jsonl or .tsv, a T2I-CompBench folder, hf:OWNER/NAME",
    )
    split: str | None = Field(None, min_length=1, description="of a folder or of hf: which part; default: train")
    column: str = Field("prompt", min_length=1, description="of .tsv and hf: where the prompt stands")
    categories: list[str] | None = Field(None, min_length=1, description="only these, where prompts have categories")
    limit: Positive | None = Field(None, description="at most so many prompts; categories in equal shares")


class EvalPromptsConfig(PromptsConfig):
    """As `prompts`, but the held-out ones."""

    split: str | None = Field(None, min_length=1, description="default: val of a folder, train of hf")
    source: str = Field(None, description="default: shapes_heldout beside the shapes prompts, else prompts.source")
    limit: Positive | None = 50


class RewardConfig(Strict):
    """One term of the weighted sum. ``params`` go to the reward itself."""

    name: str = Field(description="a registered reward, or MODULE:FUNCTION")
    weight: float = 1.0
    params: dict[str, Any] = {}
    label: str | None = Field(None, min_length=1, description="its name in metrics and messages; default: name")
    normalize: Literal["batch", "running"] | None = Field(
        None, description="by mean and std, of each rollout or of all so far; in training only"
    )
    worker: Literal["thread", "process"] = Field("thread", description="who calls it")
    workers: Positive = Field(1, description="how many of them, each with a batch of its own")
    timeout: Annotated[float, Field(gt=0)] | None = Field(None, description="seconds for one batch, then the run stops")

    @field_validator("label")
    @classmethod
    def _no_other_metric(cls, label: str | None) -> str | None:
        if label in ("mean", "std", "group_std") or (label or "").startswith("category/"):
            raise ValueError(f"reward/{label} is a metric of its own: choose another label")
        return label

    @property
    def key(self) -> str:
        """What tells it from the other terms."""
        return self.label or self.name

    @field_validator("params")
    @classmethod
    def _numbers_with_exponents(cls, params: dict[str, Any]) -> dict[str, Any]:
        """YAML 1.1 reads 1e-4 as text, and nothing here knows which params are numbers."""
        number = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+")
        return {k: float(v) if isinstance(v, str) and number.fullmatch(v) else v for k, v in params.items()}


class SamplingConfig(Strict):
    """The reverse process, the same in rollouts and in updates."""

    steps: Positive = 50
    eta: Annotated[float, Field(gt=0, le=1)] = Field(1.0, description="DDIM eta: the share of noise in each step")
    guidance_scale: Annotated[float, Field(ge=1)] = Field(5.0, description="1 switches guidance off: no second forward")
    negative_prompt: str = ""
    height: Positive | None = Field(None, description="pixels; default: the model's own size")
    width: Positive | None = Field(None, description="pixels; default: the model's own size")
    original_size: tuple[Positive, Positive] | None = Field(None, description="SDXL: height and width; default: the picture's")
    crop_top_left: tuple[Annotated[int, Field(ge=0)], Annotated[int, Field(ge=0)]] = (0, 0)
    target_size: tuple[Positive, Positive] | None = Field(None, description="SDXL: height and width; default: the picture's")


class EvalConfig(Strict):
    """Held-out prompts on fixed seeds."""

    every: Positive = Field(10, description="iterations; the first and the last state are always evaluated")
    prompts: EvalPromptsConfig = EvalPromptsConfig()
    rewards: list[RewardConfig] | None = Field(None, description="default: the training rewards")
    images_per_prompt: Positive = 2
    steps: Positive | None = Field(None, description="denoising steps; default: sampling.steps")
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    grid: Positive = Field(12, description="prompts shown in the sample grids")


class LastStepsConfig(Strict):
    """The last denoising steps are several times as sensitive as the others (docs/method.md)."""

    drop: Annotated[int, Field(ge=0)] = Field(0, description="last steps that are sampled and not trained")
    weight: Fraction = Field(1.0, description="factor on the loss of the last `count` trained steps")
    count: Positive = 2


class KlConfig(Strict):
    """Gaussian KL to the model before training, per trained step: the adapter off, or a frozen copy."""

    weight: Annotated[float, Field(ge=0)] = 0.0


class EmaConfig(Strict):
    """Exponential moving average of the trained weights; evaluated and exported in their place."""

    decay: Annotated[float, Field(gt=0, lt=1)] | None = None


class OptimizerConfig(Strict):
    name: Literal["adamw", "adamw8bit", "paged_adamw8bit", "lion8bit", "cpu_adamw"] = "adamw"
    lr: Annotated[float, Field(gt=0)] = 3e-4
    schedule: Literal["constant", "linear"] = Field(
        "constant", description="linear: falls from lr towards 0 over the iterations"
    )
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    eps: Annotated[float, Field(gt=0)] = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 1e-4
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0

    def lr_at(self, iteration: int, iterations: int) -> float:
        """The learning rate of an iteration, counted from 0, of a run of ``iterations``."""
        return self.lr * (1 - iteration / iterations) if self.schedule == "linear" else self.lr


class MemoryConfig(Strict):
    """What bounds memory. None of it changes the mathematics."""

    gradient_checkpointing: bool | list[str] = Field(
        False, description="recompute activations in the backward: of all blocks, or of those named, such as [up_blocks.3]"
    )
    rollout_batch: Positive | None = Field(64, description="trajectories per denoiser call while sampling; or auto")
    update_batch: Positive | None = Field(64, description="(trajectory, timestep) pairs per forward and backward; or auto")
    vae_batch: Positive | None = Field(16, description="images per VAE call; or auto")
    offload_frozen: bool = Field(True, description="text encoders and VAE are on the GPU only while they compute")
    trajectories: Literal["device", "host"] = Field("device", description="host: in pinned memory, copied beside the work")

    @field_validator("rollout_batch", "update_batch", "vae_batch", mode="before")
    @classmethod
    def _auto(cls, value: Any) -> Any:
        return None if value == "auto" else value

    @property
    def automatic(self) -> list[str]:
        """The batches that are to be chosen when the run starts: ``auto`` or null."""
        return [name for name in ("rollout_batch", "update_batch", "vae_batch") if getattr(self, name) is None]


class EngineConfig(Strict):
    """Who accumulates gradients and steps. All but `name` and `device` are DeepSpeed's."""

    name: Literal["torch", "deepspeed"] = "torch"
    device: str = Field("auto", description="auto, cpu, cuda, cuda:N")
    zero_stage: Literal[0, 1, 2, 3] | None = Field(None, description="what the ranks share out; default with deepspeed: 2")
    offload_optimizer: bool = Field(False, description="optimizer and master weights in the CPU's memory; with cpu_adamw")
    offload_parameters: bool = Field(False, description="weights too; ZeRO 3")
    rollout_parameters: Literal["gathered", "layerwise"] | None = Field(
        None, description="ZeRO 3: whole during a rollout (the default), or a layer at a time"
    )
    deepspeed_config: str | None = Field(None, description="a DeepSpeed JSON of your own, merged with what is derived")


class TrackingConfig(Strict):
    tensorboard: bool = True
    wandb: str | None = Field(None, description="W&B project; needs fastloop[wandb]")


class CheckpointConfig(Strict):
    every: Positive = Field(10, description="iterations")
    keep: Positive = Field(2, description="newest checkpoints kept")


class ExportConfig(Strict):
    """The result, as stock diffusers loads it."""

    dtype: Literal["fp32", "bf16", "fp16"] = Field("fp32", description="of the weights in the files")


class SafetyConfig(Strict):
    """Bounds past which a run stops or warns."""

    max_ratio_dev: Annotated[float, Field(ge=0)] = Field(
        1e-5, description="bound on |ratio - 1| when the first micro-batch is replayed"
    )
    min_group_std: Annotated[float, Field(ge=0)] = Field(1e-3, description="alarm: reward std within groups below this")
    max_clipfrac: Fraction = Field(0.9, description="alarm: share of clipped pairs above this")
    min_image_entropy: Annotated[float, Field(ge=0)] = Field(0.5, description="alarm: bits; a flat picture has 0")
    max_image_saturation: Fraction = Field(0.9, description="alarm: share of pixel values at 0 or 255")
    held_out_errors: Annotated[float, Field(gt=0)] | None = Field(
        2.0, description="alarm: a held-out reward falls by so many standard errors while the training reward rises"
    )


class Config(Strict):
    """One run. The user sets `prompts_per_step` and `images_per_prompt`; the rest of the arithmetic is derived."""

    algorithm: Literal[tuple(ALGORITHMS)] = "loop"
    advantage: str | None = Field(None, description="overrides the algorithm's advantage")
    objective: str | None = Field(None, description="overrides the algorithm's objective")
    model: ModelConfig = ModelConfig()
    prompts: PromptsConfig = PromptsConfig()
    rewards: list[RewardConfig] = Field(min_length=1)
    eval: EvalConfig = EvalConfig()
    sampling: SamplingConfig = SamplingConfig()
    prompts_per_step: Positive = 16
    images_per_prompt: Positive = 4
    updates_per_rollout: Positive | None = Field(None, description="optimizer steps; default: the algorithm's")
    passes_per_rollout: Positive = Field(1, description="times each pair is trained on; divides updates_per_rollout")
    timestep_fraction: Fraction = Field(1.0, description="share of the timesteps trained, drawn for each trajectory")
    last_steps: LastStepsConfig = LastStepsConfig()
    clip_range: Annotated[float, Field(gt=0)] = 1e-4
    advantage_clamp: Annotated[float, Field(gt=0)] | None = Field(None, description="default: the algorithm's; null: none")
    normalize_advantages: bool = Field(False, description="divide by the std over the whole rollout")
    kl: KlConfig = KlConfig()
    ema: EmaConfig = EmaConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    memory: MemoryConfig = MemoryConfig()
    engine: EngineConfig = EngineConfig()
    kernels: Literal["auto", "triton", "reference"] = Field("auto", description="auto: triton on a GPU, reference elsewhere")
    safety: SafetyConfig = SafetyConfig()
    tracking: TrackingConfig = TrackingConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    export: ExportConfig = ExportConfig()
    iterations: Positive = 60
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    output_dir: str = Field("runs/default", min_length=1)

    @model_validator(mode="before")
    @classmethod
    def _fill_defaults(cls, values: Any) -> Any:
        """Fills what other keys decide and the file leaves open: what the algorithm brings, held-out prompts, ZeRO."""
        if not isinstance(values, dict):
            return values
        evaluation = values.get("eval", {})
        held_out = evaluation.get("prompts", {}) if isinstance(evaluation, dict) else None
        if isinstance(held_out, dict) and held_out.get("source") is None:
            prompts = values.get("prompts", {})
            source = prompts.get("source", "shapes_train") if isinstance(prompts, dict) else "shapes_train"
            source = "shapes_heldout" if source == "shapes_train" else source
            values = {**values, "eval": {**evaluation, "prompts": {**held_out, "source": source}}}
        engine = values.get("engine")
        if isinstance(engine, dict) and engine.get("name") == "deepspeed":
            engine = {**engine, "zero_stage": 2 if engine.get("zero_stage") is None else engine["zero_stage"]}
            if engine["zero_stage"] == 3 and engine.get("rollout_parameters") is None:
                engine["rollout_parameters"] = "gathered"
            values = {**values, "engine": engine}
        name = values.get("algorithm", "loop")
        if not isinstance(name, str) or name not in ALGORITHMS:
            return values
        brought = asdict(ALGORITHMS[name])
        clamp = brought.pop("advantage_clamp")
        filled = {key: value for key, value in brought.items() if values.get(key) is None}
        return {"advantage_clamp": clamp, **values, **filled}  # a clamp of null is none at all

    @model_validator(mode="after")
    def _cross_field(self) -> Config:
        from fastloop.rules import problem  # with torch, which reading a file must not wait for

        if found := problem(self):
            raise ValueError(found)
        return self

    @property
    def images_per_rollout(self) -> int:
        return self.prompts_per_step * self.images_per_prompt
