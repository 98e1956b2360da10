"""The documents name every metric, and only files that exist; what is public says what it does."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from fastloop.tracking import read_rows
from fastloop.trainer import Trainer

ROOT = Path(__file__).resolve().parent.parent
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "fastloop/assets").glob("*/README.md")),
    ROOT / "bench/README.md",
]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_named_files_exist(page):
    text = page.read_text()
    links = [link.split("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
    for link in filter(None, links):
        assert (page.parent / link).exists(), f"{page.name} links to {link}"
    for name in re.findall(r"configs/\w+\.yaml|bench/[\w/]+\.\w+|fastloop/[\w/]+\.py", text):
        assert (ROOT / name).exists(), f"{page.name} names {name}"


def test_anchors_exist():
    def anchors(path):
        titles = re.findall(r"^#+ (.+)$", path.read_text(), re.M)
        return {re.sub(r"[^\w\- ]", "", title).lower().replace(" ", "-") for title in titles}

    for page in PAGES:
        for file, anchor in re.findall(r"\]\(([\w./]*)#([\w-]+)\)", page.read_text()):
            assert anchor in anchors(page.parent / file if file else page), f"{page.name}: {file}#{anchor}"


@pytest.mark.parametrize("algorithm", ["loop", "loop_forward"])
def test_every_metric_is_defined(make_config, algorithm):
    folder = Trainer(make_config(algorithm=algorithm, iterations=1, kl={"weight": 0.1})).train()
    defined = set(re.findall(r"`([\w/]+)`", (ROOT / "docs/metrics.md").read_text()))
    names = set(read_rows(folder / "metrics.jsonl")[0]) - {"reward/jpeg_incompressibility"}  # stands there as reward/NAME
    assert names - defined == set()
    assert set(read_rows(folder / "eval.jsonl")[0]) - defined == set()


def test_every_test_that_reliability_names_is_there():
    text = (ROOT / "docs" / "reliability.md").read_text()
    named = re.findall(r"`(test_\w+\.py)(?: -k (\w+|\"[^\"]+\"))?`", text)
    assert len(named) > 20
    for file, words in named:
        functions = re.findall(r"^def (test_\w+)", (ROOT / "tests" / file).read_text(), re.M)
        for word in words.strip('"').split(" or "):
            assert any(word in function for function in functions), (file, word)


def test_what_is_public_has_a_docstring_and_of_functions_it_begins_with_a_verb():
    no_verbs = {"", "An", "As", "At", "Every", "How", "Of", "The", "This", "What", "When", "Where", "Whether", "Why", "Within"}

    def public(body):
        for node in body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and not node.name.startswith("_"):
                yield node
                yield from public(node.body if isinstance(node, ast.ClassDef) else [])

    for path in [*(ROOT / "fastloop").rglob("*.py"), *(ROOT / "kernels").glob("*.py")]:
        for node in public(ast.parse(path.read_text()).body):
            says = ast.get_docstring(node)
            assert says, f"{path}:{node.lineno}: {node.name} has no docstring"
            if not isinstance(node, ast.ClassDef) and not any("property" in ast.unparse(d) for d in node.decorator_list):
                first = re.match(r"(?:[A-Z][a-z]+\b)?", says)[0]
                assert first not in no_verbs, f"{path}:{node.lineno}: begin with a verb, as in 'Return ...'"
