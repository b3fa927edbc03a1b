"""Collectives inside the segments of a breakable graph, checked on every rank of a group."""

from __future__ import annotations

import torch
import torch.distributed as dist

from breakgraph.distributed import TensorParallelGroup
from breakgraph.distributed.collectives import Entered
from breakgraph.graph import (
    BreakableCUDAGraph,
    BreakableCUDAGraphCapture,
    break_graph,
    eager_on_graph,
)

WIDTH = 8


@eager_on_graph()
def add_rows(x: torch.Tensor, out: torch.Tensor) -> None:
    """A break that no segment could hold: it reads a value."""
    out.copy_(x + float(x[0, 0]))


class Collectives:
    """A graph of three segments, each of kernels around collectives, over ``rows`` rows."""

    def __init__(self, group: TensorParallelGroup, device: torch.device, rows: int) -> None:
        self.group, self.rows = group, rows
        self.x = torch.ones(rows, WIDTH, device=device)
        self.run()  # so that all is set up before a capture
        self.graph = BreakableCUDAGraph()
        with BreakableCUDAGraphCapture(self.graph, device=device):
            self.y = self.run()

    def run(self) -> torch.Tensor:
        total = self.group.all_reduce_(self.x * (self.group.rank + 1))
        break_graph()
        mine = self.group.reduce_scatter(total + 1)
        whole = self.group.all_gather(mine * 2)[: self.rows]
        out = torch.empty_like(whole)
        add_rows(whole, out)
        return self.group.all_reduce_(out - 1)

    def check(self, values: torch.Tensor) -> None:
        """Replay with other values, and compare with what one process computes."""
        size = self.group.size
        self.x.copy_(values)
        self.graph.replay()
        whole = (values * (size * (size + 1) // 2) + 1) * size * 2
        expected = (whole + whole[0, 0] - 1) * size
        torch.testing.assert_close(self.y.cpu(), expected, atol=1e-3, rtol=1e-5)


def check_captured_collectives(group: TensorParallelGroup) -> None:
    """Graphs of several sizes, replayed by turns with launched collectives between them."""
    cuda = dist.get_backend() == "nccl"
    device = torch.device("cuda", group.local_rank) if cuda else torch.device("cpu")
    # Rows that every rank has as many of, and rows of which the last ranks' are padding.
    graphs = [Collectives(group, device, rows) for rows in (5, 16, 3000)]
    for one in graphs:
        names = [step.segment.node_names() for step in one.graph.steps if step.segment is not None]
        assert len(names) == 3, names
        wanted = "nccl" if cuda else "breakgraph."
        assert all(any(wanted in name for name in row) for row in names), names
    for turn in range(4):
        for one in graphs:
            values = torch.randn(one.rows, WIDTH, generator=torch.Generator().manual_seed(turn))
            one.check(values)
        launched = group.all_reduce_(torch.full((3,), 2.0, device=device))
        assert launched.tolist() == [2.0 * group.size] * 3
    for one in graphs:
        one.graph.reset()


def check_as_many_entered(group: TensorParallelGroup) -> None:
    """Ranks that a hang would be told by have entered as many collectives."""
    entered = Entered.count
    assert group.all_gather(torch.tensor([entered])).tolist() == [entered] * group.size
