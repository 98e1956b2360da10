"""`fastloop serve-reward`: the rewards of a configuration over HTTP, as `fastloop.rewards.remote` asks for them."""

from __future__ import annotations

import base64
import binascii
import hmac
import io
import json
import socket
import threading
import warnings
from typing import Any

import numpy as np
from PIL import Image

from fastloop.errors import RunFailed, UserError
from fastloop.prompts import Prompt
from fastloop.rewards import Rewards

MAX_IMAGES = 256  # in one request
MAX_PIXELS = 4096 * 4096  # of one picture


class Refused(Exception):
    """A request that cannot be served, with its HTTP status."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


def make_app(rewards: Rewards, token: str | None, max_bytes: int) -> Any:
    """A Starlette application with /health and /score. Raises ``UserError`` where Starlette is not installed."""
    try:
        from starlette.applications import Starlette
        from starlette.concurrency import run_in_threadpool
        from starlette.exceptions import HTTPException
        from starlette.requests import ClientDisconnect, Request
        from starlette.responses import JSONResponse, Response
        from starlette.routing import Route
    except ImportError:
        raise UserError("serve-reward needs Starlette and Uvicorn: pip install fastloop[serve]") from None
    one_at_a_time = threading.Lock()

    def check_token(request: Request) -> None:
        given = request.headers.get("authorization", "")
        if token is not None and not hmac.compare_digest(given.encode(), f"Bearer {token}".encode()):
            raise Refused(401, "the token is missing or wrong")

    async def body_of(request: Request) -> bytes:
        kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
        if kind != "application/json":
            raise Refused(415, f"the content type is {kind or 'missing'}, not application/json")
        too_large = Refused(413, f"the request is larger than {max_bytes} bytes: send fewer or smaller pictures")
        length = request.headers.get("content-length", "0")
        if not length.isdecimal() or int(length) > max_bytes:
            raise too_large
        body = bytearray()
        async for chunk in request.stream():
            body += chunk
            if len(body) > max_bytes:
                raise too_large
        return bytes(body)

    def answer(body: bytes) -> dict[str, Any]:
        images, prompts = read_request(body)
        with one_at_a_time:  # a reward is never called twice at once
            try:
                return {"scores": rewards.score_any(images, prompts).tolist()}
            except ValueError as error:
                raise Refused(422, str(error)) from None

    async def health(request: Request) -> Response:
        check_token(request)
        return JSONResponse({"status": "ok", "rewards": list(rewards.terms)})

    async def scores(request: Request) -> Response:
        check_token(request)
        return JSONResponse(await run_in_threadpool(answer, await body_of(request)))

    async def refused(request: Request, error: Refused) -> Response:
        return JSONResponse(
            {"error": str(error)}, error.status, {"WWW-Authenticate": "Bearer"} if error.status == 401 else None
        )

    async def failed(request: Request, error: RunFailed) -> Response:
        print(f"fastloop: {error}", flush=True)
        return JSONResponse({"error": str(error)}, 500)

    async def unknown(request: Request, error: HTTPException) -> Response:  # no such path, or not with this method
        return JSONResponse(
            {"error": f"{error.detail}: there are GET /health and POST /score"}, error.status_code, error.headers
        )

    async def gone(request: Request, error: ClientDisconnect) -> Response:
        return Response(status_code=400)

    return Starlette(
        routes=[Route("/health", health, methods=["GET"]), Route("/score", scores, methods=["POST"])],
        exception_handlers={Refused: refused, RunFailed: failed, HTTPException: unknown, ClientDisconnect: gone},
    )


def read_request(body: bytes) -> tuple[list[np.ndarray], list[Prompt]]:
    """The pictures, uint8 (height, width, 3) each, and prompts of a request. Raises ``Refused`` with what is wrong in it."""
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
    pictures = [_picture(image, i) for i, image in enumerate(images)]
    return pictures, [Prompt(text, more) for text, more in zip(prompts, metadata, strict=True)]


def _picture(encoded: Any, i: int) -> np.ndarray:
    try:
        data = base64.b64decode(encoded, validate=True)
        with warnings.catch_warnings(), Image.open(io.BytesIO(data), formats=("PNG", "JPEG")) as image:
            warnings.simplefilter("ignore")  # of bombs: the size is looked at here
            if image.width * image.height > MAX_PIXELS:
                raise Refused(413, f"images.{i} has {image.width} x {image.height} pixels: at most {MAX_PIXELS} in all")
            return np.asarray(image.convert("RGB"))
    except (binascii.Error, TypeError, ValueError, OSError, SyntaxError, Image.DecompressionBombError):
        raise Refused(422, f"images.{i} is no base64 of a PNG or JPEG file") from None


def serve(rewards: Rewards, host: str, port: int, token: str | None, max_bytes: int) -> None:
    """Serves until SIGINT or SIGTERM; port 0 takes a free one. The line with the address comes when requests are taken.

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
    print(f"serving {', '.join(rewards.terms)} on http://{shown}:{listener.getsockname()[1]}", flush=True)
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=5))
    with listener:
        server.run(sockets=[listener])
