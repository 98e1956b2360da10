"""Rewards: what they measure, how they add up, that they run beside the caller, and that they never fail in silence."""

from __future__ import annotations

import io
import itertools
import sys
import threading
import time
import types
import warnings
from contextlib import suppress
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch
from PIL import Image

from fastloop.cli import main
from fastloop.config import PromptsConfig, RewardConfig
from fastloop.errors import RunFailed, UserError
from fastloop.prompts import Prompt, load_prompts
from fastloop.rewards.registry import REGISTRY
from fastloop.rewards.scoring import Moments, Rewards, _covered
from fastloop.shapes.checker import assess
from fastloop.shapes.grammar import CATEGORIES, all_requests, parse
from fastloop.shapes.renderer import place, render

RNG = np.random.default_rng(0)
CATS = [Prompt("a cat", {"n": 0}), Prompt("a dog", {"n": 1}), Prompt("a hen", {"n": 2})]
NOISE = RNG.integers(0, 256, (3, 16, 24, 3), dtype=np.uint8)


@pytest.fixture
def make(monkeypatch):
    """A function that gives Rewards of some terms; functions are put in a module `mine` and named mine:NAME."""
    made = []

    def make(*terms, prompts=CATS, size=(64, 64), key="rewards", **functions) -> Rewards:
        module = types.ModuleType("mine")
        vars(module).update(functions)
        monkeypatch.setitem(sys.modules, "mine", module)
        configs = [RewardConfig(**term) if isinstance(term, dict) else RewardConfig(name=term) for term in terms]
        made.append(Rewards(configs, prompts, size, key))
        return made[-1]

    yield make
    for rewards in made:
        rewards.close()


def refusal(make, *terms, **rest) -> str:
    with pytest.raises(UserError) as caught:
        make(*terms, **rest)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def failure(rewards: Rewards, images=NOISE, prompts=CATS) -> str:
    with pytest.raises(RunFailed) as caught:
        rewards.score(images, prompts)
    return str(caught.value)


# --- what they measure ------------------------------------------------------------------------------------------------


def jpeg_kilobytes(image: np.ndarray) -> float:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="JPEG", quality=95)
    return len(buffer.getvalue()) / 1000


def test_jpeg_rewards_are_the_file_size_in_kilobytes_and_its_negative(make):
    images = np.concatenate([NOISE[:2], np.full((1, 16, 24, 3), 77, np.uint8)])
    sizes = [jpeg_kilobytes(image) for image in images]
    assert make("jpeg_incompressibility").score(images, CATS).total.tolist() == sizes
    assert make("jpeg_compressibility").score(images, CATS).total.tolist() == [-size for size in sizes]
    assert sizes[2] < min(sizes[:2])


def test_the_shapes_reward_is_the_checkers_score(make):
    requests = [all_requests(category)[11] for category in CATEGORIES]
    prompts = [Prompt(request.prompt, {"category": request.category}) for request in requests]
    right = np.stack([render(place(request, RNG)) for request in requests])
    shifted = np.roll(right, 1, axis=0)
    rewards = make("shapes", prompts=prompts)
    assert rewards.score(right, prompts).total.tolist() == [1.0] * 5
    expected = [assess(prompt.text, image).score for prompt, image in zip(prompts, shifted, strict=True)]
    assert rewards.score(shifted, prompts).total.tolist() == expected
    assert min(expected) < 1


@pytest.mark.parametrize("category", CATEGORIES)
def test_a_category_has_its_own_reward_for_its_own_prompts(make, category):
    prompts = [Prompt(request.prompt) for request in all_requests(category)[:2]]
    images = np.stack([render(place(parse(prompt.text), RNG)) for prompt in prompts])
    assert make(f"shapes_{category}", prompts=prompts).score(images, prompts).total.tolist() == [1.0, 1.0]
    other = next(c for c in CATEGORIES if c != category)
    assert refusal(make, f"shapes_{other}", prompts=prompts) == (
        f"rewards.0.name: shapes_{other} cannot score the prompt {prompts[0].text!r} of the category {category}: "
        f"set prompts.categories to [{other}], or use the reward shapes"
    )


def test_the_registry_holds_the_rewards_that_people_use():
    assert set(REGISTRY) == {
        "jpeg_compressibility", "jpeg_incompressibility", "shapes", *(f"shapes_{c}" for c in CATEGORIES),
        "aesthetic", "clipscore", "pickscore", "hpsv2", "imagereward", "blip_vqa", "vlm_judge", "ocr", "http",
    }  # fmt: skip


def test_a_python_function_is_a_reward_with_its_params(make):
    seen = []

    def score(images, prompts, metadata, scale, offset=0.0):
        seen.append((images, prompts, metadata))
        return [scale * row["n"] + offset for row in metadata]

    rewards = make({"name": "mine:score", "params": {"scale": 2, "offset": 0.5}}, score=score)
    assert rewards.score(NOISE, CATS).total.tolist() == [0.5, 2.5, 4.5]
    ((images, prompts, metadata),) = seen
    assert images.dtype == np.uint8 and np.array_equal(images, NOISE)
    assert prompts == ["a cat", "a dog", "a hen"] and metadata == [{"n": 0}, {"n": 1}, {"n": 2}]


def test_a_module_in_the_working_directory_is_found(make, tmp_path, monkeypatch):
    (tmp_path / "my_reward_in_cwd.py").write_text("def ones(images, prompts, metadata):\n    return [1] * len(images)\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert make("my_reward_in_cwd:ones").score(NOISE, CATS).total.tolist() == [1.0, 1.0, 1.0]


def test_terms_add_up_with_their_weights_and_are_kept_before_them(make):
    rewards = make(
        {"name": "mine:a", "weight": 0.5},
        {"name": "mine:b", "weight": -2},
        a=lambda images, prompts, metadata: [1.0, 2.0, 3.0],
        b=lambda images, prompts, metadata: np.array([10, 20, 30]),
    )
    scores = rewards.score(NOISE, CATS)
    assert {name: values.tolist() for name, values in scores.terms.items()} == {
        "mine:a": [1.0, 2.0, 3.0],
        "mine:b": [10.0, 20.0, 30.0],
    }
    assert scores.total.tolist() == [-19.5, -39.0, -58.5]
    assert scores.total.dtype == np.float64


def test_rewards_that_can_explain_a_picture_do(make):
    prompt = "a red circle and a blue square"
    image = render(place(parse(prompt), RNG))
    rewards = make("shapes", "shapes_color", "jpeg_compressibility", prompts=[Prompt(prompt)])
    assert rewards.explain(image, prompt) == "; ".join(["red circle: right; blue square: right"] * 2)
    assert make("jpeg_compressibility").explain(image, prompt) is None


# --- beside the caller ------------------------------------------------------------------------------------------------


def test_scoring_goes_on_while_the_caller_does_something_else(make):
    began, go_on = threading.Event(), threading.Event()

    def score(images, prompts, metadata):
        began.set()
        assert go_on.wait(30)
        return np.ones(len(images))

    rewards = make("mine:score", score=score)
    rewards.submit(NOISE, CATS)
    assert began.wait(30)  # it runs though nobody waits for it
    go_on.set()  # if submit waited for the score, this would never be reached
    assert rewards.gather().total.tolist() == [1.0, 1.0, 1.0]


def test_batches_come_back_in_the_order_in_which_they_were_submitted(make):
    rewards = make("mine:score", score=lambda images, prompts, metadata: [row["n"] for row in metadata])
    for n in range(20):
        rewards.submit(NOISE[:2], [Prompt("x", {"n": 2 * n}), Prompt("x", {"n": 2 * n + 1})])
    assert rewards.gather().total.tolist() == list(range(40))


def test_a_reward_is_never_called_twice_at_once(make):
    meeting, met = threading.Barrier(2), []

    def score(images, prompts, metadata):
        with suppress(threading.BrokenBarrierError):
            met.append(meeting.wait(0.3))  # passes only where a second call is under way
        return np.ones(len(images))

    rewards = make("mine:score", score=score)
    rewards.submit(NOISE, CATS)
    rewards.submit(NOISE, CATS)
    rewards.gather()
    assert not met


def test_a_batch_is_gathered_once(make):
    rewards = make("jpeg_compressibility")
    rewards.submit(NOISE, CATS)
    assert len(rewards.gather().total) == 3
    rewards.submit(NOISE[:1], CATS[:1])
    assert len(rewards.gather().total) == 1


def test_the_time_spent_scoring_is_counted_until_it_is_taken(make):
    rewards = make("mine:score", score=lambda images, prompts, metadata: time.sleep(0.05) or np.zeros(len(images)))
    assert rewards.take_times() == {"time/reward": 0.0, "time/reward_hidden": 0.0}
    rewards.score(NOISE, CATS)
    rewards.score(NOISE[:1], CATS[:1])
    taken = rewards.take_times()
    assert taken["time/reward"] >= 0.1 and taken["time/reward_hidden"] < taken["time/reward"]  # the caller waited
    assert rewards.take_times() == {"time/reward": 0.0, "time/reward_hidden": 0.0}


def test_what_a_reward_does_before_anyone_waits_is_hidden_and_counted_once(make):
    done = threading.Semaphore(0)

    def score(images, prompts, metadata):
        time.sleep(0.02)
        done.release()
        return np.zeros(len(images))

    rewards = make("mine:a", "mine:b", a=score, b=score)  # beside each other
    rewards.submit(NOISE, CATS)
    assert done.acquire(timeout=30) and done.acquire(timeout=30)
    time.sleep(0.02)
    rewards.gather()
    taken = rewards.take_times()
    assert taken["time/reward"] >= 0.04 and 0.02 <= taken["time/reward_hidden"] <= taken["time/reward"]
    assert _covered([(1.0, 3.0), (2.0, 4.0), (6.0, 7.0), (9.0, 8.0)]) == 4.0


# --- failures while a run goes on -------------------------------------------------------------------------------------


@pytest.mark.parametrize("position", [0, 1, 2])
def test_a_reward_that_raises_stops_the_run_with_its_prompt_and_cause(make, position):
    def score(images, prompts, metadata):
        if CATS[position].text in prompts:
            raise KeyError("no such thing")
        return np.zeros(len(images))

    assert failure(make("mine:score", score=score)) == (
        f"reward mine:score failed for the prompt {CATS[position].text!r}: KeyError: 'no such thing'"
    )


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("position", [0, 2])
def test_a_value_that_is_not_finite_stops_the_run_with_its_prompt(make, value, position):
    def score(images, prompts, metadata):
        return [value if row["n"] == position else 1.0 for row in metadata]

    assert failure(make("mine:score", score=score)) == (
        f"reward mine:score returned {value} for the prompt {CATS[position].text!r}"
    )


NO_NUMBERS = {
    "texts": (lambda n: ["7"] * n, "str"),
    "a number and texts": (lambda n: [1.0] + ["7"] * (n - 1) if n > 1 else ["7"], "str"),
    "an array of texts": (lambda n: np.array(["7"] * n), "str"),
    "bytes": (lambda n: [b"7"] * n, "bytes"),
    "nothing": (lambda n: [None] * n, "NoneType"),
    "complex numbers": (lambda n: np.full(n, 1 + 0j), "complex128"),
    "a complex tensor": (lambda n: torch.ones(n, dtype=torch.complex64), "complex64"),
    "dates": (lambda n: np.full(n, np.datetime64("2026-01-01")), "datetime64"),
    "times": (lambda n: np.full(n, np.timedelta64(5, "s")), "timedelta64"),
    "decimals": (lambda n: [Decimal(1)] * n, "Decimal"),
    "a dictionary": (lambda n: dict.fromkeys(range(n), 1.0), "dict"),
    "a masked array": (lambda n: np.ma.array(np.ones(n), mask=[True] * n), "masked array"),
}


@pytest.mark.parametrize("case", NO_NUMBERS)
def test_values_that_are_no_numbers_stop_the_run(make, case):
    values, kind = NO_NUMBERS[case]
    said = failure(make("mine:score", score=lambda images, prompts, metadata: values(len(images))))
    assert said.startswith("reward mine:score failed for the prompt 'a cat': TypeError: it returned ")
    assert kind in said and said.endswith(": return one number for each image")


NUMBERS = {
    "booleans": [True, False, True],
    "whole numbers of any size": [2**70, 0, 1],
    "fractions": [Fraction(1, 2), Fraction(1, 4), 1],
    "scalars of NumPy": [np.float16(0.5), np.int8(-3), np.float64(2)],
    "an array of float16": np.array([1, 2, 3], np.float16),
    "a tensor of bfloat16": torch.tensor([1.0, 2, 3], dtype=torch.bfloat16),
    "a tensor that carries a gradient": torch.nn.Parameter(torch.tensor([1.0, 2, 3])),
    "a list of tensors": [torch.nn.Parameter(torch.tensor(1.0)), torch.tensor(2.0, dtype=torch.bfloat16), 3],
}


@pytest.mark.parametrize("case", NUMBERS)
def test_numbers_of_every_kind_are_taken(make, case):
    values = NUMBERS[case]
    found = make("mine:score", score=lambda images, prompts, metadata: values).score(NOISE, CATS).total
    assert found.dtype == np.float64
    assert found.tolist() == [float(value.detach() if isinstance(value, torch.Tensor) else value) for value in values]


def test_a_reward_that_fills_the_same_array_again_does_not_change_what_it_returned(make):
    buffer, calls = np.zeros(3), itertools.count()

    def score(images, prompts, metadata):
        buffer[:] = next(calls)
        return buffer

    rewards = make("mine:score", score=score)
    rewards.submit(NOISE, CATS)
    rewards.submit(NOISE, CATS)
    assert rewards.collect()["mine:score"].tolist() == [0, 0, 0, 1, 1, 1]


# --- what a reward is given is its own --------------------------------------------------------------------------------


def test_what_a_reward_does_to_its_arguments_reaches_nothing_else(make):
    prompts = [Prompt(text, {"n": n, "objects": ["cup"]}) for n, text in enumerate(("a hen", "a dog", "a cat"))]
    images, seen = NOISE.copy(), []

    def vandal(images, prompts, metadata):
        torch.from_numpy(images).zero_()  # past NumPy's flag
        prompts.sort()
        for row in metadata:
            row.pop("n")
            row["objects"].append("saucer")
        return [0.0] * len(images)

    def witness(images, prompts, metadata):
        seen.append((images.copy(), list(prompts), metadata))
        return [row["n"] for row in metadata]

    rewards = make("mine:vandal", "mine:witness", vandal=vandal, witness=witness, prompts=prompts)
    with warnings.catch_warnings(action="ignore"):  # PyTorch's own, of an array that is not to be written to
        for _ in range(2):
            assert rewards.score(images, prompts).terms["mine:witness"].tolist() == [0, 1, 2]
    for pictures, texts, metadata in seen:
        assert np.array_equal(pictures, NOISE) and texts == ["a hen", "a dog", "a cat"]
        assert metadata == [{"n": n, "objects": ["cup"]} for n in range(3)]
    assert np.array_equal(images, NOISE) and images.flags.writeable
    assert [prompt.metadata for prompt in prompts] == [{"n": n, "objects": ["cup"]} for n in range(3)]


def test_drawing_into_the_pictures_fails_loudly_with_the_remedy(make):
    def score(images, prompts, metadata):
        images[:, :2] = 0
        return images.mean((1, 2, 3))

    assert failure(make("mine:score", score=score)) == (
        "reward mine:score failed for the prompt 'a cat': ValueError: assignment destination is read-only; the pictures are "
        "not the reward's own: change a copy of them, images.copy()"
    )


def test_a_reward_that_explains_itself_cannot_draw_into_the_samples(make, monkeypatch):
    class Drawing:
        def __call__(self, images, prompts, metadata):
            return [0.0] * len(images)

        def explain(self, image, prompt):
            image[:] = 0

    monkeypatch.setitem(REGISTRY, "drawing", Drawing)
    with pytest.raises(ValueError, match="read-only"):
        make("drawing").explain(NOISE[0], "a cat")


# --- normalisation ----------------------------------------------------------------------------------------------------


def test_normalisation_of_equal_rewards_is_exactly_zero_and_a_constant_takes_nothing():
    values = RNG.normal(size=12)
    for offset in (0.0, 22.1, 1e6, 1e8):
        equal, moved, plain = Moments(), Moments(), Moments()
        for part in (slice(5), slice(5, 12)):
            equal.add(np.full(7, offset + 0.1))
            moved.add(values[part] + offset)
            plain.add(values[part])
        assert (equal.normalized(np.full(7, offset + 0.1)) == 0).all()
        np.testing.assert_allclose(moved.normalized(values + offset), plain.normalized(values), atol=1e-6)
        np.testing.assert_allclose(plain.normalized(values), (values - values.mean()) / values.std(), rtol=1e-6)


@pytest.mark.parametrize(
    "values, shape", [([1.0, 2.0], "(2,)"), ([[1.0]] * 3, "(3, 1)"), (1.0, "()"), ([], "(0,)"), ([1.0] * 4, "(4,)")]
)
def test_a_wrong_number_of_values_stops_the_run(make, values, shape):
    assert failure(make("mine:score", score=lambda images, prompts, metadata: values)) == (
        f"reward mine:score returned shape {shape} for 3 images (first prompt 'a cat'): return one number for each image"
    )


def test_a_failure_in_any_batch_is_told_and_does_not_spoil_the_next_gathering(make):
    rewards = make("mine:score", score=lambda images, prompts, metadata: [1 / row["n"] for row in metadata])
    for prompt in CATS[::-1]:
        rewards.submit(NOISE[:1], [prompt])
    with pytest.raises(RunFailed, match="failed for the prompt 'a cat': ZeroDivisionError: division by zero"):
        rewards.gather()
    assert rewards.score(NOISE[:2], CATS[1:]).total.tolist() == [1.0, 0.5]


def test_a_failing_term_stops_the_run_even_with_weight_0(make):
    rewards = make(
        "jpeg_compressibility",
        {"name": "mine:score", "weight": 0},
        score=lambda images, prompts, metadata: [np.nan] * len(images),
    )
    assert failure(rewards) == "reward mine:score returned nan for the prompt 'a cat'"


# --- refusals before a run --------------------------------------------------------------------------------------------


def takes_no_more(images, prompts, metadata):
    return np.zeros(len(images))


@pytest.mark.parametrize(
    "term, says",
    [
        ("shape", "name: unknown reward 'shape': one of jpeg_compressibility, jpeg_incompressibility, shapes,"),
        ("shape", "or MODULE:FUNCTION of your own"),
        ("no_such_module_here:f", "name: cannot import no_such_module_here:f: ModuleNotFoundError"),
        ("mine:missing", "name: cannot import mine:missing: AttributeError"),
        ("mine:", "name: cannot import mine:: AttributeError"),
        (":score", "name: cannot import :score: ValueError"),
        ("mine:number", "name: mine:number is of type int, not a function"),
        (
            {"name": "mine:score", "params": {"scale": 2}},
            "params: mine:score: got an unexpected keyword argument 'scale'",
        ),
        ({"name": "mine:score", "params": {"images": 2}}, "params: mine:score: multiple values for argument 'images'"),
        ({"name": "mine:needs_more"}, "params: mine:needs_more: missing a required argument: 'scale'"),
        ({"name": "jpeg_incompressibility", "params": {"quality": 2}}, "params: jpeg_incompressibility: "),
        ({"name": "shapes", "params": {"category": "size"}}, "params: shapes: unknown category 'size': one of color"),
        ({"name": "shapes_color", "params": {"size": 1}}, "params: shapes_color: "),
        ("shapes", "name: the shapes reward cannot read the prompt 'a cat': it knows sentences such as"),
    ],
)
def test_what_cannot_work_is_refused_with_its_key(make, term, says):
    def needs_more(images, prompts, metadata, *, scale):
        return np.zeros(len(images))

    message = refusal(
        make, "jpeg_compressibility", term, key="eval.rewards", number=3, score=takes_no_more, needs_more=needs_more
    )
    assert message.startswith("eval.rewards.1.") and says in message


def test_a_module_that_fails_while_it_is_imported_is_told(make, tmp_path, monkeypatch):
    (tmp_path / "my_broken_reward.py").write_text("raise RuntimeError('no licence')")
    monkeypatch.syspath_prepend(tmp_path)
    assert refusal(make, "my_broken_reward:f") == (
        "rewards.0.name: cannot import my_broken_reward:f: RuntimeError: no licence"
    )


def test_a_reward_listed_twice_is_refused(make):
    assert refusal(make, "jpeg_compressibility", "jpeg_compressibility") == (
        "rewards.1.name: jpeg_compressibility is listed twice: give it once, with its whole weight, or give each a label"
    )


@pytest.mark.parametrize("size, shown", [((64, 72), "72 x 64"), ((72, 64), "64 x 72"), ((512, 512), "512 x 512")])
@pytest.mark.parametrize("name", ["shapes", "shapes_color"])
def test_the_shapes_reward_refuses_pictures_of_another_size_than_it_was_made_for(make, name, size, shown):
    prompts = [Prompt(all_requests("color")[0].prompt)]
    for key in ("rewards", "eval.rewards"):
        assert refusal(make, "jpeg_compressibility", name, prompts=prompts, size=size, key=key) == (
            f"{key}.1.name: the shapes reward scores pictures of 64 x 64 pixels, these have {shown}: "
            "use model.path=assets:shapes, or another reward"
        )
    assert make(name, prompts=prompts, size=(64, 64)).terms


def test_the_jpeg_rewards_take_pictures_of_any_size(make):
    rewards = make("jpeg_compressibility", "jpeg_incompressibility", size=(16, 24))
    assert rewards.score(NOISE, CATS).total.tolist() == [0.0, 0.0, 0.0]


def test_a_reward_of_ones_own_may_refuse_prompts_and_sizes(make, monkeypatch):
    seen = []

    class Picky:
        def validate(self, prompts, size):
            seen.append((prompts, size))
            if size[0] > size[1]:
                raise ValueError("no upright pictures")

        def __call__(self, images, prompts, metadata):
            return np.zeros(len(images))

    monkeypatch.setitem(REGISTRY, "picky", Picky)
    assert refusal(make, "picky", size=(24, 16)) == "rewards.0.name: no upright pictures"
    make("picky", size=(16, 24))
    assert seen == [(["a cat", "a dog", "a hen"], (24, 16)), (["a cat", "a dog", "a hen"], (16, 24))]


def test_the_shapes_reward_takes_every_prompt_of_the_shapes_sources(make):
    for source in ("shapes_train", "shapes_heldout"):
        make("shapes", prompts=load_prompts(PromptsConfig(source=source)))


def test_a_module_that_exits_when_imported_is_refused(make, tmp_path, monkeypatch):
    (tmp_path / "leaves_at_once.py").write_text("import sys\nsys.exit(3)\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match="^rewards.0.name: cannot import leaves_at_once:f: SystemExit: 3$"):
        make("leaves_at_once:f")


# --- by hand ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def pictures(tmp_path) -> list[str]:
    """A picture of the shapes world, right for its prompt, and one of another size."""
    image = render(place(parse("a red circle and a blue square"), RNG))
    for name, array in (("a.png", image), ("b.png", NOISE[0])):
        Image.fromarray(array).save(tmp_path / name)
    return [str(tmp_path / "a.png"), str(tmp_path / "b.png")]


def test_score_prints_a_line_for_each_picture_with_what_the_reward_says(pictures, capsys):
    assert main(["score", "--reward", "jpeg_compressibility", *pictures]) == 0
    sizes = [jpeg_kilobytes(np.asarray(Image.open(path))) for path in pictures]
    assert [line.split() for line in capsys.readouterr().out.splitlines()] == [
        [f"{-size:.6g}", path] for size, path in zip(sizes, pictures, strict=True)
    ]
    assert main(["score", "--reward", "shapes", pictures[0], "--prompt", "a red circle and a blue square"]) == 0
    assert capsys.readouterr().out.split(maxsplit=2) == ["1", pictures[0], "red circle: right; blue square: right\n"]


def test_score_takes_params_and_a_prompt_for_each_picture(pictures, capsys, tmp_path, monkeypatch):
    (tmp_path / "lengths.py").write_text(
        "def f(images, prompts, metadata, factor, plus=0):\n    return [factor * len(p) + plus for p in prompts]\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    arguments = ["--reward", "lengths:f", "--params", "factor=2.5", "--params", "plus=1", "--prompt", "a", "--prompt", "abc"]
    assert main(["score", *arguments, *pictures]) == 0
    assert [float(line.split()[0]) for line in capsys.readouterr().out.splitlines()] == [3.5, 8.5]


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["--reward", "nosuch", "{a}"], "--reward.0.name: unknown reward 'nosuch': one of"),
        (["--reward", "aesthetic", "--params", "dtype=int8", "{a}"], "--reward.0.params: aesthetic: dtype 'int8' is not one"),
        (["--reward", "shapes", "{b}", "--prompt", "a red circle"], "--prompt: the shapes reward scores pictures of 64 x 64"),
        (["--reward", "shapes", "{a}", "--prompt", "a cat"], "--prompt: the shapes reward cannot read the prompt 'a cat'"),
        (["--reward", "shapes", "{a}", "--prompt", "a", "--prompt", "b"], "--prompt: 2 prompts for 1 pictures: give one, or"),
        (["--reward", "shapes", "nowhere.png"], "nowhere.png: No such file or directory"),
        (["--reward", "shapes", __file__], f"{__file__}: no picture"),
        (["--reward", "aesthetic", "--params", "dtype", "{a}"], "override 'dtype'"),
    ],
)
def test_score_refuses_what_it_cannot_score(pictures, capsys, arguments, says):
    filled = [argument.format(a=pictures[0], b=pictures[1]) for argument in arguments]
    assert main(["score", *filled]) == 2
    assert capsys.readouterr().err.startswith(f"fastloop: {says}")


def test_score_tells_why_a_reward_failed(pictures, capsys, make, monkeypatch):
    make("mine:score", score=lambda images, prompts, metadata: 1 / 0)
    assert main(["score", "--reward", "mine:score", pictures[0], "--prompt", "a cat"]) == 1
    assert capsys.readouterr().err == (
        "fastloop: reward mine:score failed for the prompt 'a cat': ZeroDivisionError: division by zero\n"
    )
