"""The memory benchmark: one row measured in a process of its own, every row's configuration, and what is refused."""

from __future__ import annotations

import json

import pytest
import torch
from known_traces import trace_nothing

from fastloop.preflight import preflight


@pytest.fixture(scope="module")
def memory(bench_module):
    return bench_module("memory")


@pytest.mark.skipif(torch.cuda.is_available(), reason="measures host memory")
def test_a_row_is_measured_and_becomes_a_table_a_json_and_a_plot(memory, tmp_path, capsys, monkeypatch):
    trace_nothing(monkeypatch)  # of the plan beside it; the row is a process of its own
    assert memory.main(["--model", "tiny", "--rows", "plain", "--out", str(tmp_path)]) == 0
    summary = json.loads((tmp_path / "memory_cpu.json").read_text())
    (row,) = summary["rows"]
    assert row["problem"] is None and row["share_of_plain"] == 1
    assert row["peak_bytes"] == max(row[f"{phase}_bytes"] for phase in memory.PHASES) > 0
    assert (tmp_path / "memory_cpu.md").read_text().strip() in capsys.readouterr().out
    assert (tmp_path / "memory_cpu.png").stat().st_size > 1000


@pytest.mark.parametrize("size", ["sd15", "sdxl"])
def test_every_row_at_full_size_is_a_configuration_that_can_run(memory, tmp_path, size, monkeypatch):
    import memory_rows as rows  # found while memory is there

    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    configs = rows.configs_for(size, tmp_path, rows.FULL_SIZE)
    assert list(configs) == list(rows.ROWS)
    for name, config in configs.items():
        checked = preflight(config)
        checked.rewards.close()
        checked.eval_rewards.close()
        assert sum(p.numel() for p in checked.skeleton.network.parameters()) >= rows.FULL_SIZE, name


def test_what_cannot_be_measured_is_refused_in_one_line(memory, tmp_path, capsys):
    assert memory.main(["--rows", "plian", "--out", str(tmp_path)]) == 2
    assert "--rows: unknown row 'plian'" in capsys.readouterr().err
    if not torch.cuda.is_available():
        assert memory.main(["--model", "sdxl", "--out", str(tmp_path)]) == 2
        assert "--model: sdxl at full size is for a GPU: use mid" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
