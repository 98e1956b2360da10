"""A run that is asked to stop by a signal: it leaves where its state is whole."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager

from fastloop.ranks import Ranks


class Stopped(Exception):
    """A signal asked the run to stop; the iteration under way is left out and done again on resume."""

    def __init__(self, signal_name: str, iteration: int) -> None:
        super().__init__(f"stopped by {signal_name} after iteration {iteration}")
        self.signal_name = signal_name


class StopRequest:
    """Whether SIGINT or SIGTERM has asked this process, or another rank's, to stop."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self._number: int | None = None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Listen to signals: within it the first SIGINT or SIGTERM asks for a clean stop; a second SIGINT ends at once."""
        before = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def leave_if_asked(self, iteration: int) -> None:
        """Leave if some rank was asked to; called only where the state is that of so many finished iterations, by all ranks.

        Raises:
            Stopped: some rank was asked.
        """
        if number := self.ranks.highest(self._number or 0):
            raise Stopped(signal.Signals(number).name, iteration)

    def _ask(self, number: int, frame) -> None:
        if self._number is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._number = number
        if self.ranks.main:
            print(f"\n{signal.Signals(number).name}: saving and leaving; press Ctrl-C again to leave at once", flush=True)
