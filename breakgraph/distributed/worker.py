"""``python -m breakgraph.distributed.worker``: a rank that another process has spawned.

Its first line of input says which rank it is and with what flags. The input stays open for as
long as the spawning process lives; without that, no rank has a purpose.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys

from breakgraph.distributed.lockstep import follow
from breakgraph.distributed.ranks import connect
from breakgraph.distributed.watch import RankFailedError, when_closed
from breakgraph.server_args import ServerArgs


def main() -> int:
    """Run one rank to its end; returns the exit code."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches rank 0, which ends the others
    # Unbuffered, or Python could not end while a thread waits in the buffer.
    source = open(0, "rb", buffering=0, closefd=False)  # noqa: SIM115
    told = json.loads(source.readline())
    when_closed(source, lambda: os._exit(1))
    logging.basicConfig(level=logging.ERROR, format=f"rank {told['rank']}: %(message)s")
    args = ServerArgs(**told["args"])
    ranks = connect(told["rank"], told["size"], args, told["port"])
    from breakgraph.runner.model_runner import ModelRunner

    try:
        with ranks.together():
            runner = ModelRunner(args, ranks=ranks)
        follow(ranks, runner)
        ranks.close()
    except RankFailedError:
        os._exit(1)  # said by rank 0; a rank that waits for others' collectives may never return
    return 0


if __name__ == "__main__":
    sys.exit(main())
