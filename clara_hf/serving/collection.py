"""Vectors and files: embeddings, reranking, search, and what the collection holds."""

import base64
import binascii
import time
from typing import Any
from uuid import uuid4

import anyio
import torch
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response

from clara_hf.serving.answers import Service
from clara_hf.serving.documents import read_bytes, read_text
from clara_hf.serving.engine import Refused
from clara_hf.serving.guards import while_there
from clara_hf.serving.library import CHUNK, FileEntry, Hit, StoredFile
from clara_hf.serving.schemas import EmbeddingRequest, FileRequest, RerankRequest, SearchRequest, texts_of, usage


def add_vectors(app: FastAPI, service: Service) -> None:
    engine, model = service.engine, service.engine.model

    @app.post("/v1/embeddings", response_model=None)
    async def embeddings(body: EmbeddingRequest, request: Request) -> Response:
        service.check_model(body.model)
        texts = [body.input] if isinstance(body.input, str) else body.input
        service.check_texts(texts, "input")
        store, by_sketch = engine.library.store, body.vector == "sketch"

        def embed() -> torch.Tensor:
            width = store.sketch_dims if by_sketch else model.config.num_memory_tokens * model.config.hidden_size
            if width is None:
                raise Refused("vector is 'sketch', but the collection has none: run clara store fit", param="vector")
            if body.dimensions not in (None, width):
                raise Refused(f"dimensions is {body.dimensions}; a {body.vector} has {width}", param="dimensions")
            is_query = body.input_type == "query"
            found = model.encode_questions(texts) if is_query else engine.compress(texts)
            if by_sketch:
                return (store.sketch_questions(found) if is_query else store.sketch_memories(found)).cpu()
            return torch.nn.functional.normalize(found.flatten(1).float(), dim=1).cpu()

        vectors = await while_there(request, engine.call(embed))
        rows = vectors.tolist()
        if body.encoding_format == "base64":
            rows = [base64.b64encode(vector.numpy().astype("<f4").tobytes()).decode() for vector in vectors]
        data = [{"object": "embedding", "index": number, "embedding": row} for number, row in enumerate(rows)]
        counts = usage(await _tokens(service, texts))
        return JSONResponse({"object": "list", "data": data, "model": service.name, "usage": counts})

    @app.post("/v1/rerank", response_model=None)
    async def rerank(body: RerankRequest, request: Request) -> Response:
        service.check_model(body.model)
        texts = texts_of(body.documents)
        service.check_texts([body.query], "query")
        service.check_texts(texts, "documents")

        def rank() -> list[tuple[int, float]]:
            found = model.retrieve(
                [body.query], engine.compress(texts), n_docs=min(body.top_n or len(texts), len(texts))
            )
            return list(zip(found.indices[0].tolist(), found.scores[0].tolist(), strict=True))

        results: list[dict[str, Any]] = [
            {"index": index, "relevance_score": score} for index, score in await while_there(request, engine.call(rank))
        ]
        if body.return_documents:
            for result in results:
                result["document"] = {"text": texts[result["index"]]}
        counts = usage(await _tokens(service, [body.query, *texts]))
        head = {"id": f"rerank-{uuid4().hex}", "model": service.name}
        return JSONResponse({**head, "results": results, "usage": counts})

    @app.post("/v1/vector_stores/{collection}/search", response_model=None)
    async def search(collection: str, body: SearchRequest, request: Request) -> Response:
        service.check_collection(collection)
        queries = [body.query] if isinstance(body.query, str) else body.query
        service.check_texts(queries, "query")
        found = await while_there(request, engine.call(engine.library.search, queries, body.max_num_results))
        best: dict[str, Hit] = {}
        for hit in sorted((hit for row in found for hit in row), key=lambda hit: -hit.score):
            best.setdefault(hit.key, hit)
        least = body.ranking_options.score_threshold if body.ranking_options else None
        hits = [hit for hit in best.values() if least is None or hit.score >= least][: body.max_num_results]
        data = [
            {
                "file_id": hit.file_id,
                "filename": hit.filename,
                "score": hit.score,
                "attributes": {"key": hit.key, "number": hit.number, "place": hit.place},
                "content": [{"type": "text", "text": hit.text}],
            }
            for hit in hits
        ]
        head = {"object": "vector_store.search_results.page", "search_query": queries}
        return JSONResponse({**head, "data": data, "has_more": False, "next_page": None})


async def _tokens(service: Service, texts: list[str]) -> int:
    tokenize = service.engine.model.processor.tokenize
    return await service.engine.call(lambda: sum(map(len, tokenize(texts))))


def add_files(app: FastAPI, service: Service) -> None:
    engine, library = service.engine, service.engine.library

    def shown(file: StoredFile) -> dict:
        return {
            "id": file.id,
            "object": "vector_store.file",
            "created_at": file.created,
            "usage_bytes": file.bytes,
            "vector_store_id": service.collection,
            "status": "completed",
            "last_error": None,
            "filename": file.name,
            "passages": file.passages,
            "attributes": file.attributes,
        }

    def shown_store(files: list[StoredFile]) -> dict:
        counts = {"in_progress": 0, "completed": len(files), "failed": 0, "cancelled": 0, "total": len(files)}
        return {
            "id": service.collection,
            "object": "vector_store",
            "created_at": service.created,
            "name": service.collection,
            "usage_bytes": sum(file.bytes for file in files),
            "file_counts": counts,
            "status": "completed",
            "last_active_at": int(time.time()),
            "metadata": {},
        }

    def writable() -> None:
        if library.read_only:
            raise Refused("this service serves its collection read-only: add to it where it is written", "conflict")

    def paged(items: list[dict]) -> dict:
        ends = {"first_id": items[0]["id"], "last_id": items[-1]["id"]} if items else {}
        return {"object": "list", "data": items, "has_more": False, "first_id": None, "last_id": None, **ends}

    async def file_or_refusal(id_: str) -> StoredFile:
        file = await engine.call(library.file, id_)
        if file is None:
            raise Refused(f"there is no file {id_!r} in {service.collection!r}", "not_found")
        return file

    @app.get("/v1/vector_stores", response_model=None)
    async def stores() -> dict:
        return paged([shown_store(await engine.call(library.files))])

    @app.get("/v1/vector_stores/{collection}", response_model=None)
    async def store(collection: str) -> dict:
        service.check_collection(collection)
        return shown_store(await engine.call(library.files))

    @app.get("/v1/vector_stores/{collection}/files", response_model=None)
    async def files(collection: str) -> dict:
        service.check_collection(collection)
        return paged([shown(file) for file in await engine.call(library.files)])

    @app.get("/v1/vector_stores/{collection}/files/{file_id}", response_model=None)
    async def file(collection: str, file_id: str) -> dict:
        service.check_collection(collection)
        return shown(await file_or_refusal(file_id))

    @app.post("/v1/vector_stores/{collection}/files", response_model=None)
    async def add(collection: str, body: FileRequest, request: Request) -> dict:
        service.check_collection(collection)
        writable()
        if body.file_id and await engine.call(library.file, body.file_id):
            raise Refused(f"file_id {body.file_id!r} is taken: remove that file first", "conflict", "file_id")
        name = body.filename or body.file_id or "text.txt"
        documents = await anyio.to_thread.run_sync(_documents, name, body)

        async def take_in() -> StoredFile:
            rows, _ = await engine.call(library.split, documents)
            for start in range(0, len(rows), CHUNK):  # others get their turn in between
                await engine.call(lambda start=start: list(library.compress(rows[start : start + CHUNK])))
            size = len(body.text.encode()) if body.text else sum(len(one.text.encode()) for one in documents)
            entry = FileEntry(name, rows, size, attributes=body.attributes or {}, id=body.file_id)
            return (await engine.call(library.record, [entry]))[0]

        added = await while_there(request, take_in())
        engine.metrics.passages.set(await engine.call(library.__len__))
        return shown(added)

    @app.delete("/v1/vector_stores/{collection}/files/{file_id}", response_model=None)
    async def remove(collection: str, file_id: str) -> dict:
        service.check_collection(collection)
        writable()
        await file_or_refusal(file_id)
        await engine.call(library.remove, file_id)
        engine.metrics.passages.set(await engine.call(library.__len__))
        return {"id": file_id, "object": "vector_store.file.deleted", "deleted": True}


def _documents(name: str, body: FileRequest) -> list:
    if body.data is None:
        return read_text(name, body.text or "")
    try:
        data = base64.b64decode(body.data, validate=True)
    except (binascii.Error, ValueError) as error:
        raise Refused(f"data is no base64 ({error})", param="data") from error
    return read_bytes(name, data)
