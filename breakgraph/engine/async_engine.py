"""The engine of a server: one model thread, and streams that any event loop may read.

Only the model thread touches the scheduler and the device; every other thread leaves it messages
and reads copies. It never waits for a client, and what it dies of is kept and told to everyone.
"""

from __future__ import annotations

import atexit
import logging
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from breakgraph.distributed.watch import RankFailedError
from breakgraph.engine.data_parallel import make_scheduler
from breakgraph.engine.engine import Engine
from breakgraph.engine.errors import EngineDeadError, QueueFullError, RequestFailedError
from breakgraph.engine.request import Request, Want
from breakgraph.engine.sampling_params import SamplingParams
from breakgraph.engine.scheduler import Update
from breakgraph.engine.statistics import LastPrefill
from breakgraph.engine.stream import Output, Stream, Waiter, wake
from breakgraph.runner.verification import OUTCOMES
from breakgraph.server_args import ServerArgs

__all__ = ["AsyncEngine", "EngineSnapshot", "Output", "Stream"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineSnapshot:
    """An engine at one moment; totals are since its start.

    Attributes:
        queued: requests that wait to run.
        running: requests that hold slots.
        requests: requests ended, however they did.
        prompt_tokens: tokens of the prompts that ran.
        generated_tokens: tokens sampled.
        cached_tokens: tokens of prompts found in the prefix cache.
        retractions: times that a request had to give back its slots for a while.
        dispatch_counts: prefill forwards by dispatch reason.
        prefill_modes: prefill forwards by how they ran.
        decode_dispatch_counts: decode forwards by dispatch reason.
        bucket_hits: prefill replays by bucket.
        padding: padded rows as a share of all rows replayed by prefills, 0 to 1.
        graph_memory_bytes: what the graphs take.
        free_kv_tokens: slots that a new request could have, cached ones nobody uses with them.
        used_kv_tokens: slots that running requests hold.
        cached_kv_tokens: slots in the prefix cache, in use or not.
        verifications: replayed prefills that ran eagerly too, by outcome: same, different, or
            skipped where there was no memory for it.
        buckets_out_of_service: prefill buckets that gave other results than an eager forward.
        last_prefill: the latest prefill forward; None before the first.
    """

    queued: int
    running: int
    requests: int
    prompt_tokens: int
    generated_tokens: int
    cached_tokens: int
    retractions: int
    dispatch_counts: dict[str, int]
    prefill_modes: dict[str, int]
    decode_dispatch_counts: dict[str, int]
    bucket_hits: dict[int, int]
    padding: float
    graph_memory_bytes: int
    free_kv_tokens: int
    used_kv_tokens: int
    cached_kv_tokens: int
    verifications: dict[str, int]
    buckets_out_of_service: int
    last_prefill: LastPrefill | None


class AsyncEngine:
    """A loaded model and, between ``start`` and ``shutdown``, the thread that runs it.

    Attributes:
        args: the flags it was made from.
        tokenizer: a transformers tokenizer; None with ``skip_tokenizer_init``.
        runner: the model runner.
        failure: what the model thread died of; None while it has not.

    Raises:
        ValueError: a flag is wrong, or the checkpoint is; the message says which.
    """

    def __init__(self, server_args: ServerArgs) -> None:
        self._engine = Engine(server_args)
        atexit.unregister(self._engine.close)  # its scheduler is not the one that runs
        self.args, self.tokenizer = server_args, self._engine.tokenizer
        self.runner = self._engine.runner
        self.failure: str | None = None
        self._scheduler = make_scheduler(
            self.runner,
            cache_prefixes=not server_args.disable_radix_cache,
            random_seed=server_args.random_seed,
        )
        self._changed = threading.Condition()
        self._new: list[Stream] = []
        self._aborted: list[Request] = []
        self._streams: dict[Request, Stream] = {}
        self._stopping = False  # takes no new requests
        self._stop_at = float("inf")  # when those it has are aborted
        self._thread: threading.Thread | None = None

    @property
    def healthy(self) -> bool:
        """Whether the model thread runs and takes requests."""
        alive = self._thread is not None and self._thread.is_alive()
        return alive and self.failure is None and not self._stopping

    def start(self) -> None:
        """Start the model thread. Raises RuntimeError if it was started before."""
        if self._thread is not None:
            raise RuntimeError("this engine was started before; make a new one")
        self._thread = threading.Thread(target=self._run, name="breakgraph-model", daemon=True)
        self._thread.start()

    def shutdown(self, drain_seconds: float = 30.0) -> None:
        """Take no new requests, finish those there are, and stop; what remains is aborted.

        Args:
            drain_seconds: how long requests may go on.
        """
        with self._changed:
            self._stopping = True
            self._stop_at = min(self._stop_at, time.monotonic() + drain_seconds)
            self._changed.notify()
        if self._thread is not None:
            self._thread.join()
        self.runner.stop_ranks()

    def submit(
        self,
        prompt_ids: list[int],
        params: SamplingParams,
        *,
        deadline_seconds: float | None = None,
    ) -> Stream:
        """Queue a generation; never waits.

        Args:
            prompt_ids: the prompt's tokens.
            params: how to continue it.
            deadline_seconds: it ends as it is after this long; None for never.

        Raises:
            ValueError: the prompt is bad, or can never fit.
            QueueFullError: ``--max-queued-requests`` wait already.
            EngineDeadError: the model thread does not run.
        """
        admission = self._engine.admission("generate", Want.TOKENS)
        deadline = None if deadline_seconds is None else time.monotonic() + deadline_seconds
        ids = self._engine.encoder.encode_one(prompt_ids)
        rule = admission.rule(params)
        return self._submit(admission.continuation(ids, params, rule, deadline=deadline))

    async def encode(self, prompt_ids: list[int]) -> list[float]:
        """The prompt's embedding, or its class logits.

        Raises:
            ValueError, QueueFullError, EngineDeadError: as ``submit``.
            RequestFailedError: its forward failed, or the engine was shut down.
        """
        admission = self._engine.admission("encode", Want.POOLED)
        ids = self._engine.encoder.encode_one(prompt_ids)
        return await self._vector(admission.result(ids, Want.POOLED, use_cache=False))

    async def score(self, prompt_ids: list[int], label_token_ids: Sequence[int]) -> list[float]:
        """The log-probabilities of the labels as the token after the prompt; raises as ``encode``.

        Args:
            prompt_ids: the prompt's tokens.
            label_token_ids: at least one token.
        """
        admission = self._engine.admission("score", Want.LOGITS)
        if not label_token_ids:
            raise ValueError("score needs at least one label token")
        ids = self._engine.encoder.encode_one(prompt_ids)
        return await self._vector(admission.result(ids, Want.LOGITS, labels=label_token_ids))

    def snapshot(self) -> EngineSnapshot:
        """How the engine is doing; cheap, from any thread."""
        scheduler = self._scheduler
        statistics, verifier = scheduler.statistics, self.runner.verifier
        cache = scheduler.cache_use()
        return EngineSnapshot(
            queued=scheduler.num_waiting + len(self._new),
            running=scheduler.num_running,
            requests=statistics.prompts,
            prompt_tokens=statistics.prompt_tokens,
            generated_tokens=statistics.generated_tokens,
            cached_tokens=statistics.cached_tokens,
            retractions=statistics.retractions,
            dispatch_counts=dict(statistics.reasons),
            prefill_modes=dict(statistics.modes),
            decode_dispatch_counts=dict(statistics.decode_reasons),
            bucket_hits=dict(statistics.buckets),
            padding=statistics.padding,
            graph_memory_bytes=sum(one.memory_bytes for one in self.runner.graph_runners),
            free_kv_tokens=cache.free,
            used_kv_tokens=cache.used,
            cached_kv_tokens=cache.cached,
            verifications=dict.fromkeys(OUTCOMES, 0) if verifier is None else verifier.outcomes,
            buckets_out_of_service=0 if verifier is None else len(verifier.mismatches),
            last_prefill=statistics.last_prefill,
        )

    def explain(self, prompt_ids_list: Sequence[Sequence[int]]) -> str:
        """How the prefill of these prompts would run, were they alone. Raises ValueError."""
        return self._engine.explain(prompt_ids_list)

    async def _vector(self, request: Request) -> list[float]:
        stream = self._submit(request)
        try:
            async for output in stream:
                if output.finish_reason != "stop":
                    raise RequestFailedError(output.error or f"ended by {output.finish_reason}")
        finally:
            stream.abort()
        if stream.vector is None:
            raise RequestFailedError("the forward gave no result: a bug in the scheduler")
        return stream.vector.tolist()

    def _submit(self, request: Request) -> Stream:
        stream = Stream(request, self.tokenizer, self._abort)
        with self._changed:
            if self.failure is not None:
                raise EngineDeadError(f"the model thread died of {self.failure}")
            if self._thread is None:
                raise EngineDeadError("the engine has not started; call start()")
            if self._stopping:
                raise EngineDeadError("the engine is shutting down")
            queued = self._scheduler.num_waiting + len(self._new)
            if queued >= self.args.max_queued_requests:
                raise QueueFullError(
                    f"{queued} requests wait already; try again later, or raise "
                    "--max-queued-requests"
                )
            self._new.append(stream)
            self._changed.notify()
        return stream

    def _abort(self, request: Request) -> None:
        with self._changed:
            if request.finish_reason is None and self.failure is None:
                self._aborted.append(request)
                self._changed.notify()

    # In the model thread.

    def _run(self) -> None:
        try:
            while self._receive():
                self._deliver(self._scheduler.step())
                self._scheduler.verify()
        except BaseException as error:
            self._die(error)

    def _receive(self) -> bool:
        """Take messages, waiting for one if there is nothing to do; False when all is done."""
        scheduler = self._scheduler
        with self._changed:
            while not (self._new or self._aborted or scheduler.has_work or self._stopping):
                self._changed.wait()
            new, self._new = self._new, []
            aborted, self._aborted = self._aborted, []
            stopping, overdue = self._stopping, time.monotonic() >= self._stop_at
        for stream in new:
            self._streams[stream.request] = stream
            scheduler.add(stream.request)
        for request in aborted:
            self._deliver(scheduler.abort(request))
        if overdue:
            self._deliver(scheduler.abort_all())
        return scheduler.has_work or not stopping

    def _deliver(self, updates: Sequence[Update]) -> None:
        """Hand each update to its stream; raises what is fatal of the errors in them."""
        failures = [update.request.error for update in updates if update.request.error is not None]
        errors = list({id(error): error for error in failures}.values())
        for error in errors:
            logger.error("a forward failed, and its requests with it", exc_info=error)
        waiters: list[Waiter] = []
        for update in updates:
            stream = self._streams[update.request]
            if update.request.finish_reason is not None:
                del self._streams[update.request]
            waiter = stream.push(update)
            if waiter is not None:
                waiters.append(waiter)
        wake(waiters)
        for error in errors:
            if _is_fatal(error):
                raise error

    def _die(self, error: BaseException) -> None:
        """End everything: the device, or the state of the pools, cannot be trusted any more."""
        logger.critical("the model thread died", exc_info=error)
        with self._changed:
            self.failure = f"{type(error).__name__}: {error}"
            streams = [*self._streams.values(), *self._new]
            self._new = []
            self._streams = {}
        waiters = []
        for stream in streams:
            request = stream.request
            request.finish_reason, request.error = "error", error
            waiter = stream.push(Update(request))
            if waiter is not None:
                waiters.append(waiter)
        wake(waiters)


def _is_fatal(error: BaseException) -> bool:
    """Whether a rank is lost, or the device: after most CUDA errors every later call fails too."""
    if isinstance(error, torch.OutOfMemoryError):
        return False
    if isinstance(error, RankFailedError):
        return True
    return isinstance(error, torch.AcceleratorError) or "CUDA error" in str(error)
