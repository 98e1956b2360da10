"""Single files with the names of CompVis' and Stability's code, made of tiny pipelines: what A1111 holds."""

from __future__ import annotations

import re

import torch
from safetensors.torch import save_file

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
OUTER = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
VAE = {"mid_block.attentions.0": "mid.attn_1", "mid_block.resnets.0": "mid.block_1", "mid_block.resnets.1": "mid.block_2"}
VAE |= {"conv_norm_out": "norm_out", "conv_shortcut": "nin_shortcut", "group_norm": "norm", "to_q": "q", "to_k": "k"}
VAE |= {"to_v": "v", "to_out.0": "proj_out"}
OPEN_CLIP = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "encoder.layers": "transformer.resblocks",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
    "final_layer_norm": "ln_final",
}


def unet_names(unet) -> dict[str, torch.Tensor]:
    """A UNet's weights with CompVis' names."""
    each = unet.config.layers_per_block + 1
    found = {}
    for name, value in unet.state_dict().items():
        if outer := next((old for old in OUTER if name.startswith(f"{old}.")), None):
            found[f"{OUTER[outer]}{name.removeprefix(outer)}"] = value
            continue
        side, i, kind, j, rest = re.fullmatch(
            r"(down|up|mid)_blocks?\.?(\d*)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)", name
        ).groups()
        if kind == "resnets":
            inner, of = rest.split(".", 1)
            rest = f"{RESNET[inner]}.{of}"
        if side == "mid":
            found[f"middle_block.{1 if kind == 'attentions' else 2 * int(j)}.{rest}"] = value
        elif side == "down":
            n = 1 + int(i) * each + (each - 1 if kind == "downsamplers" else int(j))
            place = {"resnets": "0.", "attentions": "1.", "downsamplers": "0.op."}[kind]
            found[f"input_blocks.{n}.{place}{rest.removeprefix('conv.') if kind == 'downsamplers' else rest}"] = value
        else:
            n = int(i) * each + (each - 1 if kind == "upsamplers" else int(j))
            attention = any(key.startswith(f"up_blocks.{i}.attentions.") for key in unet.state_dict())
            place = {"resnets": 0, "attentions": 1, "upsamplers": 2 if attention else 1}[kind]
            found[f"output_blocks.{n}.{place}.{rest}"] = value
    return found


def vae_names(vae) -> dict[str, torch.Tensor]:
    """A VAE's weights with CompVis' names; its attention has convolutions where diffusers has linear layers."""
    last = len(vae.config.block_out_channels) - 1
    found = {}
    for name, value in vae.state_dict().items():
        if ".attentions." in name and "norm" not in name and name.endswith("weight"):
            value = value[:, :, None, None]
        new = re.sub(r"down_blocks\.(\d)\.resnets\.", r"down.\1.block.", name)
        new = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", new)
        new = re.sub(r"up_blocks\.(\d)\.resnets\.", lambda m: f"up.{last - int(m[1])}.block.", new)
        new = re.sub(r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"up.{last - int(m[1])}.upsample", new)
        for old, its in VAE.items():
            new = new.replace(f"{old}.", f"{its}.")
        found[new] = value
    return found


def open_clip_names(encoder) -> dict[str, torch.Tensor]:
    """A text encoder's weights with open_clip's names, q, k and v in one."""
    found: dict[str, torch.Tensor] = {}
    state = {name.removeprefix("text_model."): value for name, value in encoder.state_dict().items()}
    for name, value in state.items():
        if name == "text_projection.weight":
            found["text_projection"] = value.T.contiguous()
        elif match := re.fullmatch(r"encoder\.layers\.(\d+)\.self_attn\.q_proj\.(\w+)", name):
            three = [state[name.replace("q_proj", f"{letter}_proj")] for letter in "qkv"]
            found[f"transformer.resblocks.{match[1]}.attn.in_proj_{match[2]}"] = torch.cat(three)
        elif ".k_proj." not in name and ".v_proj." not in name:
            for old, its in OPEN_CLIP.items():
                name = name.replace(old, its)
            found[name] = value
    return found


def names_of(pipeline, second_like: bool = False) -> dict[str, torch.Tensor]:
    """All weights of a pipeline, with the names of a single file; ``second_like``: of 2.x, with those of open_clip."""
    texts = {
        f"transformer.text_model.{k.removeprefix('text_model.')}": v for k, v in pipeline.text_encoder.state_dict().items()
    }
    parts = {"model.diffusion_model": unet_names(pipeline.unet), "first_stage_model": vae_names(pipeline.vae)}
    if hasattr(pipeline, "text_encoder_2"):
        second = open_clip_names(pipeline.text_encoder_2)
        texts = {f"0.{key}": value for key, value in texts.items()} | {f"1.model.{key}": v for key, v in second.items()}
        parts["conditioner.embedders"] = texts
    elif second_like:
        parts["cond_stage_model.model"] = open_clip_names(pipeline.text_encoder)
    else:
        parts["cond_stage_model"] = texts
    return {f"{part}.{key}": value.clone() for part, found in parts.items() for key, value in found.items()}


def save(weights: dict[str, torch.Tensor], file, metadata: dict[str, str] | None = None) -> None:
    """Write a single file, safetensors or by its ending a pickle as CompVis' trainer leaves it."""
    if file.suffix == ".safetensors":
        save_file({key: value.contiguous() for key, value in weights.items()}, file, metadata)
    else:
        torch.save({"state_dict": weights, "global_step": 1}, file)
