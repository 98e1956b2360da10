"""Runs as launchers start them: through DeepSpeed's, in Slurm's way, alone; killed, stopped, failing and refused."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml
from on_ranks import ROOT, command, environment, launch, needs_cpu, start, train_all, zero
from run_files import distance, equal, metrics, weights

from fastloop.recipes import load_config
from fastloop.trainer import Trainer

pytestmark = [needs_cpu, pytest.mark.timeout(600)]

SHORT = [
    "prompts_per_step=3",
    "images_per_prompt=2",
    "sampling.steps=4",
    "iterations=2",
    "checkpoint.every=1",
    "checkpoint.keep=99",
    "eval.prompts.limit=2",
    "eval.images_per_prompt=1",
    "eval.grid=2",
    "memory.rollout_batch=2",
    "tracking.tensorboard=false",
]
LONG = 9  # iterations of a run that is interrupted


def bundled(folder: Path, *more: str) -> list[str]:
    """What is typed after `deepspeed` or `python`."""
    return ["fastloop/train.py", "--config", "configs/shapes_loop.yaml", *SHORT, f"output_dir={folder}", *more]


def on_zero(stage: int) -> list[str]:
    return ["engine.name=deepspeed", f"engine.zero_stage={stage}"]


@pytest.fixture(scope="session")
def bundled_alone(tmp_path_factory) -> Path:
    """The bundled model on the plain engine, in this process."""
    _, _, file, *overrides = bundled(tmp_path_factory.mktemp("bundled") / "run")
    return Trainer(load_config(ROOT / file, overrides), leave_out=("report",)).train()


def assert_as_alone(folder: Path, alone: Path) -> None:
    assert distance(weights(folder), weights(alone), weights(alone, 0)) < 1e-3


# --- the bundled model ------------------------------------------------------------------------------------------------


def test_the_command_of_the_readme_trains_and_one_rank_speaks(bundled_alone, tmp_path):
    done = launch(2, *bundled(tmp_path / "run", *on_zero(2)))
    assert done.stdout.count("held-out score") == 3 and done.stdout.count("[2/2] reward") == 1
    assert "Traceback" not in done.stdout + done.stderr
    assert_as_alone(tmp_path / "run", bundled_alone)
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert run["status"] == "finished" and run["machine"]["ranks"] == 2


def test_every_stage_trains_the_bundled_model(bundled_alone, tmp_path):
    folders = {stage: tmp_path / str(stage) for stage in (0, 1, 3)}  # 2 is above
    configs = [load_config(ROOT / "configs/shapes_loop.yaml", bundled(folders[n], *on_zero(n))[3:]) for n in folders]
    train_all(tmp_path, 2, [config.model_dump(mode="json") for config in configs])
    for folder in folders.values():
        assert_as_alone(folder, bundled_alone)


def test_two_machines_without_ssh_make_one_run(bundled_alone, tmp_path):
    """Two launchers, as on two machines, each with the hostfile and its number."""
    hosts = tmp_path / "hosts"
    hosts.write_text("first slots=1\nsecond slots=1\n")
    launcher, *_, port = command(1)
    begin = [launcher, "--hostfile", str(hosts), "--no_ssh", "--master_addr", "127.0.0.1", "--master_port", port]
    machines = [
        subprocess.Popen(
            [*begin, "--node_rank", str(number), *bundled(tmp_path / "run", *on_zero(2))],
            cwd=ROOT,
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for number in range(2)
    ]
    said = [machine.communicate(timeout=300)[0] for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], said
    assert [text.count("[2/2] reward") for text in said] == [1, 0]
    assert_as_alone(tmp_path / "run", bundled_alone)


@pytest.mark.parametrize("ranks", [1, 2])
def test_one_process_needs_no_launcher_and_several_only_the_variables_that_slurm_can_set(bundled_alone, tmp_path, ranks):
    started = start(ranks, tmp_path, *bundled(tmp_path / "run", *on_zero(2)))
    assert started.wait() == [0] * ranks, started.said()
    assert_as_alone(tmp_path / "run", bundled_alone)


# --- a smaller one, interrupted ---------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def recipe(tiny_sd, tmp_path_factory) -> Path:
    """A file with the smallest run on several ranks that can be interrupted."""
    values = {
        "model": {"path": tiny_sd, "lora": {"rank": 2}},
        "prompts": {"source": "animals"},
        "rewards": [{"name": "on_ranks:contrast"}],
        "eval": {"every": 99, "prompts": {"source": "animals", "limit": 2}, "images_per_prompt": 1, "grid": 2},
        "sampling": {"steps": 3, "guidance_scale": 1.0},
        "prompts_per_step": 2,
        "images_per_prompt": 2,
        "memory": {"rollout_batch": 2, "update_batch": 6, "vae_batch": 2},
        "tracking": {"tensorboard": False},
        "checkpoint": {"every": 1, "keep": 99},
        "iterations": LONG,
    }
    file = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    file.write_text(yaml.safe_dump(values | zero(2)))
    return file


def typed(recipe: Path, folder: Path, *more: str) -> list[str]:
    return ["fastloop/train.py", "--config", str(recipe), f"output_dir={folder}", "--resume", *more]


@pytest.fixture(scope="session")
def unbroken(recipe, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("unbroken")
    train_all(folder, 2, [load_config(recipe, [f"output_dir={folder / 'run'}"]).model_dump(mode="json")])
    return folder / "run"


def wait_for(line: str, log: Path, alive) -> None:
    """Until a line of its output begins so."""
    until = time.monotonic() + 120
    while not (log.exists() and any(text.startswith(line) for text in log.read_text().splitlines())):
        assert alive() and time.monotonic() < until, log.read_text()[-3000:] if log.exists() else "nothing said"
        time.sleep(0.02)


def launch_and_wait(log: Path, line: str, *args) -> subprocess.Popen:
    """A launcher in the background, once it has said the line."""
    with log.open("w") as out:
        process = subprocess.Popen(
            command(2, *args), cwd=ROOT, env=environment(), stdout=out, stderr=subprocess.STDOUT, start_new_session=True
        )
    wait_for(line, log, lambda: process.poll() is None)
    return process


def ranks_of(process: subprocess.Popen) -> list[psutil.Process]:
    found = [child for child in psutil.Process(process.pid).children(recursive=True) if "--local_rank" in str(child.cmdline())]
    return sorted(found, key=lambda child: child.environ()["RANK"])


def assert_goes_on_as(unbroken: Path, folder: Path, args: list[str]) -> None:
    started = start(2, folder.parent, *args)
    assert started.wait() == [0, 0], started.said()
    assert equal(weights(folder, LONG), weights(unbroken, LONG))
    assert [row["iteration"] for row in metrics(folder)] == list(range(1, LONG + 1))


def test_killed_by_sigkill_of_a_rank_and_resumed_it_equals_the_unbroken_run(recipe, unbroken, tmp_path):
    folder = tmp_path / "run"
    process = launch_and_wait(tmp_path / "log.txt", "[3/", *typed(recipe, folder))
    ranks_of(process)[1].send_signal(signal.SIGKILL)
    assert process.wait(60) != 0
    assert weights(folder, 2)  # whole checkpoints are left
    assert not (folder / "checkpoints" / f"iteration-{LONG:06d}").exists()
    assert_goes_on_as(unbroken, folder, typed(recipe, folder))


@pytest.mark.parametrize("whom", ["launcher", "rank"])
def test_stopped_by_sigterm_it_saves_and_resumed_it_equals_the_unbroken_run(recipe, unbroken, tmp_path, whom):
    folder = tmp_path / "run"
    args = typed(recipe, folder, "checkpoint.every=99")
    if whom == "launcher":
        process = launch_and_wait(tmp_path / "log.txt", "[2/", *args)
        ranks_of(process)[0].parent().send_signal(signal.SIGTERM)
        assert process.wait(60) != 0
    else:
        started = start(2, tmp_path, *args)
        wait_for("[2/", started.logs[0].with_name(f"{started.logs[0].name}.out"), started.processes[0].is_alive)
        os.kill(started.processes[1].pid, signal.SIGTERM)
        assert all(code != 0 for code in started.wait(60))
    run = json.loads((folder / "run.json").read_text())
    assert run["status"] == "stopped" and re.fullmatch(r"stopped by SIGTERM after iteration [2-8]", run["message"])
    assert weights(folder, int(run["message"].split()[-1]))
    assert_goes_on_as(unbroken, folder, args)


# --- failing and refused ----------------------------------------------------------------------------------------------


def fails_on_the_second_rank(images, prompts, metadata):
    """A reward of these tests."""
    if os.environ["RANK"] == "1":
        raise ConnectionError("the judge is away")
    return images.mean((1, 2, 3))


def lines_of_fastloop(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("fastloop:")]


def test_a_failure_on_one_rank_ends_all_with_its_own_message(recipe, tmp_path):
    name = "test_launchers:fails_on_the_second_rank"
    started = time.monotonic()
    done = launch(2, *typed(recipe, tmp_path / "run", f'rewards=[{{name: "{name}"}}]'), code=1)
    assert time.monotonic() - started < 90
    assert "Traceback" not in done.stderr
    message = rf"rank 1: reward {name} failed for the prompt '.*': ConnectionError: the judge is away"
    (said,) = lines_of_fastloop(done.stderr)
    assert re.fullmatch(f"fastloop: {message}", said)
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert run["status"] == "failed" and re.search(message, run["message"])


@pytest.mark.parametrize(
    "override, says",
    [
        (
            "model.path=/nowhere",
            "model.path: no folder or file /nowhere: give a diffusers folder, a .safetensors or .ckpt file, a hub id "
            "OWNER/NAME, or assets:shapes",
        ),
        ("engine={name: torch}", "engine.name: torch is for one process, the launcher started 2: set it to deepspeed"),
    ],
)
def test_what_is_refused_is_one_line_of_one_rank_with_code_2(recipe, tmp_path, override, says):
    started = start(2, tmp_path, *typed(recipe, tmp_path / "run", override))
    assert started.wait() == [2, 2]
    errors = "".join(err for _, err in started.said())
    assert lines_of_fastloop(errors) == [f"fastloop: {says}"] and "Traceback" not in errors
    assert not (tmp_path / "run").exists()


def test_ranks_leave_with_exit_code_0_whenever_they_look_for_failures(tmp_path):
    """Looking without pause, so that Python would end in the middle of a look, and left as train.py leaves."""
    lines = ["from fastloop import ranks, train", "ranks._POLL = 0.0", "with ranks.Ranks.join() as joined:"]
    lines += ["    joined.wait()", "train.leave(0)"]
    script = tmp_path / "leave.py"
    script.write_text("\n".join(lines))
    for _ in range(3):
        own = {"WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": command(1)[-1]}
        variables = [environment() | own | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(3)]
        ranks = [subprocess.Popen([sys.executable, str(script)], cwd=ROOT, env=env) for env in variables]
        assert [rank.wait(120) for rank in ranks] == [0, 0, 0]
