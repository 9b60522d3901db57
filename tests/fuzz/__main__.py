"""`make fuzz`: attacks until the time is over, and keeps what did harm."""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, Verbosity, given, seed, settings

from fuzz.keeping import KINDS, keep
from fuzz.victim import Victim, victim

Json = dict[str, Any]

# So many attacks are made on one server, which is then asked whether it is well.
ATTACKS = 20
MOST_FOUND = 5


class Hunt:
    """Attacks of one kind, on a server of its own that is started anew when one did harm."""

    def __init__(self, kind: str, folder: Path, until: float) -> None:
        self.kind = kind
        self.folder = folder
        self.until = until
        self.n_attacks = 0
        self.last: Json = {}

    def run(self, number: int) -> Json | None:
        """Some attacks, drawn by `number`; the smallest that did harm. What it did is said."""
        folder = Path(tempfile.mkdtemp(dir=self.folder))
        with victim(folder) as target:

            @seed(number)
            @settings(
                max_examples=ATTACKS,
                deadline=None,
                database=None,
                verbosity=Verbosity.quiet,
                phases=[Phase.generate, Phase.shrink],
                suppress_health_check=list(HealthCheck),
            )
            @given(recipe=KINDS[self.kind].recipes())
            def attacks(recipe: Json) -> None:
                if time.monotonic() < self.until:
                    self._attack(target, recipe)

            try:
                attacks()
            except Exception as error:
                print(f"{self.kind}: {error}", flush=True)
                return self.last
        return None

    def _attack(self, target: Victim, recipe: Json) -> None:
        self.n_attacks += 1
        try:
            KINDS[self.kind].attack(target, recipe)
            target.check()
        except Exception:
            self.last = recipe
            if target.server.process.poll() is not None:
                # Nothing can be made smaller on a server that has ended.
                self.until = 0
            raise


def hunt(kind: str, folder: Path, seconds: float, number: int) -> int:
    """How many attacks did harm."""
    until = time.monotonic() + seconds
    n_found = n_attacks = 0
    while time.monotonic() < until and n_found < MOST_FOUND:
        attempt = Hunt(kind, folder, until)
        if found := attempt.run(number):
            n_found += 1
            print(f"kept as {keep(found)}", flush=True)
        n_attacks += attempt.n_attacks
        number += 1
    print(f"{kind}: {n_attacks} attacks, {n_found} did harm", flush=True)
    return n_found


def main() -> int:
    parser = argparse.ArgumentParser(prog="make fuzz", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--only", choices=sorted(KINDS), action="append", help="may be repeated")
    parser.add_argument("--seed", type=int, default=None, help="attacks with the same one are the same")
    given = parser.parse_args()
    os.environ["HEADSTART_TUNE"] = "false"
    number = random.randrange(1 << 32) if given.seed is None else given.seed
    print(f"The seed is {number}.", flush=True)
    kinds = given.only or sorted(KINDS)
    with tempfile.TemporaryDirectory() as folder:
        seconds = given.minutes * 60 / len(kinds)
        return 1 if sum([hunt(kind, Path(folder), seconds, number) for kind in kinds]) else 0


if __name__ == "__main__":
    sys.exit(main())
