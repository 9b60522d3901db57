"""`headstart model ...`: the models of a running server."""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from headstart.cli.options import DEFAULT_URL, AsJson, Url, server

model = typer.Typer(help="List, load and unload the models of a running server.", no_args_is_help=True)
out = Console(highlight=False, markup=False, soft_wrap=True)

Name = Annotated[str, typer.Argument(help="Name of the model.", show_default=False)]
STATES = {"available": "not loaded", "loading": "loading", "ready": "loaded", "failed": "can't run"}


@model.command("list")
def model_list(as_json: AsJson = False, url: Url = DEFAULT_URL) -> None:
    """List the models that a request can name."""
    with server(url) as client:
        answer = client.call("GET", "/v1/models/available", "list")
    if as_json:
        print(json.dumps(answer, indent=2))
        return
    table = Table(box=None, padding=(0, 2, 0, 0))
    for heading in ("Name", "State", "Context", "Slots"):
        table.add_column(heading, overflow="fold")
    for one in answer["data"]:
        sizes = (str(one[key]) if key in one else "" for key in ("n_ctx", "slots"))
        table.add_row(one["id"], STATES[one["state"]], *sizes)
    out.print(table, soft_wrap=False)


@model.command("load")
def model_load(name: Name, url: Url = DEFAULT_URL) -> None:
    """Load a model before it is used; returns when it is loaded."""
    _post(url, "load", name, {})
    out.print(f"Loaded {name}")


@model.command("unload")
def model_unload(
    name: Name,
    force: Annotated[
        bool, typer.Option("--force", help="Unload it even if it is in use; its requests fail.")
    ] = False,
    url: Url = DEFAULT_URL,
) -> None:
    """Free a model's memory; the next request loads it again."""
    was_loaded = _post(url, "unload", name, {"force": force})["unloaded"]
    out.print(f"Unloaded {name}" if was_loaded else f"{name} was not loaded")


def _post(url: str, action: str, name: str, more: dict[str, bool]) -> dict[str, object]:
    with server(url) as client:
        return client.call("POST", f"/v1/models/{action}", "model", {"model": name, **more})
