"""When a text ends, and what of it is shown."""

from __future__ import annotations

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from typing import Any

from breakgraph.engine.results import FinishReason

# Tokens looked at behind the last: a stop string of n characters has at most 4n bytes, a token
# is a byte at least, and some tokens (special ones) show as nothing.
BYTES_PER_CHARACTER = 4
HIDDEN_TOKENS = 8


class StopRule:
    """End tokens and stop strings.

    Raises:
        ValueError: a stop string is empty, or there is no tokenizer to look for one.
    """

    def __init__(
        self, tokenizer: Any | None, end_ids: AbstractSet[int], stop: str | Sequence[str] = ()
    ) -> None:
        self._tokenizer = tokenizer
        self._end_ids = end_ids
        self._stop = (stop,) if isinstance(stop, str) else tuple(stop)
        if not all(self._stop):
            raise ValueError("a stop string is empty; it would end every text at once")
        if self._stop and tokenizer is None:
            raise ValueError("stop strings need a tokenizer; leave out --skip-tokenizer-init")
        longest = max(map(len, self._stop), default=0)
        self._tail = BYTES_PER_CHARACTER * longest + HIDDEN_TOKENS

    def check(self, new_ids: Sequence[int], full: bool) -> FinishReason | None:
        """Why the text ends with the last of ``new_ids``, or None; ``full``: no more may come."""
        if new_ids[-1] in self._end_ids:
            return "stop"
        if self._stop:
            tail = self._decode(new_ids[-self._tail :])
            if any(stop in tail for stop in self._stop):
                return "stop"
        return "length" if full else None

    def text(self, new_ids: Sequence[int]) -> str | None:
        """The text of ``new_ids``, up to the first stop string; None without a tokenizer."""
        if self._tokenizer is None:
            return None
        text = self._decode(new_ids)
        return text[: min((text.find(s) for s in self._stop if s in text), default=len(text))]

    def _decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True)  # type: ignore[union-attr]
