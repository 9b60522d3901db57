"""Prompts of a wanted length, each one new: natural sentences in random order, the same for every server."""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib.resources import files
from random import Random

from headstart.prompt.prompts import Prompts
from headstart.prompt.template import ChatTemplate
from headstart.prompt.tokenizer import load_tokenizer

SYSTEM = "system"
USER = "user"
# One token each in most vocabularies.
FILLERS = ("and", "or", "the", "not", "if")


@dataclass(frozen=True)
class Prompt:
    """A system prompt. `tokens`: what a chat that begins with it has in common with every other that does."""

    name: str
    text: str
    tokens: int


class Writer:
    """Writes with the tokenizer and chat template of the model at `path`. The same seed, the same texts."""

    def __init__(self, path: str, seed: int = 1) -> None:
        tokenizer = load_tokenizer(path)
        template = ChatTemplate(tokenizer.template, tokenizer.bos_text, tokenizer.eos_text)
        self.prompts = Prompts(tokenizer, template)
        self._random = Random(seed)
        text = files("headstart.cli").joinpath("guidelines.txt").read_text(encoding="utf-8")
        self._lines = [line for line in text.splitlines() if line.strip()]
        self._words = sorted(set(re.findall(r"\b[a-z]{4,}\b", text)))
        self._written = 0
        self._openers: list[str] = []

    def prompt(self, n_tokens: int) -> Prompt:
        """Of at most `n_tokens` and nearly as many; it differs from all others in its first word."""
        self._written += 1
        words = [f"{self._opener()} {self._written}:"]
        while self._opening(words) < n_tokens:
            words += self._random.choice(self._lines).split()
        while len(words) > 1 and self._opening(words) > n_tokens:
            words.pop()
        while self._opening(longer := [*words, self._random.choice(FILLERS)]) <= n_tokens:
            words = longer
        return Prompt(f"bench-{self._written}", " ".join(words), self._opening(words))

    def question(self, n_tokens: int) -> str:
        """A question that adds at most `n_tokens` to a system prompt, the template's own included. It differs
        in its first word from the questions before it, so that nothing of it can have been computed."""
        words = [self._opener().capitalize()]
        ending = "Write a long story about it."
        while self._added(f"{' '.join(words)}. {ending}") < n_tokens:
            words.append(self._random.choice(self._words))
        while len(words) > 1 and self._added(f"{' '.join(words)}. {ending}") > n_tokens:
            words.pop()
        return f"{' '.join(words)}. {ending}"

    def chat_tokens(self, prompt: Prompt, question: str) -> list[int]:
        return self.prompts.chat(messages(prompt.text, question))

    def openings(self, prompt: Prompt) -> list[list[int]]:
        """The tokens of the prompt in its forms: in a chat, and as a text."""
        system = [{"role": SYSTEM, "content": prompt.text}]
        return [self.prompts.chat_opening(system), self.prompts.text_opening(prompt.text)]

    def _opener(self) -> str:
        if not self._openers:
            self._openers = self._random.sample(self._words, len(self._words))
        return self._openers.pop()

    def _opening(self, words: list[str]) -> int:
        return len(self.prompts.chat_opening([{"role": SYSTEM, "content": " ".join(words)}]))

    def _added(self, question: str) -> int:
        before = self.prompts.chat_opening([{"role": SYSTEM, "content": "x"}])
        return len(self.prompts.chat(messages("x", question))) - len(before)


def messages(system: str, question: str) -> list[dict[str, str]]:
    return [{"role": SYSTEM, "content": system}, {"role": USER, "content": question}]
