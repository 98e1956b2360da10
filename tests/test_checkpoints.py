"""Checkpoints come back as they were written, and a kill at any instant leaves whole ones."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastloop.checkpoints import (
    check_checkpoint,
    iteration_of,
    list_checkpoints,
    load_checkpoint,
    load_weights,
    remove_leftovers,
    save_checkpoint,
)
from fastloop.errors import UserError

WEIGHTS = {"a.weight": torch.arange(6.0).view(2, 3), "b": torch.tensor([1.5])}
AVERAGE = {name: value + 1 for name, value in WEIGHTS.items()}


def state_of(iteration: int) -> dict:
    return {
        "iteration": iteration,
        "prompt_tracker": {"a cat": [0.5, 0.25], "é": []},
        "engine": {
            "optimizer": {"state": {0: {"exp_avg": torch.full((2,), float(iteration))}}, "param_groups": [{"lr": 1e-3}]}
        },
        "rng": torch.get_rng_state(),
        "rng_cuda": None,
    }


def save(folder: Path, iteration: int, weights=WEIGHTS, ema=None, keep=2) -> Path:
    return save_checkpoint(folder, iteration, weights, ema, state_of(iteration), keep)


def equal(one, two) -> bool:
    """Whether two nested values are the same, tensors bit by bit."""
    if isinstance(one, torch.Tensor):
        return isinstance(two, torch.Tensor) and one.dtype == two.dtype and torch.equal(one, two)
    if isinstance(one, dict):
        return isinstance(two, dict) and list(one) == list(two) and all(equal(one[key], two[key]) for key in one)
    if isinstance(one, list):
        return isinstance(two, list) and len(one) == len(two) and all(map(equal, one, two))
    return type(one) is type(two) and one == two


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# --- writing and reading ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ema", [None, AVERAGE], ids=["weights", "with average"])
def test_a_checkpoint_comes_back_as_it_was_saved(tmp_path, ema):
    path = save(tmp_path / "checkpoints", 12, ema=ema)
    assert path == tmp_path / "checkpoints" / "iteration-000012" and iteration_of(path) == 12
    weights, average, state = load_checkpoint(path, averaged=ema is not None)
    assert equal(dict(sorted(weights.items())), WEIGHTS)
    assert average is None if ema is None else equal(dict(sorted(average.items())), AVERAGE)
    assert equal(state, state_of(12))


def test_parameters_are_saved_whatever_their_layout(tmp_path):
    value = torch.nn.Parameter(torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last))
    weights, _, _ = load_checkpoint(save(tmp_path, 1, {"w": value, "t": torch.arange(6.0).view(2, 3).t()}), averaged=False)
    assert torch.equal(weights["w"], value) and torch.equal(weights["t"], torch.arange(6.0).view(2, 3).t())
    assert not weights["w"].requires_grad


def test_a_checkpoint_does_not_follow_the_weights_once_it_is_written(tmp_path):
    value = torch.zeros(3)
    path = save(tmp_path, 1, {"w": value})
    value += 1
    assert load_checkpoint(path, averaged=False)[0]["w"].tolist() == [0, 0, 0]


def test_the_newest_are_kept_and_they_are_listed_oldest_first(tmp_path):
    for iteration in (0, 2, 10, 100):
        save(tmp_path, iteration, keep=2)
    assert [iteration_of(path) for path in list_checkpoints(tmp_path)] == [10, 100]
    assert names(tmp_path) == ["iteration-000010", "iteration-000100"]
    save(tmp_path, 101, keep=1)
    assert names(tmp_path) == ["iteration-000101"]


def test_a_folder_without_checkpoints_lists_none(tmp_path):
    assert list_checkpoints(tmp_path) == list_checkpoints(tmp_path / "absent") == []


def test_what_is_no_checkpoint_is_neither_listed_nor_removed(tmp_path):
    save(tmp_path, 1)
    shutil.copytree(tmp_path / "iteration-000001", tmp_path / "iteration-000001-backup")
    (tmp_path / "iteration-000002").write_text("a file")
    (tmp_path / "notes").mkdir()
    assert [path.name for path in list_checkpoints(tmp_path)] == ["iteration-000001"]
    save(tmp_path, 3, keep=1)
    assert names(tmp_path) == ["iteration-000001-backup", "iteration-000002", "iteration-000003", "notes"]


def test_saving_an_iteration_again_leaves_it_as_it_is(tmp_path):
    path = save(tmp_path, 5)
    before, times = contents(tmp_path), {file: file.stat().st_mtime_ns for file in path.iterdir()}
    assert save(tmp_path, 5, {"other": torch.ones(1)}, keep=1) == path
    assert contents(tmp_path) == before and {file: file.stat().st_mtime_ns for file in path.iterdir()} == times


# --- kills ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [1, 2])
@pytest.mark.parametrize("when", ["fastloop.checkpoints.save_file", "torch.save", "os.fsync", "os.replace"])
def test_a_kill_while_a_checkpoint_is_written_leaves_the_old_ones_whole(tmp_path, monkeypatch, when, keep):
    for iteration in (1, 2):
        save(tmp_path, iteration, ema=AVERAGE)
    before = contents(tmp_path)

    def killed(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(when, killed)
        with pytest.raises(KeyboardInterrupt):
            save(tmp_path, 3, ema=AVERAGE, keep=keep)
    assert [iteration_of(path) for path in list_checkpoints(tmp_path)] == [1, 2]
    assert [name for name in names(tmp_path) if name.startswith(".writing-")], "the half-written one has another name"
    assert before.items() <= contents(tmp_path).items()
    assert load_checkpoint(list_checkpoints(tmp_path)[-1], averaged=False)[2]["iteration"] == 2

    remove_leftovers(tmp_path)
    assert contents(tmp_path) == before
    save(tmp_path, 3, ema=AVERAGE, keep=keep)
    assert equal(load_checkpoint(list_checkpoints(tmp_path)[-1], averaged=False)[2], state_of(3))


def test_everything_is_on_disk_before_the_checkpoint_has_its_name(tmp_path, monkeypatch):
    events, opened, fsync, open_, replace = [], {}, os.fsync, os.open, os.replace

    def record_open(path, *rest, **more):
        handle = open_(path, *rest, **more)
        opened[handle] = Path(path).name
        return handle

    def record_sync(handle):
        events.append(opened[handle])
        fsync(handle)

    def record_replace(source, target):
        events.append("replace")
        replace(source, target)

    monkeypatch.setattr("os.open", record_open)
    monkeypatch.setattr("os.fsync", record_sync)
    monkeypatch.setattr("os.replace", record_replace)
    save(tmp_path / "checkpoints", 1, ema=AVERAGE)
    *before, renamed, after = events
    assert {"weights.safetensors", "ema.safetensors", "state.pt"} < set(before)
    assert (renamed, after) == ("replace", "checkpoints")


def test_an_old_checkpoint_goes_only_once_the_new_one_is_there(tmp_path, monkeypatch):
    save(tmp_path, 1)

    def killed(path, *_, **__):
        assert iteration_of(list_checkpoints(tmp_path)[-1]) == 2
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("fastloop.checkpoints.shutil.rmtree", lambda path, **rest: None if rest else killed(path))
        with pytest.raises(KeyboardInterrupt):
            save(tmp_path, 2, keep=1)
    assert equal(load_checkpoint(list_checkpoints(tmp_path)[-1], averaged=False)[2], state_of(2))
    assert [iteration_of(found) for found in list_checkpoints(tmp_path)] == [2]  # of the old one no half is taken for it
    remove_leftovers(tmp_path)
    assert names(tmp_path) == ["iteration-000002"]


def test_leftovers_are_removed_and_nothing_else(tmp_path):
    save(tmp_path, 1)
    before = contents(tmp_path)
    (tmp_path / ".writing-2-123").mkdir()
    (tmp_path / ".writing-2-123" / "weights.safetensors").write_bytes(b"half")
    (tmp_path / ".writing-3-4").mkdir()
    remove_leftovers(tmp_path)
    assert names(tmp_path) == ["iteration-000001"] and contents(tmp_path) == before
    remove_leftovers(tmp_path / "absent")


# --- damage -----------------------------------------------------------------------------------------------------------


def cut(name: str, size: int):
    return lambda path: (path / name).write_bytes((path / name).read_bytes()[:size])


class Evil:
    def __reduce__(self):
        return os.mkdir, ("unpickled",)


DAMAGES = {
    "no weights": lambda path: (path / "weights.safetensors").unlink(),
    "no average": lambda path: (path / "ema.safetensors").unlink(),
    "no state": lambda path: (path / "state.pt").unlink(),
    "cut weights": cut("weights.safetensors", 50),
    "empty weights": cut("weights.safetensors", 0),
    "cut average": cut("ema.safetensors", 50),
    "cut state": cut("state.pt", 100),
    "empty state": cut("state.pt", 0),
    "state of zeros": lambda path: (path / "state.pt").write_bytes(bytes(300)),
    "state that is code": lambda path: torch.save({"iteration": Evil()}, path / "state.pt"),
    "nothing at all": shutil.rmtree,
}


@pytest.mark.parametrize("name", ["weights.safetensors", "ema.safetensors", "state.pt"])
@pytest.mark.parametrize("read", [check_checkpoint, load_checkpoint])
def test_a_file_of_another_iteration_is_refused(tmp_path, name, read):
    other, path = (save(tmp_path, iteration, ema=AVERAGE) for iteration in (6, 7))
    shutil.copy(other / name, path / name)
    with pytest.raises(UserError) as caught:
        read(path, averaged=True)
    assert str(caught.value) == (
        f"cannot read the checkpoint {path}: {name} is of iteration 6; remove it to resume from the one before"
    )


def test_weights_that_do_not_say_their_iteration_are_those_of_earlier_versions_and_are_read(tmp_path):
    path = save(tmp_path, 7)
    save_file(load_file(path / "weights.safetensors"), path / "weights.safetensors")
    assert equal(dict(sorted(load_checkpoint(path, averaged=False)[0].items())), WEIGHTS)


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_checkpoint_is_refused_in_one_line_with_its_folder(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    path = save(tmp_path / "checkpoints", 7, ema=AVERAGE)
    DAMAGES[name](path)
    with pytest.raises(UserError) as caught:
        load_checkpoint(path, averaged=True)
    message = str(caught.value)
    assert message.startswith(f"cannot read the checkpoint {path}: ") and "\n" not in message
    assert message.endswith("; remove it to resume from the one before")
    assert names(tmp_path) == ["checkpoints"], "nothing in it was run"


# --- into a model -----------------------------------------------------------------------------------------------------


def parameters(**shapes) -> dict[str, torch.nn.Parameter]:
    return {name: torch.nn.Parameter(torch.zeros(shape)) for name, shape in shapes.items()}


def test_weights_are_copied_into_the_parameters_that_are_there():
    model = parameters(a=(2, 3), b=(1,))
    places = {name: p.data_ptr() for name, p in model.items()}
    weights = {"b": torch.tensor([4.0]), "a": torch.arange(6.0).view(2, 3)}
    load_weights(model, weights)
    assert model["a"].tolist() == [[0, 1, 2], [3, 4, 5]] and model["b"].tolist() == [4]
    assert {name: p.data_ptr() for name, p in model.items()} == places  # the optimizer holds these
    assert all(p.requires_grad for p in model.values())
    weights["b"] += 1
    assert model["b"].tolist() == [4]


@pytest.mark.parametrize(
    "saved, odd",
    [
        ({"a": (2, 3)}, "b (None saved, (1,) here)"),
        ({"a": (2, 3), "b": (1,), "c": (4,)}, "c ((4,) saved, None here)"),
        ({"a": (3, 2), "b": (1,)}, "a ((3, 2) saved, (2, 3) here)"),
        ({"a": (6,), "b": (2,)}, "a ((6,) saved, (2, 3) here)"),
        ({}, "a (None saved, (2, 3) here)"),
    ],
    ids=str,
)
def test_weights_of_another_model_are_refused_and_nothing_is_changed(saved, odd):
    model = parameters(a=(2, 3), b=(1,))
    with pytest.raises(UserError) as caught:
        load_weights(model, {name: torch.ones(shape) for name, shape in saved.items()})
    assert str(caught.value) == (
        f"the checkpoint does not fit the model at {odd}: model.path, model.adapter and model.lora must be as in the run"
    )
    assert not any(p.any() for p in model.values())
