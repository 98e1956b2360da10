"""The remote reward and its server over real sockets on 127.0.0.1: what they agree on, and every fault between them."""

from __future__ import annotations

import base64
import http.client
import io
import json
import os
import re
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import uvicorn
from PIL import Image

from fastloop.cli import main
from fastloop.config import RewardConfig
from fastloop.errors import LIMIT, RewardFailed, RunFailed, UserError
from fastloop.prompts import Prompt
from fastloop.rewards.jpeg import Incompressibility
from fastloop.rewards.registry import REGISTRY
from fastloop.rewards.remote import Remote, read_token
from fastloop.rewards.scoring import Rewards
from fastloop.rewards.server import MAX_IMAGES, MAX_ITEMS, make_app
from fastloop.tracking import read_rows
from fastloop.trainer import Trainer

ROOT = Path(__file__).resolve().parent.parent
RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (5, 16, 24, 3), dtype=np.uint8)
PROMPTS, METADATA = ["a", "b", "c", "d", "e"], [{"n": n} for n in range(5)]
QUICK = {"timeout": 5.0, "retries": 3, "backoff": 0.01}


class Mute(Exception):
    def __str__(self):
        raise Mute


def raising(error: BaseException):
    def fault():
        raise error

    return fault


# What a reward may do, by the first prompt.
FAULTS = {
    "fail": raising(OSError("the model fell over")),
    "exit": raising(SystemExit("bye")),
    "interrupt": raising(KeyboardInterrupt()),
    "mute": raising(Mute()),
    "long": raising(RuntimeError("x\x1b[2J\n" * 5000 + "and the remedy")),
    "several": lambda: [1.0, 2.0],
    "nan": lambda: [float("nan")],
    "text": lambda: ["1.5"],
    "huge": lambda: [1e308],
}


class Sizes:
    """Tells pictures, prompts and metadata apart, and can fail, hang or refuse."""

    def __init__(self):
        self.seen, self.go_on = [], threading.Event()

    def validate(self, prompts, size):
        if "refused" in prompts:
            raise ValueError("no such prompt \x1b[2J")
        if "confused" in prompts:
            raise KeyboardInterrupt("validate")

    def __call__(self, images, prompts, metadata):
        self.seen.extend(prompts)
        if "hang" in prompts:
            assert self.go_on.wait(30)
        if prompts[0] in FAULTS:
            return FAULTS[prompts[0]]()
        rows = zip(images, prompts, metadata, strict=True)
        return [float(image.mean()) + 1000 * len(prompt) + 1e6 * more.get("n", 0) for image, prompt, more in rows]


@contextmanager
def serving(rewards: Rewards, token: str | None = None, max_bytes: int = 2**20, port: int = 0):
    """The application in a thread; gives its URL."""
    listener = socket.create_server(("127.0.0.1", port))
    server = uvicorn.Server(uvicorn.Config(make_app(rewards, token, max_bytes), log_level="critical", access_log=False))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(20)
        listener.close()
        assert not thread.is_alive()


@pytest.fixture
def sizes(monkeypatch):
    monkeypatch.setitem(REGISTRY, "sizes", Sizes)
    rewards = Rewards([RewardConfig(name="sizes")], [], None)
    yield rewards
    rewards.close()


@pytest.fixture
def hanging(monkeypatch):
    """The reward of a server where a batch may take 0.5 seconds, and its URL."""
    monkeypatch.setitem(REGISTRY, "sizes", Sizes)
    rewards = Rewards([RewardConfig(name="sizes", timeout=0.5)], [], None)
    reward = rewards.terms["sizes"].reward
    with serving(rewards) as url:
        yield reward, url
        reward.go_on.set()
    rewards.close()


@pytest.fixture
def url(sizes):
    with serving(sizes) as url:
        yield url


# --- together ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 2, 16])
def test_scores_over_http_are_those_of_the_reward_itself(url, batch):
    expected = Sizes()(IMAGES, PROMPTS, METADATA)
    remote = Remote(url, batch=batch, **QUICK)
    remote.start()
    assert remote(IMAGES, PROMPTS, METADATA).tolist() == expected


def test_a_remote_reward_is_one_like_any_other(url):
    configs = [RewardConfig(name="http", label=name, params={"url": url, **QUICK}) for name in ("here", "there")]
    rewards = Rewards(configs, [], (16, 24))
    rewards.start()
    scores = rewards.score(IMAGES, [Prompt(text, more) for text, more in zip(PROMPTS, METADATA, strict=True)])
    rewards.close()
    assert scores.total.tolist() == [2 * value for value in Sizes()(IMAGES, PROMPTS, METADATA)]
    assert list(scores.terms) == ["here", "there"]


def test_jpeg_pictures_are_smaller_and_nearly_the_same(url):
    smooth = np.stack([np.full((32, 32, 3), value, np.uint8) for value in (10, 100, 200)])
    exact, near = (Remote(url, format=f, **QUICK)(smooth, PROMPTS[:3], METADATA[:3]) for f in ("png", "jpeg"))
    assert np.allclose(exact, near, atol=2)


def test_the_weighted_sum_of_a_configuration_is_served(sizes):
    rewards = Rewards([RewardConfig(name="sizes", weight=2.0), RewardConfig(name="jpeg_incompressibility")], [], None)
    with serving(rewards) as url:
        found = Remote(url, **QUICK)(IMAGES, PROMPTS, METADATA)
    rewards.close()
    assert np.allclose(found, 2 * np.array(Sizes()(IMAGES, PROMPTS, METADATA)) + Incompressibility()(IMAGES, None, None))


def test_without_the_token_nothing_is_scored(sizes, monkeypatch):
    monkeypatch.setenv("A_TOKEN", "secret")
    monkeypatch.setenv("WRONG", "Secret")
    with serving(sizes, token="secret") as url:
        assert len(Remote(url, token_env="A_TOKEN", **QUICK)(IMAGES, PROMPTS, METADATA)) == 5
        for rest in ({}, {"token_env": "WRONG"}):
            remote = Remote(url, **rest, **QUICK)
            for ask in (remote.start, lambda remote=remote: remote(IMAGES, PROMPTS, METADATA)):
                with pytest.raises(RunFailed, match="answered HTTP 401: the token is missing or wrong"):
                    ask()


# --- requests that the server refuses ---------------------------------------------------------------------------------


def encoded(image: np.ndarray, format: str = "PNG") -> str:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format=format)
    return base64.b64encode(buffer.getvalue()).decode()


def header(width: int, height: int, bits: int = 8, colour: int = 2) -> str:
    """A PNG file that has no pixels: decoding it would fail."""
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)), (b"IDAT", b""), (b"IEND", b"")]
    parts = [struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks]
    return base64.b64encode(b"\x89PNG\r\n\x1a\n" + b"".join(parts)).decode()


def scans(n: int) -> str:
    """A progressive JPEG file that goes over its pixels n times."""
    buffer = io.BytesIO()
    Image.fromarray(IMAGES[0]).save(buffer, format="JPEG", progressive=True)
    start, *found, last = buffer.getvalue()[:-2].split(b"\xff\xda")
    more = [last] * (n - len(found))
    return base64.b64encode(b"\xff\xda".join([start, *found, *more]) + b"\xff\xd9").decode()


def request(url: str, body: bytes | None, method="POST", path="/score", headers=None) -> tuple[int, dict]:
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=20)
    connection.request(method, path, body, {"Content-Type": "application/json", **(headers or {})})
    answer = connection.getresponse()
    found = answer.status, json.loads(answer.read())
    connection.close()
    return found


GOOD = {"images": [encoded(IMAGES[0])], "prompts": ["a"]}


@pytest.mark.parametrize(
    "change, status, says",
    [
        ({"images": []}, 422, "lists of the same length, at least 1"),
        ({"prompts": ["a", "b"]}, 422, "lists of the same length"),
        ({"prompts": "a"}, 422, "lists of the same length"),
        ({"prompts": [7]}, 422, "prompts must be texts"),
        ({"metadata": [7]}, 422, "metadata must be a list of as many objects"),
        ({"metadata": []}, 422, "metadata must be a list of as many objects"),
        ({"pictures": []}, 422, "the body must be"),
        ({"images": ["?"]}, 422, "images.0 is no base64 of a PNG or JPEG file"),
        ({"images": [7]}, 422, "images.0 is no base64 of a PNG or JPEG file"),
        ({"images": [base64.b64encode(b"text").decode()]}, 422, "images.0 is no base64 of a PNG"),
        ({"images": [encoded(IMAGES[0], "GIF")]}, 422, "images.0 is no base64 of a PNG"),
        ({"images": [encoded(IMAGES[0])[:100]]}, 422, "images.0 is no base64 of a PNG"),
        ({"images": [header(4097, 4096)]}, 413, "images.0 has 4097 x 4096 pixels: at most 16777216 in all"),
        ({"images": [header(20_000, 20_000)]}, 413, "images.0 has far too many pixels: at most 16777216 in all"),
        ({"images": [header(4096, 4096)] * 9, "prompts": ["a"] * 9}, 413, "more than 134217728 pixels in all: send fewer"),
        ({"images": [header(8, 8)]}, 422, "images.0 is no base64 of a PNG"),
        ({"images": [header(8, 8, bits=16, colour=0)]}, 422, "images.0 has 16 bits for grey: send 8"),
        ({"images": [scans(101)]}, 413, "images.0 is a JPEG file of more than 100 scans"),
        ({"metadata": [{"a": [0] * MAX_ITEMS}]}, 413, "the body has more than 262144 commas and brackets"),
        ({"images": ["a"] * (MAX_IMAGES + 1), "prompts": ["a"] * (MAX_IMAGES + 1)}, 413, "257 images in one request"),
        ({"prompts": ["refused"]}, 422, r"no such prompt \x1b[2J"),
    ],
)
def test_a_request_that_cannot_be_served_is_told_why(url, change, status, says):
    found = request(url, json.dumps({**GOOD, **change}).encode())
    assert found[0] == status and says in found[1]["error"]
    assert request(url, json.dumps(GOOD).encode())[0] == 200


@pytest.mark.parametrize(
    "ask, status, says",
    [
        ({"body": b"not json"}, 400, "the body is no JSON"),
        ({"body": b"[" * 100_000}, 400, "the body is no JSON"),
        ({"body": b"\xff\xfe"}, 400, "the body is no JSON"),
        ({"body": b"[]"}, 422, "the body must be"),
        ({"body": b"{}", "headers": {"Content-Type": "text/plain"}}, 415, "the content type is text/plain"),
        ({"body": b"x" * (2**20 + 1)}, 413, "larger than 1048576 bytes"),
        ({"body": (b"x" * 2**16 for _ in range(20))}, 413, "larger than 1048576"),
        ({"body": None, "method": "GET"}, 405, "Method Not Allowed: there are GET /health and POST /score"),
        ({"body": b"{}", "path": "/nowhere"}, 404, "Not Found: there are GET /health and POST /score"),
    ],
)  # fmt: skip
def test_what_is_no_request_for_scores_is_refused(url, ask, status, says):
    found = request(url, **ask)
    assert found[0] == status and says in found[1]["error"]


def test_what_is_within_the_bounds_is_scored(url):
    body = {"images": [scans(100)], "prompts": ["a"], "metadata": [{"a": [0] * (MAX_ITEMS // 4)}]}
    assert request(url, json.dumps(body).encode())[0] == 200


def test_pictures_are_decoded_one_request_at_a_time_and_only_after_all_headers(url, monkeypatch):
    inside, most = [], []
    load = Image.Image.load

    def watched(self):
        inside.append(self)
        most.append(len(inside))
        time.sleep(0.01)
        inside.remove(self)
        return load(self)

    monkeypatch.setattr(Image.Image, "load", watched)
    body = json.dumps({**GOOD, "images": GOOD["images"] * 2, "prompts": ["a"] * 2}).encode()
    found = []
    threads = [threading.Thread(target=lambda: found.append(request(url, body)[0])) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [200] * 4 and set(most) == {1}
    refused = {"images": [*GOOD["images"], header(4097, 4096)], "prompts": ["a"] * 2}
    most.clear()
    assert request(url, json.dumps(refused).encode())[0] == 413 and not most


def test_a_request_that_does_not_arrive_is_given_up(url, monkeypatch):
    monkeypatch.setattr("fastloop.rewards.server.SECONDS_TO_ARRIVE", 0.2)
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as slow:
        slow.sendall(b"POST /score HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: 9\r\n\r\n{")
        assert b"408" in slow.recv(100)
        while slow.recv(1000):
            pass  # until the server hangs up
    assert request(url, json.dumps(GOOD).encode())[0] == 200


@pytest.mark.parametrize(
    "prompt, says",
    [
        ("fail", "reward sizes failed for the prompt 'fail': OSError: the model fell over"),
        ("exit", "reward sizes failed for the prompt 'exit': SystemExit: bye"),
        ("interrupt", "reward sizes: KeyboardInterrupt (first prompt 'interrupt')"),
        ("mute", "reward sizes: Mute (first prompt 'mute')"),
        (
            "several",
            "reward sizes returned shape (2,) for 1 images (first prompt 'several'): return one number for each image",
        ),
        ("nan", "reward sizes returned nan for the prompt 'nan'"),
        ("text", "it returned values of type str: return one number for each image"),
        ("huge", "the weighted sum of the rewards is not finite: lower their weights"),
        ("long", r"RuntimeError: x\x1b[2J x\x1b[2J"),
        ("long", "[2J and the remedy"),
        ("confused", "a reward failed when it was to accept or refuse the prompts: KeyboardInterrupt: validate"),
    ],
)
def test_whatever_a_reward_does_is_one_line_for_the_client_and_in_the_log(sizes, url, capfd, prompt, says):
    sizes.terms["sizes"].config = RewardConfig(name="sizes", weight=100.0)
    status, told = request(url, json.dumps({**GOOD, "prompts": [prompt]}).encode())
    assert status == 500 and says in told["error"] and told["error"].isprintable() and len(told["error"]) <= LIMIT
    assert capfd.readouterr().err == f"fastloop: {told['error']}\n"
    assert request(url, json.dumps(GOOD).encode())[0] == 200


def test_a_mistake_of_our_own_is_told_without_its_text(url, monkeypatch):
    monkeypatch.setattr(Rewards, "score_any", lambda *args: {}["secret"])
    assert request(url, json.dumps(GOOD).encode()) == (500, {"error": "internal error"})


def test_a_reward_that_hangs_is_answered_for_and_not_called_again_before_it_is_free(hanging):
    reward, url = hanging
    hang, good = (json.dumps({**GOOD, "prompts": [text]}).encode() for text in ("hang", "a"))
    status, told = request(url, hang)
    assert status == 504 and told["error"].startswith("reward sizes has not answered for 0.5 s (first prompt 'hang'): raise")
    status, told = request(url, good)
    assert status == 504 and told["error"].startswith("reward sizes has not begun for 0.5 s (first prompt 'a'): its worker")
    assert reward.seen == ["hang"]
    reward.go_on.set()
    assert request(url, good)[0] == 200 and reward.seen == ["hang", "a"]


def test_nobody_waits_for_ever_behind_a_reward_that_hangs(hanging):
    _, url = hanging
    body, found = json.dumps({**GOOD, "prompts": ["hang"]}).encode(), []
    threads = [threading.Thread(target=lambda: found.append(request(url, body))) for _ in range(8)]
    started = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert time.monotonic() - started < 10 and {status for status, _ in found} == {503, 504}
    assert {told["error"] for status, told in found if status == 503} == {
        "busy with other requests for 0.5 s: ask again later"
    }


def test_a_request_whose_client_has_left_is_not_scored(sizes, url):
    reward, found = sizes.terms["sizes"].reward, []
    first = threading.Thread(target=lambda: found.append(request(url, json.dumps({**GOOD, "prompts": ["hang"]}).encode())))
    first.start()
    while not reward.seen:
        time.sleep(0.01)
    body = json.dumps({**GOOD, "prompts": ["left"]}).encode()
    leaving = http.client.HTTPConnection(url.removeprefix("http://"))
    leaving.request("POST", "/score", body, {"Content-Type": "application/json"})
    time.sleep(0.1)
    leaving.close()
    time.sleep(0.1)
    reward.go_on.set()
    assert request(url, json.dumps(GOOD).encode())[0] == 200
    first.join()
    assert found[0][0] == 200 and reward.seen == ["hang", "a"]


def test_health_names_the_rewards(url):
    assert request(url, None, "GET", "/health") == (200, {"status": "ok", "rewards": ["sizes"]})


# --- servers that fail ------------------------------------------------------------------------------------------------


@contextmanager
def scripted(*answers):
    """A server that treats one connection after the other as told: bytes to send and close, or seconds to say nothing."""
    listener = socket.create_server(("127.0.0.1", 0))
    seen, over = [], threading.Event()

    def handle(connection, answer):
        with connection:
            connection.settimeout(5)
            received = b""
            while b"\r\n\r\n" not in received:
                received += connection.recv(65536)
            head, _, body = received.partition(b"\r\n\r\n")
            length = int((re.search(rb"(?i)content-length: (\d+)", head) or [0, 0])[1])
            while len(body) < length:
                body += connection.recv(65536)
            seen.append((head.split(b"\r\n")[0].decode(), json.loads(body) if body else None))
            if isinstance(answer, float):
                over.wait(answer)
            else:
                connection.sendall(answer)

    def run():
        for answer in answers:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=handle, args=(connection, answer), daemon=True).start()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", seen
    finally:
        over.set()
        listener.close()


def answer(body: bytes, status: str = "200 OK", length: int | None = None, more: str = "") -> bytes:
    length = len(body) if length is None else length
    return f"HTTP/1.1 {status}\r\nContent-Length: {length}\r\nConnection: close\r\n{more}\r\n".encode() + body


FINE = answer(b'{"scores": [1.5, 2.5]}')
DROPPED, HALF = b"", answer(b'{"scores": [1.5, ', length=100)


def ask(url: str, **rest) -> np.ndarray:
    return Remote(url, **{**QUICK, **rest})(IMAGES[:2], PROMPTS[:2], METADATA[:2])


@pytest.mark.parametrize(
    "fault",
    [DROPPED, HALF, 30.0, b"SSH-2.0-OpenSSH\r\n", answer(b"", "500 Oh"), answer(b"", "503 Busy"), answer(b"", "429 Slow")],
    ids=["dropped", "half", "slow", "not HTTP", "500", "503", "429"],
)
def test_a_passing_fault_is_got_over_with_the_same_request_again(fault):
    with scripted(fault, fault, FINE) as (url, seen):
        assert ask(url, timeout=0.3).tolist() == [1.5, 2.5]
    assert len(seen) == 3 and seen[0] == seen[1] == seen[2] and seen[0][1]["prompts"] == PROMPTS[:2]


@pytest.mark.parametrize(
    "fault, says",
    [
        (DROPPED, "Server disconnected without sending a response"),
        (HALF, "peer closed connection without sending complete message body (received 17 bytes"),
        (30.0, "timed out"),
        (answer(b'{"error": "out of\\nmemory"}', "500 Oh"), "HTTP 500: out of memory"),
    ],
    ids=["dropped", "half", "slow", "500"],
)
def test_a_lasting_fault_fails_after_so_many_attempts_and_says_the_last_reason(fault, says):
    with scripted(*[fault] * 4) as (url, seen), pytest.raises(RunFailed) as caught:
        ask(url, timeout=0.2)
    assert f"/score failed 4 times, at last with {says}" in str(caught.value) and len(seen) == 4


@pytest.mark.parametrize(
    "fault, says",
    [
        (answer(b"<html>"), "answered b'<html>', which is no"),
        (answer(b"[1, 2]"), "which is no"),
        (answer(b'{"score": [1, 2]}'), "which is no"),
        (answer(b'{"scores": ["a", "b"]}'), "which is no"),
        (answer(b'{"scores": [1]}'), "answered scores of shape (1,) for 2 images"),
        (answer(b'{"scores": [[1, 2]]}'), "answered scores of shape (1, 2) for 2 images"),
        (answer(b'{"scores": 1}'), "answered scores of shape () for 2 images"),
        (answer(b'{"error": "what is this"}', "422 No"), "answered HTTP 422: what is this"),
        (answer(b"", "302 Found", more="Location: http://127.0.0.1:1/\r\n"), "answered HTTP 302"),
    ],
)
def test_an_answer_that_cannot_be_used_fails_at_once(fault, says):
    with scripted(fault, FINE) as (url, seen), pytest.raises(RunFailed) as caught:
        ask(url)
    assert says in str(caught.value) and len(seen) == 1


@pytest.mark.parametrize(
    "fault, says",
    [
        (answer(json.dumps({"error": "\x1b[2J\n" * 5000 + "and the remedy"}).encode(), "422 No"), "and the remedy"),
        (answer(json.dumps({"error": "é" * 10_000 + "and the remedy"}).encode(), "500 No"), "and the remedy"),
        (answer(b"", "418 \x1b]0;mine\x07 \x1b[2J"), r"answered HTTP 418: \x1b]0;mine\x07 \x1b[2J"),
        (answer(b"[" * 100_000, "500 No"), "HTTP 500: No"),
        (answer(b"\x1b[2J\x9b"), r"answered b'\x1b[2J\x9b', which is no"),
        (b"\x1b[2J\x9b\r\n", "failed 2 times, at last with illegal"),
        (answer(b'{"scores": [1' + b"0" * 400 + b", 1]}"), "which is no"),
    ],
    ids=["escapes", "long", "reason", "deep", "score", "not HTTP", "large"],
)
def test_nothing_that_a_server_answers_reaches_the_terminal_as_it_is(fault, says):
    with scripted(fault, fault) as (url, _), pytest.raises(RunFailed) as caught:
        ask(url, retries=1)
    assert says in str(caught.value) and str(caught.value).isprintable() and len(str(caught.value)) <= LIMIT


def test_an_answer_that_does_not_end_is_left_in_the_middle(monkeypatch):
    monkeypatch.setattr("fastloop.rewards.remote.MAX_ANSWER", 1000)
    endless = answer(b"1" * 5000, length=10**9)
    with scripted(endless) as (url, seen), pytest.raises(RunFailed, match="/score answered more than 1000 bytes$"):
        ask(url)
    assert len(seen) == 1


def test_no_proxy_of_the_environment_is_asked(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        nobody = f"http://127.0.0.1:{taken.getsockname()[1]}"
    for variable in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(variable, nobody)
    for variable in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(variable, raising=False)
    with scripted(FINE) as (url, _):
        assert ask(url, retries=0).tolist() == [1.5, 2.5]


@pytest.mark.parametrize(
    "value, says",
    [
        ("s3cret\r", "A_TOKEN holds a line end, and a token has visible ASCII"),
        ("s3cret\n", "A_TOKEN holds a line end"),
        ("s3 cret", "A_TOKEN holds a space"),
        ("s3\x1bcret", "A_TOKEN holds a control character"),
        ("s3crét", "A_TOKEN holds a character outside ASCII"),
        ("s3cret\udcff", "A_TOKEN holds a character outside ASCII"),
        ("", "A_TOKEN is empty"),
    ],
)
def test_a_token_that_no_header_can_carry_is_refused_by_both_ends_without_telling_it(value, says, monkeypatch, capsys):
    monkeypatch.setenv("A_TOKEN", value)
    assert main(["serve-reward", str(ROOT / "configs/shapes_demo.yaml"), "--token-env", "A_TOKEN"]) == 2
    server = capsys.readouterr().err
    with pytest.raises(UserError) as caught:
        Rewards([RewardConfig(name="http", params={"url": "http://127.0.0.1:1", "token_env": "A_TOKEN"})], [], None)
    client = str(caught.value)
    assert server.startswith(f"fastloop: --token-env: the environment variable {says}")
    assert client.startswith(f"rewards.0.params: http: token_env: the environment variable {says}")
    assert "s3" not in server + client and "cr" not in server + client


@pytest.mark.parametrize("variable", ["s3cret-token", "a\nb", "", 7])
def test_a_token_in_the_place_of_its_variable_is_not_told(variable):
    with pytest.raises(
        ValueError, match="^give the name of an environment variable that holds the token, such as REWARD_TOKEN$"
    ):
        read_token(variable)


@pytest.mark.parametrize(
    "url",
    ["http://me:s3cret@127.0.0.1:1", "me:s3cret@h", "http://me:s3/cret@h", "http://h/?key=s3cret", "http://h#s3cret", "http://s3cret:s3cret"],
)  # fmt: skip
def test_a_url_that_may_hold_a_password_is_refused_without_telling_it(url):
    with pytest.raises(UserError) as caught:
        Rewards([RewardConfig(name="http", params={"url": url})], [], None)
    assert str(caught.value).startswith("rewards.0.params: http: url ") and "s3" not in str(caught.value)


def test_a_run_with_a_password_in_a_url_does_not_begin(tmp_path, capsys):
    (tmp_path / "c.yaml").write_text(f"{{rewards: [{{name: shapes}}], output_dir: {tmp_path / 'run'}}}")
    reward = 'eval.rewards=[{name: http, params: {url: "http://me:s3cret@127.0.0.1:1"}}]'
    assert main(["train", str(tmp_path / "c.yaml"), reward]) == 2
    said = capsys.readouterr().err
    assert said.startswith("fastloop: eval.rewards.0.params: http: url must have no user, password") and "s3" not in said
    assert "token_env" in said and not (tmp_path / "run").exists()


def test_a_password_in_a_value_that_is_refused_for_another_reason_is_hidden(tmp_path, capsys):
    (tmp_path / "c.yaml").write_text('rewards: {name: http, params: {url: "http://me:s3cret@h"}}')
    assert main(["plan", str(tmp_path / "c.yaml")]) == 2
    assert "{'url': 'http://***@h'}" in capsys.readouterr().err


def test_a_score_that_is_not_finite_is_a_failure_with_its_prompt():
    with scripted(answer(b'{"scores": [1.0, NaN]}')) as (url, _):
        rewards = Rewards([RewardConfig(name="http", params={"url": url})], [], (16, 24))
        with pytest.raises(RewardFailed, match="^reward http returned nan for the prompt 'b'$"):
            rewards.score(IMAGES[:2], [Prompt("a"), Prompt("b")])


def test_pauses_double_up_to_a_bound_and_attempts_are_counted(monkeypatch):
    pauses = []
    monkeypatch.setattr("fastloop.rewards.remote.time.sleep", pauses.append)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
    with pytest.raises(RunFailed, match="/health failed 8 times, at last with .*refused"):
        Remote(url, retries=7).start()
    assert pauses == [1, 2, 4, 8, 16, 30, 30]


def test_a_server_that_is_started_again_in_mid_run_is_waited_for(sizes):
    with serving(sizes) as url:
        port = int(url.rpartition(":")[2])
        remote = Remote(url, retries=60, backoff=0.05, timeout=5.0)
        remote.start()
        first = remote(IMAGES, PROMPTS, METADATA)
    found, away = [], threading.Event()

    def score():
        away.set()
        found.append(remote(IMAGES, PROMPTS, METADATA))

    thread = threading.Thread(target=score, daemon=True)
    thread.start()
    assert away.wait(5)
    time.sleep(0.3)  # refused a few times
    assert not found
    with serving(sizes, port=port):
        thread.join(30)
    assert found[0].tolist() == first.tolist()


@pytest.mark.parametrize(
    "params, says",
    [
        ({}, "missing 1 required positional argument: 'url'"),
        ({"url": "127.0.0.1:8000"}, "does not begin with http:// or https:// and a host"),
        ({"url": "file:///etc/passwd"}, "does not begin with http:// or https:// and a host"),
        ({"url": "http://127.0.0.1:port"}, "does not begin with http:// or https:// and a host"),
        ({"url": 7}, "does not begin with http:// or https:// and a host"),
        ({"url": "http://127.0.0.1", "format": "gif"}, "format 'gif' is not png or jpeg"),
        ({"url": "http://127.0.0.1", "batch": 0}, "batch must be a whole number from 1"),
        ({"url": "http://127.0.0.1", "retries": -1}, "retries must be a whole number from 0"),
        ({"url": "http://127.0.0.1", "timeout": 0}, "timeout must be above 0"),
        ({"url": "http://127.0.0.1", "token_env": "NO_SUCH_TOKEN"}, "the environment variable NO_SUCH_TOKEN is not set"),
    ],
)
def test_bad_params_are_refused(params, says):
    with pytest.raises(UserError) as caught:
        Rewards([RewardConfig(name="http", params=params)], [], None)
    assert str(caught.value).startswith("rewards.0.params: http: ") and says in str(caught.value)


def test_a_server_that_is_not_there_is_told_before_the_model_loads(make_config, monkeypatch):
    monkeypatch.setattr("fastloop.denoisers.load_denoiser", lambda *args: pytest.fail("the model was loaded"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
    config = make_config(rewards=[{"name": "http", "params": {"url": url, "retries": 0}}])
    with pytest.raises(
        UserError, match=r"^rewards.0: http cannot start: http://.*/health failed 1 times, at last with .*refused"
    ):
        Trainer(config)


# --- the command ------------------------------------------------------------------------------------------------------


@contextmanager
def served(*args: str, token: str | None = None):
    """`fastloop serve-reward` in a process of its own; gives its URL."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **({"SERVE_TOKEN": token} if token else {})}
    command = [sys.executable, "-m", "fastloop.cli", "serve-reward", *args, "--port", "0"]
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        line = process.stdout.readline()
        assert (found := re.fullmatch(r"serving [\w, ]+ on (http://127\.0\.0\.1:\d+)\n", line)), line
        yield found[1]
    finally:
        process.terminate()
        process.communicate(timeout=30)


def test_the_shapes_demo_with_its_reward_in_a_second_process_gets_the_same_rewards(make_config, tmp_path):
    demo = {
        "model": {"path": "assets:shapes"},
        "prompts": {"source": "shapes_train", "categories": ["color"]},
        "eval": {"every": 2, "prompts": {"source": "shapes_heldout", "categories": ["color"], "limit": 2}},
        "rewards": [{"name": "shapes"}],
        "sampling": {"steps": 3, "guidance_scale": 1.0},
        "prompts_per_step": 2,
        "clip_range": 1e-3,
    }
    here = Trainer(make_config(**demo, output_dir=str(tmp_path / "here"))).train()
    with served("configs/shapes_demo.yaml", "--token-env", "SERVE_TOKEN", token="secret") as url:
        os.environ["SERVE_TOKEN"] = "secret"
        try:
            demo["rewards"] = [{"name": "http", "params": {"url": url, "token_env": "SERVE_TOKEN", "batch": 3}}]
            there = Trainer(make_config(**demo, output_dir=str(tmp_path / "there"))).train()
        finally:
            del os.environ["SERVE_TOKEN"]
    for mine, other in zip(*(read_rows(folder / "metrics.jsonl") for folder in (here, there)), strict=True):
        for key in ("reward/mean", "reward/std", "reward/group_std", "policy/loss", "policy/grad_norm"):
            assert mine[key] == other[key], key
        assert mine["reward/shapes"] == other["reward/http"]
    scores = [[row["score"] for row in read_rows(folder / "eval.jsonl")] for folder in (here, there)]
    assert scores[0] == scores[1]
    assert "secret" not in (there / "config.yaml").read_text()


@pytest.mark.parametrize(
    "args, says",
    [
        (["--host", "0.0.0.0"], "--host: 0.0.0.0 can be reached by others: set a token with --token-env, or use 127.0.0.1"),
        (["--token-env", "NO_SUCH_TOKEN"], "--token-env: the environment variable NO_SUCH_TOKEN is not set"),
        (["--port", "99999"], "--port: 0 to 65535"),
        (["--max-mb", "0"], "--max-mb: at least 1"),
        (["--timeout", "0"], "--timeout: a number of seconds above 0"),
        (["--timeout", "nan"], "--timeout: a number of seconds above 0"),
        (["--token-env", "s3cret-token"], "--token-env: give the name of an environment variable that holds the token"),
        (["--host", "192.0.2.1", "--token-env", "PATH"], "--port: cannot listen on 192.0.2.1:8000: "),
        (["rewards.0.name=nosuch"], "rewards.0.name: unknown reward 'nosuch'"),
    ],
)
def test_serve_reward_refuses_what_cannot_be_served(args, says, capsys):
    assert main(["serve-reward", str(ROOT / "configs/shapes_demo.yaml"), *args]) == 2
    assert capsys.readouterr().err.startswith(f"fastloop: {says}")


def test_no_served_reward_may_take_for_ever(monkeypatch):
    served = {}
    monkeypatch.setattr("fastloop.rewards.server.serve", lambda rewards, *args: served.update(rewards.terms))
    rewards = "rewards=[{name: shapes}, {name: shapes, label: slow, timeout: 1000}]"
    for option, seconds in ([], 300), (["--timeout", "7.5"], 7.5):
        assert main(["serve-reward", str(ROOT / "configs/shapes_demo.yaml"), rewards, *option]) == 0
        assert [term.config.timeout for term in served.values()] == [seconds, 1000]
        assert [term.workers.timeout for term in served.values()] == [seconds, 1000]


def test_a_missing_package_is_told(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "starlette.applications", None)
    assert main(["serve-reward", str(ROOT / "configs/shapes_demo.yaml")]) == 2
    assert "pip install fastloop[serve]" in capsys.readouterr().err
