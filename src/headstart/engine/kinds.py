"""Selects the implementation of a model by its path."""

from __future__ import annotations

from importlib.metadata import version

from headstart.engine.model import Model, Piece
from headstart.model_files import is_rkllm
from headstart.protocol import EngineSettings
from headstart.toyspec import ToySpec


def load(settings: EngineSettings) -> Model:
    """Loads the model at `settings.path` and evaluates one token, so that a broken native build fails here
    and not at the first request. Raises ModelError."""
    model = _load(settings)
    model.evaluate([Piece(0, 0, [0], sample=True)])
    model.clear(0)
    return model


def prepare(path: str) -> None:
    """Imports the libraries that loading the model needs."""
    if not (ToySpec.matches(path) or is_rkllm(path)):
        import headstart.engine.llama.model  # noqa: F401


def only_embeds(path: str) -> bool:
    """Whether the model makes embeddings only, by its file."""
    if ToySpec.matches(path):
        return False
    from headstart.engine.llama.gguf import only_embeds

    return only_embeds(path)


def engine_version(path: str) -> str:
    """The `engine` of the model's ModelInfo, without loading anything; without the version for NPU models."""
    if is_rkllm(path):
        # Only the library knows its version.
        return "rkllm"
    return "toy" if ToySpec.matches(path) else f"llama-cpp-python {version('llama-cpp-python')}"


def _load(settings: EngineSettings) -> Model:
    if ToySpec.matches(settings.path):
        from headstart.engine.toy import ToyModel

        return ToyModel(settings)
    from headstart.engine.llama.model import LlamaModel

    return LlamaModel(settings)
