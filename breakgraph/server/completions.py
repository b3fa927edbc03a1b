"""``/v1/completions`` and ``/v1/chat/completions``: the same streams in two dialects.

A dialect says how a choice, a chunk and log-probabilities are written; running is the same.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Any

from starlette.responses import JSONResponse, Response

from breakgraph.engine.request import TokenLogprob
from breakgraph.server.errors import ApiError
from breakgraph.server.generation import Choice, merged, sampling_params, submit, usage
from breakgraph.server.protocol import ChatRequest, CompletionRequest, Generation
from breakgraph.server.service import Service
from breakgraph.server.streaming import EventStream
from breakgraph.server.text import Text

DEFAULT_MAX_TOKENS = 16  # of completions, as OpenAI's; a chat may go on to the end of the context


class CompletionDialect:
    """How a completion is written. Text offsets count characters, prompt included with echo."""

    kind, chunk_kind, prefix = "text_completion", "text_completion", "cmpl"

    def __init__(self, request: CompletionRequest, text: Text) -> None:
        self._request, self._text = request, text
        self._none_wanted = request.max_tokens == 0  # echo alone: one token is made and not shown

    def choice(self, choice: Choice) -> dict[str, Any]:
        shown = "" if self._none_wanted else choice.text
        return {"text": self._echo(choice) + shown} | self._logprobs(choice, choice.logprobs, True)

    def first(self, choice: Choice) -> dict[str, Any] | None:
        return None

    def delta(
        self, choice: Choice, text: str, logprobs: Sequence[TokenLogprob], first: bool
    ) -> dict[str, Any]:
        shown = "" if self._none_wanted else text
        echo = self._echo(choice) if first else ""
        return {"text": echo + shown} | self._logprobs(choice, logprobs, first)

    def _echo(self, choice: Choice) -> str:
        return self._text.decode(choice.prompt_ids) if self._request.echo else ""

    def _logprobs(self, choice: Choice, new: Sequence[TokenLogprob], first: bool) -> dict[str, Any]:
        if self._request.logprobs is None:
            return {"logprobs": None}
        token = self._text.token
        tokens: list[str] = []
        values: list[float | None] = []
        top: list[dict[str, float] | None] = []
        if self._request.echo and first:
            tokens += map(token, choice.prompt_ids)
            values += choice.prompt_logprobs or [None] * len(choice.prompt_ids)
            top += [None] * len(choice.prompt_ids)
        if not self._none_wanted:
            tokens += [token(one.token_id) for one in new]
            values += [one.logprob for one in new]
            top += [{token(i): value for i, value in one.top} for one in new]
        offsets = []
        for word in tokens:
            offsets.append(choice.written)
            choice.written += len(word)
        return {
            "logprobs": {
                "tokens": tokens,
                "token_logprobs": values,
                "top_logprobs": top,
                "text_offset": offsets,
            }
        }


class ChatDialect:
    """How a chat completion is written."""

    kind, chunk_kind, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def __init__(self, request: ChatRequest, text: Text) -> None:
        self._request, self._text = request, text

    def choice(self, choice: Choice) -> dict[str, Any]:
        message = {"role": "assistant", "content": choice.text}
        return {"message": message} | self._logprobs(choice.logprobs)

    def first(self, choice: Choice) -> dict[str, Any] | None:
        return {"delta": {"role": "assistant", "content": ""}, "logprobs": None}

    def delta(
        self, choice: Choice, text: str, logprobs: Sequence[TokenLogprob], first: bool
    ) -> dict[str, Any]:
        return {"delta": {"content": text}} | self._logprobs(logprobs)

    def _logprobs(self, logprobs: Sequence[TokenLogprob]) -> dict[str, Any]:
        if not self._request.logprobs:
            return {"logprobs": None}
        content = [
            self._entry(one.token_id, one.logprob)
            | {"top_logprobs": [self._entry(i, value) for i, value in one.top]}
            for one in logprobs
        ]
        return {"logprobs": {"content": content, "refusal": None}}

    def _entry(self, token_id: int, logprob: float) -> dict[str, Any]:
        token = self._text.token(token_id)
        return {"token": token, "logprob": logprob, "bytes": list(token.encode())}


async def complete(service: Service, request: CompletionRequest, state: dict[str, Any]) -> Response:
    """Answer ``POST /v1/completions``."""
    prompts = await service.text.encode(request.prompt, "prompt")
    if request.max_tokens == 0 and not request.echo:
        raise ApiError(400, "max_tokens is 0, which needs echo", param="max_tokens")
    wanted = request.max_tokens if request.max_tokens is not None else DEFAULT_MAX_TOKENS
    return await _answer(
        service,
        request,
        state,
        CompletionDialect(request, service.text),
        prompts,
        max_tokens=wanted or 1,
        logprobs=request.logprobs,
        prompt_logprobs=bool(request.echo and request.logprobs is not None),
    )


async def chat(service: Service, request: ChatRequest, state: dict[str, Any]) -> Response:
    """Answer ``POST /v1/chat/completions``."""
    messages = [message.model_dump(exclude_none=True) for message in request.messages]
    for message in messages:
        if isinstance(message.get("content"), list):
            message["content"] = _joined(message["content"])
    ids = await service.text.chat(messages, request.chat_template_kwargs)
    given = request.max_completion_tokens
    wanted = given if given is not None else request.max_tokens
    room = max(service.context_length - len(ids), 1)
    return await _answer(
        service,
        request,
        state,
        ChatDialect(request, service.text),
        [ids],
        max_tokens=room if wanted is None else wanted,
        logprobs=(request.top_logprobs or 0) if request.logprobs else None,
        prompt_logprobs=False,
    )


async def _answer(
    service: Service,
    request: Generation,
    state: dict[str, Any],
    dialect: CompletionDialect | ChatDialect,
    prompts: list[list[int]],
    *,
    max_tokens: int,
    logprobs: int | None,
    prompt_logprobs: bool,
) -> Response:
    service.check_model(request.model)
    n = request.n or 1
    service.check_count(len(prompts) * n, "prompts times n")
    if max_tokens > service.context_length:
        raise ApiError(
            400,
            f"max_tokens is {max_tokens}; the model's context is {service.context_length}",
            param="max_tokens",
        )
    params = sampling_params(
        request, max_tokens, logprobs=logprobs, prompt_logprobs=prompt_logprobs
    )
    choices = submit(service.engine, prompts, params, state["running"])
    outputs = merged(choices, service.metrics, state["began"])
    head = {
        "id": f"{dialect.prefix}-{uuid.uuid4().hex}",
        "created": int(time.time()),
        "model": service.model_name,
    }
    with_ids = request.return_token_ids or service.text.tokenizer is None

    async def chunks() -> AsyncIterator[dict[str, Any]]:
        include = bool(request.stream_options and request.stream_options.include_usage)
        base = head | {"object": dialect.chunk_kind}
        if include:
            base["usage"] = None
        begun: set[int] = set()
        async for choice, output in outputs:
            first = choice.index not in begun
            begun.add(choice.index)
            opening = dialect.first(choice) if first else None
            if opening is not None:
                one = {"index": choice.index, **opening, "finish_reason": None}
                yield base | {"choices": [one]}
            one = {"index": choice.index}
            one |= dialect.delta(choice, output.text, output.logprobs or (), first)
            one["finish_reason"] = output.finish_reason
            if with_ids:
                one["token_ids"] = list(output.token_ids)
            if output.finished:
                one["prefill"] = choice.prefill
            yield base | {"choices": [one]}
        if include:
            yield base | {"choices": [], "usage": usage(choices, n)}

    if request.stream:
        return EventStream(chunks())
    async for _ in outputs:
        pass
    body: dict[str, Any] = head | {"object": dialect.kind, "choices": []}
    for choice in choices:
        one = {"index": choice.index} | dialect.choice(choice)
        one |= {"finish_reason": choice.finish_reason, "prefill": choice.prefill}
        if with_ids:
            one["token_ids"] = choice.token_ids
        body["choices"].append(one)
    return JSONResponse(body | {"usage": usage(choices, n)})


def _joined(parts: list[dict[str, Any]]) -> str:
    """The text of a message in parts; templates know one text."""
    for part in parts:
        if part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise ApiError(
                400,
                f"a message part of type {part.get('type')!r} is not supported; this model reads "
                "text only",
                param="messages",
            )
    return "".join(part["text"] for part in parts)
