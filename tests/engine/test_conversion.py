"""Weights converted to Q8_0: made once, never used unless whole, and saying nearly what the file's say."""

from __future__ import annotations

import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import pytest

from conftest import StartServer
from headstart.caches.store import Store
from headstart.config.settings import embedded_model
from headstart.engine.converted_weights import DIRECTORY, SCRATCH, conversions_of, discard, found, obtain
from headstart.engine.llama.conversion import Format, weights_path, weights_to_try
from headstart.engine.llama.model import LlamaModel
from headstart.engine.model import ModelError, Piece
from headstart.machine import memory_bytes
from headstart.names import NAME
from headstart.numerics import Numerics
from headstart.prompt.tokenizer import load_tokenizer
from headstart.protocol import EngineSettings, Sampling
from servers import said

SHA = "0123456789abcdef" * 4
SYSTEM = "You are the clerk of a small harbour. Ships that come in at night show a blue lantern. " * 20


@pytest.fixture
def conversions(tmp_path: Path) -> str:
    return conversions_of(SHA, tmp_path / "cache")


def test_a_file_is_made_once_and_named_for_its_source_and_content(conversions: str) -> None:
    path = obtain(conversions, lambda target: _write(target, b"weights"))
    assert path.parent.name == DIRECTORY
    assert not NAME.fullmatch(DIRECTORY)
    assert path.name.startswith(f"{SHA[:32]}-q8_0-")
    assert (path.parent.stat().st_mode & 0o777, path.stat().st_mode & 0o777) == (0o700, 0o600)
    assert obtain(conversions, _must_not_be_made) == path
    assert found(conversions) == [path]


@pytest.mark.parametrize("damage", [b"", b"weightx", b"weights and more"])
def test_a_file_that_does_not_fit_its_name_is_made_again(
    conversions: str, damage: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    path = obtain(conversions, lambda target: _write(target, b"weights"))
    path.write_bytes(damage)
    assert obtain(conversions, lambda target: _write(target, b"weights")) == path
    assert path.read_bytes() == b"weights"
    assert "is damaged: it is converted again" in caplog.text


def test_what_could_not_be_made_leaves_nothing(conversions: str) -> None:
    def fail(target: Path) -> None:
        _write(target, b"half")
        raise ModelError("no more room")

    with pytest.raises(ModelError, match="no more room"):
        obtain(conversions, fail)
    assert [path.name for path in Path(conversions).parent.iterdir()] == [".lock"]


def test_two_that_need_it_at_once_make_it_once(conversions: str) -> None:
    made = []

    def make(target: Path) -> None:
        made.append(target)
        time.sleep(0.1)
        _write(target, b"weights")

    with ThreadPoolExecutor(4) as pool:
        paths = set(pool.map(lambda _: obtain(conversions, make), range(4)))
    assert (len(paths), len(made)) == (1, 1)


def test_a_store_leaves_converted_weights_alone(conversions: str, tmp_path: Path) -> None:
    path = obtain(conversions, lambda target: _write(target, b"weights"))
    (path.parent / SCRATCH).touch()
    store = Store(tmp_path / "cache")
    assert store.entries() == []
    store.close()
    assert path.exists()
    assert (path.parent / SCRATCH).exists()
    discard(conversions)
    assert found(conversions) == []


@pytest.mark.parametrize(
    ("kind", "n_weights", "n_bytes", "worth_trying"),
    [
        (3, 10**6, 10**6, True),  # Q4_1
        (15, 10**6, 10**6, True),  # Q4_K_M
        (0, 10**6, 10**6, False),  # F32
        (1, 10**6, 10**6, False),  # F16
        (32, 10**6, 10**6, False),  # BF16
        (7, 10**6, 10**6, False),  # Q8_0
        (2, 10**6, 10**6, False),  # Q4_0
        (None, 10**6, 10**6, False),
        (3, 10**6, (1 << 30) + 1, False),
        (3, memory_bytes() // 8, 10**6, False),
    ],
)
def test_only_small_quantised_files_are_tried_unasked(
    kind: int | None, n_weights: int, n_bytes: int, worth_trying: bool
) -> None:
    assert Format(kind, n_weights, n_bytes).is_worth_trying == worth_trying


def _write(target: Path, content: bytes) -> None:
    target.write_bytes(content)


def _must_not_be_made(_: Path) -> None:
    raise AssertionError


# With the real model


def converting(conversions: str, path: str = "") -> EngineSettings:
    return EngineSettings(
        path or embedded_model(),
        slots=1,
        ctx=512,
        prefill_chunk=256,
        numerics=Numerics(False, "q8_0"),
        conversions=conversions,
    )


@pytest.mark.real_model
def test_the_converted_model_says_nearly_always_what_the_file_says(conversions: str) -> None:
    tokens = load_tokenizer(embedded_model()).encode(
        Path(__file__).parents[1].joinpath("real", "test_real_model.py").read_text()
    )
    likely = []
    for settings in (converting(conversions), converting("", weights_path(converting(conversions)))):
        # The second is Q8_0 already, and used as it is.
        likely.append(_most_likely(settings, tokens[:200]))
    assert likely[0] == likely[1]
    file = EngineSettings(embedded_model(), 1, 512, prefill_chunk=256, numerics=Numerics(False, "file"))
    same = [a == b for a, b in zip(likely[0], _most_likely(file, tokens[:200]), strict=True)]
    assert sum(same) >= 0.9 * 200


def _most_likely(settings: EngineSettings, tokens: list[int]) -> list[int]:
    model = LlamaModel(settings)
    model.evaluate([Piece(0, i, [token], sample=True) for i, token in enumerate(tokens)])
    sampler = model.sampler(Sampling(temperature=0), [])
    return [model.sample(row, sampler) for row in range(len(tokens))]


CONVERT = """
import resource, sys, msgspec
from headstart.engine.llama.conversion import weights_path
from headstart.protocol import EngineSettings
if len(sys.argv) > 2:
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]),) * 2)
print(weights_path(msgspec.json.decode(sys.argv[1], type=EngineSettings)))
"""


def _convert_apart(conversions: str, *limit: str) -> subprocess.Popen[str]:
    settings = msgspec.json.encode(converting(conversions)).decode()
    pipe = subprocess.PIPE
    return subprocess.Popen(
        [sys.executable, "-c", CONVERT, settings, *limit], stdout=pipe, stderr=pipe, text=True
    )


@pytest.mark.real_model
def test_an_interrupted_conversion_is_not_used_and_its_rest_goes(conversions: str) -> None:
    scratch = Path(conversions).parent / SCRATCH
    process = _convert_apart(conversions)
    while not scratch.exists() or scratch.stat().st_size < 1 << 20:
        assert process.poll() is None
        time.sleep(0.001)
    process.kill()
    process.communicate()
    assert scratch.exists()
    assert found(conversions) == []
    path = weights_path(converting(conversions))
    assert found(conversions) == [Path(path)]
    assert not scratch.exists()


@pytest.mark.real_model
def test_a_full_disk_ends_a_conversion_with_advice_and_leaves_nothing(conversions: str) -> None:
    process = _convert_apart(conversions, str(50 << 20))
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "can't be converted to q8_0" in errors
    assert "--weights file" in errors
    assert [path.name for path in Path(conversions).parent.iterdir()] == [".lock"]


@pytest.mark.real_model
def test_what_can_not_be_converted_is_measured_as_it_is_unless_it_was_wanted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / DIRECTORY).touch()
    conversions = conversions_of(SHA, tmp_path)
    open_to_both = EngineSettings(embedded_model(), 0, 0, conversions=conversions)
    assert weights_to_try(open_to_both) == {"file": embedded_model()}
    assert "can't be converted to q8_0" in caplog.text
    with pytest.raises(ModelError, match="can't be converted to q8_0"):
        weights_to_try(converting(conversions))


@pytest.mark.real_model
def test_a_start_that_can_not_convert_what_was_set_says_what_to_do(
    start_server: StartServer, tmp_path: Path
) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / DIRECTORY).touch()
    with pytest.raises(AssertionError, match="start with --weights file"):
        start_server("--weights", "q8_0")


@pytest.mark.real_model
def test_with_converted_weights_a_cache_does_not_change_the_answer(start_server: StartServer) -> None:
    server = start_server("--weights", "q8_0")
    ask: dict[str, Any] = {"model": "smollm2", "max_tokens": 48}
    cold = server.chat("What do ships show?", system=SYSTEM, cache_prompt=False, **ask)
    server.create("harbour", SYSTEM, model="smollm2")
    (converted,) = (server.cache_dir / DIRECTORY).glob("*.gguf")
    written = converted.stat().st_mtime_ns
    server.restart()
    warm = server.chat("What do ships show?", use_cache="harbour", **ask)
    assert warm["usage"]["cache_hit"] is True
    assert warm["timings"]["cache_source"] == "file"
    assert said(warm) == said(cold)
    assert converted.stat().st_mtime_ns == written
    with converted.open("r+b") as file:
        file.seek(1 << 26)
        file.write(b"damaged")
    server.restart()
    assert "is damaged: it is converted again" in server.log.read_text()
    assert said(server.chat("What do ships show?", use_cache="harbour", **ask)) == said(cold)
