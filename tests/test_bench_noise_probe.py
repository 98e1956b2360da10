"""The probe of the initial noise: its estimate has no bias, and it prints both tables."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(scope="module")
def bench(bench_module):
    return bench_module("noise_probe")


def test_the_squared_norm_of_a_gradient_is_estimated_without_bias_and_with_its_error(bench):
    generator = torch.Generator().manual_seed(0)
    gradient = torch.tensor([0.05, 0.0, -0.02], dtype=torch.float64)
    found, errors = [], []
    for _ in range(200):
        noise = torch.randn(400, 3, generator=generator, dtype=torch.float64)
        rewards = noise @ gradient + torch.randn(400, generator=generator, dtype=torch.float64)
        value, error = bench.signal(noise, rewards, torch.ones(400, dtype=torch.float64), 4)
        found.append(value)
        errors.append(error)
    values = torch.tensor(found)
    assert values.mean().item() == pytest.approx(gradient.square().sum().item(), abs=4 * values.std().item() / 200**0.5)
    none = torch.tensor(
        [bench.signal(torch.randn(400, 3).double(), torch.randn(400).double(), torch.ones(400), 4) for _ in range(200)]
    )
    assert none[:, 0].std().item() == pytest.approx(none[:, 1].mean().item(), rel=0.2)


def test_noise_on_a_grid_has_unit_spread_and_directions_have_unit_mean_square(bench):
    noise = torch.randn(3000, 2, 8, 8)
    for grid in (8, 4, 2, 1):
        view = bench.on_grid(noise, grid)
        assert view.shape == (3000, 2 * grid**2) and view.std().item() == pytest.approx(1, abs=0.03)
    along = bench.directions(torch.randn(500, 30))
    torch.testing.assert_close(along.square().mean(0), torch.ones(9, dtype=torch.float64))


def test_both_tables_are_printed(bench, tiny_sd, capsys):
    own = [
        f"model.path={tiny_sd}",
        "prompts={source: animals}",
        "eval.prompts={source: animals, limit: 3}",
        "sampling.steps=2",
    ]
    own += ["rewards=[{name: jpeg_incompressibility}]", "eval.images_per_prompt=2"]
    sizes = ["--prompts", "12", "--images", "2", "--lengths", "0", "3", "--scales", "0.5"]
    assert bench.main([*sizes, "--set", *own]) == 0
    printed = capsys.readouterr().out
    rows = [line.split(" | ") for line in printed.splitlines() if line.startswith("| ")]
    assert [row[0] for row in rows[1:6]] == [f"| mu on {g} x {g}" for g in (8, 4, 2, 1)] + ["| log s of each channel"]
    assert [row[:2] for row in rows[-3:]] == [["| 0", "1"], ["| 3", "1"], ["| 0", "0.5"]]
    scores = [row[2].split(" ")[0] for row in rows[-3:]]
    assert len(set(scores)) == 3  # each draws from another noise
    assert bench.main(["--set", "nothing=1"]) == 2
