"""What a trained model leaves: adapters or a whole pipeline, as stock diffusers loads them."""

from __future__ import annotations

import json
from pathlib import Path

import diffusers
import torch
from diffusers.utils import logging as diffusers_logging
from peft.utils import get_peft_model_state_dict

from fastloop.denoisers.adapters import ADAPTER
from fastloop.denoisers.files import read_json
from fastloop.denoisers.parts import DTYPES
from fastloop.optimizers import holding


class Export:
    """The part of a `Denoiser` that writes it."""

    def export(self, folder: Path, dtype: str = "fp32") -> None:
        """Write what stock diffusers loads: adapters for ``load_lora_weights``, or a whole pipeline for ``from_pretrained``.

        Beside it, where the model has any, ``call.json``: arguments of the pipeline's call that it was trained with.

        Args:
            dtype: of all weights in the files; those of the network are rounded from float32.
        """
        self._export_weights(folder, DTYPES[dtype])
        if self.max_sequence_length is not None:
            (folder / "call.json").write_text(json.dumps({"max_sequence_length": self.max_sequence_length}))

    def _export_weights(self, folder: Path, to: torch.dtype) -> None:
        if self.config.adapter == "lora":
            adapters = {}
            for name, part in self.trained_parts.items():
                # in peft's names: diffusers' older ones are for attention alone, mixed with others they are not loaded
                state = get_peft_model_state_dict(part, save_embedding_layers=False)
                adapters[f"{name}_lora_layers"] = {key: value.to(to) for key, value in state.items()}
                # without it diffusers takes alpha = rank, whatever was trained
                adapters[f"{name}_lora_adapter_metadata"] = part.peft_config[ADAPTER].to_dict()
            self.pipeline_class.save_lora_weights(folder, **adapters)
            return
        diffusers_logging.disable_progress_bar()
        # The other parts come from the files again, in the same dtype, where there are files.
        own = self.parts if self.config.random_init else {self.network_name: self.network}
        parameters = {f"{part}.{name}": p for part, module in own.items() for name, p in module.named_parameters()}
        with holding(parameters, {name: p.detach().to(to) for name, p in parameters.items()}):
            self._pipeline(to).save_pretrained(folder)

    def _pipeline(self, dtype: torch.dtype):
        """Stock diffusers' pipeline around this network."""
        if self.config.random_init:
            values = read_json(self.path, self.config, "scheduler_config.json", "scheduler")
            scheduler = getattr(diffusers, values["_class_name"]).from_config(values)
            return self.pipeline_class(**self.parts, **self.tokenizers, scheduler=scheduler, **self.absent)
        return self.pipeline_class.from_pretrained(
            self.path,
            revision=self.config.revision,
            variant=self.config.variant,
            use_safetensors=True,
            torch_dtype=dtype,
            **self.tokenizers,
            **{self.network_name: self.network},
            **self.absent,
        )
