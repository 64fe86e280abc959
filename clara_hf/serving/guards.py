"""What every request passes: its key, size and time are checked, and it is counted and logged without contents."""

import hashlib
import hmac
import json
import sys
import time
from collections.abc import Awaitable
from pathlib import Path
from typing import Any
from uuid import uuid4

import anyio
from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from clara_hf.serving.documents import Unreadable
from clara_hf.serving.engine import Busy, Metrics, Refused, Unavailable


GONE = 499  # what nginx writes for a client that did not wait
OPEN = ("/", "/health", "/ready", "/metrics")


class ClientGone(Exception):
    """The client went away before its answer was ready."""


class Keys:
    """Keys of a file, one per line; compared by their digests, in constant time, each with all of them.

    Raises:
        ValueError: the file has no key, or one with fewer than 16 characters.
    """

    def __init__(self, file: str | Path):
        lines = (line.strip() for line in Path(file).read_text(encoding="utf-8").splitlines())
        keys = [line for line in lines if line and not line.startswith("#")]
        if not keys:
            raise ValueError(f"--api-key-file {file} holds no key: write one on each line")
        if short := [number for number, key in enumerate(keys, start=1) if len(key) < 16]:
            raise ValueError(f"--api-key-file {file}: key {short[0]} has fewer than 16 characters: use a longer one")
        self._digests = [_digest(key) for key in keys]

    def name_of(self, header: str) -> str | None:
        """A name for the key in an Authorization header, to log; `None` if it is none of ours."""
        scheme, _, key = header.partition(" ")
        given = _digest(key.strip())
        matches = [hmac.compare_digest(given, known) for known in self._digests]
        return given.hex()[:8] if any(matches) and scheme.lower() == "bearer" else None


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


class Guard:
    """The outermost layer. Bodies over `max_body` bytes get 413, slow ones 408, answers that take too long 504."""

    def __init__(self, app: ASGIApp, keys: Keys | None, max_body: int, body_seconds: float, seconds: float, metrics):
        self.app, self.keys, self.max_body = app, keys, max_body
        self.body_seconds, self.seconds = body_seconds, seconds
        self.metrics: Metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began, status = time.monotonic(), 0
        identity = uuid4().hex
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        key = self.keys.name_of(headers.get("authorization", "")) if self.keys else None

        async def told(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", identity.encode())]
            await send(message)

        try:
            if self.keys and key is None and scope["path"] not in OPEN:
                refusal = error_response(401, "give a valid key: Authorization: Bearer KEY", code="invalid_api_key")
                refusal.headers["www-authenticate"] = "Bearer"
                await refusal(scope, receive, told)
            elif _length(headers.get("content-length")) > self.max_body:
                await self._too_large()(scope, receive, told)
            else:
                with anyio.fail_after(self.seconds):
                    await self.app(scope, self._limited(receive), told)
        except TimeoutError:
            if not status:
                text = f"the answer took longer than {self.seconds:g} s: ask for less, or try again later"
                await error_response(504, text, kind="server_error")(scope, receive, told)
        except ClientGone:
            status = GONE
        finally:
            self._log(scope, status, time.monotonic() - began, identity, key)

    def _too_large(self) -> JSONResponse:
        return error_response(413, f"the body is larger than {self.max_body} bytes: send less at once")

    def _limited(self, receive: Receive) -> Receive:
        size, until, complete = 0, time.monotonic() + self.body_seconds, False

        async def limited() -> Message:
            nonlocal size, complete
            if complete:
                return await receive()
            try:
                with anyio.fail_after(max(until - time.monotonic(), 0.001)):
                    message = await receive()
            except TimeoutError:
                raise HTTPException(408, f"the body did not arrive within {self.body_seconds:g} s") from None
            size += len(message.get("body", b""))
            complete = not message.get("more_body", False)
            if size > self.max_body:
                raise HTTPException(413, f"the body is larger than {self.max_body} bytes: send less at once")
            return message

        return limited

    def _log(self, scope: Scope, status: int, seconds: float, identity: str, key: str | None) -> None:
        route = getattr(scope.get("route"), "path", "other")
        self.metrics.requests.labels(route, str(status)).inc()
        self.metrics.seconds.labels(route).observe(seconds)
        client = scope.get("client")
        line = {
            "time": round(time.time(), 3),
            "client": client[0] if client else None,
            "method": scope["method"],
            "route": route,
            "status": status,
            "ms": round(1000 * seconds, 1),
            "id": identity,
            "key": key,
        }
        print(json.dumps(line), file=sys.stderr, flush=True)


async def while_there(request: Request, work: Awaitable) -> Any:
    """The result of `work`, which is cancelled when the client goes away.

    Raises:
        ClientGone: it did.
    """
    result, gone = None, False
    async with anyio.create_task_group() as tasks:

        async def watch() -> None:
            nonlocal gone
            while (await request.receive())["type"] != "http.disconnect":
                pass
            gone = True
            tasks.cancel_scope.cancel()

        tasks.start_soon(watch)
        try:
            result = await work
        except Exception as error:  # out of the group, which would wrap it
            result = error
        tasks.cancel_scope.cancel()
    if gone and result is None:
        raise ClientGone
    if isinstance(result, Exception):
        raise result
    return result


def _length(header: str | None) -> int:
    return int(header) if header and header.isascii() and header.isdigit() and len(header) < 20 else 0


def error_response(
    status: int, message: str, kind: str = "invalid_request_error", code: str | None = None, param: str | None = None
) -> JSONResponse:
    """An error in OpenAI's shape."""
    error = {"message": _clean(message), "type": kind, "param": param and _clean(param), "code": code}
    return JSONResponse({"error": error}, status)


def _clean(text: str) -> str:
    """One line without halves of surrogate pairs: what a client sent must not break the reply about it."""
    return " ".join(text.encode("utf-8", "backslashreplace").decode().split())


async def _validation_error(request: Request, error: RequestValidationError) -> JSONResponse:
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"] if part != "body")[:200]
    reason = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        reason = "this field is not supported: leave it out"
    elif first["type"] == "json_invalid":
        place, reason = "", f"the body is no valid JSON ({first.get('ctx', {}).get('error', '')})"
    text = f"{place}: {reason}" if place else reason
    return error_response(400, text[:600], param=place or None)


def add_error_handlers(app: FastAPI) -> None:
    """One sentence in OpenAI's shape for whatever is wrong with a request."""
    app.exception_handler(RequestValidationError)(_validation_error)

    @app.exception_handler(StarletteHTTPException)
    async def http_error(request: Request, error: StarletteHTTPException) -> JSONResponse:
        response = error_response(error.status_code, str(error.detail))
        response.headers.update(error.headers or {})
        return response

    @app.exception_handler(Refused)
    async def refused(request: Request, error: Refused) -> JSONResponse:
        status = 404 if error.code in ("model_not_found", "not_found") else 409 if error.code == "conflict" else 400
        return error_response(status, str(error), code=error.code, param=error.param)

    @app.exception_handler(Unreadable)
    async def unreadable(request: Request, error: Unreadable) -> JSONResponse:
        return error_response(400, f"the file cannot be taken in: {error}", code="unreadable_file")

    @app.exception_handler(ClientGone)
    async def gone(request: Request, error: ClientGone) -> Response:
        return Response(status_code=GONE)

    @app.exception_handler(Busy)
    async def busy(request: Request, error: Busy) -> JSONResponse:
        response = error_response(429, str(error), kind="rate_limit_error", code="queue_full")
        response.headers["retry-after"] = str(error.seconds)
        return response

    @app.exception_handler(Unavailable)
    async def unavailable(request: Request, error: Unavailable) -> JSONResponse:
        return error_response(502, str(error), kind="server_error")

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> JSONResponse:
        return error_response(500, "the request failed inside the service: see its log", kind="server_error")
