"""Facts about a board with Rockchip's NPU. They are read below `root`, so that tests can simulate boards.
Nothing here fails: unknown facts are None."""

from __future__ import annotations

import resource
import subprocess
from pathlib import Path

import msgspec
from msgspec import Struct

from headstart.config.settings import Settings
from headstart.engine.model import ModelError
from headstart.engine.rkllm.build import options_of
from headstart.engine.rkllm.options import CONTEXT_STEP, LIBRARY, MAX_CONTEXT, checked
from headstart.errors import StartupError
from headstart.machine import module_command
from headstart.protocol import RkllmSettings
from headstart.service.models.plan import engine_settings

ROOT = Path("/")
# The first is readable for root only.
DRIVERS = ("sys/kernel/debug/rknpu/version", "proc/rknpu/version", "sys/module/rknpu/version")
FREQUENCIES = "sys/class/devfreq"
DEVICE_TREE = "proc/device-tree"
LOOK_SECONDS = 60
# The runtime opens many files; Rockchip's own examples raise the limit to 102400.
FEW_FILES = 16384
MODEL_LIMITS = f"context at most {MAX_CONTEXT} tokens, in steps of {CONTEXT_STEP}; one request at a time"


class FoundRuntime(Struct, frozen=True):
    """The runtime as `headstart.engine.rkllm.detect` reports it."""

    path: str
    version: str
    abi: str
    forced: bool = False


class Board(Struct, frozen=True):
    """`problems` prevent models from being served; `notes` are possible improvements."""

    name: str | None
    chip: str | None
    driver: str | None
    npu_mhz: int | None
    npu_max_mhz: int | None
    governor: str | None
    runtime: FoundRuntime | None
    open_files: int
    available_bytes: int | None
    notes: list[str]
    problems: list[str]
    model_limits: str = MODEL_LIMITS


def has_npu(root: Path = ROOT) -> bool:
    """Whether this is one of Rockchip's chips, with or without a driver."""
    return (_chip(root) or "").startswith(("rk", "rv"))


def examine_board(given: RkllmSettings, root: Path = ROOT) -> Board:
    runtime, problem = look_at_runtime(given)
    driver = _driver(root)
    npu = next(iter(sorted((root / FREQUENCIES).glob("*npu*"))), root / FREQUENCIES / "npu")
    now, most = _mhz(npu / "cur_freq"), _mhz(npu / "max_freq")
    governor = _read(npu / "governor")
    open_files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return Board(
        name=_read(root / DEVICE_TREE / "model"),
        chip=_chip(root),
        driver=driver,
        npu_mhz=now,
        npu_max_mhz=most,
        governor=governor,
        runtime=runtime,
        open_files=open_files,
        available_bytes=_available(root),
        notes=_notes(root, driver, npu, governor, open_files),
        problems=[problem] if problem else [],
    )


def look_at_runtime(given: RkllmSettings) -> tuple[FoundRuntime | None, str | None]:
    """The runtime, or its fault. Detected in a separate process, which may crash."""
    command = module_command("headstart.engine.rkllm.detect", given.library or LIBRARY, given.abi)
    try:
        done = subprocess.run(command, capture_output=True, timeout=LOOK_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return None, f"the NPU runtime can't be examined: {error}"
    if done.returncode < 0:
        return None, f"the NPU runtime crashes when it is loaded (signal {-done.returncode})"
    if done.returncode:
        return None, done.stderr.decode(errors="replace").strip()
    return msgspec.json.decode(done.stdout, type=FoundRuntime), None


def _notes(root: Path, driver: str | None, npu: Path, governor: str | None, open_files: int) -> list[str]:
    notes = []
    if driver is None:
        what = "is visible to root only" if has_npu(root) else "is missing"
        notes.append(f"The NPU's driver {what}. `cat /{DRIVERS[0]}` names its version.")
    if governor not in (None, "performance"):
        notes.append(
            f"The NPU's frequency follows its load ({governor}), so the first tokens of a request come later "
            f"than they could: `echo performance > /{npu.relative_to(root) / 'governor'}` as root fixes it."
        )
    if open_files < FEW_FILES:
        notes.append(f"A process may open {open_files} files: `ulimit -n 102400` before starting the server.")
    return notes


def _driver(root: Path) -> str | None:
    version_text = next((text for path in DRIVERS if (text := _read(root / path))), None)
    return version_text.rpartition(":")[2].strip().removeprefix("v") if version_text else None


def _chip(root: Path) -> str | None:
    """The most general name in the device tree is the chip's: "rockchip,rk3588"."""
    for name in reversed((_read(root / DEVICE_TREE / "compatible") or "").split("\0")):
        maker, _, chip = name.partition(",")
        if maker == "rockchip":
            return chip
    return None


def _mhz(path: Path) -> int | None:
    text = _read(path)
    return int(text) // 1_000_000 if text and text.isdecimal() else None


def _available(root: Path) -> int | None:
    for line in (_read(root / "proc/meminfo") or "").splitlines():
        name, _, value = line.partition(":")
        if name == "MemAvailable" and value.split()[:1] and value.split()[0].isdecimal():
            return 1024 * int(value.split()[0])
    return None


def _read(path: Path) -> str | None:
    try:
        return path.read_text(errors="replace").strip("\0 \n") or None
    except OSError:
        return None


def npu_settings(path: str, settings: Settings) -> dict[str, str]:
    """The model's settings on the NPU, by name. Raises StartupError if it can't be loaded with them."""
    try:
        options = checked(path, options_of(engine_settings(path, settings)))
    except ModelError as error:
        raise StartupError(str(error)) from error
    return {
        "ctx": str(options.n_ctx),
        "rkllm_library": options.library,
        "rkllm_abi": options.abi or "found out",
        "rkllm_cpus": str(options.cpus),
        "rkllm_cpu_mask": f"{options.cpu_mask:#x}",
        "rkllm_embed_flash": "on" if options.embed_flash else "off",
    }
