"""`kllm serve`: bind, listen, load, answer, drain, leave.

The port is open before the models are there, so that /health can say "loading". The first SIGTERM or
SIGINT closes the port and lets what runs finish; a second one ends the process at once.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from ipaddress import ip_address
from types import FrameType

import uvicorn

from kllm.errors import EXIT_FAILURE, EXIT_OK, KllmError, UserError
from kllm.serve.loading import LoadOptions, check, load_all
from kllm.serve.protocol import Protocol
from kllm.serve.registry import Registry
from kllm.serve.runtime import draining_error
from kllm.serve.settings import Settings
from kllm.serve.sources import Source
from kllm.serve.toolflags import introduced, runs_code

log = logging.getLogger("kllm.serve")

_KEEP_ALIVE = 5
_HEADER_BYTES = 64 << 10
_BACKLOG = 2048
_FILES = 8192  # wanted descriptors: one per connection
_LAST_WORDS = 3  # seconds for error events after the drain
_SPARE_FILES = 128


class Server(uvicorn.Server):
    """uvicorn with our way to leave."""

    def __init__(self, config: uvicorn.Config, registry: Registry, drain: float) -> None:
        super().__init__(config)
        self.registry, self.drain = registry, drain
        self.loop: asyncio.AbstractEventLoop | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self.loop = asyncio.get_running_loop()
        await super().startup(sockets=sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """First signal: drain. Second: gone."""
        if self.should_exit:
            os._exit(128 + sig)
        self.leave()

    def leave(self) -> None:
        """Takes nothing new and ends when all is answered, or after the time to drain; from any thread."""
        self.registry.drain()
        self.should_exit = True
        if self.loop is not None:
            self.loop.call_soon_threadsafe(self._limit)

    def _limit(self) -> None:
        assert self.loop is not None
        waiting = sum(runtime.in_flight for runtime in self.registry.runtimes)
        if waiting:
            what = "1 request" if waiting == 1 else f"{waiting} requests"
            log.info("finishing %s, at most %g s; Ctrl-C again stops now", what, self.drain)
        self.loop.call_later(self.drain, self.registry.abort, draining_error())


def serve(
    sources: Sequence[Source],
    options: LoadOptions,
    settings: Settings,
    *,
    say: Callable[[str], None],
    ready: Callable[[str], None],
) -> int:
    """Runs the server until a signal; the exit code.

    Args:
        say: is told what is loaded and what to beware of, a line each.
        ready: is told the URL when all models are loaded.

    Raises:
        UserError, KllmError: the port cannot be had, a model cannot be loaded, strangers could run code.
    """
    _log_to_stderr()
    check(sources, options)
    # Before uvicorn has its handlers and after it: there is nothing to finish.
    signal.signal(signal.SIGTERM, lambda number, frame: os._exit(EXIT_OK))
    listener = bind(settings.host, settings.port)
    try:
        check_reach(settings)
    except UserError:
        listener.close()
        raise
    url = url_of(listener, settings.host)
    registry = Registry()
    server = _server(registry, settings)
    failures: list[BaseException] = []

    def died() -> None:
        if settings.exit_on_error:
            failures.append(SystemExit(EXIT_FAILURE))
            server.leave()

    def load() -> None:
        began = time.perf_counter()
        try:
            load_all(sources, options, settings, registry, say=say, on_dead=died)
            if registry.status != "draining":
                say(f"ready after {time.perf_counter() - began:.1f} s; Ctrl-C stops")
                ready(url)
        except BaseException as error:
            failures.append(error)
            server.leave()

    open_port(listener)
    say(f"listening on {url}; loading")
    for line in introduced(settings):
        say(line)
    if exposed(settings):
        say(f"warning: whoever reaches {url} can use it; --api-key-file asks for a key")
    loader = threading.Thread(target=load, name="load", daemon=True)
    loader.start()
    server.run(sockets=[listener])
    return _leave(registry, loader, failures)


def _leave(registry: Registry, loader: threading.Thread, failures: list[BaseException]) -> int:
    error = failures[0] if failures else None
    if error is not None and not isinstance(error, SystemExit):
        raise _in_words(error)
    code = EXIT_OK if error is None else EXIT_FAILURE
    ended = registry.stop()
    if loader.is_alive() or not ended:
        # Python's own way out would pull torch away from under a thread that computes.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def _in_words(error: BaseException) -> BaseException:
    """Torch says "out of memory" in several ways, none of them one line."""
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "memory" in str(error)):
        return KllmError("not enough memory for the model", hint="--quant int8, --kv-memory")
    return error


def _server(registry: Registry, settings: Settings) -> Server:
    from kllm.serve.app import create_app  # a second or two: what is wrong with the port is known by then

    class Bounded(Protocol):
        most = max(64, _descriptors() - _SPARE_FILES)

    config = uvicorn.Config(
        create_app(registry, settings),
        http=Bounded,
        ws="none",
        loop="asyncio",
        lifespan="off",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        backlog=_BACKLOG,
        timeout_keep_alive=_KEEP_ALIVE,
        timeout_graceful_shutdown=int(settings.drain) + _LAST_WORDS,
        h11_max_incomplete_event_size=_HEADER_BYTES,
    )
    return Server(config, registry, settings.drain)


def bind(host: str, port: int) -> socket.socket:
    """A bound TCP socket, IPv4 where the name has both.

    Raises:
        UserError: no such address, or taken.
    """
    try:
        found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (socket.gaierror, UnicodeError):
        raise UserError(f"no address called {host!r}", where="flag --host") from None
    family, _, _, _, address = min(found, key=lambda entry: entry[0] != socket.AF_INET)
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)  # else no TCP_NODELAY
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
    except OSError as error:
        listener.close()
        if error.errno in (errno.EADDRINUSE, errno.EACCES):
            raise _not_to_be_had(port, error) from None
        raise UserError(f"cannot bind {host}: {error.strerror}", where="flag --host") from None
    return listener


def open_port(listener: socket.socket) -> None:
    """From here on connections are taken.

    Raises:
        UserError: another process was faster.
    """
    try:
        listener.listen(_BACKLOG)
    except OSError as error:
        port = listener.getsockname()[1]
        listener.close()
        raise _not_to_be_had(port, error) from None


def _not_to_be_had(port: int, error: OSError) -> UserError:
    if error.errno == errno.EACCES:
        return UserError(f"port {port} needs privileges", where="flag --port", hint="take one above 1023")
    return UserError(f"port {port} is in use", where="flag --port", hint="--port 0 takes a free one")


def url_of(listener: socket.socket, host: str) -> str:
    """Where to point a browser; a wildcard address is shown as it is."""
    name = host or "0.0.0.0"
    return f"http://{f'[{name}]' if ':' in name else name}:{listener.getsockname()[1]}"


def exposed(settings: Settings) -> bool:
    """Whether others than this machine can use the server without a key."""
    if settings.keys:
        return False
    try:
        found = socket.getaddrinfo(settings.host or None, None, flags=socket.AI_PASSIVE)
    except (socket.gaierror, UnicodeError):
        return True
    return not all(ip_address(str(entry[4][0]).partition("%")[0]).is_loopback for entry in found)


def check_reach(settings: Settings) -> None:
    """Code that a model wrote is run for this machine only, or for those who have a key.

    Raises:
        UserError: `python` is among the tools, and whoever reaches the port could have it run.
    """
    if runs_code(settings.tools) and exposed(settings):
        where = "flag --unsafe-python" if settings.unsafe_python else "flag --tools"
        message = f"python for whoever reaches {settings.host or '0.0.0.0'} needs a key"
        raise UserError(message, where=where, hint="--api-key-file, or --host 127.0.0.1")


def _descriptors() -> int:
    """The limit of open files, raised as far as we want and may."""
    try:
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = _FILES if hard == resource.RLIM_INFINITY else min(_FILES, hard)
        if soft != resource.RLIM_INFINITY and soft < wanted:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
            soft = wanted
        return _FILES if soft == resource.RLIM_INFINITY else soft
    except (ImportError, ValueError, OSError):
        return 1024


def _log_to_stderr() -> None:
    """One plain line per request; uvicorn's own lines are left out."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    log.handlers[:] = [handler]
    log.setLevel(logging.INFO)
    log.propagate = False
    logging.getLogger("uvicorn").setLevel(logging.CRITICAL + 1)
    for name in ("uvicorn.error", "uvicorn.access"):
        logging.getLogger(name).setLevel(logging.CRITICAL + 1)
