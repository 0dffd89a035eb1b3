"""What the page's server lets in and out: no request of another site, no script of another origin."""

import ipaddress
import socket
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send


MAX_BODY = 2**21
_HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}


class Guard:
    """Refuses requests for a name that is not this machine's, which a page elsewhere can make its own name stand for (DNS
    rebinding), and requests that a page of another origin sends.

    Args:
        app: what is guarded.
        host: where the server listens.
    """

    def __init__(self, app: ASGIApp, host: str):
        self.app = app
        self._names = {"localhost", host.lower(), socket.gethostname().lower()}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        problem = self._problem(scope)

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(_HEADERS)
            await send(message)

        app = self.app if problem is None else JSONResponse({"problem": problem[1]}, problem[0])
        await app(scope, receive, send_with_headers)

    def _problem(self, scope: Scope) -> tuple[int, str] | None:
        headers = Headers(scope=scope)
        host, origin = headers.get("host", ""), headers.get("origin")
        if not self._is_ours(host):
            return 403, f"The page is not served as {host!r}: open it by the address that the command printed."
        if origin is not None and urlsplit(origin).netloc.lower() != host.lower():
            return 403, f"A page of {origin} asked, and only the page itself may."
        if scope["method"] == "POST":
            if headers.get("content-type", "").partition(";")[0].strip() != "application/json":
                return 415, "A question must be JSON, with `Content-Type: application/json`."
            length = headers.get("content-length", "")
            if not length.isdecimal() or int(length) > MAX_BODY:
                return 413, f"A request may have {MAX_BODY} bytes: ask for less."
        return None

    def _is_ours(self, host: str) -> bool:
        """A name of this machine or an address, which no other site can take."""
        try:
            name = urlsplit(f"//{host}").hostname or ""
            if name in self._names:
                return True
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True
