"""The shapes of the network's calls: few copies, one shape where that is wanted, and ratios that start at exactly 1."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fastloop.batches import Batches, Rows, micro_batches, shuffled
from fastloop.ranks import Ranks
from fastloop.tracking import read_rows
from fastloop.trainer import Trainer


@pytest.fixture
def shapes(make_config):
    """A function of images, trained steps (of as many that are sampled), both batches and more: the rows of both calls."""

    def shapes(images: int, steps: int, rollout: int, update: int, dtype: str = "fp32", world: int = 1, **more):
        config = make_config(
            algorithm="ppo",
            prompts_per_step=images,
            images_per_prompt=1,
            sampling={"steps": steps},
            memory={"rollout_batch": rollout, "update_batch": update},
            model={"dtype": dtype},
            **more,
        )
        found = Batches(config, torch.arange(steps), world)
        return found.rollout, found.update

    return shapes


def test_what_is_configured_differently_is_evened_out_each_for_itself(shapes):
    assert shapes(6, 4, 4, 5) == (3, 4)  # 6 and 12 rows
    assert shapes(72, 8, 64, 65) == (36, 58)
    assert shapes(6, 4, 99, 98) == (6, 12)


def test_what_is_configured_the_same_has_one_shape_where_that_costs_little_and_always_in_half_precision(shapes):
    assert shapes(64, 10, 64, 64) == (64, 64)
    assert shapes(72, 8, 64, 64) == (36, 36)  # 72 and 288 rows
    assert shapes(48, 10, 32, 32) == (24, 24)  # 48 and 240 rows
    assert shapes(4, 50, 64, 64) == (4, 50)
    one, other = shapes(4, 50, 64, 64, "bf16")
    assert one == other <= 10
    assert shapes(256, 50, 8, 8, "fp16") == (8, 8)
    assert shapes(256, 50, 8, 8, "fp16", world=3) == (8, 8)


@pytest.mark.parametrize("world", [1, 2, 3, 5])
@pytest.mark.parametrize("updates", [1, 2, 3, 7])
@pytest.mark.parametrize("fraction", [0.5, 1.0])
def test_no_rank_has_more_rows_of_an_update_than_is_said(make_config, world, updates, fraction):
    """So that no micro-batch is larger than its shape, and none more are made than were planned."""
    memory = {"update_batch": 4, "rollout_batch": 3}
    config = make_config(memory=memory, updates_per_rollout=updates, timestep_fraction=fraction)
    batches, most = Batches(config, torch.arange(4), world), 0
    rows = Rows.of(config.images_per_rollout, torch.arange(4))
    for seed in range(9):
        for update in np.array_split(shuffled(np.random.default_rng(seed), rows, fraction), updates):
            for rank in range(world):
                ranks = Ranks()
                ranks.rank, ranks.world = rank, world
                found = micro_batches(update, rows, ranks, config.images_per_rollout, batches.update)
                assert len(found) <= batches.micro_batches
                most = max(most, sum(map(len, found)))
    assert most <= batches.rows_of_rank
    if 4 * fraction % updates == 0:  # an update has whole rounds of the trajectories
        assert most == batches.rows_of_rank == batches.share * 4 * fraction / updates


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_all_calls_of_a_run_have_one_shape_and_the_first_ratios_are_exactly_1(make_config, dtype):
    """7 trajectories, and 9 pairs less those without an advantage, in calls of 4; an evaluation runs what it has."""
    config = make_config(
        algorithm="ppo",
        prompts_per_step=7,
        images_per_prompt=1,
        sampling={"steps": 3},
        memory={"rollout_batch": 4, "update_batch": 4},
        model={"dtype": dtype},
        eval={"images_per_prompt": 1},
    )
    trainer = Trainer(config, leave_out=("report", "export"))
    assert (trainer.batches.rollout, trainer.batches.update) == (4, 4)
    rows = {True: [], False: []}  # of the network's calls, by whether it is an evaluation
    evaluating, evaluate = [], trainer._evaluate

    def watched() -> None:
        evaluating.append(True)
        evaluate()
        evaluating.clear()

    trainer._evaluate = watched
    trainer.denoiser.network.register_forward_pre_hook(lambda _, args: rows[bool(evaluating)].append(len(args[0])))
    trainer.advantages = lambda *args: torch.tensor([1.0, -2, 0, 1, 0, -1, 2])
    trainer.train()
    assert set(rows[False]) == {2 * 4} and set(rows[True]) == {2 * 3}  # with guidance
    found = read_rows(trainer.folder / "metrics.jsonl")
    assert [row["policy/pairs_skipped"] for row in found] == [6, 6]
    assert [row["policy/ratio_first_dev"] for row in found] == [0, 0] and found[0]["policy/replay_max_dev"] == 0
