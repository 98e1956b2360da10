"""A configuration file or the folder of a run, opened as a ready model: what `sample` and `eval` start from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from fastloop.checkpoints import list_checkpoints, load_checkpoint, load_weights
from fastloop.config import Config
from fastloop.denoisers import build_skeleton, make_trainable, ready_denoiser
from fastloop.denoisers.base import Denoiser
from fastloop.denoisers.parts import DTYPES
from fastloop.errors import UserError
from fastloop.preflight import check_device, preflight
from fastloop.recipes import apply_overrides, load_config, parse_config
from fastloop.rundir import read_run_config


def open_model(path: str, overrides: list[str]) -> tuple[Config, Callable[[], Denoiser]]:
    """Open a YAML file as the base model, or a run's folder as the model of its newest checkpoint.

    Returns:
        The configuration with its overrides, and what loads the model; until that is called no weights are.

    Raises:
        UserError: the configuration, the device or the folder cannot be used.
    """
    folder = Path(path)
    of_run = folder.is_dir()
    if of_run:
        values = read_run_config(folder).model_dump(mode="json")
        config = parse_config(apply_overrides(values, overrides), f"{folder / 'config.yaml'}")
    else:
        config = load_config(folder, overrides)
    check_device(config)
    found = list_checkpoints(folder / "checkpoints")
    if of_run and not found:
        raise UserError(f"{path} has no checkpoint yet: give the config file to use the base model")
    counts = not of_run and "chunk" in (config.prompts.too_long, config.eval.prompts.too_long)  # a run has its number
    if config.memory.automatic or counts:
        checked = preflight(config)
        config = checked.config
        checked.rewards.close()
        checked.eval_rewards.close()
    elif config.model.lora.path is not None or config.model.textual_inversion:  # whose files are refused before weights load
        skeleton = build_skeleton(config.model)
        skeleton.read_tokenizers(skeleton.path, config.model, skeleton.text_encoders)
        make_trainable(skeleton, config, fresh=not of_run)

    def load() -> Denoiser:
        starts = config.model.lora.path is not None and not config.model.lora.fuse  # from adapters, which the base has then
        denoiser = ready_denoiser(config, check_device(config), adapter=of_run or starts, fresh=not of_run)
        if of_run:
            weights, average, state = load_checkpoint(found[-1], config.ema.decay is not None)
            load_weights(denoiser.trainable(), weights if average is None else average)
            print(f"{path}: weights after iteration {state['iteration']}")
        for part in denoiser.trained_parts.values():
            part.to(DTYPES[config.model.dtype])  # as the run's engine has them, so that its evaluations can be repeated
        return denoiser

    return config, load
