"""Markdown tables that are easy to read as plain text too."""

from __future__ import annotations


def padded(lines: list[list[str]]) -> str:
    """A table of these lines, the first its head, with columns of one width."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    text = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines]
    text.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(text)
