"""The report tells the run's story from whatever the run has left so far, and nothing in it can call out or run."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from fastloop.grids import before_after_grid, image_grid
from fastloop.report import write_report
from fastloop.report.formats import duration
from fastloop.tracking import Tracker

INJECTION = "<script>alert('x')</script> & \"quoted\""
PROMPTS = ["a red circle and a green cross", "two blue squares", INJECTION, "a ring above a triangle"]


def make_run(folder: Path, iterations: int = 60, *, every: int = 10, alarms: dict[str, range] | None = None) -> Path:
    """A finished run with every file that a trainer leaves, its numbers made up."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    (folder / "samples").mkdir()
    config = {
        "algorithm": "loop",
        "iterations": iterations,
        "clip_range": 1e-4,
        "rewards": [{"name": "shapes", "weight": 1.0}, {"name": "jpeg", "weight": 0.1}],
        "prompts": {"source": INJECTION},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    info = {
        "machine": {"host": "laptop", "cpu": "2 cores", "gpu": None},
        "versions": {"python": "3.11", "torch": "2.13.0"},
        "command": f"fastloop train --config {INJECTION}",
        "started": "2026-01-02T10:00:00+00:00",
        "finished": "2026-01-02T10:42:00+00:00",
        "status": "finished",
        "message": None,
    }
    (folder / "run.json").write_text(json.dumps(info))
    alarms = alarms or {}
    tracker = Tracker(folder, tensorboard=False, wandb=None, config=config)
    for iteration in range(iterations + 1):
        progress = 1 - math.exp(-iteration / 25)
        if iteration % every == 0:
            tracker.log_eval(evaluation(iteration, 0.35 + 0.4 * progress))
            save_samples(folder, iteration, progress, rng)
        if iteration == 0:
            continue
        phases = {"rollout": 14 + rng.random(), "reward_wait": 1.2, "update": 22 + rng.random()}
        tracker.log(
            {
                "iteration": iteration,
                "seconds": 41.0 * iteration,
                "images": 64 * iteration,
                "reward/mean": 0.33 + 0.4 * progress + 0.03 * rng.standard_normal(),
                "reward/std": 0.3,
                "reward/group_std": 0.22 - 0.1 * progress + 0.01 * rng.standard_normal(),
                "reward/shapes": 0.33 + 0.4 * progress,
                "reward/jpeg": -30 + 2 * progress,
                "advantage/std": 0.25,
                "policy/loss": -0.01,
                "policy/ratio_mean": 1.0,
                "policy/ratio_max_dev": 10 ** (-4 + rng.standard_normal() / 3),
                "policy/clipfrac": 0.1 + 0.1 * rng.random(),
                "policy/approx_kl": 1e-6 * (1 + rng.random()),
                "policy/grad_norm": math.nan if iteration == 7 else 0.4 + 0.1 * rng.random(),
                "image/saturation": 0.4 + 0.02 * rng.random(),
                "image/entropy": 5.1 + 0.1 * rng.random(),
                **{f"time/{name}": seconds for name, seconds in phases.items()},
                "time/reward": 3.1,
                "time/iteration": sum(phases.values()) + 0.7,
                "alarm/reward_collapse": int(iteration in alarms.get("reward_collapse", ())),
                "alarm/ratio": int(iteration in alarms.get("ratio", ())),
            }
        )
    tracker.close()
    images = [rng.integers(0, 255, (64, 64, 3), dtype=np.uint8) for _ in PROMPTS]
    grid = before_after_grid(PROMPTS, images, images, [0.1, 0.5, 0.3, 0.2], [0.9, 0.7, 0.8, 1.0])
    grid.save(folder / "samples" / "before_after.png")
    return folder


def evaluation(iteration: int, mean: float) -> dict:
    def estimate(shift: float, n: int) -> dict:
        return {"mean": mean + shift, "stderr": 0.4 / math.sqrt(n), "n": n}

    return {
        "iteration": iteration,
        "images": 64 * iteration,
        "seconds": 41.0 * iteration + 2,
        "time/eval": 9.0,
        "score": estimate(0, 400),
        "rewards": {"shapes": estimate(0, 400), "jpeg": estimate(-30, 400)},
        "categories": {"color": estimate(0.1, 100), "number": estimate(-0.1, 100), INJECTION: estimate(0, 100)},
    }


def save_samples(folder: Path, iteration: int, progress: float, rng: np.random.Generator) -> None:
    images = [rng.integers(0, 255, (64, 64, 3), dtype=np.uint8) for _ in PROMPTS]
    rewards = [round(0.4 + 0.5 * progress, 2)] * len(PROMPTS)
    captions = [f"{prompt}\n{reward:.2f}" for prompt, reward in zip(PROMPTS, rewards, strict=True)]
    image_grid(images, captions, columns=4).save(folder / "samples" / f"{iteration:06d}.png")
    entries = [
        {"prompt": prompt, "reward": reward, "file": None, "note": f"found {INJECTION}"}
        for prompt, reward in zip(PROMPTS, rewards, strict=True)
    ]
    (folder / "samples" / f"{iteration:06d}.json").write_text(json.dumps(entries))


@pytest.fixture(scope="module")
def full_run(tmp_path_factory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "shapes_loop", alarms={"ratio": range(3, 6)})


@pytest.fixture(scope="module")
def page(full_run) -> str:
    path = write_report(full_run)
    assert path == full_run.resolve() / "report.html"
    return path.read_text(encoding="utf-8")


def section(page: str, title: str) -> str:
    found = re.search(rf"<section><h2>{title}</h2>(.*?)</section>", page, re.S)
    assert found, f"no section {title!r}"
    return found.group(1)


def test_the_page_needs_nothing_from_outside(page):
    assert not re.findall(r"""src=["']?(?!["']?data:)""", page)
    assert not re.findall(r"(?:href|url|@import|action)\s*[=(]", page)
    assert "http://" not in page and "https://" not in page
    assert "default-src 'none'" in page


def test_prompts_and_config_cannot_inject_html(page):
    assert "<script" not in page
    assert page.count("&lt;script&gt;alert(") >= 4, "in the notes, the prompts, the categories and the configuration"


def test_markup_and_template_code_in_a_run_are_shown_as_text(tmp_path):
    run = make_run(tmp_path / "<script>{{ 7*7 }}", 2, every=1)
    code = "<script>alert('x')</script> {{ 7*7 }} {% raw %} {# note #} &amp;"
    config = {
        "algorithm": f"algorithm {code}",
        "rewards": [{"name": f"trained {code}"}, {"name": "jpeg"}],
        "eval": {"rewards": [{"name": f"watched {code}"}]},
        "prompts": {"source": f"source {code}"},
    }
    (run / "config.yaml").write_text(yaml.safe_dump(config, width=1000))
    facts = {"machine": {f"key {code}": f"value {code}"}, "status": f"status {code}", "message": f"message {code}"}
    (run / "run.json").write_text(json.dumps(facts | {"command": f"command {code}"}))
    row = {"iteration": 3, f"reward/trained {code}": 0.5, f"alarm/{code}": 1}
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")
    estimate = {"mean": 0.5, "stderr": 0.1, "n": 4}
    rewards, categories = ({f"{kind} {code}": estimate} for kind in ("watched", "category"))
    with (run / "eval.jsonl").open("a") as file:
        file.write(json.dumps(evaluation(3, 0.5) | {"rewards": rewards, "categories": categories}) + "\n")
    entry = {"prompt": f"prompt {code}", "reward": 0.5, "note": f"note {code}"}
    (run / "samples" / "000000.json").write_text(json.dumps([entry]))

    tags, texts = [], []

    class Parser(HTMLParser):
        def handle_starttag(self, tag, attributes):
            tags.append(tag)
            texts.extend(value for _, value in attributes)

        def handle_data(self, data):
            texts.append(data)

    Parser().feed(write_report(run).read_text())
    assert "script" not in tags
    for text in (
        "<script>{{ 7*7 }} · fastloop run",
        f"algorithm {code}",
        f"status {code}",
        f"message {code}",
        f"command {code}",
        f"key {code}",
        f"value {code}",
        code,  # the alarm
        f"prompt {code}",
        f"note {code}",
        f"category {code}",
        f"watched {code}",
        f"Held-out watched {code} and training reward",
        f"Held-out watched {code} and training reward over the iterations",
        f"Training reward: trained {code}",
        (run / "config.yaml").read_text(),
    ):
        assert text in texts


def test_half_of_a_surrogate_pair_in_a_runs_texts_is_written_as_an_escape(tmp_path):
    half = "\udcff"  # as Python reads a byte that is no UTF-8, in a prompt or a file name
    run = make_run(tmp_path / f"run{half}", 2, every=1)
    names = [{"name": f"trained{half}"}, {"name": f"watched{half}"}]
    config = {"algorithm": f"algorithm{half}", "rewards": names[:1], "eval": {"rewards": names}}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    facts = {"machine": {f"key{half}": f"value{half}"}, "status": "failed", "message": f"message{half}"}
    (run / "run.json").write_text(json.dumps(facts | {"command": f"command{half}"}))
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"iteration": 3, f"reward/trained{half}": 0.5, f"alarm/alarm{half}": 1}) + "\n")
    estimate = {"mean": 0.5, "stderr": 0.1, "n": 4}
    rewards, categories = ({f"{kind}{half}": estimate} for kind in ("watched", "category"))
    with (run / "eval.jsonl").open("a") as file:
        file.write(json.dumps(evaluation(3, 0.5) | {"rewards": rewards, "categories": categories}) + "\n")
    entry = {"prompt": f"prompt{half}", "reward": 0.5, "note": f"note{half}"}
    (run / "samples" / "000000.json").write_text(json.dumps([entry]))
    page = write_report(run).read_text(encoding="utf-8")
    for word in "run algorithm key value message command alarm prompt note category watched".split():  # noqa: SIM905
        assert rf"{word}\udcff" in page, word


def test_a_reward_whose_name_looks_like_a_formula_has_its_chart(tmp_path):
    name = "$x^$"
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"eval": {"rewards": [{"name": name}]}}))
    row = evaluation(0, 0.5) | {"rewards": {name: {"mean": 0.5, "stderr": 0.1, "n": 4}}}
    (tmp_path / "eval.jsonl").write_text(json.dumps(row) + "\n")
    assert f'alt="Held-out {name} and training reward over the iterations"' in write_report(tmp_path).read_text()


def test_the_page_is_well_formed(page):
    opened: list[str] = []

    class Parser(HTMLParser):
        def handle_starttag(self, tag, attrs):
            if tag not in ("meta", "img", "br"):
                opened.append(tag)

        def handle_endtag(self, tag):
            assert opened.pop() == tag

    Parser().feed(page)
    assert opened == []


def test_the_headline_gives_the_held_out_score_before_and_after_with_errors(page):
    header = re.sub(r"<[^>]+>", "", page.split("<section>")[0])
    assert "0.350 ± 0.020 → 0.714 ± 0.020" in header
    assert "+0.364 ± 0.028" in header
    for text in ("shapes_loop", "finished", "loop", "60 of 60", "3,840", "41\u00a0min"):
        assert text in header


@pytest.mark.parametrize(
    "trained_too, name, note",
    [
        (0, "Held-out score", "On prompts that training never saw; bars"),
        (12, "Evaluation score", "On prompts that are all trained on too; bars"),
        (5, "Evaluation score", "On 12 prompts, 5 of which are trained on too; bars"),
    ],
)
def test_a_score_is_called_held_out_only_where_training_never_saw_its_prompts(tmp_path, trained_too, name, note):
    folder = make_run(tmp_path / "run", 2, every=1)
    facts = {"eval.prompts": {"count": 12, "distinct": 12, "trained_too": trained_too}}
    (folder / "prompts.json").write_text(json.dumps(facts))
    text = write_report(folder).read_text()
    assert note in text and text.count(name) == 3  # the card, the curve and its text for who does not see it
    assert ("Held-out score" in text) == (trained_too == 0)


def test_the_score_of_a_run_that_did_not_record_its_prompts_is_not_called_held_out(page):
    assert "Held-out score" not in page and "On the evaluation prompts; bars" in page


def test_the_category_table_gives_first_last_and_difference(page):
    row = re.search(r"<tr><td>color</td>.*?</tr>", section(page, "By category")).group()
    cells = [re.sub(r"<[^>]+>", "", cell) for cell in re.findall(r"<td>(.*?)</td>", row)]
    assert cells == ["color", "100", "0.450 ± 0.040", "0.814 ± 0.040", "+0.364 ± 0.057"]


def test_the_numbers_in_the_category_table_are_numbers_of_prompts(page):
    table = section(page, "By category")
    assert re.findall(r"<tr><th>(\w+)</th><th>(\w+)</th>", table) == [("Category", "Prompts"), ("Reward", "Prompts")]
    assert "<td>All prompts</td><td>400</td>" in table and "<td>color</td><td>100</td>" in table


def test_a_best_evaluation_before_the_last_one_has_its_own_column(tmp_path):
    run = make_run(tmp_path / "run", iterations=20)
    with (run / "eval.jsonl").open("a") as file:
        file.write(json.dumps(evaluation(30, 0.1)) + "\n")
    table = section(write_report(run).read_text(), "By category")
    assert re.findall(r"<th>(\w[\w ]*)<br><small>iteration (\d+)", table)[:3] == [
        ("First", "0"),
        ("Best", "20"),
        ("Last", "30"),
    ]


def test_alarms_are_listed_with_the_iterations_in_which_they_fired(page):
    alarms = section(page, "Alarms")
    assert "<td>ratio</td><td>3</td><td>3</td><td>3–5</td>" in alarms
    assert "reward_collapse" not in alarms


def test_the_filmstrip_is_in_order_and_no_longer_than_eight_grids(tmp_path):
    run = make_run(tmp_path / "run", iterations=24, every=1)
    strip = section(write_report(run).read_text(), "Pictures during training")
    shown = [int(i) for i in re.findall(r"<figcaption>Iteration (\d+)", strip)]
    assert shown == [0, 3, 7, 10, 14, 17, 21, 24]
    assert "8 of 25 grids" in strip


def test_shares_of_time_add_up_to_the_total(page):
    shares = [float(share) for share in re.findall(r"<td>([\d.]+)\s%</td>", section(page, "Time"))]
    assert len(shares) == 6 and shares[-1] == 100
    assert sum(shares[:-1]) == pytest.approx(100, abs=0.3)


def test_every_second_is_counted_once_and_those_of_evaluations_too(page):
    rows = re.findall(r"<td>(?:<b>)?([A-Z][\w ]+)(?:</b>)?</td><td>([^<]+)</td><td>([\d.]+)</td>", section(page, "Time"))
    times, per_iteration = ({row[0]: row[i] for row in rows} for i in (1, 2))
    assert list(times) == ["Rollout", "Waiting for rewards", "Update", "Evaluation", "Other", "Total"]
    assert times["Waiting for rewards"] == "1\u00a0min\u00a012\u00a0s"  # 60 x 1.2 s
    assert times["Evaluation"] == "1\u00a0min\u00a03\u00a0s"  # 7 of 9 s
    assert times["Other"] == "42.0\u00a0s"  # 60 x 0.7 s
    parts = [float(per_iteration[name]) for name in list(times)[:-1]]
    assert float(per_iteration["Total"]) == pytest.approx(sum(parts), abs=0.005)


@pytest.mark.parametrize(
    "seconds, text",
    [
        (9, "9.0 s"),
        (59.4, "59.4 s"),
        (59.97, "1 min 0 s"),
        (200.4, "3 min 20 s"),
        (7529, "2 h 5 min"),
        (math.nan, "not recorded"),
    ],
)
def test_a_length_of_time_has_its_two_largest_units(seconds, text):
    assert duration(seconds).replace("\u00a0", " ") == text


def test_the_wall_time_is_that_of_the_latest_row(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"iteration": 1, "seconds": 41}\n{"iteration": 2, "seconds": 82}\n')
    assert "1\u00a0min\u00a022\u00a0s" in write_report(tmp_path).read_text()
    (tmp_path / "eval.jsonl").write_text('{"iteration": 0, "seconds": 2}\n{"iteration": 2, "seconds": 84.5}\n')
    assert "1\u00a0min\u00a024\u00a0s" in write_report(tmp_path).read_text()


def test_values_that_are_not_finite_are_left_out_and_counted(page):
    assert "1 of 60 values are missing" in section(page, "Policy health")
    assert not re.search(r"\bnan\b", re.sub(r"data:[^\"]+", "", page), re.I)


def test_a_run_without_a_finite_number_still_makes_a_page(tmp_path):
    rows = [{"iteration": i, "reward/mean": None, "policy/ratio_max_dev": 0.0, "time/iteration": None} for i in (1, 2)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    null = {"mean": None, "stderr": None, "n": 0}
    (tmp_path / "eval.jsonl").write_text(json.dumps({"iteration": 0, "score": null, "rewards": None}) + "\n")
    page = write_report(tmp_path).read_text()
    assert "No reward/mean in metrics.jsonl yet." in page
    assert "No evaluation has a finite score." in page


def test_a_run_that_has_only_begun_says_what_is_missing(tmp_path):
    (tmp_path / "config.yaml").write_text("algorithm: loop\niterations: 60\n")
    page = write_report(tmp_path).read_text()
    for text in (
        "no evaluation yet",
        "0 of 60",
        "status unknown",
        "No samples/before_after.png",
        "No sample grids in samples/ yet.",
        "No alarms in metrics.jsonl yet.",
        "No policy/clipfrac in metrics.jsonl yet.",
        "No phase times in metrics.jsonl yet.",
        "Not recorded in run.json.",
    ):
        assert text in page


def test_a_run_in_progress_with_one_evaluation_and_a_torn_row_makes_a_page(tmp_path):
    run = make_run(tmp_path / "run", iterations=3)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"iteration": 4, "rew')
    (run / "config.yaml").unlink()
    (run / "run.json").write_text('{"status": "running", "mess')
    (run / "samples" / "000000.json").unlink()
    (run / "samples" / "000000.png").write_bytes(b"\x89PNG cut short")
    page = write_report(run).read_text()
    assert "the only evaluation so far" in page
    assert "No config.yaml." in page
    assert "000000.png cannot be read as a picture." in page


def test_evaluations_without_categories_still_have_their_overall_row(tmp_path):
    row = {**evaluation(0, 0.5), "categories": {}, "rewards": {}}
    (tmp_path / "eval.jsonl").write_text(json.dumps(row) + "\n")
    table = section(write_report(tmp_path).read_text(), "By category")
    assert "All prompts" in table and "no categories" in table


def test_the_message_of_a_failed_run_is_shown(tmp_path):
    info = {"status": "failed", "message": f"reward shapes returned NaN for {INJECTION}"}
    (tmp_path / "run.json").write_text(json.dumps(info))
    page = write_report(tmp_path).read_text()
    assert 'class="status failed"' in page
    assert "reward shapes returned NaN for &lt;script&gt;" in page


@pytest.mark.parametrize("name", ["empty", "absent"])
def test_a_folder_that_is_no_run_is_refused_in_one_line(tmp_path, name):
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=f"{name} is not a run folder") as caught:
        write_report(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_writing_twice_replaces_the_page_and_leaves_no_temporary_file(tmp_path):
    (tmp_path / "samples").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "samples" / "notes.png")  # not a grid
    (tmp_path / "run.json").write_text('{"status": "running"}')
    first = write_report(tmp_path)
    assert 'class="status running"' in first.read_text()
    (tmp_path / "run.json").write_text('{"status": "finished"}')
    assert write_report(tmp_path) == first
    assert 'class="status finished"' in first.read_text() and 'class="status running"' not in first.read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "run.json", "samples"]
