"""Who calls a reward: threads of this process, or processes of its own. With one of them, one call at a time, in order."""

from __future__ import annotations

import multiprocessing
import queue
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import Any

import numpy as np

from fastloop.errors import RewardFailed, Unscored


class Job:
    """A batch on its way: its result, and when it began and ended on ``time.perf_counter``."""

    def __init__(self, batch: tuple) -> None:
        self.batch = batch
        self.future: Future = Future()
        self.began: float | None = None
        self.ended: float | None = None


class Workers:
    """Calls ``calls[i](images, prompts, metadata)`` each in a thread that never holds up the end of the program.

    ``timeout`` is in seconds for one batch; a call that takes longer is given up, though a thread cannot be ended.
    """

    def __init__(self, label: str, calls: list[Callable[..., np.ndarray]], timeout: float | None) -> None:
        self.label, self.calls, self.timeout = label, calls, timeout
        self._jobs: queue.SimpleQueue = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []

    def submit(self, images: np.ndarray, prompts: list[str], metadata: list[dict]) -> Job:
        job = Job((images, prompts, metadata))
        self._jobs.put(job)
        if not self._threads:
            for call in self.calls:
                thread = threading.Thread(target=self._work, args=(call,), name=f"reward {self.label}", daemon=True)
                self._threads.append(thread)
                thread.start()
        return job

    def result(self, job: Job) -> np.ndarray:
        """Waits for a job; those submitted before it must have been waited for, so that it has begun or is about to.

        Raises:
            RewardFailed: the reward failed, or has taken longer than ``timeout``.
        """
        while not job.future.done():
            left = None
            if self.timeout is not None:
                left = self.timeout - (time.perf_counter() - job.began if job.began is not None else 0)
                if left <= 0:
                    images, prompts, metadata = job.batch
                    raise RewardFailed(
                        f"reward {self.label} has not answered for {self.timeout:g} s (first prompt {prompts[0]!r}): raise "
                        "its timeout, or see what it waits for",
                        Unscored(self.label, images, prompts, metadata),
                    )
            wait([job.future], left)
        return job.future.result()

    def close(self) -> None:
        for call in self.calls:
            self._jobs.put(None)
            if isinstance(call, OwnProcess):
                call.close()

    def _work(self, call: Callable[..., np.ndarray]) -> None:
        while (job := self._jobs.get()) is not None:
            if not job.future.set_running_or_notify_cancel():
                continue
            job.began = time.perf_counter()
            try:
                values = call(*job.batch)
            except BaseException as error:  # a reward may even call sys.exit
                job.ended = time.perf_counter()
                job.future.set_exception(error)
            else:
                job.ended = time.perf_counter()
                job.future.set_result(values)


class OwnProcess:
    """A reward in a process of its own, for what holds Python's lock, leaks, or crashes.

    ``build()`` makes the call there; it and its arguments must be importable and picklable, as everything that goes to a
    spawned process. Pictures and scores go through a pipe between the two processes, which nobody else can write to.
    """

    def __init__(self, label: str, build: Callable[[], tuple[Callable, Callable]]) -> None:
        self.label, self.build = label, build
        self._process: Any = None

    def start(self) -> None:
        """Starts the process and waits until the reward is ready. Raises ``ValueError`` with the reason where it is not."""
        if self._process is not None:
            return
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        device = _current_gpu()
        process = context.Process(target=_serve, args=(theirs, self.build, device), name=f"reward {self.label}", daemon=True)
        process.start()
        self._process = process
        theirs.close()
        kind, payload = self._receive()
        if kind != "ready":
            self.close()
            raise ValueError(payload)

    def __call__(self, images: np.ndarray, prompts: list[str], metadata: list[dict]) -> np.ndarray:
        self.start()
        try:
            self._pipe.send((images, prompts, metadata))
            kind, payload = self._receive()
        except OSError:
            kind, payload = "gone", f"its process ended (exit code {self._process.exitcode})"
        if kind == "values":
            return payload
        if kind == "failed":
            raise RewardFailed(*payload)
        raise RewardFailed(
            f"reward {self.label}: {payload} (first prompt {prompts[0]!r})",
            Unscored(self.label, images, prompts, metadata),
        )

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._process = None

    def _receive(self) -> tuple[str, Any]:
        process = self._process
        try:
            return self._pipe.recv()
        except EOFError:
            process.join(10)
            return "gone", f"its process ended (exit code {process.exitcode})"


def _serve(pipe: Any, build: Callable, device: int | None) -> None:
    """The other process: builds the reward, then answers until the pipe closes, as it does when the run ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C asks the run to stop, and the run ends this process
    try:
        if device is not None:
            import torch

            torch.cuda.set_device(device)
        start, call = build()
        start()
    except BaseException as error:
        pipe.send(("refused", f"{type(error).__name__}: {error}"))
        return
    pipe.send(("ready", None))
    while True:
        try:
            batch = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send(("values", call(*batch)))
        except RewardFailed as failure:
            pipe.send(("failed", (str(failure), failure.unscored)))


def _current_gpu() -> int | None:
    """The number of the GPU that this process uses, as far as it uses one yet."""
    import torch

    return torch.cuda.current_device() if torch.cuda.is_initialized() else None
