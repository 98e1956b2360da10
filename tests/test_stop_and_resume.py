"""One run, straight, killed, stopped by signals and by a reward that fails: however it ends, it goes on to the same bits."""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from on_ranks import Ranks, start
from PIL import Image
from run_files import checkpoints, metrics, status
from safetensors.torch import load_file

import fastloop
from fastloop.checkpoints import load_checkpoint
from fastloop.cli import main
from fastloop.config import Config
from fastloop.prompts import ANIMALS
from fastloop.recipes import dump_config, load_config, parse_config
from fastloop.stopping import Stopped
from fastloop.tracking import read_rows
from fastloop.trainer import Trainer

Weights = dict[str, torch.Tensor]


def recipe(model: str, folder: Path, **overrides) -> Config:
    """A run of three iterations of a second."""
    values = {
        "model": {"path": model, "lora": {"rank": 2}},
        "prompts": {"source": "animals"},
        "rewards": [{"name": "jpeg_incompressibility"}],
        "eval": {"every": 2, "prompts": {"source": "animals", "limit": 3}, "images_per_prompt": 2, "grid": 2},
        "sampling": {"steps": 4, "guidance_scale": 2.0},
        "prompts_per_step": 3,
        "images_per_prompt": 2,
        "memory": {"rollout_batch": 4, "update_batch": 4, "vae_batch": 4},
        "optimizer": {"lr": 1e-2},
        "clip_range": 1e-2,
        "tracking": {"tensorboard": False},
        "checkpoint": {"every": 1},
        "iterations": 3,
        "output_dir": str(folder),
    }
    return parse_config(values | overrides, "test")


@pytest.fixture(scope="module")
def straight(tiny_sd, tmp_path_factory) -> Trainer:
    """A run that nothing interrupted."""
    trainer = Trainer(recipe(tiny_sd, tmp_path_factory.mktemp("straight") / "run"))
    trainer.train()
    return trainer


def final(folder: Path) -> tuple[Weights, Weights | None, dict]:
    """The newest checkpoint, without its time."""
    averaged = load_config(folder / "config.yaml").ema.decay is not None
    values, average, state = load_checkpoint(sorted((folder / "checkpoints").iterdir())[-1], averaged)
    del state["seconds"]
    return values, average, state


def without_times(path: Path) -> list[dict]:
    timed = ("seconds", "time/")
    return [{key: value for key, value in row.items() if not key.startswith(timed)} for row in read_rows(path)]


def equal(one, other) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    return one == other


def assert_same_run(folder: Path, other: Path) -> None:
    """Two finished runs with the same weights, states, rows, pictures and exports, bit for bit."""
    assert status(folder) == status(other) == "finished"
    for one, two, what in zip(final(folder), final(other), ("weights", "average", "state"), strict=True):
        assert equal(one, two), what
    for name in ("metrics.jsonl", "eval.jsonl"):
        assert without_times(folder / name) == without_times(other / name), name
    names = sorted(path.name for path in (folder / "samples").iterdir())
    assert names == sorted(path.name for path in (other / "samples").iterdir())
    for name in names:
        assert (folder / "samples" / name).read_bytes() == (other / "samples" / name).read_bytes(), name
    assert equal(*(load_file(run / "export" / "pytorch_lora_weights.safetensors") for run in (folder, other)))


@pytest.fixture
def start_training():
    """A function that starts `fastloop train` in a process of its own and waits until an iteration has been logged."""
    started = []

    def start_training(config: Config, *, until: int) -> Ranks:
        folder = Path(config.output_dir)
        (folder.parent / "run.yaml").write_text(dump_config(config))
        process = start(1, folder.parent, Path(fastloop.__file__).parent / "cli.py", "train", folder.parent / "run.yaml")
        started.append(process)
        rows, deadline = folder / "metrics.jsonl", time.monotonic() + 200
        while not (rows.exists() and rows.read_bytes().count(b"\n") >= until):
            assert process.processes[0].is_alive() and time.monotonic() < deadline, process.said()
            time.sleep(0.002)
        return process

    yield start_training
    for process in started:
        process.processes[0].kill()


def signal_and_wait(process: Ranks, number: int) -> int:
    os.kill(process.processes[0].pid, number)
    return process.wait(120)[0]


def test_a_run_leaves_everything_in_its_folder(straight):
    folder, config = straight.folder, straight.config
    assert load_config(folder / "config.yaml") == config
    facts = json.loads((folder / "run.json").read_text())
    assert facts["status"] == "finished" and facts["message"] is None and facts["finished"] >= facts["started"]
    assert facts["machine"] and facts["versions"]["torch"] == torch.__version__
    rows, evals = metrics(folder), read_rows(folder / "eval.jsonl")
    assert [(row["iteration"], row["images"]) for row in rows] == [(1, 6), (2, 12), (3, 18)]
    assert [(row["iteration"], row["images"]) for row in evals] == [(0, 0), (2, 12), (3, 18)]
    assert all(math.isfinite(value) for row in rows for value in row.values())
    seconds = [row["seconds"] for row in rows]
    assert seconds == sorted(seconds) and seconds[0] > 0
    for row in rows:
        parts = sum(row[f"time/{part}"] for part in ("rollout", "reward_wait", "update"))
        assert row["time/iteration"] == pytest.approx(parts)
    assert checkpoints(folder) == ["iteration-000002", "iteration-000003"]  # checkpoint.keep
    assert (folder / "export" / "pytorch_lora_weights.safetensors").exists()
    assert equal(final(folder)[0], {name: p.detach() for name, p in straight.parameters.items()})
    page = (folder / "report.html").read_text()
    assert "<html" in page and "jpeg_incompressibility" in page
    names = {f"{n:06d}{end}" for n in (0, 2, 3) for end in (".json", ".png", "_00.png", "_01.png")}
    assert {path.name for path in (folder / "samples").iterdir()} == names | {"before_after.png"}


def test_sample_files_show_the_held_out_prompts_with_their_rewards(straight):
    folder = straight.folder / "samples"
    for row in json.loads((folder / "000003.json").read_text()):
        image = np.array(Image.open(folder / row["file"]))
        assert image.shape == (16, 16, 3) and row["prompt"] in ANIMALS[:3]
        assert row["reward"] == straight.eval_rewards.terms["jpeg_incompressibility"].reward(image[None], [""], [{}])[0]


def test_the_policy_that_is_trained_is_the_policy_that_sampled(straight):
    rows = metrics(straight.folder)
    assert [row.get("policy/replay_max_dev") for row in rows] == [0.0, None, None]  # exactly one, before the first update
    assert max(row["policy/ratio_first_dev"] for row in rows) < 1e-6  # in other batches than the rollout's
    assert all(row["policy/ratio_max_dev"] > 1e-4 for row in rows)  # after it


def test_a_killed_run_goes_on_to_the_same_weights_bit_for_bit(straight, start_training, tmp_path, no_report):
    config = recipe(straight.config.model.path, tmp_path / "run")
    assert signal_and_wait(start_training(config, until=1), signal.SIGKILL) == -signal.SIGKILL
    assert status(tmp_path / "run") == "running" and len(metrics(tmp_path / "run")) < 3
    assert main(["train", str(tmp_path / "run.yaml"), "--resume"]) == 0
    assert_same_run(tmp_path / "run", straight.folder)


def test_a_killed_run_does_iterations_since_its_checkpoint_again_with_every_state(
    tiny_sd, start_training, tmp_path, no_report
):
    overrides = {
        "algorithm": "ppo",
        "ema": {"decay": 0.9},
        "kl": {"weight": 1.0},
        "optimizer": {"lr": 1e-2, "schedule": "linear"},
        "prompts": {"source": "animals", "limit": 2},
        "prompts_per_step": 2,
        "images_per_prompt": 8,  # after two iterations each prompt has the 16 rewards from which its history counts
        "sampling": {"steps": 3, "guidance_scale": 1.0},
        "checkpoint": {"every": 2},
        "iterations": 4,
    }
    process = start_training(recipe(tiny_sd, tmp_path / "run", **overrides), until=3)
    assert signal_and_wait(process, signal.SIGKILL) == -signal.SIGKILL
    Trainer(recipe(tiny_sd, tmp_path / "unbroken", **overrides)).train()
    # a kill just then leaves half a checkpoint and half a row
    (tmp_path / "run" / "checkpoints" / ".writing-4-1").mkdir(exist_ok=True)
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"iteration": 4, "ima')
    assert checkpoints(tmp_path / "run")[-1] == "iteration-000002" and status(tmp_path / "run") == "running"
    torch.manual_seed(99)  # what this process did before must not matter
    resumed = Trainer(recipe(tiny_sd, tmp_path / "run", **overrides), resume=True)
    assert resumed.iteration == 2 and [row["iteration"] for row in metrics(resumed.folder)] == [1, 2]
    resumed.train()
    assert_same_run(tmp_path / "run", tmp_path / "unbroken")
    assert [row["policy/lr"] for row in metrics(resumed.folder)] == pytest.approx([1e-2, 7.5e-3, 5e-3, 2.5e-3])
    _, average, state = final(tmp_path / "run")
    assert average is not None and {len(history) for history in state["prompt_tracker"].values()} == {32}
    assert checkpoints(tmp_path / "run") == ["iteration-000002", "iteration-000004"]


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_stops_the_run_with_a_checkpoint_and_it_goes_on(straight, start_training, tmp_path, no_report, number, code):
    config = recipe(straight.config.model.path, tmp_path / "run")
    assert signal_and_wait(start_training(config, until=1), number) == code
    facts = json.loads((tmp_path / "run" / "run.json").read_text())
    done = len(metrics(tmp_path / "run"))
    assert facts["status"] == "stopped" and facts["message"] == f"stopped by {number.name} after iteration {done}"
    assert checkpoints(tmp_path / "run")[-1] == f"iteration-{done:06d}" and 1 <= done < 3
    assert (tmp_path / "run" / "report.html").exists()
    assert main(["train", str(tmp_path / "run.yaml"), "--resume"]) == 0
    assert_same_run(tmp_path / "run", straight.folder)


@pytest.mark.parametrize("part, left_after", [("rollout", 1), ("update", 2), ("first evaluation", 0), ("evaluation", 2)])
def test_wherever_a_signal_comes_the_run_leaves_a_whole_state(straight, tmp_path, no_report, part, left_after):
    config = recipe(straight.config.model.path, tmp_path / "run", checkpoint={"every": 3})
    trainer = Trainer(config)
    owner, name, iteration = {
        "rollout": (trainer.rewards, "submit", 1),  # after its first batch
        "update": (trainer.engine, "set_lr", 1),  # as it begins
        "first evaluation": (trainer.eval_rewards, "submit", 0),
        "evaluation": (trainer.eval_rewards, "submit", 2),
    }[part]
    real = getattr(owner, name)

    def interrupted(*args):
        if trainer.iteration == iteration:
            signal.raise_signal(signal.SIGINT)
        return real(*args)

    setattr(owner, name, interrupted)
    with pytest.raises(Stopped, match=f"stopped by SIGINT after iteration {left_after}"):
        trainer.train()
    assert checkpoints(trainer.folder)[-1] == f"iteration-{left_after:06d}" and status(trainer.folder) == "stopped"
    assert [row["iteration"] for row in metrics(trainer.folder)] == list(range(1, left_after + 1))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    Trainer(config, resume=True).train()
    assert_same_run(trainer.folder, straight.folder)


def test_a_second_interrupt_leaves_at_once_without_a_checkpoint(tiny_sd, tmp_path, no_report):
    trainer = Trainer(recipe(tiny_sd, tmp_path / "run", checkpoint={"every": 2}))

    def interrupted(lr: float) -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    trainer.engine.set_lr = interrupted
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert status(trainer.folder) == "failed" and checkpoints(trainer.folder) == ["iteration-000000"]
    assert metrics(trainer.folder) == []


def test_resuming_a_finished_run_changes_nothing_and_more_iterations_go_on(straight, tmp_path, no_report):
    shorter = recipe(straight.config.model.path, tmp_path / "run", iterations=2)
    Trainer(shorter).train()
    before = final(tmp_path / "run"), without_times(tmp_path / "run" / "metrics.jsonl")
    again = Trainer(shorter, resume=True)
    again.train()
    assert again.iteration == 2 and status(tmp_path / "run") == "finished"
    assert equal(before[0], final(tmp_path / "run")) and before[1] == without_times(tmp_path / "run" / "metrics.jsonl")
    assert [row["iteration"] for row in read_rows(tmp_path / "run" / "eval.jsonl")] == [0, 2]
    longer = Trainer(recipe(straight.config.model.path, tmp_path / "run"), resume=True)
    longer.train()
    assert_same_run(tmp_path / "run", straight.folder)
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["iterations"] == 3


REWARD = """
from fastloop.rewards.jpeg import Incompressibility

mode, calls = "healthy", 0
kilobytes = Incompressibility()

def reward(images, prompts, metadata):
    global calls
    calls += 1
    values = kilobytes(images, prompts, metadata)
    if calls >= 3 and mode == "raises":
        raise OSError("the server is away")
    if calls == 3 and mode == "nan":
        values[1] = float("nan")
    return values
"""


@pytest.fixture
def reward_module(tmp_path, monkeypatch):
    """A module of the user's own; its `mode` says what happens at its third call, in the second iteration."""
    (tmp_path / "moody_rewards.py").write_text(REWARD)
    monkeypatch.syspath_prepend(tmp_path)
    import moody_rewards

    yield moody_rewards
    del sys.modules["moody_rewards"]


@pytest.mark.parametrize(
    "mode, cause",
    [("raises", "failed for the prompt {!r}: OSError: the server is away"), ("nan", "returned nan for the prompt {!r}")],
)
def test_a_failing_reward_ends_the_run_and_once_healthy_it_goes_on_as_if_nothing_had_been(
    straight, reward_module, tmp_path, no_report, capsys, mode, cause
):
    reward_module.mode = mode
    own = {"name": "moody_rewards:reward"}
    config = recipe(straight.config.model.path, tmp_path / "run", rewards=[own])
    config = config.model_copy(update={"eval": config.eval.model_copy(update={"rewards": straight.config.rewards})})
    (tmp_path / "recipe.yaml").write_text(dump_config(config))
    assert main(["train", str(tmp_path / "recipe.yaml")]) == 1
    prompts = Trainer(recipe(straight.config.model.path, tmp_path / "other")).prompts.draw(3, 3)
    failing = prompts[0].text  # the first two images of the second iteration are of its first prompt
    expected = f"fastloop: reward moody_rewards:reward {cause.format(failing)}\n"
    assert capsys.readouterr().err.endswith(expected)
    assert status(tmp_path / "run") == "failed" and checkpoints(tmp_path / "run")[-1] == "iteration-000001"
    assert [row["iteration"] for row in metrics(tmp_path / "run")] == [1]
    saved = json.loads((tmp_path / "run" / "unscored" / "failure.json").read_text())
    assert saved["reward"] == "moody_rewards:reward" and saved["error"].endswith(cause.format(failing))
    assert [row["prompt"] for row in saved["pictures"]] == [failing]
    assert Image.open(tmp_path / "run" / "unscored" / saved["pictures"][0]["file"]).size == (16, 16)
    reward_module.mode = "healthy"
    assert main(["train", str(tmp_path / "recipe.yaml"), "--resume"]) == 0
    assert equal(final(tmp_path / "run")[0], final(straight.folder)[0])


def test_the_launchers_entry_runs_as_a_script(tiny_sd, tmp_path):
    (tmp_path / "recipe.yaml").write_text(dump_config(recipe(tiny_sd, tmp_path / "other")))
    options = ["--config", tmp_path / "recipe.yaml", "iterations=1", f"output_dir={tmp_path / 'run'}"]
    done = start(1, tmp_path, "fastloop/train.py", *options)
    assert done.wait() == [0], done.said()
    ((out, _),) = done.said()
    assert f"done: {tmp_path / 'run'}" in out.splitlines()
    assert status(tmp_path / "run") == "finished" and len(metrics(tmp_path / "run")) == 1
    assert json.loads((tmp_path / "run" / "run.json").read_text())["command"].startswith("train.py --config ")
    assert not (tmp_path / "other").exists()
