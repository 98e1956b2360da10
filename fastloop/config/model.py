"""Which model, what of it is trained, and how it samples."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from fastloop.config.strict import Fraction, Positive, Strict

Guidance = Annotated[float, Field(ge=0), AfterValidator(lambda w: max(w, 1.0))]  # in diffusers none up to 1 as well


class LoraConfig(Strict):
    """Low-rank adapters on the UNet, and on the text encoders if wanted (peft)."""

    path: str | None = Field(
        None,
        min_length=1,
        description="adapters to start from: a .safetensors file in diffusers' or kohya's format, or a folder with "
        "`pytorch_lora_weights.safetensors`; they are trained on; null: fresh ones",
    )
    fuse: bool = Field(
        False,
        description="whether those of `path` are added to the model's weights instead, and fresh ones trained on top; the "
        "model before training, and the reference of a KL, is then the model with them",
    )
    rank: Positive = Field(16, description="rank of the adapters")
    alpha: Annotated[float, Field(gt=0)] | None = Field(
        None, description="the adapters' scale is alpha / rank; null: the rank, which makes the scale 1"
    )
    target_modules: Annotated[list[str], Field(min_length=1)] | None = Field(
        None,
        description="modules of the network that get an adapter, by the ending of their names; null: its attention, "
        "`[to_q, to_k, to_v, to_out.0]`, of SD3 and FLUX `add_q_proj, add_k_proj, add_v_proj, to_add_out` too, "
        "of klein `to_qkv_mlp_proj, to_out` beside",
    )
    text_encoders: bool = Field(
        False, description="whether the attention of the text encoders gets adapters of the same rank too"
    )


class VaeConfig(Strict):
    """How latents become pictures. A picture that overflows in half precision is decoded again in float32."""

    path: str | None = Field(
        None,
        min_length=1,
        description="a VAE from elsewhere: its diffusers folder, a .safetensors or .ckpt file of one, the folder of a "
        "pipeline, or a hub id of one of these; null: the model's own",
    )
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto",
        description="of the VAE; auto: `model.dtype`, but fp32 with fp16 for an SDXL whose VAE config has `force_upcast`",
    )
    tile: Annotated[int, Field(ge=64, multiple_of=64)] | None = Field(
        None,
        description="pixels; larger pictures are decoded in overlapping tiles of this side, blended at the seams; null: whole",
    )


class ModelConfig(Strict):
    """Which model, and what of it is trained."""

    path: str | None = Field(
        "assets:shapes",
        min_length=1,
        description="`assets:shapes` or `assets:shapes_flow` (the bundled models), a diffusers folder, a hub id "
        "`OWNER/NAME`, or a .safetensors or .ckpt file of Stable Diffusion 1.x, 2.x or XL; null beside `model.random_init`",
    )
    random_init: Literal["sd15", "sd2", "sdxl", "sd35_medium", "flux_dev", "klein_base_4b"] | None = Field(
        None,
        description="in place of `path`: Stable Diffusion 1.5, 2.1, XL, 3.5 medium, FLUX.1 dev or FLUX.2 klein base 4B "
        "in full size with random weights, without a download",
    )
    revision: str | None = Field(None, description="branch, tag or commit of a hub id; null: its main branch")
    variant: str | None = Field(
        None, description="variant of the weight files, such as `fp16`, of the parts that have it; null: those without"
    )
    scheduler: dict[str, Any] = Field(
        {},
        description="keys of the scheduler's config that are other than in the model's files, such as "
        "`{prediction_type: v_prediction}`; exports of a whole pipeline have them",
    )
    clip_skip: Positive | None = Field(
        None,
        description="last layers of CLIP that are skipped for prompts, not for the negative one, as stock's `clip_skip`: "
        "A1111's number less 1; null: none",
    )
    prompt_chunks: Positive = Field(
        1,
        description="how many times 75 tokens of a prompt are seen, each chunk by itself; `prompts.too_long: chunk` raises it "
        "to what the longest one has",
    )
    textual_inversion: dict[str, str] = Field(
        {},
        description="words of your own for prompts, each with its file of vectors: `{<cat-toy>: learned_embeds.safetensors}`",
    )
    max_sequence_length: Annotated[int, Field(ge=1, le=512)] | None = Field(
        None,
        description="SD3 and FLUX only: tokens of T5 or Qwen3; shorter texts are padded, which changes the picture; null"
        ": 256 for SD3, 512 for FLUX, as in their pipelines, and 256, the most, for schnell",
    )
    adapter: Literal["lora", "full"] = Field(
        "lora", description="what is trained: LoRA adapters on the UNet, or all of the UNet's weights"
    )
    lora: LoraConfig = Field(LoraConfig(), description="the adapters of `model.adapter: lora`")
    dtype: Literal["fp32", "bf16", "fp16"] = Field(
        "fp32", description="what the model computes in; trained weights, latents and log-probs stay float32"
    )
    base_precision: Literal["int8", "nf4"] | None = Field(
        None,
        description="LoRA only: the frozen linear layers of the network, and of a text encoder with 1e9 parameters (T5), "
        "are held in 8 or 4 bits by bitsandbytes' rounding, and multiplied in `model.dtype`; null: in `model.dtype`",
    )
    attention: Literal["sdpa", "flash", "xformers"] = Field(
        "sdpa",
        description="attention backend; sdpa: PyTorch's flash, memory-efficient or plain one, the first that can; "
        "flash: its flash backend alone",
    )
    compile: bool | Literal["regional", "auto"] = Field(
        False,
        description="`torch.compile` of the whole UNet; regional: of its transformer blocks, which compiles much faster; "
        "auto: regional where the planned iterations pay for it",
    )
    vae: VaeConfig = Field(VaeConfig(), description="how latents become pictures")

    @model_validator(mode="before")
    @classmethod
    def _no_default_path_beside_random_weights(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("random_init") is not None:
            return {"path": None, **values}
        return values


class SamplingConfig(Strict):
    """The reverse process, the same in rollouts and in updates."""

    steps: Positive = Field(50, description="denoising steps T, at most the scheduler's `num_train_timesteps`")
    eta: Annotated[float, Field(ge=0, le=1)] = Field(
        1.0,
        description="share of noise in each step; 1 is as noisy as DDPM, 0 deterministic, for `forward_process` alone",
    )
    noise: Literal["ddim", "sde", "dance", "cps"] | None = Field(
        None,
        description="what `eta` measures: `ddim`, or of a flow-matching model `sde`, `dance` or `cps`; "
        "null: `ddim`, of a flow `sde`",
    )
    noise_steps: tuple[Annotated[int, Field(ge=0)], Annotated[int, Field(ge=0)]] | None = Field(
        None,
        description="first and last step that have noise, counted from 0, and that are trained for it; "
        "the others are deterministic; null: all",
    )
    guidance_scale: Guidance = Field(
        5.0,
        description="w of classifier-free guidance; up to 1 it is off, as in diffusers, which saves the second half of every "
        "forward; FLUX.1 has no default: stock's is 1",
    )
    guidance_rescale: Fraction | None = Field(
        None,
        description="share of the guided prediction that is scaled to the spread of that with the prompt (arXiv 2305.08891); "
        "not affine, so for evaluations and `sample` alone; null: none",
    )
    embedded_guidance: Annotated[float, Field(ge=0)] | None = Field(
        None, description="FLUX.1 dev only: the guidance that the model was distilled from and is told; null: 3.5, as in stock"
    )
    negative_prompt: str = Field("", description="prompt of the unconditional branch; empty: none")
    height: Positive | None = Field(
        None, description="of the pictures, in pixels, a multiple of what the model needs; null: the model's own"
    )
    width: Positive | None = Field(
        None, description="of the pictures, in pixels, a multiple of what the model needs; null: the model's own"
    )
    original_size: tuple[Positive, Positive] | None = Field(
        None,
        description="SDXL only: height and width in pixels that the model is told a picture had before scaling; "
        "null: the picture's",
    )
    crop_top_left: tuple[Annotated[int, Field(ge=0)], Annotated[int, Field(ge=0)]] = Field(
        (0, 0), description="SDXL only: pixels that the model is told were cut from the top and the left"
    )
    target_size: tuple[Positive, Positive] | None = Field(
        None, description="SDXL only: height and width in pixels that the model is told to draw; null: the picture's"
    )

    @property
    def branches(self) -> int:
        """Rows of the network for each trajectory: 2 with guidance."""
        return 1 if self.guidance_scale == 1 else 2


class EvalSamplingConfig(Strict):
    """What evaluations sample with where it is not what training does: the sampler and guidance of those who will draw."""

    steps: Positive | None = Field(None, description="denoising steps; null: `sampling.steps`")
    eta: Annotated[float, Field(ge=0, le=1)] | None = Field(
        None, description="share of noise in each step; 0 is the deterministic solver; null: `sampling.eta`"
    )
    guidance_scale: Guidance | None = Field(
        None, description="w of classifier-free guidance, 0 to 1 switches it off; null: `sampling.guidance_scale`"
    )
    negative_prompt: str | None = Field(
        None, description="prompt of the unconditional branch; empty: none; null: `sampling.negative_prompt`"
    )
    guidance_rescale: Fraction | None = Field(
        None,
        description="share of the guided prediction that is scaled to the spread of that with the prompt (arXiv 2305.08891), "
        "against washed-out colours of zero-SNR models; null: none",
    )
    height: Positive | None = Field(None, description="of the pictures, in pixels; null: `sampling.height`")
    width: Positive | None = Field(None, description="of the pictures, in pixels; null: `sampling.width`")
