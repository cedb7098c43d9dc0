"""Who may ask: hosts that requests are for, pages that they come from, and a key.

A page of another site can make a browser send requests to this machine: straight (the request then carries that
site's ``Origin``), or after pointing a name of its own at this machine's address (the request's ``Host`` is then that
name). Both are refused here, whatever the framework around does.
"""

from __future__ import annotations

import hmac
import ipaddress
from collections.abc import Collection
from typing import Any
from urllib.parse import urlsplit

from .errors import error_response

OPEN_PATHS = frozenset({"/", "/health", "/ping"})
"""Paths that need no key: the page, which asks for one, and what monitors look at."""


def _header(scope: Any, name: bytes) -> str | None:
    return next((value.decode("latin-1") for key, value in scope["headers"] if key == name), None)


def _host_name(host: str) -> str | None:
    """The name in ``name:port``, lower-case, an IPv6 address without its brackets; None for what is no host."""
    try:
        return (urlsplit(f"//{host}").hostname or "").rstrip(".") or None
    except ValueError:
        return None


class Guard:
    """ASGI middleware: answers 403 to requests for other hosts, and to those from other sites' pages.

    Args:
        hosts: names that a request's ``Host`` may have; "*" for any. An address needs no leave: it cannot be pointed
            elsewhere as a name can.
        origins: of pages that may ask, such as "https://example.com", beside those that this server gave out itself;
            "*" for any.
    """

    def __init__(self, app: Any, hosts: Collection[str], origins: Collection[str]) -> None:
        self.app, self.origins = app, frozenset(origins)
        self.hosts = frozenset(host.lower() for host in hosts)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http" and (message := self._refusal(scope)) is not None:
            return await error_response(403, message)(scope, receive, send)
        return await self.app(scope, receive, send)

    def _refusal(self, scope: Any) -> str | None:
        host, origin = _header(scope, b"host") or "", _header(scope, b"origin")
        if not self._known(_host_name(host)):
            return f"this server does not answer for the host {host[:100]!r}; --allowed-host lets it"
        if origin is None or origin.partition("://")[2].lower() == host.lower():
            return None
        if not self.origins & {"*", origin}:
            return f"this server does not answer pages of {origin[:100]!r}; --allowed-origin lets it"
        return None

    def _known(self, name: str | None) -> bool:
        if name is None or self.hosts & {"*", name}:
            return name is not None
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True


class KeyCheck:
    """ASGI middleware: answers 401 to requests without one of the keys, as ``Authorization: Bearer KEY``.

    Keys are compared in a time that does not depend on how much of one is right.

    Args:
        keys: any of which will do; none: everyone may ask.
    """

    def __init__(self, app: Any, keys: Collection[str]) -> None:
        self.app, self.keys = app, [key.encode() for key in keys]

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if not self.keys or scope["type"] != "http" or scope["path"] in OPEN_PATHS or self._right(scope):
            return await self.app(scope, receive, send)
        refused = error_response(
            401,
            "expected an API key of this server, as the header 'Authorization: Bearer KEY'",
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )
        return await refused(scope, receive, send)

    def _right(self, scope: Any) -> bool:
        kind, _, given = (_header(scope, b"authorization") or "").partition(" ")
        said = given.strip().encode("latin-1")
        equal = [hmac.compare_digest(said, key) for key in self.keys]  # each, whichever is right
        return kind.lower() == "bearer" and any(equal)
