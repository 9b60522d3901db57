"""Attacks that did harm once do none any more: what `make fuzz` has kept is tried again."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from fuzz import hostile, wire
from fuzz.keeping import FOLDER, KINDS, kept
from fuzz.victim import Victim, victim

Json = dict[str, Any]


class Targets:
    """Victims one after the other: another one where an attack did harm, so that the next is not blamed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.stack = ExitStack()
        self.current: Victim | None = None

    def get(self) -> Victim:
        if self.current is None:
            folder = Path(tempfile.mkdtemp(dir=self.folder))
            self.current = self.stack.enter_context(victim(folder))
        return self.current

    def attack(self, recipe: Json) -> None:
        target = self.get()
        self.current = None
        KINDS[recipe["kind"]].attack(target, recipe)
        target.check()
        self.current = target


@pytest.fixture(scope="module")
def targets(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Targets]:
    found = Targets(tmp_path_factory.mktemp("fuzz"))
    with found.stack:
        yield found


SEEDS = [recipe for kind in KINDS for recipe in kept(kind)]


@pytest.mark.slow
@pytest.mark.parametrize("recipe", SEEDS, ids=lambda recipe: json.dumps(recipe)[:120])
def test_an_attack_that_is_kept_does_no_harm(targets: Targets, recipe: Json) -> None:
    targets.attack(recipe)


def test_what_is_kept_is_of_a_kind_that_is_tried() -> None:
    for path in FOLDER.glob("*.json"):
        assert json.loads(path.read_text())["kind"] in KINDS
    assert len(SEEDS) > 100


def test_recipes_stand_for_what_they_say() -> None:
    assert wire.text({"$raw": [["[", 3], ["]", 3]]}) == "[[[]]]"
    assert json.loads(wire.text({"a": {"$repeated": ["ab", 2]}})) == {"a": "abab"}
    assert json.loads(wire.text([{"$listed": [{"$wide": 1}, 2]}])) == [[{"k0": 0}] * 2]
    assert wire.replaced({"a": [1, {"b": 2}]}, ["a", 1, "b"], 3) == {"a": [1, {"b": 3}]}
    assert [value for value in hostile.LARGE if len(wire.text(value)) < 500] == []
