"""Loads the prompts of a model from its file."""

from __future__ import annotations

from headstart.prompt.prompts import Prompts
from headstart.prompt.template import NO_LIMIT, ChatTemplate, Limit
from headstart.prompt.tokenizer import load_tokenizer


def load_prompts(path: str, template: str | None = None, limit: Limit = NO_LIMIT) -> Prompts:
    """`template`: the source of a template to use instead of the model's own; `limit` as in ChatTemplate.
    Runs native code on the file, which may crash the process. Raises StartupError."""
    tokenizer = load_tokenizer(path)
    source = tokenizer.template if template is None else template
    return Prompts(tokenizer, ChatTemplate(source, tokenizer.bos_text, tokenizer.eos_text, limit))
