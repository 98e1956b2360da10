"""The plan's numbers are those of the real run, and what cannot work is refused before any weights are read."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from known_traces import remember_traces, trace_nothing

from fastloop.batches import Batches, Rows, shuffled, trained_steps
from fastloop.denoisers import build_skeleton, ready_denoiser
from fastloop.engines.torch import TorchEngine
from fastloop.errors import UserError
from fastloop.kernels.reference import MicroBatch, policy_loss
from fastloop.memory.estimates import MemoryNeeds
from fastloop.memory.traces import LiveBytes, Traced
from fastloop.plan import derived_lines, plan, planned_memory, prompts_line, time_lines
from fastloop.preflight import preflight
from fastloop.prompts import Prompt
from fastloop.recipes import parse_config
from fastloop.rollout import sampler_table
from fastloop.trainer import Trainer

CPU = torch.device("cpu")
SHOWN = 0.05  # sizes are shown with one decimal
SIZES = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


@pytest.fixture(autouse=True)
def remembered(monkeypatch) -> None:
    remember_traces(monkeypatch)


@pytest.fixture
def untraced(remembered, monkeypatch) -> None:
    trace_nothing(monkeypatch)


def real_model(config):
    return ready_denoiser(config, CPU, trained=True)


def counted(config) -> dict[str, int]:
    """The plan's table of parameters."""
    lines = plan(config)
    rows = lines[lines.index("parameters") + 1 : lines.index("parameters") + 5]
    return {name: int(number.replace(",", "")) for name, number in (re.split(r"  +", row.strip()) for row in rows)}


# --- parameters and memory --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "model",
    [
        {},
        {"lora": {"rank": 3, "target_modules": ["to_k"]}, "dtype": "bf16"},
        {"adapter": "full"},
        {"path": "assets:shapes"},
    ],
    ids=lambda model: "-".join(model) or "lora",
)
def test_the_parameters_are_those_of_the_loaded_model(make_config, untraced, model):
    config = make_config(model=model)
    denoiser = real_model(config)
    modules = {name.replace("_", " "): module for name, module in denoiser.parts.items()}
    expected = {name: sum(p.numel() for p in module.parameters()) for name, module in modules.items()}
    expected["trained"] = sum(p.numel() for p in denoiser.trainable().values())
    if config.model.adapter == "lora":  # shown once, as trained
        expected["unet"] -= expected["trained"]
    assert counted(config) == expected
    engine = TorchEngine(denoiser.trainable(), config, denoiser.device)  # adapters in half precision get masters there
    parts, weights = planned_memory(config).parts, modules
    behind = sum(p.numel() * p.element_size() for p in engine.masters.values() if engine.masters is not engine.parameters)
    assert parts.get("master weights", 0) == behind
    assert parts["UNet"] == sum(p.numel() * p.element_size() for p in weights["unet"].parameters())
    assert parts["VAE"] == sum(p.numel() * p.element_size() for p in weights["vae"].parameters())


def live_in_update(denoiser, config, batch: int) -> int:
    """Bytes at most in a real forward and backward of so many pairs on the CPU, gradients from before included."""
    sampling = config.sampling
    cond, uncond = denoiser.encode(["a cat"] * batch, sampling)
    for p in denoiser.trainable().values():
        p.grad = None
    with LiveBytes() as live:
        for p in denoiser.trainable().values():
            p.grad = torch.empty_like(p)
        x = torch.empty(batch, *denoiser.latent_shape(sampling.height, sampling.width)).normal_()
        x_prev, step, row = torch.zeros_like(x), torch.zeros(batch, dtype=torch.int64), torch.ones(batch)
        text = cond.clone(), None if uncond is None else uncond.clone()
        outputs = denoiser.predict(x, step, *text)
        rows = MicroBatch(x, x_prev, row, row, row, row, row, step, step)
        settings = {"guidance": sampling.guidance_scale, "clip_range": config.clip_range, "objective": "clipped"}
        terms = policy_loss(*outputs, rows, **settings)
        terms.loss.sum().backward()
    return live.peak


CASES = [
    {},
    {"model": {"adapter": "full"}, "sampling": {"guidance_scale": 1, "height": 24, "width": 8}},
    {"memory": {"gradient_checkpointing": True}, "model": {"adapter": "full"}},
    {
        "memory": {"gradient_checkpointing": ["mid_block", "up_blocks.0.attentions"]},
        "model": {"lora": {"rank": 3, "target_modules": ["to_v", "conv1"]}},
    },
]


def traced(config) -> Traced:
    return Traced(config, preflight(config).skeleton, accumulates=True, on_gpu=False)


@pytest.mark.parametrize("changes", CASES, ids=str)
def test_the_bytes_of_an_update_are_those_of_a_real_one_at_any_batch(make_config, changes):
    config = make_config(**changes)
    denoiser, update = real_model(config), traced(config).update
    for batch in (7, 2, 1, 9):  # of the last two nothing is traced
        assert update.peak(batch) == pytest.approx(live_in_update(denoiser, config, batch), rel=0.04)


def test_gradient_checkpointing_keeps_less(make_config):
    config, less = make_config(), make_config(memory={"gradient_checkpointing": True})
    some = make_config(memory={"gradient_checkpointing": ["up_blocks"]})
    kept = [traced(c).activations(5) for c in (less, some, config)]
    assert kept == sorted(kept) and kept[0] < kept[1] < kept[2] and kept[0] < kept[2] / 2


@pytest.mark.parametrize("own", [True, ["mid_block"]])
def test_the_plan_says_what_either_choice_of_checkpointing_keeps(make_config, own):
    """Of one micro-batch, whatever the configuration's own choice."""
    lines = plan(make_config(memory={"gradient_checkpointing": own, "rollout_batch": 5}))
    assert lines[-3] == "activations by memory.gradient_checkpointing"
    found = dict(re.split(r"  +", line.strip()) for line in lines[-2:])
    for choice in (False, True):
        size, unit = found[str(choice).lower()].split()
        exact = traced(make_config(memory={"gradient_checkpointing": choice})).activations(4)
        assert float(size) * SIZES[unit] == pytest.approx(exact, rel=SHOWN)


def test_the_largest_batch_is_the_last_that_fits(make_config):
    update = traced(make_config()).update
    assert [update.largest(update.peak(batch), cap=64) for batch in (1, 5, 23)] == [1, 5, 23]
    assert update.largest(update.peak(5) + 1, cap=3) == 3
    assert update.largest(update.peak(1) - 1, cap=64) == 0


# --- the plan against a run -------------------------------------------------------------------------------------------


class Iterations(Trainer):
    """A run without what is no part of an iteration."""

    def _save(self) -> None: ...

    def _evaluate(self) -> None: ...

    def _export(self) -> None: ...


SHORT = {"prompts": {"limit": 3}, "sampling": {"steps": 2}, "safety": {"max_ratio_dev": 1.0}}  # 12 pairs in 2 updates
ONE_BY_ONE = {"timestep_fraction": 0.5, "updates_per_rollout": 1}  # 6 pairs


def measured(config) -> int:
    """Bytes that two iterations have alive at most, on the CPU: of weights and of whatever operators make."""
    trainer = Iterations(config)
    denoiser, average = trainer.denoiser, trainer.ema.average if trainer.ema else {}
    with LiveBytes() as live:
        for module in denoiser.parts.values():
            live.count([*module.parameters(), *module.buffers()])
        live.count([*trainer.engine.masters.values(), *average.values(), *(denoiser._reference or {}).values()])
        trainer.train()
    return live.peak


def test_the_planned_peak_of_sdxl_is_within_15_percent_of_the_measured_one(make_config, tiny_sdxl):
    config = make_config(model={"path": tiny_sdxl, "adapter": "full"}, iterations=1, **SHORT)
    assert planned_memory(config).peak == pytest.approx(measured(config), rel=0.15)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"memory": {"gradient_checkpointing": True}, "updates_per_rollout": 4},
        {"model": {"adapter": "full"}, "ema": {"decay": 0.9}, "kl": {"weight": 0.1}},
        {
            "model": {"adapter": "full", "dtype": "bf16"},
            "memory": {"gradient_checkpointing": True},
            "optimizer": {"name": "adamw8bit", "lr": 1e-4},
            "clip_range": 1.0,
        },
        {"model": {"dtype": "bf16"}, "memory": {"rollout_batch": 6, "update_batch": 1}, "clip_range": 1.0, **ONE_BY_ONE},
        {
            "sampling": {"height": 64, "width": 64, "guidance_scale": 1},
            "memory": {"vae_batch": 6, "update_batch": 1},
            **ONE_BY_ONE,
        },
        {"algorithm": "loop_forward", "forward": {"levels": 7}, "model": {"adapter": "full"}, "kl": {"weight": 0.1}},
    ],
    ids=str,
)
def test_the_planned_peak_is_within_15_percent_of_the_measured_one(make_config, changes):
    sampling = {**SHORT["sampling"], **changes.get("sampling", {})}
    config = make_config(**SHORT | changes | {"sampling": sampling})
    assert planned_memory(config).peak == pytest.approx(measured(config), rel=0.15)


@pytest.mark.parametrize("name", ["up_blocks.7", "up_block", "conv_in", ""])
def test_a_block_that_is_not_there_is_refused_with_those_that_are(make_config, name):
    with pytest.raises(
        UserError, match=f"^memory.gradient_checkpointing: the UNet has no block '{name}': its blocks are down_b"
    ):
        preflight(make_config(memory={"gradient_checkpointing": ["mid_block", name]}))


def test_activations_do_not_count_what_attention_operators_do_not_keep(make_config):
    """Of self-attention over n positions the n x n weights are not kept: four times the area is four times the bytes."""
    small, large = (make_config(sampling={"height": size, "width": size}) for size in (128, 256))
    assert traced(large).activations(1) == pytest.approx(4 * traced(small).activations(1), rel=0.02)


def test_memory_by_part(make_config):
    config = make_config()  # 3 prompts x 2 images x 4 steps = 24 pairs in 2 updates: 12 are 3 times 4, at most 5
    parts, trained = planned_memory(config).parts, counted(config)["trained"]
    assert parts["gradients"] == 4 * trained
    assert parts["optimizer"] == 8 * trained
    assert parts["trajectories"] == 4 * 5 * 6 * 4 * 8 * 8  # float32, steps + 1, images, latents
    assert parts["activations of 4 pairs"] == traced(config).activations(4)
    working = {"gradients", "rollout of 3", "decoding of 3", "activations of 4 pairs"}
    embedding, texts = 4 * 16 * 16, 45 + 3 + 1  # in animals, held out of them, and the negative prompt
    assert parts["prompt embeddings"] == 2 * 3 * embedding and parts["kept embeddings"] <= texts * embedding
    own = {"UNet", "text encoders", "VAE", "optimizer", "trajectories", "prompt embeddings", "kept embeddings"}
    assert set(parts) == working | own


def test_a_guided_evaluation_of_an_unguided_training_has_memory_and_a_line_of_its_own(make_config):
    """Its calls have half as many trajectories, which needs what a guided training with such batches needs."""
    guided = {"sampling": {"steps": 9, "eta": 0, "guidance_scale": 2.0}}
    config = make_config(sampling={"guidance_scale": 1}, eval=guided)
    like, found = planned_memory(make_config(memory={"rollout_batch": 2})), planned_memory(config)
    assert found.phases["evaluation"] == like.phases["rollout"] - like.parts["trajectories"]
    assert "evaluation" not in like.phases
    assert lines_of(config)["evaluation"] == "9 steps, eta 0, guidance 2, 2 at a time"
    assert "evaluation" not in lines_of(make_config())


def test_an_evaluation_of_larger_pictures_has_fewer_at_a_time_and_is_in_the_peaks(make_config):
    """Twice the side: a quarter as many at a time, which needs what a training with such pictures and batches needs."""
    large = {"height": 32, "width": 32}
    config = make_config(eval={"sampling": large})
    assert lines_of(config)["evaluation"] == "4 steps, eta 1, guidance 2, 32 x 32 pixels, 1 at a time"
    small, found = planned_memory(make_config()), planned_memory(config)
    like = planned_memory(make_config(memory={"rollout_batch": 1}, sampling=large))
    assert found.phases["evaluation"] == like.phases["rollout"] - like.parts["trajectories"]
    assert found.parts["decoding of 3"] == pytest.approx(4 * small.parts["decoding of 3"], rel=0.05)
    assert {**found.parts, "decoding of 3": 0} == {**small.parts, "decoding of 3": 0}
    smaller = planned_memory(make_config(eval={"sampling": {"height": 8}}))
    assert smaller == small


def test_the_lines_are_those_numbers(make_config):
    config = make_config()
    lines, found = plan(config), planned_memory(config)
    begin = next(i for i, line in enumerate(lines) if line.startswith("memory"))
    rows = [re.split(r"  +", line.strip()) for line in lines[begin + 1 : -4]]
    shown = {row[0]: float(row[1].split()[0]) * SIZES[row[1].split()[1]] for row in rows if len(row) == 2}
    for name, size in {**found.parts, **found.phases, "peak": found.peak}.items():
        assert shown[name] == pytest.approx(size, rel=SHOWN)
    assert found.peak == max(found.phases.values()) < sum(found.parts.values())  # phases do not add up


def test_averages_and_references_are_counted_where_there_are_any(make_config, untraced):
    full = make_config(model={"adapter": "full"}, ema={"decay": 0.9}, kl={"weight": 0.1})
    parts, trained = planned_memory(full).parts, counted(full)["trained"]
    assert parts["moving average"] == parts["KL reference"] == 4 * trained
    assert "KL reference" not in planned_memory(make_config(kl={"weight": 0.1})).parts  # LoRA: the adapter is switched off


def test_on_a_gpu_what_rests_is_in_the_hosts_memory(make_config, untraced):
    here, there = (planned_memory(make_config(), gpu=gpu) for gpu in (False, True))
    assert here.host == {}
    assert there.host == {name: here.parts[name] for name in ("text encoders", "VAE", "kept embeddings")}
    stay = planned_memory(make_config(memory={"offload_frozen": False}), gpu=True)
    kept = there.host["kept embeddings"]
    assert stay.phases["update"] == there.phases["update"] + sum(there.host.values()) - kept
    away = planned_memory(make_config(memory={"trajectories": "host"}), gpu=True)
    assert away.host["trajectories"] == there.phases["update"] - away.phases["update"] == there.parts["trajectories"]


def test_a_gpu_is_planned_with_what_runs_there(make_config):
    """Fused norms and gates keep less."""
    fused, stock = (planned_memory(make_config(kernels=kernels), gpu=True) for kernels in ("triton", "reference"))
    assert fused.phases["update"] < stock.phases["update"]


def test_a_plan_for_a_gpu_names_the_smallest_card_that_has_the_peak(make_config, monkeypatch, untraced):
    for size, card in ((1000, "8 GB"), (7 * 2**30, "8 GB"), (20 * 2**30, "24 GB"), (44 * 2**30, "48 GB"), (2**40, "none")):
        monkeypatch.setattr("fastloop.plan.memory_needs", lambda *_, peak=size: MemoryNeeds({}, {"update": peak}, {}))
        (line,) = (line for line in plan(make_config(), gpu=True) if "smallest card" in line)
        assert line.split("  ")[-1].strip() == card
    assert not any("smallest card" in line for line in plan(make_config()))


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_zero_shares_out_what_its_stage_says(make_config, monkeypatch, stage):
    """Of T trained of U weights in bfloat16 on R ranks (arXiv 1910.02054): 4 T masters, 8 T moments, 4 T gradients."""
    if stage != 2:  # that one is traced too, in bfloat16 as the engine casts it
        trace_nothing(monkeypatch)
    engine = {"name": "deepspeed", "zero_stage": stage}
    config = make_config(model={"adapter": "full", "dtype": "bf16"}, engine=engine)
    trained, parts = counted(config)["trained"], planned_memory(config, ranks=4).parts
    share = lambda size, first: size / 4 if stage >= first else size  # noqa: E731
    assert parts["UNet"] == pytest.approx(share(2 * trained, 3), abs=4)
    assert parts["master weights"] == pytest.approx(share(4 * trained, 1), abs=4)
    assert parts["optimizer"] == pytest.approx(share(8 * trained, 1), abs=8)
    whole = 4 * trained if stage else 0  # a flat copy in float32 when the optimizer steps
    assert parts["gradients"] == pytest.approx(share(4 * trained, 2) + share(whole, 1), abs=8)


def test_what_is_offloaded_is_in_the_hosts_memory(make_config):
    engine = {"name": "deepspeed", "zero_stage": 3, "offload_optimizer": True, "offload_parameters": True}
    found = planned_memory(make_config(engine=engine, optimizer={"name": "cpu_adamw"}))
    assert set(found.host) == {"master weights", "optimizer", "UNet"} and not set(found.host) & set(found.parts)


@pytest.mark.parametrize(
    "changes, pairs",
    [
        ({"memory": {"update_batch": 64}}, 12),  # 24 pairs in 2 updates
        ({"memory": {"update_batch": 7}}, 6),  # twice
        ({"memory": {"update_batch": 64}, "updates_per_rollout": 5}, 5),  # 24 in 5: the largest has 5
        ({"memory": {"update_batch": 64}, "updates_per_rollout": 4, "passes_per_rollout": 2}, 12),
        ({"memory": {"update_batch": 64}, "timestep_fraction": 0.5, "updates_per_rollout": 1}, 12),
        ({"memory": {"update_batch": 64}, "last_steps": {"drop": 3}, "updates_per_rollout": 1}, 6),
    ],
    ids=str,
)
def test_activations_are_counted_for_the_largest_micro_batch(make_config, changes, pairs):
    config = make_config(**changes)
    assert preflight(config).batches(ranks=1).update == pairs


def test_the_time_is_that_of_the_forwards(make_config):
    """6 images of 4 steps with guidance: 48 forwards; as many in the updates, with a backward of one or two more."""

    def line(**changes) -> str:
        config = make_config(iterations=100, **changes)
        return time_lines(Batches(config, torch.arange(4)), it_per_s=2.0)[0]

    assert "24.0 s rollout + 48.0 s update = 72.0 s an iteration, 0.0833 images/s, 2.0 h in all" in line()
    assert "24.0 s rollout + 72.0 s update" in line(model={"adapter": "full"})
    assert "24.0 s rollout + 72.0 s update" in line(memory={"gradient_checkpointing": True})
    assert "12.0 s rollout + 24.0 s update" in line(sampling={"guidance_scale": 1})
    assert "24.0 s rollout + 72.0 s update" in line(kl={"weight": 0.1})
    assert "27.0 s rollout + 48.0 s update" in line(algorithm="dlpo")  # a picture's penalty is a forward
    # 6 trajectories in two calls of 4, 12 pairs in three
    assert "32.0 s rollout + 48.0 s update" in line(memory={"rollout_batch": 5, "update_batch": 5}, model={"dtype": "bf16"})


# --- derived numbers --------------------------------------------------------------------------------------------------


def lines_of(config) -> dict[str, str]:
    batches = Batches(config, trained_steps(sampler_table(config.model, config.sampling), config))
    lines = derived_lines(batches, build_skeleton(config.model))
    return dict(re.split(r"  +", line, maxsplit=1) for line in lines)


def test_derived_lines_of_a_small_run(make_config):
    assert lines_of(make_config(iterations=500)) == {
        "algorithm": "loop: advantage leave_one_out, objective clipped",
        "rollout": "3 prompts x 2 images = 6 trajectories of 4 steps, 3 at a time",
        "pairs": "6 trajectories x 4 of 4 trainable steps = 24 a pass, 1 pass",
        "updates": "2 optimizer steps of 12 pairs, each in 3 micro-batches of 4",
        "work": "per image: 8 forwards in the rollout, 8 forwards and backwards in the updates",
        "in all": "500 iterations, 3,000 images, 1,000 optimizer steps",
    }


def test_derived_lines_of_several_passes_dropped_steps_and_no_guidance(make_config):
    config = make_config(
        algorithm="ppo",
        prompts_per_step=5,
        images_per_prompt=3,
        sampling={"steps": 10, "guidance_scale": 1},
        last_steps={"drop": 2},
        timestep_fraction=0.4,
        passes_per_rollout=2,
        updates_per_rollout=8,
        memory={"rollout_batch": 64, "update_batch": 12},
        iterations=1,
    )
    assert lines_of(config) == {
        "algorithm": "ppo: advantage prompt_tracker, objective clipped",
        "rollout": "5 prompts x 3 images = 15 trajectories of 10 steps, 15 at a time",
        "pairs": "15 trajectories x 3 of 8 trainable steps = 45 a pass, 2 passes",
        "updates": "8 optimizer steps of 11 or 12 pairs, each in 1 micro-batch of 12",
        "work": "per image: 10 forwards in the rollout, 6 forwards and backwards in the updates",
        "in all": "1 iterations, 15 images, 8 optimizer steps",
    }


def test_the_pairs_are_those_that_the_trainer_draws(make_config):
    config = make_config(timestep_fraction=0.6, last_steps={"drop": 1})
    steps = trained_steps(sampler_table(config.model, config.sampling), config)
    rows = Rows.of(config.images_per_rollout, steps)
    pairs = shuffled(np.random.default_rng(0), rows, config.timestep_fraction)
    assert f"= {len(pairs)} a pass" in lines_of(config)["pairs"]


def test_a_plan_names_the_model_its_pictures_and_the_prompts(make_config, untraced):
    lines = plan(make_config(sampling={"height": 24, "width": 32}, prompts={"limit": 7}))
    assert re.fullmatch(r"model        .*, lora, fp32, 32 x 24 pixels", lines[0])
    assert lines[1] == (
        "prompts      7 for training, 3 for evaluation, all of them training prompts too: the score is not held out (set "
        "eval.prompts.source to others)"
    )
    known, others = ([Prompt(text) for text in texts] for texts in (("a cat", "a dog"), ("a hen", "a hen")))
    assert prompts_line(known, others) == "prompts      2 for training, 2 for evaluation"
    assert ", 1 of these 2 training prompts too: " in prompts_line(known, [*others, known[0]])


def test_a_plan_starts_no_run(make_config, untraced, no_weights):
    config = make_config()
    plan(config)
    assert not Path(config.output_dir).exists()


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def no_weights(monkeypatch):
    """Fails the test where weights are read."""

    def load(*_):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr("fastloop.denoisers.base.Denoiser.load", load)


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"sampling": {"height": 18}}, "sampling.height: 18 is not a multiple of 4 pixels, which this model needs"),
        ({"sampling": {"width": 30}}, "sampling.width: 30 is not a multiple of 4 pixels, which this model needs"),
        (
            {"model": {"lora": {"target_modules": ["to_q", "to_nothing"]}}},
            "model.lora.target_modules: the UNet has no module 'to_nothing': name modules by their ending",
        ),
        (
            {"eval": {"sampling": {"steps": 2000}}},
            "steps=2000: must be between 1 and the scheduler's num_train_timesteps=1000",
        ),
        ({"eval": {"sampling": {"height": 18}}}, "eval.sampling.height: 18 is not a multiple of 4 pixels, which this model"),
        (
            {"sampling": {"noise_steps": [2, 2]}, "updates_per_rollout": 7},
            "updates_per_rollout: 7 updates, but a rollout has only 6",
        ),
        ({"sampling": {"steps": 1001}}, "steps=1001: must be between 1 and the scheduler's num_train_timesteps=1000"),
        ({"engine": {"device": "gpu"}}, "engine.device: 'gpu' is no device: use auto, cpu, cuda or cuda:N"),
        ({"engine": {"device": "meta"}}, "engine.device: 'meta' is not supported"),
        ({"engine": {"device": "cuda:99"}}, "engine.device: cuda:99 is not there ("),
        ({"updates_per_rollout": 25}, "updates_per_rollout: 25 updates, but a rollout has only 24 (trajectory, timestep)"),
        ({"prompts": {"source": "none.txt"}}, "prompts.source: cannot read none.txt"),
        ({"eval": {"prompts": {"source": "none.txt"}}}, "eval.prompts.source: cannot read none.txt"),
        ({"rewards": [{"name": "shapes"}]}, "rewards.0.name: the shapes reward scores pictures of 64 x 64 pixels, these"),
        ({"eval": {"rewards": [{"name": "shapes"}]}}, "eval.rewards.0.name: the shapes reward scores pictures of 64 x 64"),
        ({"model": {"path": "./nowhere"}}, "model.path: no folder or file ./nowhere"),
    ],
    ids=str,
)
def test_what_cannot_work_is_refused_in_one_line_before_any_weights_are_read(make_config, no_weights, changes, says):
    config = make_config(**changes)
    for refuse in (preflight, plan, Trainer):
        with pytest.raises(UserError) as caught:
            refuse(config)
        assert says in str(caught.value) and "\n" not in str(caught.value)
    assert not Path(config.output_dir).exists()


def test_a_missing_tracking_package_is_refused_before_any_weights_are_read(make_config, no_weights, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="^tracking.wandb: pip install fastloop"):
        Trainer(make_config(tracking={"wandb": "project"}))


def test_what_can_work_does_load_weights(make_config, no_weights):
    with pytest.raises(AssertionError, match="weights were loaded"):
        Trainer(make_config())


def test_what_is_checked_is_what_the_run_uses(make_config):
    config = make_config(
        last_steps={"drop": 1}, engine={"device": "cpu"}, eval={"rewards": [{"name": "jpeg_compressibility"}]}
    )
    checked = preflight(config)
    assert checked.device == CPU
    assert [len(checked.prompts), len(checked.eval_prompts)] == [45, 3]
    assert (list(checked.rewards.terms), list(checked.eval_rewards.terms)) == (
        ["jpeg_incompressibility"],
        ["jpeg_compressibility"],
    )
    assert len(checked.table) == 4 and checked.steps_trained.tolist() == [0, 1, 2]
    trainable, real = checked.skeleton.trainable(), real_model(config).trainable()
    assert {name: p.shape for name, p in trainable.items()} == {name: p.shape for name, p in real.items()}


def test_a_skeleton_reads_no_weights(make_config, no_weights):
    skeleton = build_skeleton(make_config().model)
    for module in skeleton.parts.values():
        assert all(p.is_meta for p in module.parameters())


def test_refusals_of_the_training_rewards_on_the_held_out_prompts_say_so(tmp_path):
    (tmp_path / "held_out.txt").write_text("a cat\n")
    values = {"rewards": [{"name": "shapes"}], "eval": {"prompts": {"source": str(tmp_path / "held_out.txt")}}}
    with pytest.raises(UserError, match=r"^rewards, on eval\.prompts\.0\.name: the shapes reward cannot read .* 'a cat'"):
        preflight(parse_config(values, "test"))
