"""The comparison of recipes runs, is resumable, and its arithmetic is right."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

from fastloop.config import dump_config

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("sample_efficiency", ROOT / "bench" / "sample_efficiency.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_evals(folder: Path, scores: list[float]) -> None:
    folder.mkdir(parents=True)
    rows = [{"iteration": i, "images": 6 * i, "score": {"mean": s}} for i, s in enumerate(scores)]
    (folder / "eval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_gain_and_its_standard_error_are_over_the_seeds(bench, tmp_path):
    for seed, scores in enumerate(([0.2, 0.5, 0.4], [0.2, 0.3, 0.6], [0.2, 0.4, 0.8])):
        write_evals(tmp_path / f"loop-{seed}", scores)
    row = bench.summarize("loop", tmp_path, [0, 1, 2])
    assert row["images"] == [0, 6, 12]
    assert row["gain"] == pytest.approx(0.4)
    assert row["gain_stderr"] == pytest.approx(np.std([0.2, 0.4, 0.6], ddof=1) / 3**0.5)
    text = bench.table({"seeds": [0, 1, 2], "recipes": {"loop": row}})
    assert text.splitlines()[-1] == "| loop | 0.200 | 0.600 | +0.400 ± 0.115 | 0.400 | 0.600 | 0.800 |"


def test_recipes_are_trained_compared_and_not_trained_again(bench, make_config, tmp_path, capsys):
    recipes = []
    for name in ("loop", "rloo"):
        path = tmp_path / f"{name}.yaml"
        path.write_text(dump_config(make_config(algorithm=name, iterations=1)))
        recipes.append(str(path))
    command = [*recipes, "--seeds", "3", "--out", str(tmp_path / "out"), "--jobs", "2"]
    assert bench.main(command) == 0
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["images"] == 6 and set(summary["recipes"]) == {"loop", "rloo"}
    assert summary["recipes"]["loop"]["scores"][0][0] == summary["recipes"]["rloo"]["scores"][0][0]  # the same base model
    assert "| loop |" in capsys.readouterr().out
    rows = (tmp_path / "out" / "loop-3" / "metrics.jsonl").read_text()
    assert bench.main(command) == 0
    assert (tmp_path / "out" / "loop-3" / "metrics.jsonl").read_text() == rows


def test_different_numbers_of_images_are_refused(bench, make_config, tmp_path, capsys):
    for n in (1, 2):
        (tmp_path / f"{n}.yaml").write_text(dump_config(make_config(iterations=n)))
    with pytest.raises(SystemExit) as stop:
        bench.main([str(tmp_path / "1.yaml"), str(tmp_path / "2.yaml"), "--out", str(tmp_path / "out")])
    assert stop.value.code == 2 and "different numbers of images" in capsys.readouterr().err
