"""Optimizers by name: what they compute, what their state takes, that it survives saving, and what is refused."""

from __future__ import annotations

import sys

import pytest
import torch

from fastloop.cli import main
from fastloop.config import OptimizerConfig
from fastloop.engines.torch import TorchEngine
from fastloop.optimizers import OPTIMIZERS, build_optimizer, optimizer_problem, state_bytes
from fastloop.recipes import dump_config

CPU = torch.device("cpu")
ON_CPU = [name for name in OPTIMIZERS if optimizer_problem(name, CPU) is None]
SIZES = [(4096,), (100, 70), (63,)]  # in 8 bits, in 8 bits with a last block that is not full, and too small for it


def parameters() -> list[torch.nn.Parameter]:
    g = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(*size, generator=g)) for size in SIZES]


def steps(optimizer: torch.optim.Optimizer, over: list[torch.nn.Parameter], first: int, last: int) -> None:
    for number in range(first, last):
        g = torch.Generator().manual_seed(number)
        for p in over:
            p.grad = torch.randn(p.shape, generator=g)
        optimizer.step()


def test_all_but_the_paged_one_run_on_a_cpu():
    assert ON_CPU == ["adamw", "adamw8bit", "lion8bit", "cpu_adamw"]


@pytest.mark.parametrize("name", ON_CPU)
def test_steps_are_those_of_the_algorithm_to_the_precision_of_the_state(name):
    config = OptimizerConfig(name=name, lr=1e-2, weight_decay=0.1, betas=(0.9, 0.99))
    over, start = parameters(), parameters()
    steps(build_optimizer(config, over), over, 0, 5)
    expected = parameters()
    if name == "lion8bit":
        moments = [torch.zeros_like(p) for p in expected]
        for number in range(5):
            g = torch.Generator().manual_seed(number)
            for p, m in zip(expected, moments, strict=True):
                gradient = torch.randn(p.shape, generator=g)
                p.data.mul_(1 - 1e-2 * 0.1).sub_(1e-2 * torch.sign(0.9 * m + 0.1 * gradient))
                m.mul_(0.99).add_(0.01 * gradient)
    else:
        steps(torch.optim.AdamW(expected, lr=1e-2, weight_decay=0.1, betas=(0.9, 0.99)), expected, 0, 5)
    for got, want, before in zip(over, expected, start, strict=True):
        moved, away = (want - before).norm(), (got - want).norm()
        assert moved > 0.1 and away < 0.15 * moved
    assert torch.allclose(over[2], expected[2], atol=1e-6)  # the small tensor keeps its state in float32


@pytest.mark.parametrize("name", ON_CPU)
def test_the_state_takes_the_bytes_that_the_plan_says(name):
    over = parameters()
    optimizer = build_optimizer(OptimizerConfig(name=name), over)
    steps(optimizer, over, 0, 1)
    held = 0
    for state in optimizer.state.values():
        for key, value in state.items():
            if isinstance(value, torch.Tensor) and not key.startswith("qmap") and value.numel() > 1:
                held += value.numel() * value.element_size()
    assert held == state_bytes(name, [p.numel() for p in over])
    if name.endswith("8bit"):
        assert held < 0.5 * state_bytes("adamw", [p.numel() for p in over])


@pytest.mark.parametrize("name", [name for name in ON_CPU if name != "cpu_adamw"])  # DeepSpeed saves that one
def test_saved_state_goes_on_bit_for_bit(name, make_config, tmp_path):
    config = make_config(optimizer={"name": name, "lr": 1e-2})

    def engine(over) -> TorchEngine:
        return TorchEngine({str(i): p for i, p in enumerate(over)}, config, CPU)

    unbroken = parameters()
    steps(engine(unbroken).optimizer, unbroken, 0, 6)
    over = parameters()
    first = engine(over)
    steps(first.optimizer, over, 0, 3)
    torch.save({"engine": first.save(tmp_path), "weights": [p.detach() for p in over]}, tmp_path / "state.pt")
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    again = [torch.nn.Parameter(value) for value in saved["weights"]]
    second = engine(again)
    assert second.load(tmp_path, saved["engine"]) is None
    steps(second.optimizer, again, 3, 6)
    assert all(torch.equal(got, want) for got, want in zip(again, unbroken, strict=True))


def test_what_cannot_be_used_is_one_line_before_any_model_loads(make_config, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_text(dump_config(make_config()))
    monkeypatch.setattr("fastloop.denoisers.load_denoiser", None)
    assert main(["train", "recipe.yaml", "optimizer.name=paged_adamw8bit", "engine.device=cpu"]) == 2
    assert capsys.readouterr().err == (
        "fastloop: optimizer.name: paged_adamw8bit pages its state between GPU and CPU, and this runs on cpu: "
        "set it to adamw8bit\n"
    )
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["plan", "recipe.yaml", "optimizer.name=adamw8bit"]) == 2
    assert capsys.readouterr().err == (
        "fastloop: optimizer.name: adamw8bit needs bitsandbytes: pip install fastloop[bnb], or set it to adamw\n"
    )
    assert main(["plan", "recipe.yaml", "optimizer.name=adam8bit"]) == 2
    assert "input should be 'adamw', 'adamw8bit', 'paged_adamw8bit', 'lion8bit' or 'cpu_adamw'" in capsys.readouterr().err
