"""The plot of sensitivity: one setting is changed at a time, the recipe as it is runs once for all axes."""

from __future__ import annotations

import sys

import pytest

from fastloop.recipes import dump_config
from fastloop.tracking import read_rows


@pytest.fixture
def bench(bench_module, monkeypatch):
    monkeypatch.syspath_prepend(str(bench_module("worker").__file__).rsplit("/", 1)[0])
    return bench_module("sensitivity")


def settings(bench, *cell) -> dict[str, str]:
    return dict(item.split("=", 1) for item in bench.items_of(*cell))


def test_one_setting_is_changed_and_a_rollout_keeps_its_images(bench):
    for key, (_, of) in bench.AXES.items():
        for name, values in of.items():
            own = bench.own_items(name)
            for value in values:
                found = settings(bench, name, key, value)
                assert found.keys() == own.keys() and float(found[key]) == value
                changed = {other for other in own if found[other] != own[other]}
                asked = {key, "prompts_per_step"} if key == bench.K else {key}
                assert changed == (set() if bench.cell_name(name, key, value) == name else asked)
                assert int(found[bench.K]) * int(found["prompts_per_step"]) == int(own[bench.K]) * int(own["prompts_per_step"])
    assert max(bench.RATES) / min(bench.RATES) == 16


@pytest.mark.filterwarnings("ignore:Attempting to set identical")  # an axis with one value
def test_cells_are_run_once_and_drawn(bench, make_config, tmp_path, monkeypatch, capsys):
    axes = {
        bench.RATE: ("learning rate", {"LOOP": (3e-3, 0.3)}),
        "clip_range": ("clip range", {"LOOP": (1e-4,)}),
    }
    monkeypatch.setattr(bench, "AXES", axes)
    (tmp_path / "prompts.txt").write_text("cat\ndeer\n")
    source, base = {"source": str(tmp_path / "prompts.txt"), "limit": None}, tmp_path / "base.yaml"
    base.write_text(dump_config(make_config(prompts=source, eval={"prompts": source})))
    command = ["--base", str(base), "--set", "prompts_per_step=1", "images_per_prompt=2", "eval.images_per_prompt=1"]
    command += ["--out", str(tmp_path / "out"), "--results", str(tmp_path), "--budget", "40", "--seeds", "5"]
    assert bench.main([*command, "--table"]) == 1 and "no run has finished" in capsys.readouterr().err
    assert bench.main([*command, "--jobs", "2"]) == 0
    printed = capsys.readouterr().out
    rows = read_rows(tmp_path / "sensitivity_cpu.jsonl")
    cells = {row["recipe"]: row for row in rows}  # of each the last evaluation
    assert set(cells) == {"LOOP", "LOOP, optimizer.lr=0.3"} and len(rows) == 4  # one before, one at the end
    assert [cells[name]["rate"] for name in ("LOOP", "LOOP, optimizer.lr=0.3")] == [3e-3, 0.3]
    assert all(set(row["scores"]) == {"plain"} for row in rows)
    score = cells["LOOP"]["scores"]["plain"]["mean"]
    assert printed.count(f"{score:.3f}") >= 2 and "| clip range | 0.0001 |" in printed
    assert (tmp_path / "sensitivity_cpu.md").read_text().strip() in printed
    assert (tmp_path / "sensitivity_cpu.png").stat().st_size > 10_000
    monkeypatch.setattr(sys.modules["time_to_score"].subprocess, "run", None)  # nothing is left to run
    assert bench.main(command) == 0
