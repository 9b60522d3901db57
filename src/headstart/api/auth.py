"""API keys: authentication and the ranks that it gives."""

from __future__ import annotations

import hashlib
from hmac import compare_digest
from typing import Literal

from fastapi import Request
from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from headstart.api import errors
from headstart.config.settings import Settings
from headstart.errors import AdminRequired, StartupError, Unauthorized

# Routes that need no key. The API's description reveals nothing about this server.
PAGES = "/docs/files"
PUBLIC = ("/health", "/openapi.json", "/docs")

# admin: may use other owners' and change public objects; every request is, if no keys are configured.
# tenant: has a key that is no admin's. stranger: has no valid key and requests a public route.
Rank = Literal["admin", "tenant", "stranger"]


class Keyring:
    """The hashes of the configured API keys and their owners. Raises StartupError for a key that can't be
    read, is empty or equals another."""

    def __init__(self, settings: Settings) -> None:
        self.caches = {name: key.cache for name, key in settings.keys.items()}
        self.admins = settings.admins
        self._owners: dict[bytes, str] = {}
        for name, key in settings.keys.items():
            digest = _digest(key.secret(name, settings.folder))
            if digest in self._owners:
                raise StartupError(f"The API keys {self._owners[digest]!r} and {name!r} are the same.")
            self._owners[digest] = name

    def __bool__(self) -> bool:
        return bool(self._owners)

    def owner(self, secret: str) -> str | None:
        """The key's owner, or None. Takes the same time for right and wrong keys."""
        presented = _digest(secret)
        owners = [name for digest, name in self._owners.items() if compare_digest(digest, presented)]
        return owners[0] if owners else None


class Keys:
    """Refuses requests without a valid key, except on public routes, if keys are configured. Must run after a
    route's prefix was removed, because it checks the path."""

    def __init__(self, app: ASGIApp, keyring: Keyring) -> None:
        self.app = app
        self.keyring = keyring

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        state = scope.setdefault("state", {})
        if not self.keyring:
            state["rank"] = "admin"
        else:
            secret = _secret(Headers(scope=scope))
            owner = self.keyring.owner(secret) if secret else None
            if owner is None and not _is_public(scope["path"]):
                await _refused(secret)(scope, receive, send)
                return
            if owner is not None:
                state["owner"] = owner
                state["default_cache"] = self.keyring.caches[owner]
                state["rank"] = "admin" if owner in self.keyring.admins else "tenant"
        await self.app(scope, receive, send)


def _refused(secret: str) -> Response:
    text = "This is no API key of this server." if secret else "An API key is needed."
    error = Unauthorized(f"{text} Send it as `Authorization: Bearer KEY`.")
    return errors.response(error, {"www-authenticate": "Bearer"})


def _is_public(path: str) -> bool:
    return path in PUBLIC or path.startswith(f"{PAGES}/")


def rank(request: Request) -> Rank:
    """The rank of the request: how far it may see and change objects of other owners."""
    found: Rank = getattr(request.state, "rank", "stranger")
    return found


def check_admin(request: Request, what: str) -> None:
    """Raises AdminRequired unless the key is an admin's or there are no keys. `what`: its subject."""
    if rank(request) != "admin":
        raise AdminRequired(what)


def _secret(headers: Headers) -> str:
    scheme, _, token = headers.get("authorization", "").partition(" ")
    return token.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")


def _digest(secret: str) -> bytes:
    return hashlib.sha256(secret.encode()).digest()
