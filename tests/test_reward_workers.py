"""Rewards in threads and processes of their own: overlap, time-outs, crashes, normalisation, and what a failure leaves."""

from __future__ import annotations

import json
import os
import sys
import threading
import time

import numpy as np
import pytest
from PIL import Image

from fastloop.config import RewardConfig
from fastloop.errors import RewardFailed, RewardTimedOut, UserError
from fastloop.prompts import Prompt
from fastloop.recipes import parse_config
from fastloop.rewards.calls import save_unscored
from fastloop.rewards.scoring import Moments, Rewards
from fastloop.rewards.workers import OwnProcess, Workers
from fastloop.tracking import read_rows
from fastloop.trainer import Trainer

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (3, 16, 24, 3), dtype=np.uint8)
CATS = [Prompt("a cat", {"n": 0}), Prompt("a dog", {"n": 1}), Prompt("a hen", {"n": 2})]

MODULE = """
import os, threading, time

events, go_on, held = [], threading.Event(), threading.Event()

def n(images, prompts, metadata, factor=1):
    return [factor * row["n"] for row in metadata]

def where(images, prompts, metadata):
    return [os.getpid()] * len(images)

def where_slowly(images, prompts, metadata):
    time.sleep(0.2)
    return [os.getpid()] * len(images)

def hang(images, prompts, metadata):
    if "a dog" in prompts:
        held.wait(60)
    return [0.0] * len(images)

def fail(images, prompts, metadata):
    if "a dog" in prompts:
        raise KeyError("no such thing")
    return [1.0] * len(images)

def die(images, prompts, metadata):
    os._exit(7)

def leave(images, prompts, metadata):
    raise SystemExit("bye")

def interrupt(images, prompts, metadata):
    raise KeyboardInterrupt

def moody(images, prompts, metadata):
    if prompts[0] == "a dog":
        held.wait(60)
    if prompts[0] == "a hen":
        os._exit(7)
    return [os.getpid()] * len(images)

def counted(images, prompts, metadata):
    events.append(prompts[0])
    held.wait(60)
    return [0.0] * len(images)

def slow(images, prompts, metadata):
    events.append("scoring")
    assert go_on.wait(60)
    events.append("scored")
    return [0.0] * len(images)
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    """The module `apart`, which a process of a reward finds too."""
    (tmp_path / "apart.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    import apart

    yield apart
    apart.held.set()
    apart.go_on.set()
    del sys.modules["apart"]


@pytest.fixture
def make(module):
    made = []

    def make(*terms, prompts=CATS, **rest) -> Rewards:
        made.append(Rewards([RewardConfig(**term) for term in terms], prompts, (16, 24), **rest))
        return made[-1]

    yield make
    for rewards in made:
        rewards.close()


# --- beside the sampler -----------------------------------------------------------------------------------------------


def test_a_slow_reward_hides_behind_the_sampling_of_the_next_batch(make_config, module, monkeypatch):
    """By the order of events: the second batch is decoded while the first one's score is under way."""
    from fastloop.denoisers.sd import StableDiffusion

    decode = StableDiffusion.decode

    def watched(self, *args, **kwargs):
        module.events.append("sampled")
        if module.events.count("sampled") == 2:
            module.go_on.set()  # the reward answers only once the second batch has been sampled
        return decode(self, *args, **kwargs)

    config = make_config(rewards=[{"name": "apart:slow"}], eval={"rewards": [{"name": "jpeg_compressibility"}]})
    trainer = Trainer(config, leave_out=("evaluation", "report"))
    monkeypatch.setattr(StableDiffusion, "decode", watched)
    trainer.train()
    first = module.events[: module.events.index("scored")]
    assert first.count("sampled") == 2 and first.count("scoring") == 1 and first[0] == "sampled"
    row = read_rows(trainer.folder / "metrics.jsonl")[0]
    assert 0 < row["time/reward_hidden"] <= row["time/reward"]


@pytest.mark.parametrize("worker", ["thread", "process"])
def test_rewards_work_at_the_same_time_each_on_its_own(make, worker):
    rewards = make(*({"name": "apart:where", "label": name, "worker": worker} for name in ("a", "b")))
    pids = {name: set(values) for name, values in rewards.score(IMAGES, CATS).terms.items()}
    here = {float(os.getpid())}
    if worker == "thread":
        assert pids == {"a": here, "b": here}
    else:
        assert len(pids["a"] | pids["b"] | here) == 3


def test_two_rewards_meet_while_both_are_under_way(make, module):
    meeting = threading.Barrier(2)
    module.first = module.second = lambda images, prompts, metadata: [meeting.wait(30) * 0.0] * len(images)
    assert make({"name": "apart:first"}, {"name": "apart:second"}).score(IMAGES, CATS).total.tolist() == [0, 0, 0]


def test_several_workers_score_several_batches_at_once_and_keep_their_order(make, module):
    meeting = threading.Barrier(3)
    module.together = lambda images, prompts, metadata: [meeting.wait(30) * 0.0 + row["n"] for row in metadata]
    rewards = make({"name": "apart:together", "workers": 3})
    for i in range(3):
        rewards.submit(IMAGES[i : i + 1], CATS[i : i + 1])
    assert rewards.gather().total.tolist() == [0, 1, 2]


def test_a_pool_of_processes_shares_the_batches(make):
    rewards = make({"name": "apart:where_slowly", "workers": 2, "worker": "process"})
    rewards.start()
    for _ in range(6):
        rewards.submit(IMAGES[:1], CATS[:1])
    assert len(set(rewards.gather().total)) == 2


# --- a process --------------------------------------------------------------------------------------------------------


def test_a_reward_in_a_process_gives_what_it_gives_here(make):
    here = make({"name": "apart:n", "params": {"factor": 3}}, {"name": "jpeg_compressibility"})
    there = make({"name": "apart:n", "params": {"factor": 3}, "worker": "process"}, {"name": "jpeg_compressibility"})
    there.start()
    assert there.score(IMAGES, CATS).total.tolist() == here.score(IMAGES, CATS).total.tolist()


def test_its_failure_is_told_as_here_and_the_next_batch_is_scored(make):
    rewards = make({"name": "apart:fail", "worker": "process"})
    with pytest.raises(
        RewardFailed, match="^reward apart:fail failed for the prompt 'a dog': KeyError: 'no such thing'$"
    ) as at:
        rewards.score(IMAGES, CATS)
    assert at.value.unscored.prompts == ["a dog"] and np.array_equal(at.value.unscored.images, IMAGES[1:2])
    assert rewards.score(IMAGES[:1], CATS[:1]).total.tolist() == [1.0]


def test_a_process_that_dies_is_told_with_its_exit_code(make):
    with pytest.raises(RewardFailed, match=r"^reward apart:die: its process ended \(exit code 7\) \(first prompt 'a cat'\)$"):
        make({"name": "apart:die", "worker": "process"}).score(IMAGES, CATS)


def test_a_reward_that_cannot_start_in_its_process_is_bad_input(make, tmp_path, module):
    (tmp_path / "apart.py").write_text("raise RuntimeError('not here')")  # what the other process will import
    with pytest.raises(UserError, match="^rewards.0: apart:n cannot start: UserError: rewards.0.name: cannot import apart:n"):
        make({"name": "apart:n", "worker": "process"}).start()


def test_a_process_that_was_ended_or_died_is_replaced_at_the_next_batch(make):
    rewards = make({"name": "apart:moody", "worker": "process", "timeout": 0.4})
    rewards.start()

    def pid() -> float:
        while True:  # a new process may need several of these short times to start
            try:
                return rewards.score(IMAGES[:1], CATS[:1]).total[0]
            except RewardTimedOut as error:
                assert "has not begun for 0.4 s" in str(error)

    first = pid()
    with pytest.raises(
        RewardTimedOut, match="^reward apart:moody has not answered for 0.4 s .first prompt 'a dog'.: raise its"
    ):
        rewards.score(IMAGES[1:2], CATS[1:2])
    second = pid()
    with pytest.raises(RewardFailed, match=r"its process ended \(exit code 7\) \(first prompt 'a hen'\)$"):
        rewards.score(IMAGES[2:], CATS[2:])
    assert len({first, second, pid()}) == 3
    with pytest.raises(ProcessLookupError):
        os.kill(int(first), 0)


def test_a_process_can_be_closed_while_it_starts(module):
    process = OwnProcess("x", module.n)
    said = []

    def start():
        try:
            process.start()
        except ValueError as error:
            said.append(str(error))

    thread = threading.Thread(target=start)
    thread.start()
    while process._process is None:
        time.sleep(0.001)
    process.close()
    thread.join(20)
    assert len(said) == 1 and said[0].startswith("its process ended")
    process.close()
    with pytest.raises(ValueError, match="it is closed"):
        process.start()


# --- time-outs and other ends -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("worker", ["thread", "process"])
def test_a_reward_that_hangs_past_its_timeout_stops_the_run_with_its_prompts(make, worker):
    rewards = make({"name": "apart:hang", "timeout": 0.4, "worker": worker})
    rewards.start()
    assert rewards.score(IMAGES[:1], CATS[:1]).total.tolist() == [0.0]
    started = time.monotonic()
    with pytest.raises(RewardFailed, match="^reward apart:hang has not answered for 0.4 s .first prompt 'a cat'.: raise its"):
        rewards.score(IMAGES, CATS)
    assert time.monotonic() - started < 20


def test_each_batch_has_its_own_time(make, module):
    module.nap = lambda images, prompts, metadata: time.sleep(0.1) or [0.0] * len(images)
    rewards = make({"name": "apart:nap", "timeout": 2.0})
    for _ in range(25):
        rewards.submit(IMAGES[:1], CATS[:1])  # 2.5 seconds in all
    assert len(rewards.gather().total) == 25


@pytest.mark.parametrize(
    "name, says",
    [
        ("leave", "reward apart:leave failed for the prompt 'a cat': SystemExit: bye"),
        ("interrupt", "reward apart:interrupt: KeyboardInterrupt (first prompt 'a cat')"),
    ],
)
def test_a_reward_that_leaves_the_program_is_a_failure(make, name, says):
    with pytest.raises(RewardFailed) as caught:
        make({"name": f"apart:{name}"}).score(IMAGES, CATS)
    assert str(caught.value) == says and caught.value.unscored.prompts


def test_a_thread_that_hangs_is_not_called_again_before_it_is_free(make, module):
    rewards = make({"name": "apart:counted", "timeout": 0.3})
    for i, says in enumerate(["has not answered", "has not begun", "has not begun"]):
        with pytest.raises(RewardTimedOut, match=f"^reward apart:counted {says} for 0.3 s .first prompt '{CATS[i].text}'.: "):
            rewards.score(IMAGES[i:], CATS[i:])
    assert module.events == ["a cat"]
    module.held.set()
    assert rewards.score(IMAGES[:1], CATS[:1]).total.tolist() == [0.0]
    assert module.events == ["a cat", "a cat"]  # what had been given up is not scored late


def test_who_waits_for_a_reward_that_is_closed_is_told(module):
    workers = Workers("x", [module.counted], None)
    job = workers.submit(IMAGES, ["a cat"], [{}])
    threading.Timer(0.1, workers.close).start()
    with pytest.raises(RewardFailed, match="^reward x: it was closed while it worked .first prompt 'a cat'.$"):
        workers.result(job)
    workers.close()
    with pytest.raises(RewardFailed, match="it was closed"):
        workers.result(workers.submit(IMAGES, ["a dog"], [{}]))


def test_any_timeout_can_be_waited_for(make):
    assert make({"name": "apart:n", "timeout": 1e300}).score(IMAGES, CATS).total.tolist() == [0, 1, 2]


def test_what_could_not_be_scored_is_saved_with_its_prompts(make, tmp_path):
    with pytest.raises(RewardFailed) as caught:
        make({"name": "apart:hang", "timeout": 0.2}).score(IMAGES, CATS)
    save_unscored(caught.value, tmp_path / "unscored")
    facts = json.loads((tmp_path / "unscored" / "failure.json").read_text())
    assert facts["reward"] == "apart:hang" and "has not answered for 0.2 s" in facts["error"]
    assert [(row["prompt"], row["metadata"]) for row in facts["pictures"]] == [(p.text, p.metadata) for p in CATS]
    for row, image in zip(facts["pictures"], IMAGES, strict=True):
        assert np.array_equal(np.asarray(Image.open(tmp_path / "unscored" / row["file"])), image)


@pytest.mark.parametrize("name, says", [("die", "its process ended"), ("hang", "has not answered for 0.5 s")])
def test_a_run_whose_reward_dies_or_hangs_ends_with_a_checkpoint_and_the_prompts(make_config, module, monkeypatch, name, says):
    module.held.clear()
    monkeypatch.setattr("fastloop.training_run.write_report", lambda folder: None)
    reward = {"name": f"apart:{name}", "timeout": 0.5, "worker": "process" if name == "die" else "thread"}
    prompts = module.__file__.replace("apart.py", "dogs.txt")
    with open(prompts, "w") as file:
        file.write("a dog\n")
    config = make_config(
        rewards=[reward],
        prompts={"source": prompts},
        eval={"rewards": [{"name": "jpeg_compressibility"}]},
        checkpoint={"every": 9},
    )
    trainer = Trainer(config)
    trainer.rewards.start()
    with pytest.raises(RewardFailed, match=says):
        trainer.train()
    assert json.loads((trainer.folder / "run.json").read_text())["status"] == "failed"
    assert says in json.loads((trainer.folder / "run.json").read_text())["message"]
    assert {row["prompt"] for row in json.loads((trainer.folder / "unscored/failure.json").read_text())["pictures"]} == {
        "a dog"
    }
    assert [path.name for path in (trainer.folder / "checkpoints").iterdir()] == ["iteration-000000"]


# --- normalisation ----------------------------------------------------------------------------------------------------


def test_normalised_by_the_rollout_a_term_has_mean_0_and_deviation_1_before_its_weight(make):
    rewards = make({"name": "apart:n", "weight": 2.0, "normalize": "batch"}, normalize=True)
    scores = rewards.score(IMAGES, CATS)
    assert scores.terms["apart:n"].tolist() == [0, 1, 2]  # as it is
    assert np.allclose(scores.total, 2 * np.array([-1, 0, 1]) / np.std([0, 1, 2]))
    constant = make({"name": "apart:fail", "normalize": "batch"}, normalize=True)
    assert constant.score(IMAGES[:1], CATS[:1]).total.tolist() == [0.0]


def test_normalised_by_all_so_far_it_remembers_over_a_resume(make):
    term = {"name": "apart:n", "normalize": "running"}
    batches = [RNG.normal(3, 2, n) for n in (4, 1, 7)]
    rewards, seen = make(term, normalize=True), []
    for i, values in enumerate(batches):
        if i == 2:
            state = rewards.state_dict()
            rewards = make(term, normalize=True)
            rewards.load_state_dict(json.loads(json.dumps(state)))
        seen = np.concatenate([seen, values])
        total = rewards.total({"apart:n": values}).total
        assert np.allclose(total, (values - seen.mean()) / (seen.std() + 1e-8))


def test_moments_of_parts_are_those_of_the_whole():
    moments, values = Moments(), RNG.normal(1000, 1e-3, 100)
    for part in np.array_split(values, 7):
        moments.add(part)
    assert moments.origin + moments.mean == pytest.approx(values.mean(), abs=1e-12)
    assert (moments.squares / moments.count) ** 0.5 == pytest.approx(values.std(), rel=1e-6)


def test_in_evaluation_nothing_is_normalised(make):
    train = make({"name": "apart:n", "normalize": "batch"}, normalize=True)
    evaluation = make({"name": "apart:n", "normalize": "batch"}, share=train)
    assert evaluation.terms["apart:n"].reward is train.terms["apart:n"].reward
    assert evaluation.score(IMAGES, CATS).total.tolist() == [0, 1, 2] and not evaluation.state_dict()
    with pytest.raises(UserError, match="eval.rewards.0.normalize: held-out scores are as they are"):
        parse_config(
            {"rewards": [{"name": "shapes"}], "eval": {"rewards": [{"name": "shapes", "normalize": "batch"}]}}, "test"
        )


def test_running_normalisation_is_in_the_checkpoint(make_config, module, monkeypatch):
    monkeypatch.setattr("fastloop.training_run.write_report", lambda folder: None)
    reward = {"name": "jpeg_incompressibility", "normalize": "running"}
    trainer = Trainer(make_config(rewards=[reward]))
    trainer.train()
    rows = read_rows(trainer.folder / "metrics.jsonl")
    count, mean, _, origin = trainer.rewards.state_dict()["jpeg_incompressibility"]
    assert count == 12
    assert origin + mean == pytest.approx(np.mean([row["reward/jpeg_incompressibility"] for row in rows]))
    assert abs(rows[0]["reward/mean"]) < 1e-6 and rows[0]["reward/std"] == pytest.approx(1, rel=1e-4)
    resumed = Trainer(make_config(rewards=[reward], iterations=3), resume=True)
    assert resumed.rewards.state_dict() == trainer.rewards.state_dict()
    resumed.rewards.close()
    resumed.tracker.close()


def test_one_name_may_stand_twice_with_labels(make):
    terms = [{"name": "apart:n", "params": {"factor": f}, "label": f"times {f}"} for f in (2, 3)]
    assert make(*terms).score(IMAGES, CATS).terms["times 3"].tolist() == [0, 3, 6]


@pytest.mark.parametrize("label", ["mean", "std", "group_std", "category/color", ""])
def test_a_label_that_would_hide_another_metric_is_refused(label):
    with pytest.raises(UserError, match="^test: rewards.0.label: "):
        parse_config({"rewards": [{"name": "shapes", "label": label}]}, "test")
