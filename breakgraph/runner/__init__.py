"""A forward from batch to hidden states and on to logits, by graph or eagerly."""

from breakgraph.runner.breakable_cuda_graph_runner import (
    BreakableCudaGraphRunner,
    GraphCaptureError,
)
from breakgraph.runner.buckets import Dispatch, DispatchReason
from breakgraph.runner.input_buffers import FilledBatch, PrefillInputBuffers
from breakgraph.runner.layer_stack import resolve_layer_stack
from breakgraph.runner.model_runner import ForwardResult, ModelRunner
from breakgraph.runner.prefill_graph_runner import PrefillGraphRunner

__all__ = [
    "BreakableCudaGraphRunner",
    "Dispatch",
    "DispatchReason",
    "FilledBatch",
    "ForwardResult",
    "GraphCaptureError",
    "ModelRunner",
    "PrefillGraphRunner",
    "PrefillInputBuffers",
    "resolve_layer_stack",
]
