"""What runs leave in their folders, for the tests."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file


def status(folder: Path) -> str:
    return json.loads((folder / "run.json").read_text())["status"]


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def checkpoints(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def weights(folder: Path, iteration: int = 2, name: str = "weights") -> dict[str, torch.Tensor]:
    return load_file(folder / "checkpoints" / f"iteration-{iteration:06d}" / f"{name}.safetensors")


def distance(found: dict, wanted: dict, start: dict) -> float:
    """Of the weights from those wanted, as a share of the way that training took them."""
    total = sum((found[k] - wanted[k]).square().sum() for k in wanted)
    return float((total / sum((wanted[k] - start[k]).square().sum() for k in wanted)) ** 0.5)


def equal(one: dict, other: dict) -> bool:
    return set(one) == set(other) and all(torch.equal(one[key], other[key]) for key in one)
