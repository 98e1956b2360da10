"""Advantages against brute force."""

from __future__ import annotations

import pytest
import torch

from fastloop.advantages import (
    ADVANTAGES,
    EPSILON,
    PromptTracker,
    batch_mean,
    batch_norm,
    finish,
    group_norm,
    leave_one_out,
    none,
)

OF_REWARDS = [name for name in ADVANTAGES if name not in ("none", "value")]  # that of value is what was learned to expect


def rewards(p: int = 5, k: int = 4) -> torch.Tensor:
    return torch.randn(p, k, generator=torch.Generator().manual_seed(p * 10 + k), dtype=torch.float64) * 3 + 1


def advantages_of(name: str, of: torch.Tensor, history: int = 0) -> torch.Tensor:
    """Finished advantages; those of the tracker after so many rollouts of the same rewards."""
    advantage, prompts = ADVANTAGES[name](), [f"prompt {i}" for i in range(len(of))]
    for _ in range(history):
        advantage(prompts, {"reward": of}, {"reward": 1.0})
    return finish(advantage(prompts, {"reward": of}, {"reward": 1.0}), None, normalize=False)


def track(tracker: PromptTracker, prompts: list[str], of: torch.Tensor) -> torch.Tensor:
    return tracker(prompts, {"reward": of}, {"reward": 1.0})


@pytest.mark.parametrize("k", [2, 3, 4, 7])
def test_leave_one_out_is_the_reward_less_the_mean_of_the_others(k):
    r = rewards(5, k)
    for i in range(5):
        for j in range(k):
            others = [r[i, m].item() for m in range(k) if m != j]
            assert leave_one_out(r)[i, j].item() == pytest.approx(r[i, j].item() - sum(others) / len(others), abs=1e-5)


def test_leave_one_out_sums_to_zero_in_each_group_and_ignores_what_other_prompts_got():
    r = rewards()
    assert leave_one_out(r).sum(1).abs().max() < 1e-12
    moved = r.clone()
    moved[1:] += 100
    assert torch.equal(leave_one_out(moved)[0], leave_one_out(r)[0])


def test_leave_one_out_with_two_images_is_their_difference():
    assert torch.allclose(leave_one_out(torch.tensor([[1.0, 4.0]])), torch.tensor([[-3.0, 3.0]]))


def test_leave_one_out_keeps_the_scale_of_the_reward_and_group_norm_does_not():
    r = rewards()
    assert torch.allclose(leave_one_out(10 * r), 10 * leave_one_out(r), atol=1e-4)
    assert torch.allclose(group_norm(10 * r), group_norm(r), atol=1e-3)


def test_group_norm_divides_by_the_group_std_with_k_in_its_denominator():
    r = rewards()
    for i in range(5):
        mean = r[i].mean()
        std = ((r[i] - mean) ** 2).mean().sqrt()
        assert torch.allclose(group_norm(r)[i], (r[i] - mean) / (std + EPSILON), atol=1e-5)


@pytest.mark.parametrize("name", OF_REWARDS)
@pytest.mark.parametrize("history", [0, 8])
def test_equal_rewards_have_advantages_of_exactly_zero(name, history):
    """The mean of equal numbers, rounded, need not be that number: 22.1 over twelve pictures is one that is not."""
    for value in (22.1, 99.9, 0.1, -1e-9, 123456.789, 1e8 + 0.1):
        for k in range(2, 14):
            found = advantages_of(name, torch.full((3, k), value, dtype=torch.float64), history)
            assert torch.equal(found, torch.zeros(3, k)), (value, k)
            assert torch.equal(finish(found.double(), None, normalize=True), torch.zeros(3, k)), (value, k)


@pytest.mark.parametrize("name", OF_REWARDS)
@pytest.mark.parametrize("offset", [1e3, 1e6, 1e8])
def test_a_constant_in_the_rewards_takes_nothing_from_their_differences(name, offset):
    for history in (0, 8):
        expected = advantages_of(name, rewards(), history)
        assert expected.abs().min() > 0 and expected.dtype == torch.float32
        torch.testing.assert_close(advantages_of(name, rewards() + offset, history), expected, rtol=1e-5, atol=1e-6)


def test_batch_advantages_use_the_whole_rollout():
    r = rewards()
    flat = r.flatten().tolist()
    mean = sum(flat) / len(flat)
    std = (sum((x - mean) ** 2 for x in flat) / len(flat)) ** 0.5
    assert torch.allclose(batch_mean(r), r - mean, atol=1e-5)
    assert torch.allclose(batch_norm(r), (r - mean) / (std + EPSILON), atol=1e-5)
    assert torch.equal(none(r), r)


def test_a_prompt_with_few_rewards_uses_the_rollout_and_a_known_one_its_own_history():
    tracker = PromptTracker(buffer=8, minimum=6)
    first = rewards(2, 4)
    assert torch.allclose(track(tracker, ["a", "b"], first), batch_norm(first))
    second = rewards(2, 3) + 5
    advantages = track(tracker, ["a", "c"], second)
    seen = torch.cat([first[0], second[0]])  # 7 rewards of "a", within its buffer of 8
    expected = (second[0] - seen.mean()) / (seen.std(correction=0) + EPSILON)
    assert torch.allclose(advantages[0], expected, atol=1e-5)
    assert torch.allclose(advantages[1], batch_norm(second)[1])


def test_the_tracker_forgets_what_does_not_fit_its_buffer():
    tracker = PromptTracker(buffer=4, minimum=2)
    track(tracker, ["a"], torch.tensor([[100.0, 200.0, 300.0, 400.0]]))
    new = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    expected = (new - new.mean()) / (new.std(correction=0) + EPSILON)
    assert torch.allclose(track(tracker, ["a"], new), expected, atol=1e-5)


def test_a_restored_tracker_goes_on_as_if_never_stopped():
    one, two = PromptTracker(8, 4), PromptTracker(8, 4)
    track(one, ["a", "b"], rewards(2, 4))
    two.load_state_dict(one.state_dict())
    later = rewards(2, 3)
    assert torch.equal(track(one, ["b", "c"], later), track(two, ["b", "c"], later))
    assert one.state_dict() == two.state_dict()


def test_finish_normalises_over_the_rollout_and_then_clamps():
    a = torch.tensor([[1.0, -1.0], [8.0, -8.0]])
    assert torch.equal(finish(a, 5.0, False), torch.tensor([[1.0, -1.0], [5.0, -5.0]]))
    scaled = finish(a, None, True)
    assert scaled.std(correction=0).item() == pytest.approx(1, abs=1e-3)
    assert finish(a, 1.0, True).abs().max() == 1
    assert torch.equal(finish(a, None, False), a)
