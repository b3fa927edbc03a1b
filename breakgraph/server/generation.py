"""From a request to running streams and back to choices.

Every stream is submitted before the first byte of an answer, so that what the engine refuses is
an HTTP status; what fails later is an error in the body or the event stream, of this request only.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from breakgraph.engine.async_engine import AsyncEngine, Output, Stream
from breakgraph.engine.request import TokenLogprob
from breakgraph.engine.sampling_params import SamplingParams
from breakgraph.server.errors import ApiError, refusals
from breakgraph.server.metrics import ServerMetrics
from breakgraph.server.protocol import Generation


@dataclass(slots=True)
class Choice:
    """One continuation of one prompt, as far as it has come.

    ``written`` counts the characters of the tokens whose log-probabilities were written.
    """

    index: int
    prompt_ids: list[int]
    stream: Stream
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: list[float | None] | None = None
    last: Output | None = None
    written: int = 0

    def take(self, output: Output) -> None:
        self.text += output.text
        self.token_ids += output.token_ids
        self.logprobs += output.logprobs or ()
        self.prompt_logprobs = output.prompt_logprobs or self.prompt_logprobs  # on the first one
        self.last = output

    @property
    def finish_reason(self) -> str | None:
        return None if self.last is None else self.last.finish_reason

    @property
    def prefill(self) -> dict[str, Any]:
        """How the prompt's prefill ran."""
        return {} if self.last is None else {"bucket": self.last.bucket, "reason": self.last.reason}


def sampling_params(
    request: Generation, max_tokens: int, *, logprobs: int | None = None, prompt_logprobs: bool
) -> list[SamplingParams]:
    """The parameters of each of the ``n`` choices; with a seed, each draws by one of its own."""
    given = request.model_dump(
        include={
            *("temperature", "top_p", "top_k", "min_p", "stop", "stop_token_ids", "ignore_eos"),
            *("frequency_penalty", "presence_penalty"),
        },
        exclude_none=True,
    )
    with refusals():
        return [
            SamplingParams(
                max_new_tokens=max_tokens,
                seed=None if request.seed is None else request.seed + index,
                logprobs=logprobs,
                prompt_logprobs=prompt_logprobs,
                **given,
            )
            for index in range(request.n or 1)
        ]


def submit(
    engine: AsyncEngine,
    prompts: Sequence[list[int]],
    params: Sequence[SamplingParams],
    running: list[Any],
) -> list[Choice]:
    """A stream for each prompt and each of ``params``; ``running`` gets each as it begins."""
    choices: list[Choice] = []
    for ids in prompts:
        for one in params:
            with refusals():
                stream = engine.submit(ids, one, deadline_seconds=engine.args.request_seconds)
            running.append(stream)
            choices.append(Choice(len(choices), ids, stream))
    return choices


async def merged(
    choices: Sequence[Choice], metrics: ServerMetrics, began: float
) -> AsyncIterator[tuple[Choice, Output]]:
    """Each output of each choice as it comes, already taken into its choice.

    Raises:
        ApiError: one failed or ran out of time; the others are left to the gate, which aborts them.
    """
    latest: dict[int, float] = {}
    async for choice, output in _outputs(choices):
        now = time.perf_counter()
        if output.token_ids:
            before = latest.get(choice.index)
            metrics.tokens(len(output.token_ids), now - (before or began), first=before is None)
            latest[choice.index] = now
        choice.take(output)
        if output.finished:
            _check(output)
        yield choice, output


async def _outputs(choices: Sequence[Choice]) -> AsyncIterator[tuple[Choice, Output]]:
    """Each output of each choice, as it comes."""
    if len(choices) == 1:  # most requests: no tasks, so nothing between the engine and the client
        async for output in choices[0].stream:
            yield choices[0], output
        return
    queue: asyncio.Queue[tuple[Choice, Output | Exception]] = asyncio.Queue(len(choices))

    async def pump(choice: Choice) -> None:
        try:
            async for output in choice.stream:
                await queue.put((choice, output))
        except Exception as error:
            await queue.put((choice, error))

    pumps = [asyncio.ensure_future(pump(choice)) for choice in choices]
    try:
        left = len(choices)
        while left:
            choice, news = await queue.get()
            if isinstance(news, Exception):
                raise news
            left -= news.finished
            yield choice, news
    finally:
        for task in pumps:
            task.cancel()


def usage(choices: Sequence[Choice], n: int) -> dict[str, Any]:
    """Tokens counted; a prompt counts once, whatever ``n`` is."""
    last = [choice.last for choice in choices if choice.last is not None]
    prompt = sum(len(choice.prompt_ids) for choice in choices[::n])
    completion = sum(len(choice.token_ids) for choice in choices)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": sum(out.cached_tokens for out in last)},
    }


def _check(output: Output) -> None:
    """Raise what a finished stream says went wrong."""
    match output.finish_reason:
        case "error":
            raise ApiError(500, f"this request failed: {output.error}", code="generation_failed")
        case "deadline":
            raise ApiError(
                504, "the request took longer than --request-seconds allows", code="deadline"
            )
        case "abort":
            raise ApiError(503, "the request was aborted by the server", code="aborted")
