"""Owns: an SMTP dialogue from the client's side, at the level of octets. It has no opinion on what is proper."""

from __future__ import annotations

import socket
import ssl
from collections.abc import Iterable
from types import TracebackType
from typing import Final, NamedTuple, Self

from tests.bed.waiting import PATIENCE_S
from tests.bed.wire import END_OF_DATA, stuffed

LINE_MAX: Final = 64 * 1024
"""No reply line is that long: a server that never ends its line fails the test instead of filling the memory."""


class ConnectionEnded(Exception):
    """The server closed or reset the connection instead of answering."""


class Reply(NamedTuple):
    """One reply; ``lines`` without codes' separators and CR LF, as ``250-A`` and ``250 B`` give ``("A", "B")``."""

    code: int
    lines: tuple[str, ...]

    @property
    def enhanced(self) -> str:
        """The enhanced code of the last line, or empty."""
        first = self.lines[-1].split(" ", 1)[0]
        return first if first[:1] == str(self.code)[0] and first.count(".") == 2 else ""

    @property
    def text(self) -> str:
        """The last line without code."""
        return self.lines[-1]

    def __str__(self) -> str:
        return f"{self.code} {' / '.join(self.lines)}"


class Client:
    """One connection. Every wait is bounded by ``timeout`` seconds. ``transcript`` is for a failing test's reader."""

    def __init__(
        self,
        address: tuple[str, int],
        *,
        source: str = "127.0.0.1",
        tls: ssl.SSLContext | None = None,
        server_name: str = "localhost",
        timeout: float = PATIENCE_S,
    ) -> None:
        """Connect from ``source``; with ``tls`` by implicit TLS. Does not read the banner: ``greeting`` does."""
        self.transcript: list[str] = []
        self.extensions: dict[str, str] = {}
        self._server_name = server_name
        self._buffer = b""
        self._socket: socket.socket = socket.create_connection(address, timeout, source_address=(source, 0))
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if tls is not None:
            self.wrap(tls)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if error is not None:
            error.add_note("SMTP dialogue:\n  " + "\n  ".join(self.transcript))
        self.close()

    # --- octets ---
    def send(self, octets: bytes) -> None:
        """Send as it is. Raises ConnectionEnded when the server is gone."""
        shown = octets if len(octets) <= 200 else octets[:200] + b"..."
        self.transcript.append(f"C: {shown!r}")
        try:
            self._socket.sendall(octets)
        except (ConnectionError, ssl.SSLError) as error:
            raise ConnectionEnded(str(error)) from error

    def read(self) -> Reply:
        """The next reply. Raises ConnectionEnded, or TimeoutError when nothing comes."""
        lines: list[str] = []
        while True:
            line = self._line().decode()
            if len(line) < 3 or not line[:3].isdigit() or line[3:4] not in ("", " ", "-"):
                raise AssertionError(f"not a reply line: {line!r}")
            lines.append(line[4:])
            if line[3:4] != "-":
                reply = Reply(int(line[:3]), tuple(lines))
                self.transcript.append(f"S: {reply}")
                return reply

    def _line(self) -> bytes:
        while (end := self._buffer.find(b"\r\n")) < 0:
            if len(self._buffer) > LINE_MAX:
                raise AssertionError(f"a reply line of over {LINE_MAX} octets")
            self._buffer += self._receive()
        line, self._buffer = self._buffer[:end], self._buffer[end + 2 :]
        return line

    def _receive(self) -> bytes:
        try:
            octets = self._socket.recv(65536)
        except (ConnectionError, ssl.SSLEOFError, ssl.SSLZeroReturnError) as error:
            self.transcript.append(f"S: connection lost: {error}")
            raise ConnectionEnded(str(error)) from error
        if not octets:
            self.transcript.append("S: connection closed")
            raise ConnectionEnded(f"connection closed; unread: {self._buffer!r}")
        return octets

    def has_ended(self) -> bool:
        """Wait until the server closes; False when it says something first, TimeoutError when it does neither."""
        if self._buffer:
            return False
        try:
            self._buffer += self._receive()
        except ConnectionEnded:
            return True
        return False

    def half_close(self) -> None:
        """Say that nothing more will be sent, and still listen."""
        self._socket.shutdown(socket.SHUT_WR)

    def reset(self) -> None:
        """Break the connection by RST, as a crashed client would."""
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")
        self._socket.close()

    def close(self) -> None:
        """Close; harmless when repeated."""
        self._socket.close()

    # --- TLS ---
    def wrap(self, context: ssl.SSLContext) -> None:
        """Begin TLS now."""
        self._socket = context.wrap_socket(self._socket, server_hostname=self._server_name)
        self.transcript.append(f"-- {self._socket.version()} --")

    @property
    def tls_version(self) -> str | None:
        """``TLSv1.3`` and the like; None in clear."""
        return self._socket.version() if isinstance(self._socket, ssl.SSLSocket) else None

    def certificate(self) -> bytes:
        """The server's certificate (DER); fails in clear."""
        assert isinstance(self._socket, ssl.SSLSocket)
        certificate = self._socket.getpeercert(binary_form=True)
        assert certificate is not None
        return certificate

    def starttls(self, context: ssl.SSLContext) -> None:
        """STARTTLS, which must succeed; EHLO is the caller's next word."""
        self.expect("220", "STARTTLS")
        assert not self._buffer, f"the server spoke in clear after its 220: {self._buffer!r}"
        self.wrap(context)

    # --- dialogue ---
    def command(self, command: str | bytes) -> Reply:
        """Send one line, read one reply."""
        self.send((command.encode() if isinstance(command, str) else command) + b"\r\n")
        return self.read()

    def expect(self, start: str, command: str | bytes | None = None) -> Reply:
        """The reply to ``command`` (or the next one), which must start like ``start``: ``"550 5.1.1"``."""
        reply = self.read() if command is None else self.command(command)
        said = f"{reply.code} {reply.text}"
        assert said.startswith(start), f"expected {start}, got {reply} to {command!r}"
        return reply

    def pipeline(self, *commands: str | bytes) -> list[Reply]:
        """Send all commands in one go, then read one reply for each."""
        octets = [command.encode() if isinstance(command, str) else command for command in commands]
        self.send(b"".join(command + b"\r\n" for command in octets))
        return [self.read() for _ in commands]

    def greeting(self) -> Reply:
        """The banner, which must be 220."""
        return self.expect("220")

    def ehlo(self, name: str = "client.example.net") -> dict[str, str]:
        """EHLO, which must succeed; the extensions offered as keyword → parameters."""
        reply = self.expect("250", f"EHLO {name}")
        words = [line.partition(" ") for line in reply.lines[1:]]
        self.extensions = {word.upper(): rest for word, _, rest in words}
        return self.extensions

    def open(self, name: str = "client.example.net") -> Self:
        """Banner and EHLO."""
        self.greeting()
        self.ehlo(name)
        return self

    def envelope(self, sender: str, recipients: Iterable[str | tuple[str, str]], parameters: str = "") -> None:
        """MAIL and RCPTs, all of which must be accepted. A recipient may come with its parameters."""
        self.expect("250", f"MAIL FROM:<{sender}>{' ' + parameters if parameters else ''}")
        for one in recipients:
            recipient, said = (one, "") if isinstance(one, str) else one
            self.expect("250", f"RCPT TO:<{recipient}> {said}".rstrip())

    def data(self, message: bytes) -> Reply:
        """DATA, which must get 354, and the message, dot-stuffed here; returns the final reply."""
        self.expect("354", "DATA")
        self.send(stuffed(message) + END_OF_DATA)
        return self.read()

    def deliver(
        self, sender: str, recipients: Iterable[str | tuple[str, str]] | str, message: bytes, parameters: str = ""
    ) -> Reply:
        """One whole transaction; envelope must be accepted, the final reply is the caller's to judge."""
        self.envelope(sender, [recipients] if isinstance(recipients, str) else recipients, parameters)
        return self.data(message)

    def quit(self) -> None:
        """QUIT, 221, and the server closes."""
        self.expect("221", "QUIT")
        assert self.has_ended(), "the connection is still open after QUIT"
