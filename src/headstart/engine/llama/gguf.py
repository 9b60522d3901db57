"""Opens model files with llama.cpp and reads their metadata."""

from __future__ import annotations

import ctypes
import logging
from pathlib import Path
from typing import Any

import llama_cpp as lib

from headstart.engine.model import ModelError

log = logging.getLogger("llama.cpp")
LOG_LEVELS = {2: logging.DEBUG, 3: logging.WARNING, 4: logging.ERROR}
# Logged for each context whose embeddings are pooled here.
EXPECTED = b"model default pooling_type"


@lib.llama_log_callback  # type: ignore[untyped-decorator]
def _forward_log(level: int, text: bytes, _user: object) -> None:
    known = logging.DEBUG if EXPECTED in text else LOG_LEVELS.get(level, logging.DEBUG)
    log.log(known, "%s", text.decode(errors="replace").rstrip())


def open_model(path: str, *, weights: bool = True) -> Any:
    """The model as a llama.cpp handle; without `weights`, only its description is loaded. Raises
    ModelError."""
    lib.llama_log_set(_forward_log, None)
    lib.llama_backend_init()
    if not Path(path).is_file():
        raise ModelError(f"no such file: {path}")
    params = lib.llama_model_default_params()
    params.vocab_only = not weights
    model = lib.llama_model_load_from_file(path.encode(), params)
    if not model:
        raise ModelError(f"llama.cpp can't load {path}: not a GGUF file it knows")
    return model


def metadata(model: Any, key: str) -> str:
    """A value from the file, up to 63 bytes of it; "" if there is none."""
    text = ctypes.create_string_buffer(64)
    size = lib.llama_model_meta_val_str(model, key.encode(), text, len(text))
    return text.value.decode(errors="replace") if size > 0 else ""


def only_embeds(path: str) -> bool:
    """Whether the model reads in both directions, as encoders do, by its file; False if that can't be
    read."""
    try:
        model = open_model(path, weights=False)
    except ModelError:
        return False
    causal = metadata(model, f"{metadata(model, 'general.architecture')}.attention.causal")
    lib.llama_model_free(model)
    return causal == "false"


def attends_to_everything(model: Any) -> bool:
    """Whether every layer attends to all tokens, so that the KV values of the tokens are the whole state."""
    return not (
        lib.llama_model_is_recurrent(model)
        or lib.llama_model_is_hybrid(model)
        or lib.llama_model_n_swa(model) > 0
    )


def build_features() -> list[str]:
    """Names such as "AVX2" of the features that both the build and this CPU have."""
    lib.llama_backend_init()
    info = lib.llama_print_system_info().decode(errors="replace")
    pairs = (part.rpartition(":")[2].partition("=") for part in info.split("|"))
    return [name.strip() for name, _, value in pairs if value.strip() == "1"]
