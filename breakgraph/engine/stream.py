"""One request's output, from the model thread to whoever reads it.

The model thread only appends and never waits: what is not read yet is one growing output, so a slow
reader costs the memory of its own text and no more. Tokens become text on the reader's side.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from breakgraph.engine.request import FinishReason, Request, TokenLogprob
from breakgraph.engine.scheduler import Update
from breakgraph.engine.stopping import TextStream


@dataclass(frozen=True, kw_only=True, slots=True)
class Output:
    """What is new of a request since the output before.

    Attributes:
        text: text that is certain; never half a character or what may begin a stop string.
        token_ids: generated tokens, the end token's or stop string's with them.
        logprobs: one for each of ``token_ids``; None where not asked for.
        finished: whether this is the last output.
        finish_reason: why it ended; None before the last.
        error: what went wrong, with "error".
        prompt_tokens: tokens of the prompt.
        cached_tokens: those of them found in the cache.
        completion_tokens: tokens generated so far.
        prompt_logprobs: on the first output, where asked for: per token of the prompt its
            log-probability, None for the first.
        bucket: of the graph that the prompt's prefill replayed; None when it ran eagerly.
        reason: why it was replayed or not.
    """

    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprob] | None
    finished: bool
    finish_reason: FinishReason | None
    error: str | None
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    prompt_logprobs: list[float | None] | None
    bucket: int | None
    reason: str | None


Waiter = tuple[asyncio.AbstractEventLoop, "asyncio.Future[None]"]


class Stream:
    """An asynchronous iterator of one request's ``Output``; for one reader, in any event loop."""

    def __init__(
        self, request: Request, tokenizer: Any | None, abort: Callable[[Request], None]
    ) -> None:
        self.request = request
        self._abort = abort
        self._text = None if request.rule is None else TextStream(tokenizer, request.rule)
        self._lock = threading.Lock()
        self._tokens: list[int] = []
        self._logprobs: list[TokenLogprob] = []
        self._completion_tokens = 0
        self._ended = self._read_end = self._read_any = False
        self._error: str | None = None
        self._waiter: Waiter | None = None

    @property
    def vector(self) -> torch.Tensor | None:
        """The result of a request that is for one; None before its end."""
        return self.request.vector

    def abort(self) -> None:
        """End the request soon; a last output says "abort". Nothing if it has ended."""
        self._abort(self.request)

    def push(self, update: Update) -> Waiter | None:
        """Take news, in the model thread. Returns whom ``wake`` is to tell, if anyone waits."""
        request = update.request
        with self._lock:
            if update.token is not None:
                self._tokens.append(update.token)
                self._completion_tokens += 1
                if update.logprob is not None:
                    self._logprobs.append(update.logprob)
            if request.finish_reason is not None:
                self._ended = True
                if request.error is not None:
                    self._error = f"{type(request.error).__name__}: {request.error}"
            waiter, self._waiter = self._waiter, None
        return waiter

    def __aiter__(self) -> Stream:
        return self

    async def __anext__(self) -> Output:
        """The news since the last call, or the next. Raises StopAsyncIteration after the end."""
        while True:
            with self._lock:
                if self._read_end:
                    raise StopAsyncIteration
                if self._tokens or self._ended:
                    tokens, self._tokens = self._tokens, []
                    logprobs, self._logprobs = self._logprobs, []
                    completion, ended = self._completion_tokens, self._ended
                    self._read_end = ended
                    break
                loop = asyncio.get_running_loop()
                future: asyncio.Future[None] = loop.create_future()
                self._waiter = (loop, future)
            await future
        return self._output(tokens, logprobs, completion, ended)

    def _output(
        self, tokens: list[int], logprobs: list[TokenLogprob], completion: int, ended: bool
    ) -> Output:
        request = self.request
        first, self._read_any = not self._read_any, True
        echo = first and request.params.prompt_logprobs
        dispatch = request.dispatch
        return Output(
            text="" if self._text is None else self._text.push(tokens, ended),
            token_ids=tokens,
            logprobs=None if request.params.logprobs is None else logprobs,
            finished=ended,
            finish_reason=request.finish_reason if ended else None,
            error=self._error if ended else None,
            prompt_tokens=request.prompt_len,
            cached_tokens=request.cached_tokens,
            completion_tokens=completion,
            prompt_logprobs=[None, *request.prompt_logprobs] if echo else None,
            bucket=None if dispatch is None else dispatch.bucket,
            reason=None if dispatch is None else dispatch.reason.value,
        )


def wake(waiters: list[Waiter]) -> None:
    """Tell readers that there is news: one call for each event loop, from any thread."""
    by_loop: dict[asyncio.AbstractEventLoop, list[asyncio.Future[None]]] = {}
    for loop, future in waiters:
        by_loop.setdefault(loop, []).append(future)
    for loop, futures in by_loop.items():
        try:
            loop.call_soon_threadsafe(_resolve, futures)
        except RuntimeError:
            continue  # the loop is closed: nobody reads there any more


def _resolve(futures: list[asyncio.Future[None]]) -> None:
    for future in futures:
        if not future.done():
            future.set_result(None)
