"""llama.cpp behind the engine, by llama-cpp-python's low-level API.

Each slot has a KV stream of its own (`kv_unified` off), so what a sequence computes depends on no other one's
place in memory: prefill after a restore gives the same bits as prefill after computing the same prefix.
"""

from __future__ import annotations

import ctypes
import logging
import os
import secrets
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Any

import llama_cpp as lib
import numpy as np

from headstart.engine.model import ModelError, Piece, Sampler
from headstart.messages import EngineSettings, ModelInfo, Sampling

log = logging.getLogger("llama.cpp")
LOG_LEVELS = {2: logging.DEBUG, 3: logging.WARNING, 4: logging.ERROR}
DEFAULT_CTX = 8192
DEFAULT_SLOTS = 4
# What the KV cache may take of the machine's memory where the number of slots is ours to choose.
KV_MEMORY_SHARE = 1 / 8
KV_VALUE_BYTES = 2


@lib.llama_log_callback  # type: ignore[untyped-decorator]
def _forward_log(level: int, text: bytes, _user: object) -> None:
    log.log(LOG_LEVELS.get(level, logging.DEBUG), "%s", text.decode(errors="replace").rstrip())


def _available_cpus() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class LlamaSampler:
    """A chain in llama.cpp's usual order: penalties, top-k, top-p, min-p, temperature, draw."""

    def __init__(self, sampling: Sampling, history: Seq[int], n_vocab: int) -> None:
        self.n_vocab = n_vocab
        self.chain = lib.llama_sampler_chain_init(lib.llama_sampler_chain_default_params())
        for link in self._links(sampling):
            lib.llama_sampler_chain_add(self.chain, link)
        for token in history[-sampling.repeat_last_n :] if self._has_penalties(sampling) else ():
            lib.llama_sampler_accept(self.chain, token)

    @staticmethod
    def _has_penalties(sampling: Sampling) -> bool:
        wanted = (sampling.repeat_penalty, sampling.frequency_penalty, sampling.presence_penalty)
        return sampling.repeat_last_n > 0 and wanted != (1.0, 0.0, 0.0)

    def _links(self, sampling: Sampling) -> list[int]:
        links = []
        if self._has_penalties(sampling):
            penalties = (sampling.repeat_penalty, sampling.frequency_penalty, sampling.presence_penalty)
            last_n = sampling.repeat_last_n
            links.append(lib.llama_sampler_init_penalties(self.n_vocab, last_n, *penalties))
        if sampling.temperature == 0:
            return [*links, lib.llama_sampler_init_greedy()]
        seed = secrets.randbits(31) if sampling.seed is None else sampling.seed & 0x7FFFFFFF
        return [
            *links,
            lib.llama_sampler_init_top_k(sampling.top_k),
            lib.llama_sampler_init_top_p(sampling.top_p, 1),
            lib.llama_sampler_init_min_p(sampling.min_p, 1),
            lib.llama_sampler_init_temp(sampling.temperature),
            lib.llama_sampler_init_dist(seed),
        ]

    def close(self) -> None:
        lib.llama_sampler_free(self.chain)


class LlamaModel:
    def __init__(self, settings: EngineSettings) -> None:
        lib.llama_log_set(_forward_log, None)
        lib.llama_backend_init()
        if not Path(settings.path).is_file():
            raise ModelError(f"no such file: {settings.path}")
        self.model = lib.llama_model_load_from_file(settings.path.encode(), lib.llama_model_default_params())
        if not self.model:
            raise ModelError(f"llama.cpp can't load {settings.path}: not a GGUF file it knows")
        self.vocab = lib.llama_model_get_vocab(self.model)
        self.ctx = settings.ctx or min(lib.llama_model_n_ctx_train(self.model), DEFAULT_CTX)
        self.slots = settings.slots or self._affordable_slots()
        self.context = lib.llama_init_from_model(self.model, self._context_params(settings))
        if not self.context:
            raise ModelError("llama.cpp can't make a context: too little memory? Try a smaller --ctx")
        self.memory = lib.llama_get_memory(self.context)
        self.batch = lib.llama_batch_init(self.n_batch, 0, 1)
        self.sampled_at: list[int] = []
        self.info = self._info(settings)

    def _context_params(self, settings: EngineSettings) -> Any:
        threads = settings.threads or _available_cpus()
        self.n_batch = max(settings.prefill_chunk, self.slots)
        params = lib.llama_context_default_params()
        params.n_ctx = self.ctx * self.slots
        params.n_batch = params.n_ubatch = self.n_batch
        params.n_seq_max = self.slots
        params.n_threads = params.n_threads_batch = threads
        params.flash_attn_type = int(settings.flash_attention)
        params.kv_unified = False
        return params

    def _affordable_slots(self) -> int:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") * KV_MEMORY_SHARE
        return max(1, min(DEFAULT_SLOTS, int(memory / (self.ctx * self._kv_token_bytes()))))

    def _kv_token_bytes(self) -> int:
        """Bytes of KV cache a token takes if every layer attends to everything; some models take less."""
        heads_kv = int(lib.llama_model_n_head_kv(self.model))
        even = int(lib.llama_model_n_embd(self.model) // max(lib.llama_model_n_head(self.model), 1))
        sizes = [self._metadata(f"attention.{kind}_length") or even for kind in ("key", "value")]
        return int(lib.llama_model_n_layer(self.model)) * max(heads_kv, 1) * sum(sizes) * KV_VALUE_BYTES

    def _metadata(self, key: str) -> int:
        """A number from the GGUF file under the model's architecture; 0 where there is none."""
        text = ctypes.create_string_buffer(64)
        lib.llama_model_meta_val_str(self.model, b"general.architecture", text, len(text))
        name = text.value + b"." + key.encode()
        size = lib.llama_model_meta_val_str(self.model, name, text, len(text))
        return int(text.value) if size > 0 and text.value.isdigit() else 0

    def _info(self, settings: EngineSettings) -> ModelInfo:
        whole_only = (
            lib.llama_model_is_recurrent(self.model)
            or lib.llama_model_is_hybrid(self.model)
            or lib.llama_model_n_swa(self.model) > 0
        )
        return ModelInfo(
            n_ctx=lib.llama_n_ctx_seq(self.context),
            slots=self.slots,
            can_cut=not whole_only,
            engine=f"llama-cpp-python {lib.__version__}",
            settings={
                "flash_attention": "on" if settings.flash_attention else "off",
                "kv_streams": "per slot",
                "kv_type": "f16",
            },
        )

    def evaluate(self, pieces: Seq[Piece]) -> None:
        # Written through numpy views: a ctypes store a field a token would cost more than the copy.
        n_tokens = sum(len(piece.tokens) for piece in pieces)
        assert 0 < n_tokens <= self.n_batch
        batch = self.batch
        view = np.ctypeslib.as_array
        tokens, positions = view(batch.token, (n_tokens,)), view(batch.pos, (n_tokens,))
        logits, counts = view(batch.logits, (n_tokens,)), view(batch.n_seq_id, (n_tokens,))
        counts[:] = 1
        logits[:] = 0
        self.sampled_at = []
        at = 0
        for piece in pieces:
            end = at + len(piece.tokens)
            tokens[at:end] = piece.tokens
            positions[at:end] = range(piece.start, piece.start + end - at)
            for i in range(at, end):
                batch.seq_id[i][0] = piece.seq
            logits[end - 1] = piece.sample
            self.sampled_at.append(end - 1)
            at = end
        batch.n_tokens = n_tokens
        status = lib.llama_decode(self.context, batch)
        if status != 0:
            raise ModelError(f"llama_decode returned {status}")

    def sampler(self, sampling: Sampling, history: Seq[int]) -> LlamaSampler:
        return LlamaSampler(sampling, history, lib.llama_vocab_n_tokens(self.vocab))

    def sample(self, row: int, sampler: Sampler) -> int:
        assert isinstance(sampler, LlamaSampler)
        token: int = lib.llama_sampler_sample(sampler.chain, self.context, self.sampled_at[row])
        return token

    def is_end(self, token: int) -> bool:
        return bool(lib.llama_vocab_is_eog(self.vocab, token))

    def clear(self, seq: int) -> None:
        lib.llama_memory_seq_rm(self.memory, seq, -1, -1)

    def cut(self, seq: int, n_tokens: int) -> bool:
        return bool(lib.llama_memory_seq_rm(self.memory, seq, n_tokens, -1))

    def save(self, seq: int) -> memoryview:
        size = lib.llama_state_seq_get_size(self.context, seq)
        buffer = (ctypes.c_uint8 * size)()
        if lib.llama_state_seq_get_data(self.context, buffer, size, seq) != size:
            raise ModelError("llama.cpp could not save the state")
        return memoryview(buffer).cast("B")

    def restore(self, seq: int, state: memoryview) -> bool:
        data = np.frombuffer(state, dtype=np.uint8)
        pointer = data.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
        read: int = lib.llama_state_seq_set_data(self.context, pointer, len(data), seq)
        return read == len(data)
