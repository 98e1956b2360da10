"""The profile of an iteration: what it writes, and that it finds what waits for the device in the inner loops."""

from __future__ import annotations

import json

import pytest
import torch

from fastloop import cli, train
from fastloop.config import dump_config
from fastloop.tracing import LABELS, profile_iteration
from fastloop.trainer import Trainer


def top(folder) -> list[str]:
    return (folder / "top.txt").read_text().splitlines()


@pytest.fixture
def profiled(make_config):
    """A function that profiles a run and gives the lines on waiting, with the trainer."""

    def run(spoil=lambda trainer: None, **overrides):
        trainer = Trainer(make_config(**overrides))
        spoil(trainer)
        folder = profile_iteration(trainer)
        trainer.train()
        return [line for line in top(folder) if line.startswith("host waits")], trainer

    return run


def test_it_writes_a_trace_with_the_phases_of_the_second_iteration_and_leaves_no_trace_in_the_trainer(profiled):
    _, trainer = profiled(iterations=3)
    events = json.loads((trainer.folder / "profile" / "trace.json").read_text())["traceEvents"]
    assert set(LABELS) <= {event["name"] for event in events}
    lines = top(trainer.folder / "profile")
    assert lines[0].startswith("iteration 2, profiled")
    calls = {line[:16].strip(): int(line[16:24]) for line in lines[5:14] if line[:16].strip() in LABELS}
    # 6 trajectories in 2 batches of 4 steps; 24 pairs in 2 updates of 3 micro-batches
    assert calls["rollout"] == 1 and calls["gradients"] == calls["optimizer step"] == 2
    assert calls["UNet forward"] == 2 * 4 + calls["backward"] and calls["backward"] == 6
    assert any("Self CPU" in line for line in lines) and any("aten::" in line for line in lines)
    patched = {"_rollout", "_update", "_add_gradients", "encode", "predict", "decode", "backward", "step"}
    assert not patched & {*vars(trainer), *vars(trainer.denoiser), *vars(trainer.engine)}


def test_nothing_in_the_inner_loops_waits_for_the_device(profiled):
    lines, _ = profiled()
    assert lines == [
        "host waits for the device, rollout: 0 in 8 UNet forwards",
        "host waits for the device, updates: 0 in 6 micro-batches",
    ]


def test_a_value_that_is_read_in_an_inner_loop_is_counted_and_named(profiled):
    def spoil(trainer):
        predict = trainer.denoiser.predict

        def curious(latents, *args):
            assert latents.mean().item() < 1e9
            return predict(latents, *args)

        trainer.denoiser.predict = curious

    lines, _ = profiled(spoil)
    assert lines[0].startswith("host waits for the device, rollout: 8 in 8 UNet forwards: aten::_local_scalar_dense 8")
    assert lines[1].startswith("host waits for the device, updates: 6 in 6 micro-batches: aten::_local_scalar_dense 6")


@pytest.mark.parametrize("entry", ["fastloop train", "fastloop/train.py"])
def test_both_entries_take_the_option(make_config, tmp_path, entry, capsys):
    path = tmp_path / "run.yaml"
    path.write_text(dump_config(make_config(iterations=1)))
    arguments = [str(path), "--profile"]
    code = cli.main(["train", *arguments]) if entry == "fastloop train" else train.main(["--config", *arguments])
    assert code == 0 and f"profile      of one iteration, in {tmp_path / 'run' / 'profile'}" in capsys.readouterr().out
    assert top(tmp_path / "run" / "profile")[0].startswith("iteration 1, profiled")
    assert torch.is_grad_enabled()
