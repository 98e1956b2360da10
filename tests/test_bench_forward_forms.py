"""The forms of the forward process that are compared: what they share with fastloop's own, and where they part."""

from __future__ import annotations

import pytest

from fastloop.recipes import dump_config
from fastloop.tracking import read_rows


def test_while_the_old_model_is_the_current_one_the_bounded_forms_have_the_signed_gradient(
    bench_module, make_config, tmp_path, monkeypatch, capsys
):
    bench = bench_module("forward_forms")
    recipe, out = tmp_path / "recipe.yaml", tmp_path / "rows.jsonl"
    recipe.write_text(dump_config(make_config(sampling={"steps": 2, "guidance_scale": 1.0})))
    monkeypatch.setattr(bench, "RECIPE", str(recipe))
    budget = 4 * 16 * (2 + 2 + 2 * 4)  # of four iterations with an old prediction, of four and a fraction without
    command = ["--forms", *bench.FORMS, "--strength", "0.5", "--budget", str(budget), "--seeds", "3", "--out", str(out)]
    assert bench.main([*command, "forward.levels=2", "optimizer.lr=1e-3"]) == 0
    rows = {row["form"]: row for row in read_rows(out)}
    assert set(rows) == set(bench.FORMS)
    assert [rows[form]["iterations"] for form in ("signed", "nft")] == [4, 4] and rows["nft"]["images"] == 64
    first = {form: row["grad_norm"][0] for form, row in rows.items()}  # of the first iteration
    assert all(first[form] == pytest.approx(first["signed"], rel=2e-3) for form in bench.OLD)
    assert all(abs(first[form] / first["signed"] - 1) > 0.02 for form in ("offset", "v", "group"))
    assert first["guided"] == pytest.approx(first["signed"], rel=2e-3)  # without guidance
    assert rows["nft"]["grad_norm"][3] != pytest.approx(rows["signed"]["grad_norm"][3], rel=1e-3)
    capsys.readouterr()
    assert bench.main(["--table", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert len(printed.splitlines()) == 2 + len(bench.FORMS) and "| nft       | 0.5" in printed
