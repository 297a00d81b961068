"""`python -m qwen3fast serve`: load the models, listen, drain at SIGTERM or Ctrl-C, end at once at the second."""

from __future__ import annotations

import argparse
import asyncio
import logging
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import fields
from functools import partial
from types import FrameType
from typing import Literal

import uvicorn
from starlette.applications import Starlette

from qwen3fast.server.app import create_app
from qwen3fast.server.compiling import compile_meanwhile
from qwen3fast.server.loading import add_model_arguments, load_models
from qwen3fast.server.options import ServerOptions

logger = logging.getLogger("qwen3fast.server")


class DrainingServer(uvicorn.Server):
    """Uvicorn with draining: from the first signal on, `/ready` answers 503, and the server stops once it is idle."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, and log where."""
        await super().startup(sockets=sockets)
        state = self.config.app.state.server  # type: ignore[union-attr]
        names = ", ".join(served.name for served in state.models.with_adapters)
        for listening in sockets or ():
            host, port = listening.getsockname()[:2]
            logger.info("serving %s on http://%s:%d", names, f"[{host}]" if ":" in host else host, port)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to drain at the first signal; end at once at the second."""
        state = self.config.app.state.server  # type: ignore[union-attr]
        if state.is_draining:
            self.should_exit = self.force_exit = True
            return
        state.is_draining = True
        logger.warning(
            "draining: waiting for %d running requests; send the signal again to stop at once", state.in_flight
        )

    async def on_tick(self, counter: int) -> bool:
        """Return whether to stop; called by uvicorn ten times a second."""
        state = self.config.app.state.server  # type: ignore[union-attr]
        if state.is_draining and state.in_flight == 0:
            self.should_exit = True
        return await super().on_tick(counter)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `serve` to a parser."""
    add_model_arguments(parser)
    add, defaults = parser.add_argument, ServerOptions()
    add_seconds = partial(add, type=float, metavar="S")
    add("--host", default="127.0.0.1", metavar="ADDRESS", help="address to listen on; 0.0.0.0: every one [%(default)s]")
    add("--port", type=_port, default=8000, metavar="N", help="port to listen on; 0 takes a free one [%(default)s]")
    add("--api-key", action="append", dest="api_keys", default=[], metavar="KEY", help="key that clients must send; "
        "repeatable [none is needed]")  # fmt: skip
    add("--allow-origin", action="append", dest="allow_origins", default=[], metavar="URL", help="origin of web pages "
        "that may ask, such as https://example.org; *: every one; repeatable [only the server's own page]")  # fmt: skip
    add("--strict", action="store_true", help="refuse requests with fields that the server does not know")
    add("--max-body-bytes", type=int, default=defaults.max_body_bytes, metavar="N", help="size of the largest request "
        "[%(default)s]")  # fmt: skip
    add_seconds("--request-timeout", dest="request_timeout_s", default=defaults.request_timeout_s, help="time limit of "
                "a request, in seconds [%(default)s]")  # fmt: skip
    add_seconds("--stream-interval", dest="stream_interval_s", default=defaults.stream_interval_s, help="seconds "
                "between events of a streamed reply; 0 sends each token when it comes [%(default)s]")  # fmt: skip
    add("--log-prompts", action="store_true", help="write prompts and replies to the log")


def _port(text: str) -> int:
    if not text.isdecimal() or len(text) > 5 or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port from 0 to 65535")
    return int(text)


def run(args: argparse.Namespace) -> int:
    """Serve until a signal ends it. Returns the exit status 0.

    Raises: OSError for an address that is not available; ValueError, FileNotFoundError, ImportError.
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    names = {field.name for field in fields(ServerOptions)}
    options = ServerOptions(**{name: value for name, value in vars(args).items() if name in names})
    with bind(args.host, args.port, options.send_timeout_s) as listening:  # first: loading may take minutes
        app = create_app(load_models(args), options)
        if args.warmup is None:
            logger.info("compiling in the background: replies are slower at first; /ready reports how much remains")
            compile_meanwhile(app.state.server)
        serve(app, listening)
    return 0


def bind(host: str, port: int, send_timeout_s: float) -> socket.socket:
    """Return a socket with an address. Connections whose clients read nothing are cut, after twice send_timeout_s.

    The application only stops writing to them; written data would otherwise be kept as long as they are open.
    The socket does not listen yet. SO_REUSEADDR stays off until `serve`: with it, Linux gives the address of a socket
    that does not listen to a second one, whose server would find out after it has loaded its models.
    Raises: OSError if the address is not available.
    Source: tcp(7), TCP_USER_TIMEOUT, which accepted sockets inherit; socket(7), SO_REUSEADDR.
    """
    listening = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        try:
            listening.bind((host, port))
        except OSError:  # perhaps connections of an ended server remain, which only SO_REUSEADDR permits
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.bind((host, port))
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)
    except OSError as err:
        listening.close()
        raise OSError(f"cannot listen on {host}, port {port}: {err.strerror}; choose other --host or --port") from err
    if hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(2000 * send_timeout_s))
    return listening


@contextmanager
def in_background(app: Starlette) -> Iterator[int]:
    """Serve an application in a thread, on a free port of 127.0.0.1, and yield the port. Its models stay open.

    Raises: RuntimeError if the server does not start.
    """
    server = uvicorn.Server(uvicorn_config(app, lifespan="off"))
    listening = bind("127.0.0.1", 0, app.state.server.options.send_timeout_s)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listening])), daemon=True)
    thread.start()
    try:
        while not server.started:
            thread.join(0.01)
            if not thread.is_alive():
                raise RuntimeError("the server ended before it listened")
        yield listening.getsockname()[1]
    finally:
        server.should_exit = True
        thread.join(10)
        listening.close()


def uvicorn_config(app: Starlette, lifespan: Literal["on", "off"]) -> uvicorn.Config:
    """Return uvicorn's settings. lifespan: "off" leaves the models open when the server ends."""
    return uvicorn.Config(app, log_level="warning", access_log=False, lifespan=lifespan, timeout_graceful_shutdown=5)


def serve(app: Starlette, listening: socket.socket) -> None:
    """Serve on a socket of `bind` until a signal."""
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # for the next server on this port
    with suppress(KeyboardInterrupt):  # uvicorn raises the signals that it caught again, once it has ended
        asyncio.run(DrainingServer(uvicorn_config(app, lifespan="on")).serve(sockets=[listening]))
