"""What a trained model leaves: adapters or a whole pipeline, as stock diffusers loads them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.utils import logging as diffusers_logging
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel

from fastloop.denoisers.adapters import ADAPTER
from fastloop.denoisers.files import read_json, read_scheduler, small_files
from fastloop.denoisers.parts import DTYPES, read_part
from fastloop.optimizers import holding


class Export:
    """The part of a `Denoiser` that writes it."""

    kohya_names: dict[
        str, str
    ] = {}  # of the parts that have adapters, by their names; none where that format has no fixed ones

    def export(self, folder: Path, dtype: str = "fp32", format: str = "diffusers") -> None:
        """Write what stock diffusers loads: adapters for ``load_lora_weights``, or a whole pipeline for ``from_pretrained``.

        Beside it, where the model has any, ``call.json``: arguments of the pipeline's call that it was trained with.

        Args:
            dtype: of all weights in the files; those of the network are rounded from float32. format: of adapters, for
                ``diffusers``, or in ``kohya``'s names, which A1111, Forge and ComfyUI read as well.
        """
        if self.config.adapter == "full":
            self._export_pipeline(folder, DTYPES[dtype])
        elif format == "kohya":
            self._export_kohya(folder, DTYPES[dtype])
        else:
            self._export_adapters(folder, DTYPES[dtype])
        call = {"max_sequence_length": self.max_sequence_length, "clip_skip": self.config.clip_skip}
        if call := {key: value for key, value in call.items() if value is not None}:
            (folder / "call.json").write_text(json.dumps(call))

    def _adapters(self, to: torch.dtype) -> dict[str, dict[str, torch.Tensor]]:
        """The adapters of each part in peft's names, scaled so that alpha is the rank: old readers take no other."""
        found = {}
        for name, part in self.trained_parts.items():
            # in peft's names: diffusers' older ones are for attention alone, mixed with others they are not loaded
            state, settings = get_peft_model_state_dict(part, save_embedding_layers=False), part.peft_config[ADAPTER]
            scale = settings.lora_alpha / settings.r
            if scale != 1:
                state = {key: value * scale if ".lora_B." in key else value for key, value in state.items()}
            # transformers 5 has no such level in CLIP's plain text model, and before that all readers look for it
            above = "text_model." if name.startswith("text_encoder") and not hasattr(part, "text_model") else ""
            found[name] = {above + key: value.to(to).contiguous() for key, value in state.items()}
        return found

    def _export_adapters(self, folder: Path, to: torch.dtype) -> None:
        adapters: dict[str, Any] = {}
        for name, state in self._adapters(to).items():
            settings = self.trained_parts[name].peft_config[ADAPTER]
            adapters[f"{name}_lora_layers"] = state
            adapters[f"{name}_lora_adapter_metadata"] = settings.to_dict() | {"lora_alpha": settings.r}
        self.pipeline_class.save_lora_weights(folder, **adapters)

    def _export_kohya(self, folder: Path, to: torch.dtype) -> None:
        found = {}
        for name, state in self._adapters(to).items():
            for key, value in state.items():
                module, matrix = key.removesuffix(".weight").rsplit(".", 1)
                layer = f"{self.kohya_names[name]}_{module.replace('.', '_')}"
                found[f"{layer}.lora_{'down' if matrix == 'lora_A' else 'up'}.weight"] = value
                found[f"{layer}.alpha"] = torch.tensor(float(self.trained_parts[name].peft_config[ADAPTER].r), dtype=to)
        folder.mkdir()
        save_file(found, folder / "pytorch_lora_weights.safetensors", {"format": "pt"})

    def _export_pipeline(self, folder: Path, to: torch.dtype) -> None:
        diffusers_logging.disable_progress_bar()
        # The other parts come from the files again, in the same dtype, where there are files.
        own = self.parts if self.config.random_init else {self.network_name: self.network}
        parameters = {f"{part}.{name}": p for part, module in own.items() for name, p in module.named_parameters()}
        with holding(parameters, {name: p.detach().to(to) for name, p in parameters.items()}):
            if self.config.random_init:
                self._random_pipeline().save_pretrained(folder)
                for name, encoder in self.text_encoders.items():
                    _name_as_before(encoder, folder / name)
                return
            self.network.save_pretrained(folder / self.network_name)
        for name, kind in {**self.encoders_of(self.path, self.config), "vae": self.vae_class}.items():
            part = read_part(name, kind, self.path, self.config, to, torch.device("cpu"))
            self.fuse_into({name: part}, self.config, self.network)
            part.save_pretrained(folder / name)
            _name_as_before(part, folder / name)
        small = small_files(self.path, self.config)
        for name in ("scheduler", *self.tokenizers):
            shutil.copytree(small / name, folder / name)  # as they are: what any version of the libraries reads
        if self.config.scheduler:
            file = folder / "scheduler" / "scheduler_config.json"
            file.write_text(json.dumps(read_scheduler(self.path, self.config), indent=2) + "\n")
        (folder / "model_index.json").write_text(json.dumps(self._index(), indent=2) + "\n")

    def _index(self) -> dict[str, Any]:
        """What the model's own model_index.json says, of the parts that are written."""
        index = read_json(self.path, self.config, "model_index.json")
        index |= {"_class_name": self.pipeline_class.__name__, "_diffusers_version": diffusers.__version__}
        index |= {name: [None, None] if value is None else value for name, value in self.absent.items()}
        for name, tokenizer in self.tokenizers.items():
            if index[name][1].startswith("Auto"):  # which no pipeline loads
                index[name] = ["transformers", type(tokenizer).__name__]
        return index

    def _random_pipeline(self):
        """Stock diffusers' pipeline of these parts, beside which there are no files."""
        values = read_scheduler(self.path, self.config)
        scheduler = getattr(diffusers, values["_class_name"]).from_config(values)
        return self.pipeline_class(**self.parts, **self.tokenizers, scheduler=scheduler, **self.absent)


def _name_as_before(part: torch.nn.Module, folder: Path) -> None:
    """Puts the level ``text_model.`` above the weights of a CLIP text model, as all published ones have it.

    transformers has taken that level away, and reads both; before, it takes random weights for those without.
    """
    if not isinstance(part, CLIPTextModel) or hasattr(part, "text_model"):
        return
    for file in folder.glob("*.safetensors"):
        save_file({f"text_model.{name}": value for name, value in load_file(file).items()}, file, {"format": "pt"})
    for file in folder.glob("*.safetensors.index.json"):  # of a model in several files
        index = json.loads(file.read_text())
        index["weight_map"] = {f"text_model.{name}": where for name, where in index["weight_map"].items()}
        file.write_text(json.dumps(index, indent=2) + "\n")
