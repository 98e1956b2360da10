"""What a run writes while it trains can be trusted after a kill, a resume and a NaN."""

from __future__ import annotations

import json
import math
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastloop.errors import UserError
from fastloop.tracking import Tracker, read_rows, tracking_packages


def make_tracker(folder: Path, **changes) -> Tracker:
    return Tracker(folder, **{"tensorboard": False, "wandb": None, "config": {"algorithm": "loop"}, **changes})


def evaluation(iteration: int, mean: float) -> dict:
    estimate = {"mean": mean, "stderr": 0.01, "n": 64}
    return {
        "iteration": iteration,
        "images": 64 * iteration,
        "seconds": 2.0 * iteration,
        "score": estimate,
        "rewards": {"shapes": estimate},
        "categories": {"color": estimate},
    }


def scalars(folder: Path, tag: str) -> list[tuple[int, float]]:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator").EventAccumulator(
        str(folder / "tensorboard")
    )
    accumulator.Reload()
    return [(event.step, event.value) for event in accumulator.Scalars(tag)]


class FakeWandb(types.ModuleType):
    """Records what a tracker sends."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.calls, self.rows, self.id, self.finished = [], [], "abc123", 0

    def init(self, **arguments) -> FakeWandb:
        self.calls.append(arguments)
        return self

    def define_metric(self, *_, **__) -> None: ...

    def log(self, row: dict) -> None:
        self.rows.append(row)

    def finish(self) -> None:
        self.finished += 1


def test_every_row_is_on_disk_before_the_tracker_is_closed(tmp_path):
    tracker = make_tracker(tmp_path)
    tracker.log({"iteration": 1, "reward/mean": 0.5})
    tracker.log_eval(evaluation(1, 0.4))
    assert read_rows(tmp_path / "metrics.jsonl") == [{"iteration": 1, "reward/mean": 0.5}]
    assert read_rows(tmp_path / "eval.jsonl") == [evaluation(1, 0.4)]
    tracker.close()


def test_numpy_and_torch_scalars_become_numbers_and_what_is_not_finite_becomes_null(tmp_path):
    torch = pytest.importorskip("torch")
    tracker = make_tracker(tmp_path)
    row = {
        "iteration": np.int64(1),
        "a": np.float32(0.5),
        "b": torch.tensor(2.0),
        "c": math.nan,
        "d": np.float32("inf"),
    }
    tracker.log({**row, "alarm/collapse": True, "note": "text"})
    tracker.close()
    text = (tmp_path / "metrics.jsonl").read_text()
    expected = {"iteration": 1, "a": 0.5, "b": 2.0, "c": None, "d": None, "alarm/collapse": 1, "note": "text"}
    assert json.loads(text, parse_constant=pytest.fail) == expected


def test_reading_leaves_out_a_torn_last_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"iteration": 1}\n{"iteration": 2, "rew')
    assert read_rows(path) == [{"iteration": 1}]
    path.write_bytes(b'{"iteration": 1}\n\x00\x00\x00')  # what a power cut leaves
    assert read_rows(path) == [{"iteration": 1}]


def test_reading_an_absent_file_gives_no_rows(tmp_path):
    assert read_rows(tmp_path / "metrics.jsonl") == []


@pytest.mark.parametrize("bad", ['{"iteration": 2, "rew', "3", "\x00"])
def test_reading_a_corrupt_line_in_the_middle_names_the_line(tmp_path, bad):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"iteration": 1}}\n{bad}\n{{"iteration": 3}}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2: not a JSON row"):
        read_rows(path)


def test_a_resumed_run_has_every_iteration_once_after_a_kill_in_the_middle_of_a_row(tmp_path):
    tracker = make_tracker(tmp_path)
    for iteration in range(1, 6):
        tracker.log({"iteration": iteration, "attempt": 1})
        tracker.log_eval(evaluation(iteration, 0.1))
    tracker.close()
    for name in ("metrics.jsonl", "eval.jsonl"):
        with (tmp_path / name).open("a") as file:
            file.write('{"iteration": 6, "att')

    tracker = make_tracker(tmp_path, resume_iteration=3)
    tracker.log({"iteration": 4, "attempt": 2})
    tracker.log_eval(evaluation(4, 0.2))
    tracker.close()
    rows = read_rows(tmp_path / "metrics.jsonl")
    assert [(row["iteration"], row["attempt"]) for row in rows] == [(1, 1), (2, 1), (3, 1), (4, 2)]
    evals = read_rows(tmp_path / "eval.jsonl")
    assert [(row["iteration"], row["score"]["mean"]) for row in evals] == [(1, 0.1), (2, 0.1), (3, 0.1), (4, 0.2)]
    assert not list(tmp_path.glob("*.tmp"))


def test_a_new_run_does_not_mix_its_rows_into_an_old_one(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"iteration": 1}\n')
    with pytest.raises(FileExistsError, match="resume that run or choose another output_dir"):
        make_tracker(tmp_path)
    make_tracker(tmp_path, resume_iteration=-1).close()
    assert read_rows(tmp_path / "metrics.jsonl") == []


def test_tensorboard_reads_back_the_scalars_of_iterations_and_evaluations(tmp_path):
    pytest.importorskip("tensorboard")
    tracker = make_tracker(tmp_path, tensorboard=True)
    tracker.log_eval(evaluation(0, 0.25))
    tracker.log({"iteration": 1, "reward/mean": 0.5, "note": "text", "missing": None})
    tracker.log({"iteration": 2, "reward/mean": 0.75})
    tracker.log_image("samples", 2, Image.new("RGB", (8, 8)))
    assert scalars(tmp_path, "reward/mean") == [(1, 0.5), (2, 0.75)], "flushed before close, for a run that is killed"
    tracker.close()
    for tag in ("eval/score", "eval/color", "eval/reward/shapes"):
        assert scalars(tmp_path, tag) == [(0, 0.25)]


def test_tensorboard_forgets_what_a_resumed_run_repeats(tmp_path):
    pytest.importorskip("tensorboard")
    tracker = make_tracker(tmp_path, tensorboard=True)
    for iteration in range(1, 6):
        tracker.log({"iteration": iteration, "reward/mean": 1.0})
    tracker.close()
    tracker = make_tracker(tmp_path, tensorboard=True, resume_iteration=3)
    tracker.log({"iteration": 4, "reward/mean": 2.0})
    tracker.close()
    assert scalars(tmp_path, "reward/mean") == [(1, 1.0), (2, 1.0), (3, 1.0), (4, 2.0)]


def test_wandb_gets_every_row_and_a_resumed_run_goes_on_under_its_id(tmp_path, monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    tracker = make_tracker(tmp_path, wandb="my-project")
    tracker.log({"iteration": 1, "reward/mean": 0.5})
    tracker.log_eval(evaluation(1, 0.25))
    tracker.close()
    tracker.close()
    make_tracker(tmp_path, wandb="my-project", resume_iteration=1).close()
    assert fake.rows[0] == {"iteration": 1, "reward/mean": 0.5}
    assert fake.rows[1] == {"iteration": 1, "eval/score": 0.25, "eval/color": 0.25, "eval/reward/shapes": 0.25}
    assert [call["id"] for call in fake.calls] == [None, "abc123"]
    assert fake.calls[0]["project"] == "my-project" and fake.calls[0]["config"] == {"algorithm": "loop"}
    assert fake.finished == 2


def test_wandb_that_cannot_start_is_one_line_and_leaves_no_rows(tmp_path, monkeypatch):
    def init(**_):
        raise RuntimeError("api_key not configured\nmore")

    fake = types.ModuleType("wandb")
    fake.init = init
    monkeypatch.setitem(sys.modules, "wandb", fake)
    with pytest.raises(UserError, match=r"^tracking.wandb: cannot start: api_key not configured; run wandb login"):
        make_tracker(tmp_path, wandb="my-project")
    assert not (tmp_path / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("changes", "module", "message"),
    [
        ({"wandb": "p"}, "wandb", r"tracking\.wandb.*pip install fastloop\[wandb\]"),
        ({"tensorboard": True}, "torch.utils.tensorboard", r"tracking\.tensorboard.*pip install tensorboard"),
    ],
)
def test_a_missing_package_is_named_in_one_line_before_any_file_changes(tmp_path, monkeypatch, changes, module, message):
    (tmp_path / "metrics.jsonl").write_text('{"iteration": 1}\n')
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=message) as caught:
        make_tracker(tmp_path, resume_iteration=0, **changes)
    assert "\n" not in str(caught.value)
    assert read_rows(tmp_path / "metrics.jsonl") == [{"iteration": 1}]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_packages_that_are_not_asked_for_need_not_be_there(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert tracking_packages(tensorboard=False, wandb=None) == (None, None)
    make_tracker(tmp_path).close()
