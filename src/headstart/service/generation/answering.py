"""One answer of a request: from tokens to deltas."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import pairwise
from time import monotonic

from headstart.prompt.answer_parts import AnswerPart, Parser
from headstart.prompt.detokenizer import AnswerDetokenizer
from headstart.prompt.vocabulary import Vocabulary
from headstart.protocol import SequenceEnd, Token
from headstart.service.interface.answer import Choice, Delta, Ended, FinishReason, TokenLogprob


class Answering:
    """`raw_text`: the text so far, as the model wrote it. `whole`: with `sums_up`, the sum of the deltas so
    far. `finish_reason`: valid once `ended`. `stopped`: a stop string was found; further tokens are
    ignored."""

    def __init__(
        self,
        choice: int,
        vocabulary: Vocabulary,
        text: AnswerDetokenizer,
        parser: Parser,
        *,
        sums_up: bool = False,
    ) -> None:
        self.choice = choice
        self.vocabulary = vocabulary
        self.text = text
        self.parser = parser
        self.raw_text = ""
        self.n_tokens = 0
        # When each token came, by the monotonic clock.
        self.times: list[float] = []
        self.has_called = False
        self.ended = False
        self.finish_reason: FinishReason = "stop"
        self.sums_up = sums_up
        self.whole = Choice(choice)
        self._pending_logprobs: list[TokenLogprob] = []

    @property
    def stopped(self) -> bool:
        return self.text.stopped

    @property
    def gaps(self) -> Iterable[float]:
        """Seconds between one token and the next."""
        return (later - earlier for earlier, later in pairwise(self.times))

    def add(self, token: Token) -> Iterator[Delta]:
        self.n_tokens += 1
        self.times.append(monotonic())
        if token.logprob is not None:
            self._pending_logprobs.append(self._logprob(token, token.logprob))
        yield from self._deltas(self.text.add(token.token))

    def end(self, reason: SequenceEnd) -> Iterator[Delta | Ended]:
        """The text that was held back, and the end."""
        text = self.text.end()
        self.raw_text += text
        left = [*self.parser.add(text), *self.parser.end()]
        yield from self._with_logprobs(left, self._complete_logprobs(all_of_them=not self.stopped))
        self.ended = True
        if reason == "length" and not self.stopped:
            self.finish_reason = "length"
        elif self.has_called:
            self.finish_reason = "tool_calls"
        yield Ended(
            self.choice, self.finish_reason, self.text.found if self.finish_reason == "stop" else None
        )

    def _deltas(self, text: str) -> Iterator[Delta]:
        self.raw_text += text
        yield from self._with_logprobs(self.parser.add(text), self._complete_logprobs())

    def _with_logprobs(self, parts: list[AnswerPart], logprobs: list[TokenLogprob]) -> Iterator[Delta]:
        for part in parts or ([AnswerPart()] if logprobs else []):
            self.has_called = self.has_called or part.call is not None
            delta = Delta(self.choice, part.text, part.reasoning, part.call, logprobs)
            if self.sums_up:
                self.whole.add(delta)
            yield delta
            logprobs = []

    def _complete_logprobs(self, *, all_of_them: bool = False) -> list[TokenLogprob]:
        """Removes and returns the logprobs of tokens whose text was returned; those of a stop string are
        never returned."""
        n = len(self.raw_text)
        complete = [each for each in self._pending_logprobs if all_of_them or each.offset < n]
        self._pending_logprobs = self._pending_logprobs[len(complete) :]
        return complete

    def _logprob(self, token: Token, logprob: float) -> TokenLogprob:
        written = self.vocabulary.written
        top = [(written(other), p) for other, p in token.top]
        return TokenLogprob(written(token.token), logprob, top, self.text.n_characters)
