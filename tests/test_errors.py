"""What becomes of messages that hold anything at all: one printable line of bounded length, in every exception of ours."""

from __future__ import annotations

import pickle
import time

import numpy as np
import pytest
from PIL import Image

from fastloop.cli import main
from fastloop.errors import LIMIT, RewardFailed, RewardTimedOut, RunFailed, Unscored, UserError, described, one_line
from fastloop.recipes import parse_config

KINDS = (UserError, RunFailed, RewardFailed, RewardTimedOut)


@pytest.mark.parametrize(
    "text, line",
    [
        ("two\n  lines\r\n\tand\u00a0more ", "two lines and more"),
        ("\x1b[31mred\x07\x00\x7f", r"\x1b[31mred\x07\x00\x7f"),
        ("a\x9b2Jb\x85c\x1cd", r"a\x9b2Jb\x85c\x1cd"),
        ("a\u202egpj.exe\u2066\u200b\ufeff", r"a\u202egpj.exe\u2066\u200b\ufeff"),
        ("a\u2028b\u2029c", r"a\u2028b\u2029c"),
        ("half \ud800", r"half \ud800"),
        ("cannot ask http://somebody:secret@host:80/x: no", "cannot ask http://***@host:80/x: no"),
        ("{'url': 'https://t0k@en@h', 'mail': 'a@b'}", "{'url': 'https://***@h', 'mail': 'a@b'}"),
        (KeyError("no such thing"), "'no such thing'"),
        ("", ""),
    ],
)
def test_a_text_becomes_one_printable_line(text, line):
    assert one_line(text) == line and one_line(line) == line


@pytest.mark.parametrize(
    "text",
    [
        "rewards.0.name: cannot import a:b: ModuleNotFoundError: No module named 'a'",
        "der Prompt 'ein grüner Würfel – „schräg“' failed, 猫の写真, صورة, 😀👍🏽, 1e-4 ± 2 µm",
        r"C:\new\x1b\folder is no folder",
        "http://127.0.0.1:8000/score answered HTTP 500: see https://example.org/@v1",
    ],
)
def test_what_is_one_already_is_not_changed(text):
    assert one_line(text) == text


def test_of_a_long_text_the_ends_stay_however_often_it_is_told_again():
    text = "first " + "\x1b\n" * 10_000 + " the remedy"
    once = one_line(text)
    assert once.startswith(r"first \x1b \x1b") and once.endswith("the remedy") and len(once) <= LIMIT
    told = once
    for rank in range(5):
        told = one_line(f"rank {rank}: {told}")
    assert told.startswith(r"rank 4: rank 3: rank 2: rank 1: rank 0: first \x1b") and told.endswith("the remedy")
    assert len(told) <= LIMIT and told.count("left out") == 1


def test_what_is_left_out_adds_up():
    once = one_line("a" * 5_000)
    assert "[... 4460 characters left out ...]" in once
    assert "[... 4500 characters left out ...]" in one_line("b" * 40 + once)
    assert "[... 9999460 characters left out ...]" in one_line("a" * 10**7)


@pytest.mark.parametrize("unit", ["a", " ", "\x1b", "a ", "[", "://", "[... 7 characters left out ...] "])
def test_ten_megabytes_cost_next_to_nothing(unit):
    text = unit * (10**7 // len(unit))
    started = time.perf_counter()
    line = one_line(text)
    assert time.perf_counter() - started < 2 and len(line) <= LIMIT and one_line(line) == line


@pytest.mark.parametrize("kind", KINDS)
def test_every_exception_of_ours_carries_such_a_line(kind):
    error = kind("reward x failed:\n\x1b[2J" + "y" * 25_000 + " end")
    assert str(error).isprintable() and len(str(error)) <= LIMIT and str(error).endswith(" end")
    assert str(kind(f"rank 3: {error}")).startswith(r"rank 3: reward x failed: \x1b[2J")
    assert error.args == (str(error),)


@pytest.mark.parametrize("kind", [RewardFailed, RewardTimedOut])
def test_a_failed_reward_is_whole_after_a_pipe(kind):
    error = kind("why\x07", Unscored("x", np.ones((1, 2, 2, 3), np.uint8), ["a\x1b"], [{}]))
    other = pickle.loads(pickle.dumps(error))
    assert type(other) is kind and str(other) == r"why\x07" and other.unscored.prompts == ["a\x1b"]


def test_an_exception_is_described_whatever_its_message_does():
    class Mute(Exception):
        def __str__(self):
            raise Mute

    found = [described(error) for error in (ValueError("a\nb"), KeyboardInterrupt(), Mute())]
    assert found == ["ValueError: a b", "KeyboardInterrupt", "Mute"]


@pytest.mark.parametrize("values", [{"nosuchkey": 1}, {"rewards": [{"name": "shapes"}], "safety": {"nosuchkey": 1}}])
def test_the_longest_messages_of_our_own_are_whole(values):
    path = "/home/somebody/projects/diffusion/experiments/configs/sdxl_pickscore_and_aesthetic.yaml"
    with pytest.raises(UserError, match="unknown key; the keys here are ") as caught:
        parse_config(values, path)
    assert "left out" not in str(caught.value)


def test_a_configuration_of_megabytes_is_refused_in_one_line(tmp_path, capsys):
    (tmp_path / "c.yaml").write_text("rewards: " + "a\u202eb" * 10**5)
    assert main(["plan", str(tmp_path / "c.yaml")]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and len(said) < LIMIT + 20 and r"a\u202eb" in said and "left out" in said


def test_score_prints_paths_and_notes_that_steer_no_terminal(tmp_path, monkeypatch, capsys):
    path = tmp_path / "a\x1b[31m.png"
    Image.new("RGB", (64, 64)).save(path)
    monkeypatch.setattr("fastloop.rewards.scoring.Rewards.explain", lambda *args: "no\x1b[2J\nthing")
    assert main(["score", "--reward", "jpeg_compressibility", str(path)]) == 0
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and said.rstrip().isprintable() and said.endswith(r"a\x1b[31m.png  no\x1b[2J thing" + "\n")
    assert main(["score", "--reward", "jpeg_compressibility", f"{path}x"]) == 2
    assert r"a\x1b[31m.pngx: No such file" in capsys.readouterr().err
