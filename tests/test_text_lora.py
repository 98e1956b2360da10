"""Adapters on the text encoders: trained through the embeddings, exact, exported as stock diffusers loads them, planned."""

from __future__ import annotations

import json

import pytest
import torch
from known_traces import remember_traces, trace_nothing
from on_ranks import FEW, ON_RANKS, SHARED, train_all, zero
from run_files import distance, equal, weights
from safetensors.torch import load_file
from stock_sdxl import levels, pictures, stock, stock_run

from fastloop import kernels
from fastloop.config import ModelConfig, SamplingConfig
from fastloop.denoisers import load_denoiser, ready_denoiser
from fastloop.errors import UserError
from fastloop.memory.traces import LiveBytes, Traced, update_loss
from fastloop.plan import plan, planned_memory
from fastloop.preflight import preflight
from fastloop.tracking import read_rows
from fastloop.trainer import Trainer

CPU = torch.device("cpu")
TEXT = {"lora": {"rank": 2, "text_encoders": True}}


@pytest.fixture(params=["tiny_sd", "tiny_sdxl"])
def path(request) -> str:
    return request.getfixturevalue(request.param)


@pytest.fixture
def make_run(make_config, path, tmp_path, monkeypatch):
    """A function that trains a tiny model in a folder of that name."""
    monkeypatch.setattr("fastloop.training_run.write_report", lambda folder: None)  # takes longer than these runs

    def make(name: str, resume: bool = False, model: dict | None = None, **changes) -> Trainer:
        small = {"eval": FEW, "checkpoint": {"every": 1, "keep": 9}, "memory": {"rollout_batch": 6, "update_batch": 6}}
        config = make_config(model={"path": path, **TEXT, **(model or {})}, output_dir=str(tmp_path / name), **small | changes)
        trainer = Trainer(config, resume)
        trainer.train()
        return trainer

    return make


def trained(path: str, size: float = 0.05, **model):
    denoiser = load_denoiser(ModelConfig(path=path, **TEXT | model), CPU)
    denoiser.train_adapter(False, seed=0)
    generator = torch.Generator().manual_seed(0)
    for parameter in denoiser.trainable().values():
        parameter.data += size * torch.randn(parameter.shape, generator=generator)
    return denoiser


def flat(conditioning) -> torch.Tensor:
    """What the UNet is told, of either family, as one tensor."""
    tensors = [conditioning] if isinstance(conditioning, torch.Tensor) else [conditioning.text, conditioning.pooled]
    return torch.cat([tensor.flatten() for tensor in tensors])


def test_adapters_are_on_every_attention_layer_whose_output_is_used(path):
    denoiser = trained(path)
    names = {name.split(".lora_")[0] for name in denoiser.trainable() if name.startswith("text_encoder")}
    wanted = set()
    for part, encoder in denoiser.text_encoders.items():
        last = encoder.config.num_hidden_layers - 1
        layers = [n for n, _ in encoder.named_modules() if n.endswith(("q_proj", "k_proj", "v_proj", "out_proj"))]
        idle = f"layers.{last}." if part == "text_encoder" and len(denoiser.text_encoders) == 2 else "none"
        wanted |= {f"{part}.{name}" for name in layers if idle not in name}
    assert names == wanted and len(names) >= 4
    assert {p.dtype for p in denoiser.trainable().values()} == {torch.float32}


def test_updates_reach_every_text_adapter_and_the_frozen_weights_stay(make_run):
    trainer = make_run("run", kl={"weight": 0.1}, safety={"max_ratio_dev": 0}, iterations=1)
    first = read_rows(trainer.folder / "metrics.jsonl")[0]
    assert first["policy/replay_max_dev"] == 0 and first["policy/ratio_first_dev"] == 0
    start, end = weights(trainer.folder, 0), weights(trainer.folder, 1)
    assert any(name.startswith("text_encoder.") for name in start)
    assert all((start[name] != end[name]).any() for name in start if "lora_B" in name)
    base = load_denoiser(trainer.config.model, CPU)
    for name, encoder in base.text_encoders.items():
        ours = trainer.denoiser.text_encoders[name].state_dict()
        ours = {key.replace(".base_layer", ""): value for key, value in ours.items() if "lora_" not in key}
        assert equal(ours, encoder.state_dict())


def test_the_gradient_is_that_of_the_loss_by_finite_differences(path):
    """Through embedding, UNet and loss, in float64, along the direction of the gradient of the text adapters."""
    denoiser = trained(path)
    for part in denoiser.parts.values():
        part.double()
    x, t = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1)), torch.tensor([100, 700])

    def loss() -> torch.Tensor:
        cond, uncond = denoiser.encode(["a cat", "a dog"], SamplingConfig(guidance_scale=3.0, negative_prompt="a bee"))
        arguments = denoiser.network_arguments(cond, uncond)
        arguments = {
            name: value.double() if isinstance(value, torch.Tensor) else {k: v.double() for k, v in value.items()}
            for name, value in arguments.items()
        }
        return denoiser.network(x.double().repeat(2, 1, 1, 1), t.repeat(2), **arguments).sample.square().sum()

    parameters = [p for name, p in denoiser.trainable().items() if name.startswith("text_encoder")]
    assert all(p.dtype == torch.float64 for p in parameters)
    gradients = torch.autograd.grad(loss(), parameters)
    norm = sum(g.square().sum() for g in gradients).sqrt()
    values = []
    with torch.no_grad():
        for h in (1e-5, -2e-5):
            for p, g in zip(parameters, gradients, strict=True):
                p += h * g / norm
            values.append(loss())
    assert norm > 1e-6
    # values are in float32 at the embeddings' cast, so the difference is good to a few digits
    assert float((values[0] - values[1]) / 2e-5) == pytest.approx(float(norm), rel=1e-2)


def test_embeddings_follow_the_weights_and_the_reference_has_those_before_training(path):
    denoiser, sampling = trained(path, size=0.0), SamplingConfig(guidance_scale=1.0)
    before = flat(denoiser.encode(["a cat"], sampling)[0])
    for parameter in denoiser.trainable().values():
        parameter.data += 0.1
    after = flat(denoiser.encode(["a cat"], sampling)[0])
    with denoiser.reference():
        reference = flat(denoiser.encode(["a cat"], sampling)[0])
    assert (after - before).abs().max() > 1e-3
    assert torch.equal(reference, before)
    assert torch.equal(flat(denoiser.encode(["a cat"], sampling)[0]), after)


def test_resumed_it_equals_the_unbroken_run(make_run):
    changes = {"ema": {"decay": 0.5}}
    end = weights(make_run("whole", **changes).folder, 2)
    make_run("broken", iterations=1, **changes)
    assert equal(weights(make_run("broken", resume=True, **changes).folder, 2), end)


@pytest.mark.parametrize("path", ["tiny_sdxl"], indirect=True)
def test_sdxl_exported_gives_the_same_pictures_in_stock_diffusers(make_run, path):
    trainer = make_run("run", optimizer={"lr": 0.1})
    sampling = SamplingConfig(steps=4, guidance_scale=3.0)
    trainer.denoiser.export(trainer.folder / "kohya", format="kohya")
    ours = pictures(trainer, sampling)
    for export in ("kohya", "export"):
        pipeline = stock(path)
        pipeline.load_lora_weights(trainer.folder / export)
        after = stock_run(pipeline, sampling, (4, 8, 8))[1]
        assert levels(ours, after) <= 1
    pipeline.text_encoder.disable_adapters()
    pipeline.text_encoder_2.disable_adapters()
    assert levels(stock_run(pipeline, sampling, (4, 8, 8))[1], after) > 5


@pytest.mark.parametrize("path", ["tiny_sd"], indirect=True)
@pytest.mark.parametrize("alpha", [None, 8.0])
def test_sd_exported_gives_the_same_embeddings_in_stock_diffusers(path, tmp_path, alpha):
    denoiser = trained(path, 0.2, lora={**TEXT["lora"], "alpha": alpha})
    ours, _ = denoiser.encode(["a red circle"], SamplingConfig(guidance_scale=1.0))
    names = {}
    for format in ("diffusers", "kohya"):
        denoiser.export(tmp_path / format, format=format)
        pipeline = stock(path)
        before, _ = pipeline.encode_prompt("a red circle", CPU, 1, False)
        pipeline.load_lora_weights(tmp_path / format)
        after, _ = pipeline.encode_prompt("a red circle", CPU, 1, False)
        assert (after - before).abs().max() > 1e-2
        torch.testing.assert_close(ours, after)
        names[format] = load_file(tmp_path / format / "pytorch_lora_weights.safetensors").keys()
    # readers before transformers 5 and those of kohya's format look for this level
    assert {name.split(".layers")[0] for name in names["diffusers"]} >= {"text_encoder.text_model.encoder"}
    assert {name.split("_layers")[0] for name in names["kohya"] if "_te_" in name} == {"lora_te_text_model_encoder"}


def test_the_plan_counts_adapters_and_what_the_text_encoders_keep_for_the_backward(make_config, path, monkeypatch):
    remember_traces(monkeypatch)
    whole = {"memory": {"rollout_batch": 6, "update_batch": 6}, "updates_per_rollout": 4}  # one micro-batch an update
    config = make_config(model={"path": path, **TEXT}, **whole)
    plain = make_config(model={"path": path, "lora": {"rank": 2}}, **whole)
    rows = [line.split() for line in plan(config)]
    denoiser = ready_denoiser(config, CPU, trained=True)
    assert ["trained", f"{sum(p.numel() for p in denoiser.trainable().values()):,}"] in rows
    base = load_denoiser(config.model, CPU)
    for name, encoder in base.text_encoders.items():
        assert [*name.split("_"), f"{sum(p.numel() for p in encoder.parameters()):,}"] in rows
    assert planned_memory(config).phases["update"] > planned_memory(plain).phases["update"]
    with LiveBytes() as live:
        update_loss(denoiser, config, kernels.reference, 3).backward()
    traced = Traced(config, preflight(config).skeleton, accumulates=False, on_gpu=False)
    assert traced.update.peak(3) == pytest.approx(live.peak, rel=0.05)


def test_text_encoders_that_train_stay_on_the_device(make_config, path, monkeypatch):
    trace_nothing(monkeypatch)
    config = make_config(model={"path": path, **TEXT})
    denoiser = load_denoiser(config.model, CPU)
    denoiser.device = torch.device("meta")
    denoiser.offload_frozen()
    assert denoiser._resting == (denoiser.vae,)
    on_gpu = planned_memory(config, gpu=True)
    checked = preflight(config, gpu=True)
    assert "text encoders" in on_gpu.parts and checked.skeleton.trains_text


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"model": {"adapter": "full", **TEXT}}, "model.lora.text_encoders: model.adapter=full trains the UNet alone"),
        (
            {"model": TEXT, "engine": {"name": "deepspeed", "zero_stage": 3}},
            "model.lora.text_encoders: engine.zero_stage=3 shares out the UNet alone: set it to false, or zero_stage=2",
        ),
    ],
    ids=str,
)
def test_what_does_not_go_together_is_refused(make_config, changes, says):
    with pytest.raises(UserError) as caught:
        make_config(**changes)
    assert says in str(caught.value)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("path", ["tiny_sdxl"], indirect=True)
def test_deepspeed_trains_them_as_the_plain_engine_does(make_run, path, tmp_path):
    base = {**ON_RANKS, "model": {"path": path, **TEXT}}
    two, bf16 = base | zero(2), base | zero(1) | {"model": {**base["model"], "dtype": "bf16"}}
    runs = [
        two | {"output_dir": str(tmp_path / "two")},
        two | {"output_dir": str(tmp_path / "resumed"), "resume": str(tmp_path / "two")},
        base | zero(0) | {"output_dir": str(tmp_path / "zero")},
        bf16 | {"output_dir": str(tmp_path / "bf16"), "safety": {"max_ratio_dev": 1e-3}},
    ]
    train_all(tmp_path, 2, runs)
    wanted = make_run("torch", **{key: ON_RANKS[key] for key in SHARED}).folder
    for name in ("two", "zero"):
        assert equal(weights(tmp_path / name, 0), weights(wanted, 0))
        assert distance(weights(tmp_path / name), weights(wanted), weights(wanted, 0)) < 1e-3
    assert json.loads((tmp_path / "resumed" / "resumed.json").read_text()) == [1, None]
    assert equal(weights(tmp_path / "resumed"), weights(tmp_path / "two"))
    start, end = weights(tmp_path / "bf16", 0), weights(tmp_path / "bf16")
    assert all((start[name] != end[name]).any() for name in start if "text_encoder" in name and "lora_B" in name)
    stock(path).load_lora_weights(tmp_path / "two" / "export")
