"""Compiled operators of DeepSpeed load even after a process was killed while it loaded one."""

from __future__ import annotations

import multiprocessing
import os
import time

import pytest

from fastloop.compiled_ops import FORGOTTEN, guarded


def killed_while_loading(folder) -> None:
    with guarded(folder):
        (folder / "lock").touch()
        os._exit(9)


def test_the_lock_of_a_killed_process_is_removed(tmp_path):
    process = multiprocessing.get_context("fork").Process(target=killed_while_loading, args=(tmp_path,))
    process.start()
    process.join()
    assert process.exitcode == 9 and (tmp_path / "lock").exists()
    with guarded(tmp_path):
        assert not (tmp_path / "lock").exists()
        (tmp_path / "lock").touch()  # by another program from here on: this load comes to its end
    with guarded(tmp_path):
        assert (tmp_path / "lock").exists()


def test_a_failed_load_is_no_killed_one(tmp_path):
    with pytest.raises(RuntimeError), guarded(tmp_path):
        raise RuntimeError("no compiler")
    (tmp_path / "lock").touch()
    with guarded(tmp_path):
        assert (tmp_path / "lock").exists()


def test_a_forgotten_lock_of_another_program_is_removed(tmp_path):
    lock = tmp_path / "lock"
    lock.touch()
    os.utime(lock, (0, time.time() - FORGOTTEN - 5))
    with guarded(tmp_path):
        assert not lock.exists()
