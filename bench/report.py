"""Results as a table on stdout and as JSON; plots are in `plots.py`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.lab import Sample
from bench.statistics import Summary, summary
from bench.targets import Verdict, verdicts


def write(
    out: Path, facts: Mapping[str, Any], samples: Sequence[Sample], failures: Mapping[str, str]
) -> None:
    """Prints the tables, and writes results.json into the folder `out`, which is made."""
    judged = verdicts(samples)
    print(figures_table(samples))
    print(targets_table(judged))
    for arm, reason in failures.items():
        print(f"Arm {arm} failed: {reason}")
    out.mkdir(parents=True, exist_ok=True)
    (out / "results.json").write_text(as_json(facts, samples, judged, failures))
    print(out / "results.json")


def as_json(
    facts: Mapping[str, Any],
    samples: Sequence[Sample],
    judged: Sequence[Verdict],
    failures: Mapping[str, str],
) -> str:
    content = {
        "facts": dict(facts),
        "targets": [asdict(verdict) for verdict in judged],
        "failures": dict(failures),
        "samples": [asdict(sample) for sample in samples],
    }
    return json.dumps(content, indent=1)


def figures_table(samples: Sequence[Sample]) -> str:
    rows = [["arm", "measured", "contender", "n", "median", "middle half", "min", "max"]]
    for arm, measured, who, values in figures(samples):
        spread = f"{_number(values.low)} .. {_number(values.high)}"
        ends = [_number(values.min), _number(values.max)]
        rows.append([arm, measured, who, str(values.n), _number(values.median), spread, *ends])
    return _table(rows)


def figures(samples: Sequence[Sample]) -> Iterator[tuple[str, str, str, Summary]]:
    """Arm, what was measured, whose it is, and the summary, in the order of the samples."""
    groups: dict[tuple[str, str, str], list[float]] = {}
    for sample in samples:
        for measured, value in sample.values.items():
            groups.setdefault((sample.arm, measured, sample.who), []).append(value)
    order = {arm: number for number, arm in enumerate(dict.fromkeys(sample.arm for sample in samples))}
    for key in sorted(groups, key=lambda key: (order[key[0]], key[1])):
        yield *key, summary(groups[key])


def targets_table(judged: Sequence[Verdict]) -> str:
    rows = [["figure", "target", "measured", "middle half", "met"]]
    for verdict in judged:
        spread = f"{_number(verdict.low)} .. {_number(verdict.high)}"
        rows.append(
            [
                verdict.figure,
                verdict.wanted,
                _number(verdict.measured),
                spread,
                "yes" if verdict.met else "NO",
            ]
        )
    return _table(rows)


def _number(value: float) -> str:
    digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2 if abs(value) >= 0.1 else 3
    return f"{value:,.{digits}f}"


def _table(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join(["", lines[0], "  ".join("-" * width for width in widths), *lines[1:], ""])
