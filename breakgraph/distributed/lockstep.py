"""Every rank runs the forwards of rank 0: its batches, and what it did to states between them.

A batch goes out as one array of int64, in one broadcast unless it is long. Slots of cached tokens
are sent once: each rank keeps a copy of the request table, told apart by the versions of its rows
as the slot mirror on a device is, and gets what was added since. So a decode of 64 requests of
1000 tokens is 457 entries, packed in 34 µs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

import numpy as np
import torch

from breakgraph.distributed.ranks import Ranks
from breakgraph.distributed.watch import RankFailedError
from breakgraph.forward import ForwardBatch, ForwardMode

if TYPE_CHECKING:
    from breakgraph.runner.model_runner import ModelRunner

INLINE = 1024
"""Entries of the first broadcast: 8 KiB, which hold a decode of 128 requests or a prefill of 300
tokens."""

STOP = -1
EAGER = 0
_HEADER = 9


class Leader:
    """Rank 0's end: tells the others each forward before it runs.

    Args:
        ranks: this process among them.
        runner: whose forwards they follow.
    """

    def __init__(self, ranks: Ranks, runner: ModelRunner) -> None:
        self._ranks, self._runner = ranks, runner
        rows = len(runner.requests.table)
        self._known = np.zeros(rows, np.int64)
        self._versions = np.full(rows, -1, np.int64)
        self._copies: list[tuple[int, int]] = []
        if runner.mamba_pool is not None:
            runner.mamba_pool.on_copy = lambda *slots: self._copies.append(slots)

    @contextmanager
    def forward(self, batch: ForwardBatch, bucket: int | None, allow_graph: bool) -> Iterator[None]:
        """Around the forward of ``batch``, which ``bucket`` replays, if any does.

        Raises:
            ValueError: the batch cannot be sent.
            RankFailedError: a rank has failed; no forward will run any more.
        """
        if batch.input_embeds is not None:
            raise ValueError("input_embeds are on one device and cannot be used with --tp-size")
        with self._ranks.together():
            self._send(self._pack(batch, bucket or EAGER, allow_graph))
            yield

    def stop(self) -> None:
        """Let the other ranks end, if nothing has failed."""
        if not self._ranks.closed:
            watch = self._ranks.watch
            if watch is not None and watch.failure is None:
                with suppress(RankFailedError), self._ranks.together():
                    self._send(np.array([_HEADER, STOP, *[0] * (_HEADER - 2)]))
            self._ranks.close()

    def _pack(self, batch: ForwardBatch, bucket: int, allow_graph: bool) -> np.ndarray:
        parts = [batch.input_ids, batch.out_cache_loc, batch.extend_lens, batch.prefix_lens]
        new = batch.prefix_slots
        if batch.rows is not None:
            rows, versions = batch.rows, self._runner.requests.versions[batch.rows]
            known = np.where(self._versions[rows] == versions, self._known[rows], 0)
            known = np.minimum(known, batch.prefix_lens)
            table = self._runner.requests.table
            ends = zip(rows.tolist(), known.tolist(), batch.prefix_lens.tolist(), strict=True)
            new = np.concatenate([table[row, begin:end] for row, begin, end in ends])
            parts += [rows, versions, known]
            self._versions[rows] = versions
            self._known[rows] = batch.prefix_lens + batch.extend_lens
        if batch.logprob_targets is not None:
            parts.append(batch.logprob_targets)
        copies, self._copies = np.array(self._copies, np.int64).reshape(-1), []
        body = np.concatenate([*parts, new, copies], dtype=np.int64)
        header = [
            _HEADER + len(body),
            bucket,
            allow_graph,
            batch.mode is ForwardMode.DECODE,
            batch.num_tokens,
            batch.batch_size,
            batch.rows is not None,
            batch.logprob_targets is not None,
            len(copies) // 2,
        ]
        return np.concatenate([np.array(header, np.int64), body])

    def _send(self, message: np.ndarray) -> None:
        first = torch.zeros(INLINE, dtype=torch.int64)
        whole = torch.from_numpy(message)
        first[: len(whole)] = whole[:INLINE]
        self._ranks.group.broadcast(first)
        if len(whole) > INLINE:
            self._ranks.group.broadcast(whole[INLINE:].clone())


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


def _receive(ranks: Ranks) -> np.ndarray:
    first = ranks.group.broadcast(torch.zeros(INLINE, dtype=torch.int64))
    count = int(first[0])
    if count <= INLINE:
        return first[:count].numpy()
    rest = ranks.group.broadcast(torch.zeros(count - INLINE, dtype=torch.int64))
    return torch.cat([first, rest]).numpy()


def _run(runner: ModelRunner, message: np.ndarray) -> None:
    header = message[:_HEADER].tolist()
    _, bucket, allow, decode, tokens, size, has_rows, has_targets, copies = header
    sizes = [tokens, tokens, size, size, *([size] * 3 if has_rows else [])]
    sizes += [tokens] if has_targets else []
    ends = (_HEADER + np.cumsum(sizes)).tolist()
    *parts, rest = np.split(message[_HEADER:], [end - _HEADER for end in ends])
    slots, copied = rest[: len(rest) - 2 * copies], rest[len(rest) - 2 * copies :]
    if runner.mamba_pool is not None:
        for from_slot, to_slot in copied.reshape(-1, 2).tolist():
            runner.mamba_pool.copy(from_slot, to_slot)
    ids, where, extend, prefix = parts[:4]
    rows = None
    if has_rows:
        rows = parts[4]
        slots = _update_table(runner, where, extend, prefix, rows, parts[5], parts[6], slots)
    batch = ForwardBatch(
        input_ids=ids,
        out_cache_loc=where,
        extend_lens=extend.astype(np.int32),
        prefix_lens=prefix.astype(np.int32),
        prefix_slots=slots,
        logprob_targets=parts[-1] if has_targets else None,
        mode=ForwardMode.DECODE if decode else ForwardMode.PREFILL,
        rows=rows,
    )
    result = runner.forward(batch, allow_graph=bool(allow))
    if (result.dispatch.bucket or EAGER) != bucket:
        raise RuntimeError(
            f"ranks decided differently: rank 0 for bucket {bucket}, this one for "
            f"{result.dispatch.bucket} ({result.dispatch.reason}): a bug"
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
