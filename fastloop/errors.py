"""The ways in which a run ends early on purpose."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


class UserError(Exception):
    """Bad input: one line that names the key and the remedy. The command line prints it and exits with code 2."""


class RunFailed(Exception):
    """A run that cannot go on (failed reward, NaN, ratio off): the last good checkpoint is kept. Exit code 1."""


@dataclass(frozen=True)
class Unscored:
    """What a reward could not score: uint8 pictures (n, height, width, 3), their n prompts and metadata."""

    reward: str
    images: Any
    prompts: list[str]
    metadata: list[dict]


class RewardFailed(RunFailed):
    """A reward raised, took too long, or returned what cannot be used. ``unscored`` is absent where another rank has it."""

    def __init__(self, message: str, unscored: Unscored | None = None) -> None:
        super().__init__(message)
        self.unscored = unscored
