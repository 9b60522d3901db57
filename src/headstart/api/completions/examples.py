"""Example requests, most of them from the guide to binary caches."""

from __future__ import annotations

from typing import Any

FRAME = 'def process_dataframe(df: pd.DataFrame) -> pd.DataFrame:\n    """Clean and preprocess dataframe"""\n'
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}},
            "required": ["city"],
        },
    },
}


def _user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


# Titles and bodies, keyed by method and path.
EXAMPLES: dict[tuple[str, str], dict[str, Any]] = {
    ("post", "/v1/chat/completions"): {
        "With a cache": {
            "model": "smollm2",
            "use_cache": "coding_assistant",
            "messages": _user("Write a function to calculate fibonacci numbers"),
            "max_tokens": 200,
        },
        "Several turns": {
            "model": "smollm2",
            "use_cache": "coding_assistant",
            "messages": [
                *_user("What is a decorator?"),
                {
                    "role": "assistant",
                    "content": "A decorator is a function that modifies another function...",
                },
                *_user("Show me an example"),
            ],
        },
        "Streamed": {
            "model": "smollm2",
            "messages": _user("Why is my list empty?"),
            "stream": True,
            "stream_options": {"include_usage": True},
        },
        "A tool": {"model": "smollm2", "messages": _user("What is the weather in Oslo?"), "tools": [WEATHER]},
    },
    ("post", "/v1/completions"): {
        "With a cache": {
            "model": "smollm2",
            "use_cache": "python_context",
            "prompt": FRAME,
            "max_tokens": 150,
        }
    },
}
