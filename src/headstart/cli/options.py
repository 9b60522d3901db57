"""Options that several commands have, and how they say that something failed."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

DEFAULT_URL = "http://127.0.0.1:8080"

Model = Annotated[str | None, typer.Option("--model", help="A model's name; else the server's first model.")]
Url = Annotated[str, typer.Option("--url", envvar="HEADSTART_URL", help="Address of the server.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the server's own answer.")]

errors = Console(stderr=True, highlight=False, soft_wrap=True)


def failed(error: Exception) -> typer.Exit:
    """Shows the error; to be raised."""
    errors.print(f"[red]headstart:[/red] {escape(str(error))}")
    return typer.Exit(1)


def pairs(items: list[str], option: str) -> dict[str, str]:
    pairs = {}
    for item in items:
        name, equals, value = item.partition("=")
        if not (name and equals and value):
            raise typer.BadParameter(f"{item!r} is not of the form {option}", param_hint=option)
        pairs[name] = value
    return pairs
