"""Breakable graphs for any torch code; knows nothing of models or batches."""

from breakgraph.graph.audit import CaptureAudit
from breakgraph.graph.breakable_graph import (
    BreakableCUDAGraph,
    BreakableCUDAGraphCapture,
    break_graph,
    eager_on_graph,
    enable_breakable_cuda_graph,
    is_in_breakable_cuda_graph,
)
from breakgraph.graph.errors import (
    BreakableGraphError,
    ForeignReadError,
    LayoutChangedError,
    RefusedArgumentError,
    RefusedOpError,
    UnjoinedStreamError,
)
from breakgraph.graph.inspect import StepInfo, StepTiming, describe, format_table, time_steps
from breakgraph.graph.tape import TapePool
from breakgraph.graph.trace import OpSpan, StepTrace, Trace, Window, trace_graph, trace_run

__all__ = [
    "BreakableCUDAGraph",
    "BreakableCUDAGraphCapture",
    "BreakableGraphError",
    "CaptureAudit",
    "ForeignReadError",
    "LayoutChangedError",
    "OpSpan",
    "RefusedArgumentError",
    "RefusedOpError",
    "StepInfo",
    "StepTiming",
    "StepTrace",
    "TapePool",
    "Trace",
    "UnjoinedStreamError",
    "Window",
    "break_graph",
    "describe",
    "eager_on_graph",
    "enable_breakable_cuda_graph",
    "format_table",
    "is_in_breakable_cuda_graph",
    "time_steps",
    "trace_graph",
    "trace_run",
]
