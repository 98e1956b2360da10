"""Where prompts come from: the shapes splits, 45 common animals, files, T2I-CompBench, data sets of the hub."""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import cycle, islice, zip_longest
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
    """Load the prompts of a source, in a fixed order.

    Raises:
        UserError: unknown source or category, missing or empty file, a line that cannot be read; ``key`` names the
            config's key.
    """
    source = config.source
    if source in ("shapes_train", "shapes_heldout"):
        return _shapes(config, key)
    if source == "animals":
        prompts = [Prompt(animal) for animal in ANIMALS]
    elif source.endswith((".txt", ".jsonl")):
        prompts = _read(Path(source).expanduser(), key)
    elif source.endswith(".tsv"):
        prompts = _read_tsv(Path(source).expanduser(), config.column, key)
    elif source.startswith("hf:"):
        prompts = _from_hub(source.removeprefix("hf:"), config, key)
    elif Path(source).expanduser().is_dir():
        prompts = _t2i_compbench(Path(source).expanduser(), config, key)
    else:
        raise UserError(
            f"{key}.source: {source!r} is not shapes_train, shapes_heldout, animals, a .txt, .jsonl or .tsv file, a folder, "
            "nor hf:OWNER/NAME"
        )
    return _of_categories(prompts, config, key)[: config.limit]


def prompt_facts(prompts: list[Prompt], eval_prompts: list[Prompt]) -> dict[str, dict[str, Any]]:
    """Say what tells the two lists of a run from others, by the key of the configuration, as prompts.json records it.

    ``sha256`` is of the texts and metadata in their order. ``trained_too`` counts the distinct texts of the evaluation that
    are training prompts as well, of ``distinct`` ones: 0 where they are held out.
    """

    def sha256(of: list[Prompt]) -> str:
        rows = (json.dumps([prompt.text, prompt.metadata], sort_keys=True, default=str) for prompt in of)
        return hashlib.sha256("\n".join(rows).encode()).hexdigest()

    texts, eval_texts = ({prompt.text for prompt in of} for of in (prompts, eval_prompts))
    return {
        "prompts": {"count": len(prompts), "sha256": sha256(prompts)},
        "eval.prompts": {
            "count": len(eval_prompts),
            "sha256": sha256(eval_prompts),
            "distinct": len(eval_texts),
            "trained_too": len(texts & eval_texts),
        },
    }


def score_name(held_out: bool) -> str:
    """Say what an evaluation's score is called, by whether training sees none of its prompts."""
    return "held-out score" if held_out else "evaluation score"


def _of_categories(prompts: list[Prompt], config: PromptsConfig, key: str) -> list[Prompt]:
    if config.categories is None:
        return prompts
    known = {prompt.metadata["category"]: None for prompt in prompts if "category" in prompt.metadata}
    if not known:
        raise UserError(f"{key}.categories: the prompts of {config.source} have no categories: remove it")
    for category in config.categories:
        if category not in known:
            raise UserError(f"{key}.categories: unknown {category!r}: one of {', '.join(known)}")
    return [prompt for prompt in prompts if prompt.metadata.get("category") in config.categories]


def _t2i_compbench(folder: Path, config: PromptsConfig, key: str) -> list[Prompt]:
    """T2I-CompBench's examples/dataset: CATEGORY_train.txt and CATEGORY_val.txt, a prompt a line; one of each in turn.

    Its further files, such as color_val_seen.txt and complex_train_action.txt, repeat prompts of these.
    """
    split = config.split or ("val" if key == "eval.prompts" else "train")
    files = sorted(folder.glob(f"*_{split}.txt"))
    if not files:
        raise UserError(
            f"{key}.source: {folder} has no file such as color_{split}.txt: give T2I-CompBench's examples/dataset, or a file"
        )
    columns = []
    for file in files:
        category = file.name.removesuffix(f"_{split}.txt")
        if config.categories is None or category in config.categories:
            columns.append([Prompt(prompt.text, {"category": category}) for prompt in _read(file, key)])
    if not columns:
        known = ", ".join(file.name.removesuffix(f"_{split}.txt") for file in files)
        raise UserError(f"{key}.categories: unknown {config.categories[0]!r}: one of {known}")
    return [prompt for row in zip_longest(*columns) for prompt in row if prompt is not None]


def _read_tsv(path: Path, column: str, key: str) -> list[Prompt]:
    """A table with a line of column names, as PartiPrompts.tsv; the other columns are metadata, their names in lower case."""
    rows = csv.DictReader(_lines(path, key), delimiter="\t", quoting=csv.QUOTE_NONE)
    return _from_rows(rows, [name for name in rows.fieldnames or () if name], column, str(path), key)


def _from_hub(name: str, config: PromptsConfig, key: str) -> list[Prompt]:
    """A data set of the hub, OWNER/NAME or OWNER/NAME:CONFIG, or a folder of one, by the package `datasets`."""
    try:
        from datasets import load_dataset
    except ImportError:
        raise UserError(f"{key}.source: hf: needs the package datasets: pip install fastloop[datasets]") from None
    path, _, part = name.partition(":")
    try:
        rows = load_dataset(path, part or None, split=config.split or "train")
    except Exception as error:  # no network, no such data set or split, a file that cannot be read
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{key}.source: cannot load {config.source}: {reason}") from None
    plain = [name for name, kind in rows.features.items() if getattr(kind, "dtype", None) in _PLAIN]
    return _from_rows(rows.select_columns(plain), plain, config.column, config.source, key)  # pictures are not decoded


_PLAIN = ("string", "large_string", "bool", "int32", "int64", "float32", "float64")


def _from_rows(rows: Iterable[dict[str, Any]], columns: list[str], column: str, where: str, key: str) -> list[Prompt]:
    found = next((name for name in columns if name.lower() == column.lower()), None)
    if found is None:
        raise UserError(f"{key}.column: {where} has no column {column!r}: it has {', '.join(columns) or 'none'}")
    prompts = []
    for row in rows:
        text = row[found]
        if not isinstance(text, str) or not text.strip():
            continue
        more = {name.lower(): row[name] for name in columns if name != found and row[name] not in (None, "")}
        if "category" in more:
            more["category"] = str(more["category"])
        prompts.append(Prompt(text.strip(), more))
    if not prompts:
        raise UserError(f"{key}.source: {where} holds no prompts")
    return prompts


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


def _lines(path: Path, key: str) -> list[str]:
    try:
        return path.read_text(encoding="utf-8-sig").split("\n")  # JSON strings may hold other line separators
    except (OSError, ValueError) as error:
        raise UserError(f"{key}.source: cannot read {path}: {getattr(error, 'strerror', None) or error}") from None


def _read(path: Path, key: str) -> list[Prompt]:
    prompts = []
    for number, line in enumerate(_lines(path, key), 1):
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
        """Return places ``start`` to ``start + count - 1`` of the stream; each pass over the prompts has its own order."""
        taken: list[Prompt] = []
        while len(taken) < count:
            epoch, offset = divmod(start + len(taken), len(self.prompts))
            order = np.random.default_rng([self.seed, epoch]).permutation(len(self.prompts))
            taken += [self.prompts[i] for i in order[offset : offset + count - len(taken)]]
        return taken
