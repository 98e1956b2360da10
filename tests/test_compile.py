"""Attention backends and compiled UNets: the same numbers, no compilation for a last batch, refused where they cannot work."""

from __future__ import annotations

import shutil

import pytest
import torch
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode

from fastloop.denoisers import load_denoiser
from fastloop.denoisers.base import FlashAttention
from fastloop.errors import UserError
from fastloop.plan import check
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
        denoiser.unet.zero_grad()
        with Operators() as operators:
            output = denoiser.predict(x, t, cond, None)[0]
            output.square().sum().backward()
        return output, [p.grad.clone() for p in denoiser.trainable().values()], operators.names

    expected, gradients, _ = compute()
    denoiser.unet.set_attn_processor(FlashAttention())
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
    """Here nothing is compiled: what is tested is that the rows which fill it leave no trace."""
    config = make_config(model={"adapter": "full"})
    denoiser = load_denoiser(config.model, CPU)
    denoiser.train_adapter(False, seed=0)
    x, t = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([10, 500, 900])
    text, seen = denoiser.encode(["a cat", "a dog", "a bee"], config.sampling), []
    denoiser.unet.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))

    def compute():
        denoiser.unet.zero_grad()
        outputs = denoiser.predict(x, t, *text)
        sum(output.square().sum() for output in outputs).backward()
        return [*outputs, *(p.grad.clone() for p in denoiser.trainable().values())]

    expected = compute()
    denoiser._compiled_batches = [2, 5, 8]
    found = compute()
    assert seen == [6, 10]  # with guidance
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@compiler
def test_a_compiled_run_has_ratio_one_and_the_weights_of_an_eager_one_and_compiles_once(make_config, tmp_path):
    """Regional, with LoRA and checkpointing; 6 trajectories in batches of 4, 12 pairs in batches of 5."""
    weights, graphs = {}, []

    class Counting(Trainer):
        def _log(self, metrics):
            graphs.append(counters["stats"]["unique_graphs"])
            super()._log(metrics)

    for name, compiled in (("eager", False), ("compiled", "regional")):
        torch._dynamo.reset()
        counters.clear()
        graphs.clear()
        config = make_config(
            model={"compile": compiled},
            memory={"gradient_checkpointing": True},
            eval={"every": 9, "images_per_prompt": 1, "prompts": {"source": "animals", "limit": 1}},
            optimizer={"lr": 1e-3},
            output_dir=str(tmp_path / name),
        )
        trainer = Counting(config)
        folder = trainer.train()
        weights[name] = {key: p.detach().clone() for key, p in trainer.parameters.items()}
        assert read_rows(folder / "metrics.jsonl")[0]["policy/replay_max_dev"] < config.safety.max_ratio_dev
    assert graphs[0] == graphs[1] > 0  # the second iteration, with its ragged batches, has compiled nothing
    assert weights["eager"].keys() == weights["compiled"].keys()
    for name, value in weights["eager"].items():
        torch.testing.assert_close(weights["compiled"][name], value, rtol=0, atol=2e-4)


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
        check(make_config(**changes))
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_without_a_compiler_a_compiled_model_is_refused(make_config, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(UserError, match="^model.compile: torch.compile needs a C\\+\\+ compiler: install g\\+\\+; or set"):
        check(make_config(model={"compile": "regional"}, engine={"device": "cpu"}))
