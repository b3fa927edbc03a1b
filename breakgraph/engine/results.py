"""What a call of the engine returns for each prompt, in the order of the prompts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from breakgraph.engine.request import TokenLogprob


@dataclass(frozen=True, kw_only=True, slots=True)
class PrefillResult:
    """A prompt's prefill.

    Attributes:
        next_token_logits: float32 ``[vocab_size]`` on the CPU, after the last token.
        input_token_logprobs: per token of the prompt its natural log-probability given those
            before it; None for the first token. None as a whole when not asked for.
        bucket: the token bucket of the graph that was replayed; None when the forward ran
            eagerly. Of a prompt in chunks, the last chunk's.
        reason: why the forward was replayed or not.
    """

    next_token_logits: torch.Tensor
    input_token_logprobs: list[float | None] | None
    bucket: int | None
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerateResult:
    """A prompt's continuation.

    Attributes:
        text: the new text, without special tokens, cut before the stop string that ended it;
            None where no tokenizer was loaded.
        token_ids: the new tokens, with the end token or the stop string's where one came.
        prompt_tokens: tokens of the prompt.
        finish_reason: "stop" at an end token or a stop string; "length" at ``max_new_tokens``,
            at the context length, or where the KV pool holds no more.
        bucket: as in ``PrefillResult``, of the prompt's prefill.
        reason: as in ``PrefillResult``, of the prompt's prefill.
        cached_tokens: tokens of the prompt that an earlier one of the call left in the cache.
        logprobs: per new token, where ``SamplingParams.logprobs`` asked for them.
        prompt_logprobs: as ``input_token_logprobs`` of ``PrefillResult``, where asked for.
    """

    text: str | None
    token_ids: list[int]
    prompt_tokens: int
    finish_reason: Literal["stop", "length"]
    bucket: int | None
    reason: str
    cached_tokens: int = 0
    logprobs: list[TokenLogprob] | None = None
    prompt_logprobs: list[float | None] | None = None
