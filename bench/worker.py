"""The worker's side of bench/throughput.py: an iteration for each line it reads, its numbers for an answer.

Without fastloop, since peers import it in environments of their own.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch

PHASES = ("encode", "rollout", "decode", "reward", "loss", "backward", "optimizer", "rest")


class Phases:
    """Seconds by phase, each without those of the phases within it. ``exact`` waits for the device at every border."""

    def __init__(self) -> None:
        self.exact = False
        self.begin()

    def begin(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.open, self.mark = ["rest"], time.perf_counter()

    def end(self) -> dict[str, float]:
        self._charge()
        return dict(self.seconds)

    def watch(self, owner, name: str, phase: str) -> None:
        """Charges the calls of a method to a phase."""
        method = getattr(owner, name)

        def watched(*args, **kwargs):
            with self.within(phase):
                return method(*args, **kwargs)

        setattr(owner, name, watched)

    @contextmanager
    def within(self, phase: str) -> Iterator[None]:
        """Charges what is done within it to a phase."""
        self._charge()
        self.open.append(phase)
        try:
            yield
        finally:
            self._charge()
            self.open.pop()

    def _charge(self) -> None:
        if self.exact:
            synchronize()
        now = time.perf_counter()
        self.seconds[self.open[-1]] += now - self.mark
        self.mark = now


class Server:
    """Reads ``go`` or ``exact`` from the standard input and answers with one line of JSON on the standard output.

    Whatever else the process prints goes to the standard error.
    """

    def __init__(self) -> None:
        self.phases = Phases()
        self._answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        self._started = 0.0, 0.0

    def wait(self) -> bool:
        """Waits for the order of an iteration and starts the clock; False where there is none any more."""
        order = sys.stdin.readline().strip()
        if not order:
            return False
        self.phases.exact = order == "exact" and torch.cuda.is_available()
        synchronize()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        self.phases.begin()
        self._started = time.perf_counter(), time.process_time()
        return True

    def answer(self) -> None:
        """Stops the clock and sends the numbers."""
        synchronize()
        wall, cpu = self._started
        row = {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}
        row |= {"phases": self.phases.end(), "peak_bytes": peak_bytes()}
        print(json.dumps(row), file=self._answers, flush=True)


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak_bytes() -> int:
    """Of the GPU's memory that PyTorch allocated, else of the resident size of this process since its start."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
