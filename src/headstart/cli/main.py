"""The commands `serve`, `doctor`, `version` and `demo`. The names of options are a stable interface."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from headstart import __version__
from headstart.cli.cache_commands import cache
from headstart.cli.model_commands import model as model_commands
from headstart.cli.options import DEFAULT_URL, Model, Url, errors, failed, pairs
from headstart.config.settings import LogFormat, Settings, load_settings
from headstart.errors import HeadstartError, StartupError
from headstart.numerics import Weights

app = typer.Typer(
    name="headstart",
    help="An OpenAI-compatible LLM server that never prefills the same prompt twice.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.add_typer(cache, name="cache")
app.add_typer(model_commands, name="model")


def _say(text: str) -> None:
    print(text, flush=True)


def _description(setting: str) -> str:
    return Settings.model_fields[setting].description or ""


Models = Annotated[
    list[str] | None,
    typer.Option("--model", metavar="NAME=PATH", help="A model's name and file; may be repeated."),
]
CacheDir = Annotated[Path | None, typer.Option(help=_description("cache_dir"))]
Config = Annotated[Path | None, typer.Option(help="A TOML file with any of the settings.")]
StateMemory = Annotated[float | None, typer.Option(help=_description("state_memory_mb"))]
StateDisk = Annotated[float | None, typer.Option(help=_description("state_disk_mb"))]
Tune = Annotated[bool | None, typer.Option("--tune/--no-tune", help=_description("tune"))]
Threads = Annotated[int | None, typer.Option(help=_description("threads"))]
PrefillChunk = Annotated[int | None, typer.Option(help=_description("prefill_chunk"))]
MaxStepMs = Annotated[float | None, typer.Option(help=_description("max_step_ms"))]
FlashAttention = Annotated[
    bool | None,
    typer.Option("--flash-attention/--no-flash-attention", help=_description("flash_attention")),
]
WeightsFormat = Annotated[Weights | None, typer.Option("--weights", help=_description("weights"))]

RkllmLibrary = Annotated[str | None, typer.Option("--rkllm-library", help=_description("rkllm_library"))]
RkllmAbi = Annotated[str | None, typer.Option("--rkllm-abi", help=_description("rkllm_abi"))]


@app.command()
def serve(
    host: Annotated[str | None, typer.Option(help=_description("host"))] = None,
    port: Annotated[int | None, typer.Option(help=_description("port"))] = None,
    model: Models = None,
    alias: Annotated[
        list[str] | None,
        typer.Option(metavar="NEW=NAME", help="Another name of a model; may be repeated."),
    ] = None,
    models_dir: Annotated[Path | None, typer.Option(help=_description("models_dir"))] = None,
    max_loaded: Annotated[int | None, typer.Option(help=_description("max_loaded"))] = None,
    cache_dir: CacheDir = None,
    config: Config = None,
    quota_mb: Annotated[float | None, typer.Option(help=_description("quota_mb"))] = None,
    state_memory_mb: StateMemory = None,
    state_disk_mb: StateDisk = None,
    state_days: Annotated[float | None, typer.Option(help=_description("state_days"))] = None,
    slots: Annotated[int | None, typer.Option(help=_description("slots"))] = None,
    ctx: Annotated[int | None, typer.Option(help=_description("ctx"))] = None,
    tune: Tune = None,
    threads: Threads = None,
    prefill_chunk: PrefillChunk = None,
    flash_attention: FlashAttention = None,
    weights: WeightsFormat = None,
    max_step_ms: MaxStepMs = None,
    rkllm_library: RkllmLibrary = None,
    rkllm_abi: RkllmAbi = None,
    insecure: Annotated[bool | None, typer.Option("--insecure", help=_description("allow_public"))] = None,
    log_format: Annotated[LogFormat | None, typer.Option(help=_description("log_format"))] = None,
) -> None:
    """Run the server."""
    from headstart.cli.serve import serve as run

    try:
        settings = load_settings(
            config,
            host=host,
            port=port,
            models=pairs(model or [], "NAME=PATH"),
            aliases=pairs(alias or [], "NEW=NAME"),
            models_dir=models_dir,
            max_loaded=max_loaded,
            cache_dir=cache_dir,
            quota_mb=quota_mb,
            state_memory_mb=state_memory_mb,
            state_disk_mb=state_disk_mb,
            state_days=state_days,
            slots=slots,
            ctx=ctx,
            tune=tune,
            threads=threads,
            prefill_chunk=prefill_chunk,
            flash_attention=flash_attention,
            weights=weights,
            max_step_ms=max_step_ms,
            rkllm_library=rkllm_library,
            rkllm_abi=rkllm_abi,
            allow_public=insecure,
            log_format=log_format,
        )
        run(settings, _say)
    except (StartupError, HeadstartError) as error:
        raise failed(error) from error


@app.command()
def doctor(
    model: Models = None,
    cache_dir: CacheDir = None,
    config: Config = None,
    state_memory_mb: StateMemory = None,
    state_disk_mb: StateDisk = None,
    tune: Tune = None,
    threads: Threads = None,
    prefill_chunk: PrefillChunk = None,
    flash_attention: FlashAttention = None,
    weights: WeightsFormat = None,
    max_step_ms: MaxStepMs = None,
    rkllm_library: RkllmLibrary = None,
    rkllm_abi: RkllmAbi = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Measure again first, preferably while no server runs.")
    ] = False,
    yes: Annotated[
        bool,
        typer.Option("--yes", help="Accept the measured choice even if existing caches no longer fit."),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
    npu_checks: Annotated[
        str | None,
        typer.Option(
            "--npu-checks",
            metavar="MODEL",
            help="Run the first checks of an NPU model and print a report to send.",
        ),
    ] = None,
) -> None:
    """Show how a server with these settings would run on this machine, and any problems.

    A server may be running. Nothing changes without --measure. Exits with status 1 if there are problems.
    """
    from headstart.cli.doctor import show, show_json
    from headstart.doctor.report import examine, measure_again

    flags = {
        "models": pairs(model or [], "NAME=PATH"),
        "cache_dir": cache_dir,
        "state_memory_mb": state_memory_mb,
        "state_disk_mb": state_disk_mb,
        "tune": tune,
        "threads": threads,
        "prefill_chunk": prefill_chunk,
        "flash_attention": flash_attention,
        "weights": weights,
        "max_step_ms": max_step_ms,
        "rkllm_library": rkllm_library,
        "rkllm_abi": rkllm_abi,
    }
    try:
        settings = load_settings(config, **flags)
        if npu_checks:
            _check_npu(npu_checks, settings)
            return
        if measure:
            measure_again(settings, lambda text: errors.print(text, markup=False), agree=yes)
        report = examine(settings, flags)
    except (StartupError, HeadstartError) as error:
        raise failed(error) from error
    (show_json if as_json else show)(report)
    if report.problems:
        raise typer.Exit(1)


def _check_npu(model: str, settings: Settings) -> None:
    from headstart.cli.doctor import show_json
    from headstart.doctor.npu_checks import check_npu

    checks = check_npu(model, settings, lambda text: errors.print(text, markup=False))
    show_json(checks)
    if checks.failed:
        raise typer.Exit(1)


@app.command()
def version() -> None:
    """Print the version."""
    _say(__version__)


@app.command()
def demo(model: Model = None, url: Url = DEFAULT_URL) -> None:
    """Run the guide's examples with and without a cache, and show where the time goes.

    Starts its own server if none is ready at the address.
    """
    from headstart.cli.client import RequestFailed
    from headstart.cli.demo import demo as run

    try:
        run(url, model)
    except RequestFailed as error:
        raise failed(error) from error
