"""Every rank runs the forwards of rank 0: its batches, and what it did to states between them.

A forward goes out as one array of int64, in one broadcast unless it is long: the counts of every
batch, then the batches, one for all ranks or, with --dp-size, one for each group of them. Slots of
cached tokens are sent once: each rank keeps a copy of its request table, told apart by the versions
of its rows as the slot mirror on a device is, and gets what was added since. So a decode of 64
requests of 1000 tokens is 460 entries, packed in 39 µs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

import numpy as np
import torch

from breakgraph.distributed.ranks import Ranks
from breakgraph.distributed.watch import RankFailedError
from breakgraph.forward import ForwardBatch, ForwardMode, RankCounts

if TYPE_CHECKING:
    from breakgraph.memory import RequestTable
    from breakgraph.runner.model_runner import ModelRunner

INLINE = 1024
"""Entries of the first broadcast: 8 KiB, which hold a decode of 128 requests or a prefill of 300
tokens."""

STOP = -1
EAGER = 0
_HEADER = 6  # entries, bucket or STOP, graph allowed, decode, log-probabilities, batches
_COUNTS = 3  # of each batch: entries, tokens, requests
_FACTS = 3  # at the start of a batch: rows, targets, copies of states


class Leader:
    """Rank 0's end: tells the others each forward before it runs.

    Args:
        ranks: this process among them.
        runner: whose forwards they follow.
    """

    def __init__(self, ranks: Ranks, runner: ModelRunner) -> None:
        self._ranks = ranks
        self._packers = [_Packer(memory.table) for memory in runner.rank_memory]
        self._alone = int(ranks.group.attention.size == 1)  # nobody else runs rank 0's batch
        followed = list(zip(self._packers, runner.rank_memory, strict=True))[self._alone :]
        for packer, memory in followed:
            if memory.states is not None:
                memory.states.on_copy = packer.copied

    @contextmanager
    def forward(
        self, batches: Sequence[ForwardBatch], bucket: int | None, allow_graph: bool
    ) -> Iterator[None]:
        """Around a forward, which ``bucket`` replays, if any does.

        Args:
            batches: the one that all ranks run, or one for each group of ranks.
            bucket: what this rank has decided for.
            allow_graph: what it has decided by.

        Raises:
            ValueError: a batch cannot be sent.
            RankFailedError: a rank has failed; no forward will run any more.
        """
        if any(batch.input_embeds is not None for batch in batches):
            raise ValueError("input_embeds are on one device and cannot be used with --tp-size")
        with self._ranks.together():
            self._send(self._pack(batches, bucket or EAGER, allow_graph))
            yield

    def stop(self) -> None:
        """Let the other ranks end, if nothing has failed."""
        if not self._ranks.closed:
            watch = self._ranks.watch
            if watch is not None and watch.failure is None:
                with suppress(RankFailedError), self._ranks.together():
                    self._send(np.array([_HEADER, STOP, *[0] * (_HEADER - 2)]))
            self._ranks.close()

    def _pack(self, batches: Sequence[ForwardBatch], bucket: int, allow_graph: bool) -> np.ndarray:
        counts, parts = RankCounts.of(batches), []
        for index, (packer, batch) in enumerate(zip(self._packers, batches, strict=True)):
            here = index < self._alone
            parts.append(np.zeros(0, np.int64) if here else packer.pack(batch))
        header = [
            _HEADER + _COUNTS * len(parts) + sum(map(len, parts)),
            bucket,
            allow_graph,
            counts.mode is ForwardMode.DECODE,
            counts.with_logprobs,
            len(parts),
        ]
        for part, tokens, requests in zip(parts, counts.tokens, counts.requests, strict=True):
            header += [len(part), tokens, requests]
        return np.concatenate([np.array(header, np.int64), *parts])

    def _send(self, message: np.ndarray) -> None:
        first = torch.zeros(INLINE, dtype=torch.int64)
        whole = torch.from_numpy(message)
        first[: len(whole)] = whole[:INLINE]
        self._ranks.group.broadcast(first)
        if len(whole) > INLINE:
            self._ranks.group.broadcast(whole[INLINE:].clone())


class _Packer:
    """One batch after the other as int64, with what the ranks that run them lack of their table."""

    def __init__(self, table: RequestTable) -> None:
        self._requests = table
        self._known = np.zeros(len(table.table), np.int64)
        self._versions = np.full(len(table.table), -1, np.int64)
        self._copies: list[tuple[int, int]] = []

    def copied(self, from_slot: int, to_slot: int) -> None:
        """Note what the next batch is to find copied."""
        self._copies.append((from_slot, to_slot))

    def pack(self, batch: ForwardBatch) -> np.ndarray:
        if not batch.num_tokens:
            return np.zeros(0, np.int64)
        parts = [batch.input_ids, batch.out_cache_loc, batch.extend_lens, batch.prefix_lens]
        new = batch.prefix_slots
        if batch.rows is not None:
            rows, versions = batch.rows, self._requests.versions[batch.rows]
            known = np.where(self._versions[rows] == versions, self._known[rows], 0)
            known = np.minimum(known, batch.prefix_lens)
            table = self._requests.table
            ends = zip(rows.tolist(), known.tolist(), batch.prefix_lens.tolist(), strict=True)
            new = np.concatenate([table[row, begin:end] for row, begin, end in ends])
            parts += [rows, versions, known]
            self._versions[rows] = versions
            self._known[rows] = batch.prefix_lens + batch.extend_lens
        if batch.logprob_targets is not None:
            parts.append(batch.logprob_targets)
        copies, self._copies = np.array(self._copies, np.int64).reshape(-1), []
        facts = [batch.rows is not None, batch.logprob_targets is not None, len(copies) // 2]
        return np.concatenate([np.array(facts), *parts, new, copies], dtype=np.int64)


def follow(ranks: Ranks, runner: ModelRunner) -> None:
    """Run the forwards of rank 0 until it stops.

    Raises:
        RankFailedError: a rank has failed, this one or another.
    """
    while True:
        with ranks.together():
            message = _receive(ranks)
            if message[1] == STOP:
                break
            _run(runner, message)
    runner.drop_graphs()


def _receive(ranks: Ranks) -> np.ndarray:
    first = ranks.group.broadcast(torch.zeros(INLINE, dtype=torch.int64))
    count = int(first[0])
    if count <= INLINE:
        return first[:count].numpy()
    rest = ranks.group.broadcast(torch.zeros(count - INLINE, dtype=torch.int64))
    return torch.cat([first, rest]).numpy()


def _run(runner: ModelRunner, message: np.ndarray) -> None:
    _, bucket, allow, decode, with_logprobs, num_parts = message[:_HEADER].tolist()
    begin = _HEADER + _COUNTS * num_parts
    entries, tokens, requests = message[_HEADER:begin].reshape(num_parts, _COUNTS).T.tolist()
    mode = ForwardMode.DECODE if decode else ForwardMode.PREFILL
    mine = runner.group.dp_rank if num_parts > 1 else 0
    part = np.split(message[begin:], np.cumsum(entries)[:-1])[mine]
    batch = _unpack(runner, part, mode, tokens[mine], requests[mine])
    if runner.ranked is not None:
        counts = RankCounts(mode, tuple(tokens), tuple(requests), bool(with_logprobs))
        dispatch = runner.ranked.follow(batch, counts, allow_graph=bool(allow))
    else:
        dispatch = runner.forward(batch, allow_graph=bool(allow)).dispatch
    if (dispatch.bucket or EAGER) != bucket:
        raise RuntimeError(
            f"ranks decided differently: rank 0 for bucket {bucket}, this one for "
            f"{dispatch.bucket} ({dispatch.reason}): a bug"
        )


def _unpack(
    runner: ModelRunner, message: np.ndarray, mode: ForwardMode, tokens: int, size: int
) -> ForwardBatch:
    """The batch of ``tokens`` and ``size`` requests in ``message``, and this rank's table and
    states as they are before it."""
    if not tokens:
        return ForwardBatch.idle(mode)
    has_rows, has_targets, copies = message[:_FACTS].tolist()
    sizes = [tokens, tokens, size, size, *([size] * 3 if has_rows else [])]
    sizes += [tokens] if has_targets else []
    *parts, rest = np.split(message[_FACTS:], np.cumsum(sizes))
    slots, copied = rest[: len(rest) - 2 * copies], rest[len(rest) - 2 * copies :]
    if runner.mamba_pool is not None:
        for from_slot, to_slot in copied.reshape(-1, 2).tolist():
            runner.mamba_pool.copy(from_slot, to_slot)
    ids, where, extend, prefix = parts[:4]
    rows = None
    if has_rows:
        rows = parts[4]
        slots = _update_table(runner, where, extend, prefix, rows, parts[5], parts[6], slots)
    return ForwardBatch(
        input_ids=ids,
        out_cache_loc=where,
        extend_lens=extend.astype(np.int32),
        prefix_lens=prefix.astype(np.int32),
        prefix_slots=slots,
        logprob_targets=parts[-1] if has_targets else None,
        mode=mode,
        rows=rows,
    )


def _update_table(
    runner: ModelRunner,
    where: np.ndarray,
    extend: np.ndarray,
    prefix: np.ndarray,
    rows: np.ndarray,
    versions: np.ndarray,
    known: np.ndarray,
    new: np.ndarray,
) -> np.ndarray:
    """Bring the table's rows up to date; returns the slots of all cached tokens, packed."""
    table, begin, at = runner.requests.table, 0, 0
    packed = []
    lengths = zip(rows.tolist(), known.tolist(), prefix.tolist(), extend.tolist(), strict=True)
    for row, old, cached, count in lengths:
        table[row, old:cached] = new[begin : begin + cached - old]
        table[row, cached : cached + count] = where[at : at + count]
        packed.append(table[row, :cached].astype(np.int64))
        begin, at = begin + cached - old, at + count
    runner.requests.versions[rows] = versions
    return np.concatenate(packed)
