"""Replicas behind Ray Serve: each is a whole server, and Ray's proxies share requests out to them.

A replica is one process with an engine and the application of ``breakgraph serve``, and so answers
as that does; nothing is shared between replicas. Ray starts them, watches their health and, by the
requests at hand, changes their number::

    serve run breakgraph.server.ray_serve:app model_path=MODEL max_replicas=4
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any, ClassVar, NoReturn

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from breakgraph.server_args import FlagParser, ServerArgs, flag_name

try:
    from ray import serve
except ImportError as error:
    raise ModuleNotFoundError(
        f"replicas behind Ray Serve need ray: pip install 'breakgraph[serve,ray]' ({error})",
        name="ray",
    ) from error

REPLICAS = ("num_replicas", "min_replicas", "max_replicas", "target_ongoing_requests")
"""What ``build_app`` takes besides flags; the last three are of Ray's ``autoscaling_config``."""

HEADER = "x-breakgraph-replica"


class Replica:
    """One engine, and its application.

    Attributes:
        app: of this process, which holds one replica.
    """

    app: ClassVar[ASGIApp]

    def __init__(self, flags: dict[str, Any]) -> None:
        """Load the model and capture its graphs; no request comes before.

        Args:
            flags: all fields of ``ServerArgs``.
        """
        # Here: what builds the application need not import torch.
        from breakgraph.engine.async_engine import AsyncEngine
        from breakgraph.server.app import create_app

        self.engine = AsyncEngine(ServerArgs(**flags))
        self.engine.start()
        watch = self.engine.runner.ranks.watch
        if watch is not None:
            watch.ends_process = True  # Ray starts another replica then
        Replica.app = Named(create_app(self.engine), serve.get_replica_context().replica_tag)

    def check_health(self) -> None:
        """What Ray asks; where it raises, the replica is started anew."""
        if not self.engine.healthy:
            raise RuntimeError(f"the engine has failed: {self.engine.failure}")

    def __del__(self) -> None:
        """Ray has waited for the requests; ranks and their processes end here."""
        if hasattr(self, "engine"):
            self.engine.shutdown(0.0)


class Named:
    """ASGI middleware that says in a header which replica answered."""

    def __init__(self, app: ASGIApp, name: str) -> None:
        self._app, self._name = app, name

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)[HEADER] = self._name
            await send(message)

        await self._app(scope, receive, sending)


def build_app(args: Mapping[str, Any]) -> serve.Application:
    """The application for ``serve run``, ``serve deploy`` or ``serve.run``.

    A replica asks Ray for ``--tp-size`` GPUs, and for none with ``--device cpu``.

    Args:
        args: flags of ``breakgraph serve`` as ``key=value`` or as YAML, and those of ``REPLICAS``:
            ``num_replicas`` for a fixed number (1 by default), or ``max_replicas`` and, if wanted,
            ``min_replicas`` (1) and ``target_ongoing_requests`` for each replica (half of
            ``--max-running-requests``); ``autoscaling_config`` for anything else that Ray takes.

    Raises:
        ValueError: a key is unknown, or a value wrong.
    """
    flags = dict(args)
    scaling = dict(flags.pop("autoscaling_config", {}))
    replicas = {name: _count(name, flags.pop(name)) for name in REPLICAS if name in flags}
    for name in ("host", "port"):
        if name in flags:
            raise ValueError(
                f"{name} does nothing here: Ray's proxies listen; set its http_options"
            )
    server_args = parse_flags(flags)
    running = server_args.max_running_requests
    fixed = replicas.pop("num_replicas", None)
    scaling |= replicas
    options: dict[str, Any] = {"num_replicas": fixed or 1}
    if scaling:
        if fixed is not None or "max_replicas" not in scaling:
            raise ValueError("give num_replicas, or max_replicas with what scales up to it")
        options = {
            "autoscaling_config": {"target_ongoing_requests": max(1, running // 2)} | scaling
        }
    gpus = 0 if server_args.device == "cpu" else server_args.tp_size
    deployment: Any = serve.deployment(
        serve.ingress(_app_of_this_process)(Replica),
        name="breakgraph",
        ray_actor_options={"num_gpus": gpus},
        # More would wait in the replica, where no other could take them.
        max_ongoing_requests=running,
        graceful_shutdown_timeout_s=server_args.drain_seconds,
        **options,
    )
    return deployment.bind(asdict(server_args))


app = build_app


def _app_of_this_process() -> ASGIApp:
    return Replica.app


class _Parser(FlagParser):
    """Raises where a command line would end."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def parse_flags(flags: Mapping[str, Any]) -> ServerArgs:
    """Flags from names to values, typed or as text. Raises ValueError."""
    parser = _Parser(prog="breakgraph", add_help=False)
    ServerArgs.add_cli_args(parser)
    known = {action.dest: action for action in parser._actions}
    argv: list[str] = []
    for key, value in flags.items():
        name = key.lstrip("-").replace("-", "_")
        argv += _as_argv(flag_name(name), known.get(name), value)
    return ServerArgs.from_cli_args(parser.parse_args(argv))


def _as_argv(flag: str, action: argparse.Action | None, value: Any) -> Iterable[str]:
    if isinstance(action, argparse.BooleanOptionalAction):
        on = {"true": True, "1": True, "false": False, "0": False}.get(str(value).lower())
        if on is None:
            raise ValueError(f"{flag} must be true or false, not {value!r}")
        return [flag if on else flag.replace("--", "--no-", 1)]
    if action is not None and action.nargs == "+":
        values = str(value).replace(",", " ").split() if isinstance(value, str) else value
        return [flag, *map(str, values)]
    return [] if value is None else [f"{flag}={value}"]


def _count(name: str, value: Any) -> float | int:
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise ValueError(f"{name} must be a number, not {value!r}") from None
    return int(number) if number.is_integer() else number
