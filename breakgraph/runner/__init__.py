"""A forward from batch to hidden states and on to logits, by graph or eagerly."""

from breakgraph.runner.breakable_cuda_graph_runner import BreakableCudaGraphRunner
from breakgraph.runner.buckets import Dispatch, DispatchReason
from breakgraph.runner.decode_cuda_graph_runner import DecodeCudaGraphRunner
from breakgraph.runner.forward_result import ForwardResult
from breakgraph.runner.full_cuda_graph_runner import FullCudaGraphRunner
from breakgraph.runner.graph_runner import GraphCaptureError, GraphRunner
from breakgraph.runner.input_buffers import (
    DecodeInputBuffers,
    FilledBatch,
    PrefillInputBuffers,
)
from breakgraph.runner.layer_stack import resolve_layer_stack
from breakgraph.runner.model_runner import ModelRunner
from breakgraph.runner.prefill_graph_runner import PrefillGraphRunner

__all__ = [
    "BreakableCudaGraphRunner",
    "DecodeCudaGraphRunner",
    "DecodeInputBuffers",
    "Dispatch",
    "DispatchReason",
    "FilledBatch",
    "ForwardResult",
    "FullCudaGraphRunner",
    "GraphCaptureError",
    "GraphRunner",
    "ModelRunner",
    "PrefillGraphRunner",
    "PrefillInputBuffers",
    "resolve_layer_stack",
]
