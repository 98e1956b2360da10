"""Recipes: YAML files and dotted overrides become a configuration, and whatever is wrong with them one line."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from fastloop.algorithms import ALGORITHMS, settable
from fastloop.config import Config
from fastloop.errors import UserError


def load_config(path: str | Path, overrides: list[str] = ()) -> Config:
    """Read a YAML file and apply ``key=value`` overrides with dotted keys.

    Raises:
        UserError: one line with the file, the key and the remedy.
    """
    path = Path(path)
    try:
        values = yaml.load(path.read_text(), _UniqueKeys)
    except FileNotFoundError:
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.y*ml")], 1)
        hint = f": did you mean {path.parent / near[0]}?" if near else ": the recipes are in configs/"
        raise UserError(f"no config file {path}{hint}") from None
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot read the config file {path}: {reason}; give a YAML file, as in configs/") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: 2024-13-01 is no date
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}, column {mark.column + 1}," if mark else ""
        raise UserError(f"{path}{where} is not valid YAML: {getattr(error, 'problem', error)}") from None
    if not isinstance(values, dict):
        found = "nothing" if values is None else f"a {type(values).__name__}"
        raise UserError(f"{path}: expected keys such as 'algorithm: loop', found {found}")
    return parse_config(apply_overrides(values, overrides), str(path))


class _UniqueKeys(yaml.SafeLoader):
    """YAML as it is meant: of a key given twice PyYAML would silently take the last."""

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        node, seen = super().compose_mapping_node(anchor), set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"the key {key.value!r} is given twice", problem_mark=key.start_mark)
            seen.add(key.value)
        return node


def apply_overrides(values: dict[str, Any], overrides: list[str]) -> dict[str, Any]:
    """Return ``values`` with ``sampling.steps=20``-style overrides put in, list items by number (``rewards.0.weight=2``)."""
    values = yaml.safe_load(yaml.safe_dump(values))  # a deep copy
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise UserError(f"override {text!r}: write it as key=value, for example sampling.steps=20")
        try:
            parsed = yaml.safe_load(value)
        except (yaml.YAMLError, ValueError):
            raise UserError(f"override {key}: {value!r} is not a YAML value; quote it") from None
        *parents, last = key.split(".")
        node: Any = values
        for part in parents:
            node = _step_into(node, part, key)
        if isinstance(node, list):
            if not last.isdecimal() or int(last) >= len(node):
                raise UserError(f"override {key}: {last!r} is not one of the items 0 to {len(node) - 1}")
            node[int(last)] = parsed
        else:
            node[last] = parsed
    return values


def _step_into(node: Any, part: str, key: str) -> Any:
    if isinstance(node, list):
        if not part.isdecimal() or int(part) >= len(node):
            raise UserError(f"override {key}: {part!r} is not one of the items 0 to {len(node) - 1}")
        return node[int(part)]
    if node.get(part) is None:
        node[part] = {}
    if not isinstance(node[part], (dict, list)):
        raise UserError(f"override {key}: {part!r} is a single value, it has no keys below it")
    return node[part]


def parse_config(values: dict[str, Any], source: str) -> Config:
    """Return a validated configuration. Raises ``UserError`` with one line: source, key, what is wrong, nearest name."""
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        # a misspelt key first: what it leaves missing follows from it
        problems = sorted(error.errors(), key=lambda problem: problem["type"] != "extra_forbidden")
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise UserError(f"{source}: {_explain(problems[0])}{more}") from None


def dump_config(config: Config) -> str:
    """Return the configuration as YAML; reading it back gives the same one.

    What the algorithm brings is left out, so that the file with another `algorithm` is that algorithm's; so are the defaults
    of keys that another algorithm brings.
    """
    values, settings = config.model_dump(mode="json"), ALGORITHMS[config.algorithm].settings
    for key, value in ALGORITHMS[config.algorithm].of_keys().items():
        if values[key] == value:
            del values[key]
    for section, keys in settable().items():
        fields = Config.model_fields[section].annotation.model_fields
        for key in keys:
            if values[section][key] == settings.get(section, {}).get(key, fields[key].default):
                del values[section][key]
    return yaml.safe_dump(values, sort_keys=False)


def _explain(problem: dict[str, Any]) -> str:
    kind, value, parents = problem["type"], problem["input"], list(problem["loc"])
    key = ".".join(str(part) for part in parents)
    if kind == "extra_forbidden":
        known = list(_model_at(parents[:-1]).model_fields)
        near = difflib.get_close_matches(str(parents[-1]), known, 1)
        near += [path for path in _paths(Config) if path.split(".")[-1] == parents[-1]]
        remedy = f"did you mean {' or '.join(map(repr, near))}?" if near else f"the keys here are {', '.join(known)}"
        return f"{key}: unknown key; {remedy}"
    if kind == "value_error":  # cross-field rules name their key themselves
        return f"{key}: {problem['ctx']['error']}" if key else str(problem["ctx"]["error"])
    if kind == "missing":
        return f"{key}: missing; add it"
    if kind == "model_type":
        return f"{key}: expected keys below it ({', '.join(_model_at(parents).model_fields)}), got {value!r}"
    if kind == "list_type":
        return f"{key}: expected a list in [ ], got {value!r}"
    if kind == "string_type":
        quote = "" if value is None or isinstance(value, (dict, list)) else "; put it in quotes"
        return f"{key}: expected text, got {value!r}{quote}"
    return f"{key}: {problem['msg'][0].lower()}{problem['msg'][1:]}, got {value!r}"


def _model_at(parents: list[Any]) -> type[BaseModel]:
    """The model that a path of keys leads to."""
    model: type[BaseModel] = Config
    for part in parents:
        if isinstance(part, str):
            model = _model_of(model.model_fields[part].annotation)
    return model


def _model_of(annotation: Any) -> type[BaseModel] | None:
    """The model in an annotation such as ``list[RewardConfig] | None``; ``None`` where there is none."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((model for inner in get_args(annotation) if (model := _model_of(inner))), None)


def _paths(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """The dotted names of all keys, without those of list items."""
    for name, field in model.model_fields.items():
        yield prefix + name
        below = _model_of(field.annotation)
        if below and isinstance(field.annotation, type):
            yield from _paths(below, f"{prefix}{name}.")
