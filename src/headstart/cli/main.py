"""The command line; its options stay as they are."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape

from headstart import __version__
from headstart.arithmetic import Weights
from headstart.config import Settings, load_settings
from headstart.errors import HeadstartError, StartupError

if TYPE_CHECKING:
    from headstart.cli.client import Client

DEFAULT_URL = "http://127.0.0.1:8080"

app = typer.Typer(
    name="headstart",
    help="An OpenAI-compatible LLM server that never prefills the same prompt twice.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
cache = typer.Typer(help="Manage the named caches of a running server.", no_args_is_help=True)
app.add_typer(cache, name="cache")
errors = Console(stderr=True, highlight=False, soft_wrap=True)


def _say(text: str) -> None:
    print(text, flush=True)


def _failed(error: Exception) -> typer.Exit:
    """Shows the error; to be raised."""
    errors.print(f"[red]headstart:[/red] {escape(str(error))}")
    return typer.Exit(1)


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


Models = Annotated[
    list[str] | None,
    typer.Option("--model", metavar="NAME=PATH", help="A model's name and GGUF file; may be repeated."),
]
CacheDir = Annotated[Path | None, typer.Option(help=_description("cache_dir"))]
Config = Annotated[Path | None, typer.Option(help="A TOML file with any of the settings.")]
Tune = Annotated[bool | None, typer.Option("--tune/--no-tune", help=_description("tune"))]
Threads = Annotated[int | None, typer.Option(help=_description("threads"))]
PrefillChunk = Annotated[int | None, typer.Option(help=_description("prefill_chunk"))]
MaxStepMs = Annotated[float | None, typer.Option(help=_description("max_step_ms"))]
FlashAttention = Annotated[
    bool | None,
    typer.Option("--flash-attention/--no-flash-attention", help=_description("flash_attention")),
]
WeightsFormat = Annotated[Weights | None, typer.Option("--weights", help=_description("weights"))]


@app.command()
def serve(
    host: Annotated[str | None, typer.Option(help=_description("host"))] = None,
    port: Annotated[int | None, typer.Option(help=_description("port"))] = None,
    model: Models = None,
    alias: Annotated[
        list[str] | None,
        typer.Option(metavar="NEW=NAME", help="A further name of a model; may be repeated."),
    ] = None,
    cache_dir: CacheDir = None,
    config: Config = None,
    slots: Annotated[int | None, typer.Option(help=_description("slots"))] = None,
    ctx: Annotated[int | None, typer.Option(help=_description("ctx"))] = None,
    tune: Tune = None,
    threads: Threads = None,
    prefill_chunk: PrefillChunk = None,
    flash_attention: FlashAttention = None,
    weights: WeightsFormat = None,
    max_step_ms: MaxStepMs = None,
    insecure: Annotated[bool | None, typer.Option("--insecure", help=_description("allow_public"))] = None,
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
            tune=tune,
            threads=threads,
            prefill_chunk=prefill_chunk,
            flash_attention=flash_attention,
            weights=weights,
            max_step_ms=max_step_ms,
            allow_public=insecure,
        )
        run(settings, _say)
    except (StartupError, HeadstartError) as error:
        raise _failed(error) from error


@app.command()
def doctor(
    model: Models = None,
    cache_dir: CacheDir = None,
    config: Config = None,
    tune: Tune = None,
    threads: Threads = None,
    prefill_chunk: PrefillChunk = None,
    flash_attention: FlashAttention = None,
    weights: WeightsFormat = None,
    max_step_ms: MaxStepMs = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Measure again first; better with no server running.")
    ] = False,
    yes: Annotated[
        bool,
        typer.Option("--yes", help="Take what measuring prefers, whatever caches were computed with."),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Show what a server with these settings would do here, and what is wrong.

    A server may be running. Nothing is changed without --measure. Ends with status 1 if something needs
    attention.
    """
    from headstart.cli.doctor import show, show_json
    from headstart.service.doctor import examine, measure_again

    flags = {
        "models": _pairs(model or [], "NAME=PATH"),
        "cache_dir": cache_dir,
        "tune": tune,
        "threads": threads,
        "prefill_chunk": prefill_chunk,
        "flash_attention": flash_attention,
        "weights": weights,
        "max_step_ms": max_step_ms,
    }
    try:
        settings = load_settings(config, **flags)
        if measure:
            measure_again(settings, lambda text: errors.print(text, markup=False), agree=yes)
        report = examine(settings, flags)
    except (StartupError, HeadstartError) as error:
        raise _failed(error) from error
    (show_json if as_json else show)(report)
    if report.problems:
        raise typer.Exit(1)


@app.command()
def version() -> None:
    """Print the version."""
    _say(__version__)


class Purpose(StrEnum):
    CHAT = "chat"
    COMPLETION = "completion"


Name = Annotated[str, typer.Argument(help="Name of the cache.", show_default=False)]
Model = Annotated[str | None, typer.Option("--model", help="A model's name; else the server's first model.")]
Url = Annotated[str, typer.Option("--url", envvar="HEADSTART_URL", help="Address of the server.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the server's own answer.")]


@contextmanager
def _server(url: str) -> Iterator[Client]:
    """A client for the server. What fails is shown, and ends the command with status 1."""
    from headstart.cli.client import Client, RequestFailed

    try:
        with Client(url) as client:
            yield client
    except RequestFailed as error:
        raise _failed(error) from error


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


@app.command()
def demo(model: Model = None, url: Url = DEFAULT_URL) -> None:
    """Walk through the guide's examples, with a cache and without, and show where the time goes.

    Starts a server for itself when none is ready at the address.
    """
    from headstart.cli.client import RequestFailed
    from headstart.cli.demo import demo as run

    try:
        run(url, model)
    except RequestFailed as error:
        raise _failed(error) from error
