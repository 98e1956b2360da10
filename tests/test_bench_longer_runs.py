"""bench/longer_runs.py: its variants are configurations, and its lines and table say what the runs' records do."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from fastloop.recipes import load_config
from fastloop.tracking import read_rows


@pytest.fixture
def bench(bench_module):
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


def test_what_the_command_line_changes_is_another_variant_and_what_cannot_run_is_refused_at_once(
    bench, tmp_path, monkeypatch, capsys
):
    asked, ends = [], [0, 0, 1]

    def run(command, **_):
        """A run that leaves two evaluations, or fails."""
        folder = Path(command[-1].removeprefix("output_dir="))
        folder.mkdir(parents=True)
        (folder / "metrics.jsonl").write_text('{"iteration": 1, "images": 16, "time/cpu": 0.5}\n')
        score = {"mean": 0.3, "stderr": 0.01}
        (folder / "eval.jsonl").write_text("".join(json.dumps({"iteration": i, "score": score}) + "\n" for i in (0, 1)))
        asked.append(command)
        return SimpleNamespace(returncode=ends.pop(0))

    monkeypatch.setattr(bench.subprocess, "run", run)
    rows = tmp_path / "new" / "lines.jsonl"
    command = ["--only", "LOOP fast", "--out", str(tmp_path / "out"), "--rows", str(rows)]
    own, other = [*command, "--seeds", "0"], ["optimizer.lr=0.5", *command, "--seeds", "0"]
    assert bench.main(own) == bench.main(other) == bench.main(own) == bench.main(other) == 0 and len(asked) == 2
    assert "optimizer.lr=0.5" in asked[1] and asked[0][-1] != asked[1][-1]
    assert [row["variant"] for row in read_rows(rows)] == ["LOOP fast"] * 2 + ["LOOP fast, optimizer.lr=0.5"] * 2
    assert bench.main(["lr=0.5", *command]) == 2 and len(capsys.readouterr().err.strip().splitlines()) == 1
    assert bench.main(["optimizer.lr=0.7", *command, "--seeds", "0"]) == 1  # the run has said why
    assert len(read_rows(rows)) == 4 and len(asked) == 3
