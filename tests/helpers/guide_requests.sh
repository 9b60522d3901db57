# The requests of the guide to binary caches, in its order and as printed there. A line `### …` names the
# request below it. Added: `old_cache`, so that there is one to delete; a message where the guide says `[...]`;
# curl where it gives only method, path and body.

### create coding_assistant
curl -X POST http://localhost:8080/v1/cache/qwen3-0.6b \
  -H 'Content-Type: application/json' \
  -d '{
    "cache_name": "coding_assistant",
    "prompt": "You are an expert Python developer with 10 years of experience. You provide clear, concise code examples with explanations. You follow PEP 8 style guidelines and write idiomatic Python code."
  }'

### chat with coding_assistant
curl -X POST http://localhost:8080/v1/chat/completions \
  -H 'Content-Type: application/json' \
  -d '{
    "model": "qwen3-0.6b",
    "use_cache": "coding_assistant",
    "messages": [
      {"role": "user", "content": "Write a function to calculate fibonacci numbers"}
    ],
    "max_tokens": 200
  }'

### several turns with coding_assistant
curl -X POST http://localhost:8080/v1/chat/completions \
  -H 'Content-Type: application/json' \
  -d '{
    "model": "qwen3-0.6b",
    "use_cache": "coding_assistant",
    "messages": [
      {"role": "user", "content": "What is a decorator?"},
      {"role": "assistant", "content": "A decorator is a function that modifies another function..."},
      {"role": "user", "content": "Show me an example"}
    ]
  }'

### create python_context
curl -X POST http://localhost:8080/v1/cache/qwen3-0.6b \
  -H 'Content-Type: application/json' \
  -d '{
    "cache_name": "python_context",
    "prompt": "# Python utility functions\n# File: utils.py\n# Contains common helper functions for data processing\n\nimport numpy as np\nimport pandas as pd\nfrom typing import List, Dict, Any\n\n"
  }'

### complete with python_context
curl -X POST http://localhost:8080/v1/completions \
  -H 'Content-Type: application/json' \
  -d '{
    "model": "qwen3-0.6b",
    "use_cache": "python_context",
    "prompt": "def process_dataframe(df: pd.DataFrame) -> pd.DataFrame:\n    \"\"\"Clean and preprocess dataframe\"\"\"\n",
    "max_tokens": 150
  }'

### create debug_helper
curl -X POST http://localhost:8080/v1/cache/qwen3-0.6b \
  -d '{"cache_name": "debug_helper", "prompt": "You are a debugging expert..."}'

### create code_review
curl -X POST http://localhost:8080/v1/cache/qwen3-0.6b \
  -d '{"cache_name": "code_review", "prompt": "You are a code reviewer..."}'

### create refactoring
curl -X POST http://localhost:8080/v1/cache/qwen3-0.6b \
  -d '{"cache_name": "refactoring", "prompt": "You are a refactoring specialist..."}'

### chat with debug_helper
curl -X POST http://localhost:8080/v1/chat/completions \
  -d '{"model": "qwen3-0.6b", "use_cache": "debug_helper", "messages": [{"role": "user", "content": "Why is my list empty?"}]}'

### chat with code_review
curl -X POST http://localhost:8080/v1/chat/completions \
  -d '{"model": "qwen3-0.6b", "use_cache": "code_review", "messages": [{"role": "user", "content": "x = x + 1"}]}'

### create system
curl -X POST http://localhost:8080/v1/cache/qwen3-0.6b \
  -d '{"cache_name": "system", "prompt": "..."}'

### chat with system
curl -X POST http://localhost:8080/v1/chat/completions \
  -d '{"model": "qwen3-0.6b", "use_cache": "system", "messages": [{"role": "user", "content": "Hello"}]}'

### create old_cache
curl -X POST http://localhost:8080/v1/cache/qwen3-0.6b \
  -d '{"cache_name": "old_cache", "prompt": "You are out of date."}'

### list
curl http://localhost:8080/v1/cache/qwen3-0.6b

### delete old_cache
curl -X DELETE http://localhost:8080/v1/cache/qwen3-0.6b/old_cache

### startup.py
# startup.py
import requests

CACHES = {
    "system": "You are a helpful AI assistant...",
    "coding": "You are an expert Python developer...",
    "debug": "You are a debugging expert..."
}

for name, prompt in CACHES.items():
    requests.post(
        "http://localhost:8080/v1/cache/qwen3-0.6b",
        json={"cache_name": name, "prompt": prompt}
    )
