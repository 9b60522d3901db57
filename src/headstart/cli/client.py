"""The command line's HTTP client: a server's answers, and its errors in words for the terminal."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import quote

import httpx

Json = dict[str, Any]

API_KEY = "HEADSTART_API_KEY"
TIMEOUT = httpx.Timeout(60, connect=5)
LOOPBACK = ("all://127.0.0.1", "all://localhost", "all://[::1]")


class RequestFailed(Exception):
    """The server refused the request or is missing. The message is the server's, or says how to proceed."""


class Client:
    """The API of the server at `url`, with the API key from the environment, if there is one. All methods
    raise RequestFailed."""

    def __init__(self, url: str) -> None:
        self.url = (url if "://" in url else f"http://{url}").rstrip("/")
        key = os.environ.get(API_KEY, "")
        try:
            # A proxy could not reach this machine's own server.
            self._http = httpx.Client(
                base_url=self.url,
                timeout=TIMEOUT,
                mounts=dict.fromkeys(LOOPBACK, None),
                headers={"authorization": f"Bearer {key}"} if key else None,
            )
        except httpx.InvalidURL as error:
            raise RequestFailed(f"{url!r} is not the address of a server: {error}") from error

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def call(self, method: str, path: str, expected: str, body: Json | None = None) -> Json:
        """The answer, whose `object` is `expected`."""
        with self._explained_failures():
            response = self._http.request(method, path, json=body)
        answer = self._checked(response)
        if answer.get("object") != expected:
            raise self._not_headstart(response)
        return answer

    def events(self, path: str, body: Json) -> Iterator[Json]:
        """The objects of a streamed answer, as they arrive. Raises an error that is among them."""
        complete = False
        with (
            self._explained_failures(),
            self._http.stream("POST", path, json={**body, "stream": True}) as response,
        ):
            if response.status_code != 200:
                response.read()
                self._checked(response)
            # Read to the end, also after [DONE]: otherwise the connection can't be used again.
            for data in _event_data(response.iter_bytes()):
                if data == b"[DONE]":
                    complete = True
                else:
                    yield _without_error(json.loads(data))
        if not complete:
            raise RequestFailed(f"The answer of the server at {self.url} ended in the middle.")

    def download(self, path: str) -> Iterator[bytes]:
        """The pieces of a file."""
        with self._explained_failures(), self._http.stream("GET", path) as response:
            if response.status_code != 200:
                response.read()
                self._checked(response)
                raise self._not_headstart(response)
            yield from response.iter_bytes()

    def upload(self, path: str, content: Iterator[bytes], size: int) -> Json:
        """Uploads a file of `size` bytes and returns the answer, which may take as long as computing it."""
        headers = {"content-length": str(size), "content-type": "application/octet-stream"}
        timeout = httpx.Timeout(None, connect=5)
        with self._explained_failures():
            response = self._http.put(path, content=content, headers=headers, timeout=timeout)
        return self._checked(response)

    def model(self, name: str | None = None) -> Json:
        """The server's description of a model; without a name, of its first one."""
        if name is None:
            first: Json = self.call("GET", "/v1/models", "list")["data"][0]
            return first
        return self.call("GET", f"/v1/models/{_quoted(name)}", "model")

    def is_ready(self) -> bool:
        """Whether a Headstart server with its models loaded answers; never raises."""
        try:
            with self._explained_failures():
                return "models" in self._checked(self._http.get("/health"))
        except RequestFailed:
            return False

    def is_there(self) -> bool:
        """Whether something answers, ready or not. Raises RequestFailed if that is unknown."""
        try:
            with self._explained_failures():
                self._http.get("/health")
        except RequestFailed as failure:
            if isinstance(failure.__cause__, httpx.ConnectError):
                return False
            raise
        return True

    @contextmanager
    def _explained_failures(self) -> Iterator[None]:
        try:
            yield
        except httpx.ConnectError as error:
            raise RequestFailed(
                f"There is no server at {self.url}. Start one with `headstart serve`, or name another "
                "with --url."
            ) from error
        except httpx.HTTPError as error:
            reason = str(error) or type(error).__name__
            raise RequestFailed(f"The server at {self.url} did not answer: {reason}") from error

    def _checked(self, response: httpx.Response) -> Json:
        try:
            answer = response.json()
        except ValueError:
            raise self._not_headstart(response) from None
        if not isinstance(answer, dict) or (response.is_error and "error" not in answer):
            raise self._not_headstart(response)
        return _without_error(answer)

    def _not_headstart(self, response: httpx.Response) -> RequestFailed:
        status = f"{response.status_code} {response.reason_phrase}".strip()
        return RequestFailed(f"What answers at {response.url} ({status}) is not a Headstart server.")


def cache_path(model: str, name: str | None = None) -> str:
    """The path of a model's caches, or of one cache; the names may be invalid."""
    return "/".join(["/v1/cache", *(_quoted(part) for part in (model, name) if part is not None)])


def _quoted(part: str) -> str:
    # Bare dots could be taken for "this" or "the upper folder" on the way.
    return quote(part, safe="").replace(".", "%2E")


def _event_data(chunks: Iterable[bytes]) -> Iterator[bytes]:
    # Only \n ends a line here: str.splitlines knows others, which JSON texts may contain as they are.
    rest = b""
    for chunk in chunks:
        *lines, rest = (rest + chunk).split(b"\n")
        yield from (line.removeprefix(b"data: ") for line in lines if line.startswith(b"data: "))


def _without_error(answer: Json) -> Json:
    if error := answer.get("error"):
        raise RequestFailed(error["message"] if isinstance(error, dict) else str(error))
    return answer
