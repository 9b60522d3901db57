"""The kinds of engines: one record for each kind of model, with everything that differs between them.

Everything here may run in the server, so native libraries are imported only by the methods that need them.
"""

from __future__ import annotations

import hashlib
import socket
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from headstart.engine.model import Model, ModelError, Piece
from headstart.engine.tuning.constant import embedder_tuning, toy_tuning
from headstart.engine.worker_engine import Wake, WorkerEngine
from headstart.errors import StartupError
from headstart.model_files import Kind, kind_of
from headstart.numerics import Tuning
from headstart.protocol import EngineSettings
from headstart.toyspec import ToySpec

if TYPE_CHECKING:
    from headstart.engine.core.engine import CoreEngine
    from headstart.engine.rkllm.engine import RkllmEngine

LLAMA_CRASH = (
    "At start-up this means that the model's file is not what llama.cpp expects, or, if other models don't "
    "run either, that llama.cpp was built for another CPU or by a faulty compiler. Build it again: "
    "`make rebuild`; if that doesn't help, `export CMAKE_ARGS=-DGGML_NATIVE=OFF` and `make rebuild`, which "
    "is slower but runs everywhere"
)
RKLLM_CRASH = (
    "At start-up this means that the NPU's runtime is another release than it was taken for, or doesn't fit "
    "the driver: see `headstart doctor`"
)


class EngineKind(ABC):
    """`tunable`: there are numerics and settings to choose for the machine, and a state's fingerprint can be
    told without loading the model. `is_timed`: choosing them takes a measurement of several seconds.
    `on_npu`: Rockchip's NPU runs the model. `crash_hint`: the likely cause of a crash by a signal."""

    tunable = True
    is_timed = False
    on_npu = False
    crash_hint = LLAMA_CRASH

    @abstractmethod
    def version(self) -> str:
        """The `engine` of the models' ModelInfo, without loading anything; without the version if only the
        library knows it."""

    @abstractmethod
    def prepare(self) -> None:
        """Imports what `open` needs."""

    @abstractmethod
    def open(self, settings: EngineSettings, wake: Wake) -> WorkerEngine:
        """Loads the model; no setting may be open. Raises ModelError."""

    def load(self, settings: EngineSettings) -> Model:
        """Loads the model for the engine loop. Raises ModelError, also if the kind has an engine of its
        own."""
        raise ModelError(f"{settings.path} runs on an engine of its own")

    def measure(
        self, settings: EngineSettings, channel: socket.socket | None, env: Mapping[str, str] | None
    ) -> Tuning:
        """The fastest settings on this machine; parameters and errors as in `resolve.measure_apart`."""
        raise ModelError(f"there is nothing to measure for {settings.path}")

    def location(self, path: str) -> str:
        """The path independent of the current directory."""
        return str(Path(path).expanduser().absolute())

    def weights_id(self, path: str) -> str | None:
        """A substitute for the SHA-256 of the weights of a model without a file; None: the file is hashed.
        Raises StartupError, also if there is no file."""
        if not Path(path).is_file():
            raise StartupError(f"{path} can't be read: there is no such file")
        return None


class _CoreKind(EngineKind):
    """Models for the engine loop."""

    @abstractmethod
    def _model(self, settings: EngineSettings) -> Model: ...

    def prepare(self) -> None:
        import headstart.engine.core.engine  # noqa: F401

    def open(self, settings: EngineSettings, wake: Wake) -> CoreEngine:
        from headstart.engine.core.build import build_engine

        return build_engine(self.load(settings), settings, wake)

    def load(self, settings: EngineSettings) -> Model:
        """Also evaluates one token, so that a broken native build fails here and not at the first request."""
        model = self._model(settings)
        model.evaluate([Piece(0, 0, [0], sample=True)])
        model.clear(0)
        return model


class LlamaKind(_CoreKind):
    is_timed = True

    def version(self) -> str:
        from importlib.metadata import version

        return f"llama-cpp-python {version('llama-cpp-python')}"

    def prepare(self) -> None:
        super().prepare()
        import headstart.engine.llama.model  # noqa: F401

    def _model(self, settings: EngineSettings) -> Model:
        from headstart.engine.llama.model import LlamaModel

        return LlamaModel(settings)

    def measure(
        self, settings: EngineSettings, channel: socket.socket | None, env: Mapping[str, str] | None
    ) -> Tuning:
        from headstart.engine.llama.gguf import only_embeds
        from headstart.engine.tuning.measure_process import measured

        return embedder_tuning(settings) if only_embeds(settings.path) else measured(settings, channel, env)


class RkllmKind(EngineKind):
    tunable = False
    on_npu = True
    crash_hint = RKLLM_CRASH

    def version(self) -> str:
        return "rkllm"

    def prepare(self) -> None:
        import headstart.engine.rkllm.build  # noqa: F401

    def open(self, settings: EngineSettings, wake: Wake) -> RkllmEngine:
        from headstart.engine.rkllm.build import build_engine

        return build_engine(settings, wake)


class ToyKind(_CoreKind):
    def version(self) -> str:
        return "toy"

    def prepare(self) -> None:
        super().prepare()
        import headstart.engine.toy  # noqa: F401

    def _model(self, settings: EngineSettings) -> Model:
        from headstart.engine.toy import ToyModel

        return ToyModel(settings)

    def measure(
        self, settings: EngineSettings, channel: socket.socket | None, env: Mapping[str, str] | None
    ) -> Tuning:
        return toy_tuning(settings)

    def location(self, path: str) -> str:
        return path

    def weights_id(self, path: str) -> str | None:
        try:
            return hashlib.sha256(ToySpec.parse(path).weights.encode()).hexdigest()
        except ValueError as error:
            raise StartupError(str(error)) from error


KINDS: Mapping[Kind, EngineKind] = {"llama": LlamaKind(), "rkllm": RkllmKind(), "toy": ToyKind()}


def engine_kind(path: str) -> EngineKind:
    """The kind of the model at `path`."""
    return KINDS[kind_of(path)]
