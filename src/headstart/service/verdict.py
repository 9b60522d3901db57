"""What was found out about a cache, and how it is told."""

from __future__ import annotations

from typing import Literal

from msgspec import Struct
from msgspec.structs import replace

from headstart.caches.entry import Entry, MissReason
from headstart.caches.scan import Stray

# Its states may be used; a hash or the length is wrong, or it can't be read at all; its states were computed
# by or for something else; the file is named after another cache or can't be opened.
State = Literal["ok", "damaged", "unfit", "stray"]
Action = Literal["rebuilt", "set_aside", "removed", "failed"]

UNFIT: frozenset[MissReason] = frozenset(
    {"model_changed", "engine_changed", "settings_changed", "template_changed"}
)


class Verdict(Struct, frozen=True):
    """`would_hit`: whether a request would start from its state; None where nobody can say, because its model
    isn't served. `detail`: in words what is wrong, or was done. `action`: what was done about it. `owner`:
    the API key whose cache it is; None: everyone's."""

    cache_name: str
    model: str
    state: State
    would_hit: bool | None = None
    miss_reason: MissReason | None = None
    detail: str = ""
    action: Action | None = None
    owner: str | None = None

    @property
    def is_wrong(self) -> bool:
        """Something is wrong with it, and still is."""
        return self.state != "ok" and self.action not in ("rebuilt", "removed")

    def of(self, shelf: str) -> Verdict:
        """The same, with the owner of what is on this shelf."""
        return replace(self, owner=shelf.partition("@")[2] or None)

    def after(self, action: Action, detail: str) -> Verdict:
        would_hit = True if action == "rebuilt" else self.would_hit
        return replace(self, action=action, detail=detail, would_hit=would_hit)


def judged(entry: Entry, miss: MissReason | None, detail: str = "") -> Verdict:
    """Of a cache whose model is known. One that can't hit for what it is, too short or given up, is ok."""
    state: State = "damaged" if miss == "corrupt" else "unfit" if miss in UNFIT else "ok"
    return Verdict(
        entry.name, entry.model, state, miss is None, miss, detail or (miss or "").replace("_", " ")
    )


def judged_stray(stray: Stray) -> Verdict:
    state: State = "damaged" if stray.damaged else "stray"
    return Verdict(stray.name, stray.model, state, would_hit=False, detail=stray.why)
