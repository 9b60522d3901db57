"""The index, whatever `index.sqlite` is and whoever has it locked: no start and no request ends by it."""

from __future__ import annotations

import os
import random
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from cache_keys import cache_key
from conftest import StartServer
from headstart.caches.cache_file import format
from headstart.caches.entry import Entry
from headstart.caches.index.index import Index
from headstart.caches.index.records import Records
from headstart.caches.index.usage import USAGE, CacheUsage
from headstart.caches.store import Store
from servers import RunningServer, eventually, said
from small_caches import put_small

PROMPT = "You keep the lighthouse. " + "Each evening you light the lamp. " * 12
SECRET = "The secret word is xylophone-4711. "
# As the last release made it.
LAST_RELEASE = """
CREATE TABLE IF NOT EXISTS entries (
    shelf TEXT NOT NULL, name TEXT NOT NULL, entry BLOB NOT NULL,
    hits INTEGER NOT NULL DEFAULT 0, last_used REAL,
    tokens_saved INTEGER NOT NULL DEFAULT 0, seconds_saved REAL NOT NULL DEFAULT 0,
    PRIMARY KEY (shelf, name)
);
CREATE TABLE IF NOT EXISTS weights (path TEXT PRIMARY KEY, identity TEXT NOT NULL, sha256 TEXT NOT NULL);
"""


def _database(path: Path, script: str) -> None:
    with closing(sqlite3.connect(path)) as database:
        database.executescript(script)


def _sql(script: str) -> Callable[[Path], None]:
    return lambda path: _database(path, script)


def _replaced(script: str) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        path.unlink()
        _database(path, script)

    return make


def _linked(path: Path) -> None:
    path.rename(path.parent.parent / "elsewhere")
    path.symlink_to(path.parent.parent / "elsewhere")


def _random(path: Path) -> None:
    path.write_bytes(random.Random(8).randbytes(9000))


def _other_than_a_file(make: Callable[[Path], None], side: str = "") -> Callable[[Path], None]:
    def do(path: Path) -> None:
        place = Path(f"{path}{side}")
        place.unlink(missing_ok=True)
        make(place)

    return do


ENDLESS = (
    "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT 'usage' AS kind, i AS key, i AS "
)
ENDLESS += "value, i AS blake3 FROM n"
SHAPES: dict[str, Callable[[Path], None]] = {
    "a directory": _other_than_a_file(Path.mkdir),
    "a pipe": _other_than_a_file(os.mkfifo),
    "a pipe for a log": _other_than_a_file(os.mkfifo, "-wal"),
    "a pipe for a journal": _other_than_a_file(os.mkfifo, "-journal"),
    "a directory for a log": _other_than_a_file(Path.mkdir, "-wal"),
    "a link": _linked,
    "empty": lambda path: os.truncate(path, 0),
    "random bytes": _random,
    "cut": lambda path: os.truncate(path, 5000),
    "an empty database": _replaced("VACUUM"),
    "somebody else's database": _replaced("CREATE TABLE mine (x); INSERT INTO mine VALUES (1)"),
    "without a column": _sql("ALTER TABLE records DROP COLUMN blake3"),
    "with one more column": _sql("ALTER TABLE records ADD COLUMN more"),
    "with other types": _replaced("CREATE TABLE records (kind REAL, key BLOB, value TEXT, blake3 INTEGER)"),
    "with a trigger": _sql("CREATE TRIGGER t AFTER INSERT ON records BEGIN DELETE FROM records; END"),
    "with an endless view": _sql(f"DROP TABLE records; CREATE VIEW records AS {ENDLESS}"),
    "an old one with an endless view": _replaced(
        f"CREATE VIEW entries AS {ENDLESS}; CREATE TABLE weights (x)"
    ),
    "an old one without a column": _replaced(LAST_RELEASE + "ALTER TABLE entries DROP COLUMN hits"),
    "an old one with other types": _replaced("CREATE TABLE entries (shelf BLOB, name REAL, entry INTEGER)"),
    "text where numbers belong": _sql("UPDATE records SET value = 'x', blake3 = 7, kind = 1.5"),
}


async def _kept(directory: Path) -> Entry:
    """One cache that was used once, and the index that tells it."""
    store = Store(directory)
    entry = await put_small(store, "keeper", PROMPT)
    store.used(entry, 3)
    store.close()
    return entry


@pytest.mark.parametrize("shape", SHAPES)
async def test_whatever_the_index_is_caches_are_there_and_use_is_counted(
    tmp_path: Path, shape: str, caplog: pytest.LogCaptureFixture
) -> None:
    directory = tmp_path / "cache"
    entry = await _kept(directory)
    SHAPES[shape](directory / "index.sqlite")
    for _ in range(2):
        store = Store(directory)
        assert store.entries() == [entry]
        before = store.usage(entry).hits
        store.used(entry, 3)
        assert store.usage(entry).hits == before + 1
        store.close()
    if shape == "somebody else's database":
        with closing(sqlite3.connect(directory / "index.sqlite")) as database:
            assert database.execute("SELECT * FROM mine").fetchall() == [(1,)]


@pytest.mark.parametrize("shape", ["a pipe", "a pipe for a journal", "without a column", "random bytes"])
def test_a_server_starts_and_serves_whatever_the_index_is(start_server: StartServer, shape: str) -> None:
    server = start_server("--model", "toy=toy:")
    server.create("keeper", PROMPT)
    expected = said(server.chat("Who?", use_cache="keeper"))
    server.stop()
    SHAPES[shape](server.cache_dir / "index.sqlite")
    server.start()
    answer = server.chat("Who?", use_cache="keeper")
    assert (said(answer), answer["usage"]["cache_hit"]) == (expected, True)
    assert "Traceback" not in server.log.read_text()


HOLD = """
import sqlite3, sys
database = sqlite3.connect(sys.argv[1], isolation_level=None)
database.execute(f"PRAGMA locking_mode = {sys.argv[2]}")
database.execute("BEGIN EXCLUSIVE")
print("locked", flush=True)
sys.stdin.read()
"""


@contextmanager
def _locked(directory: Path, mode: str) -> Iterator[None]:
    """By another process: `normal`, so that nobody else can write, or `exclusive`, nor read."""
    command = [sys.executable, "-c", HOLD, str(directory / "index.sqlite"), mode]
    holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert holder.stdin
    assert holder.stdout
    try:
        assert holder.stdout.readline() == "locked\n"
        yield
    finally:
        holder.stdin.close()
        holder.stdout.close()
        holder.wait()


def _hits(server: RunningServer) -> int:
    hits: int = server.http.get("/v1/cache/toy/keeper").json()["hits"]
    return hits


def test_hits_under_a_lock_are_counted_and_remembered_once_it_is_gone(start_server: StartServer) -> None:
    server = start_server("--model", "toy=toy:")
    server.create("keeper", PROMPT)
    server.chat("Who?", use_cache="keeper")
    eventually(lambda: _hits(server) == 1)
    with _locked(server.cache_dir, "normal"):
        for _ in range(5):
            assert server.chat("Who?", use_cache="keeper")["usage"]["cache_hit"] is True
        eventually(lambda: _hits(server) == 6)
        eventually(lambda: "usage is not remembered" in server.log.read_text())
        server.create("another", PROMPT + "And more.")
        assert server.http.delete("/v1/cache/toy/another").status_code == 200
    assert server.log.read_text().count("usage is not remembered") == 1
    server.chat("Who?", use_cache="keeper")
    eventually(lambda: _hits(server) == 7)
    server.restart()
    assert _hits(server) == 7


@pytest.mark.parametrize("mode", ["normal", "exclusive"])
def test_a_start_goes_on_beside_a_lock_and_remembers_once_it_is_gone(
    start_server: StartServer, mode: str
) -> None:
    server = start_server("--model", "toy=toy:")
    server.create("keeper", PROMPT)
    server.chat("Who?", use_cache="keeper")
    eventually(lambda: _hits(server) == 1)
    server.stop()
    with _locked(server.cache_dir, mode):
        server.start()
        assert server.chat("Who?", use_cache="keeper")["usage"]["cache_hit"] is True
        eventually(lambda: _hits(server) == (1 if mode == "exclusive" else 2))
        eventually(lambda: "usage is not remembered" in server.log.read_text())
    server.chat("Who?", use_cache="keeper")
    eventually(lambda: _hits(server) == 3)
    server.restart()
    assert _hits(server) == 3
    assert "Traceback" not in server.log.read_text()


def _where(directory: Path, text: str) -> list[str]:
    """The files that hold the text, as it is or as JSON has it."""
    return [
        str(path.relative_to(directory))
        for path in directory.rglob("*")
        if path.is_file() and text.strip().encode() in path.read_bytes()
    ]


def test_a_deleted_prompt_is_nowhere_on_the_disk_once_it_was_deleted(start_server: StartServer) -> None:
    server = start_server("--model", "toy=toy:")
    for i in range(5):
        server.create(f"other{i}", f"{i} {PROMPT}")
    server.create("secret", SECRET * 30)
    server.chat("Which?", use_cache="secret")
    assert _where(server.cache_dir, SECRET)
    assert server.http.delete("/v1/cache/toy/secret").status_code == 200
    assert _where(server.cache_dir, SECRET) == []
    server.create("replaced", SECRET * 30)
    server.create("replaced", PROMPT)
    assert _where(server.cache_dir, SECRET) == []
    answer = server.post("/v1/responses", model="toy", input=SECRET, max_output_tokens=4).json()
    eventually(lambda: _where(server.cache_dir, SECRET) != [])
    assert server.http.delete(f"/v1/responses/{answer['id']}").status_code == 200
    assert _where(server.cache_dir, SECRET) == []


def test_names_of_deleted_caches_are_wiped_from_the_index(start_server: StartServer) -> None:
    server = start_server("--model", "toy=toy:")
    names = [f"cache-{i}-of-many" for i in range(60)]
    for name in names:
        server.create(name, f"{name} {PROMPT}")
        server.chat("Who?", use_cache=name, max_tokens=1)
    eventually(lambda: _where(server.cache_dir, names[59]) != [])
    for name in names:
        assert server.http.delete(f"/v1/cache/toy/{name}").status_code == 200
    eventually(lambda: not any(_where(server.cache_dir, name) for name in names))


def test_what_a_reader_kept_in_the_log_is_wiped_later(tmp_path: Path) -> None:
    index = Index(tmp_path / "index.sqlite")
    index.used(cache_key("toy", "xylophone"), 1.0, 1, 1.0)
    index.flush()
    with closing(sqlite3.connect(tmp_path / "index.sqlite", isolation_level=None)) as reader:
        reader.execute("BEGIN")
        reader.execute("SELECT * FROM records").fetchall()
        index.delete(cache_key("toy", "xylophone"))
        index.flush()
        assert _where(tmp_path, "xylophone")
    index.save()
    eventually(lambda: _where(tmp_path, "xylophone") == [])
    index.close()
    # As a request may that ends later.
    index.used(cache_key("toy", "xylophone"), 1.0, 1, 1.0)


def _old_index(directory: Path, changed: Mapping[str, Any] | None = None) -> None:
    """The index of a stopped server as the last release would have left it, each cache used three times."""
    for index in directory.glob("index.sqlite*"):
        index.unlink()
    entries = [format.read(path) for path in directory.glob("*/*.headstart")]
    with closing(sqlite3.connect(directory / "index.sqlite", isolation_level=None)) as database:
        database.execute("PRAGMA journal_mode = WAL")
        database.execute("PRAGMA secure_delete = OFF")
        database.executescript(LAST_RELEASE)
        for entry in entries:
            row = {"hits": 3, "last_used": 1.7e9, "tokens_saved": 30, "seconds_saved": 0.5, **(changed or {})}
            values = (entry.namespace, entry.name, msgspec.json.encode(entry), *row.values())
            database.execute("INSERT INTO entries VALUES (?, ?, ?, ?, ?, ?, ?)", values)
        database.execute(
            "INSERT INTO entries (shelf, name, entry) VALUES ('toy', 'gone', ?)", (SECRET * 300,)
        )
        database.execute("DELETE FROM entries WHERE name = 'gone'")
        database.execute("INSERT INTO weights VALUES ('/model', '[1, 2, 3, 4]', 'f')")


def test_the_last_releases_index_is_taken_over_and_what_it_did_not_overwrite_is_wiped(
    start_server: StartServer,
) -> None:
    server = start_server("--model", "toy=toy:")
    server.create("keeper", PROMPT)
    server.stop()
    _old_index(server.cache_dir)
    assert _where(server.cache_dir, SECRET)
    server.start()
    shown = server.http.get("/v1/cache/toy/keeper").json()
    assert (shown["hits"], shown["tokens_saved"], shown["seconds_saved"]) == (3, 30, 0.5)
    assert (shown["unverified"], shown["would_hit"]) == (False, True)
    assert _where(server.cache_dir, SECRET) == []
    server.restart()
    assert _hits(server) == 3


def test_an_index_without_what_hits_saved_is_taken_over(start_server: StartServer) -> None:
    server = start_server("--model", "toy=toy:")
    server.create("keeper", PROMPT)
    server.stop()
    _old_index(server.cache_dir)
    drop = "ALTER TABLE entries DROP COLUMN tokens_saved; ALTER TABLE entries DROP COLUMN seconds_saved"
    _database(server.cache_dir / "index.sqlite", drop)
    server.start()
    shown = server.http.get("/v1/cache/toy/keeper").json()
    assert (shown["hits"], shown["tokens_saved"]) == (3, 0)


def test_the_last_releases_index_still_saves_a_prompt_whose_file_can_not_be_read(
    start_server: StartServer,
) -> None:
    server = start_server("--model", "toy=toy:")
    server.create("keeper", PROMPT)
    expected = said(server.chat("Who?", use_cache="keeper"))
    server.stop()
    _old_index(server.cache_dir)
    for copy in server.cache_dir.glob(".headers/*/*"):
        copy.unlink()
    (server.cache_dir / "toy" / "keeper.headstart").write_bytes(b"rubbish")
    server.start()
    shown = server.http.get("/v1/cache/toy/keeper").json()
    assert (shown["prompt"], shown["unverified"], shown["would_hit"]) == (PROMPT, True, False)
    assert "from an earlier release's index" in server.log.read_text()
    assert said(server.chat("Who?", use_cache="keeper")) == expected
    assert server.chat("Who?", use_cache="keeper")["usage"]["cache_hit"] is True
    assert server.http.get("/v1/cache/toy/keeper").json()["unverified"] is False


WRONG = [
    {"hits": "many"},
    {"hits": -1},
    {"hits": 1.5},
    {"hits": None},
    {"hits": 2**62},
    {"last_used": "yesterday"},
    {"last_used": 1e308},
    {"last_used": b"\xff"},
    {"tokens_saved": -5},
    {"tokens_saved": b"7"},
    {"seconds_saved": float("inf")},
    {"seconds_saved": -0.1},
    {"seconds_saved": 1e308},
    {"seconds_saved": True, "hits": "3"},
]


@pytest.mark.parametrize("wrong", WRONG, ids=str)
async def test_figures_that_are_none_are_not_taken_over(tmp_path: Path, wrong: dict[str, Any]) -> None:
    directory = tmp_path / "cache"
    entry = await _kept(directory)
    # Columns without a type hold whatever they are given.
    _old_index(directory)
    loose = LAST_RELEASE.replace("INTEGER NOT NULL DEFAULT 0", "").replace("REAL NOT NULL DEFAULT 0", "")
    for index in directory.glob("index.sqlite*"):
        index.unlink()
    with closing(sqlite3.connect(directory / "index.sqlite", isolation_level=None)) as database:
        database.executescript(loose.replace("last_used REAL", "last_used"))
        row = {"hits": 3, "last_used": 1.7e9, "tokens_saved": 30, "seconds_saved": 0.5, **wrong}
        values = (entry.namespace, entry.name, msgspec.json.encode(entry), *row.values())
        database.execute("INSERT INTO entries VALUES (?, ?, ?, ?, ?, ?, ?)", values)
    store = Store(directory)
    assert store.usage(entry) == CacheUsage()
    assert store.entries() == [entry]
    store.close()


@pytest.mark.parametrize(
    "value", [b"", b"{", b"7", b'{"hits": "x"}', b'{"hits": -1}', b'{"last_used": 1e308}']
)
def test_a_record_with_a_right_hash_and_wrong_figures_is_none(tmp_path: Path, value: bytes) -> None:
    path = tmp_path / "index.sqlite"
    records = Records(path)
    records.open()
    records.write({(USAGE, "toy/one"): value, ("another", "kind"): b"1", (USAGE, "toy/two"): b'{"hits": 2}'})
    records.close()
    index = Index(path)
    assert (index.usage(cache_key("toy", "one")), index.usage(cache_key("toy", "two")).hits) == (
        CacheUsage(),
        2,
    )
    index.close()


def test_a_hash_of_weights_that_is_none_is_computed_again(tmp_path: Path) -> None:
    path = tmp_path / "index.sqlite"
    index = Index(path)
    index.put_weights_hash("/model", (1, 2, 3, 4), "f" * 64)
    assert index.weights_hash("/model", (1, 2, 3, 4)) == "f" * 64
    index.close()
    _database(path, "UPDATE records SET value = replace(value, 'fff', 'ffe')")
    index = Index(path)
    assert index.weights_hash("/model", (1, 2, 3, 4)) is None
    index.put_weights_hash("/model", (1, 2, 3, 4), "e" * 64)
    index.close()
    assert Index(path).weights_hash("/model", (1, 2, 3, 4)) == "e" * 64
