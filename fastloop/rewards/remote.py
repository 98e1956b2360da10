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
from urllib.parse import urlsplit

import httpx2
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
        self.retries, self.backoff = retries, backoff
        headers = {"Content-Type": "application/json", "Accept": "application/json", "Accept-Encoding": "identity"}
        if token_env is not None:
            try:
                headers["Authorization"] = f"Bearer {read_token(token_env)}"
            except ValueError as error:
                raise ValueError(f"token_env: {error}") from None
        # A transport of its own takes no proxy from the environment: that is for the world outside, and a reward server stands
        # beside the trainer. No connection is kept: one that the server has closed meanwhile would count as a failed attempt.
        transport = httpx2.HTTPTransport(limits=httpx2.Limits(max_keepalive_connections=0))
        # No redirects: a token must not go to another host.
        self._client = httpx2.Client(transport=transport, headers=headers, timeout=timeout, follow_redirects=False)

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
        """One request and its repetitions: the body of an answer 2xx."""
        method, url = "GET" if body is None else "POST", self.url + path
        for attempt in range(self.retries + 1):
            if attempt:
                time.sleep(min(self.backoff * 2 ** (attempt - 1), LONGEST_PAUSE))
            try:
                with self._client.stream(method, url, content=body) as response:
                    if response.is_success:
                        answer = _read(response, MAX_ANSWER)
                        if len(answer) > MAX_ANSWER:
                            raise RunFailed(f"{url} answered more than {MAX_ANSWER} bytes")
                        return answer
                    reason = f"HTTP {response.status_code}: {_reason(response)}"
                if response.status_code not in AGAIN:
                    raise RunFailed(f"{url} answered {reason}")
            except httpx2.RequestError as error:  # refused, dropped, timed out, cut short, not HTTP
                reason = str(error) or type(error).__name__
        raise RunFailed(f"{url} failed {self.retries + 1} times, at last with {reason}")


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


def _read(response: httpx2.Response, most: int) -> bytes:
    """A body as it was sent, or somewhat more than ``most`` bytes of it."""
    body = bytearray()
    for chunk in response.iter_raw():
        body += chunk
        if len(body) > most:
            break
    return bytes(body)


def _reason(response: httpx2.Response) -> str:
    """What a server says of its refusal."""
    try:
        return str(json.loads(_read(response, MAX_REASON).decode(errors="replace"))["error"])
    except (httpx2.RequestError, ValueError, KeyError, TypeError, RecursionError):
        return response.reason_phrase or "no reason"
