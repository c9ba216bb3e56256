"""Owns: a proxy that knows LDAP messages and breaks them on purpose: at which answer, and how, is the test's choice."""

from __future__ import annotations

import contextlib
import select
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable
from typing import Literal

from tests.bed.ports import free_port

BIND, ENTRY, DONE, EXTENDED = 0x61, 0x64, 0x65, 0x78


Start = Literal["clear", "tls", "starttls"]


class Break(Exception):
    """End the connection: by RST, or by an orderly close; or keep it open and say nothing more."""

    def __init__(self, how: str) -> None:
        super().__init__(how)
        self.how = how


Act = Callable[[bytes, int, int], bytes]
"""From an answer of the server, its operation, and how many of that operation came before on this connection, to what the
client gets. May raise Break."""


def tlv(tag: int, content: bytes) -> bytes:
    """One BER element."""
    size = len(content)
    length = bytes((size,)) if size < 128 else bytes((0x84,)) + size.to_bytes(4, "big")
    return bytes((tag,)) + length + content


def split(data: bytes) -> tuple[bytes, bytes]:
    """The first message and the rest; an empty message while it is not whole."""
    if len(data) < 2:
        return b"", data
    length, start = data[1], 2
    if length & 0x80:
        start = 2 + (length & 0x7F)
        if len(data) < start:
            return b"", data
        length = int.from_bytes(data[2:start], "big")
    end = start + length
    return (data[:end], data[end:]) if len(data) >= end else (b"", data)


def inside(message: bytes) -> tuple[bytes, int]:
    """Message number element and tag of the operation."""
    start = 2 + (message[1] & 0x7F if message[1] & 0x80 else 0)
    end = start + 2 + message[start + 1]
    return message[start:end], message[end]


def answer(message: bytes, operation: int, code: int, text: str = "", controls: bytes = b"") -> bytes:
    """Another result under the same number."""
    number, _ = inside(message)
    result = tlv(0x0A, bytes((code,))) + tlv(4, b"") + tlv(4, text.encode())
    return tlv(0x30, number + tlv(operation, result) + controls)


def with_value(message: bytes, name: str, value: str) -> bytes:
    """An entry with one more attribute."""
    number, operation = inside(message)
    start = 2 + (message[1] & 0x7F if message[1] & 0x80 else 0) + len(number)
    entry = _content(message[start:])
    size = 2 + entry[1]  # the root DSE and short names
    dn, attributes = entry[:size], _content(entry[size:])
    more = tlv(0x30, tlv(4, name.encode()) + tlv(0x31, tlv(4, value.encode())))
    return tlv(0x30, number + tlv(operation, dn + tlv(0x30, attributes + more)))


def _content(element: bytes) -> bytes:
    start = 2 + (element[1] & 0x7F if element[1] & 0x80 else 0)
    return element[start:]


class FaultProxy:
    """Sits on a port of its own in front of ``target``; ``act`` may be changed at any time for new connections."""

    def __init__(
        self, target: int, tls: ssl.SSLContext | None = None, start: Start = "clear", at: tuple[str, int] | None = None
    ) -> None:
        """``start``: with ``tls`` speak TLS from the start, or after StartTLS, or not; ``target`` is asked in clear.
        ``at``: to listen there instead of on a port of its own.
        """
        self.start: Start = start
        self._tls = tls
        self.host, self.port = at or ("127.0.0.1", free_port())
        self.act: Act | None = None
        self.act_now: Act | None = None
        """The same for connections that stand already, and before ``act``."""
        self.greeting: Callable[[socket.socket], None] | None = None
        """Done to each new connection instead of everything else."""
        self.handshake: Callable[[socket.socket], None] | None = None
        """Done to each new connection instead of TLS."""
        self.connections = 0
        self._target = target
        self._server = socket.create_server((self.host, self.port))
        self._closed = False
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def url(self) -> str:
        """For a profile; without TLS it needs ``insecure = true``."""
        return f"{'ldaps' if self.start == 'tls' else 'ldap'}://{self.host}:{self.port}"

    def close(self) -> None:
        """No new connections."""
        self._closed = True
        with contextlib.suppress(OSError):
            self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()

    def _accept(self) -> None:
        while not self._closed:
            try:
                client, _ = self._server.accept()
            except OSError:
                return
            self.connections += 1
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with contextlib.ExitStack() as open_ones, contextlib.suppress(OSError):
            open_ones.enter_context(client)
            if self._tls is not None and self.start != "clear":
                if self.start == "starttls":
                    _take_starttls(client)
                if self.handshake is not None:
                    self.handshake(client)
                    return
                client = open_ones.enter_context(self._tls.wrap_socket(client, server_side=True))
            if self.greeting is not None:
                self.greeting(client)
                return
            with socket.create_connection(("127.0.0.1", self._target)) as server:
                try:
                    self._between(server, client, self.act)
                except Break as broken:
                    _end(client, broken.how)

    def _between(self, server: socket.socket, client: socket.socket, first: Act | None) -> None:
        """One thread for both ways: two must not use one TLS connection at once."""
        seen: dict[int, int] = {}
        rest = b""
        while True:
            pending = isinstance(client, ssl.SSLSocket) and client.pending() > 0
            ready = [client] if pending else select.select([server, client], [], [])[0]
            if client in ready:
                asked = client.recv(65536)
                if not asked:
                    return
                server.sendall(asked)
            if server not in ready:
                continue
            more = server.recv(65536)
            if not more:
                return
            act = self.act_now or first
            if act is None:
                client.sendall(more)
                continue
            rest += more
            while True:
                message, rest = split(rest)
                if not message:
                    break
                operation = inside(message)[1]
                before = seen.get(operation, 0)
                seen[operation] = before + 1
                client.sendall(act(message, operation, before))


def _take_starttls(client: socket.socket) -> None:
    """Say yes to the first request, which must be that (RFC 4511 §4.14)."""
    asked = b""
    while not split(asked)[0]:
        more = client.recv(4096)
        if not more:
            raise ConnectionError
        asked += more
    client.sendall(answer(split(asked)[0], EXTENDED, 0))


def _end(client: socket.socket, how: str) -> None:
    match how:
        case "reset":
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        case "close":
            client.shutdown(socket.SHUT_RDWR)
        case "hang":
            silent(client)


def silent(client: socket.socket) -> None:
    """Hold the connection and say nothing until the other side gives up."""
    client.settimeout(30)
    with contextlib.suppress(OSError):
        while client.recv(65536):
            pass


def trickle(client: socket.socket) -> None:
    """An octet now and then: every time-out from octet to octet begins anew."""
    with contextlib.suppress(OSError):
        for octet in b"\x30\x84\x00\x00\xff\xff" + b"\x02" * 200:
            client.sendall(bytes((octet,)))
            time.sleep(0.1)
