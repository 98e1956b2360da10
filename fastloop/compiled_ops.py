"""DeepSpeed's compiled operators, loaded so that a process killed meanwhile does not block every later one.

PyTorch compiles an operator into a folder of the user's cache and guards each build and each load by a file named ``lock``.
Where its process is killed the file remains, and whoever loads the operator next waits for it without end.
"""

from __future__ import annotations

import fcntl
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

FORGOTTEN = 600  # seconds: longer than any of DeepSpeed's operators takes to compile


def load_op(builder: str) -> None:
    """Load an operator, by the name of DeepSpeed's builder; DeepSpeed then finds it loaded. The first time it is compiled.

    What cannot be compiled on this machine is left to DeepSpeed, which does without it or says why not.
    """
    from deepspeed.accelerator import get_accelerator
    from deepspeed.ops import __compatible_ops__
    from torch.utils.cpp_extension import _get_build_directory  # the one that `load` takes

    op = get_accelerator().create_op_builder(builder)
    if op is not None and __compatible_ops__.get(op.NAME, False):
        with guarded(Path(_get_build_directory(op.name, verbose=False))):
            op.load(verbose=False)


@contextmanager
def guarded(folder: Path) -> Iterator[None]:
    """Hold a folder of PyTorch's for a load, and remove the ``lock`` of a process that died in one.

    The kernel gives back a record lock when its holder dies. What the holder has written next to it then says that it did not
    come to its end. A ``lock`` that another program left is removed once it is `FORGOTTEN`.
    """
    with (folder / ".fastloop").open("a+") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX)
        except OSError:  # a file system without locks: nobody can tell who is alive
            yield
            return
        lock = folder / "lock"
        file.seek(0)
        with suppress(FileNotFoundError):
            if file.read() or time.time() - lock.stat().st_mtime > FORGOTTEN:
                lock.unlink()
        file.write("loading\n")
        file.flush()
        try:
            yield
        finally:
            file.truncate(0)
