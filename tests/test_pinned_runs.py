"""Short runs give the figures that they gave when these were recorded: `python tests/same_bits.py --record`."""

from __future__ import annotations

import json

import pytest
import same_bits


@pytest.mark.parametrize("name", same_bits.PINNED)
def test_a_short_run_gives_the_recorded_figures(tmp_path, name):
    expected = json.loads(same_bits.RECORD.read_text())[name]
    assert expected["weights"] > 0 and expected["iteration"] == 2
    found = same_bits.train(name, tmp_path, tmp_path)["numbers"]
    assert found.keys() == expected.keys()
    assert comparable(found) == pytest.approx(comparable(expected), rel=1e-4, abs=1e-7)


def comparable(numbers: dict) -> dict:
    """Without counts of ratios past a bound, which rounding can move; the ratio furthest from 1 in place of its distance."""
    ratios = {key: 1 + value for key, value in numbers.items() if key.endswith("_dev")}
    return {key: value for key, value in numbers.items() if "clipfrac" not in key} | ratios
