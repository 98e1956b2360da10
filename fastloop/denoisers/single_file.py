"""A whole model in one file, as A1111, Forge and ComfyUI hold it.

Its keys tell the family, whose published configs come along with fastloop; the converters of diffusers' single-file readers
rename the weights. Unfolded it is a pipeline's folder without weights, so that all else reads it as any other.
"""

from __future__ import annotations

import gzip
import json
import re
import shutil
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from diffusers.loaders.single_file_utils import (
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    create_diffusers_clip_model_from_ldm,
)
from safetensors import safe_open
from tokenizers.pre_tokenizers import ByteLevel

from fastloop.errors import UserError, one_line

_MERGES = Path(__file__).resolve().parent.parent / "assets" / "clip" / "merges.txt.gz"
SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")
_UNET, _VAE = "model.diffusion_model.", "first_stage_model."
_TEXTS = ("cond_stage_model.", "conditioner.embedders.")
_BARE_VAE = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")  # keys of a file that holds nothing but a VAE
_FIRST_LAYER = f"{_UNET}input_blocks.0.0.weight"
_NAMES = {"sd15": "Stable Diffusion 1.x", "sd2": "Stable Diffusion 2.x", "sdxl": "Stable Diffusion XL"}
_PADS = {  # tokenizers of an architecture, with the token that fills up texts
    "sd15": {"tokenizer": "<|endoftext|>"},
    "sd2": {"tokenizer": "!"},
    "sdxl": {"tokenizer": "<|endoftext|>", "tokenizer_2": "!"},
}
_CONVERTERS = {"unet": convert_ldm_unet_checkpoint, "vae": convert_ldm_vae_checkpoint}
_SINCE = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}  # of a VAE's attention
_OLDEST = re.compile("|".join(map(re.escape, _SINCE)))
# of the model's metadata, https://github.com/Stability-AI/ModelSpec
_PREDICTIONS = {"epsilon": "epsilon", "v": "v_prediction"}
_POINTER = b"version https://git-lfs"


@dataclass(frozen=True)
class _Contents:
    shapes: dict[str, tuple[int, ...]]  # by key
    metadata: dict[str, str]


def is_single_file(path: str) -> bool:
    """Say whether a model's path is one file."""
    return Path(path).is_file()


def is_pointer(path: str | Path) -> bool:
    """Say whether a file is what git-LFS leaves in place of one that was not fetched."""
    with open(path, "rb") as file:
        return file.read(len(_POINTER)) == _POINTER


def unfold(path: str, architectures: Path) -> Path:
    """Return a folder like a pipeline's, without weights, for a file: configs of its family, its scheduler and tokenizers.

    Raises:
        UserError: the file cannot be read, or is no whole model of a known family.
    """
    return Path(_unfolded(path, architectures, Path(path).stat().st_mtime_ns).name)


@lru_cache(maxsize=8)
def _unfolded(path: str, architectures: Path, _: int) -> tempfile.TemporaryDirectory:
    contents = _look_into(path)
    kind = _architecture(path, contents)
    folder = tempfile.TemporaryDirectory(prefix="fastloop-")  # until the process ends
    shutil.copytree(architectures / kind, folder.name, dirs_exist_ok=True)
    scheduler = Path(folder.name) / "scheduler" / "scheduler_config.json"
    scheduler.write_text(json.dumps(json.loads(scheduler.read_text()) | _own_scheduler(contents), indent=2) + "\n")
    for name, pad in _PADS[kind].items():
        encoder = json.loads((Path(folder.name) / name.replace("tokenizer", "text_encoder") / "config.json").read_text())
        write_tokenizer(Path(folder.name) / name, pad, encoder["max_position_embeddings"])
    _name_parts(Path(folder.name))
    return folder


def _name_parts(folder: Path) -> None:
    """Completes model_index.json, as stock wants it of a whole pipeline, by the classes in the parts' configs."""
    index = json.loads((folder / "model_index.json").read_text())
    for file in folder.glob("*/*config.json"):
        values = json.loads(file.read_text())
        of_diffusers = values.get("_class_name")
        found = of_diffusers or values.get("tokenizer_class") or values["architectures"][0]
        index[file.parent.name] = ["diffusers" if of_diffusers else "transformers", found]
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")


def single_file_notes(path: str) -> tuple[str, ...]:
    """Say what a file was taken for, a line each."""
    contents = _look_into(path)
    kind = _architecture(path, contents)
    notes = [f"one file, by its keys a {_NAMES[kind]}, with the configs that were published with it"]
    if kind == "sd2" and "prediction_type" not in _own_scheduler(contents):
        notes.append(
            "it does not say what it predicts and is taken for a v-prediction of 768 pixels; for a base model set "
            "model.scheduler={prediction_type: epsilon} sampling.height=512 sampling.width=512"
        )
    return tuple(notes)


def check_single_part(name: str, path: str, part: torch.nn.Module) -> None:
    """Hold a file's names and shapes against a part, given without weights. Reads no weights.

    Raises:
        UserError: the part is not in the file, or not whole, or of another size.
    """
    shapes = {key: shape for key, shape in _look_into(path).shapes.items() if _is_of(name, key)}
    if not shapes:
        remedy = "give a file that has one as model.vae.path" if name == "vae" else "give a file that holds the whole model"
        raise UserError(f"model.path: {path} has no {name.replace('_', ' ')} in it: {remedy}")
    if name not in _CONVERTERS:
        _check_text_encoder(name, path, shapes, part)
        return
    try:
        found = _converted(name, {key: torch.empty(of, device="meta") for key, of in shapes.items()}, dict(part.config))
        wanted = part.state_dict()
        wrong = (key for key, value in wanted.items() if key not in found or found[key].shape != value.shape)
        first = next(iter([*wrong, *(found.keys() - wanted.keys())]), None)
    except KeyError as error:  # a layer that the configs have
        first = error.args[0]
    if first is not None:
        raise UserError(
            f"model.path: the {name} of {path} is another than its configs say ({first} is missing, of another size or new): "
            "give the folder of a diffusers pipeline"
        )


def _check_text_encoder(name: str, path: str, shapes: dict[str, tuple[int, ...]], part: torch.nn.Module) -> None:
    """By its table of words, whose name and size every reader looks for."""
    of_clip, of_open_clip = "transformer.text_model.embeddings.token_embedding.weight", "model.token_embedding.weight"
    first = (f"{_TEXTS[0]}{of_clip}", f"{_TEXTS[0]}{of_open_clip}", f"{_TEXTS[1]}0.{of_clip}")
    keys = first if name == "text_encoder" else (f"{_TEXTS[1]}1.{of_open_clip}",)
    found, wanted = [shapes[key] for key in keys if key in shapes], (part.config.vocab_size, part.config.hidden_size)
    if wanted not in found:
        raise UserError(
            f"model.path: the {name.replace('_', ' ')} of {path} is another than its configs say (its table of words is "
            f"{found[0] if found else 'missing'}, not {wanted}): give the folder of a diffusers pipeline"
        )


def read_single_part(name: str, kind: type, path: str, values: dict, folder: Path, dtype: torch.dtype) -> torch.nn.Module:
    """Load the weights of a part from a file that holds a whole model, or a VAE alone.

    Args:
        values: the part's config. folder: what `unfold` made, where a text encoder's config is.

    Raises:
        Exception: of many kinds, where weights are missing or are another model's.
    """
    weights = {key: value.to(dtype) for key, value in read_tensors(path, lambda key: _is_of(name, key))[0].items()}
    if name not in _CONVERTERS:
        part = create_diffusers_clip_model_from_ldm(kind, weights, name, str(folder), local_files_only=True)
        if missing := [key for key, value in part.state_dict().items() if value.is_meta]:  # which diffusers leaves so
            raise ValueError(f"its file lacks {missing[0]}")
        return part.to(dtype)
    with torch.device("meta"):
        part = kind.from_config(values)
    part.load_state_dict(_converted(name, weights, values), assign=True)
    return part


def _converted(name: str, weights: dict[str, torch.Tensor], values: dict) -> dict[str, torch.Tensor]:
    """Weights with diffusers' names, which a VAE's own file may have already, or their oldest ones."""
    if not any(".mid_block." in key for key in weights):
        return _CONVERTERS[name](weights, values)
    return {_OLDEST.sub(lambda match: _SINCE[match[0]], key): value for key, value in weights.items()}


def _is_of(part: str, key: str) -> bool:
    prefixes = {"unet": (_UNET,), "vae": (_VAE, *_BARE_VAE)}.get(part, _TEXTS)
    return key.startswith(prefixes)


def write_tokenizer(folder: Path, pad: str, length: int) -> None:
    """Write CLIP's tokenizer in the files that every version of transformers reads; ``length`` in tokens."""
    with gzip.open(_MERGES, "rt", encoding="utf-8") as file:
        merges = file.read().splitlines()
    letters = sorted(ByteLevel.alphabet())
    words = [*letters, *(f"{letter}</w>" for letter in letters), *(merge.replace(" ", "") for merge in merges)]
    first, last = "<|startoftext|>", "<|endoftext|>"
    special = {"bos_token": first, "eos_token": last, "unk_token": last, "pad_token": pad}
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": length, "do_lower_case": True, "errors": "replace"}
    folder.mkdir()
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate([*words, first, last])}))
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=2) + "\n")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | special, indent=2) + "\n")


def _architecture(path: str, contents: _Contents) -> str:
    """The folder of the published configs that a file's keys are of."""
    keys = contents.shapes
    if any("lora_" in key or ".lora" in key for key in keys):
        raise UserError(f"model.path: {path} holds adapters, no model: give it as model.lora.path, and the model here")
    if _FIRST_LAYER in keys and keys[_FIRST_LAYER][1] != 4:
        raise UserError(f"model.path: {path} takes {keys[_FIRST_LAYER][1]} channels: it is made for inpainting or editing")
    if "edm_mean" in keys or "edm_vpred.sigma_max" in keys:
        raise UserError(f"model.path: {path} is of EDM's kind, whose scheduler has no discrete betas: choose another model")
    if _FIRST_LAYER in keys:
        if any(key.startswith("conditioner.embedders.1.model.") for key in keys):
            return "sdxl"
        if any(key.startswith("cond_stage_model.model.") for key in keys):
            return "sd2"
        if any(key.startswith("cond_stage_model.transformer.") for key in keys):
            return "sd15"
    if any(key.startswith("conditioner.embedders.0.model.") for key in keys):
        raise UserError(f"model.path: {path} is SDXL's refiner, which draws from no text alone: give the base model")
    what = "no text encoder" if _FIRST_LAYER in keys else f"keys such as {next(iter(keys), 'none')}"
    raise UserError(
        f"model.path: {path} has {what}: one file must be a whole Stable Diffusion 1.x, 2.x or XL with A1111's names; of "
        "others give the folder of a diffusers pipeline"
    )


def _own_scheduler(contents: _Contents) -> dict:
    """What a file itself says of its scheduler: in its metadata, or by the empty keys that others look for."""
    found = {}
    if (kind := contents.metadata.get("modelspec.prediction_type")) in _PREDICTIONS:
        found["prediction_type"] = _PREDICTIONS[kind]
    if "v_pred" in contents.shapes:
        found["prediction_type"] = "v_prediction"
    if "ztsnr" in contents.shapes:
        found |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    return found


def _look_into(path: str) -> _Contents:
    """The keys and shapes of a file, without its weights."""
    return _contents(path, Path(path).stat().st_mtime_ns)


@lru_cache(maxsize=8)
def _contents(path: str, _: int) -> _Contents:
    if Path(path).suffix.lower() not in SUFFIXES:
        raise UserError(f"model.path: {path} is a file of another kind than {', '.join(SUFFIXES)}: convert it to safetensors")
    try:
        if path.lower().endswith(".safetensors"):
            with safe_open(path, "pt") as file:
                keys = file.keys()
                return _Contents({key: tuple(file.get_slice(key).get_shape()) for key in keys}, file.metadata() or {})
        return _Contents({key: tuple(value.shape) for key, value in read_tensors(path)[0].items()}, {})
    except Exception as error:  # safetensors and pickle raise many kinds
        if is_pointer(path):
            raise UserError(f"model.path: {path} is a pointer of git-LFS: run git lfs pull") from None
        hint = "" if path.lower().endswith(".safetensors") else "; nothing but tensors is unpickled: convert it to safetensors"
        raise UserError(f"model.path: cannot read {path}: {one_line(error)[:200]}{hint}") from None


def read_tensors(path: str, wanted: Callable[[str], bool] = lambda _: True) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Return those tensors of a file whose keys are wanted, and its metadata; those of a zipped pickle mapped into memory."""
    if path.lower().endswith(".safetensors"):
        with safe_open(path, "pt") as file:
            keys = file.keys()
            return {key: file.get_tensor(key) for key in keys if wanted(key)}, file.metadata() or {}
    found = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    while isinstance(found.get("state_dict"), dict):
        found = found["state_dict"]
    tensors = {key: value for key, value in found.items() if isinstance(key, str) and isinstance(value, torch.Tensor)}
    return {key: value for key, value in tensors.items() if wanted(key)}, {}
