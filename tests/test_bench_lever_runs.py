"""Recipes with the levers that are tried in bench/: those that cannot run are refused, the others do what was planned."""

from __future__ import annotations

import json
import sys

import pytest

from fastloop.recipes import dump_config, load_config
from fastloop.tracking import read_rows


@pytest.fixture
def bench(bench_module, own_tables):
    """The study's module."""
    return bench_module("time_to_score")


@pytest.fixture
def base(make_config, tmp_path):
    """A file of a run of seconds: 3 prompts, 4 images of each an iteration, 4 steps."""
    path, source = tmp_path / "base.yaml", {"source": "animals", "limit": 3}
    path.write_text(dump_config(make_config(prompts=source, eval={"prompts": source}, images_per_prompt=4)))
    return path


@pytest.mark.parametrize(
    "items, message",
    [
        (["lever=stepz:1"], "lever=stepz:1: unknown: one of steps, weights"),
        (["lever=steps:a:2"], "lever=steps:a:2: not its arguments"),
        (["lever=tree:1x1"], "lever=tree:1x1: not its arguments"),
        (["lever=steps:5:7"], "lever=steps:5:7: none of the steps that can be trained is left"),
        (["lever=tree:1x3"], "lever=tree:1x3: trees of 3 leaves: set images_per_prompt to a multiple of it"),
        (["lever=ratio:trajectory", "prompts_per_step=5", "updates_per_rollout=3"], "20 are not shared by 3"),
        (["lever=control", "lever=james_stein"], "lever=james_stein lever=control: two of them set advantage"),
        (
            ["algorithm=loop_fast", "lever=steps:0:2"],
            "lever=steps:0:2: it is of the sampler's steps, and objective=forward_process",
        ),
        (["lever=by_spread:0"], "lever=by_spread:0: not its arguments"),
        (["lever=by_spread", "lever=redraw:1"], "lever=by_spread: does not go with lever=redraw:1"),
        (["lever=tree:1x4", "lever=redraw:1"], "lever=tree:1x4: does not go with lever=redraw:1"),
    ],
)
def test_a_lever_that_is_none_or_does_not_fit_is_refused_in_one_line(bench, base, tmp_path, capsys, items, message):
    small = ["--base", str(base), "--out", str(tmp_path / "out"), "--set", "sampling.steps=4", "--tasks", "mix"]
    assert bench.main([*small, "--recipe", "A", *items, "--recipes", "A"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert message in line


def test_a_lever_is_part_of_a_runs_key_the_last_one_counts_and_other_trainers_have_none(bench, base, tmp_path, capsys):
    given = [["A", "LOOP", "lever=steps:0:2"], ["B", "A", "lever=steps:1"], ["C", "LOOP", "lever=steps:1"]]
    study = bench.Study(bench.parse(["--base", str(base)]), bench.with_recipes(given), tmp_path / "rows.jsonl")
    keys = {name: study.key(bench.Run(name, "mix", 0, None, 1e5)) for name in ("LOOP", "A", "B", "C")}
    assert len(set(keys.values())) == 3 and keys["B"] == keys["C"]
    assert bench.main(["--recipe", bench.REFERENCE, "algorithm=ppo", "lever=steps:1"]) == 2
    assert "levers are fastloop's" in capsys.readouterr().err


LAUNCHED = {
    "steps:0:2 weights:equal james_stein ratio:total": {"sampled": 48, "trained": 40, "images": 12},
    "steps:1:3 ratio:trajectory_total best_and_worst": {"sampled": 48, "trained": 18, "images": 12},  # of 36 half
    "by_spread:0.5 steps:1:3": {"sampled": 48, "trained": 40, "images": 12},  # 4 calls of 5 an update
    "control redraw:1 steps:2": {"sampled": 48, "trained": 12, "images": 24},  # no group is redrawn
    "tree:1x2:2x2 weights:noise": {"sampled": 3 + 3 + 6 + 12, "trained": 2 * 15, "images": 12},
}


@pytest.mark.parametrize("specs", LAUNCHED)
def test_a_run_with_levers_takes_what_was_planned_and_learns(bench, bench_module, base, tmp_path, specs):
    run, levers = bench_module("time_to_score_run"), sys.modules["levers"]
    chosen = levers.parse_levers(specs.split())
    small = ["sampling.guidance_scale=1", "iterations=3", "eval.every=3", f"output_dir={tmp_path / 'run'}", "clip_range=0.2"]
    config = load_config(base, [*small, *levers.settings_of(chosen)])
    job = {"trainer": "fastloop", "config": config.model_dump(mode="json"), "evaluations": {"plain": {}}}
    (tmp_path / "job.json").write_text(json.dumps({**job, "levers": specs.split()}))
    assert run.main(tmp_path) == 0
    counts, metrics = read_rows(tmp_path / "counts.jsonl"), read_rows(tmp_path / "run" / "metrics.jsonl")
    planned = levers.planned(chosen, config)
    assert all(row["policy/grad_norm"] > 0 for row in metrics) and metrics[0]["policy/replay_max_dev"] < 1e-5
    for row, metric in list(zip(counts, metrics, strict=True))[1:]:  # the first has a replay as well
        assert {"sampled": row["sampled"], "images": row["pictures"]} == {key: planned[key] for key in ("sampled", "images")}
        assert 0 <= planned["trained"] - row["trained"] <= metric["policy/pairs_skipped"]  # equal rewards teach nothing
    assert planned == LAUNCHED[specs]
    before, after = read_rows(tmp_path / "scores.jsonl")
    assert before["scores"] != after["scores"] and after["pictures"] == 3 * planned["images"] and after["images"] == 36


def test_a_run_with_levers_that_was_interrupted_ends_as_one_that_was_not(bench, bench_module, base, tmp_path):
    run, specs = bench_module("time_to_score_run"), ["control", "steps:0:1", "redraw:1:100"]
    levers = sys.modules["levers"]
    brought = levers.settings_of(levers.parse_levers(specs))
    config = load_config(base, ["eval.every=3", "checkpoint.every=1", "sampling.guidance_scale=1", *brought])

    def ends(name: str, *lengths: int) -> list[dict]:
        folder = tmp_path / name
        folder.mkdir()
        for length in lengths:
            values = {**config.model_dump(mode="json"), "iterations": length, "output_dir": str(folder / "run")}
            job = {"trainer": "fastloop", "config": values, "evaluations": {"plain": {}}, "levers": specs}
            (folder / "job.json").write_text(json.dumps(job))
            assert run.main(folder) == 0
        return [{**row, "cpu": 0} for row in read_rows(folder / "scores.jsonl") if row["iteration"] in (0, 3)]

    whole = ends("whole", 3)
    assert ends("parts", 2, 3) == whole
    assert whole[1]["pictures"] == 3 * 12 * (1 + 1 + 2) and whole[1]["sampled"] == 3 * 2 * 48  # all groups are drawn again


def test_a_study_runs_a_recipe_with_a_lever_and_counts_what_it_costs(bench, base, tmp_path, capsys):
    command = ["--base", str(base), "--set", "prompts_per_step=2", "--tasks", "mix", "--seeds", "0", "--rates", "0.01"]
    command += ["--evaluations", "1", "--budget", "150", "--out", str(tmp_path), "--jobs", "2"]
    command += [
        "--recipe",
        "A",
        "LOOP",
        "budget=600",
        "prompts_per_step=3",
        "lever=control:0.5",
        "lever=steps:1:2",
        "--recipes",
        "A",
    ]
    assert bench.main(command) == 0
    assert "| A | 0.01 | 1 |" in capsys.readouterr().out
    rows = [row for row in read_rows(tmp_path / "time_to_score_cpu.jsonl") if row["recipe"] == "A"]
    factors = sys.modules["forward_equivalents"].Factors(**rows[0]["factors"])
    assert rows[-1]["items"].endswith("prompts_per_step=3 lever=control:0.5 lever=steps:1:2")
    assert rows[-1]["pictures"] == 3 * rows[-1]["images"] > 0
    for row in rows:
        expected = row["sampled"] + factors.trained * row["trained"] + (factors.decoded + factors.scored) * row["pictures"]
        assert row["equivalents"] == pytest.approx(expected, abs=0.5)
    assert rows[-1]["equivalents"] == pytest.approx(600, rel=0.5)
