"""The offline engine: prompts in; logits, texts or embeddings out."""

from breakgraph.engine.engine import Engine
from breakgraph.engine.results import GenerateResult, PrefillResult
from breakgraph.engine.statistics import Statistics

__all__ = ["Engine", "GenerateResult", "PrefillResult", "Statistics"]
