"""The command line; its options stay as they are."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from headstart import __version__
from headstart.config import Settings, load_settings
from headstart.errors import StartupError

app = typer.Typer(
    name="headstart",
    help="An OpenAI-compatible LLM server that never prefills the same prompt twice.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
errors = Console(stderr=True, highlight=False, soft_wrap=True)


def _say(text: str) -> None:
    print(text, flush=True)


def _pairs(items: list[str], option: str) -> dict[str, str]:
    pairs = {}
    for item in items:
        name, equals, value = item.partition("=")
        if not (name and equals and value):
            raise typer.BadParameter(f"{item!r} is not of the form {option}", param_hint=option)
        pairs[name] = value
    return pairs


def _description(setting: str) -> str:
    return Settings.model_fields[setting].description or ""


@app.command()
def serve(
    host: Annotated[str | None, typer.Option(help=_description("host"))] = None,
    port: Annotated[int | None, typer.Option(help=_description("port"))] = None,
    model: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=PATH", help="A model's name and GGUF file; may be repeated."),
    ] = None,
    alias: Annotated[
        list[str] | None,
        typer.Option(metavar="NEW=NAME", help="A further name of a model; may be repeated."),
    ] = None,
    cache_dir: Annotated[Path | None, typer.Option(help=_description("cache_dir"))] = None,
    config: Annotated[Path | None, typer.Option(help="A TOML file with any of the settings.")] = None,
    slots: Annotated[int | None, typer.Option(help=_description("slots"))] = None,
    ctx: Annotated[int | None, typer.Option(help=_description("ctx"))] = None,
) -> None:
    """Run the server."""
    from headstart.cli.serve import serve as run

    try:
        settings = load_settings(
            config,
            host=host,
            port=port,
            models=_pairs(model or [], "NAME=PATH"),
            aliases=_pairs(alias or [], "NEW=NAME"),
            cache_dir=cache_dir,
            slots=slots,
            ctx=ctx,
        )
        run(settings, _say)
    except StartupError as error:
        errors.print(f"[red]headstart:[/red] {error}")
        raise typer.Exit(1) from error


@app.command()
def version() -> None:
    """Print the version."""
    _say(__version__)
