"""The ways in which a run ends early on purpose, and how a message of any origin becomes a line that can be shown."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

LIMIT = 600  # characters of a message; our own longest, with a path in it, have about 500
_HEAD, _TAIL = 340, 200  # of a longer one: what is wrong stands at the beginning, the remedy at the end
_SPACES = re.compile(r"[^\S\x1c-\x1f\x85\u2028\u2029]+")  # without the control characters and separators that Python counts in
_USER = re.compile(r"""://[^/\s'"]*@""")  # of a URL, mostly with a password
_LEFT_OUT = re.compile(r" ?\[\.\.\. (\d{1,12}) characters left out \.\.\.\] ?")


def one_line(text: object) -> str:
    """Make one printable line of any text, of at most ``LIMIT`` characters.

    Runs of white space become a space. What does not print or steers a terminal (control characters, marks that turn the
    direction of writing, characters without width, halves of surrogate pairs) is written as Python's escapes. The user and
    password of a URL become ***. Of a long text the middle is left out. The result is left as it is by a second call.
    """
    text = str(text)
    if len(text) > 20 * LIMIT:  # first, so that 10 MB cost no more than a page
        text = _shortened(text, 10 * LIMIT, 10 * LIMIT)
    text = _SPACES.sub(" ", text).strip(" ")
    if not text.isprintable():
        text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    text = _USER.sub("://***@", text)
    return text if len(text) <= LIMIT else _shortened(text, _HEAD, _TAIL)


def described(error: BaseException) -> str:
    """Give type and message of an exception in one line, also of one whose message cannot be made."""
    name = type(error).__name__
    try:
        said = one_line(error)
    except Exception:
        return name
    return f"{name}: {said}" if said else name


def _shortened(text: str, head: int, tail: int) -> str:
    """The ends of a text, and how much is left out between them; what was left out of it before is added to that."""
    first, *rest = _LEFT_OUT.split(text)  # text, number, text, number, text ...
    front, back = (first, rest.pop()) if rest else (text[:head], text[head:])
    left_out = sum(map(int, rest[::2])) + sum(map(len, rest[1::2])) + len(front[head:]) + len(back[:-tail])
    return f"{front[:head].rstrip()} [... {left_out} characters left out ...] {back[-tail:].lstrip()}"


class _OneLine(Exception):
    """An exception whose message is one printable line, whoever the text in it came from."""

    def __init__(self, message: object = "") -> None:
        super().__init__(one_line(message))


class UserError(_OneLine):
    """Bad input: one line that names the key and the remedy. The command line prints it and exits with code 2."""


class RunFailed(_OneLine):
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

    def __init__(self, message: object, unscored: Unscored | None = None) -> None:
        super().__init__(message)
        self.unscored = unscored


class RewardTimedOut(RewardFailed):
    """A reward has not answered within its timeout."""
