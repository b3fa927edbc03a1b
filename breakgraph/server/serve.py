"""From flags to a running server: the port is taken first, the weights second, clients last.

So a port in use is said at once, and nobody is let in before the first answer can be given.
"""

from __future__ import annotations

import gc
import signal
import socket
import threading
import time

from breakgraph import __version__
from breakgraph.distributed.ranks import is_follower
from breakgraph.engine.async_engine import AsyncEngine
from breakgraph.engine.engine import Engine
from breakgraph.engine.start_up import ready_text
from breakgraph.server.app import create_app
from breakgraph.server.connection import make_server
from breakgraph.server_args import ServerArgs

STOP_SECONDS = 5.0


def serve(args: ServerArgs) -> None:
    """Serve until a signal; returns when what was running is finished or out of time.

    Raises:
        OSError: the address cannot be listened on.
        ValueError: a flag or the checkpoint is wrong.
    """
    if is_follower(args):
        # torchrun passes signals on to every rank. Rank 0 drains, and then ends the others.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        Engine(args)  # runs rank 0's forwards, and exits when that stops
    sock = bound_socket(args.host, args.port)
    imported = time.perf_counter()
    engine = AsyncEngine(args)
    engine.start()
    if engine.runner.ranks.watch is not None:
        engine.runner.ranks.watch.ends_process = True  # no rank, no answers: say so by ending
    # What start-up made stays: a full collection walks it in 0.2 s, in which no token comes.
    gc.collect()
    gc.freeze()
    try:
        gate = create_app(engine)
        host, port = sock.getsockname()[:2]
        address = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        summary = f"{summary_line(engine)}; {ready_text(engine.runner, imported)}"

        def ready() -> None:
            print(f"{summary}\n{address}", flush=True)

        server = make_server(
            gate, drain_seconds=args.drain_seconds, log_level=args.log_level, on_ready=ready
        )
        server.run(sockets=[sock])
    finally:
        # The gate has waited for all that was worth it, and a forward that hangs is not waited for.
        stop = threading.Thread(target=engine.shutdown, args=(0.0,), daemon=True)
        stop.start()
        stop.join(STOP_SECONDS)
        sock.close()


def bound_socket(host: str, port: int) -> socket.socket:
    """A socket that holds the address and does not listen yet."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((host, port))
    except (OSError, OverflowError) as error:
        sock.close()
        reason = error.strerror if isinstance(error, OSError) else error
        raise ValueError(f"cannot listen on --host {host} --port {port}: {reason}") from error
    return sock


def summary_line(engine: AsyncEngine) -> str:
    """What is served, in one line."""
    runner = engine.runner
    graphs = runner.prefill_graph_runners
    prefill = "prefill without graphs"
    if graphs:
        buckets = [bucket for each in graphs for bucket in each.buckets]
        memory = sum(each.memory_bytes for each in graphs)
        prefill = (
            f"{len(buckets)} prefill graphs of {min(buckets)} to {max(buckets)} tokens in "
            f"{memory / 1e6:.0f} MB"
        )
    return (
        f"breakgraph {__version__}: {type(runner.model).__name__} in {runner.dtype} on "
        f"{runner.device}, context {runner.context_length}, KV cache of {runner.slots.num_tokens} "
        f"tokens{'' if runner.ranked is None else ' on each rank'}, {prefill}"
    ).replace("torch.", "")
