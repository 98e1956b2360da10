"""The comparison with the committed results looks at ratios, and fails where one has fallen."""

from __future__ import annotations

import json
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def bench(bench_module):
    return bench_module("regression")


def throughput(fastloop: float, device: str = "cpu") -> dict:
    rows = [{"system": "baseline", "x_baseline": 1.0, "x_baseline_cpu": 1.0}]
    rows += [{"system": "fastloop", "x_baseline": 9.9, "x_baseline_cpu": fastloop}, {"system": "trl", "problem": "no TRL"}]
    return {"machine": {"device": device}, "cases": [{"model": "shapes", "adapter": "lora", "rows": rows}]}


def kernels(eager: float, fused: float) -> dict:
    common = {"operator": "geglu", "size": "SD 1.5", "which": "forward"}
    times = {"eager": eager, "triton": fused, "compile": 1.0}
    return {"rows": [{**common, "contender": name, "ms": ms} for name, ms in times.items()]}


def run(bench, tmp_path, now: dict[str, dict], before: dict[str, dict], *options: str) -> int:
    for folder, files in (("now", now), ("before", before)):
        (tmp_path / folder).mkdir()
        for name, content in files.items():
            (tmp_path / folder / f"{name}.json").write_text(json.dumps(content))
    return bench.main([str(tmp_path / "now"), "--baseline", str(tmp_path / "before"), *options])


def test_a_ratio_that_has_fallen_is_named_and_fails(bench, tmp_path, capsys):
    assert run(bench, tmp_path, {"throughput_cpu": throughput(0.9)}, {"throughput_cpu": throughput(1.2)}) == 1
    printed = capsys.readouterr().out
    assert "! shapes, lora: fastloop / baseline: 1.20 -> 0.90 (-25%)" in printed
    assert "1 of the ratios fell by more than 20%" in printed


def test_within_the_tolerance_it_passes_whatever_the_times_are(bench, tmp_path, capsys):
    now = {"throughput_cpu": throughput(1.1), "kernels_GPU": kernels(40.0, 20.0)}
    before = {"throughput_cpu": throughput(1.2), "kernels_GPU": kernels(4.0, 2.0)}
    assert run(bench, tmp_path, now, before) == 0
    printed = capsys.readouterr().out
    assert "shapes, lora: fastloop / baseline: 1.20 -> 1.10 (-8%)" in printed
    assert "geglu, SD 1.5, forward: triton / eager: 2.00 -> 2.00 (+0%)" in printed


def test_the_tolerance_is_an_option(bench, tmp_path):
    files = {"throughput_cpu": throughput(1.1)}, {"throughput_cpu": throughput(1.2)}
    assert run(bench, tmp_path, *files, "--tolerance", "0.05") == 1


def test_what_only_one_of_them_has_is_listed_and_passes(bench, tmp_path, capsys):
    before = {"throughput_cpu": throughput(1.2)}
    before["throughput_cpu"]["cases"][0]["rows"][2] = {"system": "trl", "x_baseline_cpu": 0.9}
    now = {"throughput_cpu": throughput(1.2), "kernels_H1": kernels(1, 1), "sample_efficiency_cpu": {}}
    assert run(bench, tmp_path, now, before) == 0
    printed = capsys.readouterr().out
    assert "shapes, lora: trl / baseline: not measured now" in printed
    assert "kernels_H1.json: nothing committed for this machine" in printed and "sample_efficiency" not in printed


def test_memory_counts_as_better_where_it_is_smaller(bench):
    rows = [{"label": "plain", "share_of_plain": 1.0}, {"label": "+ ZeRO-2", "share_of_plain": 0.5}]
    rows.append({"label": "+ offload", "share_of_plain": None})
    assert bench.ratios("memory", {"rows": rows}) == {"plain: memory": 1.0, "+ ZeRO-2: memory": 2.0}


def test_every_committed_result_can_be_compared_with_itself(bench, capsys):
    results = Path(bench.__file__).parent / "results"
    assert bench.main([str(results)]) == 0
    compared = capsys.readouterr().out
    for path in results.glob("*.json"):
        assert (f"{path.name}, committed -> now:" in compared) == (
            path.stem.split("_")[0] in ("throughput", "kernels", "memory")
        )
    assert "! " not in compared and "new" not in compared


def test_a_folder_that_is_not_there_is_refused(bench, capsys):
    assert bench.main(["/nowhere"]) == 2 and "no folder /nowhere" in capsys.readouterr().err
