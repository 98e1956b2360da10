"""Frozen weights in 8 and 4 bits: what they round to, that the rest of a run is as with whole ones, and what is refused."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from diffusers import StableDiffusion3Pipeline, StableDiffusionPipeline
from known_traces import trace_nothing
from on_ranks import ON_RANKS, SHARED, train_all, zero
from run_files import distance, equal, weights
from test_quantised_layers import PRECISIONS, dequantised
from tiny_pipelines import make_sd, make_sd3, make_sdxl
from torch import nn

from fastloop.config import SamplingConfig
from fastloop.denoisers import load_denoiser, ready_denoiser
from fastloop.denoisers.lora import LoraLinear
from fastloop.denoisers.quantised import BLOCK, QuantisedLinear
from fastloop.errors import UserError
from fastloop.kernels.reference import initial_noise
from fastloop.memory.traces import LiveBytes, Traced, update_loss
from fastloop.plan import plan, planned_memory
from fastloop.preflight import preflight
from fastloop.runs import open_model
from fastloop.tracking import read_rows
from fastloop.trainer import Trainer

CPU, META = torch.device("cpu"), torch.device("meta")
# Norm of the error of a network's output, in parts of the output's norm: that of the tiny ones with random weights here.
OUTPUT = {"int8": 0.02, "nf4": 0.2}
GUIDED = SamplingConfig(steps=4, guidance_scale=2.0)


@pytest.fixture(autouse=True)
def every_text_encoder_is_large(monkeypatch):
    monkeypatch.setattr("fastloop.denoisers.quantised.LARGE", 0)


@pytest.fixture(scope="module")
def paths(tmp_path_factory) -> dict[str, str]:
    """A tiny model of each family, as wide as a block of nf4 where most of its linear layers are."""
    wide = {"block_out_channels": (64, 64)}
    joint = {"attention_head_dim": 32, "caption_projection_dim": 64, "joint_attention_dim": 64}
    return {
        "sd": make_sd(tmp_path_factory.mktemp("wide_sd"), **wide),
        "sdxl": make_sdxl(tmp_path_factory.mktemp("wide_sdxl"), **wide),
        "sd3": make_sd3(tmp_path_factory.mktemp("wide_sd3"), of_network=joint),
    }


@pytest.fixture
def config_of(make_config, paths):
    """A function of a family, a precision and keys of the model, that gives a configuration."""

    def make(family: str, precision: str | None, changes: dict | None = None, **of_model):
        length = {"max_sequence_length": 12} if family == "sd3" else {}
        model = {"path": paths[family], "base_precision": precision, **length, **of_model}
        sampling = {"steps": 4, "eta": 0.7, "guidance_scale": 2.0}
        return make_config(model=model, **{"sampling": sampling, **(changes or {})})

    return make


def held_layers(module: nn.Module) -> dict[str, QuantisedLinear]:
    return {name: m for name, m in module.named_modules() if isinstance(m, QuantisedLinear)}


def unpack(module: nn.Module, dtype: torch.dtype) -> None:
    """Makes stock linear layers of the held ones, with the weights that these stand for."""
    for of in held_layers(module).values():
        of.weight = nn.Parameter(dequantised(of, dtype), False)
        del of.scales
        of.__class__ = nn.Linear


# --- models --------------------------------------------------------------------------------------------------------------


def step(denoiser) -> dict[str, torch.Tensor]:
    """The outputs of `predict` and the gradients of all adapters."""
    x = initial_noise(0, torch.arange(3), denoiser.latent_shape(None, None))
    t = torch.tensor([960, 500, 8]).to(denoiser.timestep_dtype)
    outputs = denoiser.predict(x, t, *denoiser.encode(["a cat", "two dogs", "a"], GUIDED))
    loss = sum(output.float().square().mean() for output in outputs)
    gradients = torch.autograd.grad(loss, list(denoiser.trainable().values()))
    return {"with": outputs[0].detach(), "without": outputs[1].detach()} | dict(
        zip(denoiser.trainable(), gradients, strict=True)
    )


def ready(config, adapters: float = 0.1):
    """Ready for training, some way into it."""
    denoiser = ready_denoiser(config, CPU, trained=True)
    generator = torch.Generator().manual_seed(0)
    for p in denoiser.trainable().values():
        p.data += adapters * torch.randn(p.shape, generator=generator)
    return denoiser


def gap(one: torch.Tensor, other: torch.Tensor) -> float:
    """Norm of the difference, in parts of the other's."""
    return ((one - other).float().norm() / other.float().norm()).item()


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("family, checkpointing", [("sd", False), ("sdxl", True), ("sd3", True)])
def test_outputs_and_gradients_are_those_of_the_rounded_weights(config_of, family, checkpointing, precision):
    config = config_of(family, precision, {"memory": {"gradient_checkpointing": checkpointing}})
    denoiser = ready(config)
    layers, network = held_layers(denoiser.network), denoiser.network
    linear = {name: m for name, m in network.named_modules() if isinstance(m, nn.Linear) and "lora" not in name}
    assert set(layers) == {name for name, m in linear.items() if m.in_features % BLOCK == 0} and len(layers) > 10
    assert all(p.dtype == torch.float32 for p in denoiser.trainable().values())
    assert len([m for m in network.modules() if type(m) is LoraLinear and isinstance(m.base_layer, QuantisedLinear)]) > 5
    found = step(denoiser)
    assert all(value.abs().max() > 0 for value in found.values())
    for part in denoiser.parts.values():
        unpack(part, torch.float32)
    denoiser._embeddings.clear()
    wanted = step(denoiser)
    assert max(gap(found[name], wanted[name]) for name in wanted) < 1e-5
    exact = step(ready(config_of(family, None)))
    assert 1e-4 < max(gap(found[name], exact[name]) for name in ("with", "without")) < OUTPUT[precision]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_large_text_encoders_are_held_too_and_half_precision_computes_in_it(config_of, precision, monkeypatch):
    config = config_of("sd3", precision, dtype="bf16")
    denoiser = load_denoiser(config.model, CPU)
    t5 = denoiser.text_encoders["text_encoder_3"]
    assert len(held_layers(t5)) == 2 * (3 + 2)  # per layer q, k, v and the two first of the gated product
    (cond, _), (exact, _) = (
        of.encode(["a red dog"], GUIDED) for of in (denoiser, load_denoiser(config_of("sd3", None).model, CPU))
    )
    assert cond.text.dtype == torch.bfloat16
    assert 1e-4 < gap(cond.text[:, 16:], exact.text[:, 16:]) < OUTPUT[precision]
    monkeypatch.setattr("fastloop.denoisers.quantised.LARGE", 10**9)
    small = load_denoiser(config.model, CPU)
    assert not held_layers(small.text_encoders["text_encoder_3"]) and held_layers(small.network)


def test_in_fp16_layers_that_stay_in_float32_stay_whole(config_of):
    denoiser = load_denoiser(config_of("sd3", "int8", dtype="fp16").model, CPU)
    t5 = denoiser.text_encoders["text_encoder_3"]
    assert {m.weight.dtype for name, m in t5.named_modules() if name.endswith(".wo")} == {torch.float32}
    assert denoiser.encode(["a red dog"], GUIDED)[0].text.isfinite().all()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_held_text_encoder_travels_to_the_device_and_stays_the_same(config_of, precision):
    denoiser = load_denoiser(config_of("sd3", precision).model, CPU)
    denoiser.network.to(META)
    denoiser.device = META
    denoiser.offload_frozen()
    t5, seen = denoiser.text_encoders["text_encoder_3"], set()
    before = {name: value.clone() for name, value in t5.state_dict().items()}
    for module in held_layers(t5).values():
        module.register_forward_pre_hook(lambda m, _: seen.update((m.weight.device.type, m.scales.device.type)))
    assert denoiser.encode(["a dog"], GUIDED)[0].text.device == META
    assert seen == {"meta"} and equal(before, t5.state_dict())


# --- runs ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def make_run(config_of, tmp_path, no_report):
    """A function that trains in a folder of that name."""

    def make(name: str, family: str, precision: str | None, resume: bool = False, of_model=None, **changes) -> Trainer:
        small = {
            "eval": {"every": 9, "prompts": {"source": "animals", "limit": 1}},
            "checkpoint": {"every": 1, "keep": 9},
            "memory": {"rollout_batch": 5, "update_batch": 5, "gradient_checkpointing": True},
            "output_dir": str(tmp_path / name),
        }
        trainer = Trainer(config_of(family, precision, small | changes, **(of_model or {})), resume)
        trainer.train()
        return trainer

    return make


@pytest.mark.parametrize(
    "family, precision, of_model",
    [("sd", "int8", {"dtype": "bf16"}), ("sdxl", "nf4", {}), ("sd3", "nf4", {"dtype": "bf16"})],
    ids=str,
)
def test_a_run_starts_at_a_ratio_of_exactly_1_resumes_to_the_same_weights_and_is_opened_again(
    make_run, family, precision, of_model
):
    changes = {"safety": {"max_ratio_dev": 0}, "kl": {"weight": 0.1}, "prompts_per_step": 1, "images_per_prompt": 5}
    changes |= {"sampling": {"steps": 3, "eta": 0.7, "guidance_scale": 2.0}}
    run = lambda name, **more: make_run(name, family, precision, of_model=of_model, **changes | more)  # noqa: E731
    trainer = run("whole")
    first = read_rows(trainer.folder / "metrics.jsonl")[0]
    assert first["policy/replay_max_dev"] == first["policy/ratio_first_dev"] == 0 < first["policy/grad_norm"]
    start, end = weights(trainer.folder, 0), weights(trainer.folder, 2)
    assert {value.dtype for value in end.values()} == {torch.float32}
    assert all((start[name] != end[name]).any() for name in start if "lora_B" in name)
    run("broken", iterations=1)
    with pytest.raises(UserError, match="model.base_precision"):  # it would be another run
        make_run("broken", family, None, True, of_model, **changes)
    assert equal(weights(run("broken", resume=True).folder, 2), end)
    opened = open_model(str(trainer.folder), [])[1]()  # as `sample` and `eval` do
    assert held_layers(opened.network).keys() == held_layers(trainer.denoiser.network).keys() != set()
    x = initial_noise(0, torch.arange(2), opened.latent_shape(None, None))
    t = torch.tensor([900, 20]).to(opened.timestep_dtype)
    with torch.no_grad():
        ours, again = (of.predict(x, t, *of.encode(["a", "a cat"], GUIDED))[0] for of in (trainer.denoiser, opened))
    assert torch.equal(ours, again)
    assert not held_layers(open_model(str(trainer.folder), ["model.base_precision=null"])[1]().network)


def test_the_reference_of_a_kl_is_the_held_model_without_adapters(config_of):
    config = config_of("sd3", "nf4", {"kl": {"weight": 0.1}})
    denoiser, base = ready(config), ready_denoiser(config, CPU, adapter=False)
    x, t = initial_noise(0, torch.arange(1), denoiser.latent_shape(None, None)), torch.tensor([500.0])
    with torch.no_grad(), denoiser.reference():
        reference = denoiser.predict(x, t, *denoiser.encode(["a"], GUIDED))[0]
    with torch.no_grad():
        own, wanted = (of.predict(x, t, *of.encode(["a"], GUIDED))[0] for of in (denoiser, base))
    assert torch.equal(reference, wanted) and gap(own, reference) > 1e-3


@pytest.mark.timeout(600)
def test_two_ranks_with_deepspeed_equal_one_without(make_run, paths, tmp_path):
    base = {**ON_RANKS, "sampling": {"steps": 3, "eta": 0.7, "guidance_scale": 2.0}, **zero(2)}
    model = {"path": paths["sd"], "base_precision": "nf4", "lora": {"rank": 2}}
    train_all(tmp_path, 2, [{**base, "model": model, "output_dir": str(tmp_path / "ranks")}])
    wanted = make_run("torch", "sd", "nf4", **{key: base[key] for key in SHARED}).folder
    start = weights(wanted, 0)
    assert equal(weights(tmp_path / "ranks", 0), start)
    assert distance(weights(tmp_path / "ranks"), weights(wanted), start) < 1e-3
    assert read_rows(tmp_path / "ranks" / "metrics.jsonl")[0]["policy/replay_max_dev"] == 0


@pytest.mark.parametrize("family, pipeline", [("sd", StableDiffusionPipeline), ("sd3", StableDiffusion3Pipeline)])
def test_an_export_loads_on_the_whole_base_in_stock_diffusers(make_run, paths, family, pipeline):
    trainer = make_run("run", family, "nf4", iterations=1, optimizer={"lr": 0.1})
    denoiser, name = trainer.denoiser, trainer.denoiser.network_name
    stock = pipeline.from_pretrained(paths[family])
    stock.load_lora_weights(trainer.folder / "export")
    network = getattr(stock, name)
    theirs = {key: value for key, value in network.state_dict().items() if "lora" in key}
    ours = {key: value for key, value in denoiser.network.state_dict().items() if "lora" in key}
    assert [value.shape for value in theirs.values()] == [value.shape for value in ours.values()]
    assert all(torch.equal(a, b) for a, b in zip(theirs.values(), ours.values(), strict=True))
    x, t = initial_noise(0, torch.arange(2), denoiser.latent_shape(None, None)), torch.tensor([500.0, 20.0])
    cond, _ = denoiser.encode(["a dog", "a"], SamplingConfig(guidance_scale=1.0))
    with torch.no_grad():
        given = (
            {"hidden_states": x, "encoder_hidden_states": cond.text, "pooled_projections": cond.pooled}
            if (family == "sd3")
            else {"sample": x, "encoder_hidden_states": cond}
        )
        own = denoiser.predict(x, t.to(denoiser.timestep_dtype), cond, None)[0]
        on_whole = network(timestep=t, **given)[0]
        rounded = dict(network.named_modules())
        for key, of in held_layers(denoiser.network).items():
            rounded[key].weight.copy_(dequantised(of))
        on_rounded = network(timestep=t, **given)[0]
    assert gap(on_rounded, own) < 1e-5 < gap(on_whole, own) < OUTPUT["nf4"]


# --- the plan, what is refused -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["sd", "sdxl", "sd3"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_plan_counts_the_bytes_of_the_real_modules(config_of, family, precision, monkeypatch):
    trace_nothing(monkeypatch)
    config, whole_ones = (config_of(family, of, dtype="bf16") for of in (precision, None))
    denoiser = load_denoiser(config.model, CPU)
    sizes = {name: sum(p.nbytes for p in part.parameters()) for name, part in denoiser.parts.items()}
    network = "transformer" if family == "sd3" else "UNet"
    parts, before = (planned_memory(of).parts for of in (config, whole_ones))
    adapters = 2 * sum(p.numel() for p in preflight(config).skeleton.trainable().values())
    buffers = sum(b.nbytes for b in denoiser.network.buffers())
    assert parts[network] == sizes.pop(denoiser.network_name) + adapters + buffers < before[network]
    assert parts["VAE"] == sizes.pop("vae") == before["VAE"]
    assert parts["text encoders"] == sum(sizes.values())
    assert (parts["text encoders"] < before["text encoders"]) == (family == "sd3")
    bits = {name: 8 * m.weight.nbytes / (m.in_features * m.out_features) for name, m in held_layers(denoiser.network).items()}
    assert set(bits.values()) == {8 if precision == "int8" else 4}
    lines, usual = plan(config), plan(whole_ones)
    begin, end = (lines.index("parameters"), next(i for i, line in enumerate(lines) if line.startswith("memory")))
    assert lines[begin:end] == usual[begin:end]  # as many as there are, however they are held
    assert lines[0].endswith(f"bf16, frozen weights in {precision}, 16 x 16 pixels")


@pytest.mark.parametrize("family, precision", [("sd", "nf4"), ("sdxl", "int8"), ("sd3", "nf4")])
def test_the_bytes_of_an_update_are_those_of_a_real_one(config_of, family, precision):
    config = config_of(family, precision)
    denoiser = ready_denoiser(config, CPU, trained=True)
    traced = Traced(config, preflight(config).skeleton, accumulates=False, on_gpu=False)
    with LiveBytes() as live:
        update_loss(denoiser, config, traced.ops, 3).backward()
    assert traced.update.peak(3) == pytest.approx(live.peak, rel=0.05)


FULL = "model.base_precision: nf4 is for weights that stay as they are, and model.adapter=full trains them: set "
ZERO = "model.base_precision: engine.zero_stage=3 gathers weights of the dtype that it computes in: set zero_stage=2, "


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"adapter": "full"}, FULL + "model.adapter=lora, or base_precision to null"),
        (zero(3), ZERO + "which leaves the frozen weights whole, or base_precision to null"),
        ({"base_precision": "int4"}, "model.base_precision: "),
    ],
    ids=str,
)
def test_what_does_not_work_is_refused_in_one_line(make_config, changes, says):
    model = {"base_precision": "nf4", **({} if "engine" in changes else changes)}
    with pytest.raises(UserError) as refused:
        make_config(model=model, **({"engine": changes["engine"]} if "engine" in changes else {}))
    assert says in str(refused.value) and "\n" not in str(refused.value)


def test_without_bitsandbytes_it_is_refused_before_the_model_loads(make_config, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "bitsandbytes" else find(name, *a))
    with pytest.raises(UserError, match=r"^model.base_precision: int8 needs bitsandbytes: pip install fastloop\[bnb\], or"):
        preflight(make_config(model={"base_precision": "int8"}))
