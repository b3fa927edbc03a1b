"""Each rank watches the others: one that dies or hangs brings all down, and is named.

A rank says that it is there by changing a number in the store twice a second, from a thread of
its own. Whoever sees a number stand still for ``STALE_SECONDS``, or a rank's last words, says so
in the store too, and ends. The ranks that a process spawned itself it also sees die, at once.

A rank whose thread lives and whose forward hangs is found by the time limit of a collective; the
one that entered the fewest collectives is the one that the others wait for.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from breakgraph.distributed.collectives import CollectiveError, Entered

BEAT_SECONDS = 0.5
STALE_SECONDS = 15.0
COLLECTIVE_SECONDS = 60.0
"""Longest that a rank waits in a collective on the device. Ranks do the same work at the same
time, so this is far from what a loaded machine needs."""

GRACE_SECONDS = 3.0
"""From seeing a failure to ending the process, for the main thread to say so itself."""


class RankFailedError(RuntimeError):
    """A rank died or hangs, so the model cannot run any more; the message names the rank."""


class Watch:
    """The watching of one rank.

    Attributes:
        failure: what happened to which rank; None while nothing has.
        busy: whether this rank is in what needs the others, so that it may never come back.
        ends_process: whether this process has no purpose without the others.
    """

    def __init__(
        self,
        rank: int,
        size: int,
        store: Any,
        processes: Sequence[subprocess.Popen[bytes]] = (),
        *,
        ends_process: bool,
        host: str = "",
    ) -> None:
        """``store`` is a connection of its own; ``processes`` are the ranks from 1 on, if spawned
        here; ``host`` is where this rank runs, if not all run here."""
        self.rank, self.size, self.ends_process, self.host = rank, size, ends_process, host
        self.failure: str | None = None
        self.busy = True
        self._store, self._processes = store, list(processes)
        self._seen = {other: ("", time.monotonic()) for other in range(size) if other != rank}
        self._stopped, self._failed = threading.Event(), threading.Event()
        self._lock = threading.Lock()
        self._beats = 0
        self._looked = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="breakgraph-ranks", daemon=True)
        self._guard = threading.Thread(
            target=self._guard_look, name="breakgraph-guard", daemon=True
        )

    def start(self) -> None:
        Entered.count = 0  # of an earlier engine's, which other ranks may not have had
        self._looked = time.monotonic()
        self._thread.start()
        self._guard.start()

    def stop(self) -> None:
        """Look no more: from now on ranks may end."""
        self._stopped.set()
        if threading.current_thread() is not self._thread:
            self._thread.join(GRACE_SECONDS)  # longer only where the store does not answer

    def check(self) -> None:
        """Raise RankFailedError if a rank has failed."""
        if self.failure is not None:
            raise RankFailedError(self.failure)

    def explain(self, error: BaseException) -> RankFailedError:
        """What ``error``, raised in what all ranks do together, means; tells the others."""
        if isinstance(error, CollectiveError):
            self._failed.wait(GRACE_SECONDS)  # who is gone is known in a moment
            if self.failure is None:
                self.fail(*self._latest(error))
        else:
            self.fail(self.rank, f"raised {type(error).__name__}: {error}")
        return RankFailedError(self.failure)

    def fail(self, rank: int, what: str) -> None:
        """Note a failure, if it is the first, tell the other ranks, and end the spawned ones."""
        with self._lock:
            if self.failure is not None or self._stopped.is_set():
                return
            self.failure = f"{self._name(rank)} {what}"
        with suppress(Exception):
            self._store.set("failure", f"{rank} {what}")
        for process in self._processes:
            process.kill()
        self._failed.set()

    def _latest(self, error: CollectiveError) -> tuple[int, str]:
        """The rank that holds up the others, by the collectives each has entered."""
        entered = {self.rank: Entered.count}
        for rank, (beat, _) in self._seen.items():
            entered[rank] = int(_parts(beat)[1] or 0)
        late = min(entered, key=lambda rank: (entered[rank], rank == self.rank))
        return late, f"did not take part in a collective ({error})"

    def _name(self, rank: int) -> str:
        host = self.host if rank == self.rank else _parts(self._seen[rank][0])[2]
        return f"rank {rank} of {self.size}" + (f" on {host}" if host else "")

    def _guard_look(self) -> None:
        """A store whose host is gone without a word, or stopped, answers never."""
        while not self._stopped.wait(BEAT_SECONDS) and not self._failed.is_set():
            if time.monotonic() - self._looked > STALE_SECONDS:
                with self._lock:
                    self.failure = self.failure or f"{self._name(0)} does not answer"
                self._failed.set()
                self._end()

    def _run(self) -> None:
        while not self._stopped.wait(BEAT_SECONDS):
            self._look()
            self._looked = time.monotonic()
            if self._failed.is_set():
                self._end()
                return

    def _look(self) -> None:
        for rank, process in enumerate(self._processes, 1):
            code = process.poll()
            if code is not None:
                self._stopped.wait(BEAT_SECONDS)  # its last words may still be on their way
                self.fail(rank, self._last_words() or ended(code))
                return
        try:
            self._beats += 1
            self._store.set(f"beat {self.rank}", f"{self._beats} {Entered.count} {self.host}")
            if words := self._failure_told():
                self.fail(*words)
            for other in self._seen:
                self._listen(other)
        except RuntimeError as error:  # torch's DistStoreError among them
            self.fail(0, f"cannot be reached, nor what the ranks share there ({error})")

    def _listen(self, other: int) -> None:
        key, now = f"beat {other}", time.monotonic()
        beat = self._store.get(key).decode() if self._store.check([key]) else ""
        last, since = self._seen[other]
        if beat != last or not last:  # a rank that has not begun is its starter's to watch
            self._seen[other] = beat, now
        elif now - since > STALE_SECONDS:
            self.fail(other, f"has not answered for {STALE_SECONDS:.0f} s")

    def _failure_told(self) -> tuple[int, str] | None:
        if not self._store.check(["failure"]):
            return None
        rank, _, what = self._store.get("failure").decode().partition(" ")
        return int(rank), what

    def _last_words(self) -> str:
        with suppress(RuntimeError):
            told = self._failure_told()
            return told[1] if told else ""
        return ""

    def _end(self) -> None:
        """End this process, if it has no purpose left, or never comes back to say what happened."""
        deadline = time.monotonic() + GRACE_SECONDS
        while time.monotonic() < deadline and self.busy and not self._stopped.wait(0.1):
            pass
        if self._stopped.is_set() or not (self.ends_process or self.busy):
            return
        end_process(self.failure or "")


def _parts(beat: str) -> tuple[str, str, str]:
    """Beats, collectives entered, and host, of what a rank says of itself."""
    beats, _, rest = beat.partition(" ")
    entered, _, host = rest.partition(" ")
    return beats, entered, host


def end_process(failure: str) -> None:
    """Leave at once, whatever threads and libraries wait for."""
    print(f"breakgraph: error: {failure}; all ranks stop", file=sys.stderr, flush=True)
    with suppress(Exception):
        sys.stdout.flush()
    os._exit(1)


def ended(code: int) -> str:
    """How a process ended, in words."""
    if code < 0:
        with suppress(ValueError):
            return f"was killed by {signal.Signals(-code).name}"
    return f"ended with exit code {code}"


def when_closed(stream: Any, then: Callable[[], None]) -> None:
    """Call ``then`` once the other end of ``stream`` is gone, as it is when its process dies."""

    def wait() -> None:
        with suppress(OSError):
            while stream.read(1):
                pass
        then()

    threading.Thread(target=wait, name="breakgraph-parent", daemon=True).start()
