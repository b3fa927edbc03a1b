"""A forward from batch to logits or embeddings: loads, plans memory, picks eager or graph.

The layer stack runs by graph or eagerly on the same filled buffers; the logits processor and
the pooler run eagerly after it, so that the batch size never reaches a prefill's segment. A decode
of the request table's requests has a path of its own; any other runs as a prefill of one token a
request.
"""

from __future__ import annotations

import logging
import math
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from breakgraph.attention import (
    HybridAttentionBackend,
    PagedDecodeBackend,
    SlotMirror,
)
from breakgraph.distributed.lockstep import Leader
from breakgraph.distributed.ranks import Ranks
from breakgraph.forward import ForwardBatch, ForwardMode, forward_context
from breakgraph.kernels.decode_attention import require_decode_kernel
from breakgraph.layers import ClassificationHead, LogitsProcessor, Pooler
from breakgraph.layers.norm import fold_norms
from breakgraph.layers.own_products import use_own_products
from breakgraph.memory import RankMemory, RequestTable, SlotAllocator
from breakgraph.models import CausalLM, PrefillModel, SequenceClassifier, load_model
from breakgraph.models.sentence_transformers import find_recipe
from breakgraph.models.transformers_impl import TransformersClassifier, TransformersModel
from breakgraph.runner.backends import (
    decode_backend,
    linear_backend,
    paged_decode_backend,
    prefill_backend,
    static_prefill_backend,
)
from breakgraph.runner.breakable_cuda_graph_runner import (
    BreakableCudaGraphRunner,
    CapturedMixersRunner,
)
from breakgraph.runner.buckets import Dispatch, DispatchReason
from breakgraph.runner.data_parallel import RankedForward, check_model
from breakgraph.runner.forward_result import ForwardResult, StackResult
from breakgraph.runner.full_cuda_graph_runner import FullCudaGraphRunner
from breakgraph.runner.graph_maker import GraphMaker
from breakgraph.runner.graph_runner import GraphRunner
from breakgraph.runner.input_buffers import DecodeInputBuffers, FilledBatch, PrefillInputBuffers
from breakgraph.runner.layer_stack import resolve_layer_stack
from breakgraph.runner.pools import make_kv_pool, make_mamba_pool
from breakgraph.runner.prefill_graph_runner import PrefillGraphRunner
from breakgraph.runner.verification import BOUNDS, PrefillVerifier

if TYPE_CHECKING:
    from breakgraph.server_args import ServerArgs

logger = logging.getLogger(__name__)


class ModelRunner:
    """One model on one device, ready for forwards.

    Raises:
        ModelLoadError, ValueError: what is wrong with the model folder or the flags.
        GraphCaptureError: with graphs on, when a bucket cannot be captured.
    """

    def __init__(
        self, args: ServerArgs, *, model: PrefillModel | None = None, ranks: Ranks | None = None
    ) -> None:
        """Load what ``args`` name, or take ``model``, loaded already on the device of ``args``.

        Of several ``ranks`` this one loads its share, and rank 0's forwards are run by all.
        """
        self.args = args = args.resolved()
        self.ranks = ranks or Ranks()
        self.group = group = self.ranks.group
        if group.size != args.tp_size:
            raise ValueError(
                f"--tp-size {args.tp_size} takes ranks that only an engine starts, and this is a "
                "model runner alone; leave the flag out"
            )
        index = f":{group.local_rank}" if group.size > 1 and args.device == "cuda" else ""
        self.device = torch.empty(0, device=args.device + index).device  # "cuda" gets its index
        start = time.perf_counter()
        dtype = None if args.dtype == "auto" else getattr(torch, args.dtype)
        with group.active():
            self.model = model or load_model(
                args.model_path,
                dtype=dtype,
                device=self.device,
                load_format=args.load_format,
                random_seed=args.random_seed,
                model_impl=args.model_impl,
                trust_remote_code=args.trust_remote_code,
            )
        if group.size > 1 and isinstance(self.model, TransformersModel):
            raise ValueError(
                f"{self.model.architecture} runs as a class of transformers, which cannot be "
                "divided among ranks; leave out --tp-size"
            )
        if group.data_parallel:
            check_model(self.model)
        fold_norms(self.model)
        use_own_products(self.model, args.matrix_products == "auto")
        self.load_seconds = time.perf_counter() - start
        if args.enable_torch_compile:
            self._compile()
        self.dtype = next(self.model.parameters()).dtype
        self.vocab_size = self.model.vocab_size
        self.context_length = self.model.context_length
        place = (self.model, args, self.dtype, self.device)
        self.mamba_pool = make_mamba_pool(*place, group)
        self.kv_pool = make_kv_pool(*place, self.context_length, group)
        self.slots = SlotAllocator(self.kv_pool.num_tokens, args.page_size)
        self.requests = RequestTable(args.max_running_requests, self.context_length, self.slots)
        own = RankMemory(self.requests, self.mamba_pool)
        others = group.dp_size - 1 if group.is_first else 0
        self.rank_memory = [own, *(own.like() for _ in range(others))]
        self.chunk_size = min(
            args.chunked_prefill_size or 1,
            self.kv_pool.num_tokens,
            args.max_running_requests * self.context_length,
        )
        self.attn_backend = prefill_backend(*place, self.chunk_size, self.mamba_pool)
        shape: dict[str, Any] = {
            "max_requests": args.max_running_requests,
            "hidden_size": self.model.hidden_size,
            "dtype": self.dtype,
            "device": self.device,
            "embed": self.model.embed,
            "group": group,
        }
        self._buffers = PrefillInputBuffers(max_tokens=self.chunk_size, **shape)
        self.paged_decode = self._make_paged_decode()
        self.decode_backend = decode_backend(self.paged_decode, self.mamba_pool)
        self._decode_buffers = DecodeInputBuffers(max_tokens=args.max_running_requests, **shape)
        self._stack, self._no_stack = resolve_layer_stack(self.model)
        self._eager = self.model if self._stack is None else self._stack
        self.logits = LogitsProcessor(group=group.attention, vocab_size=self.vocab_size)
        self._head = ClassificationHead()
        self.pooler = self._make_pooler()
        self.dispatch_counts: Counter[DispatchReason] = Counter()
        self.bucket_hits: Counter[int] = Counter()
        self.decode_dispatch_counts: Counter[DispatchReason] = Counter()
        self.decode_bucket_hits: Counter[int] = Counter()
        group.barrier()  # a rank still loading would be waited for inside of collectives
        graphs = self._make_graph_maker()
        self.graph_runner = self._make_graph_runner(graphs)
        self.linear_graph_runner = self._make_linear_graph_runner(graphs)
        self.full_graph_runner = self._make_full_graph_runner(graphs)
        graphs.tune(
            self.prefill_graph_runners,
            {"attention": self.attn_backend.name, "context": self.context_length},
        )
        self.decode_graph_runner = graphs.decode(
            self.paged_decode, self.decode_backend, self._decode_buffers
        )
        self._not_captured = graphs.not_captured
        self.verifier = self._make_verifier()
        self._leader = Leader(self.ranks, self) if group.size > 1 and group.is_first else None
        self.ranked = RankedForward(self) if group.data_parallel else None

    def _compile(self) -> None:
        if isinstance(self.model, TransformersModel):
            from breakgraph.models.transformers_impl.compiling import compile_token_wise

            compile_token_wise(self.model)
        else:
            logger.warning(
                "--enable-torch-compile does nothing: %s has kernels of its own",
                self.model.architecture,
            )

    def stop_ranks(self) -> None:
        """Let the other ranks end, if there are any; no forward can run after."""
        if self._leader is not None:
            self.drop_graphs()
            self._leader.stop()

    def drop_graphs(self) -> None:
        """Let go of all graphs; no forward can run after."""
        for graphs in self.graph_runners:
            graphs.drop()

    def _make_pooler(self) -> Pooler:
        asked = self.args.pooling
        if asked != "auto" or not self.args.is_embedding:
            return Pooler("last" if asked == "auto" else asked)
        recipe = find_recipe(Path(self.args.model_path), causal=self.model.causal)
        return Pooler(recipe.mode, normalize=recipe.normalize)

    def _make_paged_decode(self) -> PagedDecodeBackend | None:
        """Attention through the request table; None where decodes run by the extend path."""
        disabled = self.args.cuda_graph_backend_decode == "disabled"
        if not isinstance(self.model, CausalLM) or self.args.is_embedding:
            return None
        if self.device.type == "cuda":
            try:
                require_decode_kernel()
            except RuntimeError:
                if not disabled:
                    raise
                return None
        elif disabled:
            return None  # the reference is no faster than a prefill of one token a request
        width = min(self.context_length, self.kv_pool.num_tokens)
        return paged_decode_backend(self.model, SlotMirror(self.requests, width, self.device))

    def _make_graph_maker(self) -> GraphMaker:
        if self._stack is None and self.args.cuda_graph_backend_prefill != "disabled":
            logger.warning("%s", self._no_stack)
        states = [] if self.mamba_pool is None else self.mamba_pool.tensors()
        weights = [*self.model.parameters(), *self.model.buffers()]
        return GraphMaker(
            args=self.args,
            model=self.model,
            stack=self._stack,
            static_tensors=[*weights, *self.kv_pool.tensors(), *states],
            context_length=self.context_length,
            dtype=self.dtype,
            device=self.device,
            group=self.group,
        )

    def _make_graph_runner(self, graphs: GraphMaker) -> BreakableCudaGraphRunner | None:
        if self.args.cuda_graph_backend_prefill not in ("breakable", "auto"):
            return None
        eager = self.attn_backend
        return graphs.prefill(BreakableCudaGraphRunner, eager, self._buffers, eager_backend=eager)

    def _make_linear_graph_runner(self, graphs: GraphMaker) -> CapturedMixersRunner | None:
        """Graphs that hold the recurrent mixers too, for a few requests at a time."""
        requests, pool = self.args.linear_attention_capture, self.mamba_pool
        if not requests or self.graph_runner is None:
            return None
        if pool is None or not isinstance(self.attn_backend, HybridAttentionBackend):
            logger.warning("--linear-attention-capture does nothing: the model has no such layer")
            return None
        linear = linear_backend(
            self.model, pool, self.device, requests, self.chunk_size, static=True
        )
        return graphs.prefill(
            CapturedMixersRunner,
            HybridAttentionBackend(self.attn_backend.full, linear),
            self._buffers,
            eager_backend=self.attn_backend,
        )

    def _make_full_graph_runner(self, graphs: GraphMaker) -> FullCudaGraphRunner | None:
        """Graphs that hold attention too, for a few requests at a time."""
        mode = self.args.cuda_graph_backend_prefill
        if mode not in ("full", "auto") or self._stack is None:
            return None
        backend = static_prefill_backend(
            *(self.model, self.args, self.dtype, self.device, self.chunk_size, self.mamba_pool)
        )
        if backend is None:
            missing = f"the attention of {self.model.architecture} has no plan that graphs can hold"
            if mode == "full":
                raise ValueError(
                    f"--cuda-graph-backend-prefill full: {missing}; use breakable, or auto"
                )
            logger.info("no full prefill graphs: %s", missing)
            return None
        return graphs.prefill(
            FullCudaGraphRunner,
            backend,
            self._buffers,
            eager_backend=self.attn_backend,
            optional=mode == "auto",
        )

    def _make_verifier(self) -> PrefillVerifier | None:
        rate = self.args.verify_prefill_graph
        if not rate or not self.prefill_graph_runners or self._stack is None:
            return None
        return PrefillVerifier(
            rate,
            self.model,
            self._stack,
            self._buffers,
            self.attn_backend,
            self.device,
            BOUNDS.get(self.dtype, BOUNDS[torch.float32]),
        )

    @property
    def prefill_graph_runners(self) -> list[PrefillGraphRunner]:
        """Those of prefill that have graphs left, the ones with the fewest breaks first."""
        known = (self.full_graph_runner, self.linear_graph_runner, self.graph_runner)
        return [runner for runner in known if runner is not None and runner.buckets]

    @property
    def graph_runners(self) -> list[GraphRunner]:
        """All that captured graphs."""
        decode = [] if self.decode_graph_runner is None else [self.decode_graph_runner]
        return [*self.prefill_graph_runners, *decode]

    def dispatch(self, batch: ForwardBatch, *, allow_graph: bool = True) -> Dispatch:
        """How ``batch`` would run."""
        if not allow_graph:
            reason = DispatchReason.EAGER_ASKED
            return Dispatch(None, reason, batch.num_tokens, mode=batch.mode)
        if batch.mode is ForwardMode.DECODE and self.decode_graph_runner is not None:
            return self.decode_graph_runner.can_run(batch)
        if batch.mode is ForwardMode.PREFILL and (runners := self.prefill_graph_runners):
            return _cheapest(runners, batch)
        enabled = self.args.cuda_graph_backend_prefill != "disabled"
        if batch.mode is ForwardMode.DECODE:
            enabled = self.args.cuda_graph_backend_decode != "disabled" and self._stack is None
        reason = DispatchReason.NO_LAYER_STACK if enabled else DispatchReason.DISABLED
        reason = self._not_captured.get(batch.mode, reason)
        return Dispatch(None, reason, batch.num_tokens, mode=batch.mode)

    def _runner_of(self, dispatch: Dispatch) -> GraphRunner | None:
        """Who replays what ``dispatch`` decides for, or would if it did."""
        if dispatch.mode is ForwardMode.DECODE:
            return self.decode_graph_runner
        runners = self.prefill_graph_runners
        return next((runner for runner in runners if runner.kind == dispatch.kind), None)

    @torch.no_grad()
    def forward(self, batch: ForwardBatch, *, allow_graph: bool = True) -> ForwardResult:
        """Run ``batch``; its K and V are in the pool afterwards.

        Args:
            batch: at most ``chunk_size`` tokens and ``max_running_requests`` requests.
            allow_graph: False runs eagerly whatever the ladder says.

        Raises:
            ValueError: the batch does not fit, or holds a token out of vocabulary or past the
                context; on a GPU either would end the process.
            RankFailedError: another rank is gone, or this one failed in what all do together.
        """
        if self.ranked is not None:
            return self.ranked.run([batch], allow_graph=allow_graph)[0]
        self.check(batch)
        dispatch = self.dispatch(batch, allow_graph=allow_graph)
        if self._leader is None:
            return self._run(batch, dispatch)
        with self.leading([batch], dispatch, allow_graph):
            return self._run(batch, dispatch)

    def leading(
        self, batches: Sequence[ForwardBatch], dispatch: Dispatch, allow_graph: bool
    ) -> AbstractContextManager[None]:
        """Around a forward that the other ranks run too; see ``Leader.forward``."""
        if self._leader is None:
            raise RuntimeError("rank 0 alone begins a forward of all ranks")
        return self._leader.forward(batches, dispatch.bucket, allow_graph)

    def _run(self, batch: ForwardBatch, dispatch: Dispatch) -> ForwardResult:
        stack = self.run_stack(batch, dispatch, batch.num_tokens)
        result = self._tail(dispatch, stack.hidden, stack.filled, batch)
        return replace(result, graph=stack.graph, verification=stack.verification)

    def run_stack(self, batch: ForwardBatch, dispatch: Dispatch, rows: int) -> StackResult:
        """The layer stack's part of a forward, eagerly over ``rows`` rows."""
        decode = batch.mode is ForwardMode.DECODE
        (self.decode_dispatch_counts if decode else self.dispatch_counts)[dispatch.reason] += 1
        graphs, graph, check = self._runner_of(dispatch), None, None
        if graphs is not None and dispatch.bucket is not None:
            (self.decode_bucket_hits if decode else self.bucket_hits)[dispatch.bucket] += 1
            if self.verifier is not None and isinstance(graphs, PrefillGraphRunner):
                check = self.verifier.begin(graphs, batch, dispatch.bucket)
            filled = graphs.replay_prepare(batch, dispatch.bucket)
            hidden = graphs.replay(batch, dispatch.bucket)
            if check is not None:
                check.hidden = hidden
            graph = graphs.graphs[dispatch.bucket]
        else:
            buffers, backend = self._buffers, self.attn_backend
            if decode and batch.rows is not None and self.decode_backend is not None:
                buffers, backend = self._decode_buffers, self.decode_backend
            filled = buffers.fill(batch, rows)
            if batch.num_tokens:
                backend.init_forward_metadata(batch)
            with forward_context(batch, backend):
                backend.begin_layers(filled.inputs)
                hidden = self._eager(filled.inputs)
        return StackResult(hidden, filled, graph, check)

    def check(self, batch: ForwardBatch) -> None:
        """Raise ValueError where ``batch`` cannot run here."""
        if not batch.num_tokens:
            raise ValueError("a batch without requests has nothing to run")
        if self.mamba_pool is not None and batch.has_prefix and batch.rows is None:
            raise ValueError(
                "a batch that goes on from cached tokens needs the rows of its requests, in which "
                "this model keeps their recurrent states"
            )
        if batch.has_prefix and not self.model.causal:
            raise ValueError(
                "this model's tokens see later ones, so a sequence runs in one forward, whole"
            )
        if batch.longest > self.context_length:
            raise ValueError(
                f"a request of {batch.longest} tokens is longer than the context of "
                f"{self.context_length}"
            )
        # Without their sign negative ids are the largest, so one pass finds both faults.
        highest = int(batch.input_ids.view(np.uint64).max())
        if highest >= self.vocab_size:
            token = highest - (1 << 64) * (highest >> 63)
            raise ValueError(f"token {token} is not in the vocabulary of {self.vocab_size}")

    def explain(self, batch: ForwardBatch) -> str:
        """How ``batch`` would run and why, and what earlier forwards did."""
        dispatch = self.dispatch(batch)
        lines = [dispatch.describe()]
        if self.verifier is not None and dispatch.reason is DispatchReason.OUT_OF_SERVICE:
            found = [m for m in self.verifier.mismatches if m.bucket == dispatch.refused]
            lines += [mismatch.describe() for mismatch in found]
        if self._no_stack:
            lines.append(self._no_stack)
        runner, counted = self._runner_of(dispatch), self.dispatch_counts
        if batch.mode is ForwardMode.DECODE:
            counted = self.decode_dispatch_counts
        if runner is not None:
            graph = next(iter(runner.graphs.values()))
            name = f"{dispatch.kind} " if isinstance(runner, PrefillGraphRunner) else ""
            lines.append(
                f"each of {len(runner.buckets)} {name}graphs has {graph.num_segments} "
                f"segments and {graph.num_breaks} breaks"
            )
        counts = ", ".join(f"{reason}: {n}" for reason, n in dict(counted).items())
        return "\n".join([*lines, f"forwards so far: {counts or 'none'}"])

    def _tail(
        self, dispatch: Dispatch, hidden: torch.Tensor, filled: FilledBatch, batch: ForwardBatch
    ) -> ForwardResult:
        """The eager end of a forward: scores, an embedding, or logits."""
        if isinstance(self.model, TransformersClassifier):
            lens, last = filled.extend_lens, filled.last_rows
            scores = self.model.compute_scores(hidden, batch, lens, last)
            return ForwardResult(dispatch, pooled=scores)
        if isinstance(self.model, SequenceClassifier):
            scores = self._head(hidden, self.model.score.weight, filled.last_rows)
            return ForwardResult(dispatch, pooled=scores)
        if self.args.is_embedding:
            return ForwardResult(dispatch, pooled=self.pooler(hidden, filled.extend_lens))
        logits = self.logits(
            hidden, self.model.logits_head, filled.last_rows, filled.logprob_targets
        )
        return ForwardResult(dispatch, logits.next_token_logits, logits.input_token_logprobs)


def _cheapest(runners: Sequence[PrefillGraphRunner], batch: ForwardBatch) -> Dispatch:
    """Of the prefill graphs that can serve ``batch``, those that were measured to be fastest,
    or where that is not known those with the fewest breaks."""
    found: list[Dispatch] = []
    chosen, least = len(runners) - 1, math.inf
    for index, runner in enumerate(runners):
        found.append(runner.can_run(batch))
        if found[index].bucket is None:
            continue
        if (ms := runner.expected_ms(found[index], batch)) < least:
            chosen, least = index, ms
        if not ms:
            break
    if not chosen:
        return found[0]
    return replace(found[chosen], passed_over=tuple(found[:chosen]))
