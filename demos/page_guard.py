"""Guards a demo's page: refuses requests that are too large, or that another site's page sent."""

from __future__ import annotations

from urllib.parse import urlsplit

from starlette.datastructures import MutableHeaders
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from accessory.config import LOOPBACK

MOST_BYTES = 1 << 20
"""Of a request without an image."""
_POLICY = "img-src 'self' data: blob:; media-src 'self'; frame-src 'none'; object-src 'none'; form-action 'self'"
"""What a page may fetch: nothing that a model's answer names."""


class _TooLarge(Exception):
    """More came than was announced."""


class PageGuard:
    """ASGI middleware: 413 for bodies over `most_bytes`, 403 for files and for requests by another site's page.

    Answers say that the browser fetches images, frames and the like from the page itself only.
    """

    def __init__(self, app: ASGIApp, most_bytes: int = MOST_BYTES) -> None:
        self.app, self._most_bytes = app, most_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request, seen, begun = Request(scope), 0, False

        async def counted() -> Message:
            """Receive a part of the request; raise `_TooLarge` once all parts are more than may come."""
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > self._most_bytes:
                raise _TooLarge
            return message

        async def noted(message: Message) -> None:
            """Send a part of the answer, the page's policy in its head."""
            nonlocal begun
            begun = True
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["content-security-policy"] = _POLICY
            await send(message)

        if refusal := _refusal(request, self._most_bytes):
            await refusal(scope, receive, send)
            return
        try:
            await self.app(scope, counted, noted)
        except _TooLarge:
            if not begun:
                await _too_large(self._most_bytes)(scope, receive, send)


def guards(host: str, most_bytes: int = MOST_BYTES) -> list[Middleware]:
    """The middleware of a page at `host` that takes requests of up to `most_bytes`.

    On loopback only loopback's names are answered to, against DNS rebinding.
    """
    found = [Middleware(PageGuard, most_bytes=most_bytes)]
    if host in LOOPBACK:
        found.append(Middleware(TrustedHostMiddleware, allowed_hosts=list(LOOPBACK)))
    return found


def _refusal(request: Request, most_bytes: int) -> PlainTextResponse | None:
    if _is_foreign(request):
        return PlainTextResponse("This page answers to itself only.", 403)
    if _announced(request) > most_bytes:
        return _too_large(most_bytes)
    path = request.scope["path"]
    if path.endswith("/upload"):  # gradio keeps whatever is sent there
        return PlainTextResponse("This page takes no files.", 403)
    if "/file=" in path or "/proxy=" in path:  # and fetches what is named there
        return PlainTextResponse("This page has no files.", 403)
    return None


def _is_foreign(request: Request) -> bool:
    origin = request.headers.get("origin")
    return origin is not None and urlsplit(origin).netloc != request.headers.get("host")


def _announced(request: Request) -> int:
    length = request.headers.get("content-length", "0")
    return int(length) if length.isdecimal() else 0


def _too_large(most_bytes: int) -> PlainTextResponse:
    return PlainTextResponse(f"A request has at most {most_bytes:,} bytes.", 413)
