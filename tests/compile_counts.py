"""For tests of compiled UNets: an observer that counts, and a backend without the C++ compiler, which would take minutes."""

import functools

import torch
from torch._dynamo.utils import counters

from fastloop.observer import Observer

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


class Counts(Observer):
    """``counts``, after each iteration: graphs compiled so far, calls of traced ones, and of the UNet."""

    def __init__(self) -> None:
        self.forwards, self.counts, self.begun = 0, [], False

    def phase(self, name: str):
        self.forwards += name == "predict"
        return super().phase(name)

    def on_iteration(self, number: int) -> None:
        if self.begun:
            self.counts.append([counters["stats"]["unique_graphs"], traced_calls, self.forwards])
        self.begun = True
