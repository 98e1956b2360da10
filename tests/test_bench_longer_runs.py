"""bench/longer_runs.py: its variants are configurations, and its lines and table say what the runs' records do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fastloop.recipes import load_config


@pytest.fixture
def bench(bench_module, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).resolve().parent.parent / "bench")
    return bench_module("longer_runs")


def test_variants_draw_as_many_pictures_and_change_what_they_say(bench):
    configs = {name: load_config(bench.DEMO, [*bench.OWN.split(), *items.split()]) for name, items in bench.VARIANTS.items()}
    assert {config.iterations * config.images_per_rollout for config in configs.values()} == {12_800}
    assert {config.iterations // config.eval.every for config in configs.values()} == {5}
    assert configs["LOOP fast"].kl.weight > 0 == configs["no KL"].kl.weight == configs["LOOP"].kl.weight
    assert (configs["LOOP"].ema.decay, configs["LOOP"].optimizer.schedule) == (0.95, "linear")


def test_lines_are_those_of_the_records_and_a_run_that_was_stopped_has_dashes(bench, tmp_path, capsys):
    errors = [1.0] * 20 + [None] * 20 + [1.5] * 40  # none where no image was better than its group
    rows = [
        {"iteration": i, "images": 16 * i, "time/cpu": 0.5} | ({"policy/denoising_loss_better": e} if e else {})
        for i, e in enumerate(errors, 1)
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    evals = [{"iteration": i, "score": {"mean": 0.3 + i / 400, "stderr": 0.01}} for i in (0, 40, 80)]
    (tmp_path / "eval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in evals))
    found = bench.rows_of(tmp_path, "no KL", 1)
    assert [(row["images"], row["mean"], row.get("growth"), row.get("cpu_seconds")) for row in found] == [
        (0, 0.3, None, None),
        (640, 0.4, 1.0, 20),
        (1280, 0.5, 1.5, 40),
    ]
    stopped = [{**row, "seed": 2} for row in found[:2]]
    (tmp_path / "lines.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found + stopped))
    assert bench.main(["--table", "--rows", str(tmp_path / "lines.jsonl")]) == 0
    cells = [cell.strip() for cell in capsys.readouterr().out.splitlines()[2].split("|")[1:-1]]
    assert cells == ["no KL", "1 2", "0.400 0.400", "0.500 -", "", "", "", "1.5 1.0", "40 20"]
