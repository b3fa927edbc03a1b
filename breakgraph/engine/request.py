"""A request on its way through the forwards.

All that its result depends on is here, none of it in a row of the table or on the device: so a
request can give back its slots at any step, wait, and go on later as if nothing had been.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Literal

import torch

from breakgraph.engine.sampling_params import SamplingParams

if TYPE_CHECKING:
    from breakgraph.engine.stopping import StopRule
    from breakgraph.runner.buckets import Dispatch

FinishReason = Literal["stop", "length", "abort", "deadline", "error"]


class Want(Enum):
    """What a request is for."""

    TOKENS = "tokens"  # a continuation
    LOGITS = "logits"  # the logits after its last token, or labels' log-probabilities
    POOLED = "pooled"  # an embedding, or class logits
    NOTHING = "nothing"  # to be computed, as in a dry run


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A generated token's log-probability, and those of the likeliest ones, best first."""

    token_id: int
    logprob: float
    top: list[tuple[int, float]]


@dataclass(slots=True, eq=False)
class Request:
    """A prompt, what has been made of it, and where it stands.

    Attributes:
        ids: the prompt's tokens, and behind them the generated ones.
        params: how to generate.
        max_len: ``ids`` never get longer.
        rule: when its text ends; None where it has none.
        prompt_len: tokens of the prompt.
        want: what it is for.
        labels: with ``Want.LOGITS``: the tokens whose log-probabilities are wanted.
        use_cache: whether it reads and leaves cached prefixes.
        allow_graph: False runs its prefill eagerly.
        deadline: by ``time.monotonic()``, when it ends as it is; None for never.
        rank: which rank it runs on, where ranks hold different requests.
        number: its place among all requests of its scheduler; the lower goes first.
        seed: of its draws.
        started: whether it ever ran.
        computed: leading tokens of ``ids`` that lie in the pool.
        row: its row in the request table; None while it holds none.
        cached_tokens: tokens of the prompt found in the cache when it first ran.
        vector: the result of ``Want.LOGITS`` or ``Want.POOLED``: float32, on the CPU.
        prompt_logprobs: of the prompt's tokens but the first, as far as computed.
        logprobs: of the generated tokens, where wanted.
        dispatch: of the prompt's last prefill.
        finish_reason: why it ended; None before.
        error: what ended it, with "error".
        counts: how often each token was generated.
    """

    ids: list[int]
    params: SamplingParams
    max_len: int
    rule: StopRule | None = None
    want: Want = Want.TOKENS
    labels: tuple[int, ...] = ()
    use_cache: bool = True
    allow_graph: bool = True
    deadline: float | None = None
    rank: int = 0
    number: int = -1
    seed: int = 0
    started: bool = False
    computed: int = 0
    row: int | None = None
    cached_tokens: int = 0
    vector: torch.Tensor | None = None
    prompt_logprobs: list[float] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    dispatch: Dispatch | None = None
    finish_reason: FinishReason | None = None
    error: BaseException | None = None
    counts: dict[int, int] = field(default_factory=dict)
    prompt_len: int = field(init=False)

    def __post_init__(self) -> None:
        self.prompt_len = len(self.ids)

    @property
    def remaining(self) -> int:
        """Known tokens that no forward has taken yet."""
        return len(self.ids) - self.computed

    @property
    def is_prefilling(self) -> bool:
        """Whether its next forward is a prefill: of the prompt, or after a retraction."""
        return self.computed < self.prompt_len or self.remaining > 1

    @property
    def max_cached(self) -> int:
        """The most tokens of it that ever lie in the pool: the one generated last never does."""
        return self.max_len - 1 if self.want is Want.TOKENS else len(self.ids)

    @property
    def new_ids(self) -> list[int]:
        """The tokens generated so far."""
        return self.ids[self.prompt_len :]

    @property
    def num_new(self) -> int:
        return len(self.ids) - self.prompt_len

    @property
    def wants_prompt_logprobs(self) -> bool:
        return self.params.prompt_logprobs and len(self.prompt_logprobs) < self.prompt_len - 1

    @property
    def reusable(self) -> list[int]:
        """The tokens that may be taken from the cache: never the last, whose logits are wanted."""
        if not self.use_cache:
            return []
        end = len(self.ids) - 1
        return self.ids[
            : min(end, len(self.prompt_logprobs)) if self.wants_prompt_logprobs else end
        ]

    def append(self, token: int, logprob: TokenLogprob | None = None) -> None:
        """Take a generated token."""
        self.ids.append(token)
        if logprob is not None:
            self.logprobs.append(logprob)
        self.counts[token] = self.counts.get(token, 0) + 1
