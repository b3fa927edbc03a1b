"""The ranks that share one model: who this one is, and how tensors go between them.

Every rank calls the same collectives in the same order; what decides an order is therefore always
something that every rank knows. A layer takes the group at hand when it is made, so models pass
none around; with one rank every method here is the identity and records no op.

Where ranks hold different requests (``data_parallel``) they share the experts alone: every other
layer is divided over ``attention``, the ranks that hold the same requests as this one.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from breakgraph.distributed import collectives


class TensorParallelGroup:
    """``size`` ranks, of which this is ``rank``.

    Attributes:
        rank: 0 schedules, samples and serves; the others follow.
        size: ranks.
        local_rank: the place of this rank on its host, which is its CUDA device.
        scatters_rows: whether mixtures of experts divide the rows among the ranks.
        attention: those of the ranks that hold the same requests as this one.
    """

    def __init__(
        self,
        rank: int = 0,
        size: int = 1,
        *,
        local_rank: int = 0,
        data: Any = None,
        control: Any = None,
        scatters_rows: bool = False,
        attention: TensorParallelGroup | None = None,
    ) -> None:
        """``data`` carries what is on the device, ``control`` facts between the hosts; None for
        ``attention`` is all ranks."""
        self.rank, self.size, self.local_rank = rank, size, local_rank
        self.scatters_rows = scatters_rows and size > 1
        self.attention = attention or self
        self._control = control
        self._name = "" if size == 1 else collectives.register(data)

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def data_parallel(self) -> bool:
        """Whether there are ranks that hold other requests than this one."""
        return self.attention is not self

    @property
    def dp_size(self) -> int:
        """How many groups of ranks hold requests of their own."""
        return self.size // self.attention.size

    @property
    def dp_rank(self) -> int:
        """Which of them this rank is in: they are neighbours."""
        return self.rank // self.attention.size

    # On the device.

    def all_reduce_(self, part: torch.Tensor) -> torch.Tensor:
        """The sum over the ranks, in place; ``part`` is contiguous. Returns it."""
        if self.size > 1:
            torch.ops.breakgraph.all_reduce_(part, self._name)
        return part

    def all_gather(self, part: torch.Tensor) -> torch.Tensor:
        """The ranks' ``[rows, ...]`` one after the other, ``[size * rows, ...]``."""
        if self.size == 1:
            return part
        return torch.ops.breakgraph.all_gather(part, self.size, self._name)

    def gather_columns(self, part: torch.Tensor, columns: int) -> torch.Tensor:
        """The first ``columns`` of the ranks' ``[rows, share]`` side by side."""
        if self.size == 1:
            return part
        whole = self.all_gather(part).view(self.size, *part.shape).transpose(0, 1)
        return whole.reshape(len(part), -1)[:, :columns]

    def gather_padded(self, part: torch.Tensor, rows: int) -> torch.Tensor:
        """The ranks' ``[up to rows, ...]``, padded with zeros: ``[size, rows, ...]``."""
        padded = part.new_zeros(rows, *part.shape[1:])
        padded[: len(part)] = part
        return self.all_gather(padded).view(self.size, *padded.shape)

    def reduce_scatter(self, part: torch.Tensor) -> torch.Tensor:
        """This rank's rows of the sum over the ranks: ``[rows_of_rank(rows), ...]``.

        Rows past the last are zeros.
        """
        if self.size == 1:
            return part
        return torch.ops.breakgraph.reduce_scatter(part, self.rank, self.size, self._name)

    def rows_of_rank(self, rows: int) -> int:
        """Rows of each rank where ``rows`` are scattered; the last ones may be padding."""
        return -(-rows // self.size)

    def share(self, whole: torch.Tensor) -> torch.Tensor:
        """This rank's rows of ``[rows, ...]`` that every rank has: ``[rows_of_rank(rows), ...]``.

        Rows past the last are zeros.
        """
        each = self.rows_of_rank(len(whole))
        mine = whole[self.rank * each : (self.rank + 1) * each]
        if len(mine) == each:
            return mine
        padded = whole.new_zeros(each, *whole.shape[1:])
        padded[: len(mine)] = mine
        return padded

    def begin_sum_of_shares(self, share: torch.Tensor, rows: int) -> torch.Tensor:
        """``[rows, ...]``, zeros but for this rank's: what adds up, over the ranks, to all."""
        if self.size == 1:
            return share
        whole = share.new_zeros(rows, *share.shape[1:])
        mine = whole[self.rank * len(share) : (self.rank + 1) * len(share)]
        mine.copy_(share[: len(mine)])
        return whole

    def begin_sum_(self, total: torch.Tensor) -> torch.Tensor:
        """Make ``total`` enter a sum over the ranks once: only the first rank's stays."""
        return total if self.is_first else total.zero_()

    # Between the hosts.

    def minimum(self, value: int) -> int:
        """The least of the ranks' values."""
        if self.size == 1:
            return value
        least = torch.tensor([value])
        with collectives.guarded():
            dist.all_reduce(least, op=dist.ReduceOp.MIN, group=self._control)
        return int(least)

    def barrier(self) -> None:
        """Wait until every rank is here."""
        self.minimum(0)

    def broadcast(self, values: torch.Tensor) -> torch.Tensor:
        """The first rank's CPU tensor into every rank's of the same shape."""
        if self.size > 1:
            with collectives.guarded():
                dist.broadcast(values, 0, group=self._control)
        return values

    def shared_floats(self, values: Sequence[float]) -> tuple[float, ...]:
        """The first rank's numbers; every rank gives as many."""
        if self.size == 1:
            return tuple(values)
        return tuple(self.broadcast(torch.tensor(values, dtype=torch.float64)).tolist())

    def shared_text(self, text: str) -> str:
        """The first rank's text."""
        if self.size == 1:
            return text
        data = torch.frombuffer(bytearray(text.encode() + b" "), dtype=torch.uint8)
        length = self.broadcast(torch.tensor([len(data)]))
        if not self.is_first:
            data = torch.zeros(int(length), dtype=torch.uint8)
        return bytes(self.broadcast(data).tolist()).decode()[:-1]

    def vote(self, cause: str | None) -> dict[int, str]:
        """What went wrong, by rank, where anything did: every rank gets the same."""
        if self.size == 1:
            return {} if cause is None else {0: cause}
        if self.minimum(int(cause is None)):
            return {}
        causes: list[Any] = [None] * self.size
        with collectives.guarded():
            dist.all_gather_object(causes, cause, group=self._control)
        return {rank: text for rank, text in enumerate(causes) if text is not None}

    @contextmanager
    def active(self) -> Iterator[None]:
        """Experts made inside are shared out to this group, other layers to ``attention``."""
        outer = _local.group, _local.experts
        _local.group, _local.experts = self.attention, self
        try:
            yield
        finally:
            _local.group, _local.experts = outer

    @contextmanager
    def capturing(self) -> Iterator[None]:
        """Inside, collectives on a CPU are recorded and move nothing.

        A capture there runs on a dummy batch, whose values nobody reads; a rank whose capture
        fails therefore leaves no other rank waiting. On CUDA a captured collective is a kernel,
        which runs.
        """
        with collectives.silent_on_cpu(self._name, self.attention._name):
            yield


SINGLE = TensorParallelGroup()
"""One rank, which has everything."""


class _Local(threading.local):
    group: TensorParallelGroup = SINGLE
    experts: TensorParallelGroup = SINGLE


_local = _Local()


def current_group() -> TensorParallelGroup:
    """The group that layers made now are sharded over."""
    return _local.group


def expert_group() -> TensorParallelGroup:
    """The group that experts made now are shared out to."""
    return _local.experts
