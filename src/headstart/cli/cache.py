"""`headstart cache`: the named caches of a running server, and how they are shown."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from time import monotonic
from urllib.parse import urlencode

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from headstart.cli.client import Client, Json, RequestFailed, cache_path
from headstart.config.settings import load_settings

out = Console(highlight=False, markup=False, soft_wrap=True)
notes = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)


def create(
    client: Client,
    name: str,
    prompt: str,
    model: str | None,
    forms: Sequence[str],
    overwrite: bool,
    retention: Json | None = None,
) -> None:
    body: Json = {"cache_name": name, "prompt": prompt, "allow_overwrite": overwrite, **(retention or {})}
    if forms:
        body["for"] = list(forms)
    started = monotonic()
    made = follow(client.events(cache_path(chosen_model(client, model)), body), notes)
    size = f"{size_of(made)}, {monotonic() - started:.1f} s"
    out.print(f"{verb_of(made)} cache {made['cache_name']!r} of {made['model']}: {size}")
    if warning := made.get("warning"):
        notes.print(f"Note: {warning}", style="yellow")


def verb_of(made: Json) -> str:
    return "Created" if made["object"] == "cache.created" else "Updated"


def size_of(made: Json) -> str:
    return f"{made['tokens']:,} tokens, {made['size_mb']} MB"


def edit(client: Client, name: str, model: str | None, retention: Json) -> None:
    client.call("PATCH", cache_path(chosen_model(client, model), name), "cache", retention)
    out.print(f"Changed {', '.join(retention)} of cache {name!r}")


def follow(events: Iterable[Json], console: Console) -> Json:
    """The last of a creation's events; on a terminal, a bar shows those before. Raises RequestFailed."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("tokens"),
        TimeRemainingColumn(compact=True),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("Computing", total=None)
        for event in events:
            if event["object"] != "cache.progress":
                return event
            bar.update(task, completed=event["computed"], total=event["total"])
    raise RequestFailed("The server ended the creation without a result.")


def show_all(client: Client, model: str | None, as_json: bool) -> None:
    answer = client.call("GET", "/v1/cache" if model is None else cache_path(model), "list")
    if as_json:
        _print_json(answer)
    elif answer["data"]:
        out.print(_table(answer["data"]), soft_wrap=False)
    else:
        out.print("There are no caches yet. Make one: headstart cache create NAME --prompt TEXT")


def show(client: Client, name: str, model: str | None, as_json: bool) -> None:
    cache = client.call("GET", cache_path(chosen_model(client, model), name), "cache")
    if as_json:
        _print_json(cache)
        return
    fields = Table.grid(padding=(0, 2))
    fields.add_column(style="bold")
    fields.add_column(overflow="fold")
    for label, value in _fields(cache).items():
        fields.add_row(label, Text(value))
    out.print(fields, soft_wrap=False)
    out.print(f"\n{_content(cache)}")


def delete(client: Client, name: str, model: str | None) -> None:
    deleted = client.call("DELETE", cache_path(chosen_model(client, model), name), "cache.deleted")
    out.print(f"Deleted cache {deleted['cache_name']!r} of {deleted['model']}")


def clear(client: Client, model: str | None) -> None:
    """Has the server empty the state store."""
    query = "" if model is None else f"?{urlencode({'model': model})}"
    cleared = client.call("DELETE", f"/v1/cache{query}", "cache.cleared")
    out.print(f"Emptied the state store of {cleared['model'] or 'all models'} at {client.url}")


def clear_directory(model: str | None, cache_dir: Path | None, config: Path | None) -> None:
    """Empties it without a server. Raises StartupError or StorageError."""
    from headstart.doctor.offline_states import clear_states

    settings = load_settings(config, cache_dir=cache_dir)
    freed = clear_states(settings, model)
    out.print(f"Emptied the state store in {settings.cache_dir}, without a server: {freed / 1e6:,.1f} MB")


def chosen_model(client: Client, name: str | None) -> str:
    return name if name is not None else str(client.model()["id"])


def _table(caches: list[Json]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0))
    for heading in ("Name", "Model"):
        table.add_column(heading, overflow="fold")
    for heading in ("Tokens", "MB", "Hits"):
        table.add_column(heading, justify="right", no_wrap=True)
    for heading in ("Last used", "Updated"):
        table.add_column(heading, no_wrap=True)
    for cache in caches:
        table.add_row(
            cache["cache_name"] + (" (unverified)" if cache.get("unverified") else ""),
            cache["model"],
            f"{cache['tokens']:,}",
            f"{cache['size_mb']:,}",
            _untold(cache) or f"{cache['hits']:,}",
            _untold(cache) or age(cache["last_used"]),
            age(cache["updated"]),
        )
    return table


def _fields(cache: Json) -> dict[str, str]:
    forms = (
        f"{form}: {part['tokens']:,} tokens, {part['size_mb']} MB" for form, part in cache["forms"].items()
    )
    return {
        "Name": cache["cache_name"],
        "Model": cache["model"],
        "Version": str(cache["version"]),
        "Tokens": f"{cache['tokens']:,}",
        "Size": f"{cache['size_mb']} MB",
        "For": "\n".join(forms) or "neither chat nor completion: the prompt is too short",
        "Created": _local(cache["created"]),
        "Updated": _local(cache["updated"]),
        "Build time": f"{cache['build_ms'] / 1000:.2f} s",
        "Hits": _untold(cache) or f"{cache['hits']:,}",
        "Last used": _untold(cache) or _local(cache["last_used"]),
        "Saved": _untold(cache) or f"{cache['tokens_saved']:,} tokens, {cache['seconds_saved']:,.1f} s",
        **_retention(cache),
        "Would hit": _prospect(cache),
    }


def _untold(cache: Json) -> str:
    """The placeholder for usage figures that the server hides from this API key; "" if it shows them."""
    return "?" if cache["hits"] is None else ""


def _retention(cache: Json) -> dict[str, str]:
    """The retention fields that differ from their defaults."""
    fields = {
        "Unverified": "its file can't be read: this is from the copy of its header"
        if cache.get("unverified")
        else "",
        "Evicted": ", ".join(cache["evicted"]),
        "Expires": _local(cache["expires"]) if cache["expires"] else "",
        "Pinned": "yes" if cache["pinned"] else "",
        "Description": cache["description"],
        "Metadata": "\n".join(f"{key}={value}" for key, value in cache["metadata"].items()),
    }
    return {label: value for label, value in fields.items() if value}


def _prospect(cache: Json) -> str:
    if cache.get("would_hit") is None:
        return "unknown until its model has loaded"
    return "yes" if cache["would_hit"] else f"no: {cache['miss_reason']}"


def _content(cache: Json) -> str:
    """The prompt; or the tools, then the messages, each under its role."""
    if "prompt" in cache:
        return str(cache["prompt"])
    tools = [f"[tool]\n{json.dumps(tool, ensure_ascii=False)}" for tool in cache["tools"]]
    return "\n\n".join([*tools, *(f"[{m['role']}]\n{_said(m)}" for m in cache["messages"])])


def _said(message: Json) -> str:
    calls = [json.dumps(call, ensure_ascii=False) for call in message.get("tool_calls", [])]
    return "\n".join([*filter(None, [message["content"]]), *calls])


def age(time: str | None) -> str:
    """How long ago an ISO time was, in the largest whole unit."""
    if time is None:
        return "never"
    seconds = (datetime.now(UTC) - datetime.fromisoformat(time)).total_seconds()
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds // length:.0f} {unit} ago"
    return "just now"


def _local(time: str | None) -> str:
    return "never" if time is None else f"{datetime.fromisoformat(time).astimezone():%Y-%m-%d %H:%M:%S}"


def _print_json(answer: Json) -> None:
    print(json.dumps(answer, indent=2))
