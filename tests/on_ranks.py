"""Runs on several CPU ranks for the tests.

`launch` goes through DeepSpeed's launcher, which takes 20 seconds to import everything in each of its processes. `start` forks
ranks, with a launcher's variables, from a server that has imported it once: all but the launcher itself is the same.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import socket
import subprocess
import sys
import time
from multiprocessing import forkserver
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
needs_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="ranks would take the GPUs; tests/gpu has those")

FEW = {"every": 9, "images_per_prompt": 1, "grid": 1, "prompts": {"source": "animals", "limit": 1}}
ON_RANKS = {  # a run of two iterations, but for its model
    "prompts": {"source": "animals"},
    "rewards": [{"name": "jpeg_incompressibility"}],
    "eval": FEW,
    "sampling": {"steps": 2, "guidance_scale": 2.0},
    "prompts_per_step": 3,
    "images_per_prompt": 2,
    "memory": {"rollout_batch": 6, "update_batch": 3, "vae_batch": 4},
    "optimizer": {"lr": 1e-2},
    "clip_range": 1e-2,
    "tracking": {"tensorboard": False},
    "checkpoint": {"every": 1, "keep": 9},
    "iterations": 2,
}
SHARED = ("sampling", "prompts_per_step", "images_per_prompt", "memory", "optimizer", "clip_range", "checkpoint")


def zero(stage: int, **keys) -> dict:
    return {"engine": {"name": "deepspeed", "zero_stage": stage, **keys}}


def contrast(images, prompts, metadata):
    """A reward that rounding moves little: a JPEG's size jumps by a byte."""
    return images.astype(float).std((1, 2, 3))


# --- through the launcher ---------------------------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def command(ranks: int, *args) -> list[str]:
    launcher = str(Path(sys.executable).parent / "deepspeed")
    return [launcher, "--num_accelerators", str(ranks), "--master_port", str(free_port()), *map(str, args)]


def environment() -> dict[str, str]:
    # PYTHONPATH: for the rewards of these tests. Interpreted kernels are for the tests of kernels
    own = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "tests")}
    return {**{k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}, **own}


def launch(ranks: int, *args, code: int = 0, timeout: float = 550) -> subprocess.CompletedProcess:
    start = command(ranks, *args)
    done = subprocess.run(start, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=timeout)
    assert done.returncode == code, done.stdout[-3000:] + done.stderr[-3000:]
    assert_nothing_shared_is_left(start[start.index("--master_port") + 1])
    return done


def assert_nothing_shared_is_left(port: str) -> None:
    assert not list(Path("/dev/shm").glob(f"deepspeed_*_{port}_*"))  # which DeepSpeed leaves behind


# --- forked -----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def environment_of_ranks():
    before, own = dict(os.environ), environment()
    os.environ.clear()
    os.environ.update(own)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _rank(variables: dict[str, str], log: str, name: str, args: tuple) -> None:
    import rank_process  # which the server has imported; here it would take as long as a launch

    rank_process.run(variables, log, getattr(rank_process, name), *args)


class Ranks:
    """Started ranks, each with a function of `rank_process`: ``processes``, and what each has ``said`` as (output, errors)."""

    def __init__(self, number: int, folder: Path, function: str, *args) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["rank_process", "on_ranks"])
        with environment_of_ranks():
            forkserver.ensure_running()
        self.port, self.logs, self.processes = str(free_port()), [], []
        folder.mkdir(parents=True, exist_ok=True)
        for rank in range(number):
            variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": number, "MASTER_ADDR": "127.0.0.1"}
            variables = {name: str(value) for name, value in variables.items()} | {"MASTER_PORT": self.port}
            if number == 1:
                variables = {}
            self.logs.append(folder / f"rank-{rank}-{self.port}")
            process = context.Process(target=_rank, args=(variables, str(self.logs[-1]), function, args))
            process.start()
            self.processes.append(process)

    def said(self) -> list[tuple[str, str]]:
        return [tuple(log.with_name(f"{log.name}.{end}").read_text() for end in ("out", "err")) for log in self.logs]

    def wait(self, timeout: float = 280) -> list[int]:
        """The exit codes; whoever takes longer than the seconds is killed."""
        until = time.monotonic() + timeout
        for process in self.processes:
            process.join(max(0.0, until - time.monotonic()))
        late = [process.kill() for process in self.processes if process.is_alive()]
        assert not late, self.said()
        return [process.exitcode for process in self.processes]


def start(ranks: int, folder: Path, *args) -> Ranks:
    """Ranks that run a script with arguments. Their output goes to files in the folder."""
    return Ranks(ranks, folder, "run_script", *map(str, args))


def train_all(folder: Path, ranks: int, configs: list[dict]) -> None:
    """Trains them one after the other on as many ranks: see `rank_process.train_all`."""
    started = Ranks(ranks, folder, "train_all", configs)
    assert started.wait(1100) == [0] * ranks, started.said()
    assert_nothing_shared_is_left(started.port)
