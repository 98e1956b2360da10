"""Prompts: what a source holds, and a stream whose place is the caller's."""

from __future__ import annotations

import json
import sys
from collections import Counter
from types import SimpleNamespace

import pytest

from fastloop.config import PromptsConfig
from fastloop.errors import UserError
from fastloop.prompts import PER_CATEGORY, Prompt, PromptStream, load_prompts
from fastloop.recipes import parse_config
from fastloop.shapes.grammar import CATEGORIES, HELD_OUT, parse


def load(source: str, **rest) -> list[Prompt]:
    return load_prompts(PromptsConfig(source=source, **rest))


def problem(source: str, key: str = "prompts", **rest) -> str:
    with pytest.raises(UserError) as caught:
        load_prompts(PromptsConfig(source=source, **rest), key)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- sources ----------------------------------------------------------------------------------------------------------


def test_there_are_45_different_animals():
    prompts = load("animals")
    assert len(prompts) == 45 == len({prompt.text for prompt in prompts})
    assert {"cat", "gorilla", "kangaroo"} <= {prompt.text for prompt in prompts}
    assert all(prompt.metadata == {} for prompt in prompts)


@pytest.mark.parametrize("source, held_out", [("shapes_train", False), ("shapes_heldout", True)])
def test_the_shapes_sources_hold_their_split_with_its_categories(source, held_out):
    prompts = load(source)
    assert Counter(prompt.metadata["category"] for prompt in prompts) == dict.fromkeys(CATEGORIES, PER_CATEGORY)
    for prompt in prompts:
        request = parse(prompt.text)
        assert request.category == prompt.metadata["category"]
        assert bool(request.bindings & HELD_OUT) == held_out


def test_training_and_held_out_prompts_have_none_in_common():
    assert not {p.text for p in load("shapes_train")} & {p.text for p in load("shapes_heldout")}


def test_a_source_is_the_same_each_time():
    assert load("shapes_heldout", limit=50) == load("shapes_heldout", limit=50)


def test_a_limit_keeps_categories_in_equal_shares_and_is_the_beginning_of_the_whole():
    assert Counter(p.metadata["category"] for p in load("shapes_heldout", limit=50)) == dict.fromkeys(CATEGORIES, 10)
    uneven = Counter(p.metadata["category"] for p in load("shapes_train", limit=12))
    assert sum(uneven.values()) == 12 and set(uneven.values()) == {2, 3}
    assert load("shapes_train", limit=12) == load("shapes_train")[:12]
    assert len(load("animals", limit=3)) == 3 and load("animals", limit=3) == load("animals")[:3]
    assert len(load("animals", limit=1000)) == 45


def test_a_limit_shows_different_prompts_while_a_category_has_them():
    for category in ("color", "texture", "spatial"):
        assert len({p.text for p in load("shapes_train", categories=[category], limit=300)}) == 300


def test_categories_choose_among_the_shapes():
    prompts = load("shapes_train", categories=["texture", "numeracy"], limit=10)
    assert Counter(p.metadata["category"] for p in prompts) == {"texture": 5, "numeracy": 5}


def test_a_text_file_holds_a_prompt_a_line(tmp_path):
    path = tmp_path / "list.txt"
    path.write_bytes("\ufeffa cat\r\n\r\n  a dog on the moon  \nein Käse".encode())
    assert load(str(path)) == [Prompt("a cat"), Prompt("a dog on the moon"), Prompt("ein Käse")]
    assert load(str(path), limit=1) == [Prompt("a cat")]


def test_a_jsonl_file_holds_prompts_with_metadata(tmp_path):
    path = tmp_path / "list.jsonl"
    rows = [{"prompt": "a cat", "category": "pets", "boxes": [1, 2]}, {"prompt": "a\u2028dog\nbelow"}]
    path.write_text("\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8-sig")
    assert load(str(path)) == [Prompt("a cat", {"category": "pets", "boxes": [1, 2]}), Prompt("a\u2028dog\nbelow")]


def test_a_home_folder_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "list.txt").write_text("a cat")
    assert load("~/list.txt") == [Prompt("a cat")]


@pytest.mark.parametrize("line", ['{"prompt": 3}', '{"text": "a dog"}', '"a dog"', "[1]", "a dog", '{"prompt": "a', "null"])
def test_a_bad_jsonl_line_is_told_with_its_number(tmp_path, line):
    path = tmp_path / "list.jsonl"
    path.write_text(f'{{"prompt": "a cat"}}\n\n{line}\n')
    assert problem(str(path)) == f'prompts.source: {path}:3 is not an object such as {{"prompt": "a cat"}}'


def test_files_that_hold_no_prompts_are_refused(tmp_path):
    (tmp_path / "list.txt").write_text(" \n\n")
    assert problem(str(tmp_path / "list.txt")).endswith("list.txt holds no prompts")
    (tmp_path / "list.jsonl").write_text("")
    assert problem(str(tmp_path / "list.jsonl")).endswith("list.jsonl holds no prompts")


def test_files_that_cannot_be_read_are_told_with_the_cause(tmp_path):
    assert problem(f"{tmp_path}/none.txt") == f"prompts.source: cannot read {tmp_path}/none.txt: No such file or directory"
    (tmp_path / "folder.txt").mkdir()
    assert problem(f"{tmp_path}/folder.txt").endswith("folder.txt: Is a directory")
    (tmp_path / "picture.jsonl").write_bytes(b"\xff\xd8\xff")
    assert "codec can't decode" in problem(f"{tmp_path}/picture.jsonl")


def test_a_refusal_names_the_place_in_the_config():
    expected = (
        "'shape_train' is not shapes_train, shapes_heldout, animals, a .txt, .jsonl or .tsv file, a folder, nor hf:OWNER/NAME"
    )
    assert problem("shape_train", "eval.prompts") == f"eval.prompts.source: {expected}"
    assert problem("shapes_train", "eval.prompts", categories=["size"]) == (
        "eval.prompts.categories: unknown 'size': one of color, shape, texture, spatial, numeracy"
    )
    assert problem("animals", categories=["color"]) == (
        "prompts.categories: the prompts of animals have no categories: remove it"
    )


@pytest.fixture
def compbench(tmp_path):
    """A folder as T2I-CompBench's examples/dataset."""
    files = {
        "color_train.txt": "a green bench and a blue bowl\na red car and a white sheep\na brown cat",
        "color_val.txt": "a green cup and a blue phone",
        "color_val_seen.txt": "seen",
        "complex_train.txt": "The fluffy cat is on the wooden chair.",
        "complex_train_action.txt": "a part of complex_train",
        "non_spatial_train.txt": "A person is walking.\nA dog is barking.",
        "non_spatial_val.txt": "A child is drawing.",
        "color.txt": "both",
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text + "\n")
    return str(tmp_path)


def test_a_t2i_compbench_folder_gives_its_categories_in_turn(compbench):
    prompts = load(compbench)
    assert [(prompt.metadata["category"], prompt.text[:10]) for prompt in prompts] == [
        ("color", "a green be"), ("complex", "The fluffy"), ("non_spatial", "A person i"),
        ("color", "a red car "), ("non_spatial", "A dog is b"), ("color", "a brown ca"),
    ]  # fmt: skip
    assert load(compbench, limit=2) == prompts[:2]
    assert [p.text for p in load(compbench, categories=["complex"])] == ["The fluffy cat is on the wooden chair."]
    assert [p.text for p in load(compbench, split="val")] == ["a green cup and a blue phone", "A child is drawing."]


def test_beside_a_folder_the_held_out_prompts_are_its_validation_files(compbench):
    config = parse_config({"rewards": [{"name": "clipscore"}], "prompts": {"source": compbench}}, "test")
    held_out = load_prompts(config.eval.prompts, "eval.prompts")
    assert [p.text for p in held_out] == ["a green cup and a blue phone", "A child is drawing."]
    assert not {p.text for p in held_out} & {p.text for p in load_prompts(config.prompts)}


def test_a_folder_with_other_files_or_categories_is_refused(compbench, tmp_path):
    assert problem(compbench, split="test").startswith(f"prompts.source: {compbench} has no file such as color_test.txt")
    known = "one of color, complex, non_spatial"
    assert problem(compbench, categories=["colour"]) == f"prompts.categories: unknown 'colour': {known}"
    assert "unknown 'colour': one of color" in problem(compbench, categories=["color", "colour"])


PARTI = 'Prompt\tCategory\tChallenge\tNote\nbond\tAbstract\tBasic\tBiology-inspired\na "red" cat\tAnimals\tBasic\t\n'


def test_a_table_as_of_partiprompts_gives_prompts_with_their_columns(tmp_path):
    path = tmp_path / "PartiPrompts.tsv"
    path.write_text(PARTI)
    assert load(str(path)) == [
        Prompt("bond", {"category": "Abstract", "challenge": "Basic", "note": "Biology-inspired"}),
        Prompt('a "red" cat', {"category": "Animals", "challenge": "Basic"}),
    ]
    assert [p.text for p in load(str(path), categories=["Animals"])] == ['a "red" cat']
    assert problem(str(path), categories=["People"]) == "prompts.categories: unknown 'People': one of Abstract, Animals"
    assert [p.text for p in load(str(path), column="Note")] == ["Biology-inspired"]
    assert problem(str(path), column="text") == (
        f"prompts.column: {path} has no column 'text': it has Prompt, Category, Challenge, Note"
    )
    (tmp_path / "empty.tsv").write_text("Prompt\tCategory\n")
    assert problem(str(tmp_path / "empty.tsv")).endswith("empty.tsv holds no prompts")
    assert "cannot read" in problem(str(tmp_path / "none.tsv"))


def test_a_jsonl_file_with_categories_can_be_narrowed_to_some(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "a", "category": "x"}\n{"prompt": "b"}\n{"prompt": "c", "category": "y"}\n')
    assert [p.text for p in load(str(path), categories=["y"])] == ["c"]


class Table(list):
    """What the prompts need of a `datasets.Dataset`."""

    features = {
        name: SimpleNamespace(dtype=dtype) for name, dtype in (("Prompt", "string"), ("n", "int64"), ("image", "Image"))
    }

    def select_columns(self, names):
        return Table({name: row[name] for name in names} for row in self)


def test_a_data_set_of_the_hub_gives_its_prompts_without_pictures(monkeypatch):
    asked = []

    def load_dataset(path, name, split):
        asked.append((path, name, split))
        if split == "nosuch":
            raise ValueError('Unknown split "nosuch"\nmore')
        return Table([{"Prompt": "a cat", "n": 3, "image": object()}, {"Prompt": None, "n": 4, "image": object()}])

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    assert load("hf:me/pets") == [Prompt("a cat", {"n": 3})]
    assert load("hf:me/pets:small", split="test") == [Prompt("a cat", {"n": 3})]
    assert asked == [("me/pets", None, "train"), ("me/pets", "small", "test")]
    assert problem("hf:me/pets", split="nosuch") == 'prompts.source: cannot load hf:me/pets: Unknown split "nosuch"'
    assert problem("hf:me/pets", column="image") == "prompts.column: hf:me/pets has no column 'image': it has Prompt, n"
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert problem("hf:me/pets") == ("prompts.source: hf: needs the package datasets: pip install fastloop[datasets]")


# --- the stream -------------------------------------------------------------------------------------------------------

PROMPTS = [Prompt(str(i)) for i in range(7)]


def test_a_draw_depends_on_the_place_alone():
    stream = PromptStream(PROMPTS, seed=3)
    first = stream.draw(5, 6)
    stream.draw(100, 9)
    assert stream.draw(5, 6) == first == PromptStream(list(PROMPTS), seed=3).draw(5, 6)


@pytest.mark.parametrize("count", [1, 2, 3, 7, 10, 21])
def test_draws_one_after_the_other_are_the_stream_whatever_their_size(count):
    stream = PromptStream(PROMPTS, seed=0)
    whole = stream.draw(0, 4 * 21)
    drawn = [prompt for start in range(0, 4 * 21, count) for prompt in stream.draw(start, count)]
    assert drawn[: 4 * 21] == whole


def test_each_pass_holds_each_prompt_once_in_an_order_of_its_own():
    stream = PromptStream(PROMPTS, seed=0)
    passes = [tuple(prompt.text for prompt in stream.draw(7 * epoch, 7)) for epoch in range(20)]
    assert all(sorted(order) == [prompt.text for prompt in PROMPTS] for order in passes)
    assert len(set(passes)) > 15


def test_seeds_order_the_prompts_differently():
    orders = {tuple(p.text for p in PromptStream(PROMPTS, seed).draw(0, 7)) for seed in range(20)}
    assert len(orders) > 15


def test_a_draw_may_be_larger_than_the_list_and_keeps_its_prompts_balanced():
    stream = PromptStream(PROMPTS[:3], seed=1)
    counts = Counter(prompt.text for prompt in stream.draw(2, 10))
    assert sum(counts.values()) == 10 and max(counts.values()) - min(counts.values()) <= 2
    assert PromptStream(PROMPTS[:1], seed=1).draw(5, 3) == [PROMPTS[0]] * 3
    assert stream.draw(4, 0) == []


@pytest.mark.parametrize("category", ["1", '["x"]', "null"])
def test_a_category_that_is_no_text_is_refused_with_its_line(tmp_path, category):
    path = tmp_path / "p.jsonl"
    path.write_text(f'{{"prompt": "a"}}\n{{"prompt": "b", "category": {category}}}\n')
    with pytest.raises(UserError, match=f"^prompts.source: {path}:2: category .* is no text: put it in quotes$"):
        load_prompts(PromptsConfig(source=str(path)))
