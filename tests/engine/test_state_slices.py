"""States put together of blocks have the bytes that the model saves, and go on with the same bits."""

from __future__ import annotations

import pytest

import tiny_models
from headstart.engine.kinds import engine_kind
from headstart.engine.model import Model, Piece, StateSlices
from headstart.model_files import embedded_model
from headstart.numerics import Numerics
from headstart.protocol import EngineSettings

pytestmark = pytest.mark.real_model

SLICED = ["full", "window", "hybrid", "convolutions", "recurrent"]
PROMPT = [5 + i * i % 190 for i in range(233)]
BLOCK = 64
CHUNK = 32
CONTINUED = 20


class Sliced:
    """A model with two slots and a pool, and blocks of its states."""

    def __init__(self, path: str, *, flash_attention: bool) -> None:
        numerics = Numerics(flash_attention=flash_attention)
        settings = EngineSettings(path, 2, 512, 1, CHUNK, numerics=numerics, share_from=32)
        self.model: Model = engine_kind(path).load(settings)

    @property
    def slices(self) -> StateSlices:
        assert self.model.slices
        return self.model.slices

    def compute(self, seq: int, tokens: list[int], start: int = 0) -> bytes:
        """The logits after the last token."""
        for at in range(start, len(tokens), CHUNK):
            end = min(at + CHUNK, len(tokens))
            self.model.evaluate([Piece(seq, at, tokens[at:end], sample=end == len(tokens))])
        return self.model.logprobs(0).tobytes()

    def fill(self, seq: int, tokens: list[int]) -> None:
        self.model.clear(seq)
        self.compute(seq, tokens)

    def continued(self, seq: int, n_tokens: int) -> list[bytes]:
        """The logits of further tokens, one by one."""
        further = range(n_tokens, n_tokens + CONTINUED)
        return [
            self.compute(seq, PROMPT[:n_tokens] + [9 + at % 50 for at in further][: i + 1], at)
            for i, at in enumerate(further)
        ]

    def blocks(self, state: memoryview) -> list[memoryview]:
        n_cells = self.slices.n_cells(state)
        return [self.slices.cut(state, at, min(at + BLOCK, n_cells)) for at in range(0, n_cells, BLOCK)]

    def restore(self, seq: int, blocks: list[memoryview], n_tokens: int, checkpoint: memoryview) -> bool:
        self.model.clear(seq)
        return self.model.restore(seq, *self.slices.join(blocks, n_tokens, checkpoint))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    directory = tmp_path_factory.mktemp("models")
    tiny = {
        kind: str(tiny_models.written(directory / f"{kind}.gguf", kind)) for kind in tiny_models.ARCHITECTURES
    }
    return tiny | {"smollm2": embedded_model()}


@pytest.fixture(scope="module", params=[True, False], ids=["flash", "plain"])
def flash_attention(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture(scope="module", params=[*SLICED, "smollm2"])
def sliced(request: pytest.FixtureRequest, files: dict[str, str], flash_attention: bool) -> Sliced:
    return Sliced(files[request.param], flash_attention=flash_attention)


@pytest.fixture(scope="module")
def full(files: dict[str, str], flash_attention: bool) -> Sliced:
    return Sliced(files["full"], flash_attention=flash_attention)


def test_blocks_and_a_checkpoint_are_the_state_byte_for_byte(sliced: Sliced) -> None:
    sliced.fill(0, PROMPT)
    state = sliced.model.save(0)
    blocks = sliced.blocks(state)
    assert len(blocks) == (4 if sliced.slices.has_cells else 0)
    checkpoint = sliced.slices.checkpoint(state)
    assert checkpoint == sliced.model.checkpoint(0)
    assert bool(checkpoint) == sliced.slices.has_checkpoint
    memory, start, end = sliced.slices.join(blocks, len(PROMPT), checkpoint)
    assert memory[start:end] == state


def test_what_follows_a_joined_state_has_the_same_bits(sliced: Sliced) -> None:
    n = 150
    sliced.fill(0, PROMPT[:n])
    sliced.model.relocate(0)
    checkpoint = sliced.model.checkpoint(0)
    expected = sliced.continued(0, n)
    # Blocks that are cut later, from a longer state.
    sliced.fill(0, PROMPT)
    blocks = sliced.blocks(sliced.model.save(0))
    assert sliced.restore(1, blocks, n, checkpoint)
    assert sliced.continued(1, n) == expected
