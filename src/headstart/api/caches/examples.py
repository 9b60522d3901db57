"""Example requests from the guide to binary caches."""

from __future__ import annotations

from typing import Any

ASSISTANT = (
    "You are an expert Python developer with 10 years of experience. You provide clear, concise code "
    "examples with explanations. You follow PEP 8 style guidelines and write idiomatic Python code."
)
CONTEXT = (
    "# Python utility functions\n# File: utils.py\n# Contains common helper functions for data processing\n\n"
    "import numpy as np\nimport pandas as pd\nfrom typing import List, Dict, Any\n\n"
)

# Titles and bodies, keyed by method and path.
EXAMPLES: dict[tuple[str, str], dict[str, Any]] = {
    ("post", "/v1/cache/{model}"): {
        "A system prompt": {"cache_name": "coding_assistant", "prompt": ASSISTANT},
        "The beginning of a file": {"cache_name": "python_context", "prompt": CONTEXT},
    },
}
