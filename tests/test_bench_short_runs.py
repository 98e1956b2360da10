"""Sensitivity and ablation: one setting is changed at a time, and what is compared has run once."""

from __future__ import annotations

import sys

import pytest

from fastloop.recipes import dump_config
from fastloop.tracking import read_rows


@pytest.fixture
def bench(bench_module, own_tables):
    return bench_module("sensitivity")


@pytest.fixture
def ablation(bench, bench_module):
    return bench_module("ablation")


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
    assert bench.main([*command, "--only", "LOOP", "--jobs", "2"]) == 0
    assert "1 of 2 runs have finished" in capsys.readouterr().out
    assert bench.main([*command, "--only", "LOOPS"]) == 2 and "--only: unknown 'LOOPS'" in capsys.readouterr().err
    assert bench.main(command) == 0
    printed = capsys.readouterr().out
    assert "have finished" not in printed
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
    asked = []
    monkeypatch.setattr(sys.modules["short_runs"].ShortRuns, "train", lambda study, run: asked.append(run))
    assert bench.main([*command, "--seeds", "6"]) == 1 and len(asked) == 2  # the first that fails does not stop the others


def test_every_variant_is_a_run_that_could_be_trained_and_is_compared_with_its_bases_seed(
    ablation, bench_module, monkeypatch, tmp_path, capsys
):
    short, record, asked, noisy = sys.modules["short_runs"], bench_module("time_to_score_run").Record, [], []

    def train(study, run):
        """A variant gains 0.01 a place in the list, a seed 0.1 in all."""
        config = study.config(run)
        asked.append(config.iterations)
        noisy.append((config.sampling.noise_steps, record(tmp_path, config, study.evaluations(run)[1]).configs["plain"]))
        score = 0.3 + 0.1 * run.seed + 0.01 * list(study.recipes).index(run.recipe)
        rows = [{"run": study.key(run), "scores": {"plain": {"mean": mean}}} for mean in (0.3, 0.35, score)]
        study.rows += rows
        return rows

    def measured(study):
        study.factors = sys.modules["forward_equivalents"].Factors(2.0, 2.0, 1.0)

    monkeypatch.setattr(short.ShortRuns, "train", train)
    monkeypatch.setattr(short.ShortRuns, "measure_factors", measured)
    assert ablation.main(["--out", str(tmp_path), "--seeds", "0", "1"]) == 0
    printed = capsys.readouterr().out
    names = list(ablation.recipes())
    assert len(asked) == 2 * len(names) and min(asked) > 10
    assert {steps for steps, _ in noisy} == {None, (0, 4), (1, 3), (0, 2)}  # in training alone
    assert len({config.eval_sampling.model_dump_json() for _, config in noisy}) == 1
    of_base = names.index("LOOP fast")
    assert "| **LOOP with levers** | 0.350 ± 0.000 | 0.350 ± 0.050 |  |" in printed
    last = 0.01 * (len(names) - 1 - of_base)
    assert (
        f"| best and worst alone * | 0.350 ± 0.000 | {0.35 + 0.01 * (len(names) - 1):.3f} ± 0.050 | {last:.3f} ± 0.000 |"
        in printed
    )
    assert (tmp_path / "ablation_cpu.md").read_text().strip() in printed
    assert (tmp_path / "ablation_cpu.png").stat().st_size > 10_000
