"""The documents name what is there, and use each term in one meaning."""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_args

import pytest
from fastapi import FastAPI

import headstart
from headstart.api.app import create_app
from headstart.caches.entry import Form, Origin
from headstart.config.settings import Settings
from headstart.protocol import Source
from headstart.service.caching.verify import VerdictState
from headstart.service.service import Service

ROOT = Path(headstart.__file__).parent
DOCS = ROOT.parents[1] / "docs"
# Pages that say where things are in the source.
GUIDES = [DOCS / "architecture.md", DOCS / "extending.md", DOCS.parent / "CONTRIBUTING.md"]
PAGES = sorted([*DOCS.glob("*.md"), DOCS.parent / "README.md"])
# Words of earlier releases for what has a standard term: a page that uses one leaves its readers guessing.
OLD_WORDS = ("shelf", "shelves", "trunk", "seat", "seats", "heal", "healed", "opening of a", "the opening")


def _folders() -> set[str]:
    paths = (path for path in ROOT.rglob("*") if path.is_dir() and list(path.glob("*.py")))
    return {f"{path.relative_to(ROOT)}/" for path in paths}


def test_the_table_of_folders_has_every_folder_and_no_other() -> None:
    text = (DOCS / "architecture.md").read_text()
    table = text[text.index("| Folder |") : text.index("\n\n", text.index("| Folder |"))]
    first = [row.split("|")[1] for row in table.splitlines()[2:]]
    assert {name for cell in first for name in re.findall(r"`([\w/]+/)`", cell)} == _folders()


@pytest.mark.parametrize("page", GUIDES, ids=lambda page: page.name)
def test_every_module_that_a_guide_names_is_there(page: Path) -> None:
    places = (ROOT, ROOT.parents[1], ROOT.parents[1] / "tests" / "service")
    named = set(re.findall(r"`([\w/.]+/[\w.]+\.py)`", page.read_text()))
    named = {name for name in named if "NAME" not in name}
    assert [name for name in sorted(named) if not any((place / name).is_file() for place in places)] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_pages_lead_to_headings_that_are_there(page: Path) -> None:
    for target, anchor in re.findall(r"\]\(([\w./-]*\.md)?(?:#([\w-]+))?\)", page.read_text()):
        other = (page.parent / target) if target else page
        assert other.is_file(), target
        if anchor:
            assert anchor in _anchors(other), f"{target}#{anchor}"


def _anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def _glossary() -> list[str]:
    return re.findall(r"^- \*\*(.*?)\*\*", (DOCS / "glossary.md").read_text(), flags=re.MULTILINE)


def test_the_glossary_has_each_term_once_in_order() -> None:
    terms = [term.lower() for term in _glossary()]
    assert terms == sorted(set(terms))


@pytest.mark.parametrize(
    "values", [Form, Origin, VerdictState, Source], ids=["form", "origin", "verdict", "source"]
)
def test_values_in_the_api_are_explained_in_the_glossary(values: object) -> None:
    text = (DOCS / "glossary.md").read_text()
    assert [value for value in get_args(values) if f"`{value}`" not in text] == []


def test_each_field_about_caches_is_named_by_terms_of_the_glossary(app: FastAPI) -> None:
    text = (DOCS / "glossary.md").read_text().lower()
    own = {name for schema in app.openapi()["components"]["schemas"].values() for name in _own(schema)}
    assert len(own) > 10
    words = {word.rstrip("s") for name in own for word in name.split("_")}
    assert [word for word in sorted(words) if not re.search(rf"(?<![a-z]){word}", text)] == []


def _own(schema: dict[str, object]) -> list[str]:
    """Fields that only this server has; the others are OpenAI's and Anthropic's."""
    properties = schema.get("properties", {})
    assert isinstance(properties, dict)
    found = [name for name in properties if re.search(r"cache|prefill|evict|restore|hit", name)]
    return [name for name in found if not re.search(r"cache_(creation|read|control)", name)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_page_uses_a_word_that_a_standard_term_replaced(page: Path) -> None:
    text = page.read_text().lower()
    assert [word for word in OLD_WORDS if re.search(rf"\b{word}\b", text)] == []


def test_no_description_in_the_api_uses_such_a_word(app: FastAPI) -> None:
    text = str(app.openapi()).lower()
    assert [word for word in OLD_WORDS if re.search(rf"\b{word}\b", text)] == []


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> FastAPI:
    directory = tmp_path_factory.mktemp("docs")
    return create_app(Service(Settings(models={"toy": "toy:"}, cache_dir=directory, tune=False)))
