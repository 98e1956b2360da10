"""The processes of a run: each one's share, what they exchange, who writes, and how one that fails ends them all.

A run of one process is ``ALONE``, which exchanges nothing. Processes that a launcher started join with `Ranks.join`; a
launcher is whatever sets RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT: deepspeed, torchrun, a line in Slurm.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist

from fastloop.errors import LIMIT, RunFailed, UserError, one_line

T = TypeVar("T")
_FAILED = "fastloop/failed"  # in the launcher's store: "RANK|message" of the first rank that failed
_POLL, _GRACE = 0.5, 5.0  # seconds: between looks at the store, and for a rank to leave by itself once another has failed
_LONGEST = 4 * LIMIT  # bytes of a message
_PATIENCE = timedelta(hours=6)  # a slow reward on one rank is no failure


class Ranks:
    """This process among ``world``, numbered ``rank``; ``local_rank`` on its machine. Rank 0 is ``main``: it alone writes.

    As a context manager it leaves nobody behind: an exception in one rank ends all, and only that rank says why.
    """

    def __init__(self, rank: int = 0, local_rank: int = 0, world: int = 1) -> None:
        self.rank, self.local_rank, self.world = rank, local_rank, world
        self.main = rank == 0
        self.on_failure: Callable[[str], None] = lambda message: None  # called before this rank is ended for another's failure
        self._group: dist.ProcessGroup | None = None
        self._store: dist.Store | None = None
        self._watcher: threading.Thread | None = None
        self._left = threading.Event()

    @classmethod
    def join(cls) -> Ranks:
        """Join the ranks that a launcher started; one process where there is no launcher, or one that started one.

        Raises:
            UserError: the launcher's variables are incomplete or wrong.
        """
        names = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
        try:
            rank, local_rank, world = (int(os.environ.get(name, name == "WORLD_SIZE")) for name in names)
            if world > 1:
                missing = [name for name in (*names, "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
                if missing:
                    raise ValueError(f"{missing[0]} is not set")
                address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            if not 0 <= rank < world:
                raise ValueError(f"RANK={rank} with WORLD_SIZE={world}")
        except ValueError as error:
            raise UserError(f"the launcher's environment variables: {error}: start with deepspeed or torchrun") from None
        ranks = cls(rank, local_rank, world)
        if world > 1:
            on_gpu = torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu"
            if on_gpu:
                if local_rank >= torch.cuda.device_count():
                    found = torch.cuda.device_count()
                    raise UserError(f"LOCAL_RANK={local_rank}, but this machine has {found} GPUs: start fewer processes")
                torch.cuda.set_device(local_rank)
            dist.init_process_group("nccl" if on_gpu else "gloo", timeout=_PATIENCE)
            ranks._group = dist.new_group(backend="gloo", timeout=_PATIENCE) if on_gpu else dist.group.WORLD
            # an own connection: on the group's, a look would wait behind whatever the main thread waits for
            ranks._store = dist.TCPStore(address, port, is_master=False, wait_for_workers=False)
            ranks._watcher = threading.Thread(target=ranks._watch, name="ranks", daemon=True)
            ranks._watcher.start()
        return ranks

    # --- shares --------------------------------------------------------------------------------------------------------

    def bounds(self, n: int) -> np.ndarray:
        """Return where the shares of n things begin and end: int64 (world + 1,).

        They are contiguous, in the order of the ranks, and even.
        """
        return np.arange(self.world + 1) * n // self.world

    def share(self, n: int) -> range:
        """Return this rank's part of n things; may be empty."""
        return range(*self.bounds(n)[self.rank : self.rank + 2].tolist())

    def padded(self, n: int) -> list[int]:
        """Return what `share` does, with the last one repeated so that all ranks have as many and at least one."""
        own = list(self.share(n))
        return own + [own[-1] if own else 0] * (-(-n // self.world) - len(own))

    # --- exchange ------------------------------------------------------------------------------------------------------

    def gather(self, values: np.ndarray) -> np.ndarray:
        """Return the values of all ranks, (world, ...) in their order; of one shape and dtype on all of them.

        Raises:
            RunFailed: another process is gone.
        """
        if self.world == 1:
            return values[None]
        mine = torch.from_numpy(np.ascontiguousarray(values))
        found = [torch.empty_like(mine) for _ in range(self.world)]
        self._talk(dist.all_gather, found, mine, group=self._group)
        return torch.stack(found).numpy()

    def gather_shares(self, parts: np.ndarray, n: int) -> np.ndarray:
        """Return all of n things, in order, on every rank; each gives those of its `share`."""
        even = np.zeros((-(-n // self.world), *parts.shape[1:]), parts.dtype)
        even[: len(parts)] = parts
        sizes = np.diff(self.bounds(n))
        return np.concatenate([part[:size] for part, size in zip(self.gather(even), sizes, strict=True)])

    def from_main(self, function: Callable[[], T]) -> T:
        """Return what ``function`` returns on the main rank, on every rank."""
        box: list[Any] = [function() if self.main else None]
        if self.world > 1:
            self._talk(dist.broadcast_object_list, box, src=0, group=self._group)
        return box[0]

    def highest(self, value: int) -> int:
        """Return the highest of the ranks' values."""
        return int(self.gather(np.array(value)).max())

    def first_message(self, message: str) -> str:
        """Return the message of the first rank that has one, on every rank, with its number where it is another one's."""
        text = np.zeros(_LONGEST, np.uint8)
        encoded = np.frombuffer(message.encode()[:_LONGEST], np.uint8)
        text[: len(encoded)] = encoded
        for rank, row in enumerate(self.gather(text)):
            if found := row.tobytes().rstrip(b"\0").decode(errors="ignore"):
                return found if rank == self.rank else f"rank {rank}: {found}"
        return ""

    def wait(self) -> None:
        """Wait until every rank has come here."""
        self.highest(0)

    def _talk(self, collective: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        try:
            collective(*args, **kwargs)
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[0]
            raise RunFailed(
                f"lost another process of the run ({reason}): --resume goes on from the last checkpoint"
            ) from error

    # --- failure -------------------------------------------------------------------------------------------------------

    def failure(self) -> str | None:
        """Return what the first rank that failed said, where it was another one."""
        if self.world == 1 or self._store is None or not self._store.check([_FAILED]):
            return None
        rank, _, message = self._store.get(_FAILED).decode().partition("|")
        return None if int(rank) == self.rank else f"rank {rank}: {message}"

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        if self.world == 1:
            return
        if error is None:
            self.wait()
            self._stop_watching()
            dist.destroy_process_group()
            return
        if isinstance(error, UserError) and not self.main:
            time.sleep(1)  # all ranks refuse the same thing: let the main one say it
        message = one_line(error) or kind.__name__
        try:
            first = self._store.compare_set(_FAILED, "", f"{self.rank}|{message}").decode() == f"{self.rank}|{message}"
        except RuntimeError:  # the main rank, which keeps the store, is gone
            first = False
        sys.stdout.flush()
        if not first:
            sys.stderr.flush()
            os._exit(2 if isinstance(error, UserError) else 1)  # quietly: the one that failed has said why
        self._stop_watching()
        if not self.main and isinstance(error, (UserError, RunFailed)) and not message.startswith("rank "):
            raise kind(f"rank {self.rank}: {message}") from error

    def _stop_watching(self) -> None:
        """Before Python ends: it would end the thread in the middle of a look at the store, which aborts the process."""
        self._left.set()
        self._watcher.join()

    def _watch(self) -> None:
        """Ends this process soon after another one failed, whatever it is waiting for."""
        while not self._left.wait(_POLL):
            try:
                message = self.failure()
            except RuntimeError:
                message = "the main process is gone"
            if message is None:
                continue
            if self._left.wait(_GRACE):
                return
            self.on_failure(message)
            os._exit(1)


ALONE = Ranks()  # a run of one process
