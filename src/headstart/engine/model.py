"""The interface between engine and model. Implementations: `llama` (llama.cpp) and `toy`."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from headstart.engine.grammar import Grammars
from headstart.protocol import ModelInfo, Sampling

if TYPE_CHECKING:
    from headstart.engine.logprobs import Logprobs
    from headstart.engine.matcher import Matcher

# A step has room for at least this many prompt tokens, for several short prompts, however small the chunks
# are.
LEAST_STEP_TOKENS = 96


@dataclass(frozen=True, slots=True)
class Piece:
    """`tokens` to evaluate from position `start` of sequence `seq` on; `sample`: compute the logits of the
    last one."""

    seq: int
    start: int
    tokens: Seq[int]
    sample: bool


class ModelError(Exception):
    """A model could not be loaded or could not evaluate a batch."""


class TooLarge(ModelError):
    """A model would take more memory than is available."""


class Sampler(Protocol):
    """Chooses tokens for one sequence; remembers its choices, for penalties and the random stream. `ended`:
    the answer is complete by its grammar, and nothing may follow."""

    @property
    def ended(self) -> bool: ...

    def close(self) -> None: ...


class Embedder(Protocol):
    """Computes embeddings, one at a time, in memory of its own. `whole`: an input can't be evaluated in
    pieces."""

    whole: bool

    def clear(self) -> None:
        """Forgets the evaluated tokens; call it before each input, and after a failure."""

    def evaluate(self, start: int, tokens: Seq[int]) -> None:
        """Evaluates the input's tokens from position `start` on. Raises ModelError."""

    def vector(self) -> bytes:
        """The embedding of the evaluated tokens: float32, little-endian, of length 1. Raises ModelError if
        there is none."""


class StateSlices(Protocol):
    """Cuts the saved states of a model into blocks of tokens, and puts them together to the same bytes.

    A state has up to two parts. `has_cells`: one has the values of each token, for layers that attend to all
    of them; blocks are runs of it. `has_checkpoint`: the other belongs to the last token alone, such as a
    window's cells or a recurrent layer's memory, and is usable only together with exactly the tokens before
    it. At least one is true. All methods raise ModelError for memory that is no such state or block."""

    has_cells: bool
    has_checkpoint: bool

    def n_cells(self, state: memoryview) -> int:
        """The number of tokens whose values a saved state has; 0 without cells."""

    def cut(self, state: memoryview, start: int, end: int) -> memoryview:
        """A copy of the values of tokens `start` to `end` of a saved state, counted from its first: a block,
        empty without cells."""

    def checkpoint(self, state: memoryview) -> memoryview:
        """A copy of the second part of a saved state, in the form of `Model.checkpoint`; empty without
        checkpoints."""

    def join(
        self, blocks: Seq[memoryview], n_tokens: int, checkpoint: memoryview
    ) -> tuple[memoryview, int, int]:
        """The saved state of the first `n_tokens` tokens of consecutive blocks from token 0 on, in a new
        buffer, with its start and end there, for `Model.restore`. `checkpoint`: that after `n_tokens` tokens,
        or empty."""


class Model(Protocol):
    """A loaded model with room for `info.slots` sequences of `info.n_ctx` tokens, numbered from 0, each with
    a KV stream of its own. If `info.pool_tokens` is not 0, there is also a pool: that many KV cells, shared
    by `info.slots` + 1 sequences numbered from `info.slots`.

    After a failed `evaluate` the sequences of its pieces hold unknown values and must be cleared. `slices`:
    how its states are cut; None: they can't be.
    """

    info: ModelInfo
    grammars: Grammars
    slices: StateSlices | None

    def evaluate(self, pieces: Seq[Piece]) -> None:
        """Computes the KV values of all pieces in one batch. Either all sequences are in the pool, or none.
        Raises ModelError."""

    def sampler(self, sampling: Sampling, history: Seq[int], matcher: Matcher | None = None) -> Sampler:
        """A sampler for a sequence whose prompt is `history`. With a `matcher`, which it then owns, it
        chooses among the tokens that this allows."""

    def sample(self, row: int, sampler: Sampler) -> int:
        """The token after piece number `row` of the last `evaluate`; the piece must have `sample` set. Raises
        GrammarError."""

    def logprobs(self, row: int) -> Logprobs:
        """The logarithmic probabilities of all tokens after piece number `row`, by the model alone."""

    def is_end(self, token: int) -> bool:
        """Whether the token ends an answer."""

    def clear(self, seq: int) -> None:
        """Forgets the sequence."""

    def cut(self, seq: int, n_tokens: int) -> bool:
        """Keeps the first `n_tokens` tokens only; False, leaving unknown values, if that is impossible."""

    def copy(self, source: int, seq: int, n_tokens: int) -> bool:
        """Fills a cleared sequence with the first `n_tokens` tokens of another; False, leaving unknown
        values, if that is impossible. Within the pool both then use the same cells."""

    def relocate(self, seq: int) -> None:
        """Moves the sequence's cells to where a restore of its state would place them, so that later tokens
        are computed in the same order. Raises ModelError, leaving unknown values."""

    def save(self, seq: int) -> memoryview:
        """A copy of the sequence's state, from which any sequence can be restored. Raises ModelError."""

    def save_from(self, seq: int, start: int) -> tuple[memoryview, int]:
        """A copy of the sequence's state whose first cell is token `first`, at most `start`, and `first`: a
        state without the beginning where that is cheaper to copy, else a whole one. Raises ModelError."""

    def checkpoint(self, seq: int) -> memoryview:
        """A copy of the part of the sequence's state that belongs to its last token alone; empty if there is
        none. Raises ModelError."""

    def restore(self, seq: int, memory: memoryview, start: int, end: int) -> bool:
        """Fills a cleared sequence from the state at `start` to `end` of `memory`; False, leaving unknown
        values, if it doesn't fit. The state and the bytes before it may be overwritten."""

    def embedder(self) -> Embedder:
        """Creates an embedder, which takes memory at once. Raises ModelError; TooLarge if memory is short."""
