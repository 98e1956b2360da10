"""Fixtures of the tests: small models that they make themselves, and runs of seconds."""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import shutil
import signal
import sys
from pathlib import Path

# Under `python -m pytest` the root is on the path, and Hugging Face's libraries, which look for a package `kernels`, would
# find our folder. Under nohup SIGINT is ignored, and so it would be in what the tests start.
sys.path[:] = [path for path in sys.path if Path(path or ".").resolve() != Path(__file__).resolve().parent.parent]
signal.signal(signal.SIGINT, signal.default_int_handler)

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton is imported: its kernels then run on the CPU
from diffusers import PNDMScheduler
from tiny_pipelines import make_flux, make_klein, make_sd, make_sd3, make_sdxl

from fastloop.advantages import ADVANTAGES
from fastloop.errors import UserError
from fastloop.objectives import OBJECTIVES
from fastloop.recipes import parse_config

torch.set_num_threads(1)
SLOWEST = [
    f"test_{name}.py" for name in ("deepspeed", "launchers", "plan", "compile", "flow_families", "text_lora", "sdxl", "memory")
]


def pytest_collection_modifyitems(items) -> None:
    """The files that take longest come first, so that several processes end at about the same time."""
    order = {f"test_{name}.py": i for i, name in enumerate(SLOWEST)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))


BENCH = Path(__file__).resolve().parent.parent / "bench"


@pytest.fixture
def own_tables():
    """What a test puts into fastloop's tables of advantages and objectives, as bench/levers.py does, is taken out again."""
    before = [(table, dict(table)) for table in (ADVANTAGES, OBJECTIVES)]
    yield
    for table, entries in before:
        table.clear()
        table.update(entries)


@pytest.fixture(scope="session")
def bench_module():
    """A function of a name that gives the module of bench/, which is no package: its modules find each other by the path."""

    def load(name: str):
        spec = importlib.util.spec_from_file_location(name, BENCH / f"{name}.py")
        module = sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    sys.path.append(str(BENCH))  # last, so that it hides nothing
    yield load
    sys.path.remove(str(BENCH))


@pytest.fixture(scope="session")
def tiny_sd(tmp_path_factory) -> str:
    """Epsilon prediction, a DDIM scheduler."""
    return make_sd(tmp_path_factory.mktemp("sd"))


@pytest.fixture(scope="session")
def tiny_sd_v(tmp_path_factory) -> str:
    """v-prediction, a PNDM scheduler, as SD 2.x ships."""
    return make_sd(tmp_path_factory.mktemp("sd_v"), "v_prediction", PNDMScheduler)


@pytest.fixture(scope="session")
def tiny_sdxl(tmp_path_factory) -> str:
    """Epsilon prediction, an Euler scheduler, zeros for an absent negative prompt, as SDXL ships."""
    return make_sdxl(tmp_path_factory.mktemp("sdxl"))


@pytest.fixture(scope="session")
def tiny_sdxl_v(tmp_path_factory) -> str:
    """v-prediction, and an absent negative prompt is an empty text."""
    return make_sdxl(tmp_path_factory.mktemp("sdxl_v"), "v_prediction", zeros=False)


@pytest.fixture(scope="session")
def tiny_sd3(tmp_path_factory) -> str:
    """As SD 3.5 medium ships."""
    return make_sd3(tmp_path_factory.mktemp("sd3"))


@pytest.fixture(scope="session")
def tiny_sd3_plain(tmp_path_factory) -> str:
    """As SD 3 medium ships, without dual attention and norms of queries and keys, and without its T5."""
    return make_sd3(tmp_path_factory.mktemp("sd3_plain"), t5=False, of_network={"dual_attention_layers": (), "qk_norm": None})


@pytest.fixture(scope="session")
def tiny_flux(tmp_path_factory) -> str:
    """As FLUX.1 dev ships."""
    return make_flux(tmp_path_factory.mktemp("flux"))


@pytest.fixture(scope="session")
def tiny_schnell(tmp_path_factory) -> str:
    """As FLUX.1 schnell ships, without guidance as an input and without shifts of its times."""
    return make_flux(tmp_path_factory.mktemp("schnell"), schnell=True)


@pytest.fixture(scope="session")
def tiny_klein(tmp_path_factory) -> str:
    """As FLUX.2 klein base ships."""
    return make_klein(tmp_path_factory.mktemp("klein"))


@pytest.fixture
def make_config(tiny_sd, tmp_path):
    """A function of overrides (nested dictionaries) that gives the configuration of a run of seconds."""

    def make(**overrides):
        values = {
            "model": {"path": tiny_sd, "lora": {"rank": 2}},
            "prompts": {"source": "animals"},
            "rewards": [{"name": "jpeg_incompressibility"}],
            "eval": {"every": 2, "prompts": {"source": "animals", "limit": 3}, "images_per_prompt": 2, "grid": 3},
            "sampling": {"steps": 4, "guidance_scale": 2.0},
            "prompts_per_step": 3,
            "images_per_prompt": 2,
            "memory": {"rollout_batch": 4, "update_batch": 5, "vae_batch": 4},
            "optimizer": {"lr": 1e-2},
            "clip_range": 1e-2,
            "tracking": {"tensorboard": False},
            "checkpoint": {"every": 1},
            "iterations": 2,
            "output_dir": str(tmp_path / "run"),
        }
        for key, value in overrides.items():
            values[key] = {**values[key], **value} if isinstance(value, dict) and key in values else value
        return parse_config(values, "test")

    return make


@pytest.fixture
def no_report(monkeypatch):
    """The figures of the report take longer than a small run."""
    monkeypatch.setattr("fastloop.training_run.write_report", lambda folder: None)


@pytest.fixture
def make_trainer(make_config, no_report):
    """A function of overrides that gives a trainer; its files are closed in the end."""
    from fastloop.trainer import Trainer  # not for the tests that need no run

    made = []

    def make(**overrides) -> Trainer:
        made.append(Trainer(make_config(**overrides)))
        return made[-1]

    yield make
    for trainer in made:
        trainer.tracker.close()
        trainer.rewards.close()
        trainer.eval_rewards.close()


@pytest.fixture
def train(make_trainer, tmp_path):
    """A function of overrides that trains in a folder of its own and gives the trainer."""
    number, evaluation = itertools.count(), {"every": 100, "prompts": {"source": "animals", "limit": 1}}

    def train(**overrides):
        trainer = make_trainer(output_dir=str(tmp_path / f"run{next(number)}"), **{"eval": evaluation, **overrides})
        trainer.train()
        return trainer

    return train


@pytest.fixture
def make_flow_run(make_config, tmp_path, no_report):
    """A function that trains a tiny flow-matching model in a folder of a name, without guidance."""
    from fastloop.trainer import Trainer

    def make(path: str, length: int, name: str, resume: bool = False, model=None, sampling=None, **changes) -> Trainer:
        small = {
            "eval": {"every": 9, "prompts": {"source": "animals", "limit": 1}},
            "checkpoint": {"every": 1, "keep": 9},
            "memory": {"rollout_batch": 5, "update_batch": 5},
        }
        sampling = {"steps": 4, "eta": 0.7, "guidance_scale": 1.0, "height": 16, "width": 16, **(sampling or {})}
        model = {"path": path, "max_sequence_length": length, **(model or {})}
        values = small | changes
        trainer = Trainer(make_config(model=model, sampling=sampling, output_dir=str(tmp_path / name), **values), resume)
        trainer.train()
        return trainer

    return make


@pytest.fixture
def refuses_parts(make_config, tmp_path):
    """A function that changes a config file in a copy of a pipeline, and asserts that it is refused in one line."""
    from fastloop.preflight import preflight

    def refuses(path: str, part: str, values: dict, says: str) -> None:
        folder = Path(shutil.copytree(path, tmp_path / "copy"))
        file = folder / part / ("scheduler_config.json" if part == "scheduler" else "config.json")
        file.write_text(json.dumps(json.loads(file.read_text()) | values))
        with pytest.raises(UserError) as caught:
            preflight(make_config(model={"path": str(folder)}))
        assert says.replace("FOLDER", str(folder)) in str(caught.value) and "\n" not in str(caught.value)

    return refuses
