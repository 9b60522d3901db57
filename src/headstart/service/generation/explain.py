"""Explains why a request started from a cache or didn't: the closest cache, and where the prompt differs from
it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from headstart.caches.entry import Entry, Form, MissReason
from headstart.prompt.chat import Message
from headstart.protocol import Source, Stats
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
    "prompt_differs": "the prompt is another, or differs from it too early",
    "cache_prompt_false": "the request says cache_prompt: false",
    "not_counted": "the NPU's runtime doesn't tell whether it used its state",
}


# Where the tokens that were not computed came from.
PLACES: dict[Source, str] = {
    "slot": "were still in memory",
    "memory": "were read from memory",
    "disk": "were read from the disk",
    "file": "were read from a cache's file",
}
# So many caches with the likeliest texts are compared by their tokens.
MOST_COMPARED = 4

Written = Callable[[int], bytes]


@dataclass(frozen=True)
class Closest:
    """The cache that a request names, or the one with the longest common prefix. `tokens`: the tokens of its
    state, rendered now. `changes`: differences between the fingerprints, in words."""

    entry: Entry
    tokens: list[int]
    changes: str


def longest_match(known: Iterable[Sequence[int]], tokens: Sequence[int]) -> int:
    """The length of the longest prefix that any of the known lists has in common with `tokens`. Cheap:
    compares a list only if it has the right token where the best so far ended."""
    best = 0
    for other in known:
        if best < len(other) and best < len(tokens) and other[best] == tokens[best]:
            best = max(best, common_prefix(other, tokens))
    return best


async def closest(
    model: TenantModel, form: Form, known: Iterable[Entry], texts: Iterable[str], prompt: list[int]
) -> Closest | None:
    """The known cache with the longest common prefix with the prompt, whose texts are given, too: caches with
    other texts are not rendered. None if there is none."""
    text = "".join(texts)
    candidates = [entry for entry in known if form in entry.content.forms]
    ranks = {id(entry): (*_likeness(_text(entry), text), entry.updated) for entry in candidates}
    candidates.sort(key=lambda entry: ranks[id(entry)], reverse=True)
    best, most = None, -1
    for entry in candidates[:MOST_COMPARED]:
        tokens = await prefix_tokens_if_any(model, form, entry.content)
        if (n := common_prefix(tokens, prompt)) > most:
            best, most = Closest(entry, tokens, model.fingerprint.differences(entry.fingerprint)), n
    return best


def texts_of(messages: Iterable[Message]) -> list[str]:
    return [str(message.get("content") or "") for message in messages]


def _text(entry: Entry) -> str:
    return "".join(texts_of(entry.content.prefix_messages))


def _likeness(one: str, other: str) -> tuple[int, int]:
    """The second value decides if all differ at the first character, by leading white space or a capital."""
    return common_text(one, other), common_text(one.lstrip().lower(), other.lstrip().lower())


def explained(
    found: Closest | None,
    tokens: Sequence[int],
    written: Written,
    *,
    named: bool,
    miss: MissReason | None,
    stats: Stats,
) -> Explanation:
    """`named`: the request named the cache; `miss`: then, why the cache was not used. `written`: the bytes of
    a token."""
    if found is None:
        reason = "The request names no cache, and there is none it could be compared with."
        reason += _reused(tokens, written, stats)
        return Explanation(None, 0, 0, len(tokens), None, "", "", "", reason)
    name, at = found.entry.name, common_prefix(found.tokens, list(tokens))
    differs = at < len(found.tokens)
    return Explanation(
        closest_cache=name,
        matched_tokens=at,
        cache_tokens=len(found.tokens),
        prompt_tokens=len(tokens),
        first_difference=at if differs else None,
        text_before=_read(tokens[max(at - ENOUGH, 0) : at], written)[-SHOWN:] if differs else "",
        cache_text=_read(found.tokens[at : at + ENOUGH], written)[:SHOWN] if differs else "",
        prompt_text=_read(tokens[at : at + ENOUGH], written)[:SHOWN] if differs else "",
        reason=(_named(found, miss, stats) if named else _unnamed(found, at))
        + (_difference(found, at, tokens, written) if differs else "")
        + ("" if named and miss is None else _reused(tokens, written, stats)),
    )


def _read(tokens: Sequence[int], written: Written) -> str:
    return b"".join(map(written, tokens)).decode(errors="replace")


def _named(found: Closest, miss: MissReason | None, stats: Stats) -> str:
    name = found.entry.name
    if miss is None:
        used = (
            f"{stats.cached_tokens} of {stats.prompt_tokens} tokens {PLACES.get(stats.source, 'were used')}."
        )
        return f"The request started from the state of {name!r}: {used}"
    words = WORDS.get(miss, miss.replace("_", " "))
    changes = f" ({found.changes})" if found.changes else ""
    return f"The state of {name!r} was not used: {words}{changes}."


def _unnamed(found: Closest, at: int) -> str:
    name = found.entry.name
    if at == len(found.tokens) > 0:
        return f"The request names no cache, but begins with all of {name!r}: use_cache would start from it."
    return f"The request names no cache. It begins like {name!r} for {at} tokens and then differs."


def _difference(found: Closest, at: int, tokens: Sequence[int], written: Written) -> str:
    """The first token that differs."""
    cached = _read(found.tokens[at : at + 1], written)
    if at == len(tokens):
        return f" The prompt ends before token {at} of the cache, {cached!r}."
    return f" Token {at} is {_read(tokens[at : at + 1], written)!r}, in the cache {cached!r}."


def _reused(tokens: Sequence[int], written: Written, stats: Stats) -> str:
    """How much of the prompt was not computed, and the first token that was."""
    if not 0 < stats.cached_tokens < len(tokens):
        return ""
    n = stats.cached_tokens
    first = _read(tokens[n : n + 1], written)
    place = PLACES.get(stats.source, "were used again")
    return f" {n} tokens {place}; the first that was computed is token {n}, {first!r}."
