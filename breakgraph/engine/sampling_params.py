"""What a client may ask of a generation, checked once, when it is made."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

MAX_LOGPROBS = 100


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """How tokens are chosen, and when they end. Raises ValueError, naming the field.

    Attributes:
        max_new_tokens: at least 1; fewer come where the context or the KV pool ends.
        temperature: 0 takes the likeliest token; above 0 the logits are divided by it.
        top_p: draw from the fewest likeliest tokens that have this probability together.
        top_k: draw from this many likeliest tokens; 0 or -1 from all.
        min_p: leave out tokens less likely than this share of the likeliest one's probability.
        seed: draws depend on it and on the number of the token alone; None takes one of the
            engine's.
        stop: the text ends before any of these strings.
        stop_token_ids: the text ends at any of these tokens.
        ignore_eos: go on after the model's end tokens.
        frequency_penalty: taken from a token's logit for each time it was generated, -2 to 2.
        presence_penalty: taken from it if it was generated at all, -2 to 2.
        logprobs: for each token its log-probability and this many likeliest alternatives',
            by the model's own distribution, before temperature and penalties.
        prompt_logprobs: the log-probability of each token of the prompt, too.
    """

    max_new_tokens: int = 128
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logprobs: int | None = None
    prompt_logprobs: bool = False

    def __post_init__(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        object.__setattr__(self, "stop", stop)
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        for name, wanted, good in (
            ("max_new_tokens", "at least 1", _is_int(self.max_new_tokens, 1)),
            ("temperature", "0 or more", _is_number(self.temperature, 0, math.inf)),
            ("top_p", "above 0 and at most 1", _is_number(self.top_p, 0, 1) and self.top_p > 0),
            ("top_k", "at least 1, or 0 or -1 for all", _is_int(self.top_k, -1)),
            ("min_p", "from 0 to 1", _is_number(self.min_p, 0, 1)),
            ("seed", "a whole number", self.seed is None or _is_int(self.seed)),
            ("frequency_penalty", "from -2 to 2", _is_number(self.frequency_penalty, -2, 2)),
            ("presence_penalty", "from -2 to 2", _is_number(self.presence_penalty, -2, 2)),
            (
                "logprobs",
                f"from 0 to {MAX_LOGPROBS}",
                self.logprobs is None or _is_int(self.logprobs, 0, MAX_LOGPROBS),
            ),
            ("stop_token_ids", "token ids", all(_is_int(i, 0) for i in self.stop_token_ids)),
        ):
            if not good:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be {wanted}")
        if not all(isinstance(one, str) for one in stop):
            raise ValueError(f"stop is {self.stop!r}; it must be strings")
        if not all(stop):
            raise ValueError("stop: a stop string is empty; it would end every text at once")

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0 or self.top_k == 1


def _is_int(value: Any, least: float = -math.inf, most: float = math.inf) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def _is_number(value: Any, least: float, most: float) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and least <= value <= most and math.isfinite(value)
