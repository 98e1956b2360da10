"""Small models that the tests make themselves: pipelines with random weights, in the formats of real checkpoints."""

from __future__ import annotations

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    DDIMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Qwen2TokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from fastloop.denoisers.files import ASSETS

SETTINGS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}


SHIFTING = {  # of FLUX.1 dev's and FLUX.2 klein's schedulers
    "shift": 3.0,
    "use_dynamic_shifting": True,
    "base_shift": 0.5,
    "max_shift": 1.15,
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
}
FLOW_VAE = {  # of SD3's and FLUX.1's
    "latent_channels": 16,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    "force_upcast": True,
}


def make_tokenizer(**kwargs) -> CLIPTokenizer:
    return CLIPTokenizer.from_pretrained(ASSETS / "shapes" / "tokenizer", **kwargs)  # a new one would number its words anew


def make_text_config(tokenizer, hidden: int = 16, layers: int = 1, projection: int = 16) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=24,
        num_hidden_layers=layers,
        num_attention_heads=2,
        max_position_embeddings=tokenizer.model_max_length,
        projection_dim=projection,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def make_unet(sample_size: int, **kwargs) -> UNet2DConditionModel:
    values = {
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": 2,
        "norm_num_groups": 4,
    }
    return UNet2DConditionModel(sample_size=sample_size, **values | kwargs)


def make_vae(sample_size: int, **kwargs) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        sample_size=2 * sample_size,
        **{"latent_channels": 4, **kwargs},
    )


def make_sd(folder, prediction: str = "epsilon", scheduler=DDIMScheduler, sample_size: int = 8, **of_unet) -> str:
    """A tiny random StableDiffusionPipeline of 16 px pictures saved to a folder, as diffusers saves it."""
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    clip = {"clip_sample": False} if scheduler is DDIMScheduler else {"skip_prk_steps": True}
    StableDiffusionPipeline(
        text_encoder=CLIPTextModel(make_text_config(tokenizer)),
        unet=make_unet(sample_size, cross_attention_dim=16, **of_unet),
        vae=make_vae(sample_size),
        tokenizer=tokenizer,
        scheduler=scheduler(prediction_type=prediction, set_alpha_to_one=False, **SETTINGS, **clip),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return str(folder)


def make_sdxl(folder, prediction: str = "epsilon", zeros: bool = True, **of_unet) -> str:
    """A tiny random StableDiffusionXLPipeline of 16 px pictures; its second tokenizer pads with another word, as SDXL's."""
    torch.manual_seed(0)
    tokenizer, tokenizer_2 = make_tokenizer(), make_tokenizer(pad_token="!")
    StableDiffusionXLPipeline(
        text_encoder=CLIPTextModel(make_text_config(tokenizer, layers=2)),
        text_encoder_2=CLIPTextModelWithProjection(make_text_config(tokenizer_2, hidden=24, layers=3, projection=12)),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer_2,
        unet=make_unet(
            8,
            cross_attention_dim=16 + 24,
            transformer_layers_per_block=(1, 2),
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + 12,
            **of_unet,
        ),
        vae=make_vae(8, scaling_factor=0.13025),
        scheduler=EulerDiscreteScheduler(prediction_type=prediction, timestep_spacing="leading", **SETTINGS),
        force_zeros_for_empty_prompt=zeros,
        add_watermarker=False,
    ).save_pretrained(folder)
    return str(folder)


def make_t5(width: int = 48) -> T5EncoderModel:
    return T5EncoderModel(
        T5Config(
            vocab_size=40,
            d_model=width,
            d_kv=8,
            d_ff=24,
            num_layers=2,
            num_heads=2,
            feed_forward_proj="gated-gelu",
            is_encoder_decoder=False,
            dropout_rate=0.1,
        )
    )


def make_t5_tokenizer() -> T5TokenizerFast:
    words = ["▁a", "▁red", "▁dog", "▁circle", "▁two", "▁", *"abcdefghijklmnopqrstuvwxyz"]
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((word, -float(len(words))) for word in words)]
    return T5TokenizerFast(vocabulary, extra_ids=0, model_max_length=512)


def make_sd3(folder, t5: bool = True, of_network: dict | None = None, **of_scheduler) -> str:
    """A tiny random StableDiffusion3Pipeline of 16 px pictures.

    Keys and structure are those of stabilityai/stable-diffusion-3.5-medium's config.json files, with shrunken widths: the
    transformer's patch_size, in_channels, qk_norm, and dual attention in the first blocks; the VAE's shift_factor and
    scaling_factor, without convolutions around the latents; the activations of the CLIPs and of T5, which is as wide as the
    joint attention's tokens.
    """
    torch.manual_seed(0)
    tokenizer, tokenizer_2 = make_tokenizer(), make_tokenizer(pad_token="!")
    second = make_text_config(tokenizer_2, hidden=24, layers=3, projection=12)
    second.hidden_act = "gelu"
    transformer = {
        "sample_size": 8,
        "patch_size": 2,
        "in_channels": 16,
        "out_channels": 16,
        "num_layers": 3,
        "attention_head_dim": 8,
        "num_attention_heads": 2,
        "joint_attention_dim": 48,
        "caption_projection_dim": 16,
        "pooled_projection_dim": 16 + 12,
        "pos_embed_max_size": 16,
        "dual_attention_layers": (0, 1),
        "qk_norm": "rms_norm",
    } | (of_network or {})
    StableDiffusion3Pipeline(
        text_encoder=CLIPTextModelWithProjection(make_text_config(tokenizer, layers=2)),
        text_encoder_2=CLIPTextModelWithProjection(second),
        text_encoder_3=make_t5(transformer["joint_attention_dim"]) if t5 else None,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer_2,
        tokenizer_3=make_t5_tokenizer() if t5 else None,
        transformer=SD3Transformer2DModel(**transformer),
        vae=make_vae(8, scaling_factor=1.5305, shift_factor=0.0609, **FLOW_VAE),
        scheduler=FlowMatchEulerDiscreteScheduler(**{"shift": 3.0, **of_scheduler}),
    ).save_pretrained(folder)
    return str(folder)


def make_flux(folder, schnell: bool = False) -> str:
    """A tiny random FluxPipeline, for pictures of 16 px; those of its own size, the pipeline's, have 256.

    Keys and structure are those of the config.json files of black-forest-labs/FLUX.1-dev and FLUX.1-schnell, with shrunken
    widths: the transformer's patch_size and packed in_channels, double and single blocks, guidance_embeds and pooled
    projections as wide as its CLIP; axes_dims_rope, (16, 56, 56) of attention heads of 128; the VAE's shift_factor and
    scaling_factor; and the schedulers as they are.
    """
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    transformer = {
        "patch_size": 1,
        "in_channels": 64,
        "num_layers": 2,
        "num_single_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 48,
        "pooled_projection_dim": 16,
        "guidance_embeds": not schnell,
        "axes_dims_rope": (4, 6, 6),
    }
    FluxPipeline(
        text_encoder=CLIPTextModel(make_text_config(tokenizer, layers=2)),
        text_encoder_2=make_t5(),
        tokenizer=tokenizer,
        tokenizer_2=make_t5_tokenizer(),
        transformer=FluxTransformer2DModel(**transformer),
        vae=make_vae(8, scaling_factor=0.3611, shift_factor=0.1159, **FLOW_VAE),
        scheduler=FlowMatchEulerDiscreteScheduler(**({"shift": 1.0} if schnell else SHIFTING)),
    ).save_pretrained(folder)
    return str(folder)


DIALOGUE = (  # of Qwen3's chat_template, what the pipeline uses
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)


def make_klein(folder, distilled: bool = False) -> str:
    """A tiny random Flux2KleinPipeline, for pictures of 16 px; those of its own size, the pipeline's, have 256.

    Keys and structure are those of the config.json files of black-forest-labs/FLUX.2-klein-base-4B, with shrunken widths: the
    transformer's double and single blocks without guidance_embeds, three of its text encoder's layers side by side as
    joint_attention_dim; four equal axes_dims_rope, (32, 32, 32, 32) of attention heads of 128; the VAE's patch_size, and
    statistics of its batch norm; a Qwen3 with the layers 9, 18 and 27; and the scheduler as it is. They are those of
    diffusers' scripts/convert_flux2_to_diffusers.py, which takes FLUX.1 dev's scheduler and AutoencoderKLFlux2's defaults.
    """
    torch.manual_seed(0)
    words = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *sorted(ByteLevel.alphabet())]
    tokenizer = Qwen2TokenizerFast({word: i for i, word in enumerate(words)}, [], chat_template=DIALOGUE)
    tokenizer.add_special_tokens({"additional_special_tokens": words[1:3]})
    encoder = Qwen3Config(
        vocab_size=len(words),
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=28,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=4,
        tie_word_embeddings=True,
        initializer_range=0.3,
    )
    transformer = {
        "patch_size": 1,
        "in_channels": 32,
        "num_layers": 2,
        "num_single_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 24,
        "timestep_guidance_channels": 16,
        "mlp_ratio": 3.0,
        "axes_dims_rope": (4, 4, 4, 4),
        "rope_theta": 2000,
        "guidance_embeds": False,
    }
    vae = AutoencoderKLFlux2(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        sample_size=16,
        latent_channels=8,
    )
    vae.bn.running_mean.normal_()
    vae.bn.running_var.uniform_(0.5, 2)
    Flux2KleinPipeline(
        text_encoder=Qwen3ForCausalLM(encoder),
        tokenizer=tokenizer,
        transformer=Flux2Transformer2DModel(**transformer),
        vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(**SHIFTING),
        is_distilled=distilled,
    ).save_pretrained(folder)
    return str(folder)
