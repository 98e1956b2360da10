"""The run configuration: strict models, the rules between their keys, and the numbers derived from them.

Each key has its description, from which docs/config.md is made: ``python docs/config_tables.py``.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from fastloop.algorithms import ALGORITHMS
from fastloop.config.data import EvalConfig, PromptsConfig, RewardConfig
from fastloop.config.model import ModelConfig, SamplingConfig
from fastloop.config.running import CheckpointConfig, EngineConfig, ExportConfig, MemoryConfig, TrackingConfig
from fastloop.config.strict import Fraction, Positive, Seed, Strict
from fastloop.config.training import (
    DlpoConfig,
    EmaConfig,
    ForwardConfig,
    KlConfig,
    LastStepsConfig,
    NoisePolicyConfig,
    OptimizerConfig,
    ReplayConfig,
    SafetyConfig,
    ValueConfig,
)


class Config(Strict):
    """One run. The user sets `prompts_per_step` and `images_per_prompt`; the rest of the arithmetic is derived."""

    algorithm: Literal[tuple(ALGORITHMS)] = Field(
        "loop",
        description="a name for an advantage and an objective; it decides the keys that say: the algorithm's",
    )
    advantage: str | None = Field(
        None,
        description="how rewards become advantages: `leave_one_out`, `group_norm`, `batch_norm`, `batch_mean`, "
        "`prompt_tracker`, `value` or `none`; null: the algorithm's",
    )
    objective: str | None = Field(
        None,
        description="what is maximised: `score_function`, `clipped`, `clip_only`, `kl_mask` or `forward_process`; "
        "null: the algorithm's",
    )
    model: ModelConfig = Field(ModelConfig(), description="the model, and what of it is trained")
    prompts: PromptsConfig = Field(PromptsConfig(), description="the prompts that are trained on")
    rewards: list[RewardConfig] = Field(min_length=1, description="the weighted sum that is trained on")
    eval: EvalConfig = Field(EvalConfig(), description="the evaluation: held-out prompts on fixed seeds")
    sampling: SamplingConfig = Field(
        SamplingConfig(), description="the reverse process of rollouts and updates, and of evaluations but for `eval.sampling`"
    )
    prompts_per_step: Positive = Field(16, description="prompts per rollout")
    images_per_prompt: Positive = Field(
        4, description="K, images of each prompt; at least 2 with `leave_one_out` and `group_norm`"
    )
    updates_per_rollout: Positive | None = Field(
        None, description="optimizer steps per rollout, a multiple of `passes_per_rollout`; null: the algorithm's"
    )
    passes_per_rollout: Positive = Field(
        1, description="times each (trajectory, timestep) pair is trained on; 1 with `score_function`"
    )
    timestep_fraction: Fraction = Field(
        1.0, description="share of the timesteps trained, at least one, drawn anew for each trajectory and pass"
    )
    last_steps: LastStepsConfig = Field(LastStepsConfig(), description="how much the last denoising steps are trained")
    forward: ForwardConfig = Field(ForwardConfig(), description="the noise levels that `forward_process` trains")
    replay: ReplayConfig = Field(ReplayConfig(), description="how many rollouts are trained on")
    value: ValueConfig = Field(ValueConfig(), description="the learned baseline of `advantage: value`")
    dlpo: DlpoConfig = Field(DlpoConfig(), description="the denoising penalty of `algorithm: dlpo`")
    noise_policy: NoisePolicyConfig = Field(
        NoisePolicyConfig(), description="the policy over the initial noise of `algorithm: noise_ppo`"
    )
    clip_range: Annotated[float, Field(gt=0)] | None = Field(
        None,
        description="eps of the ratio's window, for log-probs that are means over the latent's elements, with `noise_ppo` "
        "sums; with `kl_mask`, the bound on the KL; null: the algorithm's",
    )
    advantage_clamp: Annotated[float, Field(gt=0)] | None = Field(
        None, description="advantages are clamped to +- this; null: no clamp; left out: the algorithm's"
    )
    normalize_advantages: bool = Field(
        False, description="whether advantages are divided by their standard deviation over the rollout, before the clamp"
    )
    kl: KlConfig = Field(KlConfig(), description="the penalty on the distance to the model before training")
    ema: EmaConfig = Field(EmaConfig(), description="the moving average of the trained weights")
    optimizer: OptimizerConfig = Field(OptimizerConfig(), description="the optimizer and its learning rate")
    memory: MemoryConfig = Field(MemoryConfig(), description="what bounds memory")
    engine: EngineConfig = Field(EngineConfig(), description="who accumulates gradients and steps, on which device")
    kernels: Literal["auto", "triton", "reference"] = Field(
        "auto",
        description="implementation of the per-step Gaussian and of parts of UNet and VAE; auto: what the environment "
        "variable `FASTLOOP_KERNELS` says, else Triton on a GPU and PyTorch elsewhere",
    )
    safety: SafetyConfig = Field(SafetyConfig(), description="bounds past which the run stops or warns")
    tracking: TrackingConfig = Field(TrackingConfig(), description="where metrics go beside the run's folder")
    checkpoint: CheckpointConfig = Field(CheckpointConfig(), description="when the run is saved")
    export: ExportConfig = Field(ExportConfig(), description="the trained weights for stock diffusers")
    iterations: Positive = Field(60, description="rollouts of the whole run")
    seed: Seed = Field(0, description="of prompts, noise, the order of pairs and new LoRA weights")
    output_dir: str = Field("runs/default", min_length=1, description="folder of the run; `~` is expanded")

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
        brought, sections = ALGORITHMS[name].of_keys(), ALGORITHMS[name].settings
        clamp = brought.pop("advantage_clamp")
        filled = {key: value for key, value in brought.items() if values.get(key) is None}
        for section, settings in sections.items():
            given = values.get(section, {})
            if isinstance(given, dict):
                filled[section] = {**settings, **given}
        return {"advantage_clamp": clamp, **values, **filled}  # a clamp of null is none at all

    @model_validator(mode="after")
    def _cross_field(self) -> Config:
        from fastloop.rules import problem  # with torch, which reading a file must not wait for

        if found := problem(self):
            raise ValueError(found)
        return self

    @property
    def trains_noise(self) -> bool:
        """Whether a policy over the initial noise is trained, and no weights of the model."""
        return ALGORITHMS[self.algorithm].trains_noise

    @property
    def images_per_rollout(self) -> int:
        """Images of a rollout, N, on all ranks."""
        return self.prompts_per_step * self.images_per_prompt

    @property
    def eval_sampling(self) -> SamplingConfig:
        """The reverse process of evaluations: that of training with what `eval.sampling` says; its eta may be 0."""
        own = self.eval.sampling.model_dump(exclude_none=True)
        return self.sampling.model_copy(update=own if own.get("eta") != 0 else {**own, "noise_steps": None})
