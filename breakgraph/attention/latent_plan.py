"""How cached prefixes of latent attention are served, planned once a forward on the host.

Only the live batch's lengths enter. A cached token is one latent row, which serves in two ways
with the same result (Liu et al., 2024, DeepSeek-V2):

- up-projected: its keys and values are made anew and attended as in any multi-head attention;
- absorbed: queries are taken to the latent space, and what they gather there is taken to values.

Up-projection costs by the prefix, absorption by the new tokens, and a pair of query and key more
than three times as much: so few new tokens behind a long prefix are served absorbed, the others
up-projected. Each request takes whichever way needs fewer multiplications.
"""

from __future__ import annotations

from dataclasses import dataclass

from breakgraph.forward import ForwardBatch


@dataclass(frozen=True, kw_only=True, slots=True)
class LatentShape:
    """The sizes of a latent attention layer.

    Attributes:
        num_heads: query heads.
        nope_dim: elements of a query or key head that are not rotated.
        rope_dim: elements that are; the key's are shared by all heads.
        value_dim: elements of a value head.
        rank: elements of the latent that keys and values are made of.
    """

    num_heads: int
    nope_dim: int
    rope_dim: int
    value_dim: int
    rank: int

    @property
    def qk_dim(self) -> int:
        """Elements of a query or key head."""
        return self.nope_dim + self.rope_dim

    @property
    def row_dim(self) -> int:
        """Elements of a cached row: the latent, then the rotated key."""
        return self.rank + self.rope_dim

    def up_projected_cost(self, new: int, prefix: int) -> int:
        """Multiplications a head of ``new`` queries over ``prefix`` cached tokens."""
        per_key = self.rank * (self.nope_dim + self.value_dim)
        return prefix * (per_key + new * (self.qk_dim + self.value_dim))

    def absorbed_cost(self, new: int, prefix: int) -> int:
        """As ``up_projected_cost``, absorbed."""
        per_query = self.rank * (self.nope_dim + self.value_dim)
        return new * (per_query + prefix * (self.row_dim + self.rank))

    def prefers_absorbed(self, new: int, prefix: int) -> bool:
        """Whether ``new`` tokens behind ``prefix`` cached ones are better served absorbed.

        In DeepSeek-V3's shape that is up to 170 new tokens behind a long prefix, and one token
        behind any prefix of two.
        """
        return self.absorbed_cost(new, prefix) < self.up_projected_cost(new, prefix)


@dataclass(frozen=True, slots=True)
class PrefixPart:
    """Cached tokens of neighbouring requests, served together and in one way.

    Attributes:
        rows: where the requests' new tokens begin and end in the batch.
        keys: where the cached tokens begin and end in ``ForwardBatch.prefix_slots``.
        new_lens: new tokens of each request.
        key_lens: cached tokens of each that are part of this.
        absorbed: how; an absorbed part is of one request.
    """

    rows: tuple[int, int]
    keys: tuple[int, int]
    new_lens: tuple[int, ...]
    key_lens: tuple[int, ...]
    absorbed: bool


def plan_prefixes(
    batch: ForwardBatch, shape: LatentShape, chunk_tokens: int, absorbed_tokens: int
) -> list[PrefixPart]:
    """Divide the cached prefixes of ``batch`` into parts.

    Every cached token is in one part, and every part has a key for each of its rows. A part has at
    most ``chunk_tokens`` tokens, an absorbed one ``absorbed_tokens``.
    """
    parts: list[PrefixPart] = []
    opened: list[tuple[int, int]] = []
    row = key = 0

    def close(row_end: int, key_end: int) -> None:
        if opened:
            new, keys = zip(*opened, strict=True)
            rows = (row_end - sum(new), row_end)
            parts.append(PrefixPart(rows, (key_end - sum(keys), key_end), new, keys, False))
            opened.clear()

    for new, prefix in zip(batch.extend_lens.tolist(), batch.prefix_lens.tolist(), strict=True):
        absorbed = shape.prefers_absorbed(new, prefix)
        if absorbed or not prefix:
            close(row, key)
        end, next_row = key + prefix, row + new
        while key < end:
            if absorbed:
                taken = min(end - key, absorbed_tokens)
                span = (key, key + taken)
                parts.append(PrefixPart((row, next_row), span, (new,), (taken,), True))
            else:
                room = chunk_tokens - sum(keys for _, keys in opened)
                taken = min(end - key, room)
                opened.append((new, taken))
                if taken == room:
                    close(next_row, key + taken)
            key += taken
        row = next_row
    close(row, key)
    return parts
