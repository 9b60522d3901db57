"""Which model a path names, and whether it works."""

from __future__ import annotations

from importlib.metadata import version

from headstart.engine.model import Model, Piece
from headstart.model_files import is_rkllm
from headstart.protocol import EngineSettings
from headstart.toyspec import ToySpec


def load(settings: EngineSettings) -> Model:
    """Loads the model named by `settings.path` and evaluates one token, so that a broken native build fails
    here and not at the first request. Raises ModelError."""
    model = _load(settings)
    model.evaluate([Piece(0, 0, [0], sample=True)])
    model.clear(0)
    return model


def prepare(path: str) -> None:
    """Imports what loading the model will take."""
    if not (ToySpec.matches(path) or is_rkllm(path)):
        import headstart.engine.llama.model  # noqa: F401


def only_embeds(path: str) -> bool:
    """Whether the model's file says that it can't generate text."""
    if ToySpec.matches(path):
        return False
    from headstart.engine.llama.gguf import only_embeds

    return only_embeds(path)


def engine_version(path: str) -> str:
    """What computes the states of this model, as its ModelInfo says it; nothing is loaded to tell."""
    if is_rkllm(path):
        # Only its library knows.
        return "rkllm"
    return "toy" if ToySpec.matches(path) else f"llama-cpp-python {version('llama-cpp-python')}"


def _load(settings: EngineSettings) -> Model:
    if ToySpec.matches(settings.path):
        from headstart.engine.toy import ToyModel

        return ToyModel(settings)
    from headstart.engine.llama.model import LlamaModel

    return LlamaModel(settings)
