"""Names of caches and models: safe as file names everywhere."""

from __future__ import annotations

import re
from typing import NamedTuple

from headstart.errors import InvalidName

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", re.ASCII)
NAMESPACE = re.compile(rf"{NAME.pattern}(@{NAME.pattern})?", re.ASCII)


class Namespace(str):
    """Names the folder of one owner's caches of one model: `model@owner`, or `model` for the public ones.
    `owner` is the name of an API key."""

    __slots__ = ()

    @classmethod
    def of(cls, model: str, owner: str = "") -> Namespace:
        return cls(f"{model}@{owner}" if owner else model)

    @property
    def model(self) -> str:
        # Not a Namespace, as `partition` alone would return where there is no owner.
        return str(self.partition("@")[0])

    @property
    def owner(self) -> str:
        return self.partition("@")[2]

    @property
    def visible(self) -> tuple[Namespace, ...]:
        """The namespaces that its owner's requests may use: this one, then the public one."""
        return (self, Namespace(self.model)) if self.owner else (self,)

    @property
    def is_valid(self) -> bool:
        """Whether a cache directory may have a folder of this name."""
        return NAMESPACE.fullmatch(self) is not None


class CacheKey(NamedTuple):
    """Names one cache."""

    namespace: Namespace
    name: str

    @property
    def is_valid(self) -> bool:
        """Whether a cache may have this key."""
        return self.namespace.is_valid and NAME.fullmatch(self.name) is not None


def check_name(name: str, *, param: str) -> str:
    """Returns `name`; raises InvalidName if it is no valid name."""
    if not NAME.fullmatch(name):
        raise InvalidName(
            f"{name[:80]!r} is not a name: 1 to 64 letters, digits, dots, underscores and hyphens, "
            "the first a letter or digit.",
            param=param,
        )
    return name
