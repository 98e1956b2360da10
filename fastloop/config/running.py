"""Where and how a run computes, and what it leaves behind. None of it changes the mathematics."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator

from fastloop.config.strict import Positive, Strict


class MemoryConfig(Strict):
    """What bounds memory. None of it changes the mathematics."""

    gradient_checkpointing: bool | list[str] = Field(
        False,
        description="recompute the UNet's activations in the backward: of all blocks, or of those named "
        "with what is inside them, such as `[up_blocks.3]`",
    )
    rollout_batch: Positive | None = Field(
        64,
        description="trajectories per call of the UNet while sampling, images per call of a reward, at most; "
        "`auto` or null: the most that fit into the free memory",
    )
    update_batch: Positive | None = Field(
        64,
        description="(trajectory, timestep) pairs per forward and backward, at most; "
        "`auto` or null: the most that fit into the free memory",
    )
    vae_batch: Positive | None = Field(
        16, description="images per call of the VAE; `auto` or null: the most that fit into the free memory"
    )
    offload_frozen: bool = Field(
        True,
        description="whether text encoders and VAE rest in the host's pinned memory and are on the GPU only while "
        "they compute; text encoders that are trained stay",
    )
    trajectories: Literal["device", "host"] = Field(
        "device",
        description="where a rollout's latents wait for their updates; host: in pinned memory, copied beside the work",
    )

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

    name: Literal["torch", "deepspeed"] = Field(
        "torch", description="torch: one process, no launcher; deepspeed: one process or many"
    )
    device: str = Field("auto", description="`auto` (the GPU of the process, else the CPU), `cpu`, `cuda` or `cuda:N`")
    zero_stage: Literal[0, 1, 2, 3] | None = Field(
        None,
        description="what the ranks share out: nothing, the optimizer, gradients too, weights too; null: 2 with deepspeed",
    )
    offload_optimizer: bool = Field(
        False,
        description="keep the optimizer and float32 master weights in the CPU's memory; with `optimizer.name: cpu_adamw`",
    )
    offload_parameters: bool = Field(False, description="ZeRO 3: keep the weights in the CPU's memory too")
    rollout_parameters: Literal["gathered", "layerwise"] | None = Field(
        None,
        description="ZeRO 3: the weights are whole on every rank during a rollout, or gathered a layer at a time; "
        "null: gathered with ZeRO 3",
    )
    deepspeed_config: str | None = Field(
        None, description="file of a DeepSpeed JSON of your own, merged with what is derived; null: none"
    )


class TrackingConfig(Strict):
    """Where metrics go beside metrics.jsonl and eval.jsonl."""

    tensorboard: bool = Field(True, description="whether to write TensorBoard event files")
    wandb: str | None = Field(None, description="W&B project; needs `pip install fastloop[wandb]`; null: off")


class CheckpointConfig(Strict):
    """What a run can go on from."""

    every: Positive = Field(10, description="iterations between checkpoints; the first and the last state are always saved")
    keep: Positive = Field(2, description="newest checkpoints that are kept")


class ExportConfig(Strict):
    """The result, as stock diffusers loads it."""

    dtype: Literal["fp32", "bf16", "fp16"] = Field("fp32", description="of all weights in the exported files")
    format: Literal["diffusers", "kohya"] = Field(
        "diffusers",
        description="of adapters: for `load_lora_weights`, or in kohya's names, which A1111, Forge and ComfyUI read too; "
        "kohya for Stable Diffusion 1.x, 2.x and XL",
    )
