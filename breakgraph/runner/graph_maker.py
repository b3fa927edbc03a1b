"""Makes the graph runners of a model: what they share, and what becomes of a capture that fails.

All of them take their memory from one pool and read the same static tensors. A failed capture is
voted on: either every rank has the graphs or none has. Prefill ladders are measured, and thinned
out, when all of them are captured.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn

import breakgraph
from breakgraph.attention import AttentionBackend, PagedDecodeBackend
from breakgraph.distributed import TensorParallelGroup
from breakgraph.forward import ForwardMode
from breakgraph.models import PrefillModel
from breakgraph.models.transformers_impl import TransformersModel
from breakgraph.runner.buckets import DispatchReason
from breakgraph.runner.decode_cuda_graph_runner import DecodeCudaGraphRunner
from breakgraph.runner.full_cuda_graph_runner import FullCudaGraphRunner
from breakgraph.runner.graph_runner import GraphCaptureError, GraphRunner, new_pool
from breakgraph.runner.input_buffers import DecodeInputBuffers, PrefillInputBuffers
from breakgraph.runner.ladders import Graph, Ladders
from breakgraph.runner.measuring import CostFile, CostMeter, costs_of, processor_name
from breakgraph.runner.prefill_graph_runner import PrefillGraphRunner

if TYPE_CHECKING:
    from breakgraph.server_args import ServerArgs

logger = logging.getLogger(__name__)

Runner = TypeVar("Runner", bound=PrefillGraphRunner)


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
        not_captured: modes that run eagerly although graphs were asked for, and why.
    """

    args: ServerArgs
    model: PrefillModel
    stack: nn.Module | None
    static_tensors: Sequence[torch.Tensor]
    context_length: int
    dtype: torch.dtype
    device: torch.device
    group: TensorParallelGroup
    not_captured: dict[ForwardMode, DispatchReason] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._output: torch.Tensor | None = None
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
        runner_class: type[Runner],
        backend: AttentionBackend,
        buffers: PrefillInputBuffers,
        *,
        eager_backend: AttentionBackend,
        optional: bool = False,
    ) -> Runner | None:
        """A graph for each token bucket; None where there are to be none.

        Args:
            runner_class: what kind of graphs.
            backend: of the mixers.
            buffers: the static inputs.
            eager_backend: of forwards without a graph.
            optional: other graphs serve what these would: where they cannot be captured it is no
                error unless --cuda-graph-failure says so.

        Raises:
            GraphCaptureError: a bucket cannot be captured, and that is to be an error.
        """
        if self.stack is None:
            return None
        full = runner_class is FullCudaGraphRunner
        given, most = self.args.piecewise_cuda_graph_tokens or (), buffers.max_tokens
        if backend.max_requests is not None:  # who fill a bucket with so many tokens at most
            most = min(most, backend.max_requests * self.context_length)
        buckets = sorted({min(bucket, most) for bucket in given})
        if self._output is None:
            shape = (max(buckets), self.model.hidden_size)
            self._output = torch.zeros(shape, dtype=self.dtype, device=self.device)
        runner = runner_class(
            self.stack,
            [*self.static_tensors, *backend.tensors()],
            buffers=buffers,
            attn_backend=backend,
            eager_backend=eager_backend,
            buckets=buckets,
            max_padding=self.args.max_prefill_padding,
            breaks=not full or bool(self.model.decode_limits),
            output=self._output,
            **self._options,
        )
        return runner if self._capture(runner, ForwardMode.PREFILL, optional=optional) else None

    @property
    def measures(self) -> bool:
        """Whether what prefills cost is measured, or was."""
        asked = self.args.prefill_dispatch
        return asked == "measured" or (asked == "auto" and self.device.type == "cuda")

    def tune(self, runners: Sequence[PrefillGraphRunner], facts: dict[str, Any]) -> None:
        """Measure what prefills cost, and drop graphs that are not worth their memory.

        Args:
            runners: of all prefill graphs, in order of preference.
            facts: what the costs depend on besides flags, model and machine.
        """
        if not runners or runners[0].debug:
            return
        if self.measures:
            dense = self.args.cuda_graph_backend_prefill in ("auto", "full")
            self._measure(runners, facts, dense=dense)
            if dense:
                self._drop(runners, Ladders(runners).worthless(), DispatchReason.EAGER_FASTER)
        if (budget := self.args.cuda_graph_memory_budget) is not None:
            self._keep_within(runners, int(budget * 1e9))

    def _measure(
        self, runners: Sequence[PrefillGraphRunner], facts: dict[str, Any], *, dense: bool
    ) -> None:
        """Let ``runners`` know their costs, from the file of an earlier start if there is one."""
        file = CostFile(self._facts(runners, facts), self.group)
        times = None if self.args.prefill_dispatch == "measured" else file.read()
        if times is None or not all(runner.kind in times for runner in runners):
            times = CostMeter(
                runners,
                dense=dense,
                requests=self.args.graph_slots if dense else 1,
                device=self.device,
                group=self.group,
            ).measure()
            file.write(times)
        for runner in runners:
            runner.costs = costs_of(times, runner.kind, dense=dense)

    def _facts(
        self, runners: Sequence[PrefillGraphRunner], facts: dict[str, Any]
    ) -> dict[str, Any]:
        """All that the times of prefills depend on."""
        flags = (
            *("cuda_graph_backend_prefill", "attention_backend", "linear_attention_capture"),
            *("prefill_graph_requests", "max_running_requests", "tp_size", "dp_size"),
            "moe_scatter",
        )
        cuda = self.device.type == "cuda"
        return facts | {
            "model": hashlib.sha256(self.model.config.to_json_string().encode()).hexdigest(),
            "dtype": str(self.dtype),
            "device": torch.cuda.get_device_name(self.device) if cuda else "cpu",
            "processor": processor_name(),
            "versions": [breakgraph.__version__, torch.__version__, str(torch.version.cuda)],
            "flags": {name: getattr(self.args, name) for name in flags},
            "ladders": {runner.kind: list(runner.buckets) for runner in runners},
            "backends": [runner.attn_backend.name for runner in runners],
        }

    def _keep_within(self, runners: Sequence[PrefillGraphRunner], budget: int) -> None:
        """Drop graphs until the rest, as measured, take at most ``budget`` bytes."""
        while any(runner.graphs for runner in runners):
            graphs = [Graph(one.kind, bucket) for one in runners for bucket in one.buckets]
            own = [one.own_bytes[bucket] for one in runners for bucket in one.buckets]
            pool, *own = map(int, self.group.shared_floats([runners[0].pool_bytes(), *own]))
            taken = pool + sum(own)
            logger.info(
                "%d prefill graphs take %.3f GB, %.3f of it shared, of a budget of %.3f",
                *(len(graphs), taken / 1e9, pool / 1e9, budget / 1e9),
            )
            if taken <= budget:
                return
            sizes = dict(zip(graphs, own, strict=True))
            dropped = Ladders(runners).over_budget(sizes, pool, budget)
            self._drop(runners, dropped, DispatchReason.OVER_BUDGET)

    def _drop(
        self,
        runners: Sequence[PrefillGraphRunner],
        graphs: Sequence[Graph],
        reason: DispatchReason,
    ) -> None:
        """Let go of ``graphs``; without the largest bucket the others fit a smaller pool."""
        if not graphs:
            return
        largest = max(runner.buckets[-1] for runner in runners if runner.buckets)
        by_kind = {runner.kind: runner for runner in runners}
        own = [by_kind[kind].own_bytes[bucket] / 1e6 for kind, bucket in graphs]
        each = zip(graphs, own, strict=True)
        told = ", ".join(f"{graph.kind} {graph.bucket} ({size:.1f} MB)" for graph, size in each)
        over = reason is DispatchReason.OVER_BUDGET
        why = "to keep --cuda-graph-memory-budget" if over else "that save less than 1 %"
        level = logging.WARNING if over else logging.INFO
        logger.log(level, "dropped %d prefill graphs %s: %s", len(graphs), why, told)
        for kind, bucket in graphs:
            by_kind[kind].drop_bucket(bucket, reason)
        left = [runner for runner in runners if runner.buckets]
        if not left:
            self.not_captured[ForwardMode.PREFILL] = reason
        elif max(runner.buckets[-1] for runner in left) < largest:
            self._options["pool"] = new_pool(self.device)
            for runner in left:
                runner.drop()
            for runner in left:
                runner.pool = self._options["pool"]
                if not self._capture(runner, ForwardMode.PREFILL):
                    runner.buckets = ()

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

    def _capture(self, runner: GraphRunner, mode: ForwardMode, *, optional: bool = False) -> bool:
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
            foreign = optional or isinstance(self.model, TransformersModel)
            if asked != "eager" and not (asked == "auto" and foreign):
                raise failure
            if optional:
                logger.warning("prefill goes on without graphs of that kind")
                return False
            logger.warning("every %s of %s runs eagerly", mode.value, self.model.architecture)
            self.not_captured[mode] = DispatchReason.NOT_CAPTURABLE
            return False
