"""Prompts of the shapes world: what can be said, and what a sentence asks for.

Five categories after T2I-CompBench (arXiv 2307.06350): color, shape, texture, spatial, numeracy. A prompt is *held out*
when it contains a binding (a colour with a shape, a texture with a shape, a pair of shapes, a number with a shape) from
the held-out set; no training prompt contains one, so the held-out score measures unseen combinations of known words.
"""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass, replace

COLORS = {
    "red": (228, 40, 40),
    "green": (40, 190, 60),
    "blue": (50, 80, 245),
    "yellow": (245, 225, 40),
    "purple": (200, 50, 220),
    "cyan": (40, 215, 225),
    "white": (245, 245, 245),
}
SHAPES = ("circle", "square", "triangle", "ring", "cross")
TEXTURES = ("plain", "striped", "dotted")
NUMBERS = {"two": 2, "three": 3, "four": 4}
RELATIONS = ("left of", "right of", "above", "below")
CATEGORIES = ("color", "shape", "texture", "spatial", "numeracy")


@dataclass(frozen=True)
class Thing:
    """One object that a prompt asks for; ``None`` means that the prompt leaves the attribute free."""

    shape: str
    color: str | None = None
    texture: str | None = None

    def __str__(self) -> str:
        words = (self.color, None if self.texture == "plain" else self.texture, self.shape)
        return " ".join(word for word in words if word)


@dataclass(frozen=True)
class Request:
    """What a prompt asks for: the objects and, in the spatial category, the relation of the first to the second."""

    category: str
    things: tuple[Thing, ...]
    relation: str | None = None

    @property
    def prompt(self) -> str:
        """The sentence that states it."""
        if self.category == "numeracy":
            word = {n: w for w, n in NUMBERS.items()}[len(self.things)]
            return f"{word} {_plural(self.things[0])}"
        first, second = self.things
        return f"a {first} {self.relation or 'and'} a {second}"

    @property
    def bindings(self) -> set[tuple[str, str]]:
        """The combinations of words that decide whether the prompt is held out."""
        found = {(thing.color, thing.shape) for thing in self.things if thing.color}
        if self.category == "texture":
            found |= {(thing.texture, thing.shape) for thing in self.things if thing.texture != "plain"}
        if self.category == "shape":
            found.add(tuple(sorted(thing.shape for thing in self.things)))
        if self.category == "numeracy":
            found.add((str(len(self.things)), self.things[0].shape))
        return found


HELD_OUT = {
    *((color, SHAPES[(2 * i) % len(SHAPES)]) for i, color in enumerate(COLORS)),  # one shape for each colour
    ("striped", "ring"),
    ("dotted", "square"),
    ("circle", "cross"),
    ("ring", "triangle"),
    ("2", "triangle"),
    ("3", "circle"),
    ("4", "cross"),
}


def all_requests(category: str) -> list[Request]:
    """List every request that the grammar can make in a category, in a fixed order."""
    colored = [Thing(shape, color) for color, shape in itertools.product(COLORS, SHAPES)]
    if category == "numeracy":
        return [Request(category, (thing,) * n) for thing in colored for n in NUMBERS.values()]
    if category == "shape":
        return [Request(category, (Thing(a), Thing(b))) for a, b in itertools.permutations(SHAPES, 2)]
    pairs = [(a, b) for a, b in itertools.permutations(colored, 2) if a.color != b.color and a.shape != b.shape]
    if category == "spatial":
        return [Request(category, pair, relation) for pair in pairs for relation in RELATIONS]
    if category == "texture":
        textures = [(s, t) for s, t in itertools.permutations(TEXTURES, 2)]
        return [Request(category, (replace(a, texture=s), replace(b, texture=t))) for a, b in pairs for s, t in textures]
    if category == "color":
        return [Request(category, pair) for pair in pairs]
    raise ValueError(f"unknown category {category!r}: one of {', '.join(CATEGORIES)}")


def split(category: str, held_out: bool) -> list[Request]:
    """List the training or the held-out requests of a category. Held-out bindings appear in no training request."""
    return [request for request in all_requests(category) if bool(request.bindings & HELD_OUT) == held_out]


def parse(prompt: str) -> Request:
    """Read the request that a prompt states. Raises ``ValueError`` where the sentence is not in the grammar."""
    words = prompt.strip().lower().rstrip(".")
    first, _, rest = words.partition(" ")
    if first in NUMBERS:
        singular = {_plural(Thing(s, c)): Thing(s, c) for c in COLORS for s in SHAPES}
        if rest in singular:
            return Request("numeracy", (singular[rest],) * NUMBERS[first])
    match = re.fullmatch(rf"an? (.+?) (and|{'|'.join(RELATIONS)}) an? (.+)", words)
    things = [_thing(phrase) for phrase in match.group(1, 3)] if match else []
    if match and all(things):
        relation = None if match.group(2) == "and" else match.group(2)
        if relation:
            category = "spatial"
        elif any(thing.texture for thing in things):
            category = "texture"
            things = [replace(thing, texture=thing.texture or "plain") for thing in things]
        else:
            category = "color" if any(thing.color for thing in things) else "shape"
        return Request(category, tuple(things), relation)
    raise ValueError(
        f"the shapes reward cannot read the prompt {prompt!r}: it knows sentences such as "
        "'a red circle and a blue striped square', 'a green triangle left of a yellow ring', 'three white squares'"
    )


def _plural(thing: Thing) -> str:
    return f"{thing}{'es' if thing.shape == 'cross' else 's'}"


def _thing(phrase: str) -> Thing | None:
    *adjectives, shape = phrase.split()
    color = next((word for word in adjectives if word in COLORS), None)
    texture = next((word for word in adjectives if word in TEXTURES), None)
    known = shape in SHAPES and len(adjectives) == sum(word is not None for word in (color, texture))
    return Thing(shape, color, texture) if known else None
