"""Conversations as a client holds them, with the number of tokens that each turn may evaluate."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from headstart.tokens import common_prefix
from servers import Json, RunningServer, said

# What the engine evaluates in one step at most, unless it was measured.
CHUNK = 64
# Between checkpoints, where states can't be cut.
STEP = 1024
# Longer than from one checkpoint to the next.
SYSTEM = "You keep the lighthouse. " * 56
LONG = "And which of the ships that you saw is the one I asked for? " * 20
# A toy model, and what may be evaluated again if a turn doesn't go on from where the last one ended.
Kind = tuple[str, int]
CUT: Kind = ("toy:eos=0", 0)
# A model whose states can't be cut, as those of recurrent layers.
WHOLE: Kind = ("toy:eos=0,can_cut=0", STEP)


@dataclass(frozen=True)
class Turn:
    """`new`: tokens of the prompt that no earlier turn of the chat had, or that went with the answer's text
    after one that was not as the model wrote it. `allowed`: what may be evaluated besides. The others: as the
    server counts them."""

    text: str
    new: int
    allowed: int
    evaluated: int
    cached: int
    source: str

    @property
    def is_small(self) -> bool:
        return self.evaluated <= self.new + self.allowed


@dataclass
class Chat:
    """A conversation with a server. `more`: further fields of each request. `back`: what may be evaluated
    again if a turn doesn't go on from where the last one ended: tokens between checkpoints. `known`: the
    tokens of all that was computed for the last turn. `last`: fields of the last request alone."""

    server: RunningServer
    system: str = ""
    model: str = "toy"
    key: str = ""
    back: int = 0
    more: Json = field(default_factory=dict)
    messages: list[Json] = field(default_factory=list)
    known: list[int] = field(default_factory=list)
    ends_known: bool = True
    last: Json = field(default_factory=dict)

    def ask(self, text: str, **more: Any) -> Turn:
        """One more question; the answer belongs to the conversation from then on."""
        self.messages.append({"role": "user", "content": text})
        return self.answer(**more)

    def answer(self, **more: Any) -> Turn:
        """The answer to the last message."""
        self.last = more
        body = self.body(**more)
        response = self.server.http.post("/v1/chat/completions", json=body, headers=self.headers)
        assert response.status_code == 200, response.text
        reply = response.json()
        tokens = self.tokens(body["messages"])
        shared, held = common_prefix(self.known, tokens), len(self.known)
        allowed = CHUNK + (self.back if shared < held or not self.ends_known else 0)
        self.said(said(reply), reply["usage"]["completion_tokens"])
        timings = reply["timings"]
        counts = timings["prompt_n"], timings["cache_n"], timings["cache_source"]
        return Turn(said(reply), len(tokens) - shared, allowed, *counts)

    def said(self, text: str, n_tokens: int | None = None) -> None:
        """Adds an answer; `n_tokens`: of how many tokens it was made, if that is known. An answer of other
        tokens than its text has is new in the next turn."""
        sent = self.sent
        self.messages.append({"role": "assistant", "content": text})
        asked, now = self.tokens(sent), self.tokens(self.sent)
        shared = common_prefix(asked, now)
        written = self._tokens(text)
        self.ends_known = n_tokens == len(written) and now[shared : shared + len(written)] == written
        self.known = now[: shared + len(written)] if self.ends_known else asked

    def body(self, **more: Any) -> Json:
        fields = {"temperature": 0, "max_tokens": 12, **self.more, **more}
        return {"model": self.model, "messages": self.sent, **fields}

    @property
    def sent(self) -> list[Json]:
        return [*([{"role": "system", "content": self.system}] if self.system else []), *self.messages]

    def again(self, **more: Any) -> Turn:
        """Another answer to the last question, in place of the first."""
        del self.messages[-1]
        return self.answer(**more)

    def edited(self, text: str, **more: Any) -> Turn:
        """The answer to another last question."""
        del self.messages[-2:]
        return self.ask(text, **more)

    def alone(self) -> str:
        """The last answer as the server gives it when nothing is reused."""
        last = self.messages.pop()
        body = self.body(**self.last, cache_prompt=False)
        self.messages.append(last)
        response = self.server.http.post("/v1/chat/completions", json=body, headers=self.headers)
        assert response.status_code == 200, response.text
        return said(response.json())

    def tokens(self, messages: list[Json]) -> list[int]:
        return self._tokens(self._post("/apply-template", messages=messages)["prompt"], add_special=True)

    def _tokens(self, text: str, **more: Any) -> list[int]:
        found: list[int] = self._post("/tokenize", content=text, **more)["tokens"]
        return found

    @property
    def headers(self) -> dict[str, str]:
        return {"authorization": f"Bearer {self.key}"} if self.key else {}

    def _post(self, path: str, **body: Any) -> Json:
        response = self.server.http.post(path, json={"model": self.model, **body}, headers=self.headers)
        assert response.status_code == 200, response.text
        answer: Json = response.json()
        return answer


def right(chat: Chat, turn: Turn) -> None:
    """Requires that a turn, the last of the chat, was small, and that its text is right."""
    assert turn.is_small, turn
    assert turn.text == chat.alone(), turn
