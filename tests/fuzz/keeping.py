"""The attacks that are kept: those known from the beginning, and what was found since, one recipe a file."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

from fuzz import bodies, framing, headers, models

Json = dict[str, Any]

KINDS: dict[str, ModuleType] = {"headers": headers, "models": models, "bodies": bodies, "framing": framing}
FOLDER = Path(__file__).parent / "seeds"


def kept(kind: str) -> list[Json]:
    found = [json.loads(path.read_text()) for path in sorted(FOLDER.glob("*.json"))]
    known: list[Json] = KINDS[kind].KNOWN
    return known + [recipe for recipe in found if recipe["kind"] == kind]


def keep(recipe: Json) -> Path:
    """Writes the recipe down; where."""
    text = json.dumps(recipe, ensure_ascii=True)
    path = FOLDER / f"{recipe['kind']}-{hashlib.sha256(text.encode()).hexdigest()[:12]}.json"
    path.write_text(text + "\n")
    return path
