"""`headstart cache verify`: whether every cache is whole and would hit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.console import Console

from headstart.cli.client import Client
from headstart.config.settings import load_settings
from headstart.errors import StartupError

Json = dict[str, Any]

out = Console(highlight=False, markup=False, soft_wrap=True)

DONE = {"rebuilt": "repaired", "removed": "removed", "set_aside": "set aside", "failed": "not repaired"}


def ask(client: Client, name: str | None, model: str | None, repair: bool, remove: bool) -> bool:
    """Lets the server verify; returns whether a fault remains. Raises RequestFailed."""
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


def look(name: str | None, model: str | None, cache_dir: Path | None, config: Path | None) -> bool:
    """Verifies without a server; returns whether there is a fault. Raises CacheNotFound or StartupError."""
    import msgspec

    from headstart.doctor.offline_verify import inspect
    from headstart.service.caching.verify import VerifyScope

    settings = load_settings(config, cache_dir=cache_dir)
    if not settings.cache_dir.is_dir():
        raise StartupError(f"There is neither a server nor a cache directory {settings.cache_dir}.")
    verdicts: list[Json] = []
    wrong = False
    for verdict in inspect(settings, VerifyScope(model, name)):
        wrong = wrong or verdict.is_wrong
        verdicts.append(msgspec.structs.asdict(verdict))
        _tell(verdicts[-1])
    _sum_up(verdicts, f"the directory {settings.cache_dir}, without a server")
    return wrong


def _tell(verdict: Json) -> None:
    done = f", {DONE[verdict['action']]}" if verdict["action"] else ""
    detail = f" ({verdict['detail']})" if verdict["detail"] else ""
    whose = f" ({verdict['owner']}'s)" if verdict.get("owner") else ""
    out.print(f"{verdict['cache_name']} of {verdict['model']}{whose}: {verdict['state']}{done}{detail}")


def _sum_up(verdicts: Iterable[Json], where: str) -> None:
    states = Counter(verdict["state"] for verdict in verdicts)
    actions = Counter(DONE[verdict["action"]] for verdict in verdicts if verdict["action"])
    counts = [f"{n} {what}" for what, n in [*states.items(), *actions.items()]]
    out.print(
        f"Verified {sum(states.values())} caches in {where}" + (": " + ", ".join(counts) if counts else "")
    )
