"""Where prompts come from: the shapes splits, 45 common animals, a text file, a JSONL file."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np

from fastloop.config import PromptsConfig
from fastloop.errors import UserError
from fastloop.shapes import grammar

PER_CATEGORY = 400  # of the shapes sources, unless `limit` says fewer: enough that a training prompt hardly comes twice

# The 45 common animals of DDPO's prompt list
ANIMALS = (  # noqa: SIM905
    "cat dog horse monkey rabbit zebra spider bird sheep deer cow goat lion tiger bear raccoon fox wolf lizard beetle "
    "ant butterfly fish shark whale dolphin squirrel mouse rat snake turtle frog chicken duck goose bee pig turkey fly "
    "llama camel bat gorilla hedgehog kangaroo"
).split()


@dataclass(frozen=True)
class Prompt:
    """One prompt; ``metadata`` goes to the rewards (``category`` also makes the per-category tables)."""

    text: str
    metadata: dict[str, Any] = field(default_factory=dict)


def load_prompts(config: PromptsConfig, key: str = "prompts") -> list[Prompt]:
    """The prompts of a source, in a fixed order.

    Raises:
        UserError: unknown source, missing or empty file, a line that cannot be read; ``key`` names the config's key.
    """
    if config.source in ("shapes_train", "shapes_heldout"):
        return _shapes(config, key)
    if config.categories is not None:
        raise UserError(f"{key}.categories: only the shapes sources have categories: remove it")
    if config.source == "animals":
        prompts = [Prompt(animal) for animal in ANIMALS]
    elif config.source.endswith((".txt", ".jsonl")):
        prompts = _read(Path(config.source).expanduser(), key)
    else:
        raise UserError(
            f"{key}.source: {config.source!r} is not shapes_train, shapes_heldout, animals, nor a .txt or .jsonl file"
        )
    return prompts[: config.limit]


def _shapes(config: PromptsConfig, key: str) -> list[Prompt]:
    categories = config.categories or list(grammar.CATEGORIES)
    for category in categories:
        if category not in grammar.CATEGORIES:
            raise UserError(f"{key}.categories: unknown {category!r}: one of {', '.join(grammar.CATEGORIES)}")
    each = PER_CATEGORY if config.limit is None else -(-config.limit // len(categories))
    columns = []
    for category in categories:
        requests = grammar.split(category, held_out=config.source == "shapes_heldout")
        order = np.random.default_rng(0).permutation(len(requests))
        # small categories come round again, so that every category has the same share
        picked = islice(cycle(order), each)
        columns.append([Prompt(requests[i].prompt, {"category": category}) for i in picked])
    return [prompt for row in zip(*columns, strict=True) for prompt in row][: config.limit]


def _read(path: Path, key: str) -> list[Prompt]:
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # JSON strings may hold other line separators
    except (OSError, ValueError) as error:
        raise UserError(f"{key}.source: cannot read {path}: {getattr(error, 'strerror', None) or error}") from None
    prompts = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        if path.suffix == ".txt":
            prompts.append(Prompt(line.strip()))
            continue
        try:
            row = json.loads(line)
            text = row.pop("prompt")
        except (json.JSONDecodeError, KeyError, AttributeError, TypeError):
            text = None
        if not isinstance(text, str):
            raise UserError(f'{key}.source: {path}:{number} is not an object such as {{"prompt": "a cat"}}')
        if not isinstance(row.get("category", ""), str):
            raise UserError(f"{key}.source: {path}:{number}: category {row['category']!r} is no text: put it in quotes")
        prompts.append(Prompt(text, row))
    if not prompts:
        raise UserError(f"{key}.source: {path} holds no prompts")
    return prompts


class PromptStream:
    """Endless shuffled passes over the prompts, without a state of its own: the place in the stream is the caller's."""

    def __init__(self, prompts: list[Prompt], seed: int) -> None:
        self.prompts, self.seed = prompts, seed

    def draw(self, start: int, count: int) -> list[Prompt]:
        """Places ``start`` to ``start + count - 1`` of the stream; each pass over the prompts has its own order."""
        taken: list[Prompt] = []
        while len(taken) < count:
            epoch, offset = divmod(start + len(taken), len(self.prompts))
            order = np.random.default_rng([self.seed, epoch]).permutation(len(self.prompts))
            taken += [self.prompts[i] for i in order[offset : offset + count - len(taken)]]
        return taken
