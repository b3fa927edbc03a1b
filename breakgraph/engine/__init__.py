"""Prompts in; logits, texts or embeddings out: offline by lists, or as streams for a server."""

from breakgraph.engine.async_engine import AsyncEngine, EngineSnapshot
from breakgraph.engine.engine import Engine
from breakgraph.engine.errors import EngineDeadError, QueueFullError, RequestFailedError
from breakgraph.engine.request import TokenLogprob
from breakgraph.engine.results import GenerateResult, PrefillResult
from breakgraph.engine.sampling_params import SamplingParams
from breakgraph.engine.statistics import LastPrefill, Statistics
from breakgraph.engine.stream import Output, Stream
from breakgraph.engine.wrapping import wrap

__all__ = [
    "AsyncEngine",
    "Engine",
    "EngineDeadError",
    "EngineSnapshot",
    "GenerateResult",
    "LastPrefill",
    "Output",
    "PrefillResult",
    "QueueFullError",
    "RequestFailedError",
    "SamplingParams",
    "Statistics",
    "Stream",
    "TokenLogprob",
    "wrap",
]
