"""A forward from batch to logits or embeddings: loads, plans memory, picks eager or graph.

The layer stack runs by graph or eagerly on the same filled buffers; the logits processor and
the pooler run eagerly after it, so that the batch size never reaches a segment.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from breakgraph.attention import (
    Attention,
    AttentionBackend,
    TorchFlashBackend,
    TorchNativeBackend,
)
from breakgraph.forward import ForwardBatch, forward_context
from breakgraph.layers import ClassificationHead, LogitsProcessor, Pooler
from breakgraph.memory import KVPool, RequestTable, SlotAllocator
from breakgraph.models import SequenceClassifier, load_model
from breakgraph.runner.breakable_cuda_graph_runner import BreakableCudaGraphRunner
from breakgraph.runner.buckets import Dispatch, DispatchReason
from breakgraph.runner.input_buffers import FilledBatch, PrefillInputBuffers
from breakgraph.runner.layer_stack import resolve_layer_stack

if TYPE_CHECKING:
    from breakgraph.server_args import ServerArgs

logger = logging.getLogger(__name__)

CPU_KV_BYTES = 1 << 30
"""What the KV cache takes on a CPU at most, unless --max-total-tokens says otherwise."""


@dataclass(frozen=True, slots=True)
class ForwardResult:
    """What a forward gives, on the device.

    Attributes:
        dispatch: bucket or None, and the reason.
        next_token_logits: float32 ``[batch_size, vocab_size]``, of generation models.
        input_token_logprobs: float32 ``[num_tokens]``, where the batch has targets.
        pooled: float32 ``[batch_size, hidden_size]`` or ``[batch_size, num_labels]``.
    """

    dispatch: Dispatch
    next_token_logits: torch.Tensor | None = None
    input_token_logprobs: torch.Tensor | None = None
    pooled: torch.Tensor | None = None


class ModelRunner:
    """One model on one device, ready for forwards.

    Raises:
        ModelLoadError, ValueError: what is wrong with the model folder or the flags.
        GraphCaptureError: with graphs on, when a bucket cannot be captured.
    """

    def __init__(self, args: ServerArgs) -> None:
        self.args = args = args.resolved()
        self.device = torch.empty(0, device=args.device).device  # "cuda" gets its index
        start = time.perf_counter()
        dtype = None if args.dtype == "auto" else getattr(torch, args.dtype)
        self.model = load_model(
            args.model_path,
            dtype=dtype,
            device=self.device,
            load_format=args.load_format,
            random_seed=args.random_seed,
        )
        self.load_seconds = time.perf_counter() - start
        config = self.model.config
        self.dtype = next(self.model.parameters()).dtype
        self.vocab_size: int = config.vocab_size
        self.context_length: int = config.max_position_embeddings
        self._attention = [m for m in self.model.modules() if isinstance(m, Attention)]
        self.kv_pool = self._make_kv_pool()
        self.slots = SlotAllocator(self.kv_pool.num_tokens, args.page_size)
        self.requests = RequestTable(args.max_running_requests, self.context_length, self.slots)
        self.chunk_size = min(
            args.chunked_prefill_size or 1,
            self.kv_pool.num_tokens,
            args.max_running_requests * self.context_length,
        )
        self.attn_backend = self._make_attention_backend()
        self._buffers = PrefillInputBuffers(
            max_tokens=self.chunk_size,
            max_requests=args.max_running_requests,
            hidden_size=config.hidden_size,
            dtype=self.dtype,
            device=self.device,
            embed=self.model.embed,
        )
        self._stack, self._no_stack = resolve_layer_stack(self.model)
        self._eager = self.model if self._stack is None else self._stack
        self._logits, self._head = LogitsProcessor(), ClassificationHead()
        self._pooler = Pooler(args.pooling, normalize=True)
        self.dispatch_counts: Counter[DispatchReason] = Counter()
        self.bucket_hits: Counter[int] = Counter()
        self.graph_runner = self._make_graph_runner()

    def _make_kv_pool(self) -> KVPool:
        first, page = self._attention[0], self.args.page_size
        shape = (len(self._attention), first.num_kv_heads, first.head_dim)
        per_token = KVPool.bytes_per_token(*shape, self.dtype)
        useful = self.args.max_running_requests * (-(-self.context_length // page) * page)
        tokens = self.args.max_total_tokens
        if tokens is None:
            if self.device.type == "cuda":
                free, total = torch.cuda.mem_get_info(self.device)
                room = int(total * self.args.mem_fraction_static) - (total - free)
            else:
                room = CPU_KV_BYTES
            tokens = min(room // per_token - page, useful)
            if tokens < page:
                raise ValueError(
                    f"--mem-fraction-static {self.args.mem_fraction_static} leaves no memory for "
                    "the KV cache after the weights; raise it"
                )
        pool = KVPool(shape[0], tokens, shape[1], shape[2], self.dtype, self.device, page)
        pool.bind(self._attention)
        return pool

    def _make_attention_backend(self) -> AttentionBackend:
        name, head_dim = self.args.attention_backend, self._attention[0].head_dim
        half = self.dtype in (torch.bfloat16, torch.float16)
        flash = self.device.type == "cuda" and half and head_dim % 8 == 0 and head_dim <= 256
        if name == "torch_flash" and not flash:
            raise ValueError(
                f"--attention-backend torch_flash cannot serve {self.dtype} heads of {head_dim} on "
                f"{self.device}; use --attention-backend torch_native"
            )
        if name == "torch_native" or not flash:
            return TorchNativeBackend(self.device)
        return TorchFlashBackend(
            device=self.device,
            max_requests=self.args.max_running_requests,
            max_context_tokens=self.chunk_size,
        )

    def _make_graph_runner(self) -> BreakableCudaGraphRunner | None:
        if not self.args.enable_breakable_cuda_graph:
            return None
        if self._stack is None:
            logger.warning("%s", self._no_stack)
            return None
        given = self.args.piecewise_cuda_graph_tokens or ()
        runner = BreakableCudaGraphRunner(
            self._stack,
            [*self.model.parameters(), *self.model.buffers(), *self.kv_pool.tensors()],
            buffers=self._buffers,
            attn_backend=self.attn_backend,
            buckets=sorted({min(bucket, self.chunk_size) for bucket in given}),
            max_padding=self.args.max_prefill_padding,
            context_length=self.context_length,
            hidden_size=self.model.config.hidden_size,
            dtype=self.dtype,
            device=self.device,
        )
        runner.capture()
        dispatch = self.args.prefill_dispatch
        if dispatch == "measured" or (dispatch == "auto" and self.device.type == "cuda"):
            runner.measure()
        return runner

    def dispatch(self, batch: ForwardBatch) -> Dispatch:
        """How ``batch`` would run."""
        if self.graph_runner is not None:
            return self.graph_runner.can_run(batch)
        enabled = self.args.enable_breakable_cuda_graph
        reason = DispatchReason.NO_LAYER_STACK if enabled else DispatchReason.DISABLED
        return Dispatch(None, reason, batch.num_tokens)

    @torch.no_grad()
    def forward(self, batch: ForwardBatch, *, allow_graph: bool = True) -> ForwardResult:
        """Run ``batch``; its K and V are in the pool afterwards.

        Args:
            batch: at most ``chunk_size`` tokens and ``max_running_requests`` requests.
            allow_graph: False runs eagerly whatever the ladder says (decode, comparisons).

        Raises:
            ValueError: the batch does not fit, or holds a token out of vocabulary or past the
                context; on a GPU either would end the process.
        """
        self._check(batch)
        if allow_graph:
            dispatch = self.dispatch(batch)
        else:
            dispatch = Dispatch(None, DispatchReason.EAGER_ASKED, batch.num_tokens)
        self.dispatch_counts[dispatch.reason] += 1
        graphs = self.graph_runner
        if graphs is not None and dispatch.bucket is not None:
            self.bucket_hits[dispatch.bucket] += 1
            filled = graphs.replay_prepare(batch, dispatch.bucket)
            hidden = graphs.replay(batch, dispatch.bucket)
        else:
            filled = self._buffers.fill(batch, batch.num_tokens)
            self.attn_backend.init_forward_metadata(batch)
            with forward_context(batch, self.attn_backend):
                hidden = self._eager(filled.inputs)
        return self._tail(dispatch, hidden, filled)

    def _check(self, batch: ForwardBatch) -> None:
        longest = int((batch.extend_lens + batch.prefix_lens).max())
        if longest > self.context_length:
            raise ValueError(
                f"a request of {longest} tokens is longer than the context of {self.context_length}"
            )
        low, high = int(batch.input_ids.min()), int(batch.input_ids.max())
        if low < 0 or high >= self.vocab_size:
            raise ValueError(
                f"token {low if low < 0 else high} is not in the vocabulary of {self.vocab_size}"
            )

    def explain(self, batch: ForwardBatch) -> str:
        """How ``batch`` would run and why, and what earlier forwards did."""
        lines = [self.dispatch(batch).describe()]
        if self._no_stack:
            lines.append(self._no_stack)
        if self.graph_runner is not None:
            graph = next(iter(self.graph_runner.graphs.values()))
            lines.append(
                f"each of {len(self.graph_runner.buckets)} graphs has {graph.num_segments} "
                f"segments and {graph.num_breaks} breaks"
            )
        counts = ", ".join(f"{reason}: {n}" for reason, n in self.dispatch_counts.items())
        return "\n".join([*lines, f"forwards so far: {counts or 'none'}"])

    def _tail(self, dispatch: Dispatch, hidden: torch.Tensor, filled: FilledBatch) -> ForwardResult:
        """The eager end of a forward: scores, an embedding, or logits."""
        if isinstance(self.model, SequenceClassifier):
            scores = self._head(hidden, self.model.score.weight, filled.last_rows)
            return ForwardResult(dispatch, pooled=scores)
        if self.args.is_embedding:
            return ForwardResult(dispatch, pooled=self._pooler(hidden, filled.extend_lens))
        logits = self._logits(
            hidden, self.model.lm_head_weight, filled.last_rows, filled.logprob_targets
        )
        return ForwardResult(dispatch, logits.next_token_logits, logits.input_token_logprobs)
