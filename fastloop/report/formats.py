"""How the report, and the line of an iteration, write numbers and times for people; and pictures into the page."""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from datetime import datetime
from typing import Any

SPACE = "\u00a0"  # between a number and its unit, where no line may break
ABSENT = "–"


def count(value: float) -> str:
    """Write a whole number with commas between its thousands, a dash for NaN."""
    return f"{int(value):,}" if math.isfinite(value) else ABSENT


def decimal(value: float, signed: bool = False) -> str:
    """Write a number with three decimals, a very large or small one with three digits and a power; a dash for NaN."""
    if not math.isfinite(value):
        return ABSENT
    fixed = value == 0 or 0.001 <= abs(value) < 10_000
    return f"{value:{'+' if signed else ''}{'.3f' if fixed else '.3g'}}".replace("-", "−")


def duration(seconds: float) -> str:
    """Write a length of time with its two largest units: 9.0 s, 3 min 20 s, 2 h 5 min; "not recorded" for NaN."""
    if not math.isfinite(seconds):
        return "not recorded"
    minutes, rest = divmod(round(seconds), 60)
    if not minutes:
        return f"{seconds:.1f}{SPACE}s"
    if minutes < 60:
        return f"{minutes}{SPACE}min{SPACE}{rest}{SPACE}s"
    return f"{minutes // 60}{SPACE}h{SPACE}{minutes % 60}{SPACE}min"


def moment(value: Any) -> str:
    """Write a time in ISO 8601 as date, minute and time zone; "" for anything else."""
    try:
        return f"{datetime.fromisoformat(value):%Y-%m-%d %H:%M %Z}".strip()
    except (TypeError, ValueError):
        return ""


def ranges(numbers: Sequence[int]) -> str:
    """Write numbers as ranges: [3, 4, 5, 9] as "3–5, 9"."""
    spans: list[list[int]] = []
    for number in sorted(numbers):
        if spans and number <= spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ", ".join(f"{first}" if first == last else f"{first}–{last}" for first, last in spans)


def data_uri(kind: str, data: bytes) -> str:
    """Write a picture's bytes as an address that holds them; ``kind`` is its media type."""
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
