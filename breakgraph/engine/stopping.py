"""When a text ends, and what of it is shown.

Text that was shown is never taken back: what may be half a character, or the beginning of a stop
string, is held until the tokens behind it tell.
"""

from __future__ import annotations

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from typing import Any

from breakgraph.engine.request import FinishReason

# Tokens looked at behind the last: a stop string of n characters has at most 4n bytes, a token
# is a byte at least, and some tokens (special ones) show as nothing.
BYTES_PER_CHARACTER = 4
HIDDEN_TOKENS = 8
# A character has four bytes at most, so more tokens than this that end in no character never will.
LONGEST_CHARACTER = 8
LONGEST_CONTEXT = 64
UNFINISHED = "\ufffd"


class StopRule:
    """End tokens and stop strings.

    Raises:
        ValueError: there is no tokenizer to look for a stop string.
    """

    def __init__(
        self, tokenizer: Any | None, end_ids: AbstractSet[int], stop: Sequence[str] = ()
    ) -> None:
        if stop and tokenizer is None:
            raise ValueError("stop strings need a tokenizer; leave out --skip-tokenizer-init")
        self.end_ids = end_ids
        self.stop = tuple(stop)
        self._tokenizer = tokenizer
        longest = max(map(len, self.stop), default=0)
        self._tail = BYTES_PER_CHARACTER * longest + HIDDEN_TOKENS

    def check(self, ids: Sequence[int], num_new: int, full: bool) -> FinishReason | None:
        """Why the text ends with the last of ``ids``, or None.

        Args:
            ids: a request's tokens, of which the last ``num_new`` are generated.
            num_new: at least 1.
            full: whether no more may come.
        """
        if ids[-1] in self.end_ids:
            return "stop"
        if self.stop and self._tokenizer is not None:
            tail = decode(self._tokenizer, ids[-min(self._tail, num_new) :])
            if any(stop in tail for stop in self.stop):
                return "stop"
        return "length" if full else None


class TextStream:
    """The text of a growing list of tokens, piece by piece, without special tokens.

    It ends before the first stop string, and shows nothing of an end token. Without a tokenizer
    it is empty.
    """

    def __init__(self, tokenizer: Any | None, rule: StopRule) -> None:
        self._tokenizer = tokenizer
        self._rule = rule
        self._ids: list[int] = []  # those shown last, for context, and those not shown yet
        self._shown = 0
        self._held = ""  # shown by the tokens, but perhaps the beginning of a stop string
        self._stopped = False

    def push(self, ids: Sequence[int], finished: bool = False) -> str:
        """The text that ``ids``, coming next, make certain; all of it when ``finished``."""
        if self._tokenizer is None or self._stopped:
            return ""
        if finished and ids and ids[-1] in self._rule.end_ids:
            ids = ids[:-1]
        self._held += self._decode(ids, finished)
        stops = self._rule.stop
        ends = [place for stop in stops if (place := self._held.find(stop)) >= 0]
        if ends:
            self._stopped = True
            return self._held[: min(ends)]
        hold = 0 if finished else max((_overlap(self._held, stop) for stop in stops), default=0)
        certain = len(self._held) - hold
        text, self._held = self._held[:certain], self._held[certain:]
        return text

    def _decode(self, ids: Sequence[int], finished: bool) -> str:
        """The characters that are complete with ``ids``."""
        self._ids += ids
        end = len(self._ids) if finished else self._complete()
        if end == self._shown:
            return ""
        before = self._text(0, self._shown)
        text = self._text(0, end)
        # What is shown now stays as context for the next: some tokens decode otherwise at the
        # beginning. Tokens that show as nothing are no context.
        if len(text) > len(before) or end > LONGEST_CONTEXT:
            self._ids = self._ids[self._shown :]
            end -= self._shown
        self._shown = end
        return text[len(before) :]

    def _complete(self) -> int:
        """How many tokens end in a complete character."""
        total = len(self._ids)
        for end in range(total, max(self._shown, total - LONGEST_CHARACTER), -1):
            if not self._text(0, end).endswith(UNFINISHED):
                return end
        if total - self._shown <= LONGEST_CHARACTER:
            return self._shown
        # Bytes that are no text. The last few may begin a character still; split before them
        # where that changes nothing.
        text = self._text(0, total)
        for end in range(total - BYTES_PER_CHARACTER, total):
            if self._text(0, end) + self._text(end, total) == text:
                return end
        return total

    def _text(self, begin: int, end: int) -> str:
        return decode(self._tokenizer, self._ids[begin:end]) if begin < end else ""


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of ``text`` that begins ``stop``."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0


def decode(tokenizer: Any, ids: Sequence[int]) -> str:
    """The text of ``ids`` without special tokens."""
    return tokenizer.decode(ids, skip_special_tokens=True)
