"""Embeddings, scores, ranks and classes: one forward a text, no decoding."""

from __future__ import annotations

import base64
import math
import struct
import time
import uuid
from collections.abc import Sequence
from typing import Any

from breakgraph.server.errors import ApiError
from breakgraph.server.protocol import (
    ClassifyRequest,
    EmbeddingRequest,
    RerankRequest,
    ScoreRequest,
)
from breakgraph.server.service import Service


async def embed(service: Service, request: EmbeddingRequest) -> dict[str, Any]:
    """Answer ``POST /v1/embeddings``."""
    prompts = await _prompts(service, request.model, request.input, "input")
    vectors = await service.vectors(prompts)
    written: list[Any] = vectors
    if request.encoding_format == "base64":  # little-endian float32, as the openai client reads it
        written = [base64.b64encode(struct.pack(f"<{len(v)}f", *v)).decode() for v in vectors]
    return {
        "object": "list",
        "model": service.model_name,
        "data": [
            {"object": "embedding", "index": index, "embedding": vector}
            for index, vector in enumerate(written)
        ],
        "usage": _usage(prompts),
    }


async def score(service: Service, request: ScoreRequest) -> dict[str, Any]:
    """Answer ``POST /v1/score``: probabilities of the labels, of the vocabulary or themselves."""
    query, items = request.query, request.items
    if any(isinstance(item, str) is not isinstance(query, str) for item in items):
        raise ApiError(400, "query and items must both be texts, or both token ids", param="items")
    joined = [item + query if request.item_first else query + item for item in items]
    prompts = await _prompts(service, request.model, joined, "items")
    rows = await service.label_logprobs(prompts, request.label_token_ids)
    return {
        "object": "scoring",
        "model": service.model_name,
        "scores": [
            _softmax(row) if request.apply_softmax else [math.exp(v) for v in row] for row in rows
        ],
        "usage": _usage(prompts),
    }


async def rerank(service: Service, request: RerankRequest) -> dict[str, Any]:
    """Answer ``POST /v1/rerank``, the best first.

    A classifier of one or two labels reads query and document together; an embedding model
    compares their vectors.
    """
    service.check_model(request.model)
    documents = request.documents
    if service.is_classifier:
        service.check_count(len(documents), "documents")
        prompts = await service.text.encode_pairs(request.query, documents)
        rows = await service.vectors(prompts)
        relevance = [_relevance(row) for row in rows]
    else:
        prompts = await _prompts(service, None, [request.query, *documents], "documents")
        query, *vectors = await service.vectors(prompts)
        relevance = [sum(a * b for a, b in zip(query, v, strict=True)) for v in vectors]
    order = sorted(range(len(documents)), key=lambda index: -relevance[index])
    results: list[dict[str, Any]] = []
    for index in order[: request.top_n]:
        result: dict[str, Any] = {"index": index, "relevance_score": relevance[index]}
        if request.return_documents:
            result["document"] = {"text": documents[index]}
        results.append(result)
    return {
        "id": f"rerank-{uuid.uuid4().hex}",
        "model": service.model_name,
        "results": results,
        "usage": _usage(prompts),
    }


async def classify(service: Service, request: ClassifyRequest) -> dict[str, Any]:
    """Answer ``POST /classify``."""
    if not service.is_classifier:
        raise ApiError(400, "this model has no classes: /classify needs a sequence classifier")
    prompts = await _prompts(service, request.model, request.input, "input")
    rows = [_softmax(row) for row in await service.vectors(prompts)]
    names = service.model_config.id2label
    return {
        "id": f"classify-{uuid.uuid4().hex}",
        "object": "list",
        "created": int(time.time()),
        "model": service.model_name,
        "data": [
            {
                "index": index,
                "label": names.get(best := max(range(len(row)), key=row.__getitem__), str(best)),
                "probs": row,
                "num_classes": len(row),
            }
            for index, row in enumerate(rows)
        ],
        "usage": _usage(prompts),
    }


async def _prompts(
    service: Service, model: str | None, texts: Sequence[Any], param: str
) -> list[list[int]]:
    service.check_model(model)
    service.check_count(len(texts), param)
    return await service.text.encode(texts, param)


def _relevance(logits: Sequence[float]) -> float:
    """The probability of relevance: of the only label, or of the second of two."""
    if len(logits) == 1:
        return 1 / (1 + math.exp(-logits[0])) if logits[0] > -700 else 0.0
    if len(logits) == 2:
        return _softmax(logits)[1]
    raise ApiError(400, f"a classifier of {len(logits)} labels cannot rank; one or two can")


def _softmax(values: Sequence[float]) -> list[float]:
    top = max(values)
    if top == -math.inf:  # no label can follow: none is likelier
        return [1 / len(values)] * len(values)
    weights = [math.exp(value - top) for value in values]
    return [weight / sum(weights) for weight in weights]


def _usage(prompts: Sequence[Sequence[int]]) -> dict[str, int]:
    tokens = sum(map(len, prompts))
    return {"prompt_tokens": tokens, "completion_tokens": 0, "total_tokens": tokens}
