"""`headstart demo`: the guide's examples with and without a cache, and where the time goes."""

from __future__ import annotations

from contextlib import ExitStack
from secrets import token_hex

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from headstart.cli.client import Client
from headstart.cli.examples import GUIDE_EXAMPLES, Example, long_example
from headstart.cli.local import own_server
from headstart.cli.measure import BenchRun, Comparison

EXAMPLE_RUNS = 3
BREAKDOWN_RUNS = 3
ANSWER_LINES = 3

NOTES = (
    "Medians of {runs} runs each way, taken in turn, of the request above; its answers have {answer} tokens.",
    "Total TTFT (time to first token) and total time are measured at the client: HTTP, tokenising and "
    "waiting are in them. The other rows are the engine's own measurements.",
    "Without the cache every prompt token is evaluated (cache_prompt: false), which the engine measures as "
    "one prefill. The new messages are evaluated in the same batches both ways: their time is the one "
    "measured with the cache, and the system prompt's is the rest.",
    "Before each run with the cache, other prompts fill the slots of the server ({slots}), so that the state "
    "has to be loaded from its file.",
)

out = Console(highlight=False, markup=False)


def demo(url: str, model: str | None) -> None:
    """Uses the server at `url`, or its own if none is ready there. Raises RequestFailed."""
    with ExitStack() as stack:
        client = stack.enter_context(Client(url))
        # Distinct names, since the server may have other caches.
        prefix, origin = f"demo-{token_hex(2)}.", "which was running"
        if not client.is_ready():
            prefix, origin = "", "started for this demo"
            with out.status(f"No server is ready at {client.url}; starting one ..."):
                own_url = stack.enter_context(own_server("--slots", "1", "--no-tune"))
            client = stack.enter_context(Client(own_url))
        bench = stack.enter_context(BenchRun(client, model, prefix))
        out.print(f"Headstart demo: {bench.model} at {client.url}, {origin}", style="bold")
        _walk(bench)


def _walk(bench: BenchRun) -> None:
    for example in GUIDE_EXAMPLES:
        _show(_compared(bench, example, EXAMPLE_RUNS))
    comparison = _compared(bench, long_example(), BREAKDOWN_RUNS)
    _show(comparison)
    _show_breakdown(comparison, bench.slots)


def _compared(bench: BenchRun, example: Example, repetitions: int) -> Comparison:
    with out.status(f"{example.title} ..."):
        return bench.compare(example, repetitions)


def _show(comparison: Comparison) -> None:
    example, cache = comparison.example, comparison.cache
    form, last = cache["forms"][example.new.form], comparison.with_cache[-1]
    without, cached = comparison.medians(lambda run: run.ttft_ms)
    rows = {
        "Cache": f"{cache['cache_name']}: {form['tokens']:,} tokens, {form['size_mb']} MB",
        "Request": f"POST {example.new.path} with use_cache\n{example.new}",
        "Answer": _first_lines(last.text),
        "Usage": f"{_hit(comparison)}, cached_tokens {last.cached_tokens:,} of "
        f"{last.usage['prompt_tokens']:,} prompt tokens",
        "TTFT": f"{_ms(without)} without the cache, {_ms(cached)} with it: {_change(without, cached)}",
        "Same answer": "yes, with the cache and without" if comparison.same_answers else "no",
    }
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column(overflow="fold")
    for label, value in rows.items():
        grid.add_row(f"  {label}", Text(value))
    out.print(f"\n{example.title}", style="bold")
    out.print(grid)


def _show_breakdown(comparison: Comparison, slots: int) -> None:
    prefill, new = comparison.medians(lambda run: run.timings["prompt_ms"])
    _, load = comparison.medians(lambda run: run.timings["restore_ms"])
    generate = comparison.medians(lambda run: run.timings["predicted_ms"])
    ttft = comparison.medians(lambda run: run.ttft_ms)
    total = comparison.medians(lambda run: run.total_ms)
    table = Table(box=box.MARKDOWN)
    table.add_column("Step", no_wrap=True)
    for heading in ("Without cache", "With cache", "Savings"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_row("Prefill system prompt", _ms(prefill - new), "-", _ms(prefill - new))
    table.add_row("Load", "-", _ms(load), _ms(-load))
    table.add_row("Prefill new messages", _ms(new), _ms(new), _ms(0))
    table.add_row("Generate tokens", *map(_ms, generate), _ms(generate[0] - generate[1]))
    for label, times in (("Total TTFT", ttft), ("Total time", total)):
        table.add_row(label, *map(_ms, times), f"{_percent_less(*times):.0f}%", style="bold")
    out.print(table)
    # A millisecond of one request is a second of a thousand.
    seconds = ttft[0] - ttft[1]
    verb = "Saves" if seconds >= 0 else "Costs"
    out.print(f"{verb} {abs(seconds):,.0f} seconds per 1,000 requests.", style="bold")
    answer = comparison.with_cache[-1].usage["completion_tokens"]
    for note in NOTES:
        text = note.format(runs=len(comparison.without), answer=answer, slots=slots)
        out.print(f"\n{text}", style="dim")


def _hit(comparison: Comparison) -> str:
    misses = {
        run.usage.get("cache_miss_reason") for run in comparison.with_cache if not run.usage["cache_hit"]
    }
    return f"cache_hit false ({', '.join(map(str, misses))})" if misses else "cache_hit true"


def _first_lines(text: str) -> str:
    lines = text.strip().splitlines()
    return "\n".join([*lines[:ANSWER_LINES], *(["..."] if len(lines) > ANSWER_LINES else [])])


def _ms(ms: float) -> str:
    return f"{ms:,.0f} ms" if abs(ms) >= 10 or ms == 0 else f"{ms:.1f} ms"


def _percent_less(without: float, with_cache: float) -> float:
    return 100 * (1 - with_cache / without)


def _change(without: float, with_cache: float) -> str:
    percent = _percent_less(without, with_cache)
    return f"{abs(percent):.0f}% {'less' if percent >= 0 else 'more'}"
