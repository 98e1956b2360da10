"""The forward process: final latents noised again, trained with the rollout's advantages."""

from __future__ import annotations

import copy
import itertools
import re

import pytest
import torch
from recorded import begin, record_pairs, record_steps, same, weights

from fastloop.config.training import KlConfig
from fastloop.errors import UserError
from fastloop.forward import ForwardProcess
from fastloop.kernels import reference
from fastloop.losses import weight_of_kl
from fastloop.plan import plan
from fastloop.preflight import preflight
from fastloop.report import write_report
from fastloop.rollout import sampler_table
from fastloop.tracking import read_rows
from fastloop.trainer import Trainer

FORWARD = {"algorithm": "loop_forward", "forward": {"levels": 6, "window": [100, 900]}}  # more levels than sampling.steps
CPU = torch.device("cpu")


def process(config) -> ForwardProcess:
    return ForwardProcess(config, sampler_table(config.model, config.sampling).schedule, reference, CPU)


# --- rows -------------------------------------------------------------------------------------------------------------


def test_levels_are_uniform_in_their_parts_of_the_window_and_follow_from_the_group_alone(make_config):
    of = process(make_config(**FORWARD, images_per_prompt=1, advantage="batch_mean"))
    number, level = torch.arange(3000).repeat_interleave(6), torch.arange(6).repeat(3000)
    timesteps = of.timesteps(number, level)
    for j in range(6):
        low, high = 100 + j * 801 / 6, 100 + (j + 1) * 801 / 6
        seen = timesteps[level == j].double()
        assert seen.min() >= int(low) and seen.max() <= high and len(seen.unique()) > 130
        middle, error = (low + high - 1) / 2, (high - low) / 12**0.5 / 3000**0.5
        assert abs(seen.mean() - middle) < 4 * error and abs((seen < middle).double().mean() - 0.5) < 0.04
    assert timesteps.min() == 100 and timesteps.max() == 900
    some = torch.randperm(len(number))[:50]
    assert of.timesteps(number[some], level[some]).equal(timesteps[some])
    large = torch.tensor([2**40 + 3]), torch.tensor([2])
    assert 100 <= of.timesteps(*large).item() <= 900 and len(timesteps.view(-1, 6).unique(dim=0)) > 2990
    other = process(make_config(**FORWARD, images_per_prompt=1, advantage="batch_mean", seed=1))
    assert not other.timesteps(number, level).equal(timesteps)
    threes = process(make_config(**FORWARD, images_per_prompt=3))
    assert threes.timesteps(number, level).equal(of.timesteps(number // 3, level))


@pytest.mark.parametrize("model", ["tiny_sd", "tiny_sd_v"])
def test_a_row_is_the_latents_noised_and_its_mean_the_noise_that_the_network_predicts(make_config, request, model):
    config = make_config(model={"path": request.getfixturevalue(model)}, images_per_prompt=3, **FORWARD)
    of, x_0 = process(config), torch.randn(4, 4, 8, 8)
    number, level = torch.tensor([0, 0, 7, 2**33 + 1]), torch.tensor([0, 5, 0, 3])
    row = of.rows(x_0, number, level)
    alpha = sampler_table(config.model, config.sampling).schedule.alphas[row["timestep"]].view(-1, 1, 1, 1)
    noise = row["x_prev"].double()
    assert (row["x_t"] - (alpha.sqrt() * x_0 + (1 - alpha).sqrt() * noise)).abs().max() < 1e-5
    exact = {"tiny_sd": noise, "tiny_sd_v": alpha.sqrt() * noise - (1 - alpha).sqrt() * x_0}[model]  # of a perfect network
    mean = reference.transition_mean(exact, None, row["x_t"], row["a"], row["b"], 1.0)
    assert (mean - noise).abs().max() < 1e-5
    alone = of.rows(x_0[1:2], number[1:2], level[1:2])
    assert all(alone[name].equal(value[1:2]) for name, value in row.items())
    of_group = of.rows(x_0, torch.tensor([6, 7, 8, 9]), torch.tensor([3, 3, 3, 3]))["x_prev"]
    assert of_group[:2].equal(of_group[1:3]) and not of_group[2].equal(of_group[3])  # 6, 7 and 8 are of one prompt
    drawn = [reference.initial_noise(config.seed, number, (4, 8, 8)), reference.normal(config.seed, number, 0, 256)]
    drawn += [reference.initial_noise(config.seed | 1 << 32, number, (4, 8, 8))]  # an evaluation's
    every = torch.cat([row["x_prev"].flatten(1), *(one.flatten(1) for one in drawn)])
    overlap = torch.corrcoef(every) - torch.eye(len(every))
    assert overlap[:4].abs().max() < 0.3  # of 256 elements 1 / 16 is the standard error


# --- gradients --------------------------------------------------------------------------------------------------------


def brute_force(trainer, trajectories, advantages, pairs, at, initial):
    """The gradient of the formula in docs/method.md over rows (trajectory, level), in float64."""
    config, schedule = trainer.config, trainer.table.schedule
    unet = copy.deepcopy(trainer.denoiser.network).double()
    own = {name: p for name, p in unet.named_parameters() if p.requires_grad}
    i, level = (torch.tensor(column) for column in zip(*pairs, strict=True))
    row = process(config).rows(trajectories.latents[0, i], i, level)
    cond, _ = trainer.denoiser.encode([trajectories.prompts[k] for k in i], config.sampling)
    alpha, noise, x_t = schedule.alphas[row["timestep"]].view(-1, 1, 1, 1), row["x_prev"].double(), row["x_t"].double()

    def predicted(values):
        with torch.no_grad():
            for name, p in own.items():
                p.copy_(values[name])
        output = unet(x_t, row["timestep"], cond.double()).sample
        return output if schedule.prediction == "epsilon" else alpha.sqrt() * output + (1 - alpha).sqrt() * x_t

    with torch.no_grad():
        before = predicted(initial)
    found = predicted(at)
    distance = (found - noise).square().flatten(1).mean(1)
    moved = (found - before).square().flatten(1).mean(1)
    (advantages[i].double() * distance + config.kl.weight * moved).mean().backward()
    return {name: p.grad for name, p in own.items()}, distance.detach()


@pytest.mark.parametrize("adapter, model", [("lora", "tiny_sd"), ("full", "tiny_sd_v")])
def test_an_updates_gradient_is_that_of_the_formula_in_float64(make_trainer, request, adapter, model):
    trainer = make_trainer(
        model={"adapter": adapter, "path": request.getfixturevalue(model)},
        updates_per_rollout=2,
        kl={"weight": 0.3},
        optimizer={"lr": 2e-2 if adapter == "lora" else 1e-4},
        **FORWARD,
    )
    initial = weights(trainer)
    trajectories, advantages = begin(trainer)
    assert (advantages < 0).any() and (advantages > 0).any() and trajectories.latents.shape == (1, 6, 4, 8, 8)
    batches, steps = record_pairs(trainer), record_steps(trainer)
    row = trainer.update(trajectories, advantages, trainer.iteration)
    pairs = list(itertools.chain(*batches))
    assert len(steps) == 2 and sorted(pairs) == [(i, level) for i in range(6) for level in range(6)]
    distances = []
    for step, rows in zip(steps, (pairs[:18], pairs[18:]), strict=True):
        expected, distance = brute_force(trainer, trajectories, advantages, rows, step.before, initial)
        scale = max(gradient.abs().max().item() for gradient in expected.values())
        assert scale > 1e-5
        distances.append(distance)
        for name, gradient in step.gradients.items():
            torch.testing.assert_close(gradient.double(), expected[name], rtol=1e-3, atol=1e-4 * scale, msg=name)
    better = advantages[[i for i, _ in pairs]] > 0
    for name, chosen in (("better", better), ("worse", ~better)):
        assert row[f"policy/denoising_loss_{name}"] == pytest.approx(torch.cat(distances)[chosen].mean().item(), rel=1e-4)


# --- runs -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"sampling": {"eta": 0.0}},  # guided rollouts
        {"model": {"adapter": "full"}, "memory": {"gradient_checkpointing": True}, "optimizer": {"lr": 1e-4}},
        {"model": {"path": "tiny_sdxl"}, "kl": {"weight": 0.1}, "sampling": {"guidance_scale": 1.0}},
        {"model": {"dtype": "bf16", "lora": {"rank": 2, "text_encoders": True}}, "updates_per_rollout": 3},
    ],
    ids=["deterministic", "full", "sdxl", "bf16, text encoders"],
)
def test_it_trains_and_resumes_to_the_same_weights(train, request, changes):
    if "path" in changes.get("model", {}):
        changes = changes | {"model": {"path": request.getfixturevalue(changes["model"]["path"])}}
    trainer = train(**FORWARD, **changes)
    rows = read_rows(trainer.folder / "metrics.jsonl")
    assert all(row["policy/grad_norm"] > 0 and row["policy/denoising_loss_better"] > 0 for row in rows)
    assert not any(re.match("policy/(ratio|clip|approx|replay)", name) for row in rows for name in row)
    assert ("policy/kl_reference" in rows[1]) == ("kl" in changes)
    first = train(**FORWARD, **changes, iterations=1)
    assert not same(weights(first), weights(trainer))
    again = Trainer(first.config.model_copy(update={"iterations": 2}), resume=True)
    again.train()
    assert same(weights(again), weights(trainer))


def test_the_error_of_what_is_rewarded_falls_below_that_of_what_is_not(make_trainer):
    """Of one rollout, with the network's own predictions of what it drew as the measure."""
    trainer = make_trainer(
        **FORWARD, prompts_per_step=1, images_per_prompt=4, optimizer={"lr": 1e-3}, model={"adapter": "full"}
    )
    trajectories, _ = begin(trainer)
    advantages = torch.tensor([1.0, 1.0, -1.0, -1.0])
    seen = [trainer.update(trajectories, advantages, 0) for _ in range(12)]
    gaps = [row["policy/denoising_loss_worse"] - row["policy/denoising_loss_better"] for row in seen]
    assert gaps[-1] > gaps[0] + 0.01


def test_the_report_shows_the_errors_of_the_noise_in_place_of_ratios(train):
    page = write_report(train(**FORWARD, iterations=1).folder).read_text()
    assert "Error of the noise, worse" in page and "Clip fraction" not in page


def test_the_plan_says_levels_window_and_rows(make_config):
    lines = plan(make_config(**FORWARD, timestep_fraction=1.0))
    shown = dict(line.split(None, 1) for line in lines[:8])
    assert shown["algorithm"] == "loop_forward: advantage leave_one_out, objective forward_process"
    assert shown["pairs"] == "6 trajectories x 6 noise levels in timesteps 100 to 900 = 36 a pass, 1 pass"
    assert shown["work"].endswith("per image: 8 forwards in the rollout, 6 forwards and backwards in the updates")


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"timestep_fraction": 0.5}, "timestep_fraction: objective=forward_process trains noise levels .*: set it to 1"),
        ({"last_steps": {"drop": 1}}, "last_steps.drop: objective=forward_process trains noise levels .*: set it to 0"),
        ({"last_steps": {"weight": 0.5}}, "last_steps.weight: objective=forward_process .*: set it to 1"),
        ({"passes_per_rollout": 2, "updates_per_rollout": 2}, "passes_per_rollout: forward_process has no importance ratio"),
        ({"forward": {"window": [10, 13]}}, r"forward.window: \[10, 13\] has fewer timesteps than forward.levels=6: widen it"),
        ({"forward": {"window": [13, 10]}}, r"forward.window: \[13, 10\] ends before it begins: give its first"),
        ({"advantage": "none"}, "advantage: none, with which objective=forward_process imitates .*: set leave_one_out"),
        ({"kl": {"weight": 0.1, "form": "epsilon"}}, "kl.form: epsilon, but objective=forward_process .*: set it to gaussian"),
        ({"algorithm": "loop"}, "forward.levels: objective=clipped trains the sampler's steps: set algorithm=loop_forward"),
        ({"algorithm": "ppo", "forward": {"levels": 5}}, "forward.window: objective=clipped trains"),
    ],
    ids=str,
)
def test_keys_of_the_other_kind_of_rows_are_refused(make_config, changes, says):
    forward = {"forward": FORWARD["forward"] | changes.get("forward", {})}
    with pytest.raises(UserError, match=says):
        make_config(**FORWARD | changes | forward)


def test_what_the_objective_or_the_model_cannot_do_is_refused_before_it_loads(make_config):
    with pytest.raises(UserError, match="sampling.eta: objective=clipped needs the noise of the steps, .*: set it to 1"):
        make_config(sampling={"eta": 0.0})
    with pytest.raises(UserError, match="forward.window: ends at 1000, the model's timesteps at 999: lower it"):
        preflight(make_config(algorithm="loop_forward", forward={"window": [250, 1000]}))


def test_loop_fast_has_a_kl_in_every_fourth_iteration_in_units_of_the_advantages(train, make_config):
    own = make_config(algorithm="loop_fast").kl
    assert (own.weight, own.of_advantages, own.every) == (0.15, True, 4)
    constant = {"algorithm": "loop_fast", "optimizer": {"schedule": "constant"}}
    whole = train(**constant, iterations=6)
    rows = read_rows(whole.folder / "metrics.jsonl")
    assert ["policy/kl_reference" in row for row in rows] == [True, False, False, False, True, False]
    half = train(**constant, iterations=3)
    again = Trainer(half.config.model_copy(update={"iterations": 6}), resume=True)
    again.train()
    assert same(weights(again), weights(whole))


def test_the_weight_of_a_kl_follows_the_advantages_and_the_iterations_that_have_none():
    advantages = torch.tensor([1.0, -3.0, 0.0, 0.0])
    assert weight_of_kl(KlConfig(weight=0.2), advantages, 7) == 0.2
    every = KlConfig(weight=0.2, every=3)
    assert [weight_of_kl(every, advantages, i) for i in range(4)] == [pytest.approx(0.6), 0, 0, pytest.approx(0.6)]
    assert weight_of_kl(KlConfig(weight=0.2, every=3, of_advantages=True), advantages, 3) == pytest.approx(0.6)  # mean |A| = 1
    assert weight_of_kl(KlConfig(weight=0.2, of_advantages=True), 10 * advantages, 0) == pytest.approx(2.0)
    assert weight_of_kl(KlConfig(weight=0.2, of_advantages=True), 0 * advantages, 0) == 0
