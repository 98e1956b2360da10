"""A reward on another machine or in another environment, asked over HTTP. The other end: `fastloop serve-reward`, or your own.

    GET  URL/health   -> 200
    POST URL/score    {"images": [base64 of a PNG or JPEG file, ...], "prompts": [...], "metadata": [{...}, ...]}
                      -> {"scores": [one number for each image]}

Bodies are JSON in UTF-8. With a token every request carries "Authorization: Bearer TOKEN".
"""

from __future__ import annotations

import base64
import io
import json
import os
import re
import time
import urllib.error
import urllib.request
from http.client import HTTPException, IncompleteRead
from urllib.parse import urlsplit

import numpy as np
from PIL import Image

from fastloop.errors import RunFailed

MAX_ANSWER = 16 * 2**20  # bytes; a score has about 20
MAX_REASON = 2**20  # bytes of a refusal, which is read as JSON before it is shortened
AGAIN = (408, 425, 429, 500, 502, 503, 504)  # answers after which the same request may succeed
LONGEST_PAUSE = 30.0  # seconds


class Remote:
    """Posts pictures and prompts to ``url`` and returns the scores of the answer.

    Args:
        url: http:// or https://, without /score, user and password. batch: pictures per request.
        format: png, which loses nothing, or jpeg.
        timeout: seconds without a byte from the server. retries: further attempts of a request after no connection, a timeout,
            or an answer that says so (408, 425, 429, 5xx), with pauses of backoff, 2 backoff, 4 backoff ... seconds,
            at most 30. Any other answer fails at once.
        token_env: environment variable that holds the server's bearer token.

    Raises:
        ValueError: a value that cannot be, or the variable holds no token.
    """

    def __init__(
        self,
        url: str,
        batch: int = 16,
        format: str = "png",
        timeout: float = 60.0,
        retries: int = 5,
        backoff: float = 1.0,
        token_env: str | None = None,
    ) -> None:
        _check_url(url)
        if format not in ("png", "jpeg"):
            raise ValueError(f"format {format!r} is not png or jpeg")
        for name, value, least in (("batch", batch, 1), ("retries", retries, 0)):
            if not isinstance(value, int) or value < least:
                raise ValueError(f"{name} must be a whole number from {least}, not {value!r}")
        if not timeout > 0 or not backoff >= 0:
            raise ValueError("timeout must be above 0, and backoff not below")
        self.url, self.batch, self.format = url.rstrip("/"), batch, format
        self.timeout, self.retries, self.backoff = timeout, retries, backoff
        self.headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if token_env is not None:
            try:
                self.headers["Authorization"] = f"Bearer {read_token(token_env)}"
            except ValueError as error:
                raise ValueError(f"token_env: {error}") from None

    def start(self) -> None:
        """Ask the server whether it is there. Raises ``RunFailed`` where it is not."""
        self._ask("/health", None)

    def __call__(self, images: np.ndarray, prompts: list[str], metadata: list[dict]) -> np.ndarray:
        """Score pictures, uint8 (n, height, width, 3): float64 (n,).

        Raises:
            RunFailed: the server cannot be asked, or its answer cannot be used.
        """
        parts = []
        for i in range(0, len(images), self.batch):
            some = slice(i, i + self.batch)
            body = {
                "images": [self._encoded(image) for image in images[some]],
                "prompts": prompts[some],
                "metadata": metadata[some],
            }
            parts.append(self._scores(self._ask("/score", json.dumps(body).encode()), len(prompts[some])))
        return np.concatenate(parts)

    def _encoded(self, image: np.ndarray) -> str:
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, format=self.format, **({"quality": 95} if self.format == "jpeg" else {}))
        return base64.b64encode(buffer.getvalue()).decode()

    def _scores(self, answer: bytes, n: int) -> np.ndarray:
        try:
            scores = np.asarray(json.loads(answer)["scores"], dtype=np.float64)
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
            raise RunFailed(f'{self.url} answered {answer[:80]!r}, which is no {{"scores": [numbers]}}') from None
        if scores.shape != (n,):
            raise RunFailed(f"{self.url} answered scores of shape {scores.shape} for {n} images")
        return scores

    def _ask(self, path: str, body: bytes | None) -> bytes:
        """One request and its repetitions: the body of an answer 200."""
        request = urllib.request.Request(self.url + path, data=body, headers=self.headers)
        for attempt in range(self.retries + 1):
            if attempt:
                time.sleep(min(self.backoff * 2 ** (attempt - 1), LONGEST_PAUSE))
            try:
                with _OPENER.open(request, timeout=self.timeout) as response:
                    expected = response.length  # None where the answer comes in chunks
                    answer = response.read(MAX_ANSWER + 1)
                    if len(answer) > MAX_ANSWER:
                        raise RunFailed(f"{self.url + path} answered more than {MAX_ANSWER} bytes")
                    if expected is not None and len(answer) < expected:
                        raise IncompleteRead(answer, expected - len(answer))
                    return answer
            except urllib.error.HTTPError as error:
                with error:
                    reason = f"HTTP {error.code}: {_reason(error)}"
                if error.code not in AGAIN:
                    raise RunFailed(f"{self.url + path} answered {reason}") from None
            except (OSError, HTTPException) as error:  # refused, dropped, timed out, cut short, not HTTP
                cause = getattr(error, "reason", None) or error
                reason = str(cause) or type(cause).__name__
        raise RunFailed(f"{self.url + path} failed {self.retries + 1} times, at last with {reason}")


def read_token(variable: str) -> str:
    """Read a bearer token from an environment variable.

    Raises:
        ValueError: the variable is not set, or holds what no header can carry. The message has its name and never its value.
    """
    if not isinstance(variable, str) or not re.fullmatch(r"[A-Za-z_]\w*", variable, re.ASCII):
        raise ValueError("give the name of an environment variable that holds the token, such as REWARD_TOKEN")
    token = os.environ.get(variable)
    if not token:
        raise ValueError(f"the environment variable {variable} is {'not set' if token is None else 'empty'}")
    odd = next((c for c in token if not "!" <= c <= "~"), None)
    if odd is None:
        return token
    kinds = {"\r": "a line end", "\n": "a line end", " ": "a space"}
    kind = kinds.get(odd) or ("a control character" if odd.isascii() else "a character outside ASCII")
    raise ValueError(
        f"the environment variable {variable} holds {kind}, and a token has visible ASCII characters only: "
        f"from a file set it as {variable}=$(tr -d '[:space:]' < FILE)"
    )


def _check_url(url: str) -> None:
    """Raises ``ValueError`` for a URL that cannot be asked, without repeating one that may hold a secret."""
    if re.search(r"[@?#\s]", str(url)):
        raise ValueError(
            "url must have no user, password, ?, #, @ or space in it: give the server's address alone, and name the "
            "environment variable that holds the token in token_env"
        )
    try:
        parts = urlsplit(str(url))
        possible = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:  # a port or an IPv6 address that is none
        possible = False
    if not possible:
        raise ValueError("url does not begin with http:// or https:// and a host, as http://127.0.0.1:8000 does")


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A token must not go to another host."""

    def redirect_request(self, *args, **kwargs) -> None:
        return None


# Without a proxy: the environment's is for the world outside, and a reward server stands beside the trainer.
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}), _NoRedirect)


def _reason(error: urllib.error.HTTPError) -> str:
    """What a server says of its refusal."""
    try:
        return str(json.loads(error.read(MAX_REASON).decode(errors="replace"))["error"])
    except (OSError, HTTPException, ValueError, KeyError, TypeError, RecursionError):
        return error.reason or "no reason"
