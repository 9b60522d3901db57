"""`headstart serve`: runs the server in the foreground until a signal stops it."""

from __future__ import annotations

import asyncio
import logging
import os
import resource
import signal
import socket
from collections.abc import Callable
from ipaddress import ip_address

from headstart.api.app import create_app
from headstart.api.http.server import HttpConfig, HttpServer
from headstart.config.settings import Settings
from headstart.errors import StartupError
from headstart.service.service import Service
from headstart.telemetry.log_format import configure_logging
from headstart.telemetry.metrics import MetricsObserver
from headstart.telemetry.otlp import tracing_observer

log = logging.getLogger(__name__)

Notify = Callable[[str], None]

# Caches, workers and what else is open beside connections.
OTHER_FILES = 256
# The limit for closing after a second signal.
HURRIED_SECONDS = 1.0

BANNER = """
Headstart listens on {url} with {names}; caches in {directory}

Name a prompt once:

  curl {url}/v1/cache/{model} -d '{{
    "cache_name": "assistant",
    "prompt": "You are a helpful assistant. You answer in one short sentence."}}'

and start every request from it:

  curl {url}/v1/chat/completions -d '{{
    "model": "{model}", "use_cache": "assistant", "max_tokens": 60,
    "messages": [{{"role": "user", "content": "What is a KV cache?"}}]}}'
"""


def serve(settings: Settings, say: Notify) -> None:
    """Returns when the server was stopped. Raises StartupError if it can't start."""
    check_private(settings)
    # Where llama.cpp aborts, it would start a debugger on itself first, which may hang for ever: in this
    # process and, by inheritance, in all that it starts.
    os.environ.setdefault("GGML_NO_BACKTRACE", "1")
    configure_logging(settings.log_level, settings.log_format)
    listener = _listen(settings.host, settings.port)
    metrics = MetricsObserver()
    tracing = tracing_observer() if settings.tracing else None
    service = Service(settings, say, [metrics, tracing] if tracing else [metrics])
    metrics.watch(service)
    _allow_open_files(settings.max_connections)
    app = create_app(service, metrics=metrics)
    if tracing:
        tracing.watch(app)
    config = HttpConfig(app, settings)
    try:
        with asyncio.Runner(loop_factory=config.get_loop_factory()) as runner:
            runner.run(_serve(service, HttpServer(config), listener, say))
    finally:
        if tracing:
            tracing.close()


async def _serve(service: Service, server: HttpServer, listener: socket.socket, say: Notify) -> None:
    _stop_on_signals(server)
    loading = asyncio.create_task(_load(service, server))
    loading.add_done_callback(lambda _: _announce(loading, service, listener, say))
    try:
        await server.serve([listener])
    finally:
        loading.cancel()
        await _close(service, server)
    if loading.done() and not loading.cancelled() and (error := loading.exception()):
        raise error


def _stop_on_signals(server: HttpServer) -> None:
    """The first signal lets running requests finish, the second ends them, the third ends the program."""
    loop = asyncio.get_running_loop()
    numbers = (signal.SIGINT, signal.SIGTERM)

    def stop() -> None:
        server.stop()
        if server.force_exit:
            for number in numbers:
                loop.remove_signal_handler(number)
                signal.signal(number, signal.SIG_DFL)

    for number in numbers:
        loop.add_signal_handler(number, stop)


async def _close(service: Service, server: HttpServer) -> None:
    """Closes the service. Unless the end is to be quick, pending saves of conversations and responses finish
    first."""
    closing = asyncio.create_task(service.close())
    while not (closing.done() or server.force_exit):
        await asyncio.wait({closing}, timeout=0.1)
    _, late = await asyncio.wait({closing}, timeout=HURRIED_SECONDS)
    if late:
        log.warning("stopped before everything was saved")
        closing.cancel()
    else:
        closing.result()


async def _load(service: Service, server: HttpServer) -> None:
    try:
        await service.load()
    except BaseException:
        server.should_exit = True
        raise


def _allow_open_files(connections: int) -> None:
    """Raises the limit of open files for the connections, as far as the system allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = connections + OTHER_FILES
    most = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    if most < needed:
        log.warning("only %d files may be open: of %d connections, some may have to wait", most, connections)


def check_private(settings: Settings) -> None:
    """Raises StartupError if other machines could use the server without a key and that isn't allowed."""
    if not (settings.keys or settings.allow_public or _is_loopback(settings.host)):
        raise StartupError(
            f"Other machines could use the server at {settings.host} without a key. Configure an API key "
            "([keys.NAME] in the configuration file), or allow it with --insecure."
        )


def _is_loopback(host: str) -> bool:
    try:
        found = socket.getaddrinfo(host or None, None, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError):
        return False
    return all(ip_address(str(address[0]).partition("%")[0]).is_loopback for *_, address in found)


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # Event loops turn Nagle's delay off only where the protocol is named.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(128)
    except OSError as error:
        listener.close()
        raise StartupError(
            f"Can't listen on {host}:{port}: {error.strerror}. Choose another with --host and --port."
        ) from error
    return listener


def _announce(loading: asyncio.Task[None], service: Service, listener: socket.socket, say: Notify) -> None:
    if loading.cancelled() or loading.exception():
        return
    host, port = listener.getsockname()[:2]
    url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    model = service.names()[0]
    say(
        BANNER.format(
            url=url,
            names=", ".join(service.names()),
            model=model,
            directory=service.settings.cache_dir.absolute(),
        )
    )
