"""The training loop on a small real model: gradients against brute force, every option's effect, and what stops a run."""

from __future__ import annotations

import copy
import itertools
import json
import math
import shutil
import sys
import types

import numpy as np
import pytest
import torch
from recorded import Weights, begin, record_pairs, record_steps, same, weights
from run_files import checkpoints, status
from safetensors.torch import load_file
from torch.distributions import Normal, kl_divergence

import fastloop
from fastloop.advantages import leave_one_out
from fastloop.algorithms import ALGORITHMS
from fastloop.batches import Rows, shuffled, step_weights
from fastloop.checkpoints import load_checkpoint
from fastloop.cli import main
from fastloop.engines.torch import TorchEngine
from fastloop.errors import RunFailed
from fastloop.prompts import ANIMALS
from fastloop.report import write_report
from fastloop.rewards.scoring import Scores
from fastloop.tracking import read_rows
from fastloop.trainer import Trainer
from fastloop.update import MAX_SKIPPED


def distance(one: Weights, other: Weights) -> float:
    return math.sqrt(sum((one[name] - other[name]).square().sum().item() for name in one))


def metrics(trainer: Trainer) -> list[dict]:
    return read_rows(trainer.folder / "metrics.jsonl")


def shuffled_pairs(rng: np.random.Generator, n: int, steps: torch.Tensor, fraction: float) -> np.ndarray:
    """One pass over n plain trajectories, as (trajectory, step) of each row: int64 (M, 2)."""
    rows = Rows.of(n, steps)
    order = shuffled(rng, rows, fraction)
    return np.stack([rows.trajectory[order], rows.step[order]], 1)


# --- which pairs an update covers -------------------------------------------------------------------------------------


def test_a_pass_has_every_trajectory_with_every_trained_step_once():
    pairs = shuffled_pairs(np.random.default_rng(0), 7, torch.tensor([0, 1, 2, 5]), 1.0)
    assert pairs.shape == (28, 2) and pairs.dtype == np.int64
    assert sorted(map(tuple, pairs.tolist())) == [(i, step) for i in range(7) for step in (0, 1, 2, 5)]


@pytest.mark.parametrize("fraction, kept", [(0.5, 5), (0.25, 2), (0.01, 1), (0.96, 10)])
def test_a_fraction_of_the_steps_is_drawn_for_each_trajectory_anew(fraction, kept):
    pairs = shuffled_pairs(np.random.default_rng(0), 40, torch.arange(10), fraction)
    assert len(set(map(tuple, pairs.tolist()))) == len(pairs) == 40 * kept  # none twice
    assert (np.bincount(pairs[:, 0]) == kept).all()
    chosen = {tuple(sorted(pairs[pairs[:, 0] == i, 1])) for i in range(40)}
    assert len(chosen) == 1 if kept == 10 else len(chosen) > 5
    assert set(pairs[:, 1]) == set(range(10))  # over the trajectories no step is left out


def test_passes_differ_in_order_and_a_seed_gives_the_same_again():
    rng = np.random.default_rng([3, 1])
    first, second = (shuffled_pairs(rng, 6, torch.arange(4), 1.0) for _ in range(2))
    assert (first != second).any()
    assert (first == shuffled_pairs(np.random.default_rng([3, 1]), 6, torch.arange(4), 1.0)).all()
    assert (first != shuffled_pairs(np.random.default_rng([3, 2]), 6, torch.arange(4), 1.0)).any()


def test_every_update_covers_the_trajectories_as_evenly_as_can_be():
    pairs = shuffled_pairs(np.random.default_rng(0), 6, torch.arange(10), 1.0)
    for update in np.array_split(pairs, 2):
        assert (np.bincount(update[:, 0]) == 5).all()
    for update in np.array_split(pairs, 7):
        counts = np.bincount(update[:, 0], minlength=6)
        assert counts.max() - counts.min() <= 2
    assert len({tuple(pairs[6 * k : 6 * k + 6, 0]) for k in range(10)}) > 5  # not in the same order each time


@pytest.mark.parametrize(
    "p, k, rollout_batch, update_batch",
    [(3, 3, 4, 7), (5, 2, 3, 64), (1, 2, 1, 1)],
)
def test_uneven_prompts_images_and_batches_train_every_pair_exactly_once(make_trainer, p, k, rollout_batch, update_batch):
    memory = {"rollout_batch": rollout_batch, "update_batch": update_batch, "vae_batch": 2}
    trainer = make_trainer(prompts_per_step=p, images_per_prompt=k, memory=memory)
    trajectories, advantages = begin(trainer)
    assert len(set(trajectories.prompts)) == p and [*map(trajectories.prompts.count, trajectories.prompts)] == [k] * p * k
    batches, steps = record_pairs(trainer), record_steps(trainer)
    trainer.update(trajectories, advantages, trainer.iteration)
    assert len(steps) == 2 and max(map(len, batches)) == trainer.batches.update <= update_batch
    assert sorted(itertools.chain(*batches)) == [(i, step) for i in range(p * k) for step in range(4)]


def test_two_passes_train_every_pair_twice_in_another_order(make_trainer):
    trainer = make_trainer(passes_per_rollout=2, updates_per_rollout=2)
    trajectories, advantages = begin(trainer)
    batches, steps = record_pairs(trainer), record_steps(trainer)
    trainer.update(trajectories, advantages, trainer.iteration)
    pairs = list(itertools.chain(*batches))
    assert len(steps) == 2 and len(pairs) == 48
    assert sorted(pairs[:24]) == sorted(pairs[24:]) == [(i, step) for i in range(6) for step in range(4)]
    assert pairs[:24] != pairs[24:]


def test_dropped_steps_and_left_out_timesteps_are_not_trained(make_trainer):
    trainer = make_trainer(last_steps={"drop": 2}, timestep_fraction=0.5)
    trajectories, advantages = begin(trainer)
    batches = record_pairs(trainer)
    trainer.update.check_replay(trajectories)
    assert {step for _, step in itertools.chain(*batches)} == {0, 1}  # the first and the last that are trained
    batches.clear()
    trainer.update(trajectories, advantages, trainer.iteration)
    pairs = list(itertools.chain(*batches))
    assert sorted(i for i, _ in pairs) == list(range(6)) and {step for _, step in pairs} == {0, 1}


def test_steps_without_noise_are_not_trained(make_trainer, tiny_sdxl):
    trainer = make_trainer(model={"path": tiny_sdxl, "scheduler": {"steps_offset": 0}})  # the last one starts at timestep 0
    batches = record_pairs(trainer)
    trajectories, advantages = begin(trainer)
    row = trainer.update(trajectories, advantages, trainer.iteration)
    assert sorted(itertools.chain(*batches)) == [(i, step) for i in range(6) for step in range(3)]
    assert all(map(math.isfinite, row.values())) and row["policy/grad_norm"] > 0


def test_the_weight_of_the_last_steps_falls_on_the_last_trained_ones(make_trainer):
    def of(**last_steps) -> list[float]:
        trainer = make_trainer(last_steps=last_steps, sampling={"steps": 6})
        shutil.rmtree(trainer.folder)
        return step_weights(trainer.table, trainer.steps_trained, trainer.config).tolist()

    assert of() == [1] * 6
    assert of(weight=0.25) == [1, 1, 1, 1, 0.25, 0.25]
    assert of(weight=0.25, count=1, drop=2)[:4] == [1, 1, 1, 0.25]
    assert of(weight=0.5, count=9) == [0.5] * 6


# --- gradients --------------------------------------------------------------------------------------------------------


def brute_force(trainer: Trainer, trajectories, advantages, at: Weights, initial: Weights) -> tuple[Weights, torch.Tensor]:
    """The gradient of the formulas in docs/method.md over all pairs, in float64 at once; and the ratios."""
    config, table = trainer.config, trainer.table
    unet = copy.deepcopy(trainer.denoiser.network).double()
    own = {name: p for name, p in unet.named_parameters() if p.requires_grad}
    i = torch.arange(len(trajectories.prompts)).repeat_interleave(len(table))
    step = torch.arange(len(table)).repeat(len(trajectories.prompts))
    x, x_prev = trajectories.latents[step, i].double(), trajectories.latents[step + 1, i].double()
    cond, uncond = trainer.denoiser.encode([trajectories.prompts[k] for k in i], config.sampling)
    a, b, sigma = (column[step].view(-1, 1, 1, 1) for column in (table.a, table.b, table.sigma))

    def policy(values: Weights) -> Normal:
        with torch.no_grad():
            for name, p in own.items():
                p.copy_(values[name])
        c, u = (unet(x, table.timesteps[step], text.double()).sample for text in (cond, uncond))
        return Normal(a * x + b * (u + config.sampling.guidance_scale * (c - u)), sigma)

    with torch.no_grad():
        reference = policy(initial)
    current = policy(at)
    log_prob = current.log_prob(x_prev).flatten(1).mean(1)
    advantage, old = advantages[i].double(), trajectories.log_probs[step, i].double()
    ratio = (log_prob - old).exp()
    bounded = ratio.clamp(1 - config.clip_range, 1 + config.clip_range)
    maximised = {
        "score_function": advantage * log_prob,
        "clipped": torch.min(ratio * advantage, bounded * advantage),
        "clip_only": bounded * advantage,
    }[config.objective]
    factor = torch.ones(len(table), dtype=torch.float64)
    factor[-config.last_steps.count :] = config.last_steps.weight
    distance = kl_divergence(current, reference)
    if config.kl.form == "epsilon":  # of a model that predicts it: the means differ by b times as much
        distance = ((current.mean - reference.mean) / b).square()
    penalty = config.kl.weight * distance.flatten(1).mean(1)
    ((penalty - maximised) * factor[step]).mean().backward()
    return {name: p.grad for name, p in own.items()}, ratio.detach()


@pytest.mark.parametrize(
    "adapter, objective, checkpointing, model",
    [
        ("lora", "clipped", False, "tiny_sd"),
        ("full", "clipped", False, "tiny_sd"),
        ("lora", "clip_only", True, "tiny_sd"),
        ("full", "clipped", True, "tiny_sd_v"),
        ("lora", "score_function", False, "tiny_sd"),
    ],
)
def test_an_updates_gradient_is_that_of_the_formula_in_float64(
    make_trainer, request, adapter, objective, checkpointing, model
):
    passes = 1 if objective == "score_function" else 2  # with two passes each update holds all pairs
    trainer = make_trainer(
        model={"adapter": adapter, "path": request.getfixturevalue(model)},
        objective=objective,
        updates_per_rollout=passes,
        passes_per_rollout=passes,
        clip_range=1e-3 if adapter == "lora" else 5e-4,
        kl={"weight": 0.1, "form": "epsilon" if objective == "clip_only" else "gaussian"},  # about as large as the policy's
        last_steps={"weight": 0.5},
        optimizer={"lr": 2e-2 if adapter == "lora" else 1e-4},
        memory={"gradient_checkpointing": checkpointing},
    )
    initial = weights(trainer)
    trajectories, advantages = begin(trainer)
    steps = record_steps(trainer)
    trainer.update(trajectories, advantages, trainer.iteration)
    expected, ratio = brute_force(trainer, trajectories, advantages, steps[-1].before, initial)
    if passes == 2:
        clipped = ((ratio - 1).abs() > trainer.config.clip_range).double().mean()
        assert 0.1 < clipped < 0.9  # else the test would not see the clip
    scale = max(gradient.abs().max().item() for gradient in expected.values())
    assert scale > 1e-5
    for name, gradient in steps[-1].gradients.items():
        torch.testing.assert_close(gradient.double(), expected[name], rtol=1e-3, atol=1e-4 * scale, msg=name)


def test_the_gradient_does_not_depend_on_the_micro_batch(make_trainer, tmp_path):
    gradients = []
    for batch in (1, 5, 64):
        trainer = make_trainer(memory={"update_batch": batch}, output_dir=str(tmp_path / f"{batch}"))
        trajectories, advantages = begin(trainer)
        steps = record_steps(trainer)
        trainer.update(trajectories, advantages, trainer.iteration)
        gradients.append(steps[0].gradients)
    scale = max(gradient.abs().max().item() for gradient in gradients[0].values())
    assert scale > 1e-5
    for other in gradients[1:]:
        for name, gradient in other.items():
            torch.testing.assert_close(gradient, gradients[0][name], rtol=1e-4, atol=1e-5 * scale)


def test_pairs_without_an_advantage_are_not_run_and_count_in_the_mean_all_the_same(make_trainer):
    trainer = make_trainer(updates_per_rollout=3, passes_per_rollout=3, memory={"update_batch": 64})
    initial = weights(trainer)
    trajectories, _ = begin(trainer)
    advantages = torch.tensor([0.0, 1.0, 0.0, 0.0, -2.0, 0.0])
    batches, steps = record_pairs(trainer), record_steps(trainer)
    row = trainer.update(trajectories, advantages, trainer.iteration)
    assert [sorted(batch) for batch in batches] == 3 * [[(i, step) for i in (1, 4) for step in range(4)]]
    assert row["policy/pairs_skipped"] == 3 * 4 * 4
    expected, ratio = brute_force(trainer, trajectories, advantages, steps[-1].before, initial)
    scale = max(gradient.abs().max().item() for gradient in expected.values())
    for name, gradient in steps[-1].gradients.items():
        torch.testing.assert_close(gradient.double(), expected[name], rtol=1e-3, atol=1e-4 * scale, msg=name)
    ran = ratio.view(6, 4)[[1, 4]]  # statistics of ratios are of these
    assert row["policy/ratio_max_dev"] == pytest.approx((ran - 1).abs().max().item(), rel=1e-3)


def test_an_update_without_a_pair_to_run_takes_no_step_and_the_next_one_is_the_first(make_trainer, monkeypatch):
    trainer = make_trainer(images_per_prompt=2, prompts_per_step=2, updates_per_rollout=2, ema={"decay": 0.5})
    order = np.arange(16)  # the first update: trajectories 0 and 1
    monkeypatch.setattr("fastloop.update.shuffled", lambda *args: order)
    trajectories, _ = begin(trainer)
    steps = record_steps(trainer)
    row = trainer.update(trajectories, torch.tensor([0.0, 0.0, 1.0, -1.0]), trainer.iteration)
    assert len(steps) == 1 and row["policy/pairs_skipped"] == 8 and row["policy/grad_norm"] > 0
    assert row["policy/ratio_first_dev"] == row["policy/ratio_max_dev"] < 1e-6


def test_with_a_kl_every_pair_is_run(make_trainer):
    trainer = make_trainer(kl={"weight": 0.1})
    trajectories, _ = begin(trainer)
    batches = record_pairs(trainer)
    row = trainer.update(trajectories, torch.zeros(6), trainer.iteration)
    assert sum(map(len, batches)) == 24 and row["policy/pairs_skipped"] == 0


@pytest.mark.parametrize("algorithm", ["loop", "rloo", "ppo", "reinforce", "grpo"])
def test_equal_rewards_leave_every_weight_as_it_was(train, algorithm, monkeypatch, capsys):
    module = types.ModuleType("mine")
    module.constant = lambda images, prompts, metadata: [123456.789] * len(images)
    monkeypatch.setitem(sys.modules, "mine", module)
    trainer = train(
        algorithm=algorithm,
        rewards=[{"name": "mine:constant"}],
        eval={"every": 100, "prompts": {"source": "animals", "limit": 1}, "rewards": [{"name": "jpeg_compressibility"}]},
        images_per_prompt=3,
        normalize_advantages=True,
        optimizer={"lr": 1.0, "weight_decay": 0.5},
        ema={"decay": 0.5},
    )
    before, after = (load_file(path / "weights.safetensors") for path in sorted((trainer.folder / "checkpoints").iterdir()))
    assert before.keys() == after.keys() and all(before[name].equal(after[name]) for name in before)
    for row in metrics(trainer):
        assert row["advantage/abs_mean"] == row["policy/grad_norm"] == row["reward/group_std"] == 0
        assert row["policy/pairs_skipped"] == 9 * 4 and row["alarm/group_std"] == 1 and "policy/clipfrac" not in row
    assert capsys.readouterr().out.count("no update: every advantage is 0") == 2
    assert "policy" in write_report(trainer.folder).read_text()


def test_the_engine_accumulates_clips_steps_and_clears(make_config):
    w = torch.nn.Parameter(torch.ones(4))
    # with eps = 1 a first step of AdamW is lr g / (g + 1)
    config = make_config(optimizer={"lr": 0.1, "eps": 1.0, "weight_decay": 0.0, "max_grad_norm": 0.5})
    engine = TorchEngine({"w": w}, config, torch.device("cpu"))
    engine.backward(w.sum(), last=False)
    engine.backward(2 * w.sum(), last=True)
    assert engine.step() == pytest.approx(6.0)  # before clipping, which leaves 0.25 in each of the four
    torch.testing.assert_close(w.detach(), torch.full((4,), 1 - 0.1 * 0.25 / 1.25))
    assert w.grad is None
    engine.backward((w * math.inf).sum(), last=True)
    before = w.detach().clone()
    assert engine.step() is None and w.equal(before) and w.grad is None
    engine.set_lr(0.0)
    engine.backward(w.sum(), last=False)
    assert engine.step() > 0 and w.equal(before)


# --- algorithms -------------------------------------------------------------------------------------------------------


def test_loop_with_one_update_is_rloo_and_with_two_it_is_not(train):
    one, rloo, two = (
        train(algorithm=algorithm, updates_per_rollout=updates, iterations=1)
        for algorithm, updates in (("loop", 1), ("rloo", 1), ("loop", 2))
    )
    start = load_file(one.folder / "checkpoints" / "iteration-000000" / "weights.safetensors")
    assert distance(weights(one), start) > 0.1
    assert distance(weights(one), weights(rloo)) < 1e-4 * distance(weights(one), start)
    assert metrics(one)[0]["policy/grad_norm"] == pytest.approx(metrics(rloo)[0]["policy/grad_norm"], rel=1e-4)
    assert metrics(one)[0]["policy/loss"] != pytest.approx(metrics(rloo)[0]["policy/loss"], rel=1e-2)
    assert distance(weights(two), weights(one)) > 0.1 * distance(weights(one), start)


def test_every_algorithm_runs_and_nothing_else_in_the_config_differs(train, make_config):
    rows, resolved = {}, {}
    of_network = [name for name, algorithm in ALGORITHMS.items() if not algorithm.trains_noise]
    for algorithm in of_network:
        trainer = train(algorithm=algorithm, iterations=1)
        (rows[algorithm],) = metrics(trainer)
        resolved[algorithm] = trainer.config.model_dump() | {"output_dir": None}
        assert status(trainer.folder) == "finished"
    assert set(rows) == {"loop", "rloo", "ppo", "reinforce", "grpo", "dpok", "dlpo", "loop_forward", "loop_fast"}
    brought = {"algorithm", *ALGORITHMS["loop"].of_keys()}
    for algorithm, row in rows.items():
        own = brought | set(ALGORITHMS[algorithm].settings)
        assert all(math.isfinite(value) for value in row.values()) and row["policy/grad_norm"] > 0
        assert row["reward/mean"] == rows["loop"]["reward/mean"]  # the same images for all
        assert {key for key, value in resolved[algorithm].items() if value != resolved["loop"][key]} <= own
    assert rows["loop"]["advantage/std"] == rows["rloo"]["advantage/std"]
    assert rows["ppo"]["advantage/std"] == pytest.approx(1.0, rel=0.05)  # batch_norm while its histories are short
    assert rows["reinforce"]["advantage/std"] == pytest.approx(rows["loop"]["reward/std"], rel=1e-5)
    assert len({row["advantage/abs_mean"] for row in rows.values()}) == 6  # loop and rloo share theirs


@pytest.mark.parametrize("algorithm", ["reinforce", "ppo"])
def test_algorithms_without_groups_run_with_one_image_per_prompt(train, algorithm):
    trainer = train(algorithm=algorithm, images_per_prompt=1, prompts_per_step=5, iterations=2)
    for row in metrics(trainer):
        assert all(math.isfinite(value) for value in row.values()) and row["policy/grad_norm"] > 0
        assert row["reward/group_std"] == 0 and row["alarm/group_std"] == 0  # one image has no spread: no alarm


def test_normalised_advantages_have_unit_spread_whatever_the_scale_of_the_reward(train):
    one, hundred = (
        train(normalize_advantages=True, iterations=1, rewards=[{"name": "jpeg_incompressibility", "weight": weight}])
        for weight in (1.0, 100.0)
    )
    plain = train(iterations=1)
    spread = metrics(plain)[0]["advantage/std"]
    assert metrics(one)[0]["advantage/std"] == pytest.approx(spread / (spread + 1e-4), rel=1e-5)
    assert metrics(hundred)[0]["advantage/std"] == pytest.approx(1.0, abs=1e-3)
    assert metrics(hundred)[0]["policy/grad_norm"] == pytest.approx(metrics(one)[0]["policy/grad_norm"], rel=0.1)


def test_a_weighted_sum_of_rewards_on_prompts_from_a_file(train, tmp_path):
    lines = ["a red circle", "two blue squares", "a cat"]
    (tmp_path / "mine.txt").write_text("\n".join(lines) + "\n")
    trainer = train(
        prompts={"source": str(tmp_path / "mine.txt")},
        rewards=[{"name": "jpeg_incompressibility"}, {"name": "jpeg_compressibility", "weight": 0.25}],
        iterations=1,
    )
    (row,) = metrics(trainer)
    more, less = row["reward/jpeg_incompressibility"], row["reward/jpeg_compressibility"]
    assert more == pytest.approx(-less) and row["reward/mean"] == pytest.approx(0.75 * more)
    single = train(prompts={"source": str(tmp_path / "mine.txt")}, iterations=1)
    assert row["advantage/std"] == pytest.approx(0.75 * metrics(single)[0]["advantage/std"], rel=1e-4)
    assert sorted(prompt.text for prompt in trainer.prompts.draw(0, 3)) == sorted(lines)
    assert {text for text, _ in trainer.denoiser._embeddings} == {
        *lines,
        None,
        ANIMALS[0],
    }  # what was drawn, with the held-out one


# --- models and precisions --------------------------------------------------------------------------------------------


@pytest.fixture
def fp32_row(train) -> dict:
    return metrics(train(iterations=1, clip_range=0.05))[0]


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_half_precision_trains_float32_weights_close_to_full_precision(train, fp32_row, dtype):
    trainer = train(model={"dtype": dtype}, iterations=1, clip_range=0.05)
    (row,) = metrics(trainer)
    assert all(math.isfinite(value) for value in row.values())
    half = {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    assert {p.dtype for p in trainer.parameters.values()} == {trainer.denoiser.network.conv_in.weight.dtype} == {half}
    assert {p.dtype for p in trainer.engine.weights().values()} == {torch.float32}
    assert row["policy/replay_max_dev"] == 0.0
    assert row["reward/mean"] == pytest.approx(fp32_row["reward/mean"], abs=0.01)
    assert row["policy/grad_norm"] == pytest.approx(fp32_row["policy/grad_norm"], rel=0.5)  # the loss scale is taken out
    assert trainer.update.skipped == 0


@pytest.mark.parametrize(
    "changes",
    [
        {"model": {"adapter": "full"}},
        {"model": {"adapter": "full", "dtype": "bf16"}},
        {"memory": {"gradient_checkpointing": True}},
    ],
    ids=["full", "full in bf16", "gradient checkpointing"],
)
def test_other_ways_to_train_run_with_ratio_one_and_finite_metrics(train, changes):
    trainer = train(**changes, iterations=2, clip_range=0.1, optimizer={"lr": 1e-4})
    rows = metrics(trainer)
    assert all(math.isfinite(value) for row in rows for value in row.values())
    assert rows[0]["policy/replay_max_dev"] == 0.0 and min(row["policy/grad_norm"] for row in rows) > 0
    start = load_file(trainer.folder / "checkpoints" / "iteration-000001" / "weights.safetensors")
    assert 0 < distance(weights(trainer), start) < 1


def test_v_prediction_runs(train, tiny_sd_v):
    trainer = train(model={"path": tiny_sd_v}, iterations=2)
    rows = metrics(trainer)
    assert all(math.isfinite(value) for row in rows for value in row.values())
    assert rows[0]["policy/replay_max_dev"] == 0.0 and min(row["policy/grad_norm"] for row in rows) > 0
    assert max(row["policy/ratio_first_dev"] for row in rows) < 1e-6


# --- one iteration and the next ---------------------------------------------------------------------------------------


def test_every_iteration_has_prompts_noise_and_an_order_of_its_own(make_trainer):
    trainer = make_trainer(eval={"every": 9})
    pairs, drawn, rollout = record_pairs(trainer), [], trainer.rollout

    def recorded(prompts, ids):
        drawn.append(([prompt.text for prompt in prompts], ids.tolist()))
        return rollout(prompts, ids)

    trainer.rollout = recorded
    trainer.train()
    (first, ids), (second, later_ids) = drawn
    assert ids == list(range(6)) and later_ids == list(range(6, 12))
    assert all(prompts[::2] == prompts[1::2] and len(set(prompts)) == 3 for prompts in (first, second))
    assert not set(first) & set(second)  # of 45 animals none comes twice in a pass
    trained = list(itertools.chain(*pairs))[-48:]  # before them the replay
    assert sorted(trained[:24]) == sorted(trained[24:]) and trained[:24] != trained[24:]


def test_logged_advantages_are_those_of_the_logged_rewards(make_trainer):
    trainer = make_trainer(iterations=1)
    _, advantages = begin(trainer)
    trainer.train()
    (row,) = metrics(trainer)
    assert row["advantage/abs_mean"] == pytest.approx(advantages.abs().mean().item())
    assert row["advantage/std"] == pytest.approx(advantages.std(correction=0).item())
    assert row["advantage/abs_mean"] == pytest.approx(2 * row["reward/group_std"], rel=1e-4)  # K = 2: A = +- the difference
    rewards = np.array([1.0, 3.0, 2.0, 2.0])
    found = trainer.advantages(["a", "b"], Scores(rewards, {}, {"jpeg_incompressibility": rewards}))
    assert found.equal(leave_one_out(torch.from_numpy(rewards).view(2, 2)).float().flatten())


# --- KL and moving average --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adapter, lr", [("lora", 1e-2), ("full", 1e-4)])
def test_the_kl_starts_at_zero_grows_and_its_weight_holds_the_policy_back(train, make_trainer, adapter, lr):
    start = make_trainer(model={"adapter": adapter})
    common = {"model": {"adapter": adapter}, "updates_per_rollout": 1, "iterations": 4, "optimizer": {"lr": lr}}
    loose, tight = (train(**common, kl={"weight": weight}) for weight in (1e-9, 1e4))
    grows, held = ([row["policy/kl_reference"] for row in metrics(trainer)] for trainer in (loose, tight))
    assert grows[0] == held[0] == 0.0 and min(grows[1:] + held[1:]) > 0
    assert grows[-1] > grows[1] and held[-1] < 0.5 * grows[-1]
    start = weights(start)
    assert 0 < distance(weights(tight), start) < 0.9 * distance(weights(loose), start)


def test_the_moving_average_is_evaluated_and_exported_and_the_raw_weights_go_on_training(
    train, make_trainer, tmp_path, monkeypatch, capsys
):
    evaluated = []
    real = fastloop.training_run.evaluate

    def evaluate(denoiser, *args, **kwargs):
        evaluated.append({name: p.detach().clone() for name, p in denoiser.trainable().items()})
        return real(denoiser, *args, **kwargs)

    monkeypatch.setattr("fastloop.training_run.evaluate", evaluate)
    trainer = make_trainer(ema={"decay": 0.28}, output_dir=str(tmp_path / "ema"))
    steps = record_steps(trainer)
    trainer.train()
    average = {name: value.double() for name, value in steps[0].before.items()}
    for stays, step in zip((2 / 11, 3 / 12, 0.28, 0.28), steps, strict=True):  # it follows the first steps more closely
        average = {name: stays * value + (1 - stays) * step.after[name].double() for name, value in average.items()}
    assert len(steps) == 4 and distance(average, steps[-1].after) > 0.05
    assert len(evaluated) == 2 and same(evaluated[0], steps[0].before)
    raw, saved, _ = load_checkpoint(trainer.folder / "checkpoints" / "iteration-000002", averaged=True)
    exported = load_file(trainer.folder / "export" / "pytorch_lora_weights.safetensors")
    for name, value in average.items():
        torch.testing.assert_close(saved[name].double(), value, rtol=1e-5, atol=1e-7)
        assert evaluated[1][name].equal(saved[name])
        assert exported["unet." + name.replace(".default.", ".")].equal(saved[name])
    assert same(raw, steps[-1].after) and same(raw, weights(trainer))
    assert same(raw, weights(train()))  # training does not know of the average
    # the command line evaluates what the run evaluated last
    capsys.readouterr()
    assert main(["eval", str(trainer.folder), "--json", str(tmp_path / "eval.json")]) == 0
    last = read_rows(trainer.folder / "eval.jsonl")[-1]
    assert json.loads((tmp_path / "eval.json").read_text())["score"] == pytest.approx(last["score"])


# --- trust ------------------------------------------------------------------------------------------------------------


def add_noise_with_gradients(trainer: Trainer) -> None:
    """As dropout would, or a kernel that differs where gradients are kept."""
    predict = trainer.denoiser.predict

    def noisy(*args):
        cond, uncond = predict(*args)
        return (cond + 1e-2 * torch.randn_like(cond), uncond) if torch.is_grad_enabled() else (cond, uncond)

    trainer.denoiser.predict = noisy


@pytest.mark.parametrize(
    "memory, says",
    [
        ({"rollout_batch": 4, "update_batch": 5}, "replaying the first rollout batch gives |ratio - 1| = "),
        # the batch is too large to replay with gradients: the first update finds it
        ({"rollout_batch": 6, "update_batch": 5}, "before any update |ratio - 1| reaches "),
    ],
    ids=["replay", "first update"],
)
def test_updates_that_differ_from_rollouts_stop_the_run_before_any_weight_changes(make_trainer, memory, says):
    trainer = make_trainer(memory=memory, clip_range=1e-4)
    initial = weights(trainer)
    add_noise_with_gradients(trainer)
    with pytest.raises(RunFailed, match="^ratio check: ") as caught:
        trainer.train()
    assert says in str(caught.value) and "Likely causes: model.dtype" in str(caught.value)
    assert same(weights(trainer), initial) and metrics(trainer) == []
    assert status(trainer.folder) == "failed" and checkpoints(trainer.folder) == ["iteration-000000"]
    assert same(load_checkpoint(trainer.folder / "checkpoints" / "iteration-000000", averaged=False)[0], initial)


def test_the_score_function_has_no_ratio_to_clip_and_only_the_replay_checks_it(make_trainer):
    trainer = make_trainer(algorithm="rloo", memory={"rollout_batch": 6}, clip_range=1e-4, iterations=1)
    add_noise_with_gradients(trainer)
    trainer.train()
    assert metrics(trainer)[0]["policy/ratio_first_dev"] > 1e-4


def nan_outputs(trainer: Trainer) -> None:
    predict = trainer.denoiser.predict

    def broken(*args):
        cond, uncond = predict(*args)
        return (cond * math.nan if trainer.iteration == 1 and torch.is_grad_enabled() else cond), uncond

    trainer.denoiser.predict = broken


def infinite_gradients(trainer: Trainer) -> None:
    parameter = next(iter(trainer.parameters.values()))
    parameter.register_hook(lambda gradient: gradient + (math.inf if trainer.iteration == 1 else 0))


@pytest.mark.parametrize(
    "breaks, says",
    [
        (nan_outputs, "the loss is not finite in iteration 2: the last good checkpoint is kept"),
        (infinite_gradients, "the gradients are not finite in iteration 2: the last good checkpoint is kept"),
    ],
)
def test_what_is_not_finite_stops_the_run_and_leaves_the_weights_untouched(make_trainer, make_config, breaks, says):
    trainer = make_trainer(iterations=3)
    breaks(trainer)
    with pytest.raises(RunFailed, match=says):
        trainer.train()
    good, _, state = load_checkpoint(trainer.folder / "checkpoints" / "iteration-000001", averaged=False)
    assert same(weights(trainer), good) and state["iteration"] == 1
    assert [row["iteration"] for row in metrics(trainer)] == [1] and status(trainer.folder) == "failed"
    resumed = Trainer(make_config(iterations=3), resume=True)
    resumed.train()
    assert [row["iteration"] for row in metrics(resumed)] == [1, 2, 3] and status(trainer.folder) == "finished"


def test_loss_scaling_skips_steps_that_are_not_finite_and_gives_up_in_the_end(make_trainer):
    trainer = make_trainer(model={"dtype": "fp16"}, updates_per_rollout=3, iterations=9, clip_range=0.05)
    initial = weights(trainer)
    next(iter(trainer.parameters.values())).register_hook(lambda gradient: gradient + math.inf)
    with pytest.raises(RunFailed, match="the gradients are not finite in iteration 3"):
        trainer.train()
    assert MAX_SKIPPED == 8 and same(weights(trainer), initial)
    _, _, state = load_checkpoint(trainer.folder / "checkpoints" / "iteration-000002", averaged=False)
    assert state["skipped"] == 6 and state["engine"]["scaler"]["scale"] == 2.0**16 / 2**6


REWARD = """
calls = 0

def constant(images, prompts, metadata):
    return [0.5] * len(images)

def rising(images, prompts, metadata):
    global calls
    calls += 1
    return [calls + i / 10 for i in range(len(images))]

def falling(images, prompts, metadata):
    return [-calls] * len(images)
"""


@pytest.fixture
def reward_module(tmp_path, monkeypatch):
    """A module of the user's own."""
    (tmp_path / "own_rewards.py").write_text(REWARD)
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("own_rewards", None)


def test_a_constant_reward_raises_the_alarm_and_trains_nothing(train, reward_module, capsys):
    trainer = train(
        rewards=[{"name": "own_rewards:constant"}],
        optimizer={"weight_decay": 0.0},
        safety={"min_image_entropy": 7.9, "max_image_saturation": 1e-6},
    )
    for row in metrics(trainer):
        assert row["alarm/group_std"] == row["alarm/entropy"] == row["alarm/saturation"] == 1.0
        assert row["alarm/clipfrac"] == row["policy/grad_norm"] == row["advantage/abs_mean"] == 0.0
    out = capsys.readouterr().out
    assert out.count("alarm group_std: images of one prompt get the same reward") == 1 and "alarm clipfrac" not in out
    start = load_file(trainer.folder / "checkpoints" / "iteration-000001" / "weights.safetensors")
    assert same(weights(trainer), start)


def test_a_watched_reward_that_falls_while_the_training_reward_rises_raises_the_alarm(train, reward_module, capsys):
    rewards = {"rewards": [{"name": "own_rewards:rising"}], "iterations": 4}
    trainer = train(**rewards, eval={"every": 2, "rewards": [{"name": "own_rewards:falling"}]})
    assert [row["alarm/held_out"] for row in metrics(trainer)] == [0.0, 0.0, 1.0, 1.0]
    assert "alarm held_out: held out, own_rewards:falling fell by more than its error" in capsys.readouterr().out
    page = write_report(trainer.folder).read_text()
    assert "Held-out own_rewards:falling and training reward" in page
    off = train(**rewards, eval={"every": 2, "rewards": [{"name": "own_rewards:falling"}]}, safety={"held_out_errors": None})
    assert not any(row["alarm/held_out"] for row in metrics(off))


def test_nearly_only_clipped_pairs_raise_the_alarm(train, capsys):
    trainer = train(clip_range=1e-5, optimizer={"lr": 0.3}, updates_per_rollout=3, iterations=1)
    (row,) = metrics(trainer)
    assert row["policy/ratio_first_dev"] < 1e-5 and row["policy/clipfrac"] > 0.9  # over the second and third update
    assert row["alarm/clipfrac"] == 1.0 and row["alarm/group_std"] == 0.0
    assert "alarm clipfrac: nearly every pair is clipped" in capsys.readouterr().out
    (row,) = metrics(train(algorithm="rloo", updates_per_rollout=3, clip_range=1e-5, optimizer={"lr": 0.3}, iterations=1))
    assert row["policy/clipfrac"] > 0.9 and row["alarm/clipfrac"] == 0.0  # nothing is clipped there
