"""The runtime's start options, checked in advance: it answers wrong ones with -1, or crashes."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from pathlib import Path

from headstart.engine.model import ModelError
from headstart.protocol import Sampling

MAX_CONTEXT = 16384
CONTEXT_STEP = 32
MAX_CPUS = 8
LIBRARY = "librkllmrt.so"
# The four fast cores of an RK3588, of eight.
BIG_CORES, BIG_CORES_MASK = 4, 0xF0


@dataclass(frozen=True)
class RuntimeOptions:
    """`library`: a path, or a name to search for in the library directories. `abi`: the release whose layout
    is used; "": detected. `n_ctx`: the most tokens of a run, prompt and answer. Before 1.3.0,
    `max_new_tokens` (the most that a run generates) and `sampling` are in force for all runs. `cpus` and
    `cpu_mask`: the number and set of CPUs that the runtime may use besides the NPU; 0: chosen by the machine.
    `embed_flash`: embeddings are read from the file when needed instead of being held in memory. `log_level`:
    0, 1 or 2; None: as in RKLLM_LOG_LEVEL."""

    library: str = LIBRARY
    abi: str = ""
    n_ctx: int = 4096
    max_new_tokens: int = 4096
    sampling: Sampling = field(default_factory=Sampling)
    cpus: int = 0
    cpu_mask: int = 0
    embed_flash: bool = True
    log_level: int | None = None


def checked(model_path: str, options: RuntimeOptions) -> RuntimeOptions:
    """The options with the CPUs filled in. Raises ModelError with advice on what to change."""
    _check_file(model_path)
    _check_lengths(options)
    options = _with_cpus(options)
    _check_cpus(options)
    return options


def _check_file(path: str) -> None:
    try:
        size = Path(path).stat().st_size
    except OSError as error:
        raise ModelError(f"the model can't be read: {path}: {error.strerror or error}") from error
    if not Path(path).is_file():
        raise ModelError(f"the model is not a file: {path}")
    if not size:
        raise ModelError(f"the model's file is empty: {path}")


def _check_lengths(options: RuntimeOptions) -> None:
    n_ctx = options.n_ctx
    if not 0 < n_ctx <= MAX_CONTEXT or n_ctx % CONTEXT_STEP:
        raise ModelError(
            f"a context of {n_ctx} tokens: it must be a multiple of {CONTEXT_STEP}, at most {MAX_CONTEXT}"
        )
    if not 0 < options.max_new_tokens <= n_ctx:
        raise ModelError(
            f"{options.max_new_tokens} new tokens a run: it must be from 1 to the context's {n_ctx}"
        )


def _with_cpus(options: RuntimeOptions) -> RuntimeOptions:
    """Derives `cpus` and `cpu_mask` from each other; if neither is set, chooses the fast cores if they are
    known."""
    if options.cpu_mask:
        return replace(options, cpus=options.cpus or options.cpu_mask.bit_count())
    if options.cpus > 0:
        return replace(options, cpu_mask=_last_cpus(options.cpus))
    if options.cpus < 0:
        return options
    if _cpus() == 2 * BIG_CORES:
        return replace(options, cpus=BIG_CORES, cpu_mask=BIG_CORES_MASK)
    cpus = min(_cpus(), BIG_CORES)
    return replace(options, cpus=cpus, cpu_mask=_last_cpus(cpus))


def _last_cpus(n: int) -> int:
    """The mask of the last `n` CPUs: on Rockchip's chips the fast cores have the highest numbers."""
    return ((1 << n) - 1) << max(_cpus() - n, 0)


def _check_cpus(options: RuntimeOptions) -> None:
    if not 0 < options.cpus <= MAX_CPUS:
        raise ModelError(f"{options.cpus} CPUs for the NPU runtime: it must be from 1 to {MAX_CPUS}")
    if options.cpu_mask < 0 or options.cpu_mask >> _cpus():
        raise ModelError(
            f"CPU mask {options.cpu_mask:#x} names CPUs that aren't there: this machine has {_cpus()}"
        )
    if options.cpu_mask.bit_count() != options.cpus:
        raise ModelError(
            f"CPU mask {options.cpu_mask:#x} doesn't name {options.cpus} CPUs; set one of the two"
        )


def _cpus() -> int:
    """The number of all CPUs: the runtime pins its threads to CPUs by number, whatever this process may run
    on."""
    return os.cpu_count() or 1
