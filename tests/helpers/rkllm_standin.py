"""The stand-in for Rockchip's runtime (tests/helpers/rkllm), compiled: one library a layout. It proves how
Headstart speaks to the runtime; it has no model and no NPU."""

from __future__ import annotations

import functools
import os
import re
import subprocess
import tempfile
from pathlib import Path

from headstart.toyspec import CONTROL, MERGES, N_BYTES

SOURCE = Path(__file__).parent / "rkllm" / "standin.c"
# A release of each layout, and what its sources call the layout.
RELEASES = {"1.2.0": 120, "1.2.3": 121, "1.3.0": 130}
FLAGS = (
    "-std=gnu11",
    "-Wall",
    "-Wextra",
    "-Werror",
    "-O1",
    "-fPIC",
    "-shared",
    "-fvisibility=hidden",
    "-pthread",
)
BUILT = tempfile.TemporaryDirectory(prefix="rkllm-standin-")


def command(compiler: str, layout: int, version: str, target: Path) -> list[str]:
    return [
        compiler,
        *FLAGS,
        f"-DRKLLM_LAYOUT={layout}",
        f'-DRKLLM_VERSION="{version}"',
        "-o",
        str(target),
        str(SOURCE),
    ]


PIECES = {text.encode(): id_ for text, id_ in CONTROL.items()}
PIECES |= {merge: N_BYTES + i for i, merge in enumerate(MERGES)}
LONGEST_FIRST = re.compile(b"|".join(map(re.escape, sorted(PIECES, key=len, reverse=True))) + rb"|[\s\S]")


def standin_tokens(text: str) -> list[int]:
    """What it makes of a prompt."""
    return [PIECES.get(piece, piece[0]) for piece in LONGEST_FIRST.findall(text.encode())]


@functools.cache
def standin(version: str, layout: int | None = None) -> str:
    """The path of a library that says it is `version`, and is it unless `layout` is another's."""
    target = Path(BUILT.name) / f"{version}-{layout}" / "librkllmrt.so"
    target.parent.mkdir()
    subprocess.run(
        command(os.environ.get("CC", "cc"), layout or RELEASES[version], version, target), check=True
    )
    return str(target)


def standin_model(path: Path, weights: str = "a", geometry: str = "1x1x8", ctx: int = 4096) -> str:
    """A model file for it; models of different weights behave differently."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"RKLLM-STANDIN\ngeometry={geometry}\nweights={weights}\nctx={ctx}\n")
    return str(path)
