"""What a cache directory has to hold after a process that worked on it was killed."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

NAMES = ("one", "two", "three")


@dataclass
class Ledger:
    """`kept`: the version of each cache that was acknowledged last; `under_way`: what was begun and not
    acknowledged: the operation, the name, and the version there is once it was done. None: there is none."""

    kept: dict[str, int | None] = field(default_factory=lambda: dict.fromkeys(NAMES))
    under_way: tuple[str, str, int | None] | None = None
    counts: Counter[str] = field(default_factory=Counter)

    def begin(self, operation: str, name: str, version: int | None) -> None:
        self.under_way = (operation, name, version)

    def done(self) -> None:
        assert self.under_way
        operation, name, version = self.under_way
        self.kept[name] = version
        self.under_way = None
        self.counts[f"{operation} acknowledged"] += 1

    def refused(self) -> None:
        """The operation failed and said so: nothing may have changed."""
        assert self.under_way
        self.counts[f"{self.under_way[0]} refused"] += 1
        self.under_way = None

    def settle(self, found: dict[str, int | None]) -> None:
        """Holds what was found against what may be there, and goes on from it."""
        for name in NAMES:
            allowed = {self.kept[name]}
            if self.under_way and self.under_way[1] == name:
                allowed.add(self.under_way[2])
            assert found[name] in allowed, (name, found, self)
        if self.under_way:
            operation, name, version = self.under_way
            self.counts[f"killed in {operation}, {'done' if found[name] == version else 'not done'}"] += 1
        else:
            self.counts["killed between two"] += 1
        self.kept = dict(found)
        self.under_way = None

    def told(self) -> str:
        return ", ".join(f"{what}: {n}" for what, n in sorted(self.counts.items()))
