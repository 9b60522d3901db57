"""Explains why a request started from a cache or didn't: the closest cache, and where the prompt differs from
it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from headstart.caches.entry import Entry, Form, MissReason
from headstart.prompt.chat import Message
from headstart.protocol import Stats
from headstart.service.caching.builder import prefix_tokens_if_any
from headstart.service.interface.answer import Explanation
from headstart.service.models.tenant_model import TenantModel
from headstart.tokens import common_prefix, common_text

# Number of characters shown before the first difference, and of each text after it.
SHOWN = 40
# So many tokens surely make SHOWN characters: a character has at most four bytes.
ENOUGH = 4 * SHOWN

WORDS: dict[MissReason, str] = {
    "first_use": "its state had not been computed yet; it is now",
    "evicted": "its state had been given up for others; it is computed again",
    "corrupt": "its file is damaged; it is computed again",
    "model_changed": "it was computed with other weights; it is computed again",
    "engine_changed": "it was computed by another engine; it is computed again",
    "settings_changed": "it was computed with other settings; it is computed again",
    "template_changed": "the chat template makes other tokens of it now; it is computed again",
    "restore_failed": "the engine could not read its state; it is computed again",
    "too_short": "its prompt has too few tokens to keep any",
    "form_not_built": "it was created for the other endpoint only",
    "prompt_differs": "the prompt differs from it too early to use anything of it",
    "cache_prompt_false": "the request says cache_prompt: false",
    "not_counted": "the NPU's runtime doesn't tell whether it used its state",
}


@dataclass(frozen=True)
class Closest:
    """The cache that a request names, or the one with the longest common prefix. `tokens`: the tokens of its
    state, rendered now. `changes`: differences between the fingerprints, in words."""

    entry: Entry
    tokens: list[int]
    changes: str
    written: Callable[[int], bytes]


def longest_match(known: Iterable[Sequence[int]], tokens: Sequence[int]) -> int:
    """The length of the longest prefix that any of the known lists has in common with `tokens`. Cheap:
    compares a list only if it has the right token where the best so far ended."""
    best = 0
    for other in known:
        if best < len(other) and best < len(tokens) and other[best] == tokens[best]:
            best = max(best, common_prefix(other, tokens))
    return best


async def closest(
    model: TenantModel, form: Form, known: Iterable[Entry], texts: Iterable[str]
) -> Closest | None:
    """The known cache with the longest common prefix with the request's texts; None if there is none."""
    text = "".join(texts)
    candidates = [entry for entry in known if form in entry.content.forms]
    if not candidates:
        return None
    entry = max(candidates, key=lambda entry: (*_likeness(_text(entry), text), entry.updated))
    tokens = await prefix_tokens_if_any(model, form, entry.content)
    changes = model.fingerprint.differences(entry.fingerprint)
    return Closest(entry, tokens, changes, model.vocabulary.written)


def texts_of(messages: Iterable[Message]) -> list[str]:
    return [str(message.get("content") or "") for message in messages]


def _text(entry: Entry) -> str:
    return "".join(texts_of(entry.content.prefix_messages))


def _likeness(one: str, other: str) -> tuple[int, int]:
    """The second value decides if all differ at the first character, by leading white space or a capital."""
    return common_text(one, other), common_text(one.lstrip().lower(), other.lstrip().lower())


def explained(
    found: Closest | None, tokens: Sequence[int], *, named: bool, miss: MissReason | None, stats: Stats
) -> Explanation:
    """`named`: the request named the cache; `miss`: then, why the cache was not used."""
    if found is None:
        reason = "The request names no cache, and there is none it could be compared with."
        return Explanation(None, 0, 0, len(tokens), None, "", "", "", reason + _from_memory(stats))
    name, at = found.entry.name, common_prefix(found.tokens, list(tokens))
    differs = at < len(found.tokens)
    return Explanation(
        closest_cache=name,
        matched_tokens=at,
        cache_tokens=len(found.tokens),
        prompt_tokens=len(tokens),
        first_difference=at if differs else None,
        text_before=_read(tokens[max(at - ENOUGH, 0) : at], found)[-SHOWN:] if differs else "",
        cache_text=_read(found.tokens[at : at + ENOUGH], found)[:SHOWN] if differs else "",
        prompt_text=_read(tokens[at : at + ENOUGH], found)[:SHOWN] if differs else "",
        reason=_named(found, miss, stats) if named else _unnamed(found, at, stats),
    )


def _read(tokens: Sequence[int], found: Closest) -> str:
    return b"".join(map(found.written, tokens)).decode(errors="replace")


def _named(found: Closest, miss: MissReason | None, stats: Stats) -> str:
    name = found.entry.name
    if miss is None:
        where = "in memory already" if stats.source == "slot" else "read from its file"
        used = f"{stats.cached_tokens} of {stats.prompt_tokens} tokens were not computed."
        return f"The request started from the state of {name!r}, {where}: {used}"
    words = WORDS.get(miss, miss.replace("_", " "))
    changes = f" ({found.changes})" if found.changes else ""
    return f"The state of {name!r} was not used: {words}{changes}.{_from_memory(stats)}"


def _unnamed(found: Closest, at: int, stats: Stats) -> str:
    name = found.entry.name
    if at == len(found.tokens) > 0:
        text = f"The request names no cache, but begins with all of {name!r}: use_cache would start from it."
    else:
        text = f"The request names no cache. It begins like {name!r} for {at} tokens and then differs."
    return text + _from_memory(stats)


def _from_memory(stats: Stats) -> str:
    if not stats.cached_tokens:
        return ""
    return f" {stats.cached_tokens} tokens were still in memory from earlier requests."
