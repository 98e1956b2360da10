"""`fastloop serve-reward`: the rewards of a configuration over HTTP, as `fastloop.rewards.remote` asks for them."""

from __future__ import annotations

import asyncio
import base64
import hmac
import io
import json
import socket
import sys
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import numpy as np
from PIL import Image

from fastloop.errors import RewardTimedOut, RunFailed, UserError, described, one_line
from fastloop.prompts import Prompt
from fastloop.rewards.scoring import Rewards

MAX_IMAGES = 256  # in one request
MAX_PIXELS = 4096 * 4096  # of one picture
# Of all pictures of a request: 384 MiB in RGB, of which there are up to three copies while they are scored. Files of a few
# kilobytes can have as many, so the size of the request bounds nothing.
MAX_PIXELS_IN_ALL = 8 * MAX_PIXELS
MAX_SCANS = 100  # of a JPEG file, ten being usual: each takes 33 bytes, and a pass over all pixels
MAX_ITEMS = 2**18  # of a request's JSON: an empty object takes 3 bytes there and more than 60 in memory
READERS = 4  # requests whose bodies are held at once: one is scored while others arrive
SECONDS_TO_ARRIVE = 60  # of a body that is being read
MAX_CONNECTIONS = 256  # Uvicorn answers 503 to more: each one that waits holds 64 KiB of its body


class Refused(Exception):
    """A request that cannot be served, with its HTTP status."""

    def __init__(self, status: int, message: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(one_line(message))
        self.status, self.headers = status, headers


def make_app(rewards: Rewards, token: str | None, max_bytes: int) -> Any:
    """Make a Starlette application with /health and /score. Raises ``UserError`` where Starlette is not installed."""
    try:
        from anyio import fail_after
        from starlette.applications import Starlette
        from starlette.exceptions import HTTPException
        from starlette.requests import ClientDisconnect, Request
        from starlette.responses import JSONResponse, Response
        from starlette.routing import Route
    except ImportError:
        raise UserError("serve-reward needs Starlette and Uvicorn: pip install fastloop[serve]") from None
    reading, scoring = asyncio.Semaphore(READERS), asyncio.Lock()
    scorer = ThreadPoolExecutor(1, "scoring")  # a reward is never called twice at once
    timeouts = [term.config.timeout for term in rewards.terms.values()]
    patience = None if None in timeouts else max(timeouts)  # for other requests: they may take as long as this one

    @asynccontextmanager
    async def turn(lock: asyncio.Lock | asyncio.Semaphore):
        try:
            with fail_after(patience):
                await lock.acquire()
        except TimeoutError:
            raise Refused(503, f"busy with other requests for {patience:g} s: ask again later") from None
        try:
            yield
        finally:
            lock.release()

    def check_token(request: Request) -> None:
        given = request.headers.get("authorization", "")
        if token is not None and not hmac.compare_digest(given.encode(), f"Bearer {token}".encode()):
            raise Refused(401, "the token is missing or wrong", {"WWW-Authenticate": "Bearer"})

    def check_head(request: Request, too_large: Refused) -> None:
        kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
        if kind != "application/json":
            raise Refused(415, f"the content type is {kind or 'missing'}, not application/json")
        length = request.headers.get("content-length", "0")
        if not length.isdecimal() or int(length) > max_bytes:
            raise too_large

    async def body_of(request: Request, too_large: Refused) -> bytearray:
        body = bytearray()
        try:
            with fail_after(SECONDS_TO_ARRIVE):
                async for chunk in request.stream():
                    body += chunk
                    if len(body) > max_bytes:
                        raise too_large
        except TimeoutError:
            says = f"the request has not arrived within {SECONDS_TO_ARRIVE} s: send fewer or smaller pictures"
            raise Refused(408, says, {"Connection": "close"}) from None
        return body

    def answer(body: bytearray) -> dict[str, Any]:
        images, prompts = read_request(body)
        try:
            rewards.validate_any(images, prompts)
        except ValueError as error:
            raise Refused(422, str(error)) from None
        except BaseException as error:  # in this thread no signal raises anything
            raise RunFailed(f"a reward failed when it was to accept or refuse the prompts: {described(error)}") from error
        with np.errstate(over="ignore", invalid="ignore"):
            totals = rewards.score_any(images, prompts)
        if not np.isfinite(totals).all():
            raise RunFailed("the weighted sum of the rewards is not finite: lower their weights")
        return {"scores": totals.tolist()}

    async def health(request: Request) -> Response:
        check_token(request)
        return JSONResponse({"status": "ok", "rewards": list(rewards.terms)})

    async def scores(request: Request) -> Response:
        check_token(request)
        too_large = Refused(413, f"the request is larger than {max_bytes} bytes: send fewer or smaller pictures")
        check_head(request, too_large)
        try:
            async with turn(reading):
                body = await body_of(request, too_large)
                async with turn(scoring):
                    if await request.is_disconnected():  # it has given up, and may be asking again
                        raise ClientDisconnect
                    # with an executor of our own, for asyncio's would hold up the end of the program
                    return JSONResponse(await asyncio.get_running_loop().run_in_executor(scorer, answer, body))
        except asyncio.CancelledError:
            raise Refused(503, "the server is stopping: ask again later") from None

    async def refused(request: Request, error: Refused) -> Response:
        return JSONResponse({"error": str(error)}, error.status, error.headers)

    async def failed(request: Request, error: RunFailed) -> Response:
        print(f"fastloop: {error}", file=sys.stderr, flush=True)
        return JSONResponse({"error": str(error)}, 504 if isinstance(error, RewardTimedOut) else 500)

    async def broken(request: Request, error: Exception) -> Response:  # a mistake of ours: Uvicorn logs its traceback
        return JSONResponse({"error": "internal error"}, 500)

    async def unknown(request: Request, error: HTTPException) -> Response:  # no such path, or not with this method
        return JSONResponse(
            {"error": f"{error.detail}: there are GET /health and POST /score"}, error.status_code, error.headers
        )

    async def gone(request: Request, error: ClientDisconnect) -> Response:
        return Response(status_code=400)

    return Starlette(
        routes=[Route("/health", health, methods=["GET"]), Route("/score", scores, methods=["POST"])],
        exception_handlers={
            Refused: refused,
            RunFailed: failed,
            HTTPException: unknown,
            ClientDisconnect: gone,
            Exception: broken,
        },
    )


def read_request(body: bytes | bytearray) -> tuple[list[np.ndarray], list[Prompt]]:
    """Read the pictures, uint8 (height, width, 3) each, and prompts of a request.

    Raises ``Refused`` with what is wrong in it.
    """
    if sum(map(body.count, (b",", b"[", b"{"))) > MAX_ITEMS:
        raise Refused(413, f"the body has more than {MAX_ITEMS} commas and brackets: send fewer metadata")
    try:
        values = json.loads(body)
    except (ValueError, RecursionError):
        raise Refused(400, "the body is no JSON") from None
    if not isinstance(values, dict) or not {"images", "prompts"} <= set(values) <= {"images", "prompts", "metadata"}:
        raise Refused(
            422, 'the body must be {"images": [...], "prompts": [...], "metadata": [...]}, the last of them optional'
        )
    images, prompts = values["images"], values["prompts"]
    if not isinstance(images, list) or not isinstance(prompts, list) or not images or len(images) != len(prompts):
        raise Refused(422, "images and prompts must be lists of the same length, at least 1")
    if len(images) > MAX_IMAGES:
        raise Refused(413, f"{len(images)} images in one request: at most {MAX_IMAGES}")
    metadata = values.get("metadata", [{}] * len(images))
    if not isinstance(metadata, list) or len(metadata) != len(images) or not all(isinstance(m, dict) for m in metadata):
        raise Refused(422, "metadata must be a list of as many objects as there are images")
    if not all(isinstance(text, str) for text in prompts):
        raise Refused(422, "prompts must be texts")
    return _pictures(images), [Prompt(text, more) for text, more in zip(prompts, metadata, strict=True)]


def _pictures(images: list[Any]) -> list[np.ndarray]:
    """The pictures, decoded one after the other, once the headers of all have been looked at."""
    files, pixels = [], 0
    for i, encoded in enumerate(images):
        try:
            files.append(base64.b64decode(encoded, validate=True))
        except (TypeError, ValueError):
            raise _no_picture(i) from None
        with _opened(files[i], i) as image:
            if image.width * image.height > MAX_PIXELS:
                raise Refused(413, f"images.{i} has {image.width} x {image.height} pixels: at most {MAX_PIXELS} in all")
            if image.format != "PNG" and files[i].count(b"\xff\xda") > MAX_SCANS:
                raise Refused(413, f"images.{i} is a JPEG file of more than {MAX_SCANS} scans: save it anew")
            if image.mode.startswith("I"):  # Pillow would make white of all but the darkest
                raise Refused(422, f"images.{i} has 16 bits for grey: send 8")
            pixels += image.width * image.height
        if pixels > MAX_PIXELS_IN_ALL:
            raise Refused(
                413, f"the pictures have more than {MAX_PIXELS_IN_ALL} pixels in all: send fewer of them in one request"
            )
    pictures = []
    for i, file in enumerate(files):
        with _opened(file, i) as image:
            pictures.append(np.asarray(image.convert("RGB")))
    return pictures


@contextmanager
def _opened(file: bytes, i: int) -> Iterator[Image.Image]:
    """A picture of which the header alone has been read."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of bombs: the size is looked at here
            with Image.open(io.BytesIO(file), formats=("PNG", "JPEG")) as image:
                yield image
    except Refused:
        raise
    except Image.DecompressionBombError:
        raise Refused(413, f"images.{i} has far too many pixels: at most {MAX_PIXELS} in all") from None
    except Exception:  # Pillow raises many kinds for damaged files
        raise _no_picture(i) from None


def _no_picture(i: int) -> Refused:
    return Refused(422, f"images.{i} is no base64 of a PNG or JPEG file")


def serve(rewards: Rewards, host: str, port: int, token: str | None, max_bytes: int) -> None:
    """Serve until SIGINT or SIGTERM; port 0 takes a free one. The line with the address comes when requests are taken.

    Raises:
        UserError: Starlette or Uvicorn is missing, the address cannot be taken, or it is open to others without a token.
    """
    if token is None and host not in ("127.0.0.1", "::1", "localhost"):
        raise UserError(f"--host: {host} can be reached by others: set a token with --token-env, or use 127.0.0.1")
    app = make_app(rewards, token, max_bytes)
    try:
        import uvicorn
    except ImportError:
        raise UserError("serve-reward needs Starlette and Uvicorn: pip install fastloop[serve]") from None
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.create_server((host, port), family=family, backlog=128)
    except (OSError, OverflowError) as error:
        raise UserError(f"--port: cannot listen on {host}:{port}: {getattr(error, 'strerror', None) or error}") from None
    rewards.start()
    shown = f"[{host}]" if ":" in host else host
    print(one_line(f"serving {', '.join(rewards.terms)} on http://{shown}:{listener.getsockname()[1]}"), flush=True)
    config = uvicorn.Config(
        app,
        http="h11",  # which bounds headers, at 16 KiB; httptools does not
        log_level="warning",
        access_log=False,
        limit_concurrency=MAX_CONNECTIONS,
        timeout_graceful_shutdown=5,
    )
    with listener:
        uvicorn.Server(config).run(sockets=[listener])
