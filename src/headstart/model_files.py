"""Models by the files of a folder."""

from __future__ import annotations

import re
from pathlib import Path

SUFFIX = ".gguf"
# Models that Rockchip's NPU runtime runs.
RKLLM_SUFFIX = ".rkllm"
# A model may have several files, of which the first leads to the others.
PART = re.compile(r"-(\d{5})-of-\d{5}$")
# Files that are read beside a model's.
PROJECTOR = "mmproj"


def is_rkllm(path: str) -> bool:
    """Whether the NPU's runtime is what runs the model."""
    return path.endswith(RKLLM_SUFFIX)


def models_in(folder: Path) -> dict[str, str]:
    """Names and paths. A name is the file's, with hyphens for what no name may have; of several files with
    one name the first counts. A folder that can't be read has none."""
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
