"""A process that says whether a grammar compiles: `python -m headstart.engine.checking`.

Reads grammars from its standard input, a JSON string on a line, and answers each with the reason why it can't
be used, "" for none. A grammar can make the compiler run for hours, take all memory or overflow its stack:
then this process ends, by its own limits, and no other.
"""

from __future__ import annotations

import json
import resource
import signal
import sys
import threading
from contextlib import suppress

from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper

from headstart.engine.grammar import LIMITS, STACK_BYTES, GrammarError, Matcher, compiled, reason

CPU_SECONDS = 2.0
MEMORY_BYTES = 4 << 30
END = 256


class Bytes:
    """A vocabulary of single bytes: the least that a grammar can be compiled for."""

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
        """Why the grammar can't be used, "" where that isn't known. Tokens that it names are a model's, which
        says more when it compiles the grammar itself."""
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


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    threading.stack_size(STACK_BYTES)
    thread = threading.Thread(target=_answer)
    thread.start()
    thread.join()


def _answer() -> None:
    checker = Checker()
    for line in sys.stdin.buffer:
        # Of the processor's time, so that a busy machine makes nothing a fault; its signal ends the process.
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
        fault = checker.fault(json.loads(line))
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.write(json.dumps(fault) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
