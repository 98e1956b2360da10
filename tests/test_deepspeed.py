"""DeepSpeed through its real launcher, on two and three CPU ranks: what is trained, resumed, killed and refused."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from fastloop.batches import Batches
from fastloop.checkpoints import list_checkpoints
from fastloop.engines.deepspeed import _no_code_from_files, deepspeed_settings
from fastloop.errors import UserError
from fastloop.recipes import load_config, parse_config
from fastloop.trainer import Trainer

ROOT = Path(__file__).resolve().parent.parent
STAGES = (0, 1, 2, 3)

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="its launcher would take the GPUs; tests/gpu has those"),
    pytest.mark.timeout(600),
]


# --- launching --------------------------------------------------------------------------------------------------------


def command(ranks: int, *args) -> list[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = str(Path(sys.executable).parent / "deepspeed")
    return [launcher, "--num_accelerators", str(ranks), "--master_port", str(port), *map(str, args)]


def environment() -> dict[str, str]:
    # PYTHONPATH: for the rewards of these tests. Interpreted kernels are for the tests of kernels
    own = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "tests")}
    return {**{k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}, **own}


def launch(ranks: int, *args, code: int = 0, timeout: float = 550) -> subprocess.CompletedProcess:
    start = command(ranks, *args)
    done = subprocess.run(start, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=timeout)
    assert done.returncode == code, done.stdout[-3000:] + done.stderr[-3000:]
    port = start[start.index("--master_port") + 1]
    assert not list(Path("/dev/shm").glob(f"deepspeed_*_{port}_*"))  # which DeepSpeed leaves behind
    return done


def train_all(folder: Path, ranks: int, runs: list[dict]) -> None:
    configs = folder / f"configs-{ranks}.json"
    configs.write_text(json.dumps(runs))
    launch(ranks, "tests/train_all.py", configs)


def merged(base: dict, changes: dict) -> dict:
    out = dict(base)
    for key, value in changes.items():
        out[key] = {**out[key], **value} if isinstance(value, dict) and key in out else value
    return out


def weights(folder: Path, iteration: int = 2, name: str = "weights") -> dict[str, torch.Tensor]:
    return load_file(folder / "checkpoints" / f"iteration-{iteration:06d}" / f"{name}.safetensors")


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def distance(found: dict, wanted: dict, start: dict) -> float:
    """Of the weights from those wanted, as a share of the way that training took them."""
    total = sum((found[k] - wanted[k]).square().sum() for k in wanted)
    return float((total / sum((wanted[k] - start[k]).square().sum() for k in wanted)) ** 0.5)


def equal(one: dict, other: dict) -> bool:
    return set(one) == set(other) and all(torch.equal(one[key], other[key]) for key in one)


def trajectories(folder: Path, ranks: int) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
    """Latents (T + 1, C, H, W) and log-probs (T,) by trajectory number."""
    found = {}
    for rank in range(ranks):
        ids, latents, log_probs = torch.load(folder / f"trajectories-{rank}.pt", weights_only=True)
        found |= {int(number): (latents[:, i], log_probs[:, i]) for i, number in enumerate(ids)}
    return found


def contrast(images, prompts, metadata):
    """A reward that rounding moves little: a JPEG's size jumps by a byte."""
    return images.astype(float).std((1, 2, 3))


# --- runs of the tiny model -------------------------------------------------------------------------------------------

FULL = {"model": {"adapter": "full"}}
BF16 = {"model": {"adapter": "full", "dtype": "bf16"}, "safety": {"max_ratio_dev": 1e-3}}
OFFLOAD = {"optimizer": {"name": "cpu_adamw"}}


def zero(stage: int, **keys) -> dict:
    return {"engine": {"name": "deepspeed", "zero_stage": stage, **keys}}


# 9 trajectories: 5 and 4 on two ranks
LIKE_TORCH = {
    **{f"lora-{stage}": zero(stage) for stage in STAGES},
    "layerwise": zero(3, rollout_parameters="layerwise") | FULL | {"memory": {"gradient_checkpointing": True}},
    "kl-lora": zero(3) | {"kl": {"weight": 0.1}},
    "kl-full": zero(2) | FULL | {"kl": {"weight": 1e-3}},
    "average-1": zero(1) | FULL | {"ema": {"decay": 0.5}},
    "average-3": zero(3) | {"ema": {"decay": 0.5}},
    "offload-2": zero(2, offload_optimizer=True) | OFFLOAD,
    "tracker": zero(2) | {"algorithm": "ppo"},
    "more-ranks-than-images": zero(3, rollout_parameters="layerwise")
    | {"algorithm": "reinforce", "advantage": "none", "prompts_per_step": 1, "images_per_prompt": 1, "updates_per_rollout": 1},
}
OTHERS_RESUMED = {
    "8bit-2": zero(2) | FULL | {"optimizer": {"name": "adamw8bit"}},
    "8bit-3": zero(3) | FULL | {"optimizer": {"name": "adamw8bit"}},
    "lion-1": zero(1) | FULL | {"optimizer": {"name": "lion8bit", "lr": 1e-3}},
    "bf16-1": zero(1) | BF16,
    "bf16-3": zero(3) | BF16,
    "offload-3": zero(3, offload_optimizer=True, offload_parameters=True) | FULL | OFFLOAD,
}
RESUMED = {f"lora-{stage}": LIKE_TORCH[f"lora-{stage}"] for stage in STAGES} | OTHERS_RESUMED


@pytest.fixture(scope="session")
def base(tiny_sd) -> dict:
    return {
        "model": {"path": tiny_sd, "lora": {"rank": 2}},
        "prompts": {"source": "animals"},
        "rewards": [{"name": "test_deepspeed:contrast"}],
        "eval": {"every": 9, "prompts": {"source": "animals", "limit": 3}, "images_per_prompt": 1, "grid": 3},
        "sampling": {"steps": 4, "guidance_scale": 2.0},
        "prompts_per_step": 3,
        "images_per_prompt": 3,
        "memory": {"rollout_batch": 4, "update_batch": 5, "vae_batch": 4},
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
    wanted = alone(merged(base, LIKE_TORCH[name]), tmp_path / "alone").folder
    start = weights(wanted, 0)
    assert equal(weights(runs / name, 0), start)
    assert distance(weights(runs / name), weights(wanted), start) < 1e-3
    if (wanted / "checkpoints" / "iteration-000002" / "ema.safetensors").exists():
        averages = (weights(folder, name="ema") for folder in (runs / name, wanted))
        assert distance(*averages, start) < 1e-3
    for mine, theirs in zip(metrics(runs / name), metrics(wanted), strict=True):
        assert mine.keys() == theirs.keys()
        assert mine["policy/ratio_first_dev"] < 1e-5
        for key in ("reward/mean", "reward/group_std", "image/entropy", "policy/grad_norm", "policy/ratio_mean"):
            assert mine[key] == pytest.approx(theirs[key], rel=2e-2, abs=1e-6), key
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
    values = merged(base, zero(3)) | {"output_dir": str(folder), "resume": str(runs / "lora-2"), "iterations": 3}
    train_all(tmp_path, 3, [values])
    started, lost = json.loads((folder / "resumed.json").read_text())
    assert (started, lost) == (1, "the optimizer's state, which DeepSpeed on 2 ranks with engine.zero_stage=2 has written")
    trainer = alone({**base, "iterations": 4}, folder, resume=True)
    assert trainer.not_carried_over == "the optimizer's state, which DeepSpeed on 3 ranks with engine.zero_stage=3 has written"
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
        shutil.copytree(runs / f"lora-{stage}", source)
        change(source / "checkpoints" / "iteration-000001")
        own = {"output_dir": str(folder / name), "resume": str(source), "refused": refused}
        todo.append(merged(base, zero(stage)) | own)

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


# --- the command as typed ---------------------------------------------------------------------------------------------

SHORT = [
    "prompts_per_step=3",
    "images_per_prompt=2",
    "sampling.steps=6",
    "iterations=2",
    "checkpoint.every=1",
    "checkpoint.keep=9",
    "eval.prompts.limit=2",
    "eval.images_per_prompt=1",
    "eval.grid=2",
    "memory.rollout_batch=2",
    "tracking.tensorboard=false",
]


def recipe(stage: int, folder: Path, *more: str) -> list[str]:
    keys = ["engine.name=deepspeed", f"engine.zero_stage={stage}", *SHORT, f"output_dir={folder}", *more]
    return ["fastloop/train.py", "--config", "configs/shapes_loop.yaml", *keys]


@pytest.fixture(scope="session")
def bundled_alone(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("bundled")
    done = [
        sys.executable,
        "fastloop/train.py",
        "--config",
        "configs/shapes_loop.yaml",
        *SHORT,
        f"output_dir={folder / 'run'}",
    ]
    subprocess.run(done, cwd=ROOT, env=environment(), check=True, capture_output=True)
    return folder / "run"


@pytest.fixture(scope="session")
def bundled(tmp_path_factory) -> Path:
    """The bundled model with ZeRO 2, six iterations without an interruption."""
    folder = tmp_path_factory.mktemp("unbroken") / "run"
    launch(2, *recipe(2, folder, "iterations=6"))
    return folder


def test_the_command_of_the_readme_trains_and_one_rank_speaks(bundled_alone, tmp_path):
    done = launch(2, *recipe(2, tmp_path / "run"))
    assert done.stdout.count("held-out score") == 3 and done.stdout.count("[2/2] reward") == 1
    assert "Traceback" not in done.stdout + done.stderr
    assert distance(weights(tmp_path / "run"), weights(bundled_alone), weights(bundled_alone, 0)) < 1e-3
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert run["status"] == "finished" and run["machine"]["ranks"] == 2


def test_every_stage_trains_the_bundled_model(bundled_alone, tmp_path):
    folders = {stage: tmp_path / str(stage) for stage in STAGES}
    configs = [load_config(ROOT / keys[2], keys[3:]) for keys in (recipe(*item) for item in folders.items())]
    train_all(tmp_path, 2, [config.model_dump(mode="json") for config in configs])
    for folder in folders.values():
        assert distance(weights(folder), weights(bundled_alone), weights(bundled_alone, 0)) < 1e-3


def start_and_wait(folder: Path, line: str, *args) -> subprocess.Popen:
    """A launcher in the background, once a line of its output begins so."""
    log = folder.parent / "log.txt"
    with log.open("w") as out:
        process = subprocess.Popen(
            command(2, *args), cwd=ROOT, env=environment(), stdout=out, stderr=subprocess.STDOUT, start_new_session=True
        )
    until = time.monotonic() + 120
    while not any(text.startswith(line) for text in log.read_text().splitlines()):
        assert process.poll() is None and time.monotonic() < until, log.read_text()[-3000:]
        time.sleep(0.05)
    return process


def ranks_of(process: subprocess.Popen) -> list[psutil.Process]:
    found = [child for child in psutil.Process(process.pid).children(recursive=True) if "--local_rank" in str(child.cmdline())]
    return sorted(found, key=lambda child: child.environ()["RANK"])


def test_killed_by_sigkill_of_a_rank_and_resumed_it_equals_the_unbroken_run(bundled, tmp_path):
    args = recipe(2, tmp_path / "run", "iterations=6")
    process = start_and_wait(tmp_path / "run", "[3/6]", *args)
    ranks_of(process)[1].send_signal(signal.SIGKILL)
    assert process.wait(60) != 0
    assert weights(tmp_path / "run", 2)  # whole checkpoints are left
    assert not (tmp_path / "run" / "checkpoints" / "iteration-000006").exists()
    launch(2, *args, "--resume")
    assert equal(weights(tmp_path / "run", 6), weights(bundled, 6))
    assert [row["iteration"] for row in metrics(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("whom", ["launcher", "rank"])
def test_stopped_by_sigterm_it_saves_and_resumed_it_equals_the_unbroken_run(bundled, tmp_path, whom):
    args = recipe(2, tmp_path / "run", "iterations=6", "checkpoint.every=99")
    process = start_and_wait(tmp_path / "run", "[2/6]", *args)
    first = ranks_of(process)
    (first[0].parent() if whom == "launcher" else first[1]).send_signal(signal.SIGTERM)
    assert process.wait(60) != 0
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert run["status"] == "stopped" and re.fullmatch(r"stopped by SIGTERM after iteration [2-5]", run["message"])
    saved = int(run["message"].split()[-1])
    assert weights(tmp_path / "run", saved)
    launch(2, *args, "--resume")
    assert equal(weights(tmp_path / "run", 6), weights(bundled, 6))


@pytest.mark.parametrize("files", ["mp_rank_00_model_states.pt", "zero_pp_rank_1_*optim_states.pt"])
def test_a_resume_from_files_with_a_command_in_them_ends_in_one_line_with_code_2(bundled, tmp_path, files):
    shutil.copytree(bundled, tmp_path / "run")
    checkpoint = tmp_path / "run" / "checkpoints" / "iteration-000006"
    plant(checkpoint, files, tmp_path / "ran")
    done = launch(2, *recipe(2, tmp_path / "run", "iterations=6"), "--resume", code=2)
    said = [line for line in done.stderr.splitlines() if line.startswith("fastloop:")]
    whose = "rank 1: " if "rank_1" in files else ""  # which alone reads that one
    assert said == [f"fastloop: {whose}{unreadable(checkpoint, FOREIGN)}"] and "Traceback" not in done.stdout + done.stderr
    assert not (tmp_path / "ran").exists()


def fails_on_the_second_rank(images, prompts, metadata):
    """A reward of these tests."""
    if os.environ["RANK"] == "1":
        raise ConnectionError("the judge is away")
    return images.mean((1, 2, 3))


def test_a_failure_on_one_rank_ends_all_with_its_own_message(tmp_path):
    args = recipe(3, tmp_path / "run", 'rewards=[{name: "test_deepspeed:fails_on_the_second_rank"}]')
    started = time.monotonic()
    done = launch(2, *args, code=1)
    assert time.monotonic() - started < 90
    said = [line for line in done.stderr.splitlines() if line.startswith("fastloop:")]
    assert len(said) == 1 and "Traceback" not in done.stderr
    name = "test_deepspeed:fails_on_the_second_rank"
    message = rf"rank 1: reward {name} failed for the prompt '.*': ConnectionError: the judge is away"
    assert re.fullmatch(f"fastloop: {message}", said[0])
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert run["status"] == "failed" and re.search(message, run["message"])


def test_bad_input_is_one_line_of_one_rank(tmp_path):
    done = launch(2, *recipe(2, tmp_path / "run", "model.path=/nowhere"), code=2)
    said = [line for line in done.stderr.splitlines() if line.startswith("fastloop:")]
    assert said == ["fastloop: model.path: no folder /nowhere: give a diffusers folder, a hub id OWNER/NAME, or assets:shapes"]
    assert not (tmp_path / "run").exists()


def test_several_ranks_need_the_engine_for_them(tmp_path):
    done = launch(2, *recipe(2, tmp_path / "run", "engine={name: torch}"), code=2)
    assert "fastloop: engine.name: torch is for one process, the launcher started 2: set it to deepspeed" in done.stderr


def test_ranks_leave_with_exit_code_0_whenever_they_look_for_failures(tmp_path):
    """Looking without pause, so that Python would end in the middle of a look."""
    lines = ["from fastloop import ranks", "ranks._POLL = 0.0", "with ranks.Ranks.join() as joined:", "    joined.wait()"]
    script = tmp_path / "leave.py"
    script.write_text("\n".join(lines))
    for _ in range(3):
        launch(3, script)


def test_two_machines_without_ssh_make_one_run(bundled_alone, tmp_path):
    """Two launchers, as on two machines, each with the hostfile and its number."""
    hosts = tmp_path / "hosts"
    hosts.write_text("first slots=1\nsecond slots=1\n")
    launcher, *_, port = command(1)
    start = [launcher, "--hostfile", str(hosts), "--no_ssh", "--master_addr", "127.0.0.1", "--master_port", port]
    machines = [
        subprocess.Popen(
            [*start, "--node_rank", str(number), *recipe(1, tmp_path / "run")],
            cwd=ROOT,
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for number in range(2)
    ]
    said = [machine.communicate(timeout=300)[0] for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], said
    assert [text.count("[2/2] reward") for text in said] == [1, 0]
    assert distance(weights(tmp_path / "run"), weights(bundled_alone), weights(bundled_alone, 0)) < 1e-3


def test_the_variables_that_slurm_can_set_are_enough(bundled_alone, tmp_path):
    port = command(1)[-1]
    own = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks = [
        subprocess.Popen(
            [sys.executable, *recipe(2, tmp_path / "run")],
            cwd=ROOT,
            env=environment() | own | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    said = [rank.communicate(timeout=300)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], said
    assert distance(weights(tmp_path / "run"), weights(bundled_alone), weights(bundled_alone, 0)) < 1e-3


def test_one_process_needs_no_launcher(bundled_alone, tmp_path):
    done = [sys.executable, *recipe(2, tmp_path / "run")]
    subprocess.run(done, cwd=ROOT, env=environment(), check=True, capture_output=True, timeout=300)
    assert distance(weights(tmp_path / "run"), weights(bundled_alone), weights(bundled_alone, 0)) < 1e-3
