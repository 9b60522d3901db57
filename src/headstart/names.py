"""Names of caches and models: safe as file names everywhere."""

from __future__ import annotations

import re
from typing import NamedTuple

from headstart.errors import InvalidName

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", re.ASCII)
# A folder of caches: a model's public ones, or those of one API key (model@key).
NAMESPACE = re.compile(rf"{NAME.pattern}(@{NAME.pattern})?", re.ASCII)


class CacheKey(NamedTuple):
    """Names one cache. `namespace` is the folder: a model, or `model@key` for the caches of an API key."""

    namespace: str
    name: str


def namespace_name(model: str, owner: str) -> str:
    return f"{model}@{owner}" if owner else model


def namespaces(own: str) -> list[str]:
    """The namespaces that requests of the namespace `own` may use: that one, then everyone's."""
    return list(dict.fromkeys((own, own.partition("@")[0])))


def check_name(name: str, *, param: str) -> str:
    """Returns `name`; raises InvalidName if it is no valid name."""
    if not NAME.fullmatch(name):
        raise InvalidName(
            f"{name[:80]!r} is not a name: 1 to 64 letters, digits, dots, underscores and hyphens, "
            "the first a letter or digit.",
            param=param,
        )
    return name
