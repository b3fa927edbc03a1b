"""The HTTP application: one line a route; what is behind it is elsewhere."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from starlette.responses import HTMLResponse, JSONResponse, Response

from breakgraph import __version__
from breakgraph.engine.async_engine import AsyncEngine
from breakgraph.engine.sampling_params import SamplingParams
from breakgraph.server import completions, vectors
from breakgraph.server.errors import ApiError, add_handlers, refusals
from breakgraph.server.gate import Gate
from breakgraph.server.generation import merged, submit
from breakgraph.server.protocol import (
    ChatRequest,
    ClassifyRequest,
    CompletionRequest,
    EmbeddingRequest,
    ExplainRequest,
    RerankRequest,
    ScoreRequest,
    TokenizeRequest,
)
from breakgraph.server.service import Service

PAGE = Path(__file__).parent / "page" / "index.html"


def create_app(engine: AsyncEngine) -> Gate:
    """The application around a started engine, as an ASGI callable."""
    service = Service(engine)
    # No /docs: its page loads scripts from elsewhere. /openapi.json is there.
    app = FastAPI(title="breakgraph", version=__version__, docs_url=None, redoc_url=None)
    add_handlers(app)
    _add_model_routes(app, service)
    _add_info_routes(app, service)
    gate = Gate(
        app,
        api_key=engine.args.api_key,
        max_body_bytes=engine.args.max_body_bytes,
        observe=service.metrics.request,
    )
    app.state.gate = gate
    return gate


def _add_model_routes(app: FastAPI, service: Service) -> None:
    @app.post("/v1/completions")
    async def complete(request: Request, body: CompletionRequest) -> Response:
        return await completions.complete(service, body, request.scope["state"])

    @app.post("/v1/chat/completions")
    async def chat(request: Request, body: ChatRequest) -> Response:
        return await completions.chat(service, body, request.scope["state"])

    @app.post("/v1/embeddings")
    async def embed(body: EmbeddingRequest) -> JSONResponse:
        return JSONResponse(await vectors.embed(service, body))

    @app.post("/v1/score")
    async def score(body: ScoreRequest) -> JSONResponse:
        return JSONResponse(await vectors.score(service, body))

    @app.post("/v1/rerank")
    async def rerank(body: RerankRequest) -> JSONResponse:
        return JSONResponse(await vectors.rerank(service, body))

    @app.post("/classify")
    async def classify(body: ClassifyRequest) -> JSONResponse:
        return JSONResponse(await vectors.classify(service, body))

    @app.post("/tokenize")
    async def tokenize(body: TokenizeRequest) -> dict[str, Any]:
        service.check_model(body.model)
        ids = await service.text.tokenize(body.prompt, body.add_special_tokens)
        return {"tokens": ids, "count": len(ids), "max_model_len": service.context_length}

    @app.post("/explain")
    async def explain(body: ExplainRequest) -> dict[str, str]:
        service.check_model(body.model)
        prompts: list[list[int]]
        if body.num_tokens is not None:
            service.check_count(len(body.num_tokens), "num_tokens")
            if max(body.num_tokens) > service.context_length:
                raise ApiError(
                    400, f"num_tokens: the model's context is {service.context_length} tokens"
                )
            prompts = [[0] * count for count in body.num_tokens]
        else:
            prompts = await service.text.encode(body.prompt or [], "prompt")
        with refusals():
            return {"explanation": await asyncio.to_thread(service.engine.explain, prompts)}


def _add_info_routes(app: FastAPI, service: Service) -> None:
    engine, started = service.engine, int(time.time())

    def model() -> dict[str, Any]:
        return {
            "id": service.model_name,
            "object": "model",
            "created": started,
            "owned_by": "breakgraph",
            "max_model_len": service.context_length,
        }

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [model()]}

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> dict[str, Any]:
        service.check_model(name)
        return model()

    @app.get("/health")
    async def health() -> Response:
        if not engine.healthy:
            raise ApiError(503, f"the engine has failed: {engine.failure}", code="engine_dead")
        if app.state.gate.draining:
            raise ApiError(503, "this server is shutting down", code="shutting_down")
        return Response(status_code=200)

    @app.get("/health_generate")
    async def health_generate(request: Request) -> Response:
        state = request.scope["state"]
        if service.args.is_embedding or service.is_classifier:
            await service.vectors([[0]])
        else:
            params = [SamplingParams(max_new_tokens=1, temperature=0.0)]
            choices = submit(engine, [[0]], params, state["running"])
            async for _ in merged(choices, service.metrics, state["began"]):
                pass
        return Response(status_code=200)

    @app.get("/get_server_info")
    async def info() -> dict[str, Any]:
        args = dataclasses.asdict(service.args)
        args["api_key"] = None if args["api_key"] is None else "set"
        return {"version": __version__, "args": args, **service.status()}

    @app.get("/metrics")
    async def metrics() -> Response:
        return service.metrics.response()

    @app.get("/")
    async def page() -> Response:
        return HTMLResponse(PAGE.read_text(encoding="utf-8"), headers=PAGE_HEADERS)


# The page reaches nothing but this server, and nothing may frame it.
PAGE_HEADERS = {
    "cache-control": "no-cache",
    "content-security-policy": "default-src 'none'; connect-src 'self'; img-src data:; "
    "style-src 'unsafe-inline'; script-src 'unsafe-inline'; frame-ancestors 'none'",
}
