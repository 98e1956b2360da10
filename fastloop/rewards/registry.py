"""Rewards by name: those that come along, and functions of one's own. See `fastloop.rewards` for what a reward is."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from collections.abc import Callable
from typing import Any

from fastloop.config import RewardConfig
from fastloop.errors import UserError
from fastloop.rewards import jpeg, shapes

# A factory, or where to import it from: the rewards with models need packages that the others do not.
REGISTRY: dict[str, Callable[..., Any] | str] = {
    "jpeg_compressibility": jpeg.Compressibility,
    "jpeg_incompressibility": jpeg.Incompressibility,
    "shapes": shapes.Shapes,
    **{f"shapes_{category}": shapes.of_category(category) for category in shapes.CATEGORIES},
    "aesthetic": "fastloop.rewards.clip_scores:Aesthetic",
    "clipscore": "fastloop.rewards.clip_scores:ClipScore",
    "pickscore": "fastloop.rewards.clip_scores:PickScore",
    "hpsv2": "fastloop.rewards.clip_scores:HPSv2",
    "imagereward": "fastloop.rewards.blip_scores:ImageReward",
    "blip_vqa": "fastloop.rewards.blip_scores:BlipVqa",
    "vlm_judge": "fastloop.rewards.judge:VlmJudge",
    "ocr": "fastloop.rewards.ocr:Ocr",
    "http": "fastloop.rewards.remote:Remote",
}


def build(config: RewardConfig, key: str) -> Any:
    """Build the reward of a configuration, not started yet. Raises ``UserError`` naming ``key`` where it cannot be made."""
    if config.name in REGISTRY:
        factory = REGISTRY[config.name]
        if isinstance(factory, str):
            module, _, name = factory.partition(":")
            factory = getattr(importlib.import_module(module), name)
    elif ":" in config.name:
        function = _import(config.name, key)

        def factory(**params):
            inspect.signature(function).bind(None, None, None, **params)  # TypeError now, not after the first rollout
            return lambda images, prompts, metadata: function(images, prompts, metadata, **params)
    else:
        raise UserError(
            f"{key}.name: unknown reward {config.name!r}: one of {', '.join(REGISTRY)}, or MODULE:FUNCTION of your own"
        )
    try:
        return factory(**config.params)
    except (TypeError, ValueError, OSError) as error:
        raise UserError(f"{key}.params: {config.name}: {error}") from None


def _import(name: str, key: str) -> Callable[..., Any]:
    module_name, _, function = name.partition(":")
    # as `python -m` would: a module beside the config's user is found too, after installed ones
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        found = getattr(importlib.import_module(module_name), function)
    except (Exception, SystemExit) as error:  # whatever the user's module raises while it is imported
        raise UserError(f"{key}.name: cannot import {name}: {type(error).__name__}: {error}") from None
    if not callable(found):
        raise UserError(f"{key}.name: {name} is of type {type(found).__name__}, not a function")
    return found
