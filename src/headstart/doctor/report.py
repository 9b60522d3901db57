"""The report on how a server with these settings would run on this machine. It loads no weights and takes no
lock on the cache directory, so a server may be using it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from msgspec import Struct

from headstart import machine
from headstart.caches.scan import Scan, scan
from headstart.config.settings import Settings
from headstart.config.source import origin
from headstart.doctor.board import Board, examine_board, has_npu, npu_settings
from headstart.doctor.offline_model import OfflineModel
from headstart.engine.kinds import KINDS, engine_kind
from headstart.engine.llama.converted_weights import found as found_conversions
from headstart.errors import StartupError
from headstart.numerics import Tuning
from headstart.protocol import EngineSettings
from headstart.service.models.cache_fit import doubted, kept_back
from headstart.service.models.model import Notify, model_path
from headstart.service.models.plan import Plan, rkllm_settings
from headstart.service.models.state_limits import MB, TierLimit, disk_limit, memory_limit
from headstart.service.models.tuning_store import Tunings

WHY = {"caches": "its caches", "agreed": "agreed to", "measured": "measured", "default": "default"}
UNKNOWN = "measured at the first start"
UNTOLD = (
    "{name} was measured by a release that didn't record doubts: it is measured again when the server "
    "is idle."
)


class InForce(Struct, frozen=True):
    """A setting's value and its origin."""

    name: str
    value: str
    origin: str


class ModelReport(Struct, frozen=True):
    """`converted_bytes`: the size of its converted weights, if any. `tuning` is None if the model wasn't
    measured, isn't to be, or if the measurement is `doubted`. `fitting`: the number of caches that fit;
    `misfits`: names of the others, by reason. With a `problem` the model can't be served."""

    name: str
    path: str
    size_bytes: int | None = None
    converted_bytes: int | None = None
    settings: list[InForce] = []
    tuning: Tuning | None = None
    doubted: Tuning | None = None
    fitting: int = 0
    misfits: dict[str, list[str]] = {}
    notes: list[str] = []
    problem: str | None = None


class Report(Struct, frozen=True):
    """`states`: how much is kept of what was computed, of all models. `features`: features of this CPU that
    llama.cpp was built for. `others`: the number of caches of each model that the settings don't have.
    `problems`: faults that need attention. `board`: None if there is neither a Rockchip NPU nor a model for
    one."""

    cpu: str
    cpus: int
    cores: int | None
    memory_bytes: int
    engine: str
    features: list[str]
    cache_dir: str
    states: list[InForce]
    models: list[ModelReport]
    others: dict[str, int]
    problems: list[str]
    board: Board | None = None


def examine(settings: Settings, flags: Mapping[str, Any]) -> Report:
    """`flags`: the flags that `settings` were loaded with."""
    found = scan(settings.cache_dir)
    tunings = Tunings(settings.cache_dir)
    models = [
        _examine_model(name, path, settings, flags, tunings, found)
        for name, path in settings.model_paths.items()
    ]
    features, problems = _features()
    problems += [f"{model.name}: {model.problem}" for model in models if model.problem]
    board = _board(settings)
    problems += board.problems if board and _npu_models(settings) else []
    problems += [f"damaged cache file: {what}" for what in found.damaged]
    try:
        tunings.all()
    except (OSError, ValueError) as error:
        problems.append(f"{error}; the next start measures again and replaces it")
    return Report(
        cpu=machine.cpu_model(),
        cpus=machine.available_cpus(),
        cores=machine.physical_cores(),
        memory_bytes=machine.memory_bytes(),
        engine=KINDS["llama"].version(),
        features=features,
        cache_dir=str(settings.cache_dir.absolute()),
        states=_states(settings, flags),
        models=models,
        others={n: len(caches) for n, caches in found.entries.items() if n not in settings.model_paths},
        problems=problems,
        board=board,
    )


def _states(settings: Settings, flags: Mapping[str, Any]) -> list[InForce]:
    limits = {"state_memory_mb": memory_limit(settings), "state_disk_mb": disk_limit(settings)}
    shown = [
        InForce(name, _megabytes(limit), limit.why or origin(settings, name, flags))
        for name, limit in limits.items()
    ]
    days = f"{settings.state_days:g}" if settings.state_days else "never"
    return [*shown, InForce("state_days", days, origin(settings, "state_days", flags))]


def _megabytes(limit: TierLimit) -> str:
    return f"{limit.n_bytes // MB}" if limit.n_bytes else "off"


def _npu_models(settings: Settings) -> bool:
    return any(engine_kind(path).on_npu for path in settings.model_paths.values())


def _board(settings: Settings) -> Board | None:
    is_relevant = has_npu() or _npu_models(settings) or settings.rkllm_library
    return examine_board(rkllm_settings(settings)) if is_relevant else None


def measure_again(settings: Settings, say: Notify, *, agree: bool) -> None:
    """Measures each model that can be served. Raises StartupError."""
    found = scan(settings.cache_dir)
    settings.cache_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    for name, path in settings.model_paths.items():
        try:
            entries = found.entries.get(name, [])
            model = OfflineModel(name, path, settings, Tunings(settings.cache_dir), entries)
        except StartupError:
            continue
        say(f"Measuring the fastest settings for {name} ...")
        model.measure(say, agree=agree)


def _features() -> tuple[list[str], list[str]]:
    """The CPU features of llama.cpp's build, and problems."""
    try:
        from headstart.engine.llama.gguf import build_features

        return build_features(), []
    except (ImportError, OSError, RuntimeError) as error:
        return [], [f"llama.cpp can't be loaded (`make rebuild` builds it again): {error}"]


def _examine_model(
    name: str, path: str, settings: Settings, flags: Mapping[str, Any], tunings: Tunings, found: Scan
) -> ModelReport:
    path = model_path(path)
    entries = found.entries.get(name, [])
    size = Path(path).stat().st_size if Path(path).is_file() else None
    try:
        model = OfflineModel(name, path, settings, tunings, entries)
        in_force = _in_force(settings, flags, model.plan, model.in_force)
    except StartupError as error:
        return ModelReport(name, path, size, problem=str(error))
    tuning = model.plan.settings.tuning
    preferred = model.plan.kept_back(tuning) if tuning else None
    misfits = model.misfits(model.in_force.numerics)
    return ModelReport(
        name,
        path,
        size,
        _converted_bytes(model.plan.settings.conversions),
        settings=in_force,
        tuning=tuning,
        doubted=model.plan.doubted,
        fitting=len(entries) - sum(map(len, misfits.values())),
        misfits=misfits,
        notes=[
            *([kept_back(name, tuning.numerics, preferred)] if tuning and preferred else []),
            *([doubted(name, model.plan.doubted)] if model.plan.doubted else []),
            *([UNTOLD.format(name=name)] if tuning and not tuning.tries else []),
        ],
    )


def _converted_bytes(conversions: str) -> int | None:
    try:
        return sum(path.stat().st_size for path in found_conversions(conversions)) or None
    except OSError:
        # A server may just be making it.
        return None


def _in_force(settings: Settings, flags: Mapping[str, Any], plan: Plan, now: EngineSettings) -> list[InForce]:
    """The effective settings. Raises StartupError if the model can't be loaded with them."""
    if engine_kind(now.path).on_npu:
        shown = npu_settings(now.path, settings)
        return [InForce(name, value, origin(settings, name, flags)) for name, value in shown.items()]
    values: dict[str, str] = {
        **now.numerics.shown(),
        "threads": str(now.threads),
        "prefill_chunk": str(now.prefill_chunk),
        "share_from": str(now.share_from) if now.share_from else "never",
        "max_step_ms": f"{now.max_step_ms:g}",
        "slots": str(now.slots or "by memory, at most 4"),
        "ctx": str(now.ctx or "the model's, at most 8192"),
    }
    origins = {name: _origin(name, settings, flags, plan) for name in values}
    for name, where in origins.items():
        if where == UNKNOWN:
            values[name] = "-"
    return [InForce(name, values[name], origins[name]) for name in values]


def _origin(name: str, settings: Settings, flags: Mapping[str, Any], plan: Plan) -> str:
    value = getattr(settings, name, None)
    # 0 and None leave a setting open, False doesn't.
    if value or value is False:
        return origin(settings, name, flags)
    if name in ("max_step_ms", "slots", "ctx"):
        return "default"
    if plan.why.get(name, "measured") != "measured":
        return WHY[plan.why[name]]
    if plan.measures:
        return UNKNOWN
    return "measured" if plan.settings.tuning else "default"
