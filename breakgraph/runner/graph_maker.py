"""Makes the graph runners of a model: what they share, and what becomes of a capture that fails.

All of them take their memory from one pool and read the same static tensors. A failed capture is
voted on: either every rank has the graphs or none has.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from breakgraph.attention import AttentionBackend, PagedDecodeBackend
from breakgraph.distributed import TensorParallelGroup
from breakgraph.forward import ForwardMode
from breakgraph.models import PrefillModel
from breakgraph.models.transformers_impl import TransformersModel
from breakgraph.runner.breakable_cuda_graph_runner import BreakableCudaGraphRunner
from breakgraph.runner.decode_cuda_graph_runner import DecodeCudaGraphRunner
from breakgraph.runner.graph_runner import GraphCaptureError, GraphRunner, new_pool
from breakgraph.runner.input_buffers import DecodeInputBuffers, PrefillInputBuffers

if TYPE_CHECKING:
    from breakgraph.server_args import ServerArgs

logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class GraphMaker:
    """Captures the layer stack as the flags say.

    Attributes:
        args: the flags.
        model: whose stack it is.
        stack: what is captured; None where the model offers none.
        static_tensors: what segments may read besides inputs and plans.
        context_length: the longest sequence, in tokens.
        dtype: of the hidden states.
        device: of the model.
        group: the ranks that capture together.
        not_captured: modes that run eagerly because their capture failed.
    """

    args: ServerArgs
    model: PrefillModel
    stack: nn.Module | None
    static_tensors: Sequence[torch.Tensor]
    context_length: int
    dtype: torch.dtype
    device: torch.device
    group: TensorParallelGroup
    not_captured: set[ForwardMode] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._options: dict[str, Any] = {
            "context_length": self.context_length,
            "hidden_size": self.model.hidden_size,
            "dtype": self.dtype,
            "device": self.device,
            "pool": new_pool(self.device),
            "debug": self.args.debug_cuda_graph,
            "group": self.group,
        }

    def prefill(
        self,
        backend: AttentionBackend,
        buffers: PrefillInputBuffers,
        plan: Sequence[torch.Tensor] = (),
        max_tokens: int | None = None,
    ) -> BreakableCudaGraphRunner | None:
        """A graph for each token bucket; None where there are to be none.

        Args:
            backend: of the mixers.
            buffers: the static inputs.
            plan: static tensors of the backend that segments may read.
            max_tokens: of the largest bucket; None for what the buffers hold.

        Raises:
            GraphCaptureError: a bucket cannot be captured, and that is to be an error.
        """
        if self.args.cuda_graph_backend_prefill == "disabled" or self.stack is None:
            return None
        given = self.args.piecewise_cuda_graph_tokens or ()
        most = min(buffers.max_tokens, max_tokens or buffers.max_tokens)
        runner = BreakableCudaGraphRunner(
            self.stack,
            [*self.static_tensors, *plan],
            buffers=buffers,
            attn_backend=backend,
            buckets=sorted({min(bucket, most) for bucket in given}),
            max_padding=self.args.max_prefill_padding,
            **self._options,
        )
        if not self._capture(runner, ForwardMode.PREFILL):
            return None
        dispatch = self.args.prefill_dispatch
        measured = dispatch == "measured" or (dispatch == "auto" and self.device.type == "cuda")
        if measured and not runner.debug:
            runner.measure()
        return runner

    def decode(
        self,
        paged: PagedDecodeBackend | None,
        backend: AttentionBackend | None,
        buffers: DecodeInputBuffers,
    ) -> DecodeCudaGraphRunner | None:
        """A graph for each batch size; None where there are to be none.

        Args:
            paged: attends through its mirror of the request table.
            backend: of all mixers, ``paged`` among them.
            buffers: the static inputs.

        Raises:
            GraphCaptureError: a size cannot be captured, and that is to be an error.
        """
        asked, limits = self.args.cuda_graph_backend_decode, self.model.decode_limits
        if asked == "disabled" or paged is None or backend is None or self.stack is None:
            return None
        if asked == "full" and limits:
            logger.info(
                "decode graphs break where attention is limited (%s), which no segment can hold",
                limits,
            )
        runner = DecodeCudaGraphRunner(
            self.stack,
            [*self.static_tensors, paged.mirror.slots],
            buffers=buffers,
            attn_backend=backend,
            buckets=self.args.cuda_graph_bs or (),
            breaks=asked == "breakable" or bool(limits),
            **self._options,
        )
        return runner if self._capture(runner, ForwardMode.DECODE) else None

    def _capture(self, runner: GraphRunner, mode: ForwardMode) -> bool:
        """Whether all buckets are captured, on every rank; False where the model then runs eagerly,
        with a warning: it is a class of transformers that does what no graph can hold, or
        --cuda-graph-failure says so."""
        while True:
            failure = None
            try:
                runner.capture()
            except GraphCaptureError as error:
                failure = error
            causes = self.group.vote(None if failure is None else str(failure))
            if not causes:
                return True
            runner.drop()
            if failure is None:
                told = "; ".join(f"rank {rank}: {cause}" for rank, cause in causes.items())
                failure = GraphCaptureError(f"another rank could not capture: {told}")
            logger.warning("%s", failure)
            if self.model.try_otherwise():
                continue
            asked = self.args.cuda_graph_failure
            foreign = asked == "auto" and isinstance(self.model, TransformersModel)
            if not foreign and asked != "eager":
                raise failure
            logger.warning("every %s of %s runs eagerly", mode.value, self.model.architecture)
            self.not_captured.add(mode)
            return False
