"""The bundled world: prompts mean what they say, pictures show it, and the checker knows the difference."""

from __future__ import annotations

import io
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageFilter

from fastloop.shapes.checker import MIN_AREA, assess, find_objects
from fastloop.shapes.grammar import (
    CATEGORIES,
    COLORS,
    HELD_OUT,
    NUMBERS,
    RELATIONS,
    SHAPES,
    TEXTURES,
    Request,
    Thing,
    all_requests,
    parse,
    split,
)
from fastloop.shapes.renderer import BACKGROUND, SIZE, Placed, coverage, place, relation_credit, render

EMPTY = np.full((SIZE, SIZE, 3), BACKGROUND, np.uint8)


def scenes(category: str, count: int, seed: int = 0):
    """Requests of a category with the objects and the picture of each."""
    rng = np.random.default_rng(seed)
    requests = all_requests(category)
    for i in rng.permutation(len(requests))[:count]:
        objects = place(requests[i], rng)
        yield requests[i], objects, render(objects)


def picture(*things: str, **changes) -> np.ndarray:
    """A picture of things such as 'red striped circle', in the corners of a square, the first one top left."""
    places = [(16.0, 16.0), (48.0, 16.0), (16.0, 48.0), (48.0, 48.0), (32.0, 32.0)]
    objects = []
    for words, (x, y) in zip((thing.split() for thing in things), places, strict=False):
        texture = words[1] if len(words) == 3 else "plain"
        objects.append(replace(Placed(words[-1], words[0], texture, x, y, 11.0), **changes))
    return render(objects)


# --- grammar ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("category", CATEGORIES)
def test_reading_a_prompt_gives_back_its_request(category):
    for request in all_requests(category):
        assert parse(request.prompt) == request


def test_no_two_requests_have_the_same_prompt():
    prompts = [request.prompt for category in CATEGORIES for request in all_requests(category)]
    assert len(set(prompts)) == len(prompts)


@pytest.mark.parametrize("category", CATEGORIES)
def test_the_splits_share_no_prompt_and_together_hold_all(category):
    train, held_out = split(category, held_out=False), split(category, held_out=True)
    assert train and held_out
    assert not {r.prompt for r in train} & {r.prompt for r in held_out}
    assert len(train) + len(held_out) == len(all_requests(category))


def combinations(request: Request) -> set[tuple[str, ...]]:
    """The combinations of words in a request, written out apart from ``Request.bindings``."""
    shapes = [thing.shape for thing in request.things]
    of = {
        "color": lambda thing: [(thing.color, thing.shape)],
        "spatial": lambda thing: [(thing.color, thing.shape)],
        "texture": lambda thing: [(thing.color, thing.shape), (thing.texture, thing.shape)],
        "numeracy": lambda thing: [(thing.color, thing.shape), (str(len(shapes)), thing.shape)],
        "shape": lambda thing: [tuple(sorted(shapes))],
    }[request.category]
    return {pair for thing in request.things for pair in of(thing)}


@pytest.mark.parametrize("category", CATEGORIES)
def test_held_out_combinations_of_words_are_in_no_training_prompt_and_in_every_held_out_one(category):
    assert not any(combinations(request) & HELD_OUT for request in split(category, held_out=False))
    assert all(combinations(request) & HELD_OUT for request in split(category, held_out=True))


def test_every_word_is_learnt_in_training():
    words = {word for category in CATEGORIES for r in split(category, held_out=False) for word in r.prompt.split()}
    plurals = {f"{shape}es" if shape == "cross" else f"{shape}s" for shape in SHAPES}
    assert words == {
        *COLORS, *SHAPES, *plurals, *NUMBERS, *(set(TEXTURES) - {"plain"}), "a", "and",
        *(word for relation in RELATIONS for word in relation.split()),
    }  # fmt: skip


def test_every_color_and_every_shape_has_a_held_out_partner():
    assert {color for color, _ in HELD_OUT if color in COLORS} == set(COLORS)
    assert {shape for color, shape in HELD_OUT if color in COLORS} == set(SHAPES)


@pytest.mark.parametrize(
    "prompt, request_",
    [
        ("a red circle and a blue square", Request("color", (Thing("circle", "red"), Thing("square", "blue")))),
        ("A ring and a cross.", Request("shape", (Thing("ring"), Thing("cross")))),
        (
            "a red circle and a blue striped square",
            Request("texture", (Thing("circle", "red", "plain"), Thing("square", "blue", "striped"))),
        ),
        (
            "a green triangle left of a yellow ring",
            Request("spatial", (Thing("triangle", "green"), Thing("ring", "yellow")), "left of"),
        ),
        ("three white squares", Request("numeracy", (Thing("square", "white"),) * 3)),
        ("two red crosses", Request("numeracy", (Thing("cross", "red"),) * 2)),
    ],
)
def test_a_sentence_of_each_category_is_read_as_it_is_meant(prompt, request_):
    assert parse(prompt) == request_


@pytest.mark.parametrize(
    "prompt",
    [
        "",
        "a cat",
        "a red circle",
        "a red red circle and a blue square",
        "a red circle and a blue squares",
        "five red circles",
        "two red circle",
        "a circle red and a blue square",
        "a red circle near a blue square",
        "a red circle and a blue square and a green ring",
        "red circle and blue square",
    ],
)
def test_a_prompt_outside_the_grammar_is_refused_with_examples(prompt):
    with pytest.raises(ValueError, match="it knows sentences such as 'a red circle and") as caught:
        parse(prompt)
    assert repr(prompt) in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="the shapes reward cannot read the prompt"):
        assess(prompt, EMPTY)


def test_an_unknown_category_is_refused():
    with pytest.raises(ValueError, match="unknown category 'size': one of color, shape, texture, spatial, numeracy"):
        all_requests("size")


# --- renderer ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("category", CATEGORIES)
def test_the_checker_is_right_about_rendered_scenes(category):
    scores = np.array([assess(request.prompt, image).score for request, _, image in scenes(category, 60)])
    assert scores.mean() >= 0.99
    assert (scores == 1).mean() >= 0.95


@pytest.mark.parametrize("category", CATEGORIES)
def test_objects_stand_apart_and_inside_the_picture(category):
    for _, objects, _ in scenes(category, 60, seed=1):
        for i, o in enumerate(objects):
            assert o.radius <= min(o.x, o.y) and max(o.x, o.y) <= SIZE - o.radius
            for other in objects[:i]:
                assert max(abs(o.x - other.x), abs(o.y - other.y)) > o.radius + other.radius


@pytest.mark.parametrize("category", CATEGORIES)
def test_a_placed_scene_is_what_was_asked_for(category):
    for request, objects, image in scenes(category, 30, seed=2):
        assert image.shape == (SIZE, SIZE, 3) and image.dtype == np.uint8
        for thing, o in zip(request.things, objects, strict=True):
            assert o.shape == thing.shape
            assert o.color == thing.color or thing.color is None
            assert o.texture == (thing.texture or "plain")
        if category == "shape":
            assert len({o.color for o in objects}) == len(objects)
        if category == "spatial":
            assert relation_credit(request.relation, *((o.x, o.y) for o in objects)) == 1


def test_the_same_seed_draws_the_same_scene_and_another_seed_another():
    request = parse("four cyan rings")
    first, again, other = (place(request, np.random.default_rng(seed)) for seed in (0, 0, 1))
    assert first == again != other


@pytest.mark.parametrize("shape", SHAPES)
def test_the_drawn_area_of_a_shape_is_that_of_geometry(shape):
    r = 12.0
    exact = {
        "circle": np.pi * r**2,
        "square": (2 * 0.88 * r) ** 2,
        "triangle": 2 * r**2,
        "ring": np.pi * r**2 * (1.03**2 - 0.47**2),
        "cross": 2 * (0.72 * r * 2 * r) - (0.72 * r) ** 2,
    }[shape]
    x, y = np.meshgrid(np.arange(-20, 20) + 0.3, np.arange(-20, 20) + 0.6)
    assert coverage(shape, x, y, r).sum() == pytest.approx(exact, rel=0.02)


def test_the_smallest_object_is_larger_than_what_the_checker_overlooks():
    for shape in SHAPES:
        for texture in TEXTURES:
            image = render([Placed(shape, "blue", texture, 32.0, 32.0, 7.5)])
            assert [found.area > MIN_AREA * 1.5 for found in find_objects(image)] == [True]


@pytest.mark.parametrize("color", COLORS)
@pytest.mark.parametrize("texture", TEXTURES)
def test_every_shape_is_found_with_its_color_texture_and_place(color, texture):
    for shape in SHAPES:
        (found,) = find_objects(render([Placed(shape, color, texture, 30.5, 25.0, 12.0)]))
        assert (found.shape, found.color, found.texture) == (shape, color, texture)
        assert found.center == pytest.approx((30.5, 25.0), abs=4.5)  # a triangle's centre of mass lies below


def test_unknown_shapes_and_textures_cannot_be_drawn():
    with pytest.raises(ValueError, match="unknown shape 'star'"):
        render([Placed("star", "red", "plain", 32.0, 32.0, 10.0)])
    with pytest.raises(ValueError, match="unknown texture 'furry'"):
        render([Placed("ring", "red", "furry", 32.0, 32.0, 10.0)])


@pytest.mark.parametrize(
    "relation, credits",
    [  # of a second object to the right, left, below, above, and right but more below
        ("left of", (1, 0, 0, 0, 0.5)),
        ("right of", (0, 1, 0, 0, 0)),
        ("above", (0, 0, 1, 0, 1)),
        ("below", (0, 0, 0, 1, 0)),
    ],
)
def test_a_relation_holds_along_the_larger_offset_and_half_along_the_smaller(relation, credits):
    offsets = [(9, 0), (-9, 0), (0, 9), (0, -9), (5, 9)]
    assert [relation_credit(relation, (20, 20), (20 + dx, 20 + dy)) for dx, dy in offsets] == list(credits)


# --- checker ----------------------------------------------------------------------------------------------------------


def score(prompt: str, *things: str) -> float:
    return assess(prompt, picture(*things)).score


def test_a_right_picture_scores_1_whatever_the_order():
    assert score("a red circle and a blue square", "red circle", "blue square") == 1
    assert score("a red circle and a blue square", "blue square", "red circle") == 1


@pytest.mark.parametrize(
    "things, credit",
    [  # each object: half for its attributes one by one, half for all of them together
        (["green circle", "blue square"], (0.25 + 1) / 2),  # a wrong colour
        (["red ring", "blue square"], (0.25 + 1) / 2),  # a wrong shape
        (["blue circle", "red square"], (0.25 + 0.25) / 2),  # the binding swapped
        (["green ring", "blue square"], (0 + 1) / 2),  # one object wrong in all
        (["red circle"], 1 / 2),  # one missing
        (["red circle", "blue square", "green ring"], 2 / 3),  # one too many
        (["red circle", "blue square", "green ring", "white cross"], 2 / 4),
        (["green ring", "white cross"], 0),
        ([], 0),
    ],
)
def test_a_color_prompt_gets_partial_credit(things, credit):
    assert score("a red circle and a blue square", *things) == pytest.approx(credit)


def test_a_swapped_binding_is_worse_than_one_wrong_attribute_and_better_than_nothing():
    right, wrong = ("red circle", "blue square"), ("green circle", "blue square")
    prompt = "a red circle and a blue square"
    assert score(prompt, *right) > score(prompt, *wrong) > score(prompt, "blue circle", "red square") > score(prompt)


def test_colors_are_free_where_the_prompt_names_none():
    assert score("a ring and a cross", "red ring", "cyan cross") == 1
    assert score("a ring and a cross", "red ring", "cyan circle") == 0.5


@pytest.mark.parametrize(
    "things, credit",
    [
        (["red circle", "blue striped square"], 1),
        (["red striped circle", "blue square"], (1 / 3 + 1 / 3) / 2),  # the texture on the other object
        (["red circle", "blue dotted square"], (1 + 1 / 3) / 2),
        (["red circle", "blue square"], (1 + 1 / 3) / 2),
        (["red dotted circle", "blue striped square"], (1 / 3 + 1) / 2),  # without a texture word: plain
    ],
)
def test_a_texture_prompt_asks_for_the_texture_on_the_right_object(things, credit):
    assert score("a red circle and a blue striped square", *things) == pytest.approx(credit)


@pytest.mark.parametrize(
    "prompt, credit",
    [  # red circle top left, blue square right of it
        ("a red circle left of a blue square", 1),
        ("a blue square right of a red circle", 1),
        ("a red circle right of a blue square", 0.5),
        ("a red circle above a blue square", 0.5),
    ],
)
def test_a_relation_that_does_not_hold_halves_the_score(prompt, credit):
    assert score(prompt, "red circle", "blue square") == credit


def test_a_relation_along_the_smaller_offset_counts_half():
    objects = [Placed("circle", "red", "plain", 14.0, 14.0, 10.0), Placed("square", "blue", "plain", 28.0, 48.0, 10.0)]
    assert assess("a red circle above a blue square", render(objects)).score == 1
    verdict = assess("a red circle left of a blue square", render(objects))
    assert verdict.score == 0.75 and "left of: partly" in verdict.reason


def test_a_relation_needs_both_objects():
    verdict = assess("a red circle left of a blue square", picture("red circle"))
    assert verdict.score == 0.25 and verdict.reason.endswith("left of: no")


@pytest.mark.parametrize("count, credit", [(0, 0), (1, 1 / 3), (2, 2 / 3), (3, 1), (4, 3 / 4), (5, 3 / 5)])
def test_a_count_that_is_off_costs_its_share(count, credit):
    things = ["white square"] * count
    assert assess("three white squares", picture(*things, radius=8.0)).score == pytest.approx(credit)


def test_an_empty_picture_scores_0_in_every_category():
    black = np.zeros_like(EMPTY)
    for category in CATEGORIES:
        for request in all_requests(category)[::97]:
            for image in (EMPTY, black):
                verdict = assess(request.prompt, image)
                assert verdict.score == 0 and verdict.found == () and "missing" in verdict.reason


def test_flat_pictures_of_any_brightness_score_next_to_nothing():
    for value in range(0, 256, 15):
        assert assess("a red circle and a blue square", np.full_like(EMPTY, value)).score <= 0.125


def test_noise_scores_next_to_nothing():
    rng = np.random.default_rng(0)
    for deviation in (40, 80, 160):
        image = np.clip(BACKGROUND + rng.normal(0, deviation, EMPTY.shape), 0, 255).astype(np.uint8)
        assert assess("a red circle and a blue square", image).score <= 0.1


def jpeg(image: np.ndarray) -> np.ndarray:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=85)
    return np.array(Image.open(buffer))


def blur(image: np.ndarray) -> np.ndarray:
    return np.array(Image.fromarray(image).filter(ImageFilter.GaussianBlur(0.6)))


def noise(image: np.ndarray) -> np.ndarray:
    return np.clip(image + np.random.default_rng(0).normal(0, 10, image.shape), 0, 255).astype(np.uint8)


@pytest.mark.parametrize("damage", [jpeg, blur, noise], ids=lambda damage: damage.__name__)
def test_slight_damage_hardly_changes_the_score(damage):
    for category in CATEGORIES:
        scores = [assess(request.prompt, damage(image)).score for request, _, image in scenes(category, 25, seed=3)]
        assert np.mean(scores) >= 0.95


def test_a_score_lies_in_0_to_1_on_any_picture():
    rng = np.random.default_rng(0)
    prompts = [request.prompt for category in CATEGORIES for request in all_requests(category)[::151]]
    for prompt in prompts:
        # blobs: coarse random colours, enlarged; between a few large patches and noise
        size = int(rng.choice([2, 4, 8, 16, 32, 64]))
        coarse = rng.integers(0, 256, (size, size, 3)).astype(np.uint8)
        image = np.array(Image.fromarray(coarse).resize((SIZE, SIZE), int(rng.choice([0, 2]))))
        verdict = assess(prompt, image)
        assert 0 <= verdict.score <= 1


def test_another_scene_scores_less_than_the_one_that_was_asked_for():
    drawn = list(scenes("color", 30, seed=4))
    for (request, _, image), (other_request, _, other) in zip(drawn, drawn[1:], strict=False):
        same = set(request.things) == set(other_request.things)
        assert (assess(request.prompt, other).score > 0.8) == same
        assert assess(request.prompt, image).score == 1


def test_a_verdict_explains_itself_in_one_line():
    verdict = assess("a red circle and a blue striped square", picture("red circle", "green square", "white ring"))
    assert verdict.reason == (
        "red circle: right; blue striped square: color is green, texture is plain; 3 objects instead of 2"
    )
    assert verdict.category == "texture"
    assert sorted(map(str, verdict.found)) == ["green plain square", "red plain circle", "white plain ring"]


def test_a_blob_has_no_shape():
    image = EMPTY.copy()
    image[10:14, 5:60] = COLORS["red"]
    verdict = assess("a red square and a blue ring", image)
    assert verdict.found[0].shape is None and "shape is None" in verdict.reason
    assert 0 < verdict.score < 0.2


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((32, 32, 3), np.uint8),
        np.zeros((64, 64), np.uint8),
        np.zeros((64, 64, 4), np.uint8),
        np.zeros((64, 64, 3), np.float32),
    ],
    ids=lambda image: f"{image.dtype} {image.shape}",
)
def test_pictures_of_another_size_or_type_are_refused(image):
    with pytest.raises(ValueError, match="expected a uint8 image of 64 x 64 x 3, got"):
        assess("a red circle and a blue square", image)
