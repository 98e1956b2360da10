"""The command line: what it prints, its exit codes, and that every bad path is one line before any work is done."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from diffusers.utils import logging as diffusers_logging
from PIL import Image
from safetensors.torch import load_file, save_file

import fastloop
from fastloop.cli import main
from fastloop.errors import RunFailed, UserError
from fastloop.evaluation import EVAL_STREAM
from fastloop.prompts import load_prompts, prompt_facts
from fastloop.recipes import dump_config
from fastloop.rundir import claim_run_dir, write_run
from fastloop.stopping import Stopped
from fastloop.trainer import Trainer


@pytest.fixture(autouse=True)
def quiet_libraries():
    """As the command line sets them before it imports them."""
    before = diffusers_logging.get_verbosity()
    diffusers_logging.set_verbosity(diffusers_logging.CRITICAL)
    yield
    diffusers_logging.set_verbosity(before)


@pytest.fixture
def recipe(make_config, tmp_path, monkeypatch) -> str:
    """A config file in the working directory, for a run of one iteration in the folder run."""
    monkeypatch.chdir(tmp_path)
    Path("recipe.yaml").write_text(dump_config(make_config(iterations=1, output_dir="run")))
    return "recipe.yaml"


@pytest.fixture
def no_model(monkeypatch):
    """Fails the test where a model is loaded."""

    def loaded(*_):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("fastloop.denoisers.load_denoiser", loaded)


@pytest.fixture
def refused(capsys):
    """A function of arguments that gives the one line, without the program's name, with which they are refused."""

    def refused(*argv: str) -> str:
        capsys.readouterr()
        assert main([str(word) for word in argv]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert re.fullmatch(r"fastloop: [^\n]+\n", err), err
        return err.removeprefix("fastloop: ").strip()

    return refused


# --- exit codes -------------------------------------------------------------------------------------------------------


def test_info_says_what_this_machine_can_do(capsys):
    assert main(["info"]) == 0
    rows = dict(re.split(r"  +", line, maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert rows["torch"] == torch.__version__
    paged = ", paged_adamw8bit" if torch.cuda.is_available() else ""
    assert rows["optimizers"] == f"adamw, adamw8bit{paged}, lion8bit, cpu_adamw"
    assert {"machine", "python", "kernels", "engines"} <= set(rows)
    assert rows["attention"].startswith("sdpa (flash, mem_efficient, math)")  # the list that every run pins
    assert rows["sums"] == "bf16 in float32, fp16 in float32"
    assert ("device" in rows) != torch.cuda.is_available()


@pytest.mark.parametrize(
    "argv, says",
    [
        ([], "the following arguments are required: COMMAND; see fastloop --help"),
        (["tain", "x.yaml"], "argument COMMAND: invalid choice: 'tain'"),
        (["train"], "the following arguments are required: CONFIG"),
        (["train", "x.yaml", "--resum"], "no config file x.yaml"),  # argparse takes beginnings of options
        (["train", "x.yaml", "--gpus", "2"], "unknown argument --gpus: see fastloop --help"),
        (["info", "x"], "unknown argument x: see fastloop --help"),
        (["sample", "x.yaml"], "the following arguments are required: --prompt; see fastloop sample --help"),
        (["sample", "x.yaml", "--prompt", "a", "--images", "x"], "argument --images: invalid int value: 'x'"),
        (["sample", "x.yaml", "--prompt", "a", "--images", "0"], "--images: at least 1"),
        (["sample", "x.yaml", "--prompt", "a", "--seed", "-1"], "--seed: 0 to 4294967295"),
    ],
)
def test_a_command_that_cannot_be_read_is_one_line_with_exit_code_2(refused, argv, says):
    assert says in refused(*argv)


def test_help_exits_with_code_0(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["train", "--help"])
    assert caught.value.code == 0 and "--resume" in capsys.readouterr().out


@pytest.mark.parametrize(
    "error, code, says",
    [
        (UserError("model.path: no"), 2, "fastloop: model.path: no\n"),
        (UserError("two\nlines\n  of a library"), 2, "fastloop: two lines of a library\n"),
        (RunFailed("the loss is not finite"), 1, "fastloop: the loss is not finite\n"),
        (KeyboardInterrupt(), 130, "fastloop: interrupted\n"),
    ],
)
def test_every_way_to_fail_has_its_exit_code_and_one_line(recipe, monkeypatch, capsys, error, code, says):
    def fails(*_):
        raise error

    monkeypatch.setattr(Trainer, "__init__", fails)
    assert main(["train", recipe]) == code
    assert capsys.readouterr() == ("", says)


@pytest.mark.parametrize("name, code", [("SIGINT", 130), ("SIGTERM", 143)])
def test_a_stopped_run_has_the_exit_code_of_its_signal_and_says_how_to_go_on(recipe, monkeypatch, capsys, name, code):
    def stopped(self):
        raise Stopped(name, 3)

    monkeypatch.setattr(Trainer, "train", stopped)
    assert main(["train", recipe]) == code
    out, err = capsys.readouterr()
    assert out.endswith(f"stopped by {name} after iteration 3; --resume goes on from run\n") and err == ""


def test_a_reward_that_fails_ends_the_run_with_exit_code_1_and_keeps_its_checkpoint(recipe, capsys):
    Path("my_failing_reward.py").write_text("def f(images, prompts, metadata):\n    raise OSError('the server is away')\n")
    rewards = "eval.rewards=[{name: jpeg_compressibility}]"
    assert main(["train", recipe, "rewards.0.name=my_failing_reward:f", rewards]) == 1
    err = capsys.readouterr().err
    assert err.startswith("fastloop: reward my_failing_reward:f failed for the prompt '")
    assert err.endswith("OSError: the server is away\n") and err.count("\n") == 1
    assert [path.name for path in Path("run/checkpoints").iterdir()] == ["iteration-000000"]
    assert json.loads(Path("run/run.json").read_text())["status"] == "failed"


# --- a whole run ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tiny_sd, tmp_path_factory) -> Path:
    """The folder of a finished run of one iteration, with the recipe beside it."""
    folder = tmp_path_factory.mktemp("trained")
    values = {
        "model": {"path": tiny_sd, "lora": {"rank": 2}},
        "prompts": {"source": "animals"},
        "rewards": [{"name": "jpeg_incompressibility"}],
        "eval": {"prompts": {"source": "animals", "limit": 3}, "images_per_prompt": 2, "grid": 2},
        "sampling": {"steps": 3, "guidance_scale": 2.0},
        "prompts_per_step": 2,
        "images_per_prompt": 2,
        "clip_range": 0.1,
        "optimizer": {"lr": 0.1},
        "tracking": {"tensorboard": False},
        "iterations": 1,
        "output_dir": str(folder / "run"),
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(values))
    assert main(["train", str(folder / "recipe.yaml")]) == 0
    return folder / "run"


def table(out: str) -> dict[str, list[str]]:
    rows = [line.split() for line in out.splitlines() if re.search(r"\d$", line) and "iteration" not in line]
    return {name: numbers for name, *numbers in rows}


def test_eval_of_a_run_prints_what_the_run_measured_last_and_writes_it_as_strict_json(trained, tmp_path, capsys):
    assert main(["eval", str(trained), "--json", str(tmp_path / "e.json")]) == 0
    out = capsys.readouterr().out
    last = json.loads((trained / "eval.jsonl").read_text().splitlines()[-1])
    assert f"{trained}: weights after iteration 1" in out
    assert table(out)["all"] == [f"{last['score']['mean']:.3f}", f"{last['score']['stderr']:.3f}", "3"]

    def not_strict(name):
        raise AssertionError(name)

    row = json.loads((tmp_path / "e.json").read_text(), parse_constant=not_strict)
    assert row["score"] == pytest.approx(last["score"])


def test_eval_of_one_prompt_has_no_standard_error_in_its_json(trained, tmp_path):
    path = tmp_path / "e.json"
    assert main(["eval", str(trained.parent / "recipe.yaml"), "eval.prompts.limit=1", "--json", str(path)]) == 0
    assert "NaN" not in path.read_text() and json.loads(path.read_text())["score"]["stderr"] is None


def test_eval_of_a_recipe_measures_the_base_model(trained, capsys):
    assert main(["eval", str(trained.parent / "recipe.yaml")]) == 0
    first, last = (json.loads(line)["score"] for line in (trained / "eval.jsonl").read_text().splitlines())
    assert table(capsys.readouterr().out)["all"] == [f"{first['mean']:.3f}", f"{first['stderr']:.3f}", "3"]
    assert first != last


def test_sample_writes_pictures_and_a_grid_that_depend_on_seed_and_weights_alone(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    recipe = str(trained.parent / "recipe.yaml")
    two = ["--prompt", "cat", "--prompt", "dog", "--images", "2"]
    assert main(["sample", recipe, *two, "--out", "a"]) == 0
    assert "4 pictures in a, all of them in a/grid.png" in capsys.readouterr().out
    assert main(["sample", recipe, *two, "--out", "b", "memory.rollout_batch=1"]) == 0  # an override behind an option
    assert main(["sample", recipe, *two, "--out", "c", "--seed", "1"]) == 0
    assert main(["sample", str(trained), *two, "--out", "d"]) == 0
    names = ["00_00.png", "00_01.png", "01_00.png", "01_01.png"]
    assert sorted(path.name for path in Path("a").iterdir()) == [*names, "grid.png"]
    a, b, c, d = (np.stack([np.array(Image.open(f"{folder}/{name}")) for name in names]) for folder in "abcd")
    assert a.shape == (4, 16, 16, 3)
    assert abs(a.astype(int) - b).max() <= 1 and (a != c).mean() > 0.5 and (a != d).any()
    assert (a[0] != a[1]).any()


def test_report_makes_the_page_anew(trained, capsys):
    (trained / "report.html").unlink()
    assert main(["report", str(trained)]) == 0
    assert capsys.readouterr().out == f"{trained / 'report.html'}\n"
    assert "<html" in (trained / "report.html").read_text()


def test_automatic_batches_are_said_kept_and_good_for_sample_and_eval_too(recipe, capsys):
    auto = [f"memory.{name}_batch=auto" for name in ("rollout", "update", "vae")]
    assert main(["train", recipe, *auto]) == 0
    said = re.search(r"of (\d+) pairs, each in 1 micro-batch of (\d+)$", capsys.readouterr().out, re.M)
    assert said[1] == said[2]  # there is room for all
    assert set(yaml.safe_load(Path("run/config.yaml").read_text())["memory"].values()) >= {6, int(said[2])}
    for source in (recipe, "run"):
        assert main(["eval", source]) == 0
        plain = capsys.readouterr().out
        assert main(["eval", source, auto[0]]) == 0
        assert capsys.readouterr().out == plain
    assert main(["sample", "run", "--prompt", "cat", "--images", "1", auto[0]]) == 0


def test_no_training_picture_shares_its_noise_with_an_evaluation():
    assert all((EVAL_STREAM | seed) >= 2**32 for seed in (0, 7, 2**32 - 1))  # training seeds are below


# --- bad models -------------------------------------------------------------------------------------------------------


def remove(*names: str):
    def damage(folder: Path) -> None:
        for name in names:
            path = folder / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    return damage


def write(name: str, content: str | bytes):
    return lambda folder: (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def change(name: str, **values):
    def damage(folder: Path) -> None:
        path = folder / name
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return damage


def pickle_code(folder: Path) -> None:
    for path in folder.rglob("*.safetensors"):
        name = path.name if path.name.startswith("diffusion") else "pytorch_model"
        torch.save({"weight": print}, path.with_name(name).with_suffix(".bin"))
        path.unlink()


SCHEDULER = "scheduler/scheduler_config.json"
UNET = "unet/diffusion_pytorch_model.safetensors"

CONFIG_DAMAGES = {
    "no model_index.json": (
        remove("model_index.json"),
        "has no model_index.json: give the folder of a diffusers pipeline",
    ),
    "a torn model_index.json": (write("model_index.json", "{"), "cannot read model_index.json of"),
    "a list as model_index.json": (
        write("model_index.json", "[]"),
        "model_index.json of MODEL: it holds no JSON object",
    ),
    "another pipeline": (
        change("model_index.json", _class_name="PixArtSigmaPipeline"),
        "MODEL is a PixArtSigmaPipeline: supported are StableDiffusionPipeline",
    ),
    "a pipeline of its own code": (
        change("model_index.json", _class_name=["my_pipeline", "MyPipeline"]),
        "MODEL is a ['my_pipeline', 'MyPipeline']: supported are StableDiffusionPipeline",
    ),
    "a unet of its own code": (
        change("model_index.json", unet=["my_unet", "MyUNet"]),
        "model_index.json of MODEL takes its unet from ['my_unet', 'MyUNet'], which is no class of diffusers or transformers: "
        "code that comes with a model is not run",
    ),
    "a part from any module": (
        change("model_index.json", safety_checker=["antigravity", "Checker"]),
        "model_index.json of MODEL takes its safety_checker from ['antigravity', 'Checker'], which is no class of",
    ),
    "a part without a class": (
        change("model_index.json", vae=["diffusers"]),
        "model_index.json of MODEL takes its vae from ['diffusers'], which is no class of",
    ),
    "a unet that cannot be built": (
        change("unet/config.json", block_out_channels=[8, 16, 16]),
        "cannot build the unet of MODEL from its config.json: ",
    ),
    "a text encoder that cannot be built": (
        change("text_encoder/config.json", hidden_size="abc"),
        "cannot build the text_encoder of MODEL from its config.json: ",
    ),
    "a text encoder of another model": (
        change("unet/config.json", cross_attention_dim=24),
        "the text encoder of MODEL gives 16 channels, its UNet takes 24 (cross_attention_dim)",
    ),
    "no scheduler": (remove("scheduler"), f"cannot read {SCHEDULER} of MODEL: No such file or directory"),
    "a torn scheduler": (write(SCHEDULER, '{"a": '), f"cannot read {SCHEDULER} of MODEL: Expecting value"),
    "a thresholding scheduler": (change(SCHEDULER, thresholding=True), "thresholding=true: the step is then not affine"),
    "a scheduler without betas": (
        change(SCHEDULER, _class_name="FlowMatchEulerDiscreteScheduler"),
        "_class_name=FlowMatchEulerDiscreteScheduler",
    ),
    "no unet": (remove("unet"), "cannot read unet/config.json of MODEL: No such file or directory"),
    "no text encoder": (remove("text_encoder"), "cannot read text_encoder/config.json of MODEL: No such file or directory"),
    "no vae": (remove("vae"), "cannot read vae/config.json of MODEL: No such file or directory"),
    "a torn unet config": (write("unet/config.json", '{"a": '), "cannot read unet/config.json of MODEL: Expecting value"),
    "a scheduler of text": (change(SCHEDULER, beta_start="low"), "the scheduler of model.path=MODEL:"),
}

WEIGHT_DAMAGES = {
    "no unet weights": (remove(UNET), "cannot load the unet of MODEL: there are no weights in its folder"),
    "no tokenizer": (remove("tokenizer"), "the tokenizer of MODEL has 2 words and its text encoder"),
    "no words": (remove("tokenizer/tokenizer.json"), "the tokenizer of MODEL has 2 words and its text encoder"),
    "pickled code": (pickle_code, "cannot load the text_encoder of MODEL"),
    "a torn unet": (lambda folder: (folder / UNET).write_bytes((folder / UNET).read_bytes()[:999]), "load the unet of"),
    "a torn text encoder": (
        write("text_encoder/model.safetensors", b"\0" * 99),
        "cannot load the text_encoder of MODEL",
    ),
    "a pointer to large files": (
        write("vae/diffusion_pytorch_model.safetensors", "version https://git-lfs.github.com/spec/v1\n"),
        "cannot load the vae of MODEL: diffusion_pytorch_model.safetensors is a pointer of git-LFS: run git lfs pull",
    ),
    "another part's weights": (
        lambda folder: shutil.copy(folder / "vae/diffusion_pytorch_model.safetensors", folder / UNET),
        "cannot load the unet of MODEL: diffusion_pytorch_model.safetensors has other weights than such a part, ",
    ),
    "a unet of another shape": (change("unet/config.json", layers_per_block=2), "cannot load the unet of MODEL"),
}


def damaged(tiny_sd: str, damage) -> str:
    shutil.copytree(tiny_sd, "model")
    damage(Path("model"))
    return str(Path("model").resolve())


@pytest.mark.parametrize("command", ["train", "plan"])
@pytest.mark.parametrize("name", CONFIG_DAMAGES)
def test_a_bad_model_folder_is_refused_before_anything_is_made(recipe, tiny_sd, refused, no_model, command, name):
    damage, says = CONFIG_DAMAGES[name]
    path = damaged(tiny_sd, damage)
    message = refused(command, recipe, f"model.path={path}")
    assert says.replace("MODEL", path) in message and "model.path" in message
    assert not Path("run").exists()


@pytest.mark.parametrize("name", WEIGHT_DAMAGES)
def test_bad_weights_are_refused_and_nothing_is_unpickled(recipe, tiny_sd, refused, monkeypatch, name):
    def unpickled(*args, **kwargs):
        assert kwargs["weights_only"], "something may be unpickled"
        return load(*args, **kwargs)

    (damage, says), load = WEIGHT_DAMAGES[name], torch.load
    path = damaged(tiny_sd, damage)
    monkeypatch.setattr("torch.load", unpickled)
    message = refused("train", recipe, f"model.path={path}")
    assert message.startswith("model.path: ") and says.replace("MODEL", path) in message
    assert not Path("run/run.json").exists()


@pytest.mark.parametrize(
    "path, says",
    [
        (
            "./nowhere",
            "model.path: no folder or file ./nowhere: give a diffusers folder, a .safetensors or .ckpt file",
        ),
        ("/nowhere/at/all", "model.path: no folder or file /nowhere/at/all"),
        ("a/b/c", "model.path: no folder or file a/b/c"),
        ("nowhere", "model.path: no folder or file nowhere"),
        ("recipe.yaml", "model.path: recipe.yaml is a file of another kind than .safetensors"),
        ("assets:shape", "model.path: no bundled model 'shape': one of"),
        ("no-such-owner/no-such-model", "model.path: cannot read model_index.json of no-such-owner/no-such-model: "),
        ("an owner/a name", "model.path: cannot read model_index.json of an owner/a name: "),
    ],
)
def test_a_model_that_is_not_there_is_refused_before_anything_is_made(recipe, refused, no_model, path, says):
    assert says in refused("train", recipe, f"model.path={path}")
    assert not Path("run").exists()


def test_weights_of_a_variant_that_is_not_there_are_refused_with_its_name(recipe, refused):
    for command in ("train", "plan"):
        assert "has files of the variant fp16: leave it out" in refused(command, recipe, "model.variant=fp16")


@pytest.mark.parametrize(
    "override, says",
    [
        ("engine.device=gpu", "engine.device: 'gpu' is no device: use auto, cpu, cuda or cuda:N"),
        ("engine.device=meta", "engine.device: 'meta' is not supported: use auto, cpu, cuda or cuda:N"),
        ("engine.device=cuda:99", "engine.device: cuda:99 is not there ("),
        ("sampling.steps=1001", "steps=1001: must be between 1 and the scheduler's num_train_timesteps=1000"),
        ("eval.sampling.steps=1001", "steps=1001: must be between 1 and the scheduler's num_train_timesteps=1000"),
        ("updates_per_rollout=25", "updates_per_rollout: 25 updates, but a rollout has only 24 (trajectory, timestep) pairs"),
        (
            "model.lora.target_modules=[to_nothing]",
            "model.lora.target_modules: the UNet has no module 'to_nothing': name modules by their ending",
        ),
        ("sampling.height=17", "sampling.height: 17 is not a multiple of 4 pixels, which this model needs"),
        ("sampling.width=18", "sampling.width: 18 is not a multiple of 4 pixels, which this model needs"),
    ],
)
@pytest.mark.parametrize("command", ["train", "plan"])
def test_what_does_not_fit_the_machine_or_the_model_is_refused_before_anything_is_made(
    recipe, refused, no_model, command, override, says
):
    assert says in refused(command, recipe, override)
    assert not Path("run").exists()


def test_xformers_is_refused_where_it_does_not_work(recipe, refused, monkeypatch):
    monkeypatch.setattr("fastloop.denoisers.xformers_problem", lambda: "xformers has no operator here")
    assert refused("train", recipe, "model.attention=xformers") == (
        "model.attention: xformers has no operator here; or set it to sdpa"
    )


# --- bad prompts and rewards ------------------------------------------------------------------------------------------

FILES = {
    "blank.txt": "\n \n",
    "list.jsonl": '{"prompt": "a cat"}\n{"prompt": 1}\n',
    "broken_reward.py": "import nothing_",
}


@pytest.mark.parametrize(
    "override, says",
    [
        ("prompts.source=none.txt", "prompts.source: cannot read none.txt: No such file or directory"),
        ("prompts.source=blank.txt", "prompts.source: blank.txt holds no prompts"),
        ("prompts.source=list.jsonl", 'prompts.source: list.jsonl:2 is not an object such as {"prompt": "a cat"}'),
        ("prompts.source=animal", "prompts.source: 'animal' is not shapes_train, shapes_heldout, animals, a .txt, .jsonl"),
        ("prompts.categories=[color]", "prompts.categories: the prompts of animals have no categories: remove it"),
        ("prompts={source: shapes_train, categories: [size]}", "prompts.categories: unknown 'size': one of color,"),
        ("eval.prompts.source=none.jsonl", "eval.prompts.source: cannot read none.jsonl"),
        ("rewards.0.name=jpeg", "rewards.0.name: unknown reward 'jpeg': one of jpeg_compressibility,"),
        ("rewards.0.name=no_such_module_:f", "rewards.0.name: cannot import no_such_module_:f: ModuleNotFoundError"),
        ("rewards.0.name=broken_reward:f", "rewards.0.name: cannot import broken_reward:f: ModuleNotFoundError"),
        ("rewards.0.name=json:no_such", "rewards.0.name: cannot import json:no_such: AttributeError"),
        ("rewards.0.name=json:__doc__", "rewards.0.name: json:__doc__ is of type str, not a function"),
        ("rewards.0.params.quality=3", "rewards.0.params: jpeg_incompressibility: "),
        ("rewards=[{name: 'json:dumps', params: {x: 1}}]", "rewards.0.params: json:dumps: "),
        ("rewards.0.name=shapes", "rewards.0.name: the shapes reward scores pictures of 64 x 64 pixels, these have 16 x 16"),
        ("rewards.0.name=shapes model.path=assets:shapes", "rewards.0.name: the shapes reward cannot read the prompt 'cat'"),
        (
            "rewards.0.name=shapes model.path=assets:shapes prompts.source=shapes_train",
            "rewards, on eval.prompts.0.name: the shapes reward cannot read the prompt 'cat'",
        ),
        (
            "rewards=[{name: jpeg_compressibility}, {name: jpeg_compressibility}]",
            "rewards.1.name: jpeg_compressibility is",
        ),
        (
            "eval.rewards=[{name: shapes}]",
            "eval.rewards.0.name: the shapes reward scores pictures of 64 x 64 pixels, these have 16 x 16",
        ),
    ],
)
@pytest.mark.parametrize("command", ["train", "plan"])
def test_bad_prompts_and_rewards_are_refused_before_anything_is_made(recipe, refused, no_model, command, override, says):
    for name, text in FILES.items():
        Path(name).write_text(text)
    overrides = re.split(r" (?=[\w.]+=)", override)
    assert refused(command, recipe, *overrides).startswith(says)
    assert not Path("run").exists()


# --- the run's folder -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", ["recipe.yaml", "recipe.yaml/run", "/proc/no/run"])
def test_a_folder_that_cannot_be_written_is_refused(recipe, refused, no_model, folder):
    assert refused("train", recipe, f"output_dir={folder}").startswith(f"output_dir: cannot write to {folder}: ")


@pytest.fixture
def begun(recipe, make_config) -> Path:
    """The folder of the recipe's run, begun and killed before its first checkpoint."""
    config = make_config(iterations=1, output_dir="run")
    facts = prompt_facts(load_prompts(config.prompts), load_prompts(config.eval.prompts, "eval.prompts"))
    folder, _, _ = claim_run_dir(config, False, facts, {})
    write_run(folder, status="running")
    return folder


def test_a_folder_that_holds_a_run_is_refused_without_resume_and_not_touched(recipe, begun, refused, no_model):
    before = {path: path.read_bytes() for path in begun.iterdir()}
    assert refused("train", recipe, "optimizer.lr=0.5") == (
        "output_dir: run already holds a run: add --resume, or choose another output_dir="
    )
    assert {path: path.read_bytes() for path in begun.iterdir()} == before


@pytest.mark.parametrize(
    "override, says",
    [
        ("optimizer.lr=0.5", "--resume: optimizer.lr is 0.01 in run/config.yaml and 0.5 now: set it back"),
        ("model.lora.rank=3", "--resume: model.lora.rank is 2 in run/config.yaml and 3 now"),
        ("rewards.0.weight=2", "--resume: rewards is [{'name': 'jpeg_incompressibility', 'weight': 1.0"),
        ("algorithm=rloo", "--resume: algorithm is 'loop' in run/config.yaml and 'rloo' now"),
    ],
)
def test_resuming_with_another_config_names_the_key_that_differs(recipe, begun, refused, no_model, override, says):
    before = (begun / "config.yaml").read_text()
    message = refused("train", recipe, "--resume", override)  # an override behind an option
    assert message.startswith(says) and message.endswith("or start a new run with another output_dir=")
    assert (begun / "config.yaml").read_text() == before


def test_a_start_that_was_refused_does_not_block_the_next(recipe, tiny_sd, refused):
    def lose_a_weight(folder: Path) -> None:  # which shows when the model loads
        save_file({k: v for k, v in load_file(folder / UNET).items() if k != "conv_out.bias"}, folder / UNET)

    path = damaged(tiny_sd, lose_a_weight)
    for _ in range(2):  # the second is not told that the folder holds a run
        assert refused("train", recipe, f"model.path={path}").startswith("model.path: cannot load the unet of ")
        assert sorted(file.name for file in Path("run").iterdir()) == [".lock", "config.yaml", "prompts.json"]


def test_a_config_of_the_users_own_is_never_overwritten(recipe, refused, no_model):
    Path("config.yaml").write_text(f"# my own\n{Path(recipe).read_text()}")
    before = Path("config.yaml").read_text()
    assert "already holds a run" in refused("train", "config.yaml", "output_dir=.")
    assert Path("config.yaml").read_text() == before


def test_a_damaged_config_of_a_run_is_refused_with_its_place(recipe, begun, refused, no_model):
    (begun / "config.yaml").write_text("rewards: [\n")
    assert refused("train", recipe, "--resume").startswith("run/config.yaml, line 2, column 1, is not valid YAML")
    assert refused("eval", "run").startswith("run/config.yaml, line 2, column 1, is not valid YAML")


# --- sample, eval and report of what is not there ---------------------------------------------------------------------


@pytest.mark.parametrize("command", [["eval"], ["sample", "--prompt", "a cat"]], ids=lambda command: command[0])
def test_sample_and_eval_need_a_recipe_or_a_run_with_a_checkpoint(recipe, begun, refused, no_model, command):
    name, *options = command
    Path("empty").mkdir()
    assert refused(name, "nowhere", *options) == "no config file nowhere: the recipes are in configs/"
    assert refused(name, "empty", *options) == "empty holds no run: it has no config.yaml"
    assert refused(name, "run", *options) == "run has no checkpoint yet: give the config file to use the base model"
    assert not Path("samples").exists()


def test_a_damaged_checkpoint_is_refused_with_its_folder(trained, tmp_path, refused):
    run = shutil.copytree(trained, tmp_path / "run")
    weights = run / "checkpoints" / "iteration-000001" / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    message = refused("eval", run)
    assert message.startswith(f"cannot read the checkpoint {weights.parent}: ")
    assert message.endswith("remove it to resume from the one before")


def test_weights_of_another_adapter_are_refused_with_what_differs(trained, capsys):
    assert main(["eval", str(trained), "model.lora.rank=3"]) == 2
    assert re.search(r"does not fit the model at .* \(\(2, 16\) saved, \(3, 16\) here\): model.path, model.adapter and",
                     capsys.readouterr().err)  # fmt: skip


def test_results_that_cannot_be_written_are_refused_before_the_model_loads(recipe, refused, no_model):
    Path("folder").mkdir()
    assert refused("eval", recipe, "--json", "folder") == "--json: folder is a folder: give a file"
    assert refused("eval", recipe, "--json", "no/e.json") == "--json: cannot write to no: No such file or directory"
    assert refused("eval", recipe, "--json", "/proc/e.json").startswith("--json: cannot write to /proc: ")
    assert refused("sample", recipe, "--prompt", "a", "--out", recipe) == f"--out: cannot write to {recipe}: File exists"
    assert refused("sample", recipe, "--prompt", "a", "--out", "/proc").startswith("--out: cannot write to /proc: ")


def test_report_needs_the_folder_of_a_run(tmp_path, refused):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "nowhere", tmp_path, tmp_path / "file"):
        assert refused("report", path).startswith(f"{path} is not a run folder: it has none of config.yaml, run.json")
    (tmp_path / "metrics.jsonl").write_text("{\n}\n")
    assert refused("report", tmp_path).startswith(f"{tmp_path}/metrics.jsonl:1: not a JSON row")


# --- the entry of launchers -------------------------------------------------------------------------------------------


def test_the_launchers_entry_refuses_a_bad_config_with_exit_code_2_and_one_line(tmp_path):
    (tmp_path / "recipe.yaml").write_text("rewards: [{name: shapes}]\niteratons: 3\n")
    entry = Path(fastloop.__file__).parent / "train.py"
    command = [sys.executable, str(entry), "--config", "recipe.yaml", "--resume", "seed=3"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=240)
    expected = "fastloop: recipe.yaml: iteratons: unknown key; did you mean 'iterations'?\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", expected)
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]
