"""`headstart doctor`: how a report is shown."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
from msgspec import Struct
from rich.console import Console
from rich.table import Table

from headstart.doctor.board import Board
from headstart.doctor.report import InForce, ModelReport, Report
from headstart.numerics import Tuning
from headstart.service.models.cache_fit import in_words

out = Console(highlight=False, markup=False, soft_wrap=True)


def show(report: Report) -> None:
    cores = f" ({report.cores} cores)" if report.cores else ""
    out.print(f"Machine  {report.cpu}, {report.cpus} CPUs{cores}, {_size(report.memory_bytes)} of memory")
    out.print(f"Engine   {report.engine}: {' '.join(report.features)}")
    out.print(f"Caches   in {report.cache_dir}")
    out.print(_settings(report.states), soft_wrap=False)
    if report.board:
        _show_board(report.board)
    for model in report.models:
        _show_model(model)
    for name, n in report.others.items():
        out.print(f"\n{n} caches of {name}, which is no model here")
    for problem in report.problems:
        out.print(f"\nProblem: {problem}", style="red")
    if not report.problems:
        out.print("\nNo problems found.")


def show_json(report: Struct) -> None:
    print(msgspec.json.format(msgspec.json.encode(report)).decode())


def _show_board(board: Board) -> None:
    most = f" of {board.npu_max_mhz}" if board.npu_max_mhz else ""
    at = f", {board.npu_mhz}{most} MHz ({board.governor})" if board.npu_mhz is not None else ""
    out.print(f"NPU      {board.chip or 'unknown chip'}, driver {board.driver or 'unknown'}{at}")
    if board.name:
        out.print(f"         in {board.name}")
    if board.runtime:
        forced = ", as set" if board.runtime.forced else ""
        runtime = f"RKLLM {board.runtime.version} with the layout of {board.runtime.abi}{forced}"
        out.print(f"Runtime  {runtime}: {board.runtime.path}")
    available = (
        "" if board.available_bytes is None else f", {_size(board.available_bytes)} of memory available"
    )
    out.print(f"Limits   {board.open_files} open files{available}; {board.model_limits}")
    for problem in board.problems:
        out.print(problem, style="yellow")
    for note in board.notes:
        out.print(note, style="yellow")


def _show_model(model: ModelReport) -> None:
    size = "" if model.size_bytes is None else f", {_size(model.size_bytes)}"
    out.print(f"\n{model.name}  {model.path}{size}", style="bold")
    if model.problem:
        return
    if model.converted_bytes is not None:
        out.print(f"Weights converted to q8_0: {_size(model.converted_bytes)}")
    out.print(_settings(model.settings), soft_wrap=False)
    tuning = model.tuning or model.doubted
    if tuning and tuning.measured:
        out.print(_figures(tuning), soft_wrap=False)
    out.print(f"Caches that fit: {model.fitting}")
    for reason, names in model.misfits.items():
        out.print(f"Caches that don't, computed again at first use: {len(names)} ({reason})")
        out.print(f"  {in_words(names)}")
    for note in model.notes:
        out.print(note, style="yellow")


def _settings(settings: Sequence[InForce]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0))
    for heading in ("Setting", "Value", "From"):
        table.add_column(heading, overflow="fold")
    for setting in settings:
        table.add_row(setting.name, setting.value, setting.origin)
    return table


def _figures(tuning: Tuning) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("Measured", overflow="fold")
    table.add_column("ms", justify="right", no_wrap=True)
    table.add_column("How sure", overflow="fold")
    for what, ms in tuning.measured.items():
        doubt = tuning.doubts.get(what)
        sure = f"unsure: {doubt}" if doubt else "sure" if tuning.tries else "not told"
        table.add_row(what, f"{ms:,.1f}", sure)
    return table


def _size(n: int) -> str:
    return f"{n / (1 << 30):.1f} GB" if n >= 1 << 30 else f"{n / (1 << 20):.1f} MB"
