"""Times forwards of every way a prefill can run, for dispatch to choose by.

Ways are timed turn by turn at each size, so that what drifts meets all alike. Of several ranks the
first one's times count: all must decide alike. They are kept in a file, one for each model
configuration, GPU, version and set of flags, and read from there at the next start.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import platform
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, TypeAlias

import torch

from breakgraph.distributed import TensorParallelGroup
from breakgraph.forward import ForwardBatch
from breakgraph.kept_files import keep, kept_path
from breakgraph.runner.costs import MARGIN, ForwardTimes, Line, PrefillCosts, anchors
from breakgraph.runner.prefill_graph_runner import PrefillGraphRunner

logger = logging.getLogger(__name__)

EAGER = "eager"

SAME = 1.01
"""From where an eager forward takes at most this many times the best replay, all ways are bound by
the GPU alone, for larger sizes too."""

OCTAVE = 8
"""Buckets in a row that must show it; those of the derived ladder that double the tokens."""

Times: TypeAlias = dict[str, dict[int, dict[int, float]]]
"""Milliseconds by way, requests and rows."""


class CostMeter:
    """Times eager forwards and the replays of ``runners``.

    Args:
        runners: ladders over the same buffers; at least one.
        dense: time every bucket, and eager forwards at both ends of what each serves, rather than
            one bucket an octave.
        requests: also time this many equal requests, where it is more than 1.
        device: of the model.
        group: the ranks that measure together.
    """

    def __init__(
        self,
        runners: Sequence[PrefillGraphRunner],
        *,
        dense: bool,
        requests: int,
        device: torch.device,
        group: TensorParallelGroup,
    ) -> None:
        self._runners, self._dense, self._requests = runners, dense, requests
        self._device, self._group = device, group
        self._buckets = sorted(set(chain.from_iterable(runner.buckets for runner in runners)))

    @torch.no_grad()
    def measure(self) -> Times:
        """All sizes, ascending; where ``dense``, up to the one from which an eager forward has
        been as fast as any replay for an octave."""
        start = time.perf_counter()
        found: Times = defaultdict(lambda: defaultdict(dict))
        below, same = 0, 0
        for bucket in self._buckets if self._dense else anchors(self._buckets):
            if self._dense and below + 1 < bucket:
                self._time(found, below + 1, 1, replays=False)
            now = self._time(found, bucket, 1)
            same = same + 1 if now[EAGER] <= SAME * min(now.values()) else 0
            below = bucket
            if self._dense and same == OCTAVE:
                break
        if self._requests > 1:
            sizes = [size for size in self._buckets if size <= below and self._holds(size)]
            for bucket in anchors(sizes) if sizes else []:
                self._time(found, bucket, self._requests)
        logger.info(
            "measured prefills of %d to %d tokens, %s, in %.2f s",
            *(self._buckets[0], below, " and ".join(found), time.perf_counter() - start),
        )
        return {way: dict(by_requests) for way, by_requests in found.items()}

    def _time(
        self, found: Times, rows: int, requests: int, *, replays: bool = True
    ) -> dict[str, float]:
        """Add the best time of each way at one size."""
        batch = self._runners[0].dummy(rows, requests)
        ways: dict[str, Callable[[], object]] = {
            EAGER: lambda: self._runners[0].run_without_graph(batch)
        }
        for runner in self._runners if replays else []:
            if rows in runner.buckets and runner.refuses(batch) is None:
                ways[runner.kind] = _replay(runner, batch)
        best = dict.fromkeys(ways, math.inf)
        # What follows an eager forward finds the host's caches cold, 5 % of a short replay: so
        # each replay comes first in some rounds and last in others.
        order = list(ways)
        for _ in range(5 if rows <= 512 else 3 if rows <= 2048 else 2):
            order = [EAGER, *order[2:], *order[1:2]]
            for way in order:
                run = ways[way]
                self._synchronize()
                start = time.perf_counter()
                run()
                self._synchronize()
                best[way] = min(best[way], (time.perf_counter() - start) * 1e3)
        best = dict(zip(best, self._group.shared_floats(list(best.values())), strict=True))
        for way, ms in best.items():
            found[way][requests][rows] = ms
        return best

    def _holds(self, rows: int) -> bool:
        """Whether so many requests can have ``rows`` tokens, and no fewer need be."""
        if rows < self._requests:
            return False
        return self._runners[0].dummy(rows, self._requests).batch_size == self._requests

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def _replay(runner: PrefillGraphRunner, batch: ForwardBatch) -> Callable[[], object]:
    def run() -> None:
        runner.replay_prepare(batch, batch.num_tokens)
        runner.replay(batch, batch.num_tokens)

    return run


def costs_of(times: Times, kind: str, *, dense: bool) -> PrefillCosts | None:
    """What decides about the graphs of ``kind``; None where they were not measured."""
    if kind not in times:
        return None
    return PrefillCosts(
        _forward_times(times[EAGER]), _forward_times(times[kind]), 1.0 if dense else MARGIN
    )


def _forward_times(by_requests: dict[int, dict[int, float]]) -> ForwardTimes:
    one = _line(by_requests[1])
    for requests, times in by_requests.items():
        if requests > 1:
            more = {rows: ms - one.at(rows) for rows, ms in times.items()}
            return ForwardTimes(one, _line(more), requests)
    return ForwardTimes(one)


def _line(ms: dict[int, float]) -> Line:
    rows = sorted(ms)
    return Line(tuple(rows), tuple(ms[size] for size in rows))


class CostFile:
    """Times of earlier starts.

    Args:
        facts: all that the times depend on, as JSON has it.
        group: of several ranks only the first reads and writes.
    """

    def __init__(self, facts: dict[str, Any], group: TensorParallelGroup) -> None:
        self._facts, self._group = json.loads(json.dumps(facts)), group
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
        self.path = kept_path(f"prefill-times-{digest}.json")

    def read(self) -> Times | None:
        """What an earlier start measured, on every rank; None where that is to be done."""
        text = ""
        if self._group.is_first:
            times = self._read()
            text = "" if times is None else json.dumps(times)
        text = self._group.shared_text(text)
        return _parsed(json.loads(text)) if text else None

    def write(self, times: Times) -> None:
        """Keep ``times``; a folder that cannot be written to is a warning."""
        if not self._group.is_first:
            return
        text = json.dumps({"facts": self._facts, "ms": times})
        keep(self.path, text.encode(), "prefill times")

    def _read(self) -> Times | None:
        try:
            found = json.loads(self.path.read_text(encoding="utf-8"))
            if found["facts"] != self._facts:
                raise ValueError("it is of another model or machine")
            times = _parsed(found["ms"])
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            logger.warning(
                "prefill times in %s cannot be used and are measured anew: %s: %s",
                *(self.path, type(error).__name__, error),
            )
            return None
        logger.info("prefill times were read from %s", self.path)
        return times


def processor_name() -> str:
    """The host's, on which what is bound by launches depends."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def _parsed(found: dict[str, Any]) -> Times:
    """Times out of JSON, whose keys are text. Raises ValueError or the like on anything else."""
    times = {
        way: {
            int(requests): {int(rows): float(ms) for rows, ms in by_rows.items()}
            for requests, by_rows in by_requests.items()
        }
        for way, by_requests in found.items()
    }
    lines = [line for by_requests in times.values() for line in by_requests.values()]
    values = [ms for line in lines for ms in line.values()]
    if not times[EAGER][1] or not all(lines) or not all(0 < ms < math.inf for ms in values):
        raise ValueError("it holds no times of eager forwards, or times that are none")
    if any(1 not in by_requests for by_requests in times.values()):
        raise ValueError("it lacks the times of one request")
    return times
