"""Which part of a weight a rank has: equal ranges, in the order of the ranks.

Matrix products are divided as in Megatron-LM (Shoeybi et al., 2019): by columns into a block and
by rows out of it, so that one sum over the ranks ends it. Heads, groups and experts stay whole.
"""

from __future__ import annotations

from dataclasses import dataclass

from breakgraph.distributed.group import TensorParallelGroup, current_group, expert_group


@dataclass(frozen=True, slots=True)
class Shard:
    """``begin`` to ``end`` of ``total``."""

    total: int
    begin: int
    end: int

    @property
    def size(self) -> int:
        return self.end - self.begin

    @property
    def range(self) -> slice:
        return slice(self.begin, self.end)

    def of(self, unit: int) -> Shard:
        """The same where each of the things counted is ``unit`` rows."""
        return Shard(self.total * unit, self.begin * unit, self.end * unit)

    def after(self, rows: int) -> slice:
        """The range where ``rows`` of other things lie before these."""
        return slice(rows + self.begin, rows + self.end)


def equal_shard(total: int, what: str, group: TensorParallelGroup | None = None) -> Shard:
    """This rank's of ``total`` things, as many as any other's of ``group``, else the current one.

    Raises:
        ValueError: they cannot be divided; ``what`` is the field that counts them.
    """
    group = group or current_group()
    if total % group.size:
        ranks = "--tp-size" if group is expert_group() else "--tp-size / --dp-size"
        raise ValueError(
            f"{what} {total} cannot be divided among {ranks} {group.size} ranks; choose a "
            f"{ranks} that divides it"
        )
    each = total // group.size
    return Shard(total, group.rank * each, (group.rank + 1) * each)


def kv_shard(heads: int, kv_heads: int) -> tuple[Shard, Shard]:
    """This rank's query heads, and the key-value heads that they attend to.

    Where there are fewer key-value heads than ranks, each is on several.

    Raises:
        ValueError: they cannot be divided so.
    """
    group = current_group()
    queries = equal_shard(heads, "num_attention_heads")
    if group.size > kv_heads > 0 and group.size % kv_heads == 0:
        first = group.rank * kv_heads // group.size
        return queries, Shard(kv_heads, first, first + 1)
    return queries, equal_shard(kv_heads, "num_key_value_heads")


def vocabulary_shard(vocab_size: int) -> tuple[Shard, int]:
    """This rank's tokens, and the rows that every rank makes room for: the last ranks' may be
    fewer, or none."""
    group = current_group()
    rows = -(-vocab_size // group.size)
    begin = min(group.rank * rows, vocab_size)
    return Shard(vocab_size, begin, min(begin + rows, vocab_size)), rows
