"""Converts weights to Q8_0, for which llama.cpp has fast matrix kernels, unlike for some other formats. Q8_0
rounds finely: bench/divergence.py measures its effect (figures in docs/settings.md).
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import llama_cpp as lib

from headstart.engine.converted_weights import found, obtain
from headstart.engine.llama.gguf import metadata, open_model
from headstart.engine.model import ModelError
from headstart.machine import available_cpus, memory_bytes
from headstart.numerics import Weights
from headstart.protocol import EngineSettings

log = logging.getLogger(__name__)

Q8_0 = lib.LLAMA_FTYPE_MOSTLY_Q8_0
# Formats converted only on request: they are as fast as Q8_0, or unrounded.
LEFT_ALONE = {
    lib.LLAMA_FTYPE_ALL_F32,
    lib.LLAMA_FTYPE_MOSTLY_F16,
    lib.LLAMA_FTYPE_MOSTLY_BF16,
    lib.LLAMA_FTYPE_MOSTLY_Q4_0,
    Q8_0,
}
# Larger files, and files whose conversion would take a larger share of memory, are converted only on request,
# too.
MOST_BYTES = 1 << 30
MEMORY_SHARE = 1 / 8
# A block of 32 weights has one 16-bit scale.
BYTES_PER_WEIGHT = 34 / 32


@dataclass(frozen=True)
class Format:
    """`kind`: llama.cpp's number for the format of most weights; None if the file doesn't have it."""

    kind: int | None
    n_weights: int
    n_bytes: int

    @classmethod
    def of(cls, path: str) -> Format:
        """Raises ModelError."""
        model = open_model(path, weights=False)
        kind = metadata(model, "general.file_type")
        n_weights = int(lib.llama_model_n_params(model))
        lib.llama_model_free(model)
        return cls(int(kind) if kind.isdigit() else None, n_weights, Path(path).stat().st_size)

    @property
    def is_worth_trying(self) -> bool:
        return (
            self.kind is not None
            and self.kind not in LEFT_ALONE
            and self.n_bytes <= MOST_BYTES
            and self.n_weights * BYTES_PER_WEIGHT <= memory_bytes() * MEMORY_SHARE
        )


def weights_path(settings: EngineSettings) -> str:
    """The file to compute with; converts it first if necessary. Raises ModelError."""
    return settings.path if settings.numerics.weights != "q8_0" else _converted(settings)


def weights_to_try(settings: EngineSettings) -> dict[Weights, str]:
    """The files to measure, the model's own first. Raises ModelError."""
    required = settings.numerics.weights == "q8_0"
    worth_trying = Format.of(settings.path).is_worth_trying
    files: dict[Weights, str] = {}
    if worth_trying or not required:
        files["file"] = settings.path
    if required or (worth_trying and settings.conversions):
        try:
            files["q8_0"] = _converted(settings)
        except ModelError as error:
            if required:
                raise
            log.warning("%s", error)
    return files


def _converted(settings: EngineSettings) -> str:
    if not found(settings.conversions) and Format.of(settings.path).kind == Q8_0:
        return settings.path
    assert settings.conversions
    try:
        return str(obtain(settings.conversions, lambda target: _convert(settings.path, target)))
    except (OSError, ModelError) as error:
        directory = Path(settings.conversions).parent
        raise ModelError(
            f"the weights of {settings.path} can't be converted to q8_0 in {directory}: {error}. Make room "
            "for them there, or start with --weights file; caches made with q8_0 are then computed again"
        ) from error


def _convert(source: str, target: Path) -> None:
    params = lib.llama_model_quantize_default_params()
    params.ftype = Q8_0
    params.nthread = available_cpus()
    params.allow_requantize = True
    if lib.llama_model_quantize(source.encode(), str(target).encode(), params) != 0:
        raise ModelError("llama.cpp could not write them; its log says why")
