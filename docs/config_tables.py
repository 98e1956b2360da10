"""Writes the tables of docs/config.md from the models of the configuration: ``python docs/config_tables.py``.

The page's prose is written by hand. Below the heading with the name of a section stands that section's table, which begins
with ``HEADER``; a new section needs its heading and the ``HEADER`` written once.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from fastloop.config import Config

PAGE = Path(__file__).with_name("config.md")
HEADER = "| key | values | default | description |\n|---|---|---|---|\n"
BOUNDS = {"minimum": ">= ", "exclusiveMinimum": "> ", "maximum": "<= ", "exclusiveMaximum": "< ", "multipleOf": "multiple of "}
WORDS = {"string": "text", "object": "mapping"}
SCHEMA = Config.model_json_schema()
MODELS = {"Config": SCHEMA, **SCHEMA["$defs"]}


def sections(model: str = "Config", prefix: str = "") -> dict[str, str]:
    """Return what stands before the keys of each model, by the model's name: ``model.vae.``, of list items ``rewards.N.``."""
    found = {model: prefix}
    for key, value in MODELS[model]["properties"].items():
        if below := _model_of(value):
            found = sections(below, f"{prefix}{key}." if "$ref" in value else f"{prefix}{key}.N.") | found
    return found


def table(model: str) -> str:
    """Return the table of a model: dotted key, values that it takes, default, description."""
    rows = []
    for key, value in MODELS[model]["properties"].items():
        *others, last = _values(value)
        values = f"{', '.join(others)} or {last}" if others else last
        default = "" if "$ref" in value else _yaml(value["default"]) if "default" in value else "required"
        rows.append(f"| `{PREFIXES[model]}{key}` | {values} | {default} | {value['description']} |\n")
    return HEADER + "".join(rows)


def rewritten(page: str) -> str:
    """Return the page with its tables as they follow from the models.

    Raises:
        ValueError: a section has no table in the page.
    """
    for model in PREFIXES:
        heading = f"## {_heading(model)}"
        before = rf"^({re.escape(heading)}\n(?:(?!## ).*\n)*?)"
        old = re.compile(rf"{before}{re.escape(HEADER)}(?:\|.*\n)*", re.M)
        page, count = old.subn(lambda match, of=model: match[1] + table(of), page)
        if count != 1:
            raise ValueError(f"{PAGE.name} has no table under {heading!r}: write the heading, and below it\n{HEADER}")
    return page


def _heading(model: str) -> str:
    return PREFIXES[model].removesuffix(".").removesuffix(".N") or "Top level"


def _model_of(value: dict[str, Any]) -> str | None:
    """The model that a key holds, itself or as the items of a list."""
    if "$ref" in value:
        return value["$ref"].rpartition("/")[2]
    inner = [*value.get("anyOf", ()), value.get("items", {})]
    return next((model for of in inner if (model := _model_of(of))), None) if value else None


def _values(value: dict[str, Any]) -> list[str]:
    """What a key takes, in words, by its JSON schema."""
    kind = value.get("type")
    if "anyOf" in value:
        return [text for inner in value["anyOf"] for text in _values(inner)]
    if "$ref" in value:
        return [f"[section](#{_heading(_model_of(value)).replace('.', '')})"]
    if "enum" in value or "const" in value:
        return [f"`{choice}`" for choice in value.get("enum", [value.get("const")])]
    if kind == "boolean":
        return ["true", "false"]
    if "prefixItems" in value:
        return [f"list of {value['minItems']} ({_values(value['prefixItems'][0])[0]})"]
    if kind == "array":
        return [f"list of {'at least one ' * ('minItems' in value)}{_values(value['items'])[0]}"]
    bounds = " and ".join(f"{sign}{_yaml(value[name])}" for name, sign in BOUNDS.items() if name in value)
    return [f"{WORDS.get(kind, kind)} {bounds}".strip()]


def _yaml(value: Any) -> str:
    """A default as YAML has it."""
    if isinstance(value, list):
        return f"`[{', '.join(_yaml(item).strip('`') for item in value)}]`"
    if isinstance(value, str):
        return f"`{value}`" if value else '`""`'
    return re.sub(r"e-0*", "e-", json.dumps(value))


PREFIXES = sections()

if __name__ == "__main__":
    PAGE.write_text(rewritten(PAGE.read_text()))
