"""What every handler works with: one engine, its texts and its metrics, under one name."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Coroutine, Sequence
from typing import Any, TypeVar

from breakgraph.engine.async_engine import AsyncEngine
from breakgraph.models import SequenceClassifier
from breakgraph.server.errors import ApiError, refusals
from breakgraph.server.metrics import ServerMetrics
from breakgraph.server.text import Text

T = TypeVar("T")


class Service:
    """The engine as handlers see it.

    Attributes:
        engine: started.
        args: its flags.
        text: texts to tokens and back.
        metrics: what is counted.
        model_name: what requests call the model.
        context_length: most tokens of a prompt and its continuation.
        model_config: what the checkpoint says of itself.
        is_classifier: whether its vectors are class logits.
    """

    def __init__(self, engine: AsyncEngine) -> None:
        self.engine, self.args = engine, engine.args
        runner = engine.runner
        self.metrics = ServerMetrics(engine)
        self.model_name = self.args.served_model_name or self.args.model_path
        self.context_length: int = runner.context_length
        self.text = Text(
            engine.tokenizer, runner.vocab_size, self.context_length, self.args.chat_template
        )
        self.model_config: Any = runner.model.config
        self.is_classifier = isinstance(runner.model, SequenceClassifier)

    def check_model(self, name: str | None) -> None:
        """Refuse a request that asks for another model."""
        if name not in (None, "", self.model_name):
            raise ApiError(
                404,
                f"the model {name!r} is not served here; this is {self.model_name!r}",
                param="model",
                code="model_not_found",
            )

    def check_count(self, count: int, what: str) -> None:
        """Refuse a request that asks for too much at once."""
        if count > self.args.max_choices:
            raise ApiError(
                400,
                f"{what} makes {count}; this server takes {self.args.max_choices} in one request "
                "(--max-choices)",
            )

    def status(self) -> dict[str, Any]:
        """What is served, how it is doing and what the last prefill was."""
        runner, graphs = self.engine.runner, self.engine.runner.prefill_graph_runners
        now = dataclasses.asdict(self.engine.snapshot())
        vectors = self.args.is_embedding or self.is_classifier
        return {
            "healthy": self.engine.healthy,
            "model": {
                "name": self.model_name,
                "architecture": type(runner.model).__name__,
                "dtype": str(runner.dtype).removeprefix("torch."),
                "device": str(runner.device),
                "layers": self.model_config.num_hidden_layers,
                "context_length": self.context_length,
                "serves": "vectors" if vectors else "text",
                "tokenizer": self.text.tokenizer is not None,
            },
            "graphs": {
                "buckets": sorted({bucket for each in graphs for bucket in each.buckets}),
                "memory_bytes": now.pop("graph_memory_bytes"),
                "capture_seconds": sum(each.capture_seconds for each in graphs),
            },
            "requests": {"running": now.pop("running"), "queued": now.pop("queued")},
            "kv_tokens": {
                name: now.pop(f"{name}_kv_tokens") for name in ("free", "used", "cached")
            },
            "last_prefill": now.pop("last_prefill"),
            "statistics": now,
        }

    async def vectors(self, prompts: Sequence[list[int]]) -> list[list[float]]:
        """An embedding, or class logits, of each prompt."""
        return await _all([self.engine.encode(ids) for ids in prompts])

    async def label_logprobs(
        self, prompts: Sequence[list[int]], labels: list[int]
    ) -> list[list[float]]:
        """The log-probabilities of the labels after each prompt."""
        return await _all([self.engine.score(ids, labels) for ids in prompts])


async def _all(calls: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """All results, or the first error, with what still runs cancelled."""
    tasks = [asyncio.ensure_future(call) for call in calls]
    try:
        with refusals():
            return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
