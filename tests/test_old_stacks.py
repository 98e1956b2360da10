"""Exports in the hands of people who have not updated: diffusers 0.31 and transformers 4.46, in an environment of their own.

Slow, and from the package index: ``pytest -m slow tests/test_old_stacks.py``.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest
import torch
from ldm_files import names_of, save
from test_single_file import StableDiffusionPipeline, StableDiffusionXLPipeline, pipeline_of

from fastloop.config import ModelConfig
from fastloop.denoisers import load_denoiser
from fastloop.denoisers.single_file import write_tokenizer

OLD = ("diffusers==0.31.0", "transformers==4.46.3", "huggingface_hub==0.26.5", "tokenizers==0.20.3")
OLD += ("peft==0.13.2", "accelerate==1.1.1")
KINDS = {"sd15": StableDiffusionPipeline, "sdxl": StableDiffusionXLPipeline}


@pytest.fixture(scope="module")
def old_python(tmp_path_factory) -> Path:
    """A Python with those versions before the packages of this one, so that torch is not installed again."""
    folder = tmp_path_factory.mktemp("old") / "env"
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    python = folder / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", *OLD], check=True)
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "current.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return python


def trained(path: str, **model):
    """A model with random weights where it is trained."""
    denoiser = load_denoiser(ModelConfig(path=path, **model), torch.device("cpu"))
    denoiser.train_adapter(gradient_checkpointing=False, seed=0)
    torch.manual_seed(7)
    for parameter in denoiser.trainable().values():
        parameter.data = parameter.data + 0.1 * torch.randn_like(parameter)
    return denoiser


@pytest.mark.slow
def test_exports_draw_the_same_pictures_in_old_and_current_diffusers(old_python, tmp_path, monkeypatch):
    """Whole pipelines, of a folder and of one file; adapters, on text encoders too, with another alpha than rank; kohya's."""
    cases: dict[str, dict] = {}
    for name, kind in KINDS.items():
        base = tmp_path / f"{name}-base"
        names_ldm = names_of(pipeline_of(base, kind))
        for tokenizer, pad in (("tokenizer", "<|endoftext|>"), ("tokenizer_2", "!")):
            if (base / tokenizer).exists():
                shutil.rmtree(base / tokenizer)
                write_tokenizer(base / tokenizer, pad, 16)
        save(names_ldm, tmp_path / f"{name}.safetensors")
        lora = {"rank": 4, "alpha": 2.0, "text_encoders": True}
        adapters = trained(str(base), lora=lora)
        adapters.export(tmp_path / f"{name}-lora")
        adapters.export(tmp_path / f"{name}-kohya", format="kohya")
        trained(str(base), adapter="full").export(tmp_path / f"{name}-full")
        configs = tmp_path / "architectures"
        shutil.copytree(base, configs / name, ignore=shutil.ignore_patterns("tokenizer*", "*.safetensors"))
        with monkeypatch.context() as patched:
            patched.setattr("fastloop.denoisers.files.ARCHITECTURES", configs)
            trained(str(tmp_path / f"{name}.safetensors"), adapter="full").export(tmp_path / f"{name}-single")
        whole = {"class": kind.__name__}
        for form in ("full", "single"):
            cases[f"{name} {form}"] = whole | {"folder": str(tmp_path / f"{name}-{form}")}
        cases[f"{name} base"] = whole | {"folder": str(tmp_path / f"{name}-single")}
        for form in ("lora", "kohya"):
            file = tmp_path / f"{name}-{form}" / "pytorch_lora_weights.safetensors"
            cases[f"{name} {form}"] = whole | {"folder": str(tmp_path / f"{name}-full"), "lora": str(file)}
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    found = {}
    for label, python in (("current", sys.executable), ("old", old_python)):
        command = [
            str(python),
            str(Path(__file__).parent / "draw_stock.py"),
            str(tmp_path / "cases.json"),
            str(tmp_path / label),
        ]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 0, done.stderr[-3000:]
        assert ("0.31.0 4.46.3" in done.stdout) == (label == "old")
        found[label] = np.load(tmp_path / f"{label}.npz")
    for case in cases:
        assert np.abs(found["old"][case] - found["current"][case]).max() < 1e-4, case
    for name in KINDS:  # and the files do something
        pictures = [found["old"][f"{name} {form}"] for form in ("full", "lora")]
        assert np.abs(pictures[0] - pictures[1]).max() > 1e-3
        assert np.abs(found["old"][f"{name} lora"] - found["old"][f"{name} kohya"]).max() < 1e-4
