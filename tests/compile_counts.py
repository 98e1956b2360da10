"""For tests of compiled UNets: a trainer that counts, and a backend without the C++ compiler, which would take minutes."""

import functools

import torch
from torch._dynamo.utils import counters

from fastloop.trainer import Trainer

traced_calls = 0


def run_as_traced(graph, inputs, options=None):
    """A backend: tracing, guards and recompilations are real, the graphs run as they are, and their calls are counted."""

    def run(*args):
        global traced_calls
        traced_calls += 1
        return graph(*args)

    return run


compile_as_traced = functools.partial(torch.compile, backend=run_as_traced)


def forget() -> None:
    """Nothing is compiled any more, and counts start at 0."""
    global traced_calls
    torch._dynamo.reset()
    counters.clear()
    traced_calls = 0


class Counting(Trainer):
    """``counts``, after each iteration: graphs compiled so far, calls of traced ones, and of the UNet."""

    def __init__(self, *args) -> None:
        super().__init__(*args)
        self.forwards, self.counts = 0, []
        predict = self.denoiser.predict

        def counted(*args):
            self.forwards += 1
            return predict(*args)

        self.denoiser.predict = counted

    def _log(self, metrics) -> None:
        self.counts.append([counters["stats"]["unique_graphs"], traced_calls, self.forwards])
        super()._log(metrics)
