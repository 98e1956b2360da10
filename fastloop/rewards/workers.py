"""Who calls a reward: threads of this process, or processes of its own. With one of them, one call at a time, in order."""

from __future__ import annotations

import multiprocessing
import queue
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, InvalidStateError, wait
from contextlib import suppress
from multiprocessing.connection import wait as wait_for_data
from typing import Any

import numpy as np

from fastloop.errors import RewardFailed, RewardTimedOut, Unscored, described

LOOK_AGAIN = 3600.0  # seconds; a lock cannot be waited for much longer at once than some hundred years


class Job:
    """A batch on its way: its result, who works on it, and when it began and ended on ``time.perf_counter``."""

    def __init__(self, batch: tuple) -> None:
        self.batch = batch
        self.future: Future = Future()
        self.call: Callable[..., np.ndarray] | None = None
        self.began: float | None = None
        self.ended: float | None = None


class Workers:
    """Calls ``calls[i](images, prompts, metadata)`` each in a thread that never holds up the end of the program.

    ``timeout`` is in seconds for one batch. A call that takes longer is given up: a process is ended, and a new one takes its
    place at the next batch; a thread cannot be ended, and its next batch waits until it is free.
    """

    def __init__(self, label: str, calls: list[Callable[..., np.ndarray]], timeout: float | None) -> None:
        self.label, self.calls, self.timeout = label, calls, timeout
        self._jobs: queue.SimpleQueue = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._closed: Future = Future()  # to be waited for beside a job's

    def submit(self, images: np.ndarray, prompts: list[str], metadata: list[dict]) -> Job:
        """Put a batch into the queue; the threads are started with the first."""
        job = Job((images, prompts, metadata))
        self._jobs.put(job)
        if not self._threads:
            for call in self.calls:
                thread = threading.Thread(target=self._work, args=(call,), name=f"reward {self.label}", daemon=True)
                self._threads.append(thread)
                thread.start()
        return job

    def result(self, job: Job) -> np.ndarray:
        """Wait for a job; those submitted before it must have been waited for, so that it has begun or is about to.

        Raises:
            RewardFailed: the reward failed, whatever it raised, or was closed.
            RewardTimedOut: it has taken longer than ``timeout``, or nobody has been free for the job for so long.
        """
        waiting_since = time.perf_counter()
        while not job.future.done():
            if self._closed.done():
                raise failure(self.label, "it was closed while it worked", job.batch)
            left = LOOK_AGAIN
            if self.timeout is not None:
                left = (waiting_since if job.began is None else job.began) + self.timeout - time.perf_counter()
                if left <= 0:
                    raise self._timed_out(job)
            wait([job.future, self._closed], min(left, LOOK_AGAIN), FIRST_COMPLETED)
        return job.future.result()

    def close(self) -> None:
        """End processes and, once they are free, threads. Who waits for a result is told."""
        with suppress(InvalidStateError):  # closed before
            self._closed.set_result(None)
        for call in self.calls:
            self._jobs.put(None)
            if isinstance(call, OwnProcess):
                call.close()

    def _timed_out(self, job: Job) -> RewardTimedOut:
        images, prompts, metadata = job.batch
        if job.began is None:
            did = "has not begun"
            remedy = "its worker is starting, or has an earlier batch still: set worker: process for what may hang"
        else:
            did, remedy = "has not answered", "raise its timeout, or see what it waits for"
            if isinstance(job.call, OwnProcess):
                job.call.kill()
        return RewardTimedOut(
            f"reward {self.label} {did} for {self.timeout:g} s (first prompt {prompts[0]!r}): {remedy}",
            Unscored(self.label, images, prompts, metadata),
        )

    def _work(self, call: Callable[..., np.ndarray]) -> None:
        while (job := self._jobs.get()) is not None and not self._closed.done():
            problem = _make_ready(call)
            if not job.future.set_running_or_notify_cancel():
                continue
            job.call, job.began = call, time.perf_counter()
            try:
                if problem is not None:
                    raise failure(self.label, f"it cannot start: {problem}", job.batch)
                values = call(*job.batch)
            except BaseException as error:  # a reward may even raise KeyboardInterrupt
                job.ended = time.perf_counter()
                known = isinstance(error, RewardFailed)
                job.future.set_exception(error if known else failure(self.label, described(error), job.batch))
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
        self._closed = False
        self._lock = threading.Lock()  # who closes may be another thread than who starts

    def start(self) -> None:
        """Start the process where none is alive, and wait until the reward is ready.

        Raises:
            ValueError: the reason why it is not.
        """
        with self._lock:
            if self._closed:
                raise ValueError("it is closed")
            if self._process is not None and self._process.is_alive():
                return
            context = multiprocessing.get_context("spawn")
            self._pipe, theirs = context.Pipe()
            arguments = theirs, self.build, _current_gpu()
            self._process = context.Process(target=_serve, args=arguments, name=f"reward {self.label}", daemon=True)
            self._process.start()
        theirs.close()
        kind, payload = self._receive()
        if kind != "ready":
            self.kill()
            raise ValueError(payload)

    def __call__(self, images: np.ndarray, prompts: list[str], metadata: list[dict]) -> np.ndarray:
        """Asks the process, which must have been started. Raises ``RewardFailed`` where it fails or ends."""
        batch = images, prompts, metadata
        with suppress(OSError):  # it is gone, which is what will be received
            self._pipe.send(batch)
        kind, payload = self._receive()
        if kind == "values":
            return payload
        raise RewardFailed(*payload) if kind == "failed" else failure(self.label, payload, batch)

    def kill(self) -> None:
        """End the process, whatever it does; `start` makes a new one."""
        with self._lock:
            if self._process is not None:
                self._process.kill()

    def close(self) -> None:
        """End the process for good, at any time, and wait until it has ended."""
        with self._lock:
            self._closed = True
            if self._process is not None:
                self._process.kill()
                self._process.join()

    def _receive(self) -> tuple[str, Any]:
        process, pipe = self._process, self._pipe
        # not the pipe alone: processes that the reward has started can keep its other end open
        if pipe in wait_for_data([pipe, process.sentinel]):
            with suppress(EOFError, OSError):
                return pipe.recv()
        process.join(10)
        return "gone", f"its process ended (exit code {process.exitcode})"


def failure(label: str, says: str, batch: tuple[np.ndarray, list[str], list[dict]]) -> RewardFailed:
    """Make the failure of a batch as a whole."""
    images, prompts, metadata = batch
    return RewardFailed(f"reward {label}: {says} (first prompt {prompts[0]!r})", Unscored(label, images, prompts, metadata))


def _make_ready(call: Callable[..., np.ndarray]) -> str | None:
    """Replaces a process that has crashed or was ended, before a batch's time begins. Returns why it cannot be, if so."""
    if isinstance(call, OwnProcess):
        try:
            call.start()
        except Exception as error:
            return str(error)
    return None


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
        pipe.send(("refused", described(error)))
        return
    with suppress(EOFError, BrokenPipeError, ConnectionResetError):  # the run has ended
        pipe.send(("ready", None))
        while True:
            pipe.send(_answer(call, pipe.recv()))


def _answer(call: Callable, batch: tuple) -> tuple[str, Any]:
    try:
        return "values", call(*batch)
    except RewardFailed as failed:
        return "failed", (str(failed), failed.unscored)
    except BaseException as error:
        return "raised", described(error)


def _current_gpu() -> int | None:
    """The number of the GPU that this process uses, as far as it uses one yet."""
    import torch

    return torch.cuda.current_device() if torch.cuda.is_initialized() else None
