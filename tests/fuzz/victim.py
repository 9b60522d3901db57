"""A server that is attacked, and what must hold whatever is done to it."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil

from servers import RunningServer, running_server

Json = dict[str, Any]

# Answers of more than this would be no clean ones; what a full disk or quota answers is one.
CLEAN = (503, 507)
GROWTH_BYTES = 400 << 20
# Of all that its processes may map: an attack on memory is not to take the machine down.
LIMIT_BYTES = 8 << 30
ANSWER_SECONDS = 60.0
CONFIG = """
models = {{toy = "toy:"}}
models_dir = "{models}"
load_timeout = 20
automatic = false
"""


class Fault(AssertionError):
    """An attack did harm."""


class Victim:
    def __init__(self, server: RunningServer, models: Path) -> None:
        self.server = server
        self.models = models
        self.http = httpx.Client(base_url=server.url, timeout=ANSWER_SECONDS)
        self.process = psutil.Process(server.process.pid)
        resource.prlimit(server.process.pid, resource.RLIMIT_AS, (LIMIT_BYTES, LIMIT_BYTES))
        self.check()
        self.usual_bytes = self.process.memory_info().rss

    def send(
        self, method: str, path: str, content: bytes = b"", headers: Json | None = None
    ) -> httpx.Response:
        """The answer, which is judged. Raises Fault."""
        try:
            response = self.http.request(method, path, content=content, headers=headers)
        except httpx.TimeoutException as error:
            raise Fault(f"{method} {path}: no answer in {ANSWER_SECONDS} s") from error
        except httpx.TransportError as error:
            # The server may close a connection; whether it lives is asked next.
            self.http.close()
            self.http = httpx.Client(base_url=self.server.url, timeout=ANSWER_SECONDS)
            raise Refused from error
        judge(response)
        return response

    def check(self) -> None:
        """Raises Fault unless the server lives, answers who asks honestly, and takes as little memory as
        before."""
        if self.server.process.poll() is not None:
            raise Fault(f"the server ended with status {self.server.process.returncode}")
        body = {"model": "toy", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}
        try:
            response = httpx.post(f"{self.server.url}/v1/chat/completions", json=body, timeout=ANSWER_SECONDS)
        except httpx.HTTPError as error:
            raise Fault(f"an honest request got no answer: {error!r}") from error
        if response.status_code != 200:
            raise Fault(f"an honest request got {response.status_code}: {response.text[:500]}")
        grown = self.process.memory_info().rss - getattr(self, "usual_bytes", 1 << 62)
        if grown > GROWTH_BYTES:
            raise Fault(f"the server has grown by {grown >> 20} MiB")
        if "Traceback" in self.server.log.read_text(errors="replace"):
            raise Fault(f"a traceback is in the log:\n{self.server.log.read_text(errors='replace')[-2000:]}")


class Refused(Exception):
    """The server has closed the connection without an answer."""


def judge(response: httpx.Response) -> None:
    """Raises Fault for what no request should be answered."""
    if response.status_code >= 500 and response.status_code not in CLEAN:
        raise Fault(f"{response.request.url.path}: {response.status_code} {response.text[:500]}")
    if response.status_code >= 400 and response.status_code != 499:
        check_shape(response)


def check_shape(response: httpx.Response) -> None:
    try:
        error = response.json()["error"]
        known = (
            {"message", "type"} if "/messages" in response.url.path else {"message", "type", "param", "code"}
        )
        assert known <= error.keys()
        assert isinstance(error["message"], str)
    except (ValueError, KeyError, TypeError, AttributeError, AssertionError) as wrong:
        raise Fault(
            f"{response.url.path}: {response.status_code} of another shape: {response.text[:500]}"
        ) from wrong


@contextmanager
def victim(folder: Path) -> Iterator[Victim]:
    """`folder` must be empty."""
    models = folder / "models"
    models.mkdir(parents=True)
    config = folder / "headstart.toml"
    config.write_text(CONFIG.format(models=models))
    with running_server(folder / "cache", "--config", str(config)) as server:
        attacked = Victim(server, models)
        try:
            yield attacked
        finally:
            attacked.http.close()
            if server.process.poll() is None and server.process.returncode is None:
                # A hung server need not be asked twice.
                server.process.kill()
                server.process.wait()
