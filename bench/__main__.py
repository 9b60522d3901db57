"""`make bench`: runs the arms and reports them."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import get_args

from bench import cost, crowd, first_token, gaps, memory, plots, random_model, report, storage
from bench.client import BenchFailed
from bench.lab import CONTENDERS, Lab
from bench.machine import described
from bench.servers import Headstart, Host
from bench.texts import Writer
from headstart.model_files import embedded_model
from headstart.numerics import Weights

ROOT = Path(__file__).resolve().parent.parent
PEER = ROOT / ".venv" / "peer" / "build" / "bin" / "llama-server"
OUT = ROOT / "build" / "bench"
# Load average for each thread above which others are computing too.
BUSY = 0.4

# In this order, because the arms of one load share its servers.
ARMS: dict[str, Callable[[Lab], None]] = {
    "a": first_token.cold,
    "b": first_token.resident,
    "c": first_token.restored,
    "g": first_token.sweep,
    "i": cost.creation,
    "l": gaps.longest_gap,
    "h": cost.overhead,
    "e": crowd.one_prompt,
    "f": crowd.own_prompts,
    "j": memory.taken,
    "d": first_token.restarted,
    "k": storage.speed,
}


def options(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench", description=__doc__)
    parser.add_argument("--arms", default=",".join(ARMS), help="such as b,c,e")
    parser.add_argument("--rounds", type=int, default=0, help="of every arm, instead of its own number")
    parser.add_argument("--full", action="store_true", help="more rounds, and every cell of the sweep")
    parser.add_argument(
        "--model", default="", help=f"a GGUF file or {random_model.NAME}; else the embedded model"
    )
    parser.add_argument(
        "--weights", choices=get_args(Weights), default="", help="Headstart's, instead of what it chooses"
    )
    parser.add_argument("--only", choices=CONTENDERS, help="one contender, without comparison")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--out", type=Path, default=OUT, help="folder of the results")
    chosen = parser.parse_args(arguments)
    chosen.arms = [arm for arm in ARMS if arm in chosen.arms.split(",")]
    return chosen


def main() -> int:
    chosen = options()
    model = model_path(chosen.model)
    contenders = [chosen.only] if chosen.only else CONTENDERS
    if not PEER.exists() and chosen.only != Headstart.name:
        sys.exit("llama-server is missing. Build it with: make bench-peer")
    # Servers are stopped on the way out.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    facts = described(model, chosen.threads, PEER)
    say(f"{facts['cpu']}, {chosen.threads} threads; load average {facts['load_average']}")
    if facts["load_average"] > BUSY * chosen.threads:
        say("The machine is busy: figures will be worse and more scattered than they could be.")
    failures: dict[str, str] = {}
    with TemporaryDirectory(prefix="bench-") as directory:
        host = Host(model, chosen.threads, Path(directory), PEER, chosen.weights)
        with Lab(host, Writer(model), chosen.full, chosen.rounds, contenders, say) as lab:
            for arm in chosen.arms:
                run_arm(lab, arm, failures)
    facts["load_average_after"] = round(os.getloadavg()[0], 2)
    facts["commands"] = lab.commands
    facts["arguments"] = " ".join(sys.argv[1:])
    facts["date"] = datetime.now(UTC).isoformat(timespec="seconds")
    report.write(chosen.out, facts, lab.samples, failures)
    for path in plots.draw(chosen.out, lab.samples):
        say(str(path))
    return 1 if failures else 0


def run_arm(lab: Lab, arm: str, failures: dict[str, str]) -> None:
    """An arm that fails is told, and the others still run."""
    started = perf_counter()
    title = (ARMS[arm].__doc__ or "").split(". ")[0].split(".\n")[0].strip()
    say(f"{' '.join(title.split())} ...")
    try:
        ARMS[arm](lab)
    except (BenchFailed, OSError) as error:
        failures[arm] = str(error)
        say(f"  FAILED: {error}")
    say(f"  {perf_counter() - started:.0f} s")


def model_path(chosen: str) -> str:
    if chosen == random_model.NAME:
        say(f"The model with {chosen} is written once ...")
        return str(random_model.written(OUT / f"{chosen}-q8_0.gguf", embedded_model()))
    return chosen or embedded_model()


def say(message: str) -> None:
    print(message, flush=True)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
