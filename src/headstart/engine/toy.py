"""A model without weights: the next token is a hash of the whole history, its state the token list.

It runs the real engine in tests: a wrong slot, offset, cut or restore changes its text.
"""

from __future__ import annotations

import math
import os
import signal
import struct
import time
import zlib
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from itertools import islice
from typing import TYPE_CHECKING

from headstart.engine.grammar import Grammars
from headstart.engine.model import LEAST_STEP_TOKENS, ModelError, Piece, Sampler, StateSlices, TooLarge
from headstart.machine import available_bytes
from headstart.protocol import EngineSettings, ModelInfo, Sampling
from headstart.toyspec import BOS, CONTROL, EOS, GAP, MERGES, N_BYTES, N_VOCAB, ToySpec

if TYPE_CHECKING:
    from llguidance import LLTokenizer

    from headstart.engine.logprobs import Logprobs
    from headstart.engine.matcher import Matcher

DEFAULT_SLOTS = 4
EMBEDDING_SIZE = 16
LETTERS = b"etaoinshrdlucmfwypvbgkjqxz  \n"
# Chosen every other time if a grammar allows them, so that texts, lists and answers end.
CLOSING = (EOS, ord('"'), ord("}"), ord("]"))


class ToyVocabulary:
    """The toy model's tokens in the form that grammars are compiled for."""

    eos_token_id, bos_token_id = EOS, BOS
    tokens = (*(bytes([i]) for i in range(N_BYTES)), *MERGES, *(name.encode() for name in CONTROL | GAP))
    special_token_ids = tuple((CONTROL | GAP).values())

    def __call__(self, text: bytes) -> list[int]:
        return list(text)


def _grammar_tokenizer() -> LLTokenizer:
    from llguidance import LLTokenizer, TokenizerWrapper

    return LLTokenizer(TokenizerWrapper(ToyVocabulary()))


# A state has this many bytes per token, and perhaps a hash of them all.
CELL_BYTES = 4
HASH = struct.Struct("<I")
# The number of candidates for the next token, each half as likely as the one before.
CANDIDATES = 32
UNLIKELY = -30.0


class ToySampler:
    def __init__(self, salt: int, sampling: Sampling, matcher: Matcher | None) -> None:
        self.salt = salt
        self.bias = sampling.logit_bias | ({EOS: -math.inf} if sampling.ignore_eos else {})
        self.matcher = matcher

    @property
    def ended(self) -> bool:
        return self.matcher is not None and self.matcher.ended

    def choose_allowed(self, matcher: Matcher, code: int) -> int:
        allowed = matcher.allowed()
        closing = [token for token in CLOSING if token in allowed]
        token = closing[0] if closing and code % 2 else int(allowed[code // 2 % len(allowed)])
        matcher.accept(token)
        return token

    def close(self) -> None:
        pass


class ToyEmbedder:
    """An embedding is a hash of all tokens of the input."""

    whole = False

    def __init__(self, ms_per_token: float) -> None:
        self.ms_per_token = ms_per_token
        self.history: list[int] = []

    def clear(self) -> None:
        self.history = []

    def evaluate(self, start: int, tokens: Seq[int]) -> None:
        if start != len(self.history):
            raise ModelError(f"the input has {len(self.history)} tokens, not {start}")
        self.history.extend(tokens)
        time.sleep(self.ms_per_token * len(tokens) / 1000)

    def vector(self) -> bytes:
        packed = struct.pack(f"<{len(self.history)}i", *self.history)
        numbers = [zlib.crc32(packed, salt) / (1 << 31) - 1 for salt in range(EMBEDDING_SIZE)]
        return struct.pack(f"<{EMBEDDING_SIZE}f", *(number / math.hypot(*numbers) for number in numbers))


class ToySlices:
    """A state is the list of its tokens. A model whose states can't be cut adds a checkpoint, a hash of all
    tokens, so that a wrong combination of blocks and checkpoint is noticed."""

    has_cells = True

    def __init__(self, *, has_checkpoint: bool) -> None:
        self.has_checkpoint = has_checkpoint
        self.n_end = HASH.size if has_checkpoint else 0

    def n_cells(self, state: memoryview) -> int:
        return (len(state) - self.n_end) // CELL_BYTES

    def cut(self, state: memoryview, start: int, end: int) -> memoryview:
        if not 0 <= start <= end <= self.n_cells(state):
            raise ModelError("the state has fewer tokens")
        return memoryview(bytes(state[start * CELL_BYTES : end * CELL_BYTES]))

    def checkpoint(self, state: memoryview) -> memoryview:
        return memoryview(bytes(state[len(state) - self.n_end :]))

    def join(
        self, blocks: Seq[memoryview], n_tokens: int, checkpoint: memoryview
    ) -> tuple[memoryview, int, int]:
        cells = b"".join(blocks)[: n_tokens * CELL_BYTES]
        if len(cells) != n_tokens * CELL_BYTES or len(checkpoint) != self.n_end:
            raise ModelError("the blocks have fewer tokens")
        state = cells + bytes(checkpoint)
        return memoryview(state), 0, len(state)


class ToyModel:
    def __init__(self, settings: EngineSettings) -> None:
        try:
            self.spec = ToySpec.parse(settings.path)
        except ValueError as error:
            raise ModelError(str(error)) from error
        time.sleep(self.spec.load_ms / 1000)
        if settings.within_memory and self.spec.memory_mb << 20 > available_bytes():
            raise TooLarge(f"it takes {self.spec.memory_mb} MB of memory, which are not available")
        slots = settings.slots or DEFAULT_SLOTS
        n_ctx = min(settings.ctx or self.spec.ctx, self.spec.ctx)
        self.info = ModelInfo(
            n_ctx=n_ctx,
            slots=slots,
            can_cut=bool(self.spec.can_cut),
            engine="toy",
            settings=settings.numerics.fingerprinted(),
            pool_tokens=0 if slots == 1 or not self.spec.can_cut else n_ctx,
            step_tokens=max(settings.prefill_chunk, LEAST_STEP_TOKENS),
            state_bytes=HASH.size,
            state_token_bytes=CELL_BYTES,
            embedding_size=EMBEDDING_SIZE,
            embedding_tokens=n_ctx,
        )
        self.histories: list[list[int]] = [[] for _ in range(2 * slots + 1)]
        # The number of tokens that a sequence of the pool shares with the one it was copied from.
        self.shared = [0] * len(self.histories)
        self.rows: list[list[int]] = []
        self.grammars = Grammars(_grammar_tokenizer)
        self._slices = ToySlices(has_checkpoint=not self.info.can_cut)
        self.slices: StateSlices | None = self._slices

    def evaluate(self, pieces: Seq[Piece]) -> None:
        if self.spec.crash == "decode":
            os.kill(os.getpid(), signal.SIGILL)
        assert len({piece.seq < self.info.slots for piece in pieces}) == 1
        for piece in pieces:
            history = self.histories[piece.seq]
            if piece.start != len(history):
                raise ModelError(f"sequence {piece.seq} holds {len(history)} tokens, not {piece.start}")
            if not all(0 <= token < N_VOCAB for token in piece.tokens):
                raise ModelError("token out of range")
            history.extend(piece.tokens)
            time.sleep(self.spec.ms_per_token * len(piece.tokens) / 1000)
        if self._pool_cells() > self.info.pool_tokens:
            raise ModelError("the pool is full")
        self.rows = [self.histories[piece.seq] for piece in pieces]

    def _pool_cells(self) -> int:
        pool = range(self.info.slots, len(self.histories))
        return sum(len(self.histories[seq]) - self.shared[seq] for seq in pool)

    def sampler(self, sampling: Sampling, history: Seq[int], matcher: Matcher | None = None) -> ToySampler:
        if sampling.temperature == 0:
            return ToySampler(0, sampling, matcher)
        seed = sampling.seed if sampling.seed is not None else int.from_bytes(os.urandom(4))
        return ToySampler(1 + seed % (1 << 62), sampling, matcher)

    def sample(self, row: int, sampler: Sampler) -> int:
        assert isinstance(sampler, ToySampler)
        if sampler.matcher:
            return sampler.choose_allowed(sampler.matcher, self._code(row, sampler.salt))
        if not sampler.bias:
            return next(self._candidates(row, sampler.salt))
        scores = self._scores(row, sampler.salt)
        for token, bias in sampler.bias.items():
            scores[token] += bias
        return int(scores.argmax())

    def logprobs(self, row: int) -> Logprobs:
        from headstart.engine.logprobs import log_softmax

        return log_softmax(self._scores(row, 0))

    def _scores(self, row: int, salt: int) -> Logprobs:
        import numpy as np

        scores = np.full(N_VOCAB, UNLIKELY, dtype=np.float32)
        for i, token in enumerate(islice(self._candidates(row, salt), CANDIDATES)):
            scores[token] = max(scores[token], -i * math.log(2))
        return scores

    def _candidates(self, row: int, salt: int) -> Iterator[int]:
        """Candidates for the next token, the likeliest first; some may occur more than once."""
        code = self._code(row, salt)
        while True:
            if self.spec.eos and code % 61 == 0:
                yield EOS
            else:
                yield LETTERS[code // 61 % len(LETTERS)]
            code = zlib.crc32(struct.pack("<I", code))

    def _code(self, row: int, salt: int) -> int:
        history = self.rows[row]
        return zlib.crc32(struct.pack(f"<q{len(history)}i", salt, *history))

    def is_end(self, token: int) -> bool:
        return token == EOS

    def clear(self, seq: int) -> None:
        self.histories[seq] = []
        self.shared[seq] = 0

    def cut(self, seq: int, n_tokens: int) -> bool:
        history = self.histories[seq]
        if n_tokens != len(history) and not self.info.can_cut:
            return False
        assert n_tokens <= len(history)
        self.histories[seq] = history[:n_tokens]
        return True

    def copy(self, source: int, seq: int, n_tokens: int) -> bool:
        self.histories[seq] = self.histories[source][:n_tokens]
        if min(source, seq) >= self.info.slots:
            self.shared[seq] = n_tokens
        return True

    def relocate(self, seq: int) -> None:
        pass

    def save(self, seq: int) -> memoryview:
        return memoryview(_packed(self.histories[seq]) + bytes(self.checkpoint(seq)))

    def save_from(self, seq: int, start: int) -> tuple[memoryview, int]:
        if seq < self.info.slots:
            return self.save(seq), 0
        return memoryview(_packed(self.histories[seq][start:])), start

    def checkpoint(self, seq: int) -> memoryview:
        """As in ToySlices."""
        if self.info.can_cut:
            return memoryview(b"")
        return memoryview(HASH.pack(zlib.crc32(_packed(self.histories[seq]))))

    def restore(self, seq: int, memory: memoryview, start: int, end: int) -> bool:
        end_of_cells = end - self._slices.n_end
        if end_of_cells < start or (end_of_cells - start) % CELL_BYTES:
            return False
        cells = memory[start:end_of_cells]
        tokens = list(struct.unpack(f"<{len(cells) // CELL_BYTES}i", cells))
        if not self.info.can_cut and HASH.unpack_from(memory, end_of_cells) != (zlib.crc32(cells),):
            return False
        if len(tokens) > self.info.n_ctx or not all(0 <= token < N_VOCAB for token in tokens):
            return False
        self.histories[seq] = tokens
        return True

    def embedder(self) -> ToyEmbedder:
        return ToyEmbedder(self.spec.ms_per_token)


def _packed(tokens: Seq[int]) -> bytes:
    return struct.pack(f"<{len(tokens)}i", *tokens)
