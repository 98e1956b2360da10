"""The profile of an iteration: what it writes, and that it finds what waits for the device in the inner loops."""

from __future__ import annotations

import json

import pytest

from fastloop import tracing, train
from fastloop.recipes import dump_config
from fastloop.tracing import LABELS, Profile
from fastloop.trainer import Trainer


def top(folder) -> list[str]:
    return (folder / "top.txt").read_text().splitlines()


@pytest.fixture
def profiled(make_config):
    """A function that profiles a small run and gives the lines on waiting, with the trainer."""

    def run(spoil=lambda trainer: None):
        small = {"prompts_per_step": 2, "memory": {"rollout_batch": 2, "update_batch": 4}, "sampling": {"steps": 2}}
        config = make_config(**small, iterations=3, eval={"every": 9})
        profile = Profile(config)
        trainer = Trainer(config, observer=profile)
        spoil(trainer)
        trainer.train()
        return [line for line in top(profile.folder) if line.startswith("host waits")], trainer

    return run


def test_a_profile_has_the_phases_of_the_second_iteration_in_which_no_step_waits_for_the_device(profiled, monkeypatch):
    monkeypatch.setattr(tracing, "STEPS", 1)
    waits, trainer = profiled()
    assert waits == [
        "host waits for the device, rollout: 0 in the first 1 UNet forwards",
        "host waits for the device, updates: 0 in the first 1 micro-batches",
    ]
    events = json.loads((trainer.folder / "profile" / "trace.json").read_text())["traceEvents"]
    recorded = [event["name"] for event in events if event.get("cat") == "user_annotation"]
    assert recorded.count("predict") == 2 and recorded.count("backward") == 1
    assert recorded.count("decode") == recorded.count("step") == 2 and recorded.count("update") == 1
    lines = top(trainer.folder / "profile")
    assert lines[0].startswith("iteration 2, profiled")
    calls = {line[:16].strip(): int(line[16:24]) for line in lines if line[:16].strip() in LABELS}
    # 4 trajectories in 2 batches of 2 steps; 8 pairs in 2 updates of 1 micro-batch
    assert calls == {"rollout": 1, "encode": 4, "predict": 6, "decode": 2, "update": 1, "gradients": 2} | {
        "backward": 2,
        "step": 2,
    }
    assert any("Self CPU" in line for line in lines) and any("aten::" in line for line in lines)


def test_a_value_that_is_read_in_an_inner_loop_is_counted_and_named(profiled):
    def spoil(trainer):
        trainer.denoiser.network.register_forward_pre_hook(lambda unet, args: None if args[0].mean().item() < 1e9 else args)

    lines, _ = profiled(spoil)
    assert lines[0] == "host waits for the device, rollout: 4 in the first 4 UNet forwards: aten::_local_scalar_dense 4"
    assert lines[1] == "host waits for the device, updates: 2 in the first 2 micro-batches: aten::_local_scalar_dense 2"


def test_the_entry_of_launchers_takes_the_option_as_the_command_line_does(make_config, tmp_path, capsys):
    path = tmp_path / "run.yaml"
    path.write_text(dump_config(make_config(iterations=1, prompts_per_step=1, sampling={"steps": 2})))
    assert train.main(["--config", str(path), "--profile"]) == 0
    assert f"profile      of one iteration, in {tmp_path / 'run' / 'profile'}" in capsys.readouterr().out
    assert top(tmp_path / "run" / "profile")[0].startswith("iteration 1, profiled")
