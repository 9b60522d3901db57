"""`headstart cache ...`: the commands and their options; what they do is in `headstart.cli.cache`."""

from __future__ import annotations

import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from headstart.cli.options import DEFAULT_URL, AsJson, Model, Url, pairs, server

cache = typer.Typer(help="Manage the named caches of a running server.", no_args_is_help=True)


class Purpose(StrEnum):
    CHAT = "chat"
    COMPLETION = "completion"


Name = Annotated[str, typer.Argument(help="Name of the cache.", show_default=False)]


Ttl = Annotated[
    float | None,
    typer.Option("--ttl", metavar="SECONDS", help="How long it is kept from now; 0: till it is deleted."),
]
Pinned = Annotated[
    bool | None,
    typer.Option("--pinned/--no-pinned", help="Whether its states are never given up for others."),
]
Description = Annotated[str | None, typer.Option("--description", metavar="TEXT", help="What it is.")]
Metadata = Annotated[
    list[str] | None,
    typer.Option(
        "--metadata", metavar="KEY=VALUE", help="Anything; replaces all there was; may be repeated."
    ),
]


def _retention(
    ttl: float | None, pinned: bool | None, description: str | None, metadata: list[str] | None
) -> dict[str, Any]:
    """The retention options given on the command line."""
    retention = {
        "ttl_seconds": ttl,
        "pinned": pinned,
        "description": description,
        "metadata": pairs(metadata, "KEY=VALUE") if metadata else None,
    }
    given = {name: value for name, value in retention.items() if value is not None}
    return given | {"ttl_seconds": None} if ttl == 0 else given


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
    ttl: Ttl = None,
    pinned: Pinned = None,
    description: Description = None,
    metadata: Metadata = None,
    url: Url = DEFAULT_URL,
) -> None:
    """Compute a prompt and keep it under a name; an existing cache is replaced.

    What isn't said of --ttl, --pinned, --description and --metadata stays as it was.
    """
    from headstart.cli.cache import create

    text = _read_prompt(prompt, file)
    retention = _retention(ttl, pinned, description, metadata)
    with server(url) as client:
        create(client, name, text, model, purposes or [], overwrite=not no_overwrite, retention=retention)


@cache.command("edit")
def cache_edit(
    name: Name,
    model: Model = None,
    ttl: Ttl = None,
    pinned: Pinned = None,
    description: Description = None,
    metadata: Metadata = None,
    url: Url = DEFAULT_URL,
) -> None:
    """Change how a cache is kept; its version and states stay."""
    from headstart.cli.cache import edit

    retention = _retention(ttl, pinned, description, metadata)
    if not retention:
        raise typer.BadParameter("give one of --ttl, --pinned, --no-pinned, --description and --metadata")
    with server(url) as client:
        edit(client, name, model, retention)


@cache.command("export")
def cache_export(
    name: Name,
    path: Annotated[
        Path | None, typer.Option("--out", metavar="PATH", help="Where to; else NAME.headstart.")
    ] = None,
    model: Model = None,
    url: Url = DEFAULT_URL,
) -> None:
    """Write a cache with its states to a file, to be imported elsewhere."""
    from headstart.cli.cache_files import export_file

    with server(url) as client:
        export_file(client, name, model, path)


@cache.command("import")
def cache_import(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="The file.", show_default=False)],
    name: Annotated[str | None, typer.Option("--name", help="Name of the cache; else the file's.")] = None,
    rebuild: Annotated[
        bool, typer.Option("--rebuild", help="Take its text only and compute the states here.")
    ] = False,
    model: Model = None,
    url: Url = DEFAULT_URL,
) -> None:
    """Take a cache from a file that was exported; an existing one of the name is replaced.

    Its states go to the engine as they are: take them from nobody whose programs you wouldn't run.
    """
    from headstart.cli.cache_files import import_file

    with server(url) as client:
        import_file(client, path, name, model, rebuild=rebuild)


@cache.command("list")
def cache_list(
    model: Annotated[str | None, typer.Option(help="Only this model's caches.")] = None,
    as_json: AsJson = False,
    url: Url = DEFAULT_URL,
) -> None:
    """List the caches, of all models unless one is named."""
    from headstart.cli.cache import show_all

    with server(url) as client:
        show_all(client, model, as_json)


@cache.command("show")
def cache_show(name: Name, model: Model = None, as_json: AsJson = False, url: Url = DEFAULT_URL) -> None:
    """Show all that is known of a cache, and its prompt."""
    from headstart.cli.cache import show

    with server(url) as client:
        show(client, name, model, as_json)


@cache.command("delete")
def cache_delete(name: Name, model: Model = None, url: Url = DEFAULT_URL) -> None:
    """Delete a cache. Requests that have begun with it end with it."""
    from headstart.cli.cache import delete

    with server(url) as client:
        delete(client, name, model)


@cache.command("verify")
def cache_verify(
    name: Annotated[str | None, typer.Argument(help="Only caches of this name.", show_default=False)] = None,
    model: Annotated[str | None, typer.Option("--model", help="Only this model's caches.")] = None,
    repair: Annotated[
        bool,
        typer.Option(
            "--repair",
            help="Compute those damaged or unfit again; files with no readable prompt are set aside.",
        ),
    ] = False,
    remove_unreadable: Annotated[
        bool,
        typer.Option("--remove-unreadable", help="With --repair: delete files with no readable prompt."),
    ] = False,
    cache_dir: Annotated[
        Path | None, typer.Option(help="Look at this directory itself, without a server.")
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="The server's TOML file, for when there is no server.")
    ] = None,
    url: Url = DEFAULT_URL,
) -> None:
    """Check every byte of the caches, and whether they would hit.

    Asks the server; where there is none, looks at the cache directory itself, changing nothing. Ends with
    status 1 if something is wrong that was not repaired.
    """
    from headstart.cli.client import RequestFailed
    from headstart.cli.verify import ask, look

    if remove_unreadable and not repair:
        raise typer.BadParameter("it says what --repair does", param_hint="--remove-unreadable")
    with server(url) as client:
        if cache_dir is None and client.is_there():
            wrong = ask(client, name, model, repair, remove_unreadable)
        elif repair:
            raise RequestFailed(f"--repair needs a running server, and there is none at {client.url}.")
        else:
            wrong = look(name, model, cache_dir, config)
    if wrong:
        raise typer.Exit(1)
