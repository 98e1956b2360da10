"""The plan's numbers are those of the real run, and what cannot work is refused before any weights are read."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from fastloop.config import parse_config
from fastloop.denoisers import build_skeleton, load_denoiser
from fastloop.errors import UserError
from fastloop.plan import activation_bytes, check, derived_lines, plan
from fastloop.rollout import sampler_table, trained_steps
from fastloop.trainer import Trainer, shuffled_pairs

CPU = torch.device("cpu")
SHOWN = 0.05  # sizes are shown with one decimal
SIZES = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


def real_model(config):
    denoiser = load_denoiser(config.model, CPU)
    denoiser.train_adapter(config.memory.gradient_checkpointing, seed=config.seed)
    return denoiser


def counted(config) -> dict[str, int]:
    """The plan's table of parameters."""
    lines = plan(config)
    rows = lines[lines.index("parameters") + 1 : lines.index("memory")]
    return {name: int(number.replace(",", "")) for name, number in (re.split(r"  +", row.strip()) for row in rows)}


def memory(config) -> dict[str, float]:
    """The plan's table of memory, in bytes, as far as its digits say."""
    lines = plan(config)
    rows = [re.split(r"  +", line.strip()) for line in lines[lines.index("memory") + 1 : -4]]
    return {name: float(size.split()[0]) * SIZES[size.split()[1]] for name, size in rows}


# --- parameters and memory --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "model",
    [
        {},
        {"lora": {"rank": 3, "target_modules": ["to_k"]}},
        {"adapter": "full"},
        {"dtype": "bf16"},
        {"path": "assets:shapes"},
    ],
    ids=lambda model: "-".join(model) or "lora",
)
def test_the_parameters_are_those_of_the_loaded_model(make_config, model):
    config = make_config(model=model)
    denoiser = real_model(config)
    modules = {name.replace("_", " "): module for name, module in denoiser.parts.items()}
    expected = {name: sum(p.numel() for p in module.parameters()) for name, module in modules.items()}
    expected["trained"] = sum(p.numel() for p in denoiser.trainable().values())
    if config.model.adapter == "lora":  # shown once, as trained
        expected["unet"] -= expected["trained"]
    assert counted(config) == expected
    weights = sum(p.numel() * p.element_size() for module in modules.values() for p in module.parameters())
    assert memory(config)["weights"] == pytest.approx(weights, rel=SHOWN)


def saved_for_backward(denoiser, config, batch: int) -> int:
    """Bytes that a real forward of `batch` pairs on the CPU keeps, each storage once, weights left out."""
    sampling, weights = config.sampling, {p.untyped_storage().data_ptr() for p in denoiser.unet.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if (place := tensor.untyped_storage().data_ptr()) not in weights:
            kept[place] = tensor
        return tensor

    cond, uncond = denoiser.encode(["a cat"] * batch, sampling)
    latents = torch.randn(batch, *denoiser.latent_shape(sampling.height, sampling.width))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = denoiser.predict(latents, torch.arange(batch) + 500, cond, None if uncond is None else uncond.clone())
    assert outputs[0].requires_grad
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


CASES = [
    {},
    {"model": {"adapter": "full"}},
    {"model": {"lora": {"rank": 3, "target_modules": ["to_v", "conv1"]}}},
    {"sampling": {"guidance_scale": 1}},
    {"sampling": {"height": 24, "width": 8}},
    {"memory": {"gradient_checkpointing": True}},
    {"memory": {"gradient_checkpointing": True}, "model": {"adapter": "full"}},
    {"memory": {"gradient_checkpointing": ["mid_block", "up_blocks.0.attentions"]}},
]


@pytest.mark.parametrize("changes", CASES, ids=str)
def test_activations_are_the_bytes_that_a_real_forward_keeps(make_config, changes):
    config = make_config(**changes)
    denoiser, skeleton = real_model(config), check(config).skeleton
    for batch in (1, 3):
        assert activation_bytes(skeleton, config, batch) == saved_for_backward(denoiser, config, batch)


def test_gradient_checkpointing_keeps_less(make_config):
    config, less = make_config(), make_config(memory={"gradient_checkpointing": True})
    some = make_config(memory={"gradient_checkpointing": ["up_blocks"]})
    kept = [activation_bytes(check(c).skeleton, c, 4) for c in (less, some, config)]
    assert kept == sorted(kept) and kept[0] < kept[1] < kept[2] and kept[0] < kept[2] / 2


@pytest.mark.parametrize("own", [False, True, ["mid_block"]])
def test_the_plan_says_what_either_choice_of_checkpointing_keeps(make_config, own):
    """Of one micro-batch, whatever the configuration's own choice."""
    lines = plan(make_config(memory={"gradient_checkpointing": own}))
    assert lines[-3] == "activations by memory.gradient_checkpointing"
    found = dict(re.split(r"  +", line.strip()) for line in lines[-2:])
    for choice in (False, True):
        config = make_config(memory={"gradient_checkpointing": choice})
        size, unit = found[str(choice).lower()].split()
        exact = activation_bytes(check(config).skeleton, config, 5)
        assert float(size) * SIZES[unit] == pytest.approx(exact, rel=SHOWN)


@pytest.mark.parametrize("name", ["up_blocks.7", "up_block", "conv_in", ""])
def test_a_block_that_is_not_there_is_refused_with_those_that_are(make_config, name):
    with pytest.raises(
        UserError, match=f"^memory.gradient_checkpointing: the UNet has no block '{name}': its blocks are down_b"
    ):
        check(make_config(memory={"gradient_checkpointing": ["mid_block", name]}))


def test_activations_do_not_count_what_attention_operators_do_not_keep(make_config):
    """Of self-attention over n positions the n x n weights are not kept: four times the area is four times the bytes."""
    small, large = (make_config(sampling={"height": size, "width": size}) for size in (128, 256))
    assert activation_bytes(check(large).skeleton, large, 1) == pytest.approx(
        4 * activation_bytes(check(small).skeleton, small, 1), rel=0.02
    )


def test_memory_by_part(make_config):
    config = make_config()  # 3 prompts x 2 images x 4 steps = 24 pairs in 2 updates, at most 5 at once
    parts, trained = memory(config), counted(config)["trained"]
    assert parts["gradients"] == pytest.approx(4 * trained, rel=SHOWN)
    assert parts["optimizer"] == pytest.approx(8 * trained, rel=SHOWN)
    assert parts["trajectories"] == 4 * 5 * 6 * 4 * 8 * 8  # float32, steps + 1, images, latents
    assert parts["activations of 5 pairs"] == pytest.approx(activation_bytes(check(config).skeleton, config, 5), rel=SHOWN)
    total = parts.pop("sum")
    assert total == pytest.approx(sum(parts.values()), rel=SHOWN)
    assert set(parts) == {"weights", "gradients", "optimizer", "trajectories", "activations of 5 pairs"}


def test_averages_and_references_are_counted_where_there_are_any(make_config):
    full = make_config(model={"adapter": "full"}, ema={"decay": 0.9}, kl={"weight": 0.1})
    parts, trained = memory(full), counted(full)["trained"]
    assert parts["moving average"] == pytest.approx(4 * trained, rel=SHOWN)
    assert parts["KL reference"] == pytest.approx(4 * trained, rel=SHOWN)
    assert "KL reference" not in memory(make_config(kl={"weight": 0.1}))  # LoRA: the adapter is switched off


@pytest.mark.parametrize(
    "changes, pairs",
    [
        ({"memory": {"update_batch": 64}}, 12),  # 24 pairs in 2 updates
        ({"memory": {"update_batch": 7}}, 7),
        ({"memory": {"update_batch": 64}, "updates_per_rollout": 5}, 5),  # 24 in 5: the largest has 5
        ({"memory": {"update_batch": 64}, "updates_per_rollout": 4, "passes_per_rollout": 2}, 12),
        ({"memory": {"update_batch": 64}, "timestep_fraction": 0.5, "updates_per_rollout": 1}, 12),
        ({"memory": {"update_batch": 64}, "last_steps": {"drop": 3}, "updates_per_rollout": 1}, 6),
    ],
    ids=str,
)
def test_activations_are_counted_for_the_largest_micro_batch(make_config, changes, pairs):
    assert f"activations of {pairs} pairs" in memory(make_config(**changes))


# --- derived numbers --------------------------------------------------------------------------------------------------


def lines_of(config) -> dict[str, str]:
    lines = derived_lines(config, trained_steps(sampler_table(config.model, config.sampling), config))
    return dict(re.split(r"  +", line, maxsplit=1) for line in lines)


def test_derived_lines_of_a_small_run(make_config):
    assert lines_of(make_config(iterations=500)) == {
        "algorithm": "loop: advantage leave_one_out, objective clipped",
        "rollout": "3 prompts x 2 images = 6 trajectories of 4 steps, at most 4 at a time",
        "pairs": "6 trajectories x 4 of 4 trainable steps = 24 a pass, 1 pass",
        "updates": "2 optimizer steps of 12 pairs, each in 3 micro-batches of at most 5",
        "work": "per image: 8 UNet forwards in the rollout, 8 forwards and backwards in the updates",
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
        "rollout": "5 prompts x 3 images = 15 trajectories of 10 steps, at most 15 at a time",
        "pairs": "15 trajectories x 3 of 8 trainable steps = 45 a pass, 2 passes",
        "updates": "8 optimizer steps of 11 or 12 pairs, each in 1 micro-batch of at most 12",
        "work": "per image: 10 UNet forwards in the rollout, 6 forwards and backwards in the updates",
        "in all": "1 iterations, 15 images, 8 optimizer steps",
    }


def test_the_pairs_are_those_that_the_trainer_draws(make_config):
    config = make_config(timestep_fraction=0.6, last_steps={"drop": 1})
    steps = trained_steps(sampler_table(config.model, config.sampling), config)
    pairs = shuffled_pairs(np.random.default_rng(0), config.images_per_rollout, steps, config.timestep_fraction)
    assert f"= {len(pairs)} a pass" in lines_of(config)["pairs"]


def test_a_plan_names_the_model_its_pictures_and_the_prompts(make_config):
    lines = plan(make_config(sampling={"height": 24, "width": 32}, prompts={"limit": 7}))
    assert re.fullmatch(r"model        .*, lora, fp32, 32 x 24 pixels", lines[0])
    assert lines[1] == "prompts      7 for training, 3 for evaluation"


def test_a_plan_starts_no_run(make_config, no_weights):
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
        ({"eval": {"steps": 2000}}, "steps=2000: must be between 1 and the scheduler's num_train_timesteps=1000"),
        ({"sampling": {"steps": 1001}}, "steps=1001: must be between 1 and the scheduler's num_train_timesteps=1000"),
        ({"engine": {"device": "gpu"}}, "engine.device: 'gpu' is no device: use auto, cpu, cuda or cuda:N"),
        ({"engine": {"device": "meta"}}, "engine.device: 'meta' is not supported"),
        ({"engine": {"device": "cuda:99"}}, "engine.device: cuda:99 is not there ("),
        ({"updates_per_rollout": 25}, "updates_per_rollout: 25 updates, but a rollout has only 24 (trajectory, timestep)"),
        ({"prompts": {"source": "none.txt"}}, "prompts.source: cannot read none.txt"),
        ({"eval": {"prompts": {"source": "none.txt"}}}, "eval.prompts.source: cannot read none.txt"),
        ({"rewards": [{"name": "shapes"}]}, "rewards.0.name: the shapes reward scores pictures of 64 x 64 pixels, these"),
        ({"eval": {"rewards": [{"name": "shapes"}]}}, "eval.rewards.0.name: the shapes reward scores pictures of 64 x 64"),
        ({"model": {"path": "./nowhere"}}, "model.path: no folder ./nowhere"),
    ],
    ids=str,
)
def test_what_cannot_work_is_refused_in_one_line_before_any_weights_are_read(make_config, no_weights, changes, says):
    config = make_config(**changes)
    for refuse in (check, plan, Trainer):
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
    checked = check(config)
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
        check(parse_config(values, "test"))
