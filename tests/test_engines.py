"""DeepSpeed's configuration: what is derived, what a JSON of the user's own may say, and what cannot run here."""

from __future__ import annotations

import json

import pytest
import torch

from fastloop.batches import Batches
from fastloop.engines.deepspeed import deepspeed_problem, deepspeed_settings
from fastloop.errors import UserError
from fastloop.plan import overview
from fastloop.preflight import preflight


@pytest.fixture
def settings(make_config, tmp_path):
    """A function of the user's JSON and the engine's keys that gives what DeepSpeed gets, for 3 ranks and 10 pairs."""

    def make(own=None, world=3, pairs=10, trained=1000, **changes):
        engine = {"name": "deepspeed", **changes.pop("engine", {})}
        if own is not None:
            path = tmp_path / "own.json"
            path.write_text(own if isinstance(own, str) else json.dumps(own))
            engine["deepspeed_config"] = str(path)
        rows = {"algorithm": "reinforce", "prompts_per_step": pairs, "images_per_prompt": 1}
        config = make_config(engine=engine, **rows, **changes)
        return deepspeed_settings(Batches(config, torch.arange(1), world), trained)

    return make


@pytest.mark.parametrize(
    "world, pairs, batch, micro, steps",
    [(1, 10, 5, 5, 2), (3, 10, 5, 4, 2), (2, 100, 5, 5, 10), (2, 101, 5, 5, 11), (8, 3, 64, 1, 2)],
)
def test_micro_batches_are_derived_from_the_pairs_of_an_update(settings, world, pairs, batch, micro, steps):
    found = settings(world=world, pairs=pairs, memory={"update_batch": batch})
    assert (found["train_micro_batch_size_per_gpu"], found["gradient_accumulation_steps"]) == (micro, steps)
    assert "train_batch_size" not in found


def test_what_the_recipe_says_is_what_deepspeed_gets(settings):
    found = settings(engine={"zero_stage": 1}, optimizer={"max_grad_norm": 0.5}, model={"dtype": "bf16"})
    assert found["zero_optimization"]["stage"] == 1 and found["gradient_clipping"] == 0.5
    assert found["bf16"]["enabled"] and not found["fp16"]["enabled"]
    assert found["data_types"] == {"grad_accum_dtype": "fp32"}  # hundreds of micro-batches are added up
    offloaded = settings(engine={"zero_stage": 3, "offload_optimizer": True}, optimizer={"name": "cpu_adamw"})
    assert offloaded["zero_optimization"]["offload_optimizer"]["device"] == "cpu"
    assert "offload_param" not in offloaded["zero_optimization"]


def test_the_buckets_are_no_larger_than_what_is_trained(settings):
    assert settings(trained=1000)["zero_optimization"]["reduce_bucket_size"] == 1000
    assert settings(trained=10**9)["zero_optimization"]["reduce_bucket_size"] == 50_000_000


def test_keys_of_ones_own_go_through_and_auto_is_filled_in(settings):
    nvme = {"device": "nvme", "nvme_path": "/fast"}
    own = {
        "zero_optimization": {"stage": "auto", "offload_optimizer": nvme, "reduce_bucket_size": 77},
        "gradient_clipping": "auto",
        "aio": {"queue_depth": 8},
        "fp16": "auto",
    }
    found = settings(own, engine={"zero_stage": 3, "offload_optimizer": True}, optimizer={"name": "cpu_adamw"})
    zero = found["zero_optimization"]
    assert zero["stage"] == 3 and zero["reduce_bucket_size"] == 77
    assert {key: zero["offload_optimizer"][key] for key in nvme} == nvme
    assert found["aio"] == {"queue_depth": 8} and found["gradient_clipping"] == 1.0 and found["fp16"] == {"enabled": False}


@pytest.mark.parametrize(
    "own, says",
    [
        ({"train_batch_size": 12}, 'train_batch_size is 12, the recipe gives 10: take it out, or write "auto"'),
        ({"train_micro_batch_size_per_gpu": 1}, "train_micro_batch_size_per_gpu is 1, the recipe gives 4"),
        ({"gradient_accumulation_steps": 8}, "gradient_accumulation_steps is 8, the recipe gives 1"),
        ({"gradient_clipping": 0.1}, "gradient_clipping is 0.1, the recipe gives 1.0"),
        ({"zero_optimization": {"stage": 3}}, "zero_optimization.stage is 3, the recipe gives 2"),
        ({"bf16": {"enabled": True}}, "bf16.enabled is True, the recipe gives False"),
        ({"zero_optimization": 2}, "zero_optimization is 2: give an object, or take it out"),
        (
            {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}},
            "zero_optimization.offload_optimizer: the recipe has engine.offload_optimizer=false: set it to true",
        ),
        (
            {"zero_optimization": {"offload_param": {"device": "nvme"}}},
            "zero_optimization.offload_param: the recipe has engine.offload_parameters=false: set it to true",
        ),
        ({"optimizer": {"type": "Adam"}}, "optimizer: set optimizer.* in the recipe, and take it out"),
        ({"scheduler": {"type": "WarmupLR"}}, "scheduler: set optimizer.schedule in the recipe, and take it out"),
        ([1], "holds no JSON object"),
        ("{", "cannot read"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_json_that_says_other_than_the_recipe_is_refused(settings, own, says):
    with pytest.raises(UserError) as refused:
        settings(own, memory={"update_batch": 64})
    assert str(refused.value).startswith("engine.deepspeed_config: ") and says in str(refused.value)


def test_what_is_missing_is_told_with_its_remedy(make_config, monkeypatch):
    config, cpu = make_config(engine={"name": "deepspeed"}), torch.device("cpu")
    monkeypatch.setenv("DS_ACCELERATOR", "cuda")
    assert deepspeed_problem(config, cpu) == (
        "engine.device: DS_ACCELERATOR=cuda in the environment, but the device is cpu: set one like the other"
    )
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert deepspeed_problem(config, cpu) == (
        "engine.name: deepspeed is not installed: pip install fastloop[deepspeed], or set it to torch"
    )


@pytest.mark.parametrize(
    "keys, says",
    [
        ({"zero_stage": 2}, "DeepSpeed, ZeRO 2"),
        ({"zero_stage": 3}, "DeepSpeed, ZeRO 3, weights whole on every rank during a rollout"),
        (
            {"zero_stage": 3, "rollout_parameters": "layerwise", "offload_optimizer": True, "offload_parameters": True},
            "DeepSpeed, ZeRO 3, weights gathered a layer at a time in a rollout, optimizer and weights in the CPU's memory",
        ),
    ],
)
def test_the_plan_says_how_a_rollout_gets_its_weights(make_config, keys, says):
    optimizer = {"name": "cpu_adamw"} if "offload_optimizer" in keys else {}
    lines = overview(preflight(make_config(engine={"name": "deepspeed", "device": "cpu", **keys}, optimizer=optimizer)))
    assert f"engine       {says}" in lines
