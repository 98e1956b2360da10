"""Adapters that a run starts from, of a file in diffusers' or kohya's format: they are trained on, or fused into the model."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path

import torch
from diffusers.utils.state_dict_utils import (
    convert_state_dict_to_diffusers,
    convert_state_dict_to_peft,
    convert_unet_state_dict_to_peft,
)
from peft.utils.other import get_pattern_key
from torch import Tensor, nn

from fastloop.denoisers.parts import part_title
from fastloop.denoisers.single_file import read_tensors
from fastloop.errors import UserError, one_line

NAME = "pytorch_lora_weights.safetensors"  # in a folder, as diffusers writes it
_DOWN = re.compile(r"(.+?)(?:\.lora_A|[._]lora(?:_linear_layer)?\.down)\.weight$")  # of a module, in diffusers' names
_OTHERS = {"dora_scale": "DoRA", "lora_magnitude_vector": "DoRA", "hada_": "LoHa", "lokr_": "LoKr", "lora_mid": "LoCon's CP"}

# by part and module: A (r, in, ...) and B (out, r, ...) of the weight + B A
Found = dict[str, dict[str, tuple[Tensor, Tensor]]]


def adapters_file(path: str) -> Path:
    """Return the file of ``model.lora.path``. Raises ``UserError`` where there is none."""
    file = Path(path).expanduser()
    file = file / NAME if file.is_dir() else file
    if not file.is_file():
        raise UserError(f"model.lora.path: no file {file}: give a .safetensors file of adapters, or a folder with {NAME}")
    return file


def read_adapters(path: str, pipeline_class: type, network_name: str, network: nn.Module) -> Found:
    """Read a file of adapters, with their alpha scaled into B, float32.

    Args:
        path: of a file, or of a folder with `NAME` in it. network: whose config tells the blocks' places in kohya's names.

    Raises:
        UserError: there is none, or it holds something else than LoRA of this family.
    """
    file = adapters_file(path)
    try:
        weights, metadata = read_tensors(str(file))
    except Exception as error:  # safetensors and pickle raise many kinds
        raise UserError(f"model.lora.path: cannot read {file}: {one_line(error)[:200]}") from None
    for mark, kind in _OTHERS.items():
        if any(mark in key for key in weights):
            raise UserError(f"model.lora.path: {file} holds {kind}, and only plain LoRA is read: fuse it into the model first")
    told = {"return_lora_metadata": True, "return_alphas": True}
    told |= {"unet_config": network.config} if network_name == "unet" else {}
    try:
        state, *alphas, _ = pipeline_class.lora_state_dict(dict(weights), **told)
        scaled = _scaled(state, (alphas and alphas[0]) or {}, json.loads(metadata.get("lora_adapter_metadata", "{}")))
        found = {part: _pairs(part, scaled, network_name) for part in dict.fromkeys(key.split(".", 1)[0] for key in scaled)}
    except UserError:
        raise
    except Exception as error:  # diffusers raises many kinds
        raise UserError(f"model.lora.path: {file} is no LoRA of such a model: {one_line(error)[:200]}") from None
    if not any(found.values()):
        raise UserError(f"model.lora.path: {file} holds no adapters: give a file of LoRA")
    there = sum(key.endswith(("lora_A.weight", "down.weight")) for key in weights)
    if (read := sum(map(len, found.values()))) < there:  # more, where one for q, k and v becomes three
        raise UserError(f"model.lora.path: of the {there} adapters in {file} {read} could be read: it mixes formats of names")
    return found


def check_adapters(path: str, found: Found, parts: dict[str, nn.Module]) -> None:
    """Raise ``UserError`` where adapters are for modules that the model has not, or of another size."""
    for part, adapters in found.items():
        modules = _modules(parts.get(part))
        for name, (a, b) in adapters.items():
            if (len(b), *a.shape[1:]) != _shape(_plain(modules.get(name))) or b.shape[1] != len(a):
                raise UserError(
                    f"model.lora.path: {path} has adapters for {part}.{name}, which this model has not, or of another size: "
                    "it is of another model"
                )


@torch.no_grad()
def fuse_adapters(found: Found, parts: dict[str, nn.Module]) -> None:
    """Add adapters to the weights of those parts that are given, in place: W + B A, computed in float32."""
    for part, module in parts.items():
        modules = _modules(module)
        for name, (a, b) in found.get(part, {}).items():
            weight = modules[name].weight
            product = (b.flatten(1) @ a.flatten(1)).view(weight.shape).to(weight.device)
            weight.copy_(weight.float() + product)


@torch.no_grad()
def continue_adapters(path: str, found: Found, parts: dict[str, nn.Module], adapter: str) -> None:
    """Put adapters of a file in place of the fresh ones, filled up with theirs where the rank is lower.

    Args:
        parts: with fresh adapters of that name. found: as from `read_adapters`; values are not wanted of meta devices.

    Raises:
        UserError: a module has no adapter, or one of a lower rank; with what to set.
    """
    for part, adapters in found.items():
        modules = _modules(parts.get(part))
        bare = [name for name in adapters if not hasattr(modules.get(name), "lora_A")]
        if bare and part.startswith("text_encoder"):
            raise UserError(
                f"model.lora.path: {path} has adapters on the {part_title(part)}, {bare[0]} for one, which are not trained "
                "here: set model.lora.fuse=true"
                + ("" if part in parts else ", or model.lora.text_encoders=true where they are on its attention alone")
            )
        if bare:
            targets = ",".join(_endings(adapters))
            raise UserError(
                f"model.lora.target_modules: {path} has adapters on {', '.join(_endings(bare))} too: set it to [{targets}], "
                "or model.lora.fuse=true"
            )
        for name, (a, b) in adapters.items():
            down, up = (getattr(modules[name], side)[adapter].weight for side in ("lora_A", "lora_B"))
            if len(a) > len(down):
                most = max(len(a) for a, _ in adapters.values())
                raise UserError(f"model.lora.rank: {path} has adapters of rank {most}: set model.lora.rank={most}")
            if down.device.type != "meta":
                down[: len(a)] = a
                up[:, : len(a)] = b / modules[name].scaling[adapter]


def _scaled(state: dict[str, Tensor], alphas: dict[str, float], metadata: dict) -> dict[str, Tensor]:
    """Adapters in float32 with B times alpha / r, by the file's own alphas or by peft's settings beside them."""
    found = {key: value.float() for key, value in state.items()}
    for key, value in state.items():
        if not (match := _DOWN.match(key)):
            continue
        part, module = match[1].split(".", 1)
        own = {name.removeprefix(f"{part}."): of for name, of in metadata.items() if name.startswith(f"{part}.")}
        alpha = alphas.get(f"{key.split('.lora.')[0]}.alpha", alphas.get(f"{match[1]}.alpha"))
        if alpha is None and own:
            pattern = own.get("alpha_pattern") or {}
            alpha = pattern.get(get_pattern_key(pattern.keys(), module), own.get("lora_alpha"))
        if alpha is not None:
            root = 0.5 if own.get("use_rslora") else 1.0
            found[_up(key)] = found[_up(key)] * (float(alpha) / len(value) ** root)
    return found


def _up(key: str) -> str:
    return key.replace(".lora_A.", ".lora_B.") if ".lora_A." in key else key.replace(".down.", ".up.")


def _pairs(part: str, state: dict[str, Tensor], network_name: str) -> dict[str, tuple[Tensor, Tensor]]:
    """A and B of a part's modules, by their names in the libraries."""
    own = {key.removeprefix(f"{part}."): value for key, value in state.items() if key.startswith(f"{part}.")}
    if part == network_name:
        named = own if all(".lora_A." in key or ".lora_B." in key for key in own) else convert_unet_state_dict_to_peft(own)
    else:
        named = convert_state_dict_to_peft(convert_state_dict_to_diffusers(own))
        named = {key.removeprefix("text_model."): value for key, value in named.items()}
    modules = [key.removesuffix(".lora_A.weight") for key in named if key.endswith(".lora_A.weight")]
    if 2 * len(modules) != len(named):
        alone = {*named} - {f"{name}.lora_{side}.weight" for name in modules for side in "AB"}
        alone |= {f"{name}.lora_A.weight" for name in modules if f"{name}.lora_B.weight" not in named}
        raise UserError(f"model.lora.path: {part}.{min(alone)} is no weight of plain LoRA, or half of a pair: fuse it first")
    return {name: (named[f"{name}.lora_A.weight"], named[f"{name}.lora_B.weight"]) for name in modules}


def _endings(names: Iterable[str]) -> list[str]:
    """The endings of modules' names, as ``model.lora.target_modules`` takes them."""
    return sorted({re.search(r"[^.]+(?:\.\d+)*$", name)[0] for name in names})


def _shape(layer: nn.Module | None) -> tuple[int, ...] | None:
    """The shape of a layer's weight, also where it is held in 4 bits."""
    if hasattr(layer, "in_features"):
        return layer.out_features, layer.in_features
    return tuple(layer.weight.shape) if hasattr(layer, "weight") else None


def _modules(part: nn.Module | None) -> dict[str, nn.Module]:
    """The modules of a part by name, without the level that some of CLIP's classes have above it."""
    return {name.removeprefix("text_model."): module for name, module in part.named_modules()} if part else {}


def _plain(module: nn.Module | None) -> nn.Module | None:
    """The layer under an adapter, or the layer itself."""
    return getattr(module, "base_layer", module)
