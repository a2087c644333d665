"""What one client may ask of the service, and the guard in front of it that refuses the rest.

The guard is an ASGI middleware: it looks at a request's head before anything else does, counts its body while that
streams in, and gives every answer the headers that keep a browser from doing more with it than show it.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import ipaddress
import math
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from http.cookies import CookieError, SimpleCookie
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from ..errors import UserError

MAX_JSON = 256_000  # bytes of a body of JSON
MAX_CLIENTS = 10_000  # whose rate is remembered
OPEN = ("/", "/page.css", "/page.js", "/icon.svg", "/health", "/login")  # what needs no token
ASKS_MODEL = ("/search", "/embed", "/login")  # what counts for the rate; the last so that nobody tries many tokens
COOKIE = "mmfm"
LOCAL = ("localhost", "127.0.0.1", "::1")
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'; "
    "object-src 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=(self)",
}


@dataclass
class Limits:
    """What one client may ask of the service."""

    max_upload: int = 16_000_000  # bytes of a request's body
    max_memory: int = 256_000_000  # bytes of bodies that are held at a time, of all requests together
    max_pixels: int = 40_000_000  # of a picture, by its header
    max_seconds: float = 120.0  # of a sound, by its header
    max_text: int = 2_000  # characters of a text
    max_queries: int = 64  # requests to the model at a time; more are told to come again
    max_requests: int = 512  # requests of any kind at a time
    rate: float = 20.0  # requests to the model a second, of one client
    burst: int = 60  # so many of them may come at once
    timeout: float = 20.0  # seconds in which a request has to arrive, and in which its answer has to be taken

    def __post_init__(self):
        for name, value in vars(self).items():
            if not value > 0 or math.isinf(value):
                raise UserError(f"--{name.replace('_', '-')} is above 0, not {value}")


@dataclass
class Traffic:
    """What is being answered."""

    requests: int = 0
    queries: int = 0  # of them to the model
    held: int = 0  # bytes of their bodies


class Refused(HTTPException):
    """A request that is not answered, and why. `reason` is the word in the metrics."""

    def __init__(self, status: int, detail: str, reason: str, headers: dict[str, str] | None = None):
        super().__init__(status, detail, headers)
        self.reason = reason


def busy(detail: str, reason: str, seconds: float = 1.0) -> Refused:
    """429, with the seconds after which to try again."""
    return Refused(429, detail, reason, {"Retry-After": str(max(1, round(seconds)))})


class Guard:
    """Refuses what the limits, the `Host`, the origin or the token forbid; counts what is let through.

    Args:
        hosts: names under which the service is reached. A page of another name that a server of its own points to this
            machine (DNS rebinding) is refused.
        any_address: whether a number in place of a name is as good, which no such server can forge.
        token: what a client has to show; empty: nothing.
        observe: is called with a request's path, method, status and seconds, and with the reason of a refusal or "".
    """

    def __init__(
        self,
        app: Any,
        limits: Limits,
        hosts: Iterable[str],
        any_address: bool,
        token: str,
        observe: Callable[[str, str, int, float, str], None],
        traffic: Traffic | None = None,
    ):
        self.app, self.limits, self.token, self.observe = app, limits, token, observe
        self.traffic = traffic or Traffic()
        self.hosts, self.any_address = {host.lower() for host in hosts}, any_address
        self.buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()  # client: requests left, when

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] == "websocket":
            return await send({"type": "websocket.close", "code": 1008})
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        began, status, reason = time.monotonic(), 500, ""
        self.traffic.requests += 1
        is_query = scope["path"] in ASKS_MODEL and scope["method"] == "POST"
        self.traffic.queries += is_query

        async def answer(message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
                headers.setdefault("Cache-Control", "no-store")
            await send(message)

        body = _Body(self, scope, receive)
        try:
            self.check(scope, is_query)
            await self.app(scope, body.receive, answer)
        except Refused as error:
            reason = error.reason
            await JSONResponse({"detail": error.detail}, error.status_code, error.headers)(scope, receive, answer)
        finally:
            self.traffic.requests -= 1
            self.traffic.queries -= is_query
            self.traffic.held -= body.size
            reason = reason or body.reason
            self.observe(scope["path"], scope["method"], status, time.monotonic() - began, reason)

    def check(self, scope, is_query: bool) -> None:
        """Raises Refused by what the head of a request says."""
        headers, client = Headers(scope=scope), (scope.get("client") or ("", 0))[0]
        self.check_host(headers.getlist("host"))
        self.check_origin(scope, headers)
        if self.traffic.requests > self.limits.max_requests or (
            self.traffic.queries > self.limits.max_queries and is_query
        ):
            raise busy("too many requests at a time; try again in a second", "in flight")
        if is_query:
            self.check_rate(client)
        if self.token and scope["path"] not in OPEN and not self.knows_token(headers):
            if not is_query:
                self.check_rate(client)
            how = "this service needs its token: send `Authorization: Bearer TOKEN`, or log in on the page"
            raise Refused(401, how, "token", {"WWW-Authenticate": "Bearer"})
        length = headers.get("content-length", "0")
        most = min(self.limits.max_upload, MAX_JSON) if is_json(headers) else self.limits.max_upload
        if length.isascii() and length.isdigit() and int(length) > most:
            raise too_long(most)

    def check_host(self, given: list[str]) -> None:
        name = split_port(given[0]).lower() if len(given) == 1 else ""
        if not name:
            raise Refused(400, "a request has one Host header", "host")
        if name in self.hosts or (self.any_address and is_address(name)):
            return
        raise Refused(421, "this service is not reached under this name; --allow-host allows further names", "host")

    def check_origin(self, scope, headers: Headers) -> None:
        """A page of another origin may link to the page here, and nothing else."""
        origin, site = headers.get("origin"), headers.get("sec-fetch-site", "none")
        links = scope["path"] == "/" and scope["method"] == "GET" and headers.get("sec-fetch-mode") == "navigate"
        foreign = origin is not None and origin.lower() not in (
            f"{scheme}://{headers['host'].lower()}" for scheme in ("http", "https")
        )
        if foreign or (site not in ("none", "same-origin") and not links):
            raise Refused(403, "pages of other origins may not use this service", "origin")

    def check_rate(self, client: str) -> None:
        """A bucket for each client that refills at `rate` and holds `burst` (a token bucket)."""
        now = time.monotonic()
        left, then = self.buckets.pop(client, (float(self.limits.burst), now))
        left = min(self.limits.burst, left + (now - then) * self.limits.rate)
        self.buckets[client] = (max(left - 1, 0.0) if left >= 1 else left, now)
        if len(self.buckets) > MAX_CLIENTS:
            self.buckets.popitem(last=False)
        if left < 1:
            raise busy("too many requests a second; try again in a second", "rate", (1 - left) / self.limits.rate)

    def knows_token(self, headers: Headers) -> bool:
        """Whether a request shows the token, or the cookie of someone who did."""
        scheme, _, given = headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer":
            return same(given.strip(), self.token)
        try:
            cookie = SimpleCookie(headers.get("cookie", "")).get(COOKIE)
        except CookieError:
            return False
        return cookie is not None and same(cookie.value, cookie_value(self.token))


class _Body:
    """Hands a request's body on and counts it; raises Refused where it is too long, too slow, or one too many."""

    def __init__(self, guard: Guard, scope, receive):
        headers = Headers(scope=scope)
        self.guard, self.limits, self._receive = guard, guard.limits, receive
        self.most = min(self.limits.max_upload, MAX_JSON) if is_json(headers) else self.limits.max_upload
        self.deadline = time.monotonic() + self.limits.timeout
        self.size, self.reason, self.done = 0, "", False

    async def receive(self):
        if self.done:  # what follows is only the end of the connection
            return await self._receive()
        try:
            message = await asyncio.wait_for(self._receive(), max(self.deadline - time.monotonic(), 0.001))
        except TimeoutError:
            raise self._refused(Refused(408, "the request did not arrive in time", "slow")) from None
        size = len(message.get("body", b""))
        self.size += size
        self.guard.traffic.held += size
        self.done = not message.get("more_body", False)
        if self.size > self.most:
            raise self._refused(too_long(self.most))
        if self.guard.traffic.held > self.limits.max_memory:
            raise self._refused(busy("too much is being sent at a time; try again in a second", "memory"))
        return message

    def _refused(self, error: Refused) -> Refused:
        self.reason = error.reason
        return error


def too_long(most: int) -> Refused:
    return Refused(413, f"the request is longer than {most:,} bytes", "length")


def is_json(headers: Headers) -> bool:
    return headers.get("content-type", "").partition(";")[0].strip().lower() == "application/json"


def split_port(host: str) -> str:
    """`[::1]:8000` -> `::1`, `name:8000` -> `name`."""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0] if host.count(":") <= 1 else host


def is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def same(given: str, expected: str) -> bool:
    """Whether two secrets are equal, in a time that does not tell how much of them is."""
    return hmac.compare_digest(given.encode("utf-8", "surrogateescape"), expected.encode("utf-8", "surrogateescape"))


def cookie_value(token: str) -> str:
    """What the cookie holds in place of the token, which it does not tell."""
    return hmac.new(token.encode("utf-8", "surrogateescape"), b"mmfm cookie", hashlib.sha256).hexdigest()
