"""Metrics of a rollout, against plain arithmetic."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from fastloop.alarms import Alarms
from fastloop.metrics import held_out_falling, image_statistics, reward_metrics
from fastloop.prompts import Prompt
from fastloop.rewards.scoring import Scores

GENERATOR = np.random.default_rng(0)


def image_metrics(images: np.ndarray) -> dict[str, float]:
    return {name: values.mean() for name, values in image_statistics(images).items() if values.shape == (len(images),)}


NOISE = GENERATOR.integers(1, 255, (2, 64, 64, 3), dtype=np.uint8)


def flat(value: int) -> np.ndarray:
    return np.full((1, 8, 8, 3), value, np.uint8)


# --- pictures ---------------------------------------------------------------------------------------------------------


def test_a_flat_picture_has_no_entropy():
    assert image_metrics(flat(100)) == {"image/saturation": 0.0, "image/entropy": 0.0}


@pytest.mark.parametrize("value", [0, 255])
def test_a_burnt_out_picture_is_saturated(value):
    assert image_metrics(flat(value)) == {"image/saturation": 1.0, "image/entropy": 0.0}


def test_saturation_counts_values_of_single_channels():
    image = flat(7)
    image[0, 0, :, 0] = 255  # 8 values
    image[0, 1, :, 2] = 0  # 8 more, of 192
    assert image_metrics(image)["image/saturation"] == pytest.approx(16 / 192)


def test_entropy_is_in_bits():
    image = flat(0)
    for k, value in enumerate((10, 60, 120, 180)):  # four levels of equal share
        image[0, 2 * k : 2 * k + 2] = value
    assert image_metrics(image)["image/entropy"] == pytest.approx(2.0)
    image[0, 2:4] = 10  # shares 1/2, 1/4, 1/4
    assert image_metrics(image)["image/entropy"] == pytest.approx(1.5)


def test_entropy_is_averaged_over_pictures_and_does_not_mix_them():
    pair = np.concatenate([flat(10), flat(200)])
    assert image_statistics(pair)["image/entropy"].tolist() == [0.0, 0.0]


def test_noise_has_high_entropy_and_no_saturation():
    metrics = image_metrics(NOISE)
    assert metrics["image/saturation"] == 0.0
    assert 7 < metrics["image/entropy"] <= 8


# --- rewards ----------------------------------------------------------------------------------------------------------

CATEGORIES = ["color", "shape", None]  # one prompt has none


def scored(p: int, k: int):
    total = GENERATOR.normal(size=p * k)
    terms = {"a": GENERATOR.normal(size=p * k), "b:c": GENERATOR.normal(size=p * k)}
    prompts = [Prompt(str(i), {} if (c := CATEGORIES[i % 3]) is None else {"category": c}) for i in range(p) for _ in range(k)]
    return total.reshape(p, k), Scores(total, terms, terms), prompts


@pytest.mark.parametrize("p, k", [(3, 2), (5, 4), (1, 1)])
def test_reward_metrics_are_those_of_plain_arithmetic(p, k):
    rewards, scores, prompts = scored(p, k)
    metrics = reward_metrics(scores, prompts, k)
    values = rewards.tolist()

    def std(numbers):
        mean = sum(numbers) / len(numbers)
        return math.sqrt(sum((x - mean) ** 2 for x in numbers) / len(numbers))

    everything = [x for group in values for x in group]
    expected = {
        "reward/mean": sum(everything) / len(everything),
        "reward/std": std(everything),
        "reward/group_std": sum(map(std, values)) / p,
        "reward/a": sum(scores.terms["a"]) / (p * k),
        "reward/b:c": sum(scores.terms["b:c"]) / (p * k),
    }
    for name in {c for c in CATEGORIES[:p] if c}:
        own = [x for i, group in enumerate(values) if CATEGORIES[i % 3] == name for x in group]
        expected[f"reward/category/{name}"] = sum(own) / len(own)
    assert metrics == pytest.approx(expected, abs=1e-6)
    assert all(type(value) is float for value in metrics.values())


def test_prompts_without_categories_give_no_category_metrics():
    _, scores, _ = scored(2, 2)
    metrics = reward_metrics(scores, [Prompt("a")] * 4, 2)
    assert not [name for name in metrics if "category" in name]


# --- reward hacking -----------------------------------------------------------------------------------------------------


def history(train: list[float], held_out: list[tuple[float, float | None]], every: int = 2) -> tuple[list, list]:
    """Rows of a run whose evaluations are ``every`` iterations apart, the first before training."""
    rows = [{"iteration": i + 1, "reward/mean": 0.0, "reward/a": value, "reward/b": 1.0} for i, value in enumerate(train)]
    evals = [
        {"iteration": every * i, "rewards": {"watched": {"mean": mean, "stderr": error}, "other": {"mean": i, "stderr": 0.1}}}
        for i, (mean, error) in enumerate(held_out)
    ]
    return rows, evals


@pytest.mark.parametrize(
    "train, held_out, falls",
    [
        ([1, 1, 2, 2], [(5, 0.1), (5, 0.1), (4, 0.1)], True),
        ([1, 2], [(5, 0.1), (4, 0.1)], True),  # the first iteration's reward is that of the model before training
        ([1, 1, 2, 2], [(5, 0.1), (5, 0.1), (5.2, 0.1)], False),  # both rise
        ([2, 2, 1, 1], [(5, 0.1), (5, 0.1), (4, 0.1)], False),  # both fall
        ([1, 1, 2, 2], [(5, 0.3), (5, 0.4), (4, 0.4)], False),  # within two standard errors of the difference
        ([1, 1, 2, 2, 3, 3], [(4, 0.1), (6, 0.1), (5, 0.1), (5.5, 0.1)], True),  # below its best, though it rises again
        ([1, 1], [(5, 0.1)], False),
        ([], [(5, 0.1), (4, 0.1)], False),
        ([1, 2], [(5, None), (4, None)], True),  # one prompt has no error
        ([-1, -2], [(5, 0.1), (4, 0.1)], False),
    ],
)
def test_a_held_out_reward_that_falls_while_the_training_reward_rises_is_found(train, held_out, falls):
    rows, evals = history(train, held_out)
    assert held_out_falling(rows, evals, {"a": 2.0}, errors=2.0) == (["watched"] if falls else [])


def test_the_training_reward_is_the_weighted_sum_of_its_terms_before_normalisation():
    rows, evals = history([1, 1, 2, 2], [(5, 0.1), (5, 0.1), (4, 0.1)])
    assert held_out_falling(rows, evals, {"a": 1.0, "b": 3.0}, errors=2.0) == ["watched"]
    assert held_out_falling(rows, evals, {"a": -1.0, "b": 3.0}, errors=2.0) == []
    assert held_out_falling(rows, evals, {"a": 1.0}, errors=20.0) == []


def test_denoising_its_own_pictures_worse_and_worse_raises_the_alarm_and_resuming_keeps_it(make_config, tmp_path):
    """1.5 times the first 20 iterations, over the last 20; rows without a denoising error do not count."""

    def row(error: float) -> dict[str, float]:
        both = {"policy/denoising_loss_better": error, "policy/denoising_loss_worse": error + 0.2}
        return {"reward/group_std": 1.0, "image/entropy": 5.0, "image/saturation": 0.0, **both}

    alarms, errors = Alarms(make_config(algorithm="loop_fast")), [0.9] * 40 + [1.6] * 20
    fired = ["denoising" in alarms.of(row(error)) for error in errors]
    # of the last 20 n are 1.7 and the others 1.0, means of both; the sum passes 30 with n = 15
    assert fired.index(True) == 40 + 14 and all(fired[54:])
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row(error)) + "\n" for error in errors))
    resumed = Alarms(make_config(algorithm="loop_fast"))
    resumed.look_at(tmp_path)
    assert "denoising" in resumed.of(row(1.6)) and "denoising" not in Alarms(make_config()).of(row(9.0))
    off = Alarms(make_config(algorithm="loop_fast", safety={"max_denoising_growth": None}))
    off.look_at(tmp_path)
    assert "denoising" not in off.of(row(9.0))
    resumed.of({key: value for key, value in row(0).items() if "denoising" not in key})
    assert len(resumed._errors) == 61
