"""Chat and text completions: a question, its passages, and the answer, at once or as it is written."""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from clara_hf.serving.decoding import Decoding
from clara_hf.serving.engine import Ask, Done, Engine, Found, Piece, Refused
from clara_hf.serving.guards import while_there
from clara_hf.serving.library import Hit
from clara_hf.serving.schemas import ChatRequest, CompletionRequest, Sampling, texts_of, usage


@dataclass(frozen=True)
class Service:
    """What the endpoints share: names under which model and collection are known, and who answers."""

    name: str
    collection: str
    engine: Engine
    answerer: Any  # the engine itself, or one that decodes elsewhere; both have `answer(ask)`
    feedback: Path | None
    created: int

    def check_model(self, name: str) -> None:
        if name != self.name:
            raise Refused(f"there is no model {name!r}; this service has {self.name!r}", "model_not_found", "model")

    def check_collection(self, name: str) -> None:
        if name != self.collection:
            raise Refused(f"there is no vector store {name!r}; this service has {self.collection!r}", "not_found")

    def check_texts(self, texts: list[str], field: str) -> None:
        try:
            self.engine.model.processor.check_user_texts(texts, field)
        except (ValueError, TypeError) as error:
            raise Refused(str(error), param=field) from error

    def ask(self, request: Sampling, question: str, field: str, max_tokens: int | None) -> Ask:
        self.check_texts([question], field)
        documents = None if request.documents is None else texts_of(request.documents)
        if documents is not None:
            self.check_texts(documents, "documents")
        stop = [request.stop] if isinstance(request.stop, str) else request.stop or []
        given: dict[str, Any] = {
            "temperature": request.temperature,
            "top_p": request.top_p,
            "max_tokens": max_tokens,
            "n": request.n,
        }
        given = {name: value for name, value in given.items() if value is not None}
        decoding = Decoding(**given, seed=request.seed, stop=tuple(stop))
        n_docs = request.n_docs or self.engine.model.config.top_k
        return Ask(question, n_docs, decoding, documents, request.query_words, bool(request.stream))


@dataclass(frozen=True)
class Answer:
    found: Found
    choices: list[Done]


async def _whole(answerer, ask: Ask) -> Answer:
    found, done = None, []
    async for event in answerer.answer(ask):
        if isinstance(event, Found):
            found = event
        elif isinstance(event, Done):
            done.append(event)
    return Answer(found, sorted(done, key=lambda one: one.choice))


def add_answers(app: FastAPI, service: Service) -> None:
    @app.post("/v1/chat/completions", response_model=None)
    async def chat(body: ChatRequest, request: Request) -> Response:
        service.check_model(body.model)
        ask = service.ask(body, body.question, "messages", body.max_completion_tokens or body.max_tokens)
        head = _head("chatcmpl", "chat.completion", service)
        if body.stream:
            return await _streamed(service, ask, request, body, head, _chat_delta, body.unread)
        answer = await while_there(request, _whole(service.answerer, ask))
        choices = [
            {
                "index": done.choice,
                "message": {
                    "role": "assistant",
                    "content": done.text,
                    "refusal": None,
                    "annotations": _annotations(answer.found.hits),
                },
                "logprobs": None,
                "finish_reason": done.finish_reason,
            }
            for done in answer.choices
        ]
        counts = _count(service, [answer])
        return JSONResponse({**head, "choices": choices, "usage": counts, "clara": _source(answer.found, body.unread)})

    @app.post("/v1/completions", response_model=None)
    async def completions(body: CompletionRequest, request: Request) -> Response:
        service.check_model(body.model)
        prompts = [body.prompt] if isinstance(body.prompt, str) else body.prompt
        head = _head("cmpl", "text_completion", service)
        asks = [service.ask(body, prompt, "prompt", body.max_tokens) for prompt in prompts]
        if body.stream:
            if len(asks) > 1:
                raise Refused("stream=true answers one prompt: send several requests", param="prompt")
            return await _streamed(service, asks[0], request, body, head, _completion_delta, None)

        work = asyncio.gather(*(_whole(service.answerer, ask) for ask in asks))
        answers = await while_there(request, work)
        rows = ((number, done) for number, answer in enumerate(answers) for done in answer.choices)
        choices = [
            {
                "index": number * asks[0].decoding.n + done.choice,
                "text": done.text,
                "logprobs": None,
                "finish_reason": done.finish_reason,
            }
            for number, done in rows
        ]
        sources = [_source(answer.found, None) for answer in answers]
        extension = sources[0] if len(sources) == 1 else sources
        return JSONResponse({**head, "choices": choices, "usage": _count(service, answers), "clara": extension})


def _head(prefix: str, kind: str, service: Service) -> dict:
    return {"id": f"{prefix}-{uuid4().hex}", "object": kind, "created": int(time.time()), "model": service.name}


def _source(found: Found, unread: str | None) -> dict:
    """The extension field: passages in the order of their slots, words of the query, what was not read."""
    words = {"query_words": found.words} if found.words else {}
    note = {"note": unread} if unread else {}
    return {"documents": [asdict(hit) for hit in found.hits], **words, **note}


def _annotations(hits: list[Hit]) -> list[dict]:
    return [
        {"type": "file_citation", "file_id": hit.file_id, "filename": hit.filename, "index": slot}
        for slot, hit in enumerate(hits)
        if hit.file_id
    ]


def _count(service: Service, answers: list[Answer]) -> dict:
    prompt = sum(answer.found.prompt_tokens for answer in answers)
    service.engine.metrics.tokens.labels("prompt").inc(prompt)
    return usage(prompt, sum(done.tokens for answer in answers for done in answer.choices))


def _chat_delta(choice: int, text: str | None, reason: str | None, found: Found | None) -> dict:
    delta: dict[str, Any] = {} if text is None else {"content": text}
    if found:
        delta = {"role": "assistant", "content": "", "annotations": _annotations(found.hits)}
    return {"index": choice, "delta": delta, "logprobs": None, "finish_reason": reason}


def _completion_delta(choice: int, text: str | None, reason: str | None, found: Found | None) -> dict:
    return {"index": choice, "text": text or "", "logprobs": None, "finish_reason": reason}


async def _streamed(service: Service, ask: Ask, request: Request, body: Sampling, head, delta, unread) -> Response:
    events = service.answerer.answer(ask)
    # What refuses the request is told by its status; from here on, only in the stream.
    found: Found = await while_there(request, anext(events))
    head = {**head, "object": head["object"] + (".chunk" if head["object"].startswith("chat") else "")}

    async def chunks() -> AsyncIterator[str]:
        answer = Answer(found, [])
        try:
            for choice in range(ask.decoding.n):
                first = {**head, "choices": [delta(choice, None, None, found)], "clara": _source(found, unread)}
                yield _line(first)
            async for event in events:
                if isinstance(event, Piece):
                    yield _line({**head, "choices": [delta(event.choice, event.text, None, None)]})
                else:
                    answer.choices.append(event)
                    yield _line({**head, "choices": [delta(event.choice, None, event.finish_reason, None)]})
            counts = _count(service, [answer])
            if body.stream_options and body.stream_options.include_usage:
                yield _line({**head, "choices": [], "usage": counts})
        except Exception:
            text = "the answer broke off inside the service: see its log"
            yield _line({"error": {"message": text, "type": "server_error", "param": None, "code": None}})
        finally:
            ask.cancelled = True
        yield "data: [DONE]\n\n"

    headers = {"cache-control": "no-store", "x-accel-buffering": "no"}
    return StreamingResponse(chunks(), media_type="text/event-stream", headers=headers)


def _line(value: dict) -> str:
    return f"data: {json.dumps(value)}\n\n"
