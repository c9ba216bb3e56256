"""Owns: DNS servers for tests: Debian's nsd with zones of the test's own, and one that misbehaves on command in front of it."""

from __future__ import annotations

import contextlib
import signal
import socket
import struct
import subprocess
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

import dns.exception
import dns.flags
import dns.message
import dns.query
import dns.rcode

from tests.bed.waiting import wait_for

_CONF: Final = """\
server:
    ip-address: {address}@{port}
    username: ""
    server-count: 1
    pidfile: "{folder}/nsd.pid"
    database: ""
    logfile: "{folder}/nsd.log"
    zonesdir: "{folder}"
    xfrdfile: "{folder}/xfrd.state"
    zonelistfile: "{folder}/zone.list"
    tcp-timeout: 5
    rrl-ratelimit: 0
remote-control:
    control-enable: no
"""
_HEAD: Final = """\
$TTL 60
@ SOA ns.{zone}. hostmaster.{zone}. 1 3600 600 86400 5
@ NS ns.{zone}.
"""


class Nsd:
    """A real authoritative server. A zone without text is configured and has no file: it answers SERVFAIL."""

    def __init__(self, folder: Path, address: str, zones: Mapping[str, str], port: int = 53) -> None:
        self.address = (address, port)
        self._folder = folder
        conf = _CONF.format(address=address, port=port, folder=folder)
        for zone, text in zones.items():
            conf += f'zone:\n    name: "{zone}"\n    zonefile: "{zone}"\n'
            if text:
                self.write(zone, text)
        (folder / "nsd.conf").write_text(conf)
        self._process = subprocess.Popen(
            ["nsd", "-d", "-c", str(folder / "nsd.conf")],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        self._wait_for_answer(next(zone for zone, text in zones.items() if text))

    def write(self, zone: str, text: str) -> None:
        """A zone's records, behind SOA and NS."""
        (self._folder / zone).write_text(_HEAD.format(zone=zone) + text)

    def reload(self, zone: str) -> None:
        """Take up changed zone files; returns when ``zone`` is served."""
        self._process.send_signal(signal.SIGHUP)
        self._wait_for_answer(zone)

    def _wait_for_answer(self, zone: str) -> None:
        question = dns.message.make_query(f"{zone}.", "SOA")

        def answered() -> bool:
            assert self._process.poll() is None, (self._folder / "nsd.log").read_text()
            with contextlib.suppress(dns.exception.DNSException, OSError):
                host, port = self.address
                return bool(dns.query.udp(question, host, 0.5, port).answer)
            return False

        wait_for(answered, lambda: f"nsd's answer for {zone}: {(self._folder / 'nsd.log').read_text()}")

    def close(self) -> None:
        """Stop it."""
        self._process.terminate()
        self._process.wait(20)


Trick = Callable[[dns.message.Message, "ScriptedDns", bool], bytes | None]
"""Question, server, whether by TCP → what is answered; None: nothing."""


class ScriptedDns:
    """Hands every question on to a real server but for names that have a trick."""

    def __init__(self, address: str, behind: tuple[str, int], port: int = 53) -> None:
        self.address = (address, port)
        self.behind = behind
        self.tricks: dict[str, Trick] = {}
        """By the name asked for, without final dot."""
        self.silent = False
        self.asked: list[tuple[str, bool]] = []
        """Name, and whether by TCP."""
        self._udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._udp.bind(self.address)
        self._tcp = socket.create_server(self.address)
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._serve_udp, self._serve_tcp)]
        for thread in self._threads:
            thread.start()

    def real(self, question: dns.message.Message, *, tcp: bool = False) -> bytes:
        """The answer of the server behind."""
        host, port = self.behind
        ask = dns.query.tcp if tcp else dns.query.udp
        return ask(question, host, 5.0, port).to_wire(max_size=65535)

    def _answer(self, wire: bytes, tcp: bool) -> bytes | None:  # noqa: FBT001
        question = dns.message.from_wire(wire)
        name = question.question[0].name.to_text(omit_final_dot=True).lower()
        self.asked.append((name, tcp))
        if self.silent:
            return None
        trick = self.tricks.get(name)
        return self.real(question, tcp=tcp) if trick is None else trick(question, self, tcp)

    def _serve_udp(self) -> None:
        while True:
            try:
                wire, client = self._udp.recvfrom(4096)
            except OSError:
                return
            threading.Thread(target=self._one_udp, args=(wire, client), daemon=True).start()

    def _one_udp(self, wire: bytes, client: tuple[str, int]) -> None:
        with contextlib.suppress(OSError, dns.exception.DNSException):
            answer = self._answer(wire, False)
            for one in () if answer is None else answer if isinstance(answer, tuple) else (answer,):
                self._udp.sendto(one, client)

    def _serve_tcp(self) -> None:
        while True:
            try:
                connection, _ = self._tcp.accept()
            except OSError:
                return
            threading.Thread(target=self._one_tcp, args=(connection,), daemon=True).start()

    def _one_tcp(self, connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError, dns.exception.DNSException, struct.error):
            connection.settimeout(5.0)
            (length,) = struct.unpack("!H", connection.recv(2))
            answer = self._answer(connection.recv(length), True)
            if answer is not None:
                connection.sendall(struct.pack("!H", len(answer)) + answer)

    def close(self) -> None:
        """The end."""
        for sock in (self._udp, self._tcp):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()
        for thread in self._threads:
            thread.join(10)


# --- tricks ------------------------------------------------------------------------------------------------------


def silence(question: dns.message.Message, server: ScriptedDns, tcp: bool) -> bytes | None:  # noqa: FBT001
    """No answer at all."""
    return None


def garbage(question: dns.message.Message, server: ScriptedDns, tcp: bool) -> bytes | None:  # noqa: FBT001
    """The right id, then nonsense."""
    return question.to_wire()[:2] + b"\xff" * 40


def cut(question: dns.message.Message, server: ScriptedDns, tcp: bool) -> bytes | None:  # noqa: FBT001
    """An answer that ends in the middle."""
    return server.real(question)[:-7]


def wrong_id(question: dns.message.Message, server: ScriptedDns, tcp: bool) -> bytes | None:  # noqa: FBT001
    """Somebody else's answer."""
    wire = server.real(question)
    return bytes([wire[0] ^ 0xFF]) + wire[1:]


def wrong_question(question: dns.message.Message, server: ScriptedDns, tcp: bool) -> bytes | None:  # noqa: FBT001
    """An answer to what was not asked."""
    other = dns.message.make_query("elsewhere.test.", "MX")
    other.id = question.id
    return dns.message.make_response(other).to_wire()


def forged_first(question: dns.message.Message, server: ScriptedDns, tcp: bool):  # noqa: FBT001
    """A wrong answer ahead of the right one."""
    return wrong_id(question, server, tcp), server.real(question)


def code(rcode: int) -> Trick:
    """Only a response code."""

    def trick(question: dns.message.Message, server: ScriptedDns, tcp: bool) -> bytes | None:  # noqa: FBT001
        response = dns.message.make_response(question)
        response.set_rcode(rcode)
        return response.to_wire()

    return trick


def without_edns(question: dns.message.Message, server: ScriptedDns, tcp: bool) -> bytes | None:  # noqa: FBT001
    """A server of old: FORMERR to whatever has an OPT record."""
    if question.edns >= 0:
        return code(dns.rcode.FORMERR)(question, server, tcp)
    return server.real(question, tcp=tcp)


def truncated(question: dns.message.Message, server: ScriptedDns, tcp: bool) -> bytes | None:  # noqa: FBT001
    """Too long for UDP, as it says; whole over TCP."""
    if tcp:
        return server.real(question, tcp=True)
    response = dns.message.make_response(question)
    response.flags |= dns.flags.TC
    return response.to_wire()


def truncated_for_good(question: dns.message.Message, server: ScriptedDns, tcp: bool) -> bytes | None:  # noqa: FBT001
    """Too long for UDP, and no answer over TCP."""
    return None if tcp else truncated(question, server, tcp)


def empty(question: dns.message.Message, server: ScriptedDns, tcp: bool) -> bytes | None:  # noqa: FBT001
    """No records, and no SOA that says for how long."""
    return dns.message.make_response(question).to_wire()
