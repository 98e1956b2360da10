"""Full-size architectures without weights: their sizes, their plan, and random weights in place of files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from fastloop.checkpoints import list_checkpoints, load_checkpoint
from fastloop.config import ModelConfig
from fastloop.denoisers import load_denoiser
from fastloop.errors import UserError
from fastloop.plan import overview
from fastloop.preflight import preflight
from fastloop.recipes import dump_config, load_config
from fastloop.trainer import Trainer

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parent.parent
PUBLISHED = {  # parameters, and the side of their pictures
    "sd15": ({"unet": 859_520_964, "text_encoder": 123_060_480, "vae": 83_653_863}, 512),
    "sd2": ({"unet": 865_910_724, "text_encoder": 340_387_840, "vae": 83_653_863}, 768),
    "sdxl": (
        {"unet": 2_567_463_684, "text_encoder": 123_060_480, "text_encoder_2": 694_659_840, "vae": 83_653_863},
        1024,
    ),
    "sd35_medium": (
        {
            "transformer": 2_243_171_520,
            "text_encoder": 123_650_304,
            "text_encoder_2": 694_659_840,
            "text_encoder_3": 4_762_310_656,
            "vae": 83_819_683,
        },
        1024,
    ),
    "flux_dev": (
        {
            "transformer": 11_901_408_320,
            "text_encoder": 123_060_480,
            "text_encoder_2": 4_762_310_656,
            "vae": 83_819_683,
        },
        1024,
    ),
    "klein_base_4b": ({"transformer": 3_875_544_576, "text_encoder": 4_022_468_096, "vae": 84_046_115}, 1024),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_architecture_has_the_published_size(make_config, name):
    model = {"path": None, "random_init": name, "dtype": "bf16", "lora": {"rank": 4}}
    checked, (sizes, side) = preflight(make_config(model=model)), PUBLISHED[name]
    frozen = {  # all but the adapters
        part: sum(p.numel() for p in module.parameters() if not p.requires_grad)
        for part, module in checked.skeleton.parts.items()
    }
    assert frozen == sizes
    assert overview(checked)[0] == f"model        {name} with random weights, lora, bf16, {side} x {side} pixels"


@pytest.fixture
def tiny_architecture(tiny_sd, tmp_path, monkeypatch) -> None:
    """Puts the tiny model's configs, without its weights and words, where those of SD 1.5 are."""
    folder = Path(shutil.copytree(tiny_sd, tmp_path / "architectures" / "sd15"))
    shutil.rmtree(folder / "tokenizer")
    for file in folder.rglob("*.safetensors"):
        file.unlink()
    monkeypatch.setattr("fastloop.denoisers.files.ARCHITECTURES", folder.parent)


def state(denoiser) -> dict[str, torch.Tensor]:
    return {f"{part}.{name}": p for part, module in denoiser.parts.items() for name, p in module.state_dict().items()}


def test_random_weights_are_the_same_in_every_process_and_leave_the_random_numbers_alone(tiny_architecture):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first = state(load_denoiser(ModelConfig(path=None, random_init="sd15"), CPU))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(4)
    again = state(load_denoiser(ModelConfig(path=None, random_init="sd15"), CPU))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert all(value.isfinite().all() for value in first.values())
    half = state(load_denoiser(ModelConfig(path=None, random_init="sd15", dtype="bf16"), CPU))
    assert {value.dtype for value in half.values() if value.is_floating_point()} == {torch.bfloat16}
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.parametrize("adapter", ["lora", "full"])
def test_a_model_without_files_trains_resumes_and_is_exported(make_config, tiny_architecture, tmp_path, monkeypatch, adapter):
    monkeypatch.setattr("fastloop.training_run.write_report", lambda folder: None)  # takes longer than these runs

    def config(folder: str, iterations: int):
        model = {"path": None, "random_init": "sd15", "adapter": adapter}
        few = {"every": 9, "images_per_prompt": 1, "grid": 1, "prompts": {"source": "animals", "limit": 1}}
        return make_config(model=model, eval=few, iterations=iterations, output_dir=str(tmp_path / folder))

    whole = Trainer(config("whole", 2))
    whole.train()
    Trainer(config("broken", 1)).train()
    assert load_config(tmp_path / "broken" / "config.yaml").model.random_init == "sd15"
    Trainer(config("broken", 2), resume=True).train()
    weights, _, _ = load_checkpoint(list_checkpoints(tmp_path / "broken" / "checkpoints")[-1], averaged=False)
    assert all(torch.equal(weights[name], p) for name, p in whole.parameters.items())
    if adapter == "full":
        pipeline = whole.denoiser.pipeline_class.from_pretrained(tmp_path / "whole" / "export")
        trained = whole.denoiser.network.state_dict()
        assert all(torch.equal(trained[name], value) for name, value in pipeline.unet.state_dict().items())
    rows = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert rows[0]["policy/replay_max_dev"] < 1e-5


@pytest.mark.parametrize(
    "model, says",
    [
        ({"random_init": "sd15"}, "model.path: ./folder, but model.random_init=sd15 reads no files: set one of them to null"),
        ({"random_init": "sd15", "path": None, "variant": "fp16"}, "model.variant: fp16, but model.random_init=sd15 reads no"),
        ({"random_init": "sd15", "path": None, "revision": "main"}, "model.revision: main, but model.random_init=sd15 reads"),
        ({"path": None}, "model.path: no model: give assets:shapes, a folder, a file or a hub id"),
    ],
    ids=str,
)
def test_random_weights_and_files_are_not_mixed(make_config, model, says):
    with pytest.raises(UserError) as caught:
        make_config(model={"path": "./folder", **model})
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_the_written_configuration_reads_back(make_config, tmp_path):
    config = make_config(model={"path": None, "random_init": "sd2"})
    (tmp_path / "config.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "config.yaml") == config


# those that need no files of the user's; the recipes of the rewards are in test_recipes.py
RECIPES = sorted(
    path
    for pattern in ("sdxl_lora_*", "sdxl_full_*", "sd15_*compressibility*", "sd2_*")
    for path in (ROOT / "configs").glob(f"{pattern}.yaml")
)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_full_size_recipe_fits_its_architecture_and_says_what_it_needs_and_how_it_was_verified(path):
    name = path.name.split("_")[0]
    config = load_config(path, ["model.path=null", "model.variant=null", f"model.random_init={name}"])
    checked = preflight(config)  # refuses what `fastloop plan` and `fastloop train` refuse
    checked.rewards.close()
    checked.eval_rewards.close()
    assert sum(p.numel() for p in checked.skeleton.vae.parameters()) == PUBLISHED[name][0]["vae"]
    header = [line for line in path.read_text().splitlines() if line.startswith("#")]
    assert any(line.startswith("# Needs: ") and "GiB" in line for line in header)
    assert any(line.startswith("# Verified: ") for line in header)
