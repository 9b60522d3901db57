"""Parts that several commands share: options, a client for the server, and error output."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape

from headstart.errors import HeadstartError, StartupError

if TYPE_CHECKING:
    from headstart.cli.client import Client

DEFAULT_URL = "http://127.0.0.1:8080"

Model = Annotated[
    str | None, typer.Option("--model", help="A model's name; default: the server's first model.")
]
Url = Annotated[str, typer.Option("--url", envvar="HEADSTART_URL", help="Address of the server.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the server's answer as JSON.")]

errors = Console(stderr=True, highlight=False, soft_wrap=True)


def failed(error: Exception) -> typer.Exit:
    """Prints the error; returns the exception that ends the command with status 1."""
    errors.print(f"[red]headstart:[/red] {escape(str(error))}")
    return typer.Exit(1)


@contextmanager
def server(url: str) -> Iterator[Client]:
    """A client for the server. An error within the context is printed and ends the command with status 1."""
    from headstart.cli.client import Client, RequestFailed

    try:
        with Client(url) as client:
            yield client
    except (RequestFailed, HeadstartError, StartupError) as error:
        raise failed(error) from error


def pairs(items: list[str], option: str) -> dict[str, str]:
    pairs = {}
    for item in items:
        name, equals, value = item.partition("=")
        if not (name and equals and value):
            raise typer.BadParameter(f"{item!r} is not of the form {option}", param_hint=option)
        pairs[name] = value
    return pairs
