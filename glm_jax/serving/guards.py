"""Middleware that checks each request before it is read, and counts and times it.

It checks the host name that the request was sent to, the page that sent it, its key and its size.
"""

import asyncio
import ipaddress
import logging
import socket
import time
import urllib.parse
from collections.abc import Collection, Sequence

from fastapi import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from glm_jax.errors import UserError
from glm_jax.serving import events
from glm_jax.serving.errors import UnavailableError, error_response, refused
from glm_jax.serving.service import Service

_OPEN = ("/", "/health", "/ready", "/metrics", "/openapi.json")
_LOCAL = ("localhost", "127.0.0.1", "::1")


class HostError(UserError):
    """A host name or proxy address that is not one."""


class Hosts:
    """Host names that requests may be sent to.

    A web page's own name can be made to resolve to this machine (DNS rebinding); its requests
    then have that name in their Host header.
    """

    def __init__(self, names: Collection[str], any_address: bool = False):
        """
        Args:
          names: in any case, IPv6 addresses without brackets; `*.example.org` for all names below
            example.org, `*` for all names.
          any_address: also accept every IP address, which no page but the server's own can have
            as its name.
        """
        self._names = frozenset(name.lower().strip("[]") for name in names)
        self._any_address = any_address or "*" in self._names

    @classmethod
    def of(cls, host: str, more: Sequence[str] = ()) -> "Hosts":
        """Return the names of a server that listens on an address.

        Args:
          host: name or address that it listens on.
          more: further names.

        Raises:
          HostError: one of `more` is not a host name.
        """
        for name in more:
            if "/" in name or (":" in name and not _is_address(name.strip("[]"))):
                raise HostError(f"--allowed_host={name}: expected a name without scheme or port")
        names = {host, *more}
        try:
            is_everywhere = ipaddress.ip_address(host).is_unspecified
        except ValueError:
            is_everywhere = False
        if is_everywhere:
            names |= {*_LOCAL, socket.gethostname(), socket.getfqdn()}
        elif host in _LOCAL or host.startswith("127."):
            names |= {*_LOCAL}
        return cls(names, is_everywhere)

    def has(self, header: str) -> bool:
        """Return whether a Host header names the server, with any port."""
        try:
            parts = urllib.parse.urlsplit(f"//{header}")
            name = (parts.hostname or "").removesuffix(".")
        except ValueError:
            return False
        if parts.netloc != header or "@" in header:
            return False
        if "*" in self._names or name in self._names:
            return True
        if self._any_address and _is_address(name):
            return True
        parents = (name[i:] for i, letter in enumerate(name) if letter == ".")
        return any(f"*{parent}" in self._names for parent in parents)


def check_proxies(addresses: Sequence[str]) -> None:
    """Raise HostError unless all are IP addresses or networks."""
    for address in addresses:
        try:
            ipaddress.ip_network(address)
        except ValueError as error:
            message = f"--trusted_proxy={address}: expected an IP address or network ({error})"
            raise HostError(message) from error


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


class Guard:
    """Refuses requests that are sent to another host name, by another site's page, without a valid
    key, or too large; turns unexpected errors into responses; counts and times all requests."""

    def __init__(
        self, app: ASGIApp, service: Service, hosts: Hosts, head_bytes: int, origins: Sequence[str]
    ):
        """
        Args:
          head_bytes: maximum size of request line and headers.
          origins: origins of other pages whose scripts may send requests.
        """
        self._app, self._service = app, service
        self._hosts, self._head_bytes, self._origins = hosts, head_bytes, frozenset(origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status = time.perf_counter(), 0

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        # HEAD is GET without the body, which uvicorn leaves out.
        inner = {**scope, "method": "GET"} if scope["method"] == "HEAD" else scope
        try:
            if (refusal := self._refusal(scope)) is not None:
                await error_response(refusal)(scope, receive, sending)
            else:
                await self._app(inner, self._limited(receive), sending)
        except asyncio.CancelledError:
            # The server ends and cancels unfinished requests; uvicorn would log a traceback.
            if not status:
                error = UnavailableError("the server is going down: ask another one")
                await error_response(error)(scope, receive, sending)
        except Exception as error:
            logging.getLogger(__name__).error(
                "%s %r", scope["method"], scope["path"], exc_info=error
            )
            if status:  # the client must not take a partial answer for the whole
                raise
            await error_response(error)(scope, receive, sending)
        finally:
            route = inner.get("route")
            endpoint = "other" if route is None else route.path
            metrics = self._service.metrics
            metrics.requests.labels(endpoint, str(status or 499)).inc()
            seconds = time.perf_counter() - began
            metrics.request_seconds.labels(endpoint).observe(seconds)
            if self._service.settings.logs_requests:
                place = (scope.get("client") or ("-",))[0]
                named = scope["method"], scope["path"], status or 499, seconds
                events.log.info("request from %s: %s %r: %d in %.3f s", place, *named)

    def _refusal(self, scope: Scope) -> HTTPException | None:
        headers = dict(scope["headers"])
        # The two disagree on where the body ends and the next request begins.
        if b"transfer-encoding" in headers and b"content-length" in headers:
            message = "both Content-Length and Transfer-Encoding: send one"
            return refused(400, message, headers={"Connection": "close"})
        return (
            self._check_head(scope)
            or self._check_names(scope, headers)
            or self._check_key(scope, headers.get(b"authorization", b""))
            or self._check_length(headers.get(b"content-length", b"0"))
        )

    def _check_head(self, scope: Scope) -> HTTPException | None:
        size = len(scope["raw_path"]) + len(scope["query_string"])
        size += sum(len(name) + len(value) + 4 for name, value in scope["headers"])
        if size <= self._head_bytes:
            return None
        message = f"the headers are over {self._head_bytes} bytes: send fewer"
        return refused(431, message)

    def _check_names(self, scope: Scope, headers: dict[bytes, bytes]) -> HTTPException | None:
        host = headers.get(b"host", b"").decode("latin-1")
        # HTTP/1.0 needs no Host header; browsers always send one.
        if host and not self._hosts.has(host):
            message = f"{host[:99]!r} is not this server's name: add it by --allowed_host"
            return refused(403, message, code="host_not_allowed")
        for name, value in scope["headers"]:
            origin = value.decode("latin-1")
            if name == b"origin" and origin and not self._is_allowed(origin, host):
                message = f"pages of {origin[:99]!r} may not send requests: see --cors_origin"
                return refused(403, message, code="origin_not_allowed")
        return None

    def _is_allowed(self, origin: str, host: str) -> bool:
        # Schemes are not compared: a proxy may have ended TLS.
        is_ours = bool(host) and origin.partition("://")[2].lower() == host.lower()
        return is_ours or not {origin, "*"}.isdisjoint(self._origins)

    def _check_key(self, scope: Scope, authorization: bytes) -> HTTPException | None:
        path, keys = scope["path"], self._service.settings.keys
        is_open = path in _OPEN or path.startswith("/page/") or scope["method"] == "OPTIONS"
        if keys is None or is_open:
            return None
        scheme, _, key = authorization.strip().partition(b" ")
        if scheme.lower() == b"bearer" and keys.has(key.strip()):
            return None
        message = "no valid API key: send one as 'Authorization: Bearer KEY'"
        more = {"WWW-Authenticate": "Bearer"}
        return refused(401, message, code="invalid_api_key", headers=more)

    def _check_length(self, length: bytes) -> HTTPException | None:
        is_large = length.isdigit() and int(length) > self._service.settings.limits.body_bytes
        return self._too_large() if is_large else None

    def _too_large(self) -> HTTPException:
        limit = self._service.settings.limits.body_bytes
        return refused(413, f"the request is over {limit} bytes: send less")

    def _limited(self, receive: Receive) -> Receive:
        """Return `receive` that raises if the body grows too large."""
        count = 0

        async def receiving() -> Message:
            nonlocal count
            message = await receive()
            count += len(message.get("body", b""))
            if count > self._service.settings.limits.body_bytes:
                raise self._too_large()
            return message

        return receiving
