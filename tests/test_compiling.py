"""`model.compile: auto` compiles where it was measured to pay, says so, and a run keeps what was decided."""

from __future__ import annotations

import shutil

import pytest
import torch
from compile_counts import compile_as_traced, forget
from known_traces import trace_nothing
from torch._dynamo.utils import counters

from fastloop import compiling
from fastloop.batches import Batches
from fastloop.compiling import compile_seconds, decide, iteration_seconds
from fastloop.denoisers import ready_denoiser
from fastloop.plan import plan
from fastloop.recipes import load_config
from fastloop.tracking import read_rows
from fastloop.trainer import Trainer

CPU = torch.device("cpu")
LEFT_OUT = ("evaluation", "report", "export")


@pytest.fixture
def ready(make_config, monkeypatch):
    """A function of iterations and of what iterations are measured to take: the denoiser, and what is decided and said."""
    monkeypatch.setattr(torch, "compile", compile_as_traced)
    config = make_config(model={"compile": "auto"})
    denoiser = ready_denoiser(config, CPU, trained=True)

    def decided(iterations: int, *seconds: float):
        taken = iter(seconds)
        monkeypatch.setattr(compiling, "iteration_seconds", lambda *_: next(taken))
        of_run = config.model_copy(update={"iterations": iterations})
        chosen, said = decide(denoiser, of_run, Batches(of_run, torch.arange(4)), None)
        assert next(taken, None) is None  # and none was measured in vain
        return denoiser, chosen.model.compile, said

    return decided


def is_compiled(denoiser) -> bool:
    return any(module._compiled_call_impl is not None for module in denoiser.network.modules())


def test_a_short_run_tries_nothing_a_long_one_keeps_what_saves_more_than_it_took(ready):
    denoiser, choice, said = ready(10, 1.0)
    assert choice is False and not denoiser.compiled and not is_compiled(denoiser)
    assert said.endswith("(on a CPU), a fiftieth of the UNet's time in 10 iterations is 0 s")
    denoiser, choice, said = ready(10**6, 1.0, 1.1)
    assert choice is False and not denoiser.compiled and not is_compiled(denoiser)
    assert "take 1 s, compiled 1.1 s" in said and said.endswith("which 1000000 iterations do not save")
    denoiser, choice, said = ready(10**6, 1.0, 0.5)
    assert choice == "regional" and denoiser.compiled and is_compiled(denoiser)
    assert said.startswith("compile      auto: regional: UNet calls of an iteration take 1 s, compiled 0.5 s; compiling took")


def test_measuring_leaves_gradients_weights_and_random_numbers_alone(make_config):
    config = make_config()
    denoiser = ready_denoiser(config, CPU, trained=True)
    before = [p.detach().clone() for p in denoiser.trainable().values()]
    random = torch.get_rng_state()
    assert 0 < iteration_seconds(denoiser, config, Batches(config, torch.arange(4))) < 60
    assert torch.equal(random, torch.get_rng_state())
    assert all(p.grad is None for p in denoiser.network.parameters())
    assert all(torch.equal(p, was) for p, was in zip(denoiser.trainable().values(), before, strict=True))


def test_a_run_writes_down_what_was_decided_and_goes_on_with_it(make_config, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "compile", compile_as_traced)
    monkeypatch.setattr(compiling, "SECONDS_A_GRAPH", 0.0)
    measure, taken = compiling.iteration_seconds, iter((1e6, 1.0))
    monkeypatch.setattr(compiling, "iteration_seconds", lambda *args: measure(*args) and next(taken))
    forget()
    config = make_config(model={"compile": "auto"}, iterations=1)
    trainer = Trainer(config, leave_out=LEFT_OUT)
    assert trainer.config.model.compile == load_config(trainer.folder / "config.yaml").model.compile == "regional"
    assert "auto: regional: " in trainer.compiling and counters["stats"]["unique_graphs"] > 0
    trainer.train()
    assert read_rows(trainer.folder / "metrics.jsonl")[0]["policy/replay_max_dev"] == 0
    longer = config.model_copy(update={"iterations": 2})
    again = Trainer(longer, resume=True, leave_out=LEFT_OUT)  # which measures nothing: there are no more values
    assert again.config.model.compile == "regional" and again.denoiser.compiled and again.compiling is None
    again.train()
    assert len(read_rows(trainer.folder / "metrics.jsonl")) == 2


def test_where_it_could_not_be_compiled_auto_is_eager_and_the_plan_says_why(make_config, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    trace_nothing(monkeypatch)
    config = make_config(model={"compile": "auto"}, engine={"device": "cpu"})
    trainer = Trainer(config, leave_out=LEFT_OUT)
    assert trainer.config.model.compile is False and not trainer.denoiser.compiled
    says = "compile      auto: no: torch.compile needs a C++ compiler: install g++"
    assert trainer.compiling == says and says in plan(config)


def test_a_plan_has_both_times(make_config, monkeypatch):
    """Of one size of block: a graph for rollouts, one for updates, and a third with a KL."""
    trace_nothing(monkeypatch)
    config = make_config(model={"compile": "auto"}, iterations=100)
    denoiser = ready_denoiser(config, CPU)
    needed = compile_seconds(denoiser, Batches(config, torch.arange(4)))
    with_kl = make_config(kl={"weight": 0.1})
    assert needed == 2 * compiling.SECONDS_A_GRAPH
    assert compile_seconds(denoiser, Batches(with_kl, torch.arange(4))) == 3 * compiling.SECONDS_A_GRAPH

    def line(**more) -> str:
        (found,) = [line for line in plan(config, **more) if line.startswith("compile")]
        return found.removeprefix("compile      ")

    assert line() == (
        f"auto: tried if the UNet takes {needed * 50 / 100:.3g} s of each of 100 iterations: compiling takes about "
        f"{needed:.0f} s (on a CPU)"
    )
    about = f"compiling takes about {needed:.0f} s (on a CPU), a fiftieth of the UNet's time in 100 iterations is "
    assert line(it_per_s=2.0) == f"auto: tried when the run starts: {about}144 s"  # 72 s an iteration
    assert line(it_per_s=200.0) == f"auto: no: {about}1 s"
