"""Serves the live page of one run: reads files of its folder, writes none, and answers GET and HEAD alone."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import secrets
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from http import HTTPStatus
from http.cookies import CookieError, SimpleCookie
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qs, quote, unquote, urlsplit

from lightning_xai.report.explorer.page import script_digest
from lightning_xai.report.watch.view import RunView, own_file
from lightning_xai.results.progress import LARGEST, FollowedRun

__all__ = ["WatchServer"]

_JSON, _HTML = "application/json", "text/html; charset=utf-8"
_KINDS = {".csv": "text/csv; charset=utf-8", ".jpg": "image/jpeg", ".png": "image/png"}
"""Files of the folder `grounding` that may be read, by their suffix."""
_OWN = {"/watch.js": "text/javascript; charset=utf-8", "/watch.css": "text/css; charset=utf-8"}
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "frame-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_EXPLORER_POLICY = (
    f"default-src 'none'; script-src 'sha256-{script_digest()}'; style-src 'unsafe-inline'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'self'"
)
_SECONDS = 10  # that a client may take for its request
_TOKEN_BYTES = 24
_LONGEST_BODY = 2**16  # bytes of a request that is refused, read so that its client hears the answer


class _Content(NamedTuple):
    body: bytes
    kind: str
    policy: str = _POLICY


class WatchServer(ThreadingHTTPServer):
    """The server of one run's live page; `serve_forever` answers until `shutdown`.

    On the loopback interface everyone on this machine may read, and requests have to name it as their host, so that no
    site can reach it by its own name. Bound to any other address, each request needs the token.

    Args:
        run: folder of the run, see `find_run`.
        host: name or address to bind to.
        port: to bind to; 0: a free one.
        token: that each request has to bring; None: none on the loopback interface, and a drawn one elsewhere.
        name: of the run, as the page calls it; by default the last parts of its path.

    Attributes:
        url: the address of the page, with the token if one is needed.

    Raises:
        ValueError: the address cannot be bound to, or the token is empty; the message says what to do.
    """

    daemon_threads = True
    allow_reuse_port = False  # two servers on one port would answer in turn

    def __init__(
        self, run: Path, host: str = "127.0.0.1", port: int = 0, token: str | None = None, name: str | None = None
    ) -> None:
        if not 0 <= port <= 65535:
            raise ValueError(f"--port={port} is no port: give a number from 0 (any free one) to 65535")
        if token is not None and not token:
            raise ValueError("--token is empty: give one that is hard to guess, or leave the option out")
        self.host = host
        self.address_family, address, loopback = _resolved(host)
        self.token = token if token is not None or loopback else secrets.token_urlsafe(_TOKEN_BYTES)
        root = run.resolve()
        self.run = FollowedRun(root)
        self.view = RunView(self.run, "/".join(root.parts[-2:]) if name is None else name)
        self.lock = threading.Lock()  # answers are made one at a time: they share what was parsed
        try:
            super().__init__((address, port), _Handler)
        except OSError as error:
            raise ValueError(
                f"port {port} of {host} cannot be used ({error.strerror or error}): choose another one, --port=N, or "
                "--port=0 for any free one"
            ) from error
        shown = host if loopback else _name_of(host)
        query = "" if self.token is None else f"?token={quote(self.token, safe='')}"
        self.url = f"http://{f'[{shown}]' if ':' in shown else shown}:{self.server_port}/{query}"

    def server_bind(self) -> None:
        """Bind, without the look-up of the machine's name, which may take seconds."""
        if self.address_family == socket.AF_INET6:
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        super(ThreadingHTTPServer, self).server_bind()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Pass over clients that went away, or took too long."""


class _Handler(BaseHTTPRequestHandler):
    server: WatchServer
    server_version = "lightning_xai"
    sys_version = ""
    timeout = _SECONDS

    def do_GET(self) -> None:
        """Answer a request."""
        try:
            target = urlsplit(self.path)
            path = unquote(target.path, errors="strict")
        except ValueError:
            self._answer(HTTPStatus.BAD_REQUEST, "This is no address of a page.")
            return
        if (why := self._forbidden(target.query)) is not None:
            self._answer(HTTPStatus.FORBIDDEN, why)
            return
        try:
            found = self._content(path)
        except Exception as error:  # of an unexpected file: this client gets the message, others go on
            reason = f"{type(error).__name__}: {error}"
            self._answer(HTTPStatus.INTERNAL_SERVER_ERROR, f"The run's folder cannot be shown ({reason}); check it.")
            return
        if found is None:
            self._answer(HTTPStatus.NOT_FOUND, "There is no such file, or it is too large; the page is at /.")
            return
        tag = f'"{hashlib.sha256(found.body).hexdigest()[:32]}"'
        known = _matches(self.headers.get("If-None-Match"), tag)
        self._answer(HTTPStatus.NOT_MODIFIED if known else HTTPStatus.OK, found, ETag=tag)

    do_HEAD = do_GET

    def __getattr__(self, name: str) -> Callable[[], None]:
        # http.server looks a method's answer up by its name, and calls those that it does not find unsupported.
        if name.startswith("do_"):
            return self._refuse_method
        raise AttributeError(name)

    def _refuse_method(self) -> None:
        with suppress(ValueError, OSError):
            # Below zero it would be read without an end.
            self.rfile.read(max(0, min(int(self.headers.get("Content-Length", 0)), _LONGEST_BODY)))
        text = "This page only shows a run, and answers GET and HEAD."
        self._answer(HTTPStatus.METHOD_NOT_ALLOWED, text, Allow="GET, HEAD")

    def _forbidden(self, query: str) -> str | None:
        """Why this client may not read; None if it may."""
        token = self.server.token
        if token is None:
            local = _is_local(self.headers.get("Host", ""), self.server.host)
            return None if local else "This server is for its own machine: open it as localhost, or through a tunnel."
        given = [*parse_qs(query).get("token", ())]
        scheme, _, bearer = self.headers.get("Authorization", "").partition(" ")
        given += [bearer] if scheme.lower() == "bearer" else []
        with suppress(CookieError, KeyError):
            given.append(unquote(SimpleCookie(self.headers.get("Cookie", ""))[self._cookie_name()].value))
        # Compared in the same time, wherever they differ.
        if any([hmac.compare_digest(_bytes(each), _bytes(token)) for each in given]):
            return None
        return "This page needs its token: open the whole address that `watch` has printed."

    def _content(self, path: str) -> _Content | None:
        """What a path stands for; None where it stands for nothing."""
        view = self.server.view
        with self.server.lock:
            if path == "/":
                return _Content(view.page(), _HTML)
            if path == "/run.json":
                return _Content(view.data(), _JSON)
            if path == "/explorer":
                return _Content(view.explorer(), _HTML, _EXPLORER_POLICY)
        if path in _OWN:
            return _Content(own_file(path[1:]), _OWN[path])
        parts, suffix = path.split("/")[1:], Path(path).suffix
        # Backslashes and drives are separators elsewhere; names that begin with a dot are files being written.
        plain = all(part and not part.startswith(".") and not set(part) & set("\\:\0") for part in parts)
        if parts[:2] != ["files", "grounding"] or suffix not in _KINDS or not plain:
            return None
        file = self.server.run.folder.file("/".join(parts[1:]))
        try:
            if file is None or file.suffix != suffix or file.stat().st_size > LARGEST:
                return None
            return _Content(file.read_bytes(), _KINDS[suffix])
        except OSError:  # replaced, or not to be read
            return None

    def _answer(self, status: HTTPStatus, content: _Content | str, **headers: str) -> None:
        """Send a whole answer; a text is a sentence for people."""
        if isinstance(content, str):
            content = _Content(f"{content}\n".encode(), "text/plain; charset=utf-8")
        self.send_response(status)
        headers |= {
            "Cache-Control": "no-store",
            "Content-Security-Policy": content.policy,
            "Cross-Origin-Resource-Policy": "same-origin",
            "Referrer-Policy": "no-referrer",
            "X-Content-Type-Options": "nosniff",
        }
        if status != HTTPStatus.NOT_MODIFIED:
            headers |= {"Content-Type": content.kind, "Content-Length": str(len(content.body))}
        if status == HTTPStatus.OK and self.server.token is not None:
            value = f"{self._cookie_name()}={quote(self.server.token, safe='')}"
            headers["Set-Cookie"] = f"{value}; Path=/; HttpOnly; SameSite=Strict"
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if status != HTTPStatus.NOT_MODIFIED and self.command != "HEAD":
            self.wfile.write(content.body)

    def _cookie_name(self) -> str:
        # Cookies are of a host, whatever the port.
        return f"lightning_xai_watch_{self.server.server_port}"

    def log_message(self, format: str, *args: Any) -> None:
        """Leave requests out of the terminal: a page asks every few seconds."""


def _resolved(host: str) -> tuple[socket.AddressFamily, str, bool]:
    """Family and address to bind to, and whether it is this machine's loopback interface."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM) if host else []
    except OSError as error:
        raise ValueError(
            f"--host={host} is no address of this machine ({error.strerror or error}): give 127.0.0.1 for this machine "
            "alone, or 0.0.0.0 for all networks"
        ) from error
    if not host:
        raise ValueError("--host is empty: give 127.0.0.1 for this machine alone, or 0.0.0.0 for all networks")
    families = {family: str(address[0]) for family, _, _, _, address in reversed(found)}
    family = socket.AF_INET if socket.AF_INET in families else next(iter(families))
    return family, families[family], ipaddress.ip_address(families[family].partition("%")[0]).is_loopback


def _name_of(host: str) -> str:
    """What others call an address: the machine's own name for all its addresses."""
    return socket.gethostname() if host in ("0.0.0.0", "::") else host  # noqa: S104 - compared, not bound to


def _is_local(host: str, bound: str) -> bool:
    """True if a request's `Host` names this machine's loopback interface, or what the server was bound to.

    At any port, since a tunnel has another one. A site that gives its own name this machine's address is refused.

    >>> [_is_local(host, "127.0.0.1") for host in ("localhost:6016", "127.0.0.1", "[::1]:80")]
    [True, True, True]
    >>> [_is_local(host, "127.0.0.1") for host in ("evil.example", "127.0.0.1.evil.example", "")]
    [False, False, False]
    """
    try:
        name = urlsplit(f"//{host}").hostname or ""
        return name in ("localhost", bound.lower()) or ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def _matches(asked: str | None, tag: str) -> bool:
    """True if a client has the content of a tag already."""
    given = [each.strip().removeprefix("W/") for each in (asked or "").split(",")]
    return tag in given or "*" in given


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")
