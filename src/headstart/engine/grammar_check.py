"""A process that checks whether grammars compile: `python -m headstart.engine.grammar_check`.

It reads one JSON line per question from standard input, `[grammar, seconds]`, and answers each with a JSON
line: the reason why the grammar can't be used, "" for none, or the number of the signal that ended the check.

A grammar can make the compiler run for hours, take all memory or overflow its stack. So each is compiled in a
fork of this process, which its limits end; the next one need not wait for a new start.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import threading
from contextlib import suppress

from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper

from headstart.engine.grammar import STACK_BYTES, GrammarError
from headstart.engine.matcher import LIMITS, Matcher, compiled, reason

MEMORY_BYTES = 4 << 30
# Clock time, for a check that hangs without using processor time; long enough for a busy machine.
REAL_SECONDS = 60
# Checks that may take longer than this run at a lower priority, so as not to delay the engine.
NICE_FROM_SECONDS = 1.0
END = 256


class Bytes:
    """A vocabulary of single bytes, the smallest that a grammar can be compiled for."""

    eos_token_id = END
    bos_token_id = None
    tokens = (*(bytes([i]) for i in range(256)), b"<end>")
    special_token_ids = (END,)

    def __call__(self, text: bytes) -> list[int]:
        return list(text)


class Checker:
    def __init__(self) -> None:
        self.tokenizer = LLTokenizer(TokenizerWrapper(Bytes()))

    def fault(self, grammar: str) -> str:
        """The reason why the grammar can't be used; "" if there is none, or if it is unknown: a grammar may
        name tokens of a model, and fail only when the worker compiles it."""
        failed, messages = LLMatcher.validate_grammar_with_warnings(grammar, limits=LIMITS)
        if failed:
            return reason(messages[0])
        if any(message.startswith("no tokenizer") for message in messages):
            return ""
        try:
            Matcher(compiled(self.tokenizer, grammar), END + 1).allowed()
        except GrammarError as error:
            return error.fault
        return reason("\n".join(messages))

    def answer(self, grammar: str, seconds: float) -> str | int:
        """The fault that a fork of this process finds in `seconds` of processor time; else the signal that
        ended the fork, SIGABRT if it ended in another way."""
        reading, writing = os.pipe()
        child = os.fork()
        if not child:
            os.close(reading)
            self._check(grammar, seconds, writing)
        os.close(writing)
        with os.fdopen(reading, "rb") as pipe:
            found = pipe.read()
        _, status = os.waitpid(child, 0)
        if os.WIFSIGNALED(status):
            return os.WTERMSIG(status)
        return str(json.loads(found)) if found else int(signal.SIGABRT)

    def _check(self, grammar: str, seconds: float, writing: int) -> None:
        """Runs in the fork; does not return."""
        try:
            if seconds >= NICE_FROM_SECONDS:
                os.nice(5)
            _limit(resource.RLIMIT_AS, MEMORY_BYTES)
            signal.alarm(REAL_SECONDS)
            # Processor time, so that a busy machine causes no faults; its signal ends the fork.
            signal.setitimer(signal.ITIMER_PROF, seconds)
            thread = threading.Thread(
                target=lambda: os.write(writing, json.dumps(self.fault(grammar)).encode())
            )
            thread.start()
            thread.join()
        finally:
            os._exit(0)


def _limit(what: int, most: int) -> None:
    with suppress(ValueError, OSError):
        resource.setrlimit(what, (most, most))


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _limit(resource.RLIMIT_CORE, 0)
    threading.stack_size(STACK_BYTES)
    checker = Checker()
    for line in sys.stdin.buffer:
        grammar, seconds = json.loads(line)
        sys.stdout.write(json.dumps(checker.answer(grammar, seconds)) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
