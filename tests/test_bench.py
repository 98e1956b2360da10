"""The table of the kernels, on a CPU."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCH = Path(__file__).resolve().parent.parent / "bench"


@pytest.fixture(scope="module")
def kernel_table(bench_module):
    return bench_module("kernel_table")


no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="what is printed where there is no GPU")


def tiny(*operators: str) -> list:
    import kernel_cases as bench  # found while kernel_table is there

    cases = [bench.step_case("policy_loss", "tiny", (4, 8, 8), 2), bench.step_case("sample_transition", "SD", (4, 64, 64), 1)]
    cases += [bench.norm_case("tiny", 32, 4, 1, last=True, trained=True), bench.geglu_case("tiny", 4, 8, 1)]
    return [case for case in cases if case.operator in operators]


@no_gpu
def test_without_a_gpu_eager_is_timed_against_compile_and_triton_is_not(kernel_table, tmp_path, capsys):
    if problem := kernel_table.compile_problem(torch.device("cpu")):
        pytest.skip(problem)
    out = tmp_path / "results" / "kernels.json"
    code = kernel_table.main(["--quick", "--out", str(out)], cases=tiny("policy_loss", "geglu"), seconds=0.01)
    printed = capsys.readouterr().out
    assert code == 0 and "Triton was not timed: no GPU here" in printed and "## geglu" in printed
    summary = json.loads(out.read_text())
    assert summary["command"] == f"python bench/kernel_table.py --quick --out {out}"
    interpreted = "the kernels were not compiled: TRITON_INTERPRET is set"
    assert summary["notes"] == ["Triton was not timed: no GPU here", interpreted] and summary["problems"] == []
    assert summary["code"] == []
    assert summary["machine"]["device"] == "cpu" and summary["versions"]["torch"] == torch.__version__
    rows = {(row["operator"], row["contender"], row["which"]): row for row in summary["rows"]}
    names, passes = ("reference", "eager", "compile"), ("forward", "backward", "both")
    assert rows.keys() == {(o, name, which) for o in ("policy_loss", "geglu") for name in names for which in passes}
    for row in rows.values():
        assert all(math.isfinite(row[key]) and row[key] > 0 for key in ("ms", "call_ms", "gb_per_s", "share_of_copy"))
    row = rows["policy_loss", "eager", "both"]
    assert row["gb_per_s"] == pytest.approx(28 * 2 * 4 * 8 * 8 / row["ms"] / 1e6)  # 12 bytes forward and 16 backward
    assert row["share_of_copy"] == pytest.approx(row["gb_per_s"] / summary["copy_gb_per_s"])
    assert rows["geglu", "eager", "both"]["saved_bytes"] == 2 * 4 * 8  # gelu(gate), bfloat16


@no_gpu
def test_without_a_compiler_the_other_rows_are_there_and_it_is_said(kernel_table, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    out = tmp_path / "kernels.json"
    cases = tiny("sample_transition", "group_norm_silu")
    assert kernel_table.main(["--out", str(out)], cases=cases, seconds=0.001) == 0
    assert "torch.compile was not timed: it needs a C++ compiler, and no-such-compiler" in capsys.readouterr().out
    rows = json.loads(out.read_text())["rows"]
    assert {row["contender"] for row in rows} == {"reference", "eager"} and len(rows) == 2 + 6


@no_gpu
def test_a_contender_that_computes_something_else_is_named_and_not_timed(kernel_table, tmp_path, capsys, monkeypatch):
    eager = kernel_table.EAGER["geglu"]
    wrong = {"reference": lambda projected: 2 * eager(projected), "eager": eager}
    monkeypatch.setattr(kernel_table, "contenders", lambda *_: wrong)
    out = tmp_path / "kernels.json"
    assert kernel_table.main(["--out", str(out)], cases=tiny("geglu"), seconds=0.001) == 1
    assert "reference failed: geglu, tiny 4 x 2*8, batch 1: AssertionError: geglu" in capsys.readouterr().out
    assert {row["contender"] for row in json.loads(out.read_text())["rows"]} == {"eager"}


def test_the_table_has_what_the_kernels_are_compiled_to_without_a_gpu(kernel_table):
    """In a process of its own: here the kernels are interpreted."""
    script = (
        "import json, kernel_cases, kernel_table as t; print(json.dumps(t.code_rows(kernel_cases.geglu_case('a', 4, 8, 1))))"
    )
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", script], cwd=BENCH, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    code = json.loads(done.stdout)
    assert [(row["which"], row["kernel"]) for row in code] == [("forward", "geglu._forward"), ("backward", "geglu._gradient")]
    row = {"operator": "geglu", "size": code[0]["size"], "which": "forward", "contender": "eager", "ms": 1.0, "call_ms": 1.0}
    row |= {"gb_per_s": 1.0, "share_of_copy": 0.5, "peak_bytes": None, "saved_bytes": 0}
    head, _, line = kernel_table.table("geglu", [row], code).splitlines()[2:]
    cells = dict(zip(*([cell.strip() for cell in text.split("|")] for text in (head, line)), strict=True))
    assert cells["launches"] == "1" and int(cells["instructions"]) == code[0]["instructions"] > 50
    assert cells["loads"] == " + ".join(f"{count}x{size}" for size, count in code[0]["loads"].items()) != "0"
    assert kernel_table.code_cells(code[:1] * 2)[:2] == ["2", str(2 * code[0]["instructions"])]


def test_what_runs_beside_the_model_can_still_be_timed():
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--benchmark-disable", BENCH / "test_loop.py"]
    done = subprocess.run(command, cwd=BENCH.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
