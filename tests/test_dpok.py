"""DPOK: a learned value as the baseline, and rollouts that are kept; against float64, on ranks, resumed, and refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from known_traces import trace_nothing
from recorded import same, weights

from fastloop.batches import Rows, micro_batches
from fastloop.errors import UserError
from fastloop.plan import plan
from fastloop.ranks import Ranks
from fastloop.replay import Replay
from fastloop.rollout import Trajectories
from fastloop.tracking import read_rows
from fastloop.trainer import Trainer
from fastloop.values import ValueNetwork

CPU = torch.device("cpu")


@pytest.fixture
def make(make_config):
    def make(resume: bool = False, **changes) -> Trainer:
        shared = {"prompts_per_step": 3, "images_per_prompt": 1, "value": {"lr": 1e-2, "width": 16}, "updates_per_rollout": 2}
        return Trainer(make_config(**{"algorithm": "dpok", **shared, **changes}), resume)

    return make


def test_the_value_is_fitted_to_the_rewards_and_is_what_the_advantage_lacks(make):
    """Its gradient is that of the mean squared error in float64; then every row has the reward less its value."""
    trainer = make()
    prompts = trainer.prompts.draw(0, 3)
    trajectories = trainer.rollout(prompts, torch.arange(3))
    rewards, baseline = torch.tensor([3.0, -1.0, 0.5]), trainer.advantage
    transitions, before = trajectories.transitions(trainer.steps_trained), baseline.network.state_dict()
    exact = ValueNetwork(trajectories.latents[0, 0].numel() + trainer.denoiser.feature_size, 4, 16).double()
    exact.load_state_dict(before)
    features = trainer.denoiser.features([prompt.text for prompt in prompts]).double()

    def values() -> torch.Tensor:
        return exact(transitions.states[transitions.state].double(), transitions.step, features[transitions.trajectory])

    loss = (values() - rewards.double()[transitions.trajectory]).square().mean()
    loss.backward()
    seen, step = [], baseline.optimizer.step
    baseline.optimizer.step = lambda: (seen.extend(p.grad.clone() for p in baseline.network.parameters()), step())
    advantages, metrics = baseline.of_rows(trajectories, rewards, iteration=0)
    for found, p in zip(seen, exact.parameters(), strict=True):
        torch.testing.assert_close(found.double(), p.grad, rtol=1e-4, atol=1e-7)
    assert metrics["value/loss"] == pytest.approx(loss.item(), rel=1e-5)
    exact.load_state_dict(baseline.network.state_dict())
    expected = rewards.double()[transitions.trajectory] - values().detach()
    torch.testing.assert_close(advantages.double(), expected, rtol=1e-4, atol=1e-5)
    assert advantages.shape == (12,) and len(advantages.unique()) == 12  # each step has its own
    left = 1 - advantages.var(correction=0) / rewards.var(correction=0)
    assert metrics["value/explained"] == pytest.approx(left.item(), rel=1e-4)
    baseline.config = baseline.config.model_copy(update={"advantage_clamp": 0.1})
    assert baseline.of_rows(trajectories, rewards, 1)[0].abs().max() == pytest.approx(0.1)
    for i in range(2, 200):
        advantages, metrics = baseline.of_rows(trajectories, rewards, i)
    assert metrics["value/loss"] < 0.01 * loss.item() and metrics["value/explained"] > 0.99


def test_rollouts_are_kept_with_the_log_probs_of_their_time_until_a_newer_one_takes_their_place(make):
    trainer, rollouts = make(replay={"rollouts": 3}), []
    replay, steps, s = trainer.replay, trainer.steps_trained, len(trainer.steps_trained)
    for i in range(5):
        new = trainer.rollout(trainer.prompts.draw(3 * i, 3), torch.arange(3) + 3 * i)
        kept, rewards = replay.add(new, torch.arange(3.0) + 10 * i, i)
        rollouts.append(new)
        there = [max(k for k in range(i + 1) if k % 3 == place) for place in range(min(i + 1, 3))]
        assert rewards.tolist() == [10 * k + j for k in there for j in range(3)]
        assert kept.prompts == [prompt for k in there for prompt in rollouts[k].prompts]
        table = kept.transitions(steps)
        assert len(table) == len(there) * 3 * s
        for place, k in enumerate(there):
            of, alone = slice(place * 3 * s, (place + 1) * 3 * s), rollouts[k].transitions(steps)
            for name in ("state", "next_state"):
                assert table.states[getattr(table, name)[of]].equal(alone.states[getattr(alone, name)])
            assert table.log_prob[of].equal(alone.log_prob) and table.step[of].equal(alone.step)
            assert table.ids[table.trajectory[of]].equal(alone.ids[alone.trajectory])
            at = table.at(torch.arange(of.start, of.stop))
            assert table.final(at).equal(alone.final(alone.at(torch.arange(len(alone)))))


@pytest.mark.parametrize("world, n", [(1, 4), (2, 4), (3, 7), (4, 3)])
def test_a_rank_finds_its_rows_of_all_rollouts_and_what_ranks_save_any_number_takes_over(tmp_path, world, n):
    steps, rollouts, folder = torch.tensor([0, 2]), 3, tmp_path / "iteration-000005"
    folder.mkdir()

    def of_rank(rank: int, world: int) -> Ranks:
        ranks = Ranks()
        ranks.rank, ranks.world = rank, world
        return ranks

    def drawn(ranks: Ranks, iteration: int) -> Trajectories:
        ids = torch.tensor(ranks.padded(n)) + n * iteration
        latents = ids.float().view(1, -1, 1, 1, 1) + 0.1 * torch.arange(4).view(-1, 1, 1, 1, 1)
        return Trajectories(latents, latents[1:, :, 0, 0, 0], [f"p{i}" for i in ids.tolist()], ids, np.zeros(len(ids)))

    rows = Rows.of(n, steps).of_rollouts(rollouts)
    wanted = [n * iteration + i for iteration in (3, 4, 2) for i in range(n)]  # by their place
    seen = []
    for rank in range(world):
        ranks = of_rank(rank, world)
        replay = Replay(rollouts, ranks, n)
        for iteration in range(5):
            kept, rewards = replay.add(drawn(ranks, iteration), torch.arange(float(n)) + n * iteration, iteration)
        table = kept.transitions(steps)
        assert rewards.tolist() == wanted and len(rows.own(ranks, n)) == len(table)
        assert rewards[rows.trajectory[rows.own(ranks, n)]].equal(table.ids[table.trajectory].float())
        for part in micro_batches(np.arange(len(rows)), rows, ranks, n, 5):
            at = table.at(torch.from_numpy(part))
            seen += [(table.ids[at.trajectory[k]].item(), at.step[k].item()) for k in range(len(part))]
        replay.save(folder, 5)
    assert sorted(seen) == sorted((number, step) for number in wanted for step in (0, 2))
    for other in {1, 2, world}:
        for rank in range(other):
            ranks = of_rank(rank, other)
            fresh, resumed = Replay(rollouts, ranks, n), Replay(rollouts, ranks, n)
            resumed.load(folder, CPU, on_host=False)
            for iteration in range(6):
                expected, rewards = fresh.add(drawn(ranks, iteration), torch.arange(float(n)) + n * iteration, iteration)
            found, again = resumed.add(drawn(ranks, 5), torch.arange(float(n)) + 5.0 * n, 5)
            assert again.equal(rewards) and found.prompts == expected.prompts and found.ids.equal(expected.ids)
            assert found.latents.equal(expected.latents) and found.log_probs.equal(expected.log_probs)
    moved = folder.rename(tmp_path / "iteration-000006")
    with pytest.raises(UserError, match="replay-0.pt is of iteration 5; remove it to resume from the one before"):
        Replay(rollouts, of_rank(0, 1), n).load(moved, CPU, on_host=False)


def test_it_trains_on_older_rollouts_and_resumes_exactly(make, tmp_path):
    whole = make(output_dir=str(tmp_path / "whole"), iterations=5, replay={"rollouts": 3})
    whole.train()
    rows = read_rows(whole.folder / "metrics.jsonl")
    assert rows[0]["policy/replay_max_dev"] == 0 == rows[0]["policy/ratio_first_dev"]
    assert rows[1]["policy/ratio_first_dev"] > 0  # of the older rollout
    assert all(np.isfinite(list(row.values())).all() and row["policy/grad_norm"] > 0 for row in rows)
    for iterations in (1, 4):  # with room left, and with a place that is taken again
        folder = str(tmp_path / f"cut_{iterations}")
        make(output_dir=folder, iterations=iterations, replay={"rollouts": 3}).train()
        resumed = make(resume=True, output_dir=folder, iterations=5, replay={"rollouts": 3})
        resumed.train()
        assert same(weights(resumed), weights(whole))
        values = (trainer.advantage.network.state_dict() for trainer in (resumed, whole))
        assert same(*values)
    (file,) = (whole.folder / "checkpoints" / "iteration-000005").glob("replay-*.pt")
    file.unlink()
    with pytest.raises(
        Exception, match=r"cannot read the checkpoint .*replay-0.pt.*; remove it to resume from the one before"
    ):
        make(resume=True, output_dir=str(tmp_path / "whole"), iterations=6, replay={"rollouts": 3})


@pytest.mark.parametrize(
    "changes, says",
    [
        (
            {"algorithm": "loop", "value": {"lr": 1e-3}},
            "value.lr: advantage=leave_one_out has no value network: set advantage=",
        ),
        (
            {"algorithm": "loop_forward", "advantage": "value"},
            "advantage: value is of a step's latents, and objective=forward_",
        ),
        (
            {"algorithm": "rloo", "replay": {"rollouts": 2}},
            "replay.rollouts: score_function has no importance ratio, so train",
        ),
        (
            {"algorithm": "loop_fast", "replay": {"rollouts": 2}},
            "replay.rollouts: forward_process has no importance ratio, so",
        ),
    ],
    ids=str,
)
def test_what_does_not_go_together_is_refused_in_one_line(make_config, changes, says):
    with pytest.raises(UserError) as caught:
        make_config(**{"algorithm": "dpok", **changes})
    assert says in str(caught.value)


def test_the_plan_counts_what_is_kept_and_the_value_network(make_config, monkeypatch):
    trace_nothing(monkeypatch)
    lines = plan(make_config(algorithm="dpok", prompts_per_step=3, images_per_prompt=1))
    text = "\n".join(lines)
    assert "kl.form=epsilon, kl.weight=0.001, replay.rollouts=2" in text
    assert "pairs        6 trajectories of the newest 2 rollouts x 4 of 4 trainable steps = 24 a pass" in text
    sizes = {line.split("  ")[1]: line.split()[-2:] for line in lines if line.startswith("  ")}
    inputs = 4 * 8 * 8 + 16
    count = (inputs + 1) * 256 + 2 * 257 * 256 + 257 + 3 * 4 * 256
    assert sizes["value network"] == [f"{16 * count / 2**20:.1f}", "MiB"]
    assert sizes["trajectories"] == [f"{(1 + 2) * 3 * 5 * 256 * 4 / 1024:.1f}", "KiB"]
