"""Chat completions of an OpenAI-compatible endpoint: bounded requests, retries, structured outputs where there are."""

import asyncio
import json
import os
import random
import re
import time
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import aiohttp

from clara_hf.program import UsageError
from clara_hf.synthesis.backends.places import Places
from clara_hf.synthesis.backends.secrets import secrets_of
from clara_hf.synthesis.text import clean_line, clean_text


MAX_REPLY_BYTES = 4 * 2**20
# Structured outputs, best first: `auto` goes one down where the endpoint refuses.
STRUCTURES = ("json_schema", "json_object", "none")
FIRST_DELAY = 0.5
MAX_DELAY = 60.0
# So many requests in a row may fail for good by their own fault; one more, and the endpoint is taken to be broken.
TOLERATED_FAILURES = 3
# What endpoints that know no structured outputs have been seen to say beside 400 and 422.
UNKNOWN_FORMAT = (404, 500, 501)
# A reply without content comes again from most endpoints, at the full price of its tokens.
EMPTY_RETRIES = 2
# What `finish_reason` says of a reply that ends before its end: at a limit, by a filter, or by a fault of the server.
CUT_OFF = ("length", "max_tokens", "max_output_tokens", "model_length", "limit")
CUT_OFF += ("content_filter", "safety", "recitation", "abort", "error", "error_toxic", "cancelled")
# Types of the parts of a message that hold its text.
TEXT_PARTS = ("text", "output_text")
# Fields of our requests that some endpoints refuse, and how `--extra_body` mends it.
REFUSED_FIELDS = {
    "max_tokens": '{"max_tokens": null, "max_completion_tokens": N}',
    "temperature": '{"temperature": null}',
    "seed": '{"seed": null}',
}
REFUSAL = re.compile(
    r"unsupported|not support|unknown|unrecogni[sz]ed|unexpected|not permitted|not allowed|extra_", re.I
)
# A shorter key is a word for "none is needed", which a reply may hold by chance.
MIN_KEY_CHARS = 8


class RequestFailed(Exception):
    """One request has no usable reply, whatever is tried; the message is the reason that goes into the data."""


@dataclass(frozen=True)
class ChatRequest:
    """One request: `schema` is a JSON schema of the reply, `name` a word for it."""

    messages: list[dict[str, str]]
    name: str
    schema: dict[str, Any]
    temperature: float
    seed: int


@dataclass(frozen=True)
class ChatReply:
    """The text of a reply, the tokens that the endpoint counted (0 where it does not), and whether it was cut off."""

    text: str
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cut: bool = False


class _Retry(Exception):
    """A request is worth repeating: `str()` is what happened, `after` the seconds that the endpoint asked for."""

    def __init__(
        self,
        problem: str,
        after: float = 0.0,
        status: int = 0,
        level: int = -1,
        unreachable: bool = False,
        empty: bool = False,
    ):
        super().__init__(problem)
        self.after, self.limited, self.unreachable, self.empty = after, status == 429, unreachable, empty
        self.may_be_format = status in UNKNOWN_FORMAT and STRUCTURES[level] != "none"


class ChatClient:
    """Use as an async context manager; any number of tasks may call `complete` at once.

    Args:
        base_url: up to and with `/v1`.
        model: name of the model at the endpoint.
        api_key: sent as a bearer token; left out where empty.
        concurrency: requests under way at once; fewer where the endpoint says that they are too many.
        timeout: seconds that one try may take.
        max_retries: tries after the first.
        structured_outputs: `auto` or one of `STRUCTURES`.
        max_tokens: of a reply.
        extra_body: further fields of every request.

    Raises:
        UsageError: an argument cannot be used.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        api_key: str = "",
        concurrency: int = 32,
        timeout: float = 300.0,
        max_retries: int = 6,
        structured_outputs: str = "auto",
        max_tokens: int = 2048,
        extra_body: dict[str, Any] | None = None,
    ):
        self.url = endpoint(base_url)
        self.host = urlsplit(self.url).netloc
        self.model, self.max_tokens, self.extra_body = model, max_tokens, extra_body or {}
        self.max_retries, self.timeout = max_retries, timeout
        if not all("!" <= letter <= "~" for letter in api_key):
            raise UsageError("the API key holds white space or letters that no key has: set its variable again.")
        self._key = api_key
        self._adapts = structured_outputs == "auto"
        self._level = 0 if self._adapts else STRUCTURES.index(structured_outputs)
        self._takes_structure = False
        self._secrets = [secret for secret in (api_key, *secrets_of(self.extra_body)) if len(secret) >= MIN_KEY_CHARS]
        self._places = Places(concurrency)
        self._concurrency = concurrency
        self._not_before = 0.0
        self._successes = 0
        self._failures_in_a_row = 0

    async def __aenter__(self) -> "ChatClient":
        headers = {"Content-Type": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        parts = urlsplit(self.url)
        proxy = None if proxy_bypass(parts.hostname) else getproxies().get(parts.scheme)
        self._session = aiohttp.ClientSession(
            headers=headers,
            proxy=proxy,
            connector=aiohttp.TCPConnector(limit=self._concurrency),
            timeout=aiohttp.ClientTimeout(total=self.timeout),
        )
        return self

    async def __aexit__(self, *_) -> None:
        await self._session.close()

    async def complete(self, request: ChatRequest) -> ChatReply:
        """The model's reply, after as many tries as are allowed.

        Raises:
            RequestFailed: the endpoint refuses this request, or does not answer it while it answers others.
            UsageError: the endpoint does not answer, or refuses everybody.
        """
        async with self._places:
            successes = self._successes
            for attempt in range(self.max_retries + 1):
                await self._wait()
                sent = time.monotonic()
                try:
                    reply = await self._post(request)
                except _Retry as problem:
                    last = problem
                    if problem.empty and attempt >= EMPTY_RETRIES:
                        break
                    if attempt < self.max_retries:
                        delay = min(MAX_DELAY, FIRST_DELAY * 2**attempt) * random.uniform(0.5, 1.0)
                        if problem.after:
                            # The limit is the key's, not the request's: nobody asks before its end.
                            self._not_before = max(self._not_before, time.monotonic() + problem.after)
                        else:
                            await asyncio.sleep(delay)
                        if problem.limited:
                            await self._places.limit_met(sent)
                else:
                    self._successes += 1
                    self._failures_in_a_row = 0
                    self._places.reply_came()
                    return reply
            if last.may_be_format and (reply := await self._without_structure(request)):
                return reply
            if self._successes == successes:
                self._give_up(last, attempt + 1)
            raise RequestFailed(f"{last} in {attempt + 1} tries")

    def _give_up(self, last: _Retry, tries: int) -> None:
        """Stop the run where not the request but the endpoint seems to be at fault."""
        self._failures_in_a_row += 1
        if last.limited or last.unreachable or self._failures_in_a_row > TOLERATED_FAILURES:
            raise UsageError(
                f"{self.host} gave no reply in {tries} tries ({last}): see to it; the same command goes "
                "on where this one stopped."
            )

    async def _wait(self) -> None:
        while (left := self._not_before - time.monotonic()) > 0:
            await asyncio.sleep(left)

    async def _without_structure(self, request: ChatRequest) -> ChatReply | None:
        """The reply to a request without a format, once, where no format has ever been taken; `None` without one."""
        if not self._adapts or self._takes_structure:
            return None
        try:
            status, _, body = await self._send(self._body(request, "none"))
            reply = self._read(body) if status == 200 else None
        except _Retry:
            return None
        if reply:
            self._level = STRUCTURES.index("none")
            self._successes += 1
            self._failures_in_a_row = 0
        return reply

    async def _post(self, request: ChatRequest) -> ChatReply:
        """One try, repeated without a JSON schema where the endpoint does not take one."""
        refused = None
        for level in range(self._level, len(STRUCTURES)):
            status, headers, body = await self._send(self._body(request, STRUCTURES[level]))
            if status not in (400, 422):
                break
            refused = refused or f"HTTP {status}: {self._message(body)}"
            if not self._adapts:
                break
        if status == 200:
            # Only now is it known that the format was what the endpoint refused.
            self._level = max(self._level, level)
            self._takes_structure |= STRUCTURES[level] != "none"
            return self._read(body)
        if status in (404, 501) and STRUCTURES[level] != "none" and (reply := await self._without_structure(request)):
            return reply
        if status in (400, 413, 422):
            raise RequestFailed(refused or f"HTTP {status}: {self._message(body)}")
        if status in (408, 409, 425, 429) or status >= 500:
            problem = f"HTTP {status}: {self._message(body)}"
            raise _Retry(problem, retry_after(headers.get("Retry-After")), status, level)
        if status == 402:
            raise UsageError(
                f"{self.host} wants credit (HTTP 402: {self._message(body)}): add some; the same command "
                "goes on where this one stopped."
            )
        if status in (401, 403):
            raise UsageError(
                f"{self.host} refuses the API key (HTTP {status}: {self._message(body)}): "
                "set the variable that --api_key_env names."
            )
        raise UsageError(
            f"{self.url} answers HTTP {status} ({self._message(body)}): check --base_url, which usually ends in /v1, "
            f"and --model {self.model}."
        )

    def _body(self, request: ChatRequest, structure: str) -> dict[str, Any]:
        body = {
            "model": self.model,
            "messages": request.messages,
            "temperature": request.temperature,
            "max_tokens": self.max_tokens,
            "seed": request.seed,
        }
        if structure == "json_schema":
            schema = {"name": request.name, "strict": True, "schema": request.schema}
            body["response_format"] = {"type": "json_schema", "json_schema": schema}
        elif structure == "json_object":
            body["response_format"] = {"type": "json_object"}
        body |= self.extra_body
        # A field set to null is left out: some endpoints refuse fields that they do not know.
        return {name: value for name, value in body.items() if value is not None}

    async def _send(self, body: dict[str, Any]) -> tuple[int, Any, bytes]:
        data = json.dumps(body).encode()
        try:
            # A redirection could carry the key to another host.
            async with self._session.post(self.url, data=data, allow_redirects=False) as response:
                chunks, size = [], 0
                async for chunk in response.content.iter_any():
                    size += len(chunk)
                    if size > MAX_REPLY_BYTES:
                        raise RequestFailed(f"a reply of more than {MAX_REPLY_BYTES} bytes")
                    chunks.append(chunk)
                return response.status, response.headers, b"".join(chunks)
        except asyncio.TimeoutError:
            raise _Retry(f"no reply within {self.timeout:g} s") from None
        except aiohttp.ClientConnectorError as error:
            raise _Retry(self._clean(f"no connection, {error.strerror or error}"), unreachable=True) from None
        except (aiohttp.ClientError, OSError) as error:
            raise _Retry(self._clean(f"connection lost, {type(error).__name__}")) from None

    def _read(self, body: bytes) -> ChatReply:
        try:
            value = json.loads(body.decode("utf-8", "replace"))
            choice = value["choices"][0]
            text = content_of(choice["message"])
            reason = str(choice.get("finish_reason") or "").lower()
            usage = value.get("usage") or {}
            tokens = [int(usage.get(name) or 0) for name in ("prompt_tokens", "completion_tokens")]
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            raise _Retry("a reply that is no chat completion") from None
        text = self._masked(clean_text(text))
        if not text.strip():
            others = [name for name, field in choice["message"].items() if field and name not in ("role", "content")]
            beside = f" beside {', '.join(sorted(others))}" if others else ""
            raise _Retry(self._clean(f"a reply without content{beside}, finish_reason {reason!r}"), empty=True)
        return ChatReply(text, *tokens, cut=reason in CUT_OFF)

    def _message(self, body: bytes) -> str:
        """What an error's body says, in one short line without the key."""
        text = whole = body[:4000].decode("utf-8", "replace")
        try:
            value = json.loads(text)
            error = value.get("error", value) if isinstance(value, dict) else value
            text = str(error.get("message", error) if isinstance(error, dict) else error)
        except (ValueError, RecursionError):
            pass
        refused = (field for field in REFUSED_FIELDS if REFUSAL.search(whole) and re.search(rf"\b{field}\b", whole))
        cure = "".join(f" (pass --extra_body '{REFUSED_FIELDS[field]}')" for field in refused)
        return self._clean(text)[:200] + cure.replace("N}", f"{self.max_tokens}}}")

    def _clean(self, text: str) -> str:
        text = self._masked(clean_line(text))
        return text.replace(self._key, "[API key]") if self._key else text

    def _masked(self, text: str) -> str:
        """The text without the key and what `extra_body` holds of secrets: an endpoint may echo its request."""
        for secret in self._secrets:
            text = text.replace(secret, "[API key]")
        return text


def content_of(message: dict[str, Any]) -> str:
    """A message's text: a string, or the texts of its parts, without those that hold reasoning or something else."""
    content = message.get("content")
    parts = [content] if isinstance(content, dict) else content
    if isinstance(parts, list):
        parts = [{"text": part} if isinstance(part, str) else part for part in parts]
        texts = [part.get("text") or "" for part in parts if part.get("type", "text") in TEXT_PARTS]
        # Some wrap the text once more, beside annotations.
        content = "".join(text.get("value") or "" if isinstance(text, dict) else text for text in texts)
    return content if isinstance(content, str) else ""


def endpoint(base_url: str) -> str:
    """The address of chat completions under `base_url`.

    Raises:
        UsageError: it is no http address, or holds a user name, a password or a query.
    """
    parts = urlsplit(base_url.strip())
    if parts.username or parts.password or parts.query or parts.fragment:
        raise UsageError("--base_url must hold no password, key or query: give the key by the environment.")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UsageError(f"--base_url must be an address such as http://localhost:8000/v1, but is {base_url!r}.")
    return base_url.strip().rstrip("/") + "/chat/completions"


def retry_after(value: str | None) -> float:
    """Seconds of a Retry-After header, a number or a date; 0 without one."""
    if not value:
        return 0.0
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(value).timestamp() - time.time()
        except (ValueError, TypeError):
            return 0.0
    return max(0.0, seconds) if seconds < 86400 else 0.0


def key_from_environment(name: str) -> str:
    """The API key in the variable, or nothing: local servers need none."""
    return os.environ.get(name, "").strip()
