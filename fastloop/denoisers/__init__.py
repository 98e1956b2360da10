"""One adapter per model family. It knows its checkpoint format, its conditioning and its export, nothing of RL.

A family is a subclass of `Denoiser` in a file of its own, and a line in ``FAMILIES``. What it declares is in
docs/architecture.md.
"""

from __future__ import annotations

import importlib

import torch

from fastloop import kernels, numerics
from fastloop.config import Config, ModelConfig
from fastloop.denoisers.files import model_source, naming_key, read_json, read_part_config, refuse_own_code
from fastloop.denoisers.lean import lighten_parts
from fastloop.denoisers.quantised import quantisation_problem
from fastloop.denoisers.single_file import is_single_file
from fastloop.errors import UserError
from fastloop.machine import xformers_problem

FAMILIES = {  # the class of a pipeline: the module and the class of its adapter
    "StableDiffusionPipeline": ("fastloop.denoisers.sd", "StableDiffusion"),
    "StableDiffusionXLPipeline": ("fastloop.denoisers.sdxl", "StableDiffusionXL"),
    "StableDiffusion3Pipeline": ("fastloop.denoisers.sd3", "StableDiffusion3"),
    "FluxPipeline": ("fastloop.denoisers.flux", "Flux"),
    "Flux2KleinPipeline": ("fastloop.denoisers.klein", "Klein"),
}
BASES = {  # pipelines with the same parts and weights: the class whose they are
    f"{name}{task}Pipeline": f"{name}Pipeline"
    for name in ("StableDiffusion", "StableDiffusionXL", "StableDiffusion3", "Flux")
    for task in ("Img2Img", "Inpaint")
}


def family(path: str, config: ModelConfig):
    """Return the adapter class of a pipeline.

    Raises:
        UserError: the pipeline's class is not supported, or this machine lacks the attention backend or bitsandbytes.
    """
    if config.attention == "xformers" and (problem := xformers_problem()):
        raise UserError(f"model.attention: {problem}; or set it to sdpa")
    if config.base_precision and (problem := quantisation_problem(config.base_precision)):
        raise UserError(f"model.base_precision: {problem}")
    index = read_json(path, config, "model_index.json")
    for key in ("variant", "revision"):
        other = key == "variant" and config.vae.path is not None  # whose files may have one
        if is_single_file(path) and not other and (value := getattr(config, key)) is not None:
            raise UserError(f"model.{key}: {value}, but {path} is one file, which has none: leave it out")
    name = index.get("_class_name")
    name = BASES.get(name, name) if isinstance(name, str) else name
    if not isinstance(name, str) or name not in FAMILIES:
        raise UserError(f"model.path: {path} is a {name}: supported are {', '.join(FAMILIES)}")
    refuse_own_code(path, index)
    module, name = FAMILIES[name]
    adapter = getattr(importlib.import_module(module), name)
    _refuse_other_parts(path, index, {**adapter.encoders_of(path, config), adapter.network_name: adapter.network_class})
    if config.vae.path is not None:
        index = {"vae": [None, read_part_config("vae", path, config).get("_class_name")]}
    with naming_key("vae", config):
        _refuse_other_parts(config.vae.path or path, index, {"vae": adapter.vae_class})
    if config.max_sequence_length is not None and adapter.sequence_length is None:
        raise UserError(f"model.max_sequence_length: {path} has a length of its own: leave it out")
    return adapter


def _refuse_other_parts(path: str, index: dict, kinds: dict[str, type]) -> None:
    """Raises ``UserError`` where a part is of another class than its family's, which would load and mean something else."""
    for part, kind in kinds.items():
        found = index.get(part)
        if isinstance(found, list) and found[-1] is not None and found[-1] != kind.__name__:
            raise UserError(
                f"model.path: the {part} of {path} is a {found[-1]}, and only a {kind.__name__} can be trained here"
            )


def load_denoiser(config: ModelConfig, device: torch.device):
    """Load the adapter of a model, its weights on a device. Raises ``UserError`` for anything that is not there."""
    path = model_source(config)
    return family(path, config).load(path, config, device)


def ready_denoiser(config: Config, device: torch.device, adapter: bool = True, trained: bool = False, fresh: bool = True):
    """Load a model and make it ready, always in this order.

    Weights, the VAE's fused kernels, residence, what is trained, leaner modules, the network's fused kernels, the KL's
    reference. Trained weights, an engine and compilation come after it.

    Args:
        adapter: whether it has what training adds, adapters or a policy over its noise; without, it is the base model.
        trained: whether it will be trained, so that gradients may be checkpointed and a KL has its reference.
        fresh: as for `make_trainable`.

    Raises:
        UserError: as `load_denoiser`, and for an adapter or blocks that do not fit the model.
    """
    numerics.pin()
    denoiser = load_denoiser(config.model, device)
    kernels.fuse(denoiser.vae, config.kernels, device)
    if config.memory.offload_frozen:
        denoiser.offload_frozen()
    if adapter:
        make_trainable(denoiser, config, trained, fresh)
    lighten_parts(denoiser, config.engine)
    kernels.fuse(denoiser.network, config.kernels, device)
    if trained and config.kl.weight:
        denoiser.keep_reference()
    return denoiser


def make_trainable(denoiser, config: Config, trained: bool = True, fresh: bool = True) -> None:
    """Add what a run trains: adapters or gradients of all weights, or a policy over the initial noise.

    ``trained``: as for `ready_denoiser`. ``fresh``: whether no saved weights come after it, so that the adapters that a run
    starts from are read. Raises ``UserError`` where it does not fit the model.
    """
    if config.trains_noise:
        denoiser.train_noise(config.noise_policy, config.sampling, config.seed)
    else:
        checkpointed = config.memory.gradient_checkpointing if trained else False
        denoiser.train_adapter(checkpointed, seed=config.seed, fresh=fresh)


def build_skeleton(config: ModelConfig):
    """Build the adapter without weights, on the meta device, for planning and checks; raises as ``load_denoiser`` does."""
    path = model_source(config)
    return family(path, config).skeleton(path, config)
