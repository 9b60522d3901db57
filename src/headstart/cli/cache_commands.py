"""`headstart cache ...`: the commands and their options. `headstart.cli.cache` implements them."""

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
    typer.Option("--ttl", metavar="SECONDS", help="Seconds from now until it expires; 0: never."),
]
Pinned = Annotated[
    bool | None,
    typer.Option("--pinned/--no-pinned", help="Never evict its states."),
]
Description = Annotated[str | None, typer.Option("--description", metavar="TEXT", help="A description.")]
Metadata = Annotated[
    list[str] | None,
    typer.Option(
        "--metadata",
        metavar="KEY=VALUE",
        help="A label; the new ones replace all earlier ones. May be repeated.",
    ),
]


ServerConfig = Annotated[
    Path | None, typer.Option(help="The server's TOML file, used if there is no server.")
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
        raise typer.BadParameter("give the prompt with either --prompt TEXT or --file PATH")
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
    prompt: Annotated[str | None, typer.Option(metavar="TEXT", help="The prompt to cache.")] = None,
    file: Annotated[
        Path | None,
        typer.Option(
            metavar="PATH",
            help="A text file with the prompt, used unchanged, with the last line break; -: standard input.",
        ),
    ] = None,
    model: Model = None,
    purposes: Annotated[
        list[Purpose] | None,
        typer.Option("--for", help="Endpoints to build it for; may be repeated. Default: both."),
    ] = None,
    no_overwrite: Annotated[
        bool, typer.Option("--no-overwrite", help="Fail if a cache of this name exists.")
    ] = False,
    ttl: Ttl = None,
    pinned: Pinned = None,
    description: Description = None,
    metadata: Metadata = None,
    url: Url = DEFAULT_URL,
) -> None:
    """Create a cache of a prompt, or replace the cache of this name.

    A replaced cache keeps its --ttl, --pinned, --description and --metadata unless they are given.
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
    """Change a cache's retention; its version and states stay."""
    from headstart.cli.cache import edit

    retention = _retention(ttl, pinned, description, metadata)
    if not retention:
        raise typer.BadParameter(
            "give at least one of --ttl, --pinned, --no-pinned, --description and --metadata"
        )
    with server(url) as client:
        edit(client, name, model, retention)


@cache.command("export")
def cache_export(
    name: Name,
    path: Annotated[
        Path | None, typer.Option("--out", metavar="PATH", help="The file to write; default: NAME.headstart.")
    ] = None,
    model: Model = None,
    url: Url = DEFAULT_URL,
) -> None:
    """Export a cache with its states to a file."""
    from headstart.cli.cache_files import export_file

    with server(url) as client:
        export_file(client, name, model, path)


@cache.command("import")
def cache_import(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="The file.", show_default=False)],
    name: Annotated[
        str | None, typer.Option("--name", help="Name of the cache; default: that of the file.")
    ] = None,
    rebuild: Annotated[
        bool, typer.Option("--rebuild", help="Import only the text; the server computes the states.")
    ] = False,
    model: Model = None,
    url: Url = DEFAULT_URL,
) -> None:
    """Import a cache from an exported file; it replaces a cache of this name.

    States go to the engine unchanged: import them only from people whose programs you would run.
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
    """List the caches of all models, or of one."""
    from headstart.cli.cache import show_all

    with server(url) as client:
        show_all(client, model, as_json)


@cache.command("show")
def cache_show(name: Name, model: Model = None, as_json: AsJson = False, url: Url = DEFAULT_URL) -> None:
    """Show a cache with its prompt."""
    from headstart.cli.cache import show

    with server(url) as client:
        show(client, name, model, as_json)


@cache.command("delete")
def cache_delete(name: Name, model: Model = None, url: Url = DEFAULT_URL) -> None:
    """Delete a cache. Running requests that use it are not affected."""
    from headstart.cli.cache import delete

    with server(url) as client:
        delete(client, name, model)


@cache.command("clear")
def cache_clear(
    model: Annotated[str | None, typer.Option("--model", help="Only this model's states.")] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Don't ask.")] = False,
    cache_dir: Annotated[Path | None, typer.Option(help="Empty this directory's without a server.")] = None,
    config: ServerConfig = None,
    url: Url = DEFAULT_URL,
) -> None:
    """Delete what is kept of earlier requests without a name; named caches stay.

    The server does this. If there is none, the command itself works in the cache directory.
    """
    from headstart.cli.cache import clear, clear_directory

    if not yes:
        whose = "all models" if model is None else model
        typer.confirm(f"Delete the states that are kept without a name, of {whose}?", abort=True)
    with server(url) as client:
        if cache_dir is None and client.is_there():
            clear(client, model)
        else:
            clear_directory(model, cache_dir, config)


@cache.command("verify")
def cache_verify(
    name: Annotated[str | None, typer.Argument(help="Only caches of this name.", show_default=False)] = None,
    model: Annotated[str | None, typer.Option("--model", help="Only this model's caches.")] = None,
    repair: Annotated[
        bool,
        typer.Option(
            "--repair",
            help="Rebuild damaged and unfit caches; set aside files whose prompt can't be read.",
        ),
    ] = False,
    remove_unreadable: Annotated[
        bool,
        typer.Option("--remove-unreadable", help="With --repair: delete files whose prompt can't be read."),
    ] = False,
    cache_dir: Annotated[Path | None, typer.Option(help="Check this directory without a server.")] = None,
    config: ServerConfig = None,
    url: Url = DEFAULT_URL,
) -> None:
    """Check every byte of the caches, and whether they would hit.

    The server does this. If there is none, the command itself checks the cache directory and changes nothing.
    It exits with status 1 if a fault remains.
    """
    from headstart.cli.client import RequestFailed
    from headstart.cli.verify import ask, look

    if remove_unreadable and not repair:
        raise typer.BadParameter("it needs --repair", param_hint="--remove-unreadable")
    with server(url) as client:
        if cache_dir is None and client.is_there():
            wrong = ask(client, name, model, repair, remove_unreadable)
        elif repair:
            raise RequestFailed(f"--repair needs a running server; there is none at {client.url}.")
        else:
            wrong = look(name, model, cache_dir, config)
    if wrong:
        raise typer.Exit(1)
