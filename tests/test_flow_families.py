"""What every flow-matching family does alike: whole runs, gradients, the plan, and refusals. What differs: its own file."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from compile_counts import compile_as_traced, forget
from flow_runs import FAMILIES, FULL, PROMPTS, SIZE, WITHOUT_T5
from known_traces import trace_nothing
from on_ranks import ON_RANKS, SHARED, train_all, zero
from run_files import distance, equal, weights
from test_compile import compiler
from test_sdxl import load
from torch._dynamo.utils import counters

from fastloop.config import SamplingConfig
from fastloop.denoisers import ready_denoiser
from fastloop.errors import UserError
from fastloop.kernels import reference
from fastloop.kernels.reference import initial_noise
from fastloop.memory.traces import LiveBytes, Traced, update_loss
from fastloop.plan import plan
from fastloop.preflight import preflight
from fastloop.tracking import read_rows

CPU = torch.device("cpu")


@pytest.fixture(params=FAMILIES, ids=lambda of: of.fixture)
def family(request):
    return request.param


@pytest.fixture
def path(request, family) -> str:
    return request.getfixturevalue(family.fixture)


@pytest.fixture
def make_run(make_flow_run, path, family):
    return partial(make_flow_run, path, family.length)


@pytest.fixture
def config_of(make_config, path, family):
    """A function of changes that gives the configuration of a run without guidance."""

    def make(model: dict | None = None, sampling: dict | None = None, **changes):
        model = {"path": path, "max_sequence_length": family.length, **(model or {})}
        return make_config(model=model, sampling={"eta": 0.7, "guidance_scale": 1.0, **SIZE, **(sampling or {})}, **changes)

    return make


@pytest.mark.parametrize(
    "model, sampling, changes",
    [
        ({}, {"guidance_scale": 2.0}, {"kl": {"weight": 0.1}}),
        (FULL, {}, {"kl": {"weight": 0.1}, "ema": {"decay": 0.5}, "optimizer": {"lr": 1e-4}}),
        ({"dtype": "bf16"}, {"noise": "cps", "eta": 0.5}, {"optimizer": {"name": "adamw8bit", "lr": 1e-2}}),
        ({}, {"noise": "dance", "eta": 0.3}, {}),
    ],
    ids=str,
)
def test_it_trains_from_a_ratio_of_exactly_1_and_resumes_to_the_same_weights(
    make_run, family, model, sampling, changes
) -> None:
    changes = {"model": model, "sampling": family.sampling | sampling, "safety": {"max_ratio_dev": 0}, **changes}
    one = {"prompts_per_step": 1, "images_per_prompt": 5}  # a rollout is one batch, as large as the first update's
    whole = make_run("whole", **changes, **one)
    first = read_rows(whole.folder / "metrics.jsonl")[0]
    assert first["policy/replay_max_dev"] == first["policy/ratio_first_dev"] == 0 < first["policy/grad_norm"]
    assert whole.steps_trained.tolist() == [0, 1, 2]
    start, end = weights(whole.folder, 0), weights(whole.folder, 2)
    assert all((start[name] != end[name]).any() for name in start if "lora_B" in name or "proj_out" in name)
    make_run("broken", iterations=1, **changes, **one)
    broken = make_run("broken", resume=True, **changes, **one)
    assert equal(weights(broken.folder, 2), end)


@pytest.mark.timeout(600)
def test_two_ranks_equal_one_and_deepspeed_equals_torch(make_run, path, family, tmp_path) -> None:
    model = {"path": path, "max_sequence_length": family.length, "lora": {"rank": 2}}
    base = {**ON_RANKS, "sampling": {"steps": 3, "eta": 0.7, "guidance_scale": 1.0, **SIZE}, "model": model}
    runs = [("lora", base | zero(2)), ("full", {**base, **zero(3), "model": {**model, **FULL}})]
    train_all(tmp_path, 2, [{**values, "output_dir": str(tmp_path / name)} for name, values in runs])
    for name, values in runs:
        same = {key: values[key] for key in SHARED}
        wanted = make_run(f"torch-{name}", model={"lora": {"rank": 2}, "adapter": name}, **same).folder
        start = weights(wanted, 0)
        assert equal(weights(tmp_path / name, 0), start)
        assert distance(weights(tmp_path / name), weights(wanted), start) < 1e-3
        assert read_rows(tmp_path / name / "metrics.jsonl")[0]["policy/replay_max_dev"] == 0


@compiler
def test_its_repeated_blocks_are_compiled_and_give_what_eager_ones_do(path, family, monkeypatch) -> None:
    """Traced for real; the graphs run as they are, which takes seconds where a C++ compiler takes minutes."""
    monkeypatch.setattr(torch, "compile", compile_as_traced)
    found = []
    for compiled in (False, "regional"):
        denoiser = load(path, lora={"rank": 2}, max_sequence_length=family.length, compile=compiled)
        denoiser.train_adapter(False, 0)
        if compiled:
            forget()
            denoiser.compile()
        cond, _ = denoiser.encode(PROMPTS, SamplingConfig(guidance_scale=1.0))
        x, t = initial_noise(0, torch.arange(3), family.latents), torch.tensor([960.1, 500.0, 8.9])
        with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
            output = denoiser.predict(x, t, cond, None)[0]
        output.square().mean().backward()
        found.append((output, {name: p.grad for name, p in denoiser.trainable().items()}))
    assert counters["stats"]["unique_graphs"] >= 1 and not counters["graph_break"]
    (output, gradients), (of_compiled, theirs) = found
    torch.testing.assert_close(of_compiled, output, rtol=0, atol=1e-5)
    assert max(gradient.abs().max() for gradient in gradients.values()) > 1e-4
    for name, gradient in gradients.items():
        torch.testing.assert_close(theirs[name], gradient, rtol=0, atol=1e-6)


def test_the_forward_process_trains_it_without_stored_steps(make_run) -> None:
    trainer = make_run("run", algorithm="loop_forward", sampling={"eta": 0.0})
    rows = read_rows(trainer.folder / "metrics.jsonl")
    assert all(row["policy/denoising_loss_better"] > 0 < row["policy/grad_norm"] for row in rows)


@pytest.mark.parametrize("family", [*FAMILIES, WITHOUT_T5], ids=lambda of: of.fixture)
def test_every_adapter_has_a_gradient_also_with_checkpointing(path, family) -> None:
    gradients = []
    for checkpointing in (False, True):
        denoiser = load(path, lora={"rank": 2}, max_sequence_length=family.length)
        denoiser.train_adapter(checkpointing, 0)
        for name, p in denoiser.trainable().items():
            p.data += 0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name)))
        cond, _ = denoiser.encode(PROMPTS, SamplingConfig(guidance_scale=1.0))
        x, t = initial_noise(0, torch.arange(3), family.latents), torch.tensor([960.1, 500.0, 8.9])
        denoiser.predict(x, t, cond, None)[0].square().mean().backward()
        gradients.append({name: p.grad for name, p in denoiser.trainable().items()})
    assert all(g is not None and g.abs().max() > 0 for g in gradients[0].values())
    assert equal(*gradients) and len(gradients[0]) == 2 * family.layers


def test_the_plan_counts_all_parts_and_what_a_real_forward_keeps(config_of, path, family, monkeypatch) -> None:
    config, denoiser = config_of(), load(path)
    with monkeypatch.context() as patch:
        trace_nothing(patch)
        rows = [line.split() for line in plan(config)]
    for name in family.parts:
        assert [*name.split("_"), f"{sum(p.numel() for p in denoiser.parts[name].parameters()):,}"] in rows
    denoiser = ready_denoiser(config, CPU, trained=True)
    with LiveBytes() as live:
        update_loss(denoiser, config, reference, 3).backward()
    traced = Traced(config, preflight(config).skeleton, accumulates=False, on_gpu=False)
    assert traced.update.peak(3) == pytest.approx(live.peak, rel=0.05)


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"model": {"lora": {"text_encoders": True}}}, "model.lora.text_encoders: those of this model are not trained"),
        (
            {"model": {"lora": {"target_modules": ["conv1"]}}},
            "model.lora.target_modules: the transformer has no",
        ),
        ({"model": {"attention": "xformers"}}, "model.attention: "),
        (
            {"memory": {"gradient_checkpointing": ["transformer_blocks.0"]}},
            "memory.gradient_checkpointing: this network",
        ),
        ({"sampling": {"width": 18}}, "sampling.width: 18 is not a multiple of 4 pixels"),
        ({"sampling": {"target_size": [8, 8]}}, "sampling.target_size: only SDXL is told of picture sizes"),
        ({"sampling": {"noise": "ddim"}}, "sampling.noise=ddim: this model is a flow; set it to sde, dance, cps, or to null"),
        ({"sampling": {"steps": 1}}, "sampling.steps: none of 1 steps can be trained"),
        (
            {"algorithm": "loop_forward", "forward": {"window": [250, 1001]}},
            "forward.window: ends at 1001, the model's .* 1000",
        ),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused_in_one_line_before_the_model_loads(config_of, changes, says) -> None:
    with pytest.raises(UserError, match=says) as caught:
        preflight(config_of(**changes))
    assert "\n" not in str(caught.value)
