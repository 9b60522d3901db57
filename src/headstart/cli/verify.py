"""`headstart cache verify`: whether every cache is whole and would hit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from headstart.config import load_settings
from headstart.errors import HeadstartError, StartupError

if TYPE_CHECKING:
    from headstart.cli.client import Client

Json = dict[str, Any]

out = Console(highlight=False, markup=False, soft_wrap=True)
errors = Console(stderr=True, highlight=False, soft_wrap=True)

DONE = {"rebuilt": "repaired", "removed": "removed", "set_aside": "set aside", "failed": "not repaired"}


def install(cache: typer.Typer, default_url: str) -> None:
    """Adds the command to `headstart cache`."""

    @cache.command("verify")
    def verify(
        name: Annotated[
            str | None, typer.Argument(help="Only caches of this name.", show_default=False)
        ] = None,
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
        url: Annotated[
            str, typer.Option("--url", envvar="HEADSTART_URL", help="Address of the server.")
        ] = default_url,
    ) -> None:
        """Check every byte of the caches, and whether they would hit.

        Asks the server; where there is none, looks at the cache directory itself, changing nothing. Ends with
        status 1 if something is wrong that was not repaired.
        """
        from headstart.cli.client import Client, RequestFailed

        if remove_unreadable and not repair:
            raise typer.BadParameter("it says what --repair does", param_hint="--remove-unreadable")
        try:
            with Client(url) as client:
                if cache_dir is None and client.is_there():
                    wrong = _ask(client, name, model, repair, remove_unreadable)
                elif repair:
                    raise RequestFailed(
                        f"--repair needs a running server, and there is none at {client.url}."
                    )
                else:
                    wrong = _look(name, model, cache_dir, config)
        except (RequestFailed, HeadstartError, StartupError) as error:
            errors.print(f"[red]headstart:[/red] {escape(str(error))}")
            raise typer.Exit(1) from error
        if wrong:
            raise typer.Exit(1)


def _ask(client: Client, name: str | None, model: str | None, repair: bool, remove: bool) -> bool:
    body: Json = {"repair": repair, "remove_unreadable": remove, "cache_name": name, "model": model}
    verdicts: list[Json] = []
    wrong = 0
    for event in client.events("/v1/verify", body):
        if event["object"] == "cache.verdict":
            verdicts.append(event)
            _tell(event)
        else:
            wrong = event["wrong"]
    _sum_up(verdicts, f"the server at {client.url}")
    return bool(wrong)


def _look(name: str | None, model: str | None, cache_dir: Path | None, config: Path | None) -> bool:
    import msgspec

    from headstart.service.inspection import inspect
    from headstart.service.verifying import Wish

    settings = load_settings(config, cache_dir=cache_dir)
    if not settings.cache_dir.is_dir():
        raise StartupError(f"There is no server, and no cache directory {settings.cache_dir} either.")
    verdicts: list[Json] = []
    wrong = False
    for verdict in inspect(settings, Wish(model, name)):
        wrong = wrong or verdict.is_wrong
        verdicts.append(msgspec.structs.asdict(verdict))
        _tell(verdicts[-1])
    _sum_up(verdicts, f"the directory {settings.cache_dir}, without a server")
    return wrong


def _tell(verdict: Json) -> None:
    done = f", {DONE[verdict['action']]}" if verdict["action"] else ""
    detail = f" ({verdict['detail']})" if verdict["detail"] else ""
    out.print(f"{verdict['cache_name']} of {verdict['model']}: {verdict['state']}{done}{detail}")


def _sum_up(verdicts: Iterable[Json], where: str) -> None:
    states = Counter(verdict["state"] for verdict in verdicts)
    actions = Counter(DONE[verdict["action"]] for verdict in verdicts if verdict["action"])
    told = [f"{n} {what}" for what, n in [*states.items(), *actions.items()]]
    out.print(f"Verified {sum(states.values())} caches in {where}" + (": " + ", ".join(told) if told else ""))
