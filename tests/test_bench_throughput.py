"""The throughput benchmark runs its systems on one case, adds up phases, and its ratios are those of one round."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from safetensors.torch import load_file

from fastloop.batches import Batches

PEER = '''#!{python}
"""A peer that takes two seconds for the iteration that fastloop does in one, and has no CUDA."""
import json, sys
if sys.argv[1] == "-c":
    print(json.dumps({{"trl": "0.23.1"}}))
    sys.exit()
json.dump({{"argv": sys.argv[1:]}}, open({seen!r}, "w"))
for line in sys.stdin:
    phases = {{"rollout": 1.0, "loss": 0.5, "backward": 0.25, "rest": 0.25}}
    print(json.dumps({{"seconds": 2.0, "cpu_seconds": 2.0, "phases": phases, "peak_bytes": 2**30}}), flush=True)
'''


@pytest.fixture(scope="module")
def bench(bench_module):
    return bench_module("throughput")


TINY = ["prompts.source=animals", "rewards=[{name: jpeg_incompressibility}]", "eval.prompts={source: animals, limit: 1}"]
TINY += ["prompts_per_step=4", "sampling.steps=2", "memory.rollout_batch=2", "memory.update_batch=2"]


def test_the_systems_take_turns_on_one_case_and_a_peer_gets_the_same(bench, tiny_sd, tmp_path, capsys):
    seen, peer = tmp_path / "seen.json", tmp_path / "python"
    peer.write_text(PEER.format(python=sys.executable, seen=str(seen)))
    peer.chmod(0o755)
    command = ["--adapters", "lora", "--systems", "baseline,fastloop,trl", "--peer-python", str(peer), "--repeats", "2"]
    command += ["--threads", "1", "--out", str(tmp_path / "out"), "--set", f"model.path={tiny_sd}", *TINY]
    assert bench.main(command) == 0
    printed = capsys.readouterr().out
    summary = json.loads((tmp_path / "out" / "throughput_cpu.json").read_text())
    (case,) = summary["cases"]
    rows = {row["system"]: row for row in case["rows"]}
    assert list(rows) == ["baseline", "fastloop", "trl"] and not any(row["problem"] for row in rows.values())
    for row in rows.values():
        assert [each["round"] for each in row["iterations"]] == [0, 1]
        for each in row["iterations"]:
            assert sum(each["phases"].values()) == pytest.approx(each["seconds"], rel=0.02, abs=0.02)
        assert set(row["phases"]) == set(bench.PHASES)
    for name in ("encode", "rollout", "decode", "loss", "backward", "optimizer"):
        assert rows["baseline"]["phases"][name] > 0 and rows["fastloop"]["phases"][name] > 0, name
    assert rows["baseline"]["x_baseline"] == 1
    assert rows["trl"]["images_per_s"] == 2 and rows["trl"]["tflops"]["update"] == pytest.approx(
        8 * case["unet_gflops"]["forward_backward"] / 0.75 / 1000
    )
    assert "| trl | 2 (2 to 2) |" in printed and (tmp_path / "out" / "throughput_cpu.md").read_text() in printed
    assert summary["versions"]["trl: trl"] == "0.23.1"
    script, told = json.loads(seen.read_text())["argv"]
    told = json.loads(told)
    assert script.endswith("bench/peer_trl.py") and len(told.pop("prompts")) == 45
    assert told.pop("folder").endswith("/pipeline")
    assert told == {
        "adapter": "lora",
        "dtype": "fp32",
        "reward": "jpeg_incompressibility",
        "steps": 2,
        "guidance_scale": 3.0,
        "images": 4,
        "batch": 2,
        "updates": 2,
        "lr": 3e-4,
        "clip_range": 1e-4,
        "gradient_checkpointing": False,
        "threads": 1,
    }


def test_a_worker_that_dies_leaves_its_last_words(bench, tmp_path):
    worker = bench.Worker("trl", [sys.executable, "-c", "raise SystemExit('no TRL here')"], tmp_path / "log", 1)
    with pytest.raises(RuntimeError, match="no TRL here"):
        worker.iterate()


def test_a_pipeline_saved_for_a_peer_has_clips_own_files_of_the_tokenizer_and_names_of_weights(bench, tiny_sd, tmp_path):
    config = bench.case_config("shapes", "lora", [f"model.path={tiny_sd}", *TINY])
    bench.save_for_peer(config, tmp_path / "pipeline")
    saved = json.loads((tmp_path / "pipeline/tokenizer/tokenizer.json").read_text())["model"]
    assert json.loads((tmp_path / "pipeline/tokenizer/vocab.json").read_text()) == saved["vocab"]
    merges = (tmp_path / "pipeline/tokenizer/merges.txt").read_text().splitlines()[1:]
    assert [tuple(line.split(" ")) for line in merges] == [tuple(pair) for pair in saved["merges"]]
    assert (tmp_path / "pipeline/unet/diffusion_pytorch_model.safetensors").exists()
    # without that level transformers 4 takes random weights
    named = load_file(tmp_path / "pipeline/text_encoder/model.safetensors")
    assert named and all(name.startswith("text_model.") for name in named)


def test_ratios_are_taken_within_a_round(bench):
    def rows(*seconds):
        return [{"round": i, "seconds": value} for i, value in enumerate(seconds)]

    # the machine is three times as slow in the second round, for both
    assert bench.ratio(rows(2, 6, 2), rows(1, 3, 1), "seconds") == 2
    assert bench.ratio(rows(2, 6), rows(4), "seconds") == 0.5


def test_phases_do_not_overlap_and_add_up_to_the_whole(bench_module, monkeypatch):
    worker = bench_module("worker")
    clock = iter(range(100))
    monkeypatch.setattr(worker.time, "perf_counter", lambda: next(clock))

    class Loop:
        def rollout(self):
            self.decode()

        def decode(self): ...

    loop, phases = Loop(), worker.Phases()
    phases.watch(loop, "rollout", "rollout")
    phases.watch(loop, "decode", "decode")
    phases.begin()  # at 1; the clock is read at every border
    loop.rollout()
    assert phases.end() == {"rest": 2, "rollout": 2, "decode": 1}


def test_flops_double_with_guidance_and_a_backward_through_all_weights_costs_two_forwards(bench):
    def flops(adapter, guidance):
        return bench.unet_flops(bench.case_config("shapes", adapter, [f"sampling.guidance_scale={guidance}"]))

    lora, full = flops("lora", 3), flops("full", 3)
    assert lora["forward"] == pytest.approx(2 * flops("lora", 1)["forward"], rel=1e-9)
    assert full["forward"] < lora["forward"] < 1.05 * full["forward"]  # the adapters themselves
    assert 2.9 < full["forward_backward"] / full["forward"] < 3.05
    assert 1.7 < lora["forward_backward"] / lora["forward"] < 2.2


def test_models_and_systems_that_are_not_there_are_refused(bench, capsys):
    for option, value in (("--models", "sd9"), ("--systems", "verl"), ("--adapters", "dora")):
        assert bench.main([option, value]) == 2 and f"{option}: unknown {value!r}" in capsys.readouterr().err
    assert bench.main(["--peer-python", "/nowhere"]) == 2 and "--peer-python: no file" in capsys.readouterr().err


def test_the_methods_relatives_are_systems_of_the_same_sizes_that_are_measured_where_asked_for(bench):
    own = sys.modules["throughput_systems"]
    for model in own.MODELS:
        plain = own.case_config(model, "lora")
        for name in own.RELATIVES:
            config = own.case_config(model, "lora", own.SYSTEMS[name])
            assert config.algorithm == name and config.images_per_rollout == plain.images_per_rollout
            assert config.updates_per_rollout == plain.updates_per_rollout
            assert config.memory.rollout_batch == plain.memory.rollout_batch
            rows = [Batches(c, torch.arange(c.sampling.steps)).rows for c in (plain, config)]
            assert name == "noise_ppo" or rows[1] == pytest.approx(rows[0], rel=0.25)  # of an odd number of steps half is more
