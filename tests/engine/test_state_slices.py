"""States put together of blocks have the bytes that the model saves, and go on with the same bits."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

import tiny_encoder
import tiny_models
from headstart.engine.kinds import engine_kind
from headstart.engine.llama.state_memory import state_memory
from headstart.engine.model import Model, ModelError, Piece, StateSlices
from headstart.model_files import embedded_model
from headstart.numerics import Numerics
from headstart.protocol import EngineSettings

pytestmark = pytest.mark.real_model

SLICED = ["full", "positions", "window", "hybrid", "convolutions", "recurrent"]
PROMPT = [5 + i * i % 190 for i in range(233)]
BLOCK = 64
CHUNK = 32
CONTINUED = 20
NONE = memoryview(b"")


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
        kind: str(tiny_models.written(directory / f"{kind}.gguf", kind))
        for kind in [*SLICED, "hybrid-window"]
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


@pytest.fixture(scope="module", params=["full", "window", "hybrid", "recurrent"])
def damaged(request: pytest.FixtureRequest, files: dict[str, str]) -> Sliced:
    return Sliced(files[request.param], flash_attention=False)


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


def test_a_part_of_the_blocks_is_the_state_of_fewer_tokens(full: Sliced) -> None:
    full.fill(0, PROMPT)
    blocks = full.blocks(full.model.save(0))
    for n in (1, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK):
        memory, start, end = full.slices.join(blocks, n, NONE)
        assert full.slices.n_cells(memory[start:end]) == n
        assert full.blocks(memory[start:end])[: n // BLOCK] == blocks[: n // BLOCK]
    assert full.model.cut(0, n)
    expected = full.continued(0, n)
    assert full.restore(1, blocks, n, NONE)
    assert full.continued(1, n) == expected


def test_a_state_without_its_beginning_has_the_same_blocks(full: Sliced) -> None:
    pooled = full.model.info.slots
    full.fill(0, PROMPT)
    full.fill(pooled, PROMPT)
    whole = full.model.save(0)
    for seq, start, expected in ((0, 100, 0), (pooled, 100, 100), (pooled, len(PROMPT) - 1, len(PROMPT) - 1)):
        state, first = full.model.save_from(seq, start)
        assert first == expected
        assert full.slices.n_cells(state) == len(PROMPT) - first
        blocks = full.slices.cut(state, start - first, len(PROMPT) - first)
        assert blocks == full.slices.cut(whole, start, len(PROMPT))
    assert full.blocks(full.model.save(pooled)) == full.blocks(whole)
    # The copy is gone from the pool, which can be filled to the last cell.
    full.fill(pooled, PROMPT * 2 + PROMPT[: full.model.info.pool_tokens - 2 * len(PROMPT)])
    full.model.clear(pooled)


def test_each_sequence_of_the_pool_can_move_to_a_stream(full: Sliced) -> None:
    full.fill(0, PROMPT)
    expected = full.continued(0, len(PROMPT))
    for seq in range(full.model.info.slots, 2 * full.model.info.slots + 1):
        full.fill(seq, PROMPT)
        full.model.clear(1)
        assert full.model.copy(seq, 1, len(PROMPT))
        assert full.continued(1, len(PROMPT)) == expected
        full.model.clear(seq)


def test_cells_in_another_order_are_cut_in_that_of_their_positions(full: Sliced) -> None:
    """A sequence of the pool gets cells that an earlier one left."""
    earlier, seq = full.model.info.slots, full.model.info.slots + 1
    half = BLOCK
    full.fill(earlier, PROMPT[:half])
    full.fill(seq, PROMPT[:half])
    first = full.blocks(full.model.save(seq))
    full.model.clear(earlier)
    full.compute(seq, PROMPT[: 2 * half], half)
    second, _ = full.model.save_from(seq, half)
    state = full.model.save(seq)
    in_order, start, end = full.slices.join(first + full.blocks(second), 2 * half, NONE)
    assert in_order[start:end] != state
    assert full.blocks(state) == full.blocks(in_order[start:end]) == first + full.blocks(second)
    full.model.clear(seq)


def test_states_that_are_not_understood_are_not_cut(files: dict[str, str], tmp_path: Path) -> None:
    assert Sliced(files["hybrid-window"], flash_attention=True).model.slices is None
    encoder = tiny_encoder.written(tmp_path / "encoder.gguf")
    assert Sliced(str(encoder), flash_attention=False).model.slices is None


def test_damaged_memory_is_refused(damaged: Sliced) -> None:
    slices = damaged.slices
    damaged.fill(0, PROMPT)
    state = damaged.model.save(0)
    blocks, checkpoint = damaged.blocks(state), slices.checkpoint(state)

    def join(blocks: list[memoryview], checkpoint: memoryview, n_tokens: int = len(PROMPT)) -> None:
        slices.join(blocks, n_tokens, checkpoint)

    join(blocks, checkpoint)
    for wrong in (len(PROMPT) + 1, 0, -1):
        with pytest.raises(ModelError):
            join(blocks, checkpoint, wrong)
    if slices.has_checkpoint:
        for other in _wrong(checkpoint, range(2)):
            # llama.cpp itself refuses recurrent ones that end early.
            with suppress(ModelError):
                assert not damaged.restore(1, blocks, len(PROMPT), other)
        with pytest.raises(ModelError):
            join(blocks, checkpoint, len(PROMPT) - 1)
    if slices.has_cells:
        # The counts, and the position and sequences of the first cell.
        for i in range(len(blocks)):
            for other in _wrong(blocks[i], range(3)):
                with pytest.raises(ModelError):
                    join([*blocks[:i], other, *blocks[i + 1 :]], checkpoint)
        for others in (blocks[1:], blocks[:-1], blocks[::-1], [blocks[0], *blocks[2:], blocks[1]]):
            with pytest.raises(ModelError):
                join(others, checkpoint)
        # All but the number of the sequence.
        for other in _wrong(state, (0, 2, 3, 4, 5)):
            with pytest.raises(ModelError):
                slices.cut(other, 0, BLOCK)
        for start, end in ((-1, 5), (5, 4), (0, len(PROMPT) + 1)):
            with pytest.raises(ModelError):
                slices.cut(state, start, end)


def test_blocks_of_another_model_are_refused(damaged: Sliced, files: dict[str, str]) -> None:
    if not damaged.slices.has_cells:
        pytest.skip("has no blocks")
    other = Sliced(files["smollm2"], flash_attention=False)
    other.fill(0, PROMPT)
    foreign = other.blocks(other.model.save(0))
    damaged.fill(0, PROMPT)
    state = damaged.model.save(0)
    checkpoint = damaged.slices.checkpoint(state)
    with pytest.raises(ModelError):
        damaged.slices.join([foreign[0], *damaged.blocks(state)[1:]], len(PROMPT), checkpoint)
    assert not damaged.restore(1, foreign, len(PROMPT), checkpoint)
    assert damaged.restore(1, damaged.blocks(state), len(PROMPT), checkpoint)


def _cut_short(memory: memoryview) -> Iterator[memoryview]:
    for length in [*range(24), *range(24, len(memory), 1 + len(memory) // 50), len(memory) - 1]:
        yield memory[:length]
    yield memoryview(bytes(memory) + b"\0")


def _wrong(memory: memoryview, words: Iterable[int]) -> Iterator[memoryview]:
    """Cut short, too long, or with another number in one of these places."""
    yield from _cut_short(memory)
    for at in (4 * place for place in words):
        (word,) = struct.unpack_from("<I", memory, at)
        for other in {0, 1, word + 1, word ^ 0x80, 0x7FFFFFFF, 0xFFFFFFFF} - {word}:
            changed = bytearray(memory)
            struct.pack_into("<I", changed, at, other)
            yield memoryview(changed)


def test_memory_is_used_again_when_nothing_refers_to_it() -> None:
    size = 3 << 20
    first = state_memory(size)
    first[:] = 7
    address = first.ctypes.data
    view = first.data[10:20]
    del first
    other = state_memory(size)
    assert other.ctypes.data != address
    other[:] = 8
    assert bytes(view) == bytes([7] * 10)
    del view
    assert state_memory(size - 5).ctypes.data == address
