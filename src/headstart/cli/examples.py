"""The demo's requests: Examples 1 to 3 of the guide, and a chat after a system prompt of a usual length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import ClassVar

from headstart.cli.client import Json


@dataclass(frozen=True)
class ExampleChat:
    """Messages that follow a system prompt."""

    messages: Sequence[Json]
    path: ClassVar[str] = "/v1/chat/completions"
    form: ClassVar[str] = "chat"

    def after(self, cache_name: str) -> Json:
        return {"messages": self.messages, "use_cache": cache_name}

    def in_full(self, prefix: str) -> Json:
        return {"messages": [{"role": "system", "content": prefix}, *self.messages]}

    def __str__(self) -> str:
        return "\n".join(f"{message['role']}: {message['content']}" for message in self.messages)


@dataclass(frozen=True)
class ExampleCompletion:
    """A text that follows another."""

    prompt: str
    path: ClassVar[str] = "/v1/completions"
    form: ClassVar[str] = "completion"

    def after(self, cache_name: str) -> Json:
        return {"prompt": self.prompt, "use_cache": cache_name}

    def in_full(self, prefix: str) -> Json:
        return {"prompt": prefix + self.prompt}

    def __str__(self) -> str:
        return self.prompt.strip()


@dataclass(frozen=True)
class Example:
    """`prefix`: the text cached as `cache_name`; `new`: the request after it."""

    title: str
    cache_name: str
    prefix: str
    new: ExampleChat | ExampleCompletion


CODING_ASSISTANT = (
    "You are an expert Python developer with 10 years of experience. You provide clear, concise code "
    "examples with explanations. You follow PEP 8 style guidelines and write idiomatic Python code."
)
PYTHON_CONTEXT = (
    "# Python utility functions\n# File: utils.py\n"
    "# Contains common helper functions for data processing\n\n"
    "import numpy as np\nimport pandas as pd\nfrom typing import List, Dict, Any\n\n"
)
GUIDE_EXAMPLES = (
    Example(
        "Example 1: coding assistant",
        "coding_assistant",
        CODING_ASSISTANT,
        ExampleChat([{"role": "user", "content": "Write a function to calculate fibonacci numbers"}]),
    ),
    Example(
        "Example 2: conversation of several turns",
        "coding_assistant",
        CODING_ASSISTANT,
        ExampleChat(
            [
                {"role": "user", "content": "What is a decorator?"},
                {
                    "role": "assistant",
                    "content": "A decorator is a function that modifies another function...",
                },
                {"role": "user", "content": "Show me an example"},
            ]
        ),
    ),
    Example(
        "Example 3: text completion",
        "python_context",
        PYTHON_CONTEXT,
        ExampleCompletion(
            "def process_dataframe(df: pd.DataFrame) -> pd.DataFrame:\n"
            '    """Clean and preprocess dataframe"""\n'
        ),
    ),
)


def long_example() -> Example:
    """A system prompt of about 1,100 tokens, the kind that caches are for."""
    guidelines = files("headstart.cli").joinpath("guidelines.txt").read_text(encoding="utf-8")
    question = "Write a function that returns the lines which two text files have in common."
    return Example(
        "Breakdown: a long system prompt",
        "coding_guidelines",
        guidelines,
        ExampleChat([{"role": "user", "content": question}]),
    )
