"""Compute to a common score: crossings and their intervals are right, rows are counted, and the study runs and resumes."""

from __future__ import annotations

import json
import math
import shutil
import sys

import numpy as np
import pytest
from safetensors.torch import save_file

from fastloop.algorithms import ALGORITHMS
from fastloop.recipes import dump_config, load_config
from fastloop.tracking import read_rows


@pytest.fixture(scope="module")
def bench(bench_module):
    return bench_module("time_to_score")


@pytest.fixture(scope="module")
def curves(bench):
    return sys.modules["score_curves"]


# --- curves -----------------------------------------------------------------------------------------------------------


def test_the_isotonic_fit_is_the_largest_of_the_smallest_means(curves):
    assert curves.isotonic(np.array([1.0, 3.0, 2.0, 4.0])).tolist() == [1.0, 2.5, 2.5, 4.0]
    rng = np.random.default_rng(0)
    for _ in range(20):
        y = rng.normal(size=8)
        expected = [max(min(y[j : k + 1].mean() for k in range(i, 8)) for j in range(i + 1)) for i in range(8)]
        np.testing.assert_allclose(curves.isotonic(y), expected)


def test_a_crossing_is_linear_between_evaluations_and_the_first_one(curves):
    x, rising = np.array([0.0, 10.0, 30.0, 40.0]), np.array([0.3, 0.4, 0.4, 0.6])
    assert curves.crossing(x, rising, 0.35) == pytest.approx(5)
    assert curves.crossing(x, rising, 0.4) == 10
    assert curves.crossing(x, rising, 0.5) == pytest.approx(35)
    assert curves.crossing(x, rising, 0.2) == 0 and curves.crossing(x, rising, 0.61) == math.inf


def made(curves, scores, spent):
    return curves.Curves(np.array(scores), {unit: np.array([spent] * len(scores), float) for unit in curves.UNITS})


def test_a_recipe_that_does_the_same_in_a_fifth_has_a_ratio_of_5_whatever_seeds_are_drawn(curves):
    scores = [[0.3, 0.4, 0.5, 0.6, 0.7]] * 3
    found = curves.compare(made(curves, scores, [0, 10, 20, 30, 40]), made(curves, scores, [0, 2, 4, 6, 8]), draws=50)
    assert found.reached == {"equivalents": pytest.approx(6), "cpu": pytest.approx(6)}  # the last three are 0.6 on average
    assert found.ratio["cpu"] == pytest.approx(5) and found.interval["cpu"] == pytest.approx((5, 5))
    assert found.reaching == 1


def test_an_interval_is_over_seeds_and_a_draw_that_does_not_reach_counts_as_0(curves):
    spent = [0, 10, 20, 30]
    reference = made(curves, [[0.3, 0.5, 0.5, 0.5]] * 2, spent)
    half = curves.compare(reference, made(curves, [[0.3, 0.7, 0.7, 0.7], [0.3, 0.3, 0.3, 0.3]], spent), draws=400)
    assert half.reached["cpu"] == 10 and half.ratio["cpu"] == 1  # the mean of both just reaches it
    assert half.interval["cpu"] == (0, pytest.approx(2)) and 0.65 < half.reaching < 0.85  # 3 in 4 draw the better one
    never = curves.compare(reference, made(curves, [[0.3, 0.4, 0.4, 0.4]] * 2, spent), draws=50)
    assert never.reached["cpu"] == math.inf and never.ratio["cpu"] == never.reaching == 0
    alone = curves.compare(reference, made(curves, [[0.3, 0.7, 0.7, 0.7]], spent))
    assert alone.interval is None and alone.ratio["cpu"] == pytest.approx(2)


# --- the study --------------------------------------------------------------------------------------------------------


def test_a_budget_becomes_iterations_whose_last_evaluation_comes_in_turn(bench):
    assert bench.schedule(61.3, 8) == (64, 8)
    assert bench.schedule(58, 8) == (56, 7)
    assert bench.schedule(3.2, 8) == (3, 1) and bench.schedule(0.1, 8) == (1, 1)


def test_a_recipe_of_the_command_line_may_begin_with_another(bench):
    found = bench.with_recipes([["LOOP fast", "LOOP", "budget=2e4", "clip_range=1e-3"], ["its ablation", "LOOP fast", "a=1"]])
    assert found["LOOP fast"].items == (*bench.RECIPES["LOOP"].items, "budget=2e4", "clip_range=1e-3")
    assert found["its ablation"].items == (*found["LOOP fast"].items, "a=1")


def test_what_loop_fast_brings_is_what_the_committed_runs_had():
    """A run's key has what its recipe sets, not what `algorithm=loop_fast` brings: after a change here they are run again."""
    assert ALGORITHMS["loop_fast"].settings == {
        "ema": {"decay": 0.95},
        "optimizer": {"schedule": "linear", "max_grad_norm": 1e-5},
        "kl": {"weight": 0.15, "of_advantages": True, "every": 4},
    }


def test_what_is_no_recipe_and_the_seed_of_the_search_are_refused(bench, tmp_path, capsys):
    out = ["--out", str(tmp_path)]
    assert bench.main([*out, "--recipes", "DPO"]) == 2 and "--recipes: unknown 'DPO'" in capsys.readouterr().err
    assert bench.main([*out, "--recipe", "A", "LOOPS"]) == 2 and "'LOOPS' is neither KEY=VALUE" in capsys.readouterr().err
    assert bench.main([*out, "--seeds", "1000"]) == 2 and "--seeds" in capsys.readouterr().err
    for tasks in (["guided"], ["color", "guided", "--search-task", "guided"]):
        assert bench.main([*out, "--tasks", *tasks]) == 2 and "--search-task: guidance" in capsys.readouterr().err
    assert bench.main([*out, "--table"]) == 1 and "no run of the study has finished" in capsys.readouterr().err
    for arguments, says in (
        (["--evaluations", "0"], "--evaluations: 0: give a whole number above 0"),
        (["--rates", "0.1", "0"], "--rates: 0: give a number above 0"),
        (["--base", "nope.yaml", "--table"], "--base: nope.yaml: there is no such file"),
        (["--recipe", "A", "LOOP", "budget=abc"], "--recipe 'A': budget=abc: give a number above 0, of forwards"),
        (
            ["--set", "ema.decay=0.9", "--tasks", "mix"],
            "ema.decay: 0.9, which the plain trainer, bench/baseline_ppo.py, does not do",
        ),
    ):
        assert bench.main([*out, *arguments]) == 2 and says in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.fixture
def base(make_config, tmp_path):
    """A file of a run of seconds: two prompts, 2 images an iteration."""
    (tmp_path / "prompts.txt").write_text("cat\ndeer\n")
    source = {"source": str(tmp_path / "prompts.txt"), "limit": None}
    path = tmp_path / "base.yaml"
    path.write_text(dump_config(make_config(prompts=source, eval={"prompts": source})))
    return path


def test_the_reference_and_a_recipe_train_to_a_budget_and_are_not_run_again(bench, base, tmp_path, capsys):
    results, out = tmp_path / "results", tmp_path / "out"
    command = ["--base", str(base), "--set", "prompts_per_step=2", "--tasks", "mix", "--seeds", "3", "--rates", "0.01"]
    command += ["--recipes", "PPO with levers", "--evaluations", "2", "--budget", "150", "--jobs", "2"]
    command += ["--out", str(out), "--results", str(results)]
    assert bench.main(command) == 0
    printed = capsys.readouterr().out
    rows = read_rows(results / "time_to_score_cpu.jsonl")
    by_recipe = {name: [row for row in rows if row["recipe"] == name] for name in (bench.REFERENCE, "PPO with levers")}
    factors = sys.modules["forward_equivalents"].Factors(**rows[0]["factors"])
    assert 1.5 < factors.trained < 3.5 and factors.decoded > 0 and factors.scored > 0
    for name, found in by_recipe.items():
        study_run = bench.Run(name, "mix", 3, 0.01, 150.0)
        assert {(row["task"], row["seed"], row["rate"], row["budget"]) for row in found} == {("mix", 3, 0.01, 150.0)}
        assert [row["images"] for row in found] == [2 * row["iteration"] for row in found] and found[0]["images"] == 0
        assert all(a["cpu"] < b["cpu"] for a, b in zip(found, found[1:], strict=False))
        assert found[0]["scores"] == by_recipe[bench.REFERENCE][0]["scores"]  # the same weights, prompts and noise
        assert found[0]["scores"]["plain"] != found[0]["scores"]["guided"] and found[-1]["scores"] != found[0]["scores"]
        for row in found:
            expected = row["sampled"] + factors.trained * row["trained"]
            expected += row["images"] * (factors.decoded + factors.scored)
            assert row["equivalents"] == pytest.approx(expected, abs=0.5)
        assert found[-1]["equivalents"] == pytest.approx(study_run.budget, rel=0.5)
    # 2 images of 4 steps without guidance: all steps trained, or the first one alone and 2 rows of a replayed step
    n, m = (by_recipe[name][-1]["iteration"] for name in by_recipe)
    assert [(row["sampled"], row["trained"]) for row in (found[-1] for found in by_recipe.values())] == [
        (8 * n, 8 * n),
        (8 * m, 2 * m + 2),
    ]
    assert "### mix, guided" in printed and f"| {bench.REFERENCE} | 0.01 | 1 |" in printed
    assert (results / "time_to_score_cpu.md").read_text().strip() in printed
    assert (results / "time_to_score_cpu.png").stat().st_size > 10_000
    shutil.rmtree(out)
    assert bench.main(command) == 0 and not out.exists()
    capsys.readouterr()
    command[command.index("3")] = "4"
    assert bench.main([*command, "--table"]) == 1  # of another seed nothing is there
    assert read_rows(results / "time_to_score_cpu.jsonl") == rows


def test_rows_are_known_before_a_run(bench, base):
    of = sys.modules["forward_equivalents"].rows_of_iteration
    small = ["prompts_per_step=5", "images_per_prompt=1", "algorithm=ppo", "memory.rollout_batch=2", "memory.update_batch=8"]
    plain = load_config(base, [*small, "sampling.guidance_scale=1", "last_steps.drop=1"])
    # 5 trajectories in 3 calls of 2, of 4 steps; 15 rows in updates of 8 and 7, filled up
    assert of(plain) == {"sampled": 24, "trained": 16}
    assert of(load_config(base, [*small, "last_steps.drop=1", "kl.weight=1"])) == {"sampled": 2 * (24 + 16), "trained": 32}
    dlpo = [
        *small,
        "last_steps.drop=1",
        "algorithm=dlpo",
        "sampling.guidance_scale=1",
        "images_per_prompt=5",
        "prompts_per_step=1",
    ]
    one = ["updates_per_rollout=1", "dlpo.gradient=true"]  # the penalty's forward of a picture, and then its gradient too
    assert of(load_config(base, [*dlpo, *one])) == {"sampled": 24 + 6, "trained": 2 * 16}


def test_a_search_goes_beyond_an_end_that_is_best_and_its_last_three_evaluations_decide(bench, base, tmp_path, monkeypatch):
    args = bench.parse(["--base", str(base), "--out", str(tmp_path), "--rates", "0.003", "0.001", "0.003"])
    study, asked = bench.Study(args, bench.RECIPES, tmp_path / "rows.jsonl"), []

    def train(run):
        asked.append((run.rate, run.seed, run.task, run.budget))
        return [{"scores": {"plain": {"mean": score}}} for score in (0.9, run.rate, run.rate, run.rate + 0.03)]

    monkeypatch.setattr(study, "train", train)
    found = study.search("LOOP")
    assert found == {rate: pytest.approx(rate + 0.01) for rate in (0.001, 0.003, 0.009, 0.027)}
    assert asked == [(rate, bench.SEARCH_SEED, "mix", 5e4) for rate in found]
    args.recipes = ["LOOP"]
    assert study.runs({"LOOP": found})[0] == bench.Run("LOOP", "color", 0, 0.027, 1e5)
    assert list(study.evaluations(bench.Run("LOOP", "mix", bench.SEARCH_SEED, 0.1, 1e5))[1]) == ["plain"]
    own = bench.Study(args, bench.with_recipes([["A", "LOOP", "optimizer.lr=0.5", "budget=3e4"]]), tmp_path / "rows.jsonl")
    args.recipes = ["A"]
    assert own.search("A") == {} and own.runs({"A": {}})[0] == bench.Run("A", "color", 0, None, 3e4)


def test_with_guidance_in_training_guided_pictures_alone_are_scored_and_decide_the_search(bench, base, tmp_path, monkeypatch):
    """As many a prompt as the plain ones of other tasks: there the guided ones are an aside."""
    args = bench.parse(["--base", str(base), "--out", str(tmp_path), "--search-task", "guided", "--tasks", "guided"])
    study = bench.Study(args, bench.RECIPES, tmp_path / "rows.jsonl")
    for seed in (0, bench.SEARCH_SEED):
        _, ways = study.evaluations(bench.Run("LOOP", "guided", seed, 0.1, 1e5))
        assert ways == {"guided": {"sampling": bench.EVALUATIONS["guided"]["sampling"]}}
    config = load_config(base, study.overrides(bench.Run("LOOP fast", "guided", 0, 0.1, 1e5)))
    assert config.sampling.guidance_scale == 3 and config.eval.images_per_prompt == 5
    monkeypatch.setattr(study, "train", lambda run: [{"scores": {"guided": {"mean": run.rate}}}] * 4)
    assert max(study.search("LOOP")) == args.rates[-1] * 4

    def made_runs(*ways: str) -> dict[str, list[list[dict]]]:
        row = {"rate": 0.1, "equivalents": 10, "cpu": 1.0, "images": 2, "iteration": 1}
        return {"LOOP": [[{**row, "scores": {way: {"mean": 0.5, "stderr": 0.1} for way in ways}}] * 4]}

    found = {"mix": made_runs("plain", "guided"), "guided": made_runs("guided")}
    facts = {"factors": sys.modules["forward_equivalents"].Factors(1, 1, 1), "searches": {}, "search_task": "guided"}
    text = bench.tables(found, **facts, unfinished=[], machine={"cpus": 2}, versions={"torch": "2"})
    assert [line for line in text.splitlines() if line.startswith("### ")] == [
        "### mix, plain",
        "### mix, guided",
        "### guided, guided",
        "### What a run costs",
    ]
    bench.plot(found, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000


def test_a_run_of_fastloop_that_was_interrupted_ends_as_one_that_was_not(bench, bench_module, base, tmp_path):
    run = bench_module("time_to_score_run")
    values = load_config(base, ["iterations=4", "eval.every=2", "checkpoint.every=1", "sampling.guidance_scale=1"])

    def scores(name: str, *lengths: int) -> list[dict]:
        """Of a run that is ended after so many iterations, and again."""
        folder = tmp_path / name
        folder.mkdir()
        for length in lengths:
            config = {**values.model_dump(mode="json"), "iterations": length, "output_dir": str(folder / "run")}
            job = {"trainer": "fastloop", "config": config, "evaluations": {"plain": {}}}
            (folder / "job.json").write_text(json.dumps(job))
            assert run.main(folder) == 0
        return [{**row, "cpu": 0} for row in read_rows(folder / "scores.jsonl") if row["iteration"] % 2 == 0]

    whole = scores("whole", 4)
    assert scores("parts", 3, 4) == whole and [row["iteration"] for row in whole] == [0, 2, 4]


PEER = """#!{python}
import json, shutil, sys
case = json.loads(open(sys.argv[2]).read())
for line in sys.stdin:
    shutil.copy({weights!r}, case["weights"])
    print(json.dumps({{"cpu_seconds": 1.5}}), flush=True)
"""


def test_a_peer_trains_and_what_it_hands_over_is_evaluated(bench, bench_module, base, tmp_path):
    run = bench_module("time_to_score_run")
    small = ["algorithm=ppo", "images_per_prompt=1", "prompts_per_step=4", "sampling.guidance_scale=1", "iterations=2"]
    config = load_config(base, [*small, "eval.every=1", f"output_dir={tmp_path}"])
    denoiser = run.load_denoiser(config.model, run.torch.device("cpu"))
    denoiser.train_adapter(gradient_checkpointing=False, seed=0)
    weights, peer = tmp_path / "trained.safetensors", tmp_path / "python"
    save_file({name: p.detach() + 0.1 for name, p in denoiser.trainable().items()}, weights)
    peer.write_text(PEER.format(python=sys.executable, weights=str(weights)))
    peer.chmod(0o755)
    job = {"trainer": str(peer), "config": config.model_dump(mode="json"), "evaluations": {"plain": {}}}
    (tmp_path / "job.json").write_text(json.dumps(job))
    assert run.main(tmp_path) == 0
    before, once, twice = read_rows(tmp_path / "scores.jsonl")
    assert before["scores"] != once["scores"] == twice["scores"]
    assert {key: twice[key] for key in ("images", "sampled", "trained", "cpu")} == {
        "images": 8,
        "sampled": 32,
        "trained": 32,
        "cpu": 3,
    }
    case = json.loads((tmp_path / "case.json").read_text())
    drawn = run.PromptStream(run.load_prompts(config.prompts), config.seed).draw(0, 8)
    assert case["prompts"] == [prompt.text for prompt in drawn] and case["steps"] == 4
