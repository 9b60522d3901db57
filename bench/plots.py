"""Plots of the results as PNG files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.lab import Sample
from bench.statistics import Summary, paired_ratios, summary

COLOURS = {
    "headstart": "#2a6f97",
    "llama-server": "#c9ada7",
    "llama-server best": "#9a8c98",
    "bare": "#6c757d",
    "bare shared": "#adb5bd",
    "headstart plain": "#89c2d9",
}
FIRST_TOKEN = {"a": "cold", "b": "resident", "c": "from file", "d": "after restart", "d-cold": "disk cold"}
CROWD = {"e": "8 clients, one cache", "f": "8 clients, 8 caches"}


def draw(out: Path, samples: Sequence[Sample]) -> list[Path]:
    """Writes those plots for which there are samples into the folder `out`; their paths."""
    import matplotlib as mpl

    mpl.use("Agg")
    bars = [
        _bars(out / "first_token.png", samples, FIRST_TOKEN, "ttft_ms", "time to first token, ms", log=True),
        _bars(out / "crowd.png", samples, CROWD, "requests_per_s", "requests a second"),
        _bars(out / "decode.png", samples, {"h": "1 sequence", "h8": "8 sequences"}, "token_ms", "ms a step"),
    ]
    return [path for path in (*bars, _sweep(out / "sweep.png", samples)) if path]


def _of(samples: Sequence[Sample], arm: str, who: str, measured: str) -> Summary | None:
    values = [s.values[measured] for s in samples if (s.arm, s.who) == (arm, who) and measured in s.values]
    return summary(values) if values else None


def _bars(
    path: Path,
    samples: Sequence[Sample],
    arms: dict[str, str],
    measured: str,
    label: str,
    *,
    log: bool = False,
) -> Path | None:
    """Medians, with the middle half as a line."""
    here = {s.arm for s in samples if measured in s.values}
    shown = {arm: title for arm, title in arms.items() if arm in here}
    if not shown:
        return None
    everyone = [who for who in COLOURS if any(s.who == who and s.arm in shown for s in samples)]
    axes = _axes(label)
    width = 0.8 / len(everyone)
    named: dict[str, Any] = {}
    for i, who in enumerate(everyone):
        for place, arm in enumerate(shown):
            if of := _of(samples, arm, who, measured):
                error = [[of.median - of.low], [of.high - of.median]]
                where = place + width * (i - len(everyone) / 2 + 0.5)
                [bar] = axes.bar(where, of.median, width, color=COLOURS[who], yerr=error, capsize=2)
                axes.annotate(
                    f"{of.median:,.3g}" if of.median < 1000 else f"{of.median:,.0f}",
                    (where, of.high),
                    (0, 3),
                    textcoords="offset points",
                    ha="center",
                    fontsize=8,
                )
                named[who] = bar
    axes.set_xticks(range(len(shown)), list(shown.values()))
    if log:
        axes.set_yscale("log")
    axes.legend(list(named.values()), list(named))
    return _saved(axes, path)


def _sweep(path: Path, samples: Sequence[Sample]) -> Path | None:
    """Ratios of the time to first token on a grid of lengths."""
    cells = {s.arm: tuple(map(int, s.arm[2:].split("+"))) for s in samples if s.arm.startswith("g ")}
    if not cells:
        return None
    prefixes, suffixes = (sorted({cell[i] for cell in cells.values()}) for i in (0, 1))
    axes = _axes("prompt, tokens")
    for arm, (prefix, suffix) in cells.items():
        ours, theirs = (_rounds(samples, arm, who) for who in ("headstart", "llama-server best"))
        if ratios := paired_ratios(ours, theirs):
            middle = summary(ratios).median
            x, y = suffixes.index(suffix), prefixes.index(prefix)
            axes.scatter([x], [y], s=2400, marker="s", c=[middle], cmap="RdYlGn_r", vmin=0.5, vmax=1.5)
            axes.text(x, y, f"{middle:.2f}", ha="center", va="center")
    axes.set_xticks(range(len(suffixes)), list(map(str, suffixes)))
    axes.set_yticks(range(len(prefixes)), list(map(str, prefixes)))
    axes.margins(0.15)
    axes.set_xlabel("question, tokens")
    axes.set_title("Time to first token of a hit, headstart / llama-server best")
    return _saved(axes, path)


def _rounds(samples: Sequence[Sample], arm: str, who: str) -> dict[int, float]:
    return {s.round: s.values["ttft_ms"] for s in samples if (s.arm, s.who) == (arm, who)}


def _axes(label: str) -> Any:
    from matplotlib import pyplot

    _, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    axes.set_ylabel(label)
    axes.spines[["top", "right"]].set_visible(False)
    return axes


def _saved(axes: Any, path: Path) -> Path:
    from matplotlib import pyplot

    axes.figure.savefig(path, dpi=120)
    pyplot.close(axes.figure)
    return path
