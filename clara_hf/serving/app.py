"""The service: OpenAI's endpoints over one model and one collection, and a page."""

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import anyio
from fastapi import FastAPI
from fastapi.responses import FileResponse, JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from clara_hf.serving.answers import Service, add_answers
from clara_hf.serving.collection import add_files, add_vectors
from clara_hf.serving.engine import Refused
from clara_hf.serving.guards import add_error_handlers
from clara_hf.serving.schemas import ErrorReply, FeedbackRequest


PAGE = Path(__file__).parent / "templates" / "page.html"
FEEDBACK_CANDIDATES = 20


def build_app(service: Service, page: bool) -> FastAPI:
    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await anyio.to_thread.run_sync(service.engine.close)

    errors: dict[int | str, dict[str, Any]] = {"4XX": {"model": ErrorReply}, "5XX": {"model": ErrorReply}}
    app = FastAPI(title="CLaRa", version="1", lifespan=lifespan, docs_url=None, redoc_url=None, responses=errors)
    add_error_handlers(app)

    add_answers(app, service)
    add_vectors(app, service)
    add_files(app, service)
    _add_surroundings(app, service, page)
    return app


def _add_surroundings(app: FastAPI, service: Service, page: bool) -> None:
    engine = service.engine
    entry = {"id": service.name, "object": "model", "created": service.created, "owned_by": "clara"}

    @app.get("/v1/models", response_model=None)
    async def models() -> dict:
        return {"object": "list", "data": [entry]}

    @app.get("/v1/models/{name:path}", response_model=None)
    async def model(name: str) -> dict:
        service.check_model(name)
        return entry

    @app.get("/health", response_model=None)
    async def health() -> dict:
        return {"status": "ok"}

    @app.get("/ready", response_model=None)
    async def ready() -> Response:
        return JSONResponse({"ready": engine.is_ready}, 200 if engine.is_ready else 503)

    @app.get("/metrics", response_model=None)
    async def metrics() -> Response:
        return Response(generate_latest(engine.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    @app.post("/v1/feedback", response_model=None)
    async def feedback(body: FeedbackRequest) -> dict:
        if service.feedback is None:
            raise Refused("this service keeps no feedback: start it with --feedback FILE", "conflict")
        service.check_texts([body.question], "question")
        hits = (await engine.call(engine.library.search, [body.question], FEEDBACK_CANDIDATES))[0]
        right = body.answer if body.rating == "up" else body.correction
        row = {"id": uuid4().hex, "question": body.question, "answers": [right], "docs": [hit.text for hit in hits]}
        if right is None or not right.strip() or not hits:
            # Nothing to learn from by the answer's likelihood: kept apart, for people to look at.
            row |= {"answers": [], "rejected": body.answer}
        target = service.feedback if row["answers"] else service.feedback.with_suffix(".rejected.jsonl")
        await engine.call(_append, target, row)
        return {"object": "feedback", "id": row["id"], "trains": bool(row["answers"])}

    if page:

        @app.get("/", response_model=None)
        async def index() -> Response:
            policy = (
                "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:; "
                "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
            )
            headers = {"content-security-policy": policy, "x-content-type-options": "nosniff"}
            return FileResponse(PAGE, headers=headers, media_type="text/html")


def _append(file: Path, row: dict) -> None:
    with open(file, "a", encoding="utf-8") as out:
        out.write(json.dumps(row, ensure_ascii=False) + "\n")
