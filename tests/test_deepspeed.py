"""DeepSpeed on two and three CPU ranks: trained as by the plain engine; its checkpoints resumed, exactly, or refused."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from on_ranks import needs_cpu, start, train_all, zero
from run_files import distance, equal, metrics, weights

from fastloop.batches import Batches
from fastloop.checkpoints import list_checkpoints
from fastloop.engines.deepspeed import _no_code_from_files, deepspeed_settings
from fastloop.errors import UserError
from fastloop.recipes import parse_config
from fastloop.trainer import Trainer

pytestmark = [needs_cpu, pytest.mark.timeout(1200)]


def merged(base: dict, changes: dict) -> dict:
    out = dict(base)
    for key, value in changes.items():
        out[key] = {**out[key], **value} if isinstance(value, dict) and key in out else value
    return out


def trajectories(folder: Path, ranks: int) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
    """Latents (T + 1, C, H, W) and log-probs (T,) by trajectory number."""
    found = {}
    for rank in range(ranks):
        ids, latents, log_probs = torch.load(folder / f"trajectories-{rank}.pt", weights_only=True)
        found |= {int(number): (latents[:, i], log_probs[:, i]) for i, number in enumerate(ids)}
    return found


# --- runs of the tiny model -------------------------------------------------------------------------------------------

FULL = {"model": {"adapter": "full"}, "optimizer": {"lr": 1e-3, "eps": 1e-4}}  # eps: AdamW would take rounding at its word
BF16 = {"model": {"adapter": "full", "dtype": "bf16"}, "safety": {"max_ratio_dev": 1e-3}}
OFFLOAD = {"optimizer": {"name": "cpu_adamw"}}
ONCE = {"iterations": 1}


# 9 trajectories: 5 and 4 on two ranks. Each stage, and each feature in one run at least, several of them in some
KL_AND_AVERAGE = {"kl": {"weight": 1e-3}, "ema": {"decay": 0.5}}
LIKE_TORCH = {
    **{f"lora-{stage}": zero(stage) for stage in (0, 1, 2)},
    "kl-average-3": zero(3) | KL_AND_AVERAGE,
    "kl-average-full-2": zero(2) | FULL | KL_AND_AVERAGE,
    "layerwise": zero(3, rollout_parameters="layerwise") | FULL | {"memory": {"gradient_checkpointing": True}} | ONCE,
    "offload-2": zero(2, offload_optimizer=True) | OFFLOAD | ONCE,
    "tracker": zero(2) | {"algorithm": "ppo"},
    "value-replay": zero(1) | {"algorithm": "dpok", "updates_per_rollout": 2, "value": {"width": 16, "lr": 1e-2, "batch": 20}},
    "loop-fast": zero(2) | {"algorithm": "loop_fast", "kl": {"every": 1}},
    "more-ranks-than-images": zero(3, rollout_parameters="layerwise")
    | {"algorithm": "reinforce", "advantage": "none", "prompts_per_step": 1, "images_per_prompt": 1, "updates_per_rollout": 1}
    | ONCE,
}
OTHERS_RESUMED = {
    "8bit-2": zero(2) | FULL | {"optimizer": {"name": "adamw8bit"}},
    "lion-bf16-1": zero(1) | BF16 | {"optimizer": {"name": "lion8bit", "lr": 1e-3}},
    "8bit-bf16-3": zero(3) | BF16 | {"optimizer": {"name": "adamw8bit"}},
    "offload-3": zero(3, offload_optimizer=True, offload_parameters=True) | FULL | OFFLOAD,
}
RESUMED = {
    name: LIKE_TORCH[name] for name in ("lora-0", "lora-1", "lora-2", "kl-average-3", "value-replay", "loop-fast")
} | OTHERS_RESUMED
OF_STAGE = {stage: name for stage, name in enumerate(RESUMED) if stage < 4}


@pytest.fixture(scope="session")
def base(tiny_sd) -> dict:
    return {
        "model": {"path": tiny_sd, "lora": {"rank": 2}},
        "prompts": {"source": "animals"},
        "rewards": [{"name": "on_ranks:contrast"}],
        "eval": {"every": 9, "prompts": {"source": "animals", "limit": 3}, "images_per_prompt": 1, "grid": 3},
        "sampling": {"steps": 3, "guidance_scale": 2.0},
        "prompts_per_step": 3,
        "images_per_prompt": 3,
        "memory": {"rollout_batch": 5, "update_batch": 6, "vae_batch": 4},
        "optimizer": {"lr": 1e-2},
        "clip_range": 1e-2,
        "tracking": {"tensorboard": False},
        "checkpoint": {"every": 1, "keep": 9},
        "iterations": 2,
    }


@pytest.fixture(scope="session")
def runs(base, tmp_path_factory) -> Path:
    """All of these in one start of two ranks: as torch would, and resumed as if killed after the first iteration."""
    folder = tmp_path_factory.mktemp("runs")
    todo = [
        merged(base, changes) | {"output_dir": str(folder / name)} for name, changes in (LIKE_TORCH | OTHERS_RESUMED).items()
    ]
    for name, changes in RESUMED.items():
        todo.append(merged(base, changes) | {"output_dir": str(folder / f"broken-{name}"), "resume": str(folder / name)})
    train_all(folder, 2, todo)
    return folder


def alone(values: dict, folder: Path, resume: bool = False) -> Trainer:
    """The same configuration on the plain engine, in this process."""
    values = {**values, "engine": {"name": "torch"}, "output_dir": str(folder)}
    if values["optimizer"].get("name") == "cpu_adamw":
        values["optimizer"] = {**values["optimizer"], "name": "adamw"}
    trainer = Trainer(parse_config(values, "test"), resume)
    trainer.train()
    return trainer


@pytest.mark.parametrize("name", LIKE_TORCH)
def test_two_ranks_train_as_the_plain_engine_does(runs, base, tmp_path, name):
    values = merged(base, LIKE_TORCH[name])
    wanted, last = alone(values, tmp_path / "alone").folder, values["iterations"]
    start = weights(wanted, 0)
    assert equal(weights(runs / name, 0), start)
    assert distance(weights(runs / name, last), weights(wanted, last), start) < 1e-3
    if "ema" in values:
        averages = (weights(folder, last, "ema") for folder in (runs / name, wanted))
        assert distance(*averages, start) < 1e-3
    compared = ["reward/mean", "reward/group_std", "image/entropy", "policy/grad_norm"]
    compared += ["policy/denoising_loss_better", "policy/kl_reference"] if name == "loop-fast" else ["policy/ratio_mean"]
    for mine, theirs in zip(metrics(runs / name), metrics(wanted), strict=True):
        assert mine.keys() == theirs.keys()
        for key in compared:
            assert mine[key] == pytest.approx(theirs[key], rel=2e-2, abs=1e-6), key
        if name not in ("loop-fast", "value-replay"):  # without a ratio, and with rows of an older policy
            assert mine["policy/ratio_first_dev"] < 1e-5
    if name != "loop-fast":
        assert metrics(runs / name)[0]["policy/replay_max_dev"] < 1e-5
    evals = [(folder / "eval.jsonl").read_text().splitlines() for folder in (runs / name, wanted)]
    for mine, theirs in zip(*([json.loads(line) for line in lines] for lines in evals), strict=True):
        assert mine["score"]["mean"] == pytest.approx(theirs["score"]["mean"], rel=1e-3)
    exported = [next((folder / "export").rglob("*.safetensors")) for folder in (runs / name, wanted)]
    assert exported[0].relative_to(runs / name) == exported[1].relative_to(wanted)


def test_each_rank_draws_the_trajectories_of_a_single_process(base, tmp_path):
    """Of the same numbers, bit for bit where the batches are the same; to rounding where they are not."""
    even = merged(base, {"prompts_per_step": 4, "images_per_prompt": 2, "iterations": 1})
    odd = merged(even, {"images_per_prompt": 3, "memory": {"rollout_batch": 5}})
    for ranks, name, values in ((2, "even", even), (3, "odd", odd)):
        train_all(tmp_path, ranks, [merged(values, zero(2)) | {"output_dir": str(tmp_path / name)}])
        trainer = Trainer(parse_config({**values, "output_dir": str(tmp_path / f"{name}-alone")}, "test"))
        kept, rollout = [], trainer.rollout
        trainer.rollout = lambda *args, rollout=rollout, kept=kept: kept.append(rollout(*args)) or kept[-1]
        trainer.train()
        found = trajectories(tmp_path / name, ranks)
        assert sorted(found) == kept[-1].ids.tolist()
        for i, number in enumerate(kept[-1].ids.tolist()):
            latents, log_probs = found[number]
            if name == "even":
                assert torch.equal(latents, kept[-1].latents[:, i]) and torch.equal(log_probs, kept[-1].log_probs[:, i])
            else:
                assert torch.equal(latents[0], kept[-1].latents[0, i])
                torch.testing.assert_close(latents, kept[-1].latents[:, i], rtol=1e-4, atol=1e-4)
        wanted = trainer.folder
        assert distance(weights(tmp_path / name, 1), weights(wanted, 1), weights(wanted, 0)) < 1e-3


@pytest.mark.parametrize("name", RESUMED)
def test_a_resumed_run_equals_the_unbroken_one_bit_for_bit_and_with_cpu_adamw_to_rounding(runs, name):
    broken, unbroken = runs / f"broken-{name}", runs / name
    assert json.loads((broken / "resumed.json").read_text()) == [1, None]
    assert not equal(weights(unbroken), weights(unbroken, 1))
    if name == "offload-3":  # DeepSpeedCPUAdam multiplies up its bias corrections, and after a resume takes powers
        assert distance(weights(broken), weights(unbroken), weights(unbroken, 1)) < 1e-4
        return
    assert equal(weights(broken), weights(unbroken))
    drop = ("seconds", "time/")
    for mine, theirs in zip(metrics(broken), metrics(unbroken), strict=True):
        assert {k: v for k, v in mine.items() if not k.startswith(drop)} == {
            k: v for k, v in theirs.items() if not k.startswith(drop)
        }


def test_a_run_goes_on_with_another_number_of_ranks_and_another_engine(runs, base, tmp_path):
    """The weights are carried over, the optimizer's state is not, and that is said."""
    folder = runs / "elsewhere"
    values = merged(base, zero(1)) | {"output_dir": str(folder), "resume": str(runs / "lora-2"), "iterations": 3}
    train_all(tmp_path, 3, [values])
    started, lost = json.loads((folder / "resumed.json").read_text())
    assert (started, lost) == (1, "the optimizer's state, which DeepSpeed on 2 ranks with engine.zero_stage=2 has written")
    trainer = alone({**base, "iterations": 4}, folder, resume=True)
    assert trainer.not_carried_over == "the optimizer's state, which DeepSpeed on 3 ranks with engine.zero_stage=1 has written"
    moved = [weights(runs / "elsewhere", i) for i in range(5)]
    assert not any(equal(one, other) for one, other in zip(moved, moved[1:], strict=False))
    rows = metrics(runs / "elsewhere")
    assert [row["iteration"] for row in rows] == [1, 2, 3, 4]
    whole = alone({**base, "iterations": 4}, tmp_path / "whole").folder
    # prompts and noise are those of a run that was never moved
    assert rows[1]["reward/mean"] == pytest.approx(metrics(whole)[1]["reward/mean"], rel=1e-3)


# --- whose files a checkpoint holds -----------------------------------------------------------------------------------

# ZeRO 0 writes the first kind alone, 1 and 2 write alike, and 3 has a file of each kind for every rank
PLANTED = [(0, "model_states"), (2, "optim_states"), (3, "model_states"), (3, "optim_states")]
EXCHANGED = (0, 2)


class Copies:
    """Unpickled, it copies a file."""

    def __init__(self, to: Path) -> None:
        self.to = str(to)

    def __reduce__(self):
        return shutil.copy, (__file__, self.to)


def plant(checkpoint: Path, files: str, to: Path) -> None:
    """Has these files of DeepSpeed's copy one when they are unpickled, and then be what they were."""
    found = list((checkpoint / "deepspeed").glob(files))
    assert found
    for path in found:
        with zipfile.ZipFile(path) as archive:
            parts = {name: archive.read(name) for name in archive.namelist()}
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in parts.items():
                if name.endswith("/data.pkl"):  # behind the two bytes that name the protocol
                    data = data[:2] + pickle.dumps(Copies(to), 2)[2:-1] + pickle.POP + data[2:]
                archive.writestr(name, data)


def unreadable(checkpoint: Path, why: str) -> str:
    return f"cannot read the checkpoint {checkpoint}: {why}; remove it to resume from another"


FOREIGN = (
    "a file in its deepspeed/ holds other things than tensors and DeepSpeed's own state (shutil.copy), and was not loaded"
)


@pytest.fixture(scope="session")
def changed(runs, base, tmp_path_factory) -> Path:
    """Copies of the runs above, their first checkpoint changed by somebody, all resumed in one start."""
    folder, todo = tmp_path_factory.mktemp("changed"), []

    def resume(name: str, stage: int, change: Callable[[Path], object], refused: bool) -> None:
        source = folder / "from" / name
        shutil.copytree(runs / OF_STAGE[stage], source)
        change(source / "checkpoints" / "iteration-000001")
        own = {"output_dir": str(folder / name), "resume": str(source), "refused": refused}
        todo.append(merged(base, RESUMED[OF_STAGE[stage]]) | own)

    def exchange(checkpoint: Path) -> None:
        shutil.rmtree(checkpoint / "deepspeed")
        shutil.copytree(checkpoint.with_name("iteration-000002") / "deepspeed", checkpoint / "deepspeed")

    def without_steps(checkpoint: Path) -> None:
        state = torch.load(checkpoint / "state.pt", weights_only=True)
        del state["engine"]["steps"]
        torch.save(state, checkpoint / "state.pt")

    for stage, kind in PLANTED:
        marker = folder / f"ran-{kind}-{stage}"
        resume(f"{kind}-{stage}", stage, lambda saved, kind=kind, to=marker: plant(saved, f"*{kind}.pt", to), True)
    for stage in EXCHANGED:
        resume(f"exchanged-{stage}", stage, exchange, True)
    resume("earlier", 2, without_steps, False)
    train_all(folder, 2, todo)
    return folder


@pytest.mark.parametrize("stage, kind", PLANTED)
def test_what_is_not_of_deepspeeds_state_is_refused_and_does_not_run(changed, stage, kind):
    assert not (changed / f"ran-{kind}-{stage}").exists()
    run = changed / f"{kind}-{stage}"
    assert (run / "refused.txt").read_text() == unreadable(run / "checkpoints" / "iteration-000001", FOREIGN)


@pytest.mark.parametrize("stage", EXCHANGED)
def test_deepspeeds_files_of_another_checkpoint_are_refused(changed, stage):
    run, source = changed / f"exchanged-{stage}", changed / "from" / f"exchanged-{stage}"
    saved = [torch.load(path / "state.pt", weights_only=True) for path in list_checkpoints(source / "checkpoints")]
    steps = [state["engine"]["steps"] for state in saved]
    why = f"its deepspeed/ is of another one, {steps[2]} optimizer steps old where this one is {steps[1]}"
    assert (run / "refused.txt").read_text() == unreadable(run / "checkpoints" / "iteration-000001", why)


def test_a_checkpoint_that_does_not_say_its_steps_is_taken_as_before(changed, runs):
    assert json.loads((changed / "earlier" / "resumed.json").read_text()) == [1, None]
    assert equal(weights(changed / "earlier"), weights(runs / "lora-2"))


@pytest.mark.parametrize("files", ["mp_rank_00_model_states.pt", "zero_pp_rank_1_*optim_states.pt"])
def test_a_resume_from_files_with_a_command_in_them_ends_in_one_line_with_code_2(runs, tmp_path, files):
    folder = shutil.copytree(runs / "lora-2", tmp_path / "run")
    checkpoint = folder / "checkpoints" / "iteration-000002"
    plant(checkpoint, files, tmp_path / "ran")
    args = ["--config", folder / "config.yaml", f"output_dir={folder}", "iterations=3", "--resume"]
    started = start(2, tmp_path, "fastloop/train.py", *args)
    codes = started.wait()
    assert codes[1] == 2 and codes[0] in (1, 2)  # 1: ended because the other one had failed
    errors = "".join(err for _, err in started.said())
    whose = "rank 1: " if "rank_1" in files else ""  # which alone reads that one
    assert [line for line in errors.splitlines() if line.startswith("fastloop:")] == [
        f"fastloop: {whose}{unreadable(checkpoint, FOREIGN)}"
    ]
    assert "Traceback" not in errors and not (tmp_path / "ran").exists()


def test_the_loss_scaler_of_fp16_is_read_and_the_environment_left_alone(tmp_path, monkeypatch):
    """fp16 itself needs a GPU."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler

    forced = ("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD")
    monkeypatch.delenv(forced[0], raising=False)
    monkeypatch.setenv(forced[1], "1")
    torch.save(DynamicLossScaler(2.0**16, 1000, 1.0, 1, False), tmp_path / "scaler.pt")
    torch.save(Copies(tmp_path / "ran"), tmp_path / "planted.pt")
    with _no_code_from_files():
        assert torch.load(tmp_path / "scaler.pt", weights_only=False).loss_scale == 2.0**16
    with pytest.raises(pickle.UnpicklingError), _no_code_from_files():
        torch.load(tmp_path / "planted.pt", weights_only=False)
    assert not (tmp_path / "ran").exists()
    assert [os.environ.get(name) for name in forced] == [None, "1"]
    assert DynamicLossScaler not in torch.serialization.get_safe_globals()


@pytest.mark.parametrize("key", ["nebula", "datastates_ckpt"])
def test_a_json_that_has_other_code_read_checkpoints_is_refused(make_config, tmp_path, key):
    path = tmp_path / "own.json"
    path.write_text(json.dumps({key: {"enabled": True}}))
    config = make_config(engine={"name": "deepspeed", "deepspeed_config": str(path)})
    with pytest.raises(UserError) as refused:
        deepspeed_settings(Batches(config, torch.arange(4)), 100)
    says = f"engine.deepspeed_config: {path}: {key}: it would read checkpoints by code that is not torch's: take it out"
    assert str(refused.value) == says
