"""Attention backends and compiled UNets: the same numbers, no compilation for a last batch, refused where they cannot work."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from compile_counts import Counts, compile_as_traced, forget
from on_ranks import train_all, zero
from run_files import distance, equal, weights
from safetensors.torch import load_file
from tiny_pipelines import make_sd
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode

from fastloop.denoisers import load_denoiser
from fastloop.denoisers.unet import FlashAttention
from fastloop.errors import UserError
from fastloop.preflight import preflight
from fastloop.recipes import parse_config
from fastloop.tracking import read_rows
from fastloop.trainer import Trainer

CPU = torch.device("cpu")
compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "clang++", "c++"))), reason="torch.compile on a CPU needs a C++ compiler"
)


class Operators(TorchDispatchMode):
    """The names of the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_flash_attention_is_the_only_one_and_gives_the_same_outputs_and_gradients(make_config, checkpointing):
    """The CPU has a flash kernel too, which is refused for runs but shows that no other one is taken."""
    denoiser = load_denoiser(make_config(model={"adapter": "full"}).model, CPU)
    denoiser.train_adapter(checkpointing, seed=0)
    x, t = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([10, 500])
    cond, _ = denoiser.encode(["a cat", "a dog"], make_config(sampling={"guidance_scale": 1}).sampling)

    def compute():
        denoiser.network.zero_grad()
        with Operators() as operators:
            output = denoiser.predict(x, t, cond, None)[0]
            output.square().sum().backward()
        return output, [p.grad.clone() for p in denoiser.trainable().values()], operators.names

    expected, gradients, _ = compute()
    denoiser.network.set_attn_processor(FlashAttention())
    torch.backends.cuda.enable_flash_sdp(False)  # the processor itself must allow it, in the backward as well
    try:
        output, found, names = compute()
    finally:
        torch.backends.cuda.enable_flash_sdp(True)
    assert any("flash_attention" in name for name in names) and "bmm" not in names
    torch.testing.assert_close(output, expected)
    for a, b in zip(found, gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_a_smaller_batch_is_filled_up_and_gives_its_own_outputs_and_gradients(make_config):
    """The rows that fill it leave no trace."""
    config = make_config(model={"adapter": "full"})
    denoiser = load_denoiser(config.model, CPU)
    denoiser.train_adapter(False, seed=0)
    x, t = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([10, 500, 900])
    text, seen = denoiser.encode(["a cat", "a dog", "a bee"], config.sampling), []
    denoiser.network.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))

    def compute(full: int):
        denoiser.network.zero_grad()
        outputs = denoiser.predict(x, t, *text, full)
        sum(output.square().sum() for output in outputs).backward()
        return [*outputs, *(p.grad.clone() for p in denoiser.trainable().values())]

    expected, found = compute(2), compute(5)
    assert seen == [6, 10]  # with guidance
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def one_level(tmp_path_factory) -> str:
    """A model that is quicker to compile than the others."""
    blocks = {"down_block_types": ("CrossAttnDownBlock2D",), "up_block_types": ("CrossAttnUpBlock2D",)}
    return make_sd(tmp_path_factory.mktemp("sd"), block_out_channels=(8,), **blocks)


KL_AND_AVERAGE = {"kl": {"weight": 1e-3}, "ema": {"decay": 0.5}}


@compiler
@pytest.mark.parametrize(
    "model, more, traced",
    [
        ({"compile": "regional"}, {"memory": {"gradient_checkpointing": True}}, False),
        ({"compile": True}, {"memory": {"gradient_checkpointing": ["mid_block"]}} | KL_AND_AVERAGE, True),
        (
            {"compile": True, "adapter": "full", "dtype": "bf16"},
            {"memory": {"gradient_checkpointing": True}} | KL_AND_AVERAGE,
            True,
        ),
    ],
    ids=["regional", "whole", "whole-full-bf16"],
)
def test_a_compiled_run_trains_as_an_eager_one_compiles_once_and_goes_on_as_either(
    make_config, one_level, tmp_path, monkeypatch, model, more, traced
):
    """In batches of 4: 6 trajectories, and 9 pairs."""
    if traced:
        monkeypatch.setattr(torch, "compile", compile_as_traced)

    def train(name: str, compiled: bool | str, origin: Path | None = None) -> Trainer:
        """With an origin: from a copy of that run, as it was when its first iteration was saved."""
        if origin:
            shutil.copytree(origin, tmp_path / name, ignore=shutil.ignore_patterns("iteration-000002", "export"))
        config = make_config(
            **more | {"memory": more["memory"] | {"rollout_batch": 4, "update_batch": 4}},
            sampling={"steps": 3},
            model=model | {"path": one_level, "compile": compiled},
            eval={"every": 9, "images_per_prompt": 4, "prompts": {"source": "animals", "limit": 1}},
            optimizer={"lr": 1e-3},
            checkpoint={"every": 1, "keep": 9},
            output_dir=str(tmp_path / name),
        )
        trainer = Trainer(config, origin is not None, observer=Counts())
        trainer.train()
        return trainer

    forget()
    eager, compiled = train("eager", False), train("compiled", model["compile"])
    (graphs, *_), (graphs_after, calls, forwards) = compiled.observer.counts
    assert graphs == graphs_after > 0  # the second iteration, with its ragged batches, has compiled nothing
    assert calls == (forwards if traced else 0)  # of the whole UNet: in one graph, and none ran uncompiled
    first = read_rows(compiled.folder / "metrics.jsonl")[0]
    assert first["policy/replay_max_dev"] < compiled.config.safety.max_ratio_dev
    wanted = saved(compiled.folder)
    others = [eager]
    if not traced:
        resumed = saved(train("resumed", model["compile"], compiled.folder).folder)
        assert resumed.keys() == wanted.keys() and all(torch.equal(resumed[name], value) for name, value in wanted.items())
        others += [train("to-eager", False, compiled.folder), train("to-compiled", model["compile"], eager.folder)]
    for other in others:
        found = saved(other.folder)
        assert found.keys() == wanted.keys()
        for name, value in found.items():
            torch.testing.assert_close(value, wanted[name], rtol=0, atol=2e-4, msg=name)


def saved(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a run's last checkpoint and of its export, by file and name."""
    files = [*folder.glob("checkpoints/iteration-000002/*.safetensors"), *folder.glob("export/**/*.safetensors")]
    return {f"{file.relative_to(folder)}:{name}": value for file in files for name, value in load_file(file).items()}


@compiler
def test_compiled_half_precision_rounds_alike_with_gradients_and_without(make_config, one_level):
    """Left to itself the compiler fuses roundings away, others with gradients than without."""
    config = make_config(model={"path": one_level, "dtype": "bf16", "compile": "regional"})
    denoiser = load_denoiser(config.model, CPU)
    denoiser.train_adapter(False, seed=0)
    forget()
    denoiser.compile()
    x, t = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([10, 300, 500, 900])
    text = denoiser.encode(["a cat", "a dog", "a bee", "a fox"], config.sampling)
    with_gradients = denoiser.predict(x, t, *text)[0]
    with torch.no_grad():
        without = denoiser.predict(x, t, *text)[0]
    assert with_gradients.requires_grad and counters["stats"]["unique_graphs"] >= 2
    assert (with_gradients != without).float().mean() < 0.01


@compiler
def test_a_unet_of_many_widths_is_compiled_in_all_its_blocks(make_config, tmp_path, monkeypatch):
    """PyTorch's own limit of 8 graphs for one piece of code would leave the rest uncompiled, with only a warning."""
    monkeypatch.setattr(torch, "compile", compile_as_traced)
    blocks = {  # SD's
        "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    }
    path = make_sd(tmp_path / "model", block_out_channels=(4, 8, 12, 16), **blocks)
    config = make_config(model={"path": path, "adapter": "full", "compile": "regional"})
    denoiser = load_denoiser(config.model, CPU)
    forget()
    denoiser.compile()
    text = denoiser.encode(["a cat"] * 3, config.sampling)
    with torch.no_grad(), torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        for n in (1, 2, 3):
            denoiser.predict(torch.zeros(n, 4, 8, 8), torch.full((n,), 9), *(part[:n] for part in text))
    assert counters["stats"]["unique_graphs"] == 4 * 3


@compiler
@pytest.mark.skipif(torch.cuda.is_available(), reason="its launcher would take the GPUs")
@pytest.mark.timeout(600)
def test_deepspeed_runs_the_compiled_unet_on_two_ranks_and_resumes_exactly(make_config, one_level, tmp_path):
    """In its wrapper, with what each stage hangs on the weights."""
    runs = {
        "regional-0": zero(0) | {"model": {"compile": "regional"}, "kl": {"weight": 1e-3}},
        "regional-1": zero(1) | {"model": {"compile": "regional"}, "memory": {"gradient_checkpointing": True}},
        "whole-2": zero(2) | {"model": {"compile": True, "adapter": "full"}} | KL_AND_AVERAGE,
    }
    configs = {}
    for name, changes in runs.items():
        changes["model"]["path"] = one_level
        changes["memory"] = changes.get("memory", {}) | {"rollout_batch": 3, "update_batch": 3}  # one size: less to compile
        changes |= {"rewards": [{"name": "on_ranks:contrast"}], "checkpoint": {"every": 1, "keep": 9}}
        configs[name] = make_config(output_dir=str(tmp_path / name), **changes)
    todo = [config.model_dump(mode="json") | {"traced": True} for config in configs.values()]
    again = {"output_dir": str(tmp_path / "resumed"), "resume": str(tmp_path / "whole-2")}
    train_all(tmp_path, 2, [*todo, todo[-1] | again])
    for name, config in configs.items():
        for rank in range(2):
            (graphs, before, _), (graphs_after, calls, forwards) = json.loads(
                (tmp_path / name / f"counts-{rank}.json").read_text()
            )
            assert graphs == graphs_after > 0 and calls > before > 0
            assert calls == forwards or "regional" in name
        alone = {"engine": {"name": "torch"}, "output_dir": str(tmp_path / f"{name}-alone")}
        values = config.model_dump(mode="json") | alone
        values["model"]["compile"] = False
        wanted = Trainer(parse_config(values, "test")).train()
        assert distance(weights(tmp_path / name), weights(wanted), weights(wanted, 0)) < 1e-3
        assert read_rows(tmp_path / name / "metrics.jsonl")[0]["policy/replay_max_dev"] < 1e-5
    assert json.loads((tmp_path / "resumed" / "resumed.json").read_text()) == [1, None]
    assert equal(weights(tmp_path / "resumed"), weights(tmp_path / "whole-2"))


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"model": {"attention": "flash"}}, "model.attention: flash attention computes in half precision and model.dtype is"),
        ({"model": {"attention": "flash", "dtype": "bf16"}, "engine": {"device": "cpu"}}, "flash attention needs a GPU, and"),
        (
            {"model": {"compile": True}, "engine": {"name": "deepspeed", "zero_stage": 3}},
            "model.compile: engine.zero_stage=3 gathers weights in hooks, which compiled code leaves out: set zero_stage=2",
        ),
        ({"model": {"compile": True, "attention": "xformers"}}, "model.compile: xformers' operators are not compiled"),
    ],
    ids=str,
)
def test_what_cannot_work_is_refused_before_the_model_loads(make_config, changes, says):
    with pytest.raises(UserError) as caught:
        preflight(make_config(**changes))
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_without_a_compiler_a_compiled_model_is_refused(make_config, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(UserError, match="^model.compile: torch.compile needs a C\\+\\+ compiler: install g\\+\\+; or set"):
        preflight(make_config(model={"compile": "regional"}, engine={"device": "cpu"}))
