"""What stands between a client and its archive: wires that break, gateways that ask for a token."""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
import urllib.error
import urllib.request
from base64 import b64encode
from collections import deque
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any

from tests.ingest.pacs.archive import PASSWORD, USER

PASS = -1


class Wire:
    """Relays TCP connections; some break after a number of bytes from the server.

    Args:
        target: Port on loopback.
        cuts: For each connection in turn, bytes after which it breaks; 0 breaks at once, ``PASS`` never.
        tls: Encrypts the side of the client.
    """

    def __init__(self, target: int, *cuts: int, tls: ssl.SSLContext | None = None) -> None:
        self.cuts = deque(cuts)
        self.connections = 0
        self._target, self._tls = target, tls
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self._open: list[socket.socket] = []

    def __enter__(self) -> Wire:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for end in (self._listener, *self._open):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            try:
                near = self._tls.wrap_socket(near, server_side=True) if self._tls else near
                far = socket.create_connection(("127.0.0.1", self._target))
            except OSError:  # no handshake, or nobody there
                near.close()
                continue
            cut = self.cuts.popleft() if self.cuts else PASS
            for end in (near, far):
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._open += [near, far]
            threading.Thread(target=self._relay, args=(near, far, PASS), daemon=True).start()
            threading.Thread(target=self._relay, args=(far, near, cut), daemon=True).start()

    @staticmethod
    def _relay(source: socket.socket, sink: socket.socket, left: int) -> None:
        with contextlib.suppress(OSError):
            while left and (block := source.recv(1 << 16)):
                block = block if left < 0 else block[:left]
                left -= len(block) if left > 0 else 0
                sink.sendall(block)
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


class Gateway:
    """HTTP gateway in front of an archive that wants a bearer token, and answers with given statuses first.

    ``only`` limits the statuses to some paths; ``rewrite`` changes paths on their way, ``alter`` answers.

    Args:
        target: Port of the archive.
        token: Expected token; empty for none.
        statuses: Statuses of the first answers.
        tls: Encrypts, and may ask for certificates.
    """

    def __init__(self, target: int, *, token: str = "", statuses: tuple[int, ...] = (), tls: Any = None) -> None:
        self.statuses = deque(statuses)
        self.requests: list[str] = []
        self.accepts: list[str] = []
        self.only: str = ""
        self.rewrite: Callable[[str], str] = str
        self.alter: Callable[[str, bytes], bytes] = lambda _, body: body
        gateway = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                gateway.requests.append(self.path)
                gateway.accepts.append(self.headers.get("Accept", ""))
                if token and self.headers.get("Authorization") != f"Bearer {token}":
                    self._answer(401, b"", "text/plain")
                elif gateway.only in self.path and gateway.statuses:
                    self._answer(gateway.statuses.popleft(), b"secret detail", "text/plain")
                else:
                    self._answer(*gateway.forward(self.path, self.headers.get("Accept", "")))

            def _answer(self, status: int, body: bytes, kind: str) -> None:
                self.send_response(status)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        self._target = target
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.handle_error = lambda *_: None  # type: ignore[method-assign]
        if tls is not None:
            plain = self._server.socket
            self._server.socket = tls.wrap_socket(plain, server_side=True, do_handshake_on_connect=False)
        self.port = self._server.server_port

    def forward(self, path: str, accept: str) -> tuple[int, bytes, str]:
        request = urllib.request.Request(f"http://127.0.0.1:{self._target}{self.rewrite(path)}")
        request.add_header("Accept", accept)
        request.add_header("Authorization", "Basic " + b64encode(f"{USER}:{PASSWORD}".encode()).decode())
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(request, timeout=10) as response:
                return response.status, self.alter(path, response.read()), response.headers["Content-Type"]
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read(), "text/plain"

    def __enter__(self) -> Gateway:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
