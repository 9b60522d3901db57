"""`headstart cache ...`: the commands and their options; what they do is in `headstart.cli.cache`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from headstart.cli.options import DEFAULT_URL, AsJson, Model, Url, failed

if TYPE_CHECKING:
    from headstart.cli.client import Client

cache = typer.Typer(help="Manage the named caches of a running server.", no_args_is_help=True)


class Purpose(StrEnum):
    CHAT = "chat"
    COMPLETION = "completion"


Name = Annotated[str, typer.Argument(help="Name of the cache.", show_default=False)]


@contextmanager
def _server(url: str) -> Iterator[Client]:
    """A client for the server. What fails is shown, and ends the command with status 1."""
    from headstart.cli.client import Client, RequestFailed

    try:
        with Client(url) as client:
            yield client
    except RequestFailed as error:
        raise failed(error) from error


def _read_prompt(prompt: str | None, file: Path | None) -> str:
    if (prompt is None) == (file is None):
        raise typer.BadParameter("give the prompt as one of --prompt TEXT and --file PATH")
    if file is None:
        return prompt or ""
    try:
        return (sys.stdin.buffer.read() if str(file) == "-" else file.read_bytes()).decode()
    except OSError as error:
        raise typer.BadParameter(f"can't read {file}: {error.strerror}", param_hint="--file") from error
    except UnicodeDecodeError as error:
        raise typer.BadParameter(f"{file} is not UTF-8 text: {error}", param_hint="--file") from error


@cache.command("create")
def cache_create(
    name: Name,
    prompt: Annotated[str | None, typer.Option(metavar="TEXT", help="The prompt to keep.")] = None,
    file: Annotated[
        Path | None,
        typer.Option(
            metavar="PATH",
            help="A text file with the prompt, taken as it is to the last line break; - is standard input.",
        ),
    ] = None,
    model: Model = None,
    purposes: Annotated[
        list[Purpose] | None,
        typer.Option("--for", help="What the cache is for; may be repeated. Without it, both."),
    ] = None,
    no_overwrite: Annotated[
        bool, typer.Option("--no-overwrite", help="Fail when there is a cache of this name.")
    ] = False,
    url: Url = DEFAULT_URL,
) -> None:
    """Compute a prompt and keep it under a name; an existing cache is replaced."""
    from headstart.cli.cache import create

    text = _read_prompt(prompt, file)
    with _server(url) as client:
        create(client, name, text, model, purposes or [], overwrite=not no_overwrite)


@cache.command("list")
def cache_list(
    model: Annotated[str | None, typer.Option(help="Only this model's caches.")] = None,
    as_json: AsJson = False,
    url: Url = DEFAULT_URL,
) -> None:
    """List the caches, of all models unless one is named."""
    from headstart.cli.cache import show_all

    with _server(url) as client:
        show_all(client, model, as_json)


@cache.command("show")
def cache_show(name: Name, model: Model = None, as_json: AsJson = False, url: Url = DEFAULT_URL) -> None:
    """Show all that is known of a cache, and its prompt."""
    from headstart.cli.cache import show

    with _server(url) as client:
        show(client, name, model, as_json)


@cache.command("delete")
def cache_delete(name: Name, model: Model = None, url: Url = DEFAULT_URL) -> None:
    """Delete a cache. Requests that have begun with it end with it."""
    from headstart.cli.cache import delete

    with _server(url) as client:
        delete(client, name, model)
