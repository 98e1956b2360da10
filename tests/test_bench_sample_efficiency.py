"""The study of the methods searches the same way for each, runs, is resumable, and its arithmetic is right."""

from __future__ import annotations

import json

import numpy as np
import pytest

from fastloop.recipes import dump_config


@pytest.fixture(scope="module")
def bench(bench_module):
    return bench_module("sample_efficiency")


@pytest.fixture
def recipe(make_config, tmp_path):
    """A file of a run of seconds, with a category for each prompt."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(
        "".join(json.dumps({"prompt": p, "category": c}) + "\n" for p, c in (("cat", "pets"), ("deer", "wild")))
    )
    source = {"source": str(prompts), "limit": None}
    run = {
        "iterations": 1,
        "sampling": {"steps": 2, "guidance_scale": 1.0},
        "memory": {"rollout_batch": 48, "update_batch": 48},
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(dump_config(make_config(prompts=source, eval={"prompts": source}, **run)))
    return path


def test_methods_train_on_the_same_images_and_are_not_trained_again(bench, recipe, tmp_path, capsys):
    methods = ["LOOP K=3", "PPO"]
    command = ["--recipe", str(recipe), "--methods", *methods, "--rates", "0.01", "--jobs", "2"]
    command += ["--out", str(tmp_path / "out"), "--results", str(tmp_path / "results")]
    assert bench.main([*command, "--seeds", "3", "--table"]) == 1
    assert "no run of the study has finished" in capsys.readouterr().err
    assert bench.main([*command, "--seeds", "3"]) == 0
    printed = capsys.readouterr().out
    summary = json.loads(next((tmp_path / "results").glob("*.json")).read_text())
    assert list(summary["methods"]) == methods and summary["unfinished"] == []
    loop, ppo = summary["methods"].values()
    assert loop["images"] == ppo["images"] == [0, 48] and loop["seeds"] == [3]
    assert (loop["images_per_prompt"], ppo["images_per_prompt"]) == (3, 1)
    assert loop["scores"][0][0] == ppo["scores"][0][0] and loop["scores"][0][1] != ppo["scores"][0][1]
    assert all(seconds[0] == 0 < seconds[1] for row in (loop, ppo) for seconds in row["seconds"])
    assert set(loop["categories"]) == {"pets", "wild"}
    assert summary["runs"] == 2 and 0 < summary["training_hours"] < summary["hours"] + 0.1 < 0.5
    assert "2 runs with the search" in printed
    assert "| LOOP K=3 |" in printed and "| before training |" in printed
    assert next((tmp_path / "results").glob("*.md")).read_text().strip() in printed
    assert next((tmp_path / "results").glob("*.png")).stat().st_size > 10_000
    runs = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert bench.main([*command, "--seeds", "3"]) == 0
    assert {path: path.stat().st_mtime_ns for path in runs} == runs
    capsys.readouterr()
    (tmp_path / "out").rename(tmp_path / "elsewhere")  # a study may be moved
    command[command.index("--out") + 1] = str(tmp_path / "elsewhere")
    assert bench.main([*command, "--seeds", "3", "4", "--table"]) == 0
    assert "Not finished, and not in the tables: LOOP K=3, seed 4; PPO, seed 4." in capsys.readouterr().out


def scored(bench, tmp_path, scores: dict[float, float]):
    """A study whose runs are made up: the search's final score by learning rate. Returns it and what was asked for."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("rewards: [{name: shapes}]\n")
    study, asked = bench.Study(recipe, (), tmp_path, 30, (1e-3, 3e-3, 1e-2)), []

    def train(method, rate, seed):
        asked.append(rate)
        folder = tmp_path / bench.Path(study.config(method, rate, seed).output_dir).name
        folder.mkdir(exist_ok=True)
        (folder / "eval.jsonl").write_text(json.dumps({"score": {"mean": scores[rate]}}) + "\n")
        return True

    return study, train, asked


def test_the_search_stops_where_the_best_rate_is_inside_the_grid(bench, tmp_path):
    scores = {1e-3: 0.4, 3e-3: 0.6, 1e-2: 0.5}
    study, train, asked = scored(bench, tmp_path, scores)
    assert bench.search(study, "PPO", train) == scores and asked == [1e-3, 3e-3, 1e-2]


def test_the_search_goes_beyond_an_end_that_is_best_but_only_twice(bench, tmp_path):
    scores = {1e-3: 0.4, 3e-3: 0.5, 1e-2: 0.6, 3e-2: 0.7, 9e-2: 0.8, 0.27: 0.9}
    study, train, asked = scored(bench, tmp_path, scores)
    assert list(bench.search(study, "LOOP K=2", train)) == asked == [1e-3, 3e-3, 1e-2, 3e-2, 9e-2]


def test_the_search_ends_where_a_run_is_not_there(bench, tmp_path):
    study, train, asked = scored(bench, tmp_path, {1e-3: 0.4, 3e-3: 0.5, 1e-2: 0.6})

    def up_to_the_grid(method, rate, seed):
        return rate <= 1e-2 and train(method, rate, seed)

    assert list(bench.search(study, "PPO", up_to_the_grid)) == asked == [1e-3, 3e-3, 1e-2]
    assert bench.search(study, "PPO", lambda *_: False) == {}


def test_runs_of_the_search_are_shorter_and_have_a_seed_of_their_own(bench, tmp_path):
    study, _, _ = scored(bench, tmp_path, {})
    search, run = (study.config("LOOP K=8", 3e-3, seed) for seed in (bench.SEARCH_SEED, 0))
    assert search.iterations == 30 and run.iterations == 60
    assert search.output_dir != run.output_dir and search.images_per_rollout == run.images_per_rollout == 48
    changed = {key for key, value in run.model_dump().items() if value != search.model_dump()[key]}
    assert changed == {"iterations", "eval", "seed", "output_dir"}


def test_errors_are_over_the_seeds_and_the_area_is_the_mean_over_images(bench):
    assert bench.over_seeds([0.2, 0.4, 0.6]) == f"0.400 ± {np.std([0.2, 0.4, 0.6], ddof=1) / 3**0.5:.3f}"
    assert bench.over_seeds([0.25]) == "0.250"
    assert bench.area([0, 10, 40], np.array([[0.0, 1.0, 1.0], [0.5, 0.5, 0.5]])) == pytest.approx([0.875, 0.5])


def test_an_unknown_method_and_the_seed_of_the_search_are_refused(bench, capsys):
    assert bench.main(["--methods", "DPO"]) == 2 and "--methods: unknown 'DPO'" in capsys.readouterr().err
    assert bench.main(["--seeds", "1000"]) == 2 and "--seeds" in capsys.readouterr().err
