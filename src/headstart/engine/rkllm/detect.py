"""Detects the release of librkllmrt.so. A wrong guess corrupts memory, so three signs must agree: the
version text in the file, the exported functions, and the offsets of the default parameters.

`python -m headstart.engine.rkllm.detect librkllmrt.so` prints it from a process of its own.
"""

from __future__ import annotations

import ctypes
import mmap
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import msgspec

from headstart.engine.model import ModelError
from headstart.engine.rkllm.layouts import LAYOUTS, VERSIONS, layout_of
from headstart.engine.rkllm.library import load_library
from headstart.regular_files import open_file

VERSION = re.compile(rb"RKLLM SDK \(version: ([0-9A-Za-z.+-]{1,32})")
DIRECTORIES = (
    "/usr/lib",
    "/usr/lib/aarch64-linux-gnu",
    "/usr/local/lib",
    "/lib",
    "/lib64",
    "/usr/lib64",
)
# Larger than the parameters of any release: the library writes as many bytes as its own parameters have.
PROBE_BYTES = 1024
# The default (embed_flash, enabled_cpus_num), and its offset in each layout.
DEFAULTS = bytes((1, 4))
PLACES = {92: ("1.2.0", "1.2.1"), 64: ("1.3.0",)}
FORCE = "if you know which release it is, set rkllm_abi"


@dataclass(frozen=True)
class Detected:
    """`version`: the library's own, "unknown" if the layout was forced and the file has no single version.
    `abi` is a key of `layouts.LAYOUTS`."""

    path: str
    version: str
    abi: str
    forced: bool = False


def detect(library: str, forced: str = "") -> Detected:
    """`library`: a path, or a name to search for in the library directories. `forced`: a release whose layout
    is then used without detection. Raises ModelError."""
    path = located(library)
    versions = versions_in(path)
    if forced:
        layout = layout_of(forced)
        if layout is None:
            raise ModelError(f"rkllm_abi {forced!r} isn't known; known are {', '.join(VERSIONS)}")
        return Detected(path, versions[0] if len(versions) == 1 else "unknown", layout.abi, forced=True)
    version = _the_one(path, versions)
    layout = layout_of(version)
    if layout is None:
        raise ModelError(
            f"{path} is RKLLM {version}; supported are {', '.join(VERSIONS)}. {FORCE.capitalize()}."
        )
    functions = load_library(path)
    _agree(path, version, layout.abi, "exports functions", by_symbols(functions))
    _agree(path, version, layout.abi, "has default parameters", by_probe(functions))
    return Detected(path, version, layout.abi)


def _the_one(path: str, versions: list[str]) -> str:
    if not versions:
        raise ModelError(f"{path} doesn't say which release of RKLLM it is, if it is one at all; {FORCE}")
    if len(versions) > 1:
        raise ModelError(f"{path} says that it is RKLLM {' and '.join(versions)}; {FORCE}")
    return versions[0]


def _agree(path: str, version: str, abi: str, what: str, found: tuple[str, ...]) -> None:
    if abi not in found:
        like = f"like {' or '.join(found)}" if found else "like no release that is supported"
        raise ModelError(f"{path} says that it is RKLLM {version}, but {what} {like}; {FORCE}")


def located(library: str) -> str:
    """The absolute path of the library. Raises ModelError."""
    places = [library] if "/" in library else [f"{directory}/{library}" for directory in DIRECTORIES]
    for place in places:
        if Path(place).is_file():
            return str(Path(place).absolute())
    if "/" in library:
        raise ModelError(f"the NPU runtime is missing: {library}")
    raise ModelError(
        f"the NPU runtime, {library}, is in none of {', '.join(DIRECTORIES)}: install it there, or set "
        "rkllm_library to its path"
    )


def versions_in(path: str) -> list[str]:
    """All version texts in the file. Raises ModelError."""
    try:
        with (
            open_file(path, follow=True) as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content,
        ):
            return sorted({found.decode() for found in VERSION.findall(content)})
    except (OSError, ValueError) as error:
        raise ModelError(f"the NPU runtime can't be read: {path}: {error}") from error


def by_symbols(functions: ctypes.CDLL) -> tuple[str, ...]:
    """The layouts that fit the exported functions."""
    if not hasattr(functions, "rkllm_clear_kv_cache"):
        return ()
    if not hasattr(functions, "rkllm_get_kv_cache_size"):
        return ("1.2.0",)
    return ("1.2.1", "1.3.0")


class _Probe(ctypes.Structure):
    _fields_ = [("content", ctypes.c_uint8 * PROBE_BYTES)]


def by_probe(functions: ctypes.CDLL) -> tuple[str, ...]:
    """The layouts that fit the default parameters; none unless exactly one offset fits."""
    create = functions["rkllm_createDefaultParam"]
    create.argtypes, create.restype = [], _Probe
    content = bytes(create().content)
    found = [abis for at, abis in PLACES.items() if content[at : at + 2] == DEFAULTS]
    return found[0] if len(found) == 1 else ()


assert {abi for abis in PLACES.values() for abi in abis} == set(LAYOUTS)

if __name__ == "__main__":
    try:
        print(msgspec.json.encode(detect(*sys.argv[1:])).decode())
    except ModelError as problem:
        sys.exit(str(problem))
