"""Trained weights in half precision with float32 masters behind them: what reads weights sees neither old nor rounded ones."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from fastloop import training_run
from fastloop.denoisers import load_denoiser, ready_denoiser
from fastloop.engines.torch import TorchEngine
from fastloop.runs import open_model
from fastloop.trainer import Trainer

CPU = torch.device("cpu")


@pytest.fixture(params=["lora", "full"])
def values(request) -> dict:
    model = {"adapter": request.param, "dtype": "bf16"}
    return {"model": model, "clip_range": 1.0, "ema": {"decay": 0.5}, "optimizer": {"lr": 1e-3}}


@pytest.fixture
def config(make_config, values):
    return make_config(**values)


@pytest.fixture(autouse=True)
def quick(no_report):
    """Without the figures of a report."""


def rounded(values: dict) -> dict:
    return {name: value.detach().bfloat16() for name, value in values.items()}


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def whole(weights: dict) -> bool:
    """Float32, and not what bfloat16 holds."""
    return all(w.dtype == torch.float32 for w in weights.values()) and not all(
        torch.equal(w, w.bfloat16().float()) for w in weights.values()
    )


def test_steps_too_small_for_half_precision_add_up(make_config):
    config = make_config(model={"dtype": "bf16"}, optimizer={"lr": 1e-4, "weight_decay": 0.0})
    p = torch.nn.Parameter(torch.ones(3))
    engine = TorchEngine({"w": p}, config, CPU)
    assert p.dtype == torch.bfloat16
    for _ in range(100):  # 1e-4 each, and next to 1 bfloat16 has steps of 4e-3
        for part in (1, 2):
            engine.backward(p.float().sum() / 2, last=part == 2)
        assert engine.step() == pytest.approx(3**0.5)
    assert engine.weights()["w"] == pytest.approx(torch.full((3,), 0.99), abs=1e-4)
    assert torch.equal(p, engine.weights()["w"].bfloat16()) and p.grad is None


@pytest.mark.parametrize("adapter", ["lora", "full"])
def test_gradients_of_micro_batches_add_up_in_float32(make_config, adapter):
    p = torch.nn.Parameter(torch.zeros(2))
    engine = TorchEngine({"w": p}, make_config(model={"adapter": adapter, "dtype": "bf16"}), CPU)
    for _ in range(300):  # in bfloat16, 256 + 1 is 256
        engine.backward(p.float().sum(), last=False)
        assert p.grad is None
    assert torch.equal(engine.masters["w"].grad, torch.full((2,), 300.0))


def test_evaluation_sees_the_average_and_the_next_rollout_the_newest_weights(config, monkeypatch):
    trainer, seen = Trainer(config), []

    def evaluate(denoiser, *args, **kwargs):
        seen.append(same(rounded(denoiser.trainable()), rounded(trainer.ema.average)))
        return own(denoiser, *args, **kwargs)

    def rollout(*args):
        seen.append(same(dict(trainer.parameters), rounded(trainer.engine.masters)))
        return own_rollout(*args)

    own, own_rollout = training_run.evaluate, trainer.rollout
    monkeypatch.setattr(training_run, "evaluate", evaluate)
    monkeypatch.setattr(trainer, "rollout", rollout)
    trainer.train()
    assert seen == [True] * 4  # two evaluations, two rollouts
    assert whole(trainer.ema.average) and not same(rounded(trainer.ema.average), rounded(trainer.engine.masters))


def test_export_and_checkpoint_hold_what_is_in_float32(config):
    trainer = Trainer(config)
    folder = trainer.train()
    newest = sorted((folder / "checkpoints").iterdir())[-1]
    saved, average = (load_file(newest / f"{name}.safetensors") for name in ("weights", "ema"))
    assert whole(saved) and same(saved, trainer.engine.weights()) and same(average, trainer.ema.average)
    (file,) = {"lora": (folder / "export").glob("*.safetensors"), "full": (folder / "export" / "unet").glob("*.safetensors")}[
        config.model.adapter
    ]
    found = {name.removeprefix("unet."): value for name, value in load_file(file).items()}
    assert whole(found) and same(found, {name.replace(".default", ""): value for name, value in average.items()})
    assert all(p.dtype == torch.bfloat16 for p in trainer.parameters.values())
    opened = open_model(str(folder), [])[1]()  # as `sample` and `eval` do
    with trainer.ema.applied():
        assert torch.equal(*(predicted(denoiser, config) for denoiser in (opened, trainer.denoiser)))


@torch.no_grad()
def predicted(denoiser, config) -> torch.Tensor:
    x = torch.randn(2, *denoiser.latent_shape(None, None), generator=torch.Generator().manual_seed(0))
    return denoiser.predict(x, torch.tensor([3, 700]), *denoiser.encode(["a cat", "a dog"], config.sampling))[0]


def test_a_resumed_run_goes_on_from_the_masters(make_config, config, values, tmp_path):
    whole_run = Trainer(config)
    whole_run.train()
    parted = make_config(**values, iterations=1, output_dir=str(tmp_path / "parted"))
    Trainer(parted).train()
    resumed = Trainer(parted.model_copy(update={"iterations": 2}), resume=True)
    assert whole(resumed.engine.masters) and same(dict(resumed.parameters), rounded(resumed.engine.masters))
    resumed.train()
    assert same(resumed.engine.weights(), whole_run.engine.weights())
    assert same(resumed.ema.average, whole_run.ema.average)


def test_the_reference_is_the_base_model(make_config, values):
    config = make_config(**values, kl={"weight": 0.1})
    trainer = Trainer(config)
    denoiser = trainer.denoiser
    base = ready_denoiser(config, CPU, adapter=False)  # the files' weights, in half precision
    for p in trainer.parameters.values():
        p.data += 0.1
    with denoiser.reference():
        reference = predicted(denoiser, config)
    assert torch.equal(reference, predicted(base, config))
    assert not torch.equal(reference, predicted(denoiser, config))


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("adapter", ["lora", "full"])
def test_the_error_is_no_more_than_1_3_times_that_of_autocast(make_config, adapter, dtype):
    """Of outputs and gradients, against float32, with stock modules under autocast."""

    def outcome(dtype, ready):
        config = make_config(model={"path": "assets:shapes", "adapter": adapter, "dtype": dtype, "lora": {"rank": 4}})
        denoiser = ready(config, CPU)
        g = torch.Generator().manual_seed(0)
        for p in denoiser.trainable().values() if adapter == "lora" else ():
            p.data = 0.02 * torch.randn(p.shape, generator=g)
        if ready is ready_denoiser:
            TorchEngine(denoiser.trainable(), config, CPU)
            assert {p.dtype for p in denoiser.network.parameters()} == {denoiser.network.dtype} != {torch.float32}
        size = denoiser.latent_shape(None, None)
        x, weight = torch.randn(2, 4, *size, generator=g)
        texts = denoiser.encode(["a red circle", "a blue square", "a", "two"], config.sampling)
        output = denoiser.predict(x, torch.tensor([5, 200, 500, 900]), *texts)[0].float()
        gradients = torch.autograd.grad((output * weight).sum(), list(denoiser.trainable().values()))
        return output.detach(), torch.cat([g.float().flatten() for g in gradients])

    def stock(config, device):
        denoiser = load_denoiser(config.model, device)
        denoiser.train_adapter(False, seed=0)

        def under_autocast(*args, **kwargs):
            with torch.autocast("cpu", torch.bfloat16 if dtype == "bf16" else torch.float16):
                return denoiser.network(*args, **kwargs)

        if config.model.dtype != "fp32":
            denoiser.forward = under_autocast
        return denoiser

    exact, mixed, half = outcome("fp32", stock), outcome(dtype, stock), outcome(dtype, ready_denoiser)
    for what, value, autocast, ours in zip(("output", "gradients"), exact, mixed, half, strict=True):
        found, limit = ((of - value).norm() / value.norm() for of in (ours, autocast))
        print(f"{adapter} {dtype}, error of {what}: {found:.3%}, stock modules under autocast {limit:.3%}")
        assert found <= 1.3 * limit <= 0.065
