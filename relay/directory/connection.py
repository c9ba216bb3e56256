"""Owns: one connection to a directory: open, TLS, login by ldap3, and searches whose completeness is proven.

The only module that knows ldap3, which is imported at the first connection: it takes an eighth of a second that only the
process that reads should pay. ldap3 opens, starts TLS, logs in and compiles filters; the answers of searches are read here
(``directory.ber``), because ldap3's paged search takes a broken answer for a complete one and its time-outs count from octet
to octet. Must not fail over, nor know what entries mean. Runs in the main thread of a process that may be killed.
"""

from __future__ import annotations

import importlib
import signal
import socket
import ssl
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, Final

from relay.config.ldap import LdapProfile, LdapServer
from relay.directory import ber
from relay.directory.failure import LdapFailure, Reason, decoded
from relay.directory.stream import RECEIVE_OCTETS, TlsStream, received
from relay.directory.tls import PeerCertificate, certificate_fault, context, shown

Take = ber.Take

PAGES: Final = 1_000_000
"""More pages than any directory has: a server that never ends is broken off."""
RANGES: Final = 10_000
"""Parts of one attribute: 15 million members at Active Directory's 1,500."""
SCOPES: Final = {"base": 0, "one": 1, "sub": 2}
EVERYTHING: Final = "(objectClass=*)"
_ROOT: Final = (
    "namingContexts", "defaultNamingContext", "rootDomainNamingContext", "schemaNamingContext", "supportedControl",
    "supportedLDAPVersion", "highestCommittedUSN", "dsServiceName", "dnsHostName", "forestFunctionality",
)  # fmt: skip


class _Overdue(BaseException):
    """The alarm rang. No Exception, because ldap3 catches those."""


@contextmanager
def _alarm(seconds: float) -> Iterator[None]:
    """Break off what takes longer, however its waits are spread: ldap3's time-outs begin anew with each octet."""

    def ring(_: int, __: FrameType | None) -> None:
        raise _Overdue

    before = signal.signal(signal.SIGALRM, ring)
    began = time.monotonic()
    left, interval = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        if left:  # somebody else's alarm goes on
            signal.setitimer(signal.ITIMER_REAL, max(0.001, left - (time.monotonic() - began)), interval)


@dataclass(slots=True)
class Counted:
    """What a connection saw besides entries."""

    pages: int = 0
    entries: int = 0
    references: int = 0
    ranged: int = 0


@dataclass(slots=True)
class Steps:
    """How far an opening came, for ``relay directory test``: name of the step, and what it found."""

    done: list[tuple[str, str]] = field(default_factory=list)

    def passed(self, step: str, found: str) -> None:
        """The step succeeded."""
        self.done.append((step, found))


def _import() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # pyasn1 names that 0.6 announces to drop
        import ldap3  # noqa: PLC0415 - see the top
    return ldap3


def preload() -> None:
    """Import ldap3 now: where the process will change its user, or forks readers."""
    _import()


def compile_filter(text: str, where: str = "") -> bytes:
    """A filter (RFC 4515) as it goes over the wire. Raises LdapFailure."""
    ldap3 = _import()
    search = importlib.import_module("ldap3.operation.search")
    encode = importlib.import_module("pyasn1.codec.ber.encoder").encode
    try:
        parsed = search.parse_filter(
            text, None, auto_escape=False, auto_encode=False, validator=None, check_names=False
        ).elements[0]
        return bytes(encode(search.compile_filter(parsed)))
    except (ldap3.core.exceptions.LDAPExceptionError, ValueError, IndexError, TypeError) as error:
        raise LdapFailure(Reason.FILTER, f"the filter {text} cannot be read: {_plain(error)}", where) from None


class Connection:
    """An open, authenticated connection. ``root`` is the root DSE, ``certificate`` None in clear."""

    def __init__(self, profile: LdapProfile, server: LdapServer, password: str, steps: Steps | None = None) -> None:
        """Open it. Raises LdapFailure."""
        self.profile = profile
        self.server = server
        self.certificate: PeerCertificate | None = None
        self.counted = Counted()
        self._steps = steps or Steps()
        self._rest = b""
        self._taken = 0
        self._room = memoryview(bytearray(RECEIVE_OCTETS))
        self._number = 1000  # beyond ldap3's own of this connection
        self._fault: LdapFailure | None = None
        self._resolve()
        try:
            with _alarm(profile.connect_timeout_s):
                self._ldap = self._open(password)
        except _Overdue:
            raise self._failure(
                Reason.FILTERED if len(self._steps.done) < 2 else Reason.SLOW,
                f"no connection and login within {profile.connect_timeout_s:g} s",
            ) from None
        self._socket: socket.socket | TlsStream = self._ldap.socket
        try:
            self.root = self._read_root()
        except LdapFailure:
            self.close()
            raise

    # --- opening --------------------------------------------------------------------------------------------------------

    def _failure(self, reason: Reason, what: str) -> LdapFailure:
        return LdapFailure(reason, what, self.server.url)

    def _resolve(self) -> None:
        try:
            found = socket.getaddrinfo(self.server.host, self.server.port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:
            why = getattr(error, "strerror", None) or "not a name"
            raise self._failure(Reason.DNS, f"{self.server.host} does not resolve: {why}") from None
        self._steps.passed("DNS", ", ".join(dict.fromkeys(str(one[4][0]) for one in found)))

    def _open(self, password: str) -> Any:
        """Open, TLS, login, in this order and each one checked: nothing of a login is ever in clear by accident."""
        ldap3 = _import()
        profile, server = self.profile, self.server
        made = ldap3.Connection(
            ldap3.Server(
                server.host,
                server.port,
                use_ssl=server.ldaps,
                tls=self._verifier(ldap3),
                get_info=ldap3.NONE,
                connect_timeout=profile.connect_timeout_s,
            ),
            user=profile.bind or None,
            password=password or None,
            authentication=ldap3.SIMPLE if profile.bind else ldap3.ANONYMOUS,
            auto_bind=ldap3.AUTO_BIND_NONE,
            auto_referrals=False,
            check_names=False,
            receive_timeout=max(1, int(profile.answer_timeout_s)),
        )
        try:
            self._establish(made, ldap3)
            if profile.bind and (not password or "\0" in password):
                raise self._failure(Reason.CREDENTIALS, "the password is empty or has a NUL; nothing was asked")
            self._log_in(made, ldap3)
        except (LdapFailure, _Overdue):
            self._drop(made)
            raise
        except (
            ldap3.core.exceptions.LDAPExceptionError,
            OSError,
            KeyError,
            ValueError,
            TypeError,
            IndexError,
        ) as error:
            # What is no LDAP reaches ldap3's decoder and comes back as any of these.
            fault = self._fault or self._translated(error, ldap3)
            self._drop(made)
            raise fault from None
        return made

    def _establish(self, made: Any, ldap3: Any) -> None:
        made.open(read_server_info=False)
        sock = made.socket
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # else each login waits 40 ms for an acknowledgement
        self._reached()
        if self.server.ldaps:
            self._note_tls(made)
        elif self.profile.insecure:
            self._steps.passed("TLS", "none: insecure = true, password and addresses can be read on the way")
        else:
            try:
                started = made.start_tls(read_server_info=False)
            except ldap3.core.exceptions.LDAPExceptionError as error:
                raise self._fault or self._failure(Reason.TLS, f"StartTLS was refused: {_plain(error)}") from None
            if not started or not isinstance(made.socket, TlsStream):
                raise self._fault or self._failure(Reason.TLS, "StartTLS was refused")
            self._note_tls(made)

    def _reached(self) -> None:
        if len(self._steps.done) == 1:
            self._steps.passed("TCP", f"{self.server.host} port {self.server.port} answers")

    def _note_tls(self, made: Any) -> None:
        certificate = self.certificate
        assert certificate is not None
        days = (certificate.expires - time.time()) / 86400
        how = "taken unverified" if not self.profile.verify else "pinned" if self.profile.pin else "verified"
        self._steps.passed("TLS", f"{made.socket.version()}, {how}, ends in {days:.0f} days, key {certificate.pin}")

    def _log_in(self, made: Any, ldap3: Any) -> None:
        try:
            bound = made.bind(read_server_info=False)
        except ldap3.core.exceptions.LDAPSASLPrepError:
            raise self._failure(Reason.CREDENTIALS, "the password has characters that none can have") from None
        result = made.result or {}
        if not bound or result.get("result") != 0:
            raise decoded(int(result.get("result", 1)), str(result.get("message", "")), self.server.url)
        self._steps.passed("login", self.profile.bind or "anonymous")

    def _verifier(self, ldap3: Any) -> Any:
        """ldap3's place for TLS, with a context of our own: its host check knows no address on newer Pythons."""
        made, profile, server, owner = context(self.profile), self.profile, self.server, self

        class Verifier(ldap3.Tls):  # type: ignore[misc] # ldap3 is imported late
            def wrap_socket(self, connection: Any, do_handshake: bool = False) -> None:  # noqa: FBT001, FBT002
                owner._reached()
                try:
                    wrapped = TlsStream(connection.socket, made, profile.tls_server_name or server.host)
                except ssl.SSLError as error:
                    owner._fault = certificate_fault(error, server)
                    raise
                try:
                    owner.certificate = shown(wrapped, profile, server)
                except LdapFailure as failure:
                    wrapped.close()
                    owner._fault = failure
                    raise
                connection.socket = wrapped

        return Verifier(validate=ssl.CERT_NONE)

    def _translated(self, error: Exception, ldap3: Any) -> LdapFailure:
        text = _plain(error)
        if isinstance(error, ConnectionRefusedError) or "refused" in text:
            return self._failure(Reason.REFUSED, "connection refused")
        if "timed out" in text or isinstance(error, TimeoutError):
            known = len(self._steps.done) > 1
            return self._failure(Reason.SLOW if known else Reason.FILTERED, "no answer in time")
        if "unreachable" in text or "No route" in text:
            return self._failure(Reason.FILTERED, "unreachable")
        exceptions = ldap3.core.exceptions
        if isinstance(error, exceptions.LDAPSocketOpenError) and "ssl" in text:
            if "reset" in text or "EOF" in text or "closed" in text or "Broken pipe" in text:
                return self._failure(Reason.TLS, "the server hung up during the TLS handshake")
            return self._failure(Reason.TLS, f"no TLS: {text}")
        if isinstance(error, exceptions.LDAPCommunicationError | OSError):
            return self._failure(Reason.LOST, f"the connection ended: {text}")
        return self._failure(Reason.NOT_LDAP, f"the answer is no LDAP ({type(error).__name__})")

    def _drop(self, made: Any) -> None:
        if made.socket is not None:
            with suppress(OSError):
                made.socket.close()

    # --- asking ---------------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Hang up, politely where the socket still takes it."""
        with suppress(OSError):
            self._socket.settimeout(1)
            self._number += 1
            self._socket.sendall(ber.tlv(0x30, ber.integer(self._number) + b"\x42\x00"))  # UnbindRequest
        self._drop(self._ldap)

    def compiled(self, text: str) -> bytes:
        """A filter as it goes over the wire. Raises LdapFailure."""
        return compile_filter(text, self.server.url)

    def base(self) -> str:
        """Where to search when the configuration does not say. Raises LdapFailure."""
        if self.profile.base:
            return self.profile.base
        names = ("rootDomainNamingContext",) if self.server.is_global_catalogue else ()
        for name in (*names, "defaultNamingContext"):
            if found := self.root.get(name.lower()):
                return found[0].decode("utf-8", "replace")
        contexts = [one.decode("utf-8", "replace") for one in self.root.get("namingcontexts", []) if one]
        if len(contexts) == 1:
            return contexts[0]
        said = f"it has {', '.join(contexts)}" if contexts else "it names none to this account"
        raise self._failure(Reason.BASE, f"the server does not say where to search: {said}")

    def read(self, dn: str, attributes: Iterable[str]) -> Mapping[str, list[bytes]] | None:
        """One entry by its name, None when there is none (or none that may be seen). Raises LdapFailure."""
        found, result = self._ask(ber.search(dn, 0, self.compiled(EVERYTHING), attributes), b"")
        if result.code == 32:
            return None
        if result.code:
            raise decoded(result.code, result.diagnostic, self.server.url)
        return found[0][1] if found else None

    def _read_root(self) -> Mapping[str, list[bytes]]:
        found = self.read("", _ROOT)
        if found is None:
            return {}
        versions = found.get("supportedldapversion")
        if versions and b"3" not in versions:
            raise self._failure(Reason.NOT_LDAP, "the server speaks LDAPv2 only")
        return found

    def _ask(self, request: bytes, controls: bytes) -> tuple[list[ber.Entry], ber.Result]:
        found: list[ber.Entry] = []
        result: ber.Result | None = None
        for answer in self._answers(request, controls):
            if isinstance(answer, ber.Result):
                result = answer
            else:
                found.append(answer)
        assert result is not None
        return found, result

    def pages(
        self, base: str, scope: int, compiled: bytes, attributes: Iterable[str], take: Take | None = None
    ) -> Iterator[ber.Entry | None]:
        """Every entry, page by page; ends only when the server has proven that there are no more (rows R2, R6).

        Result 0 and the paging control on every page, or LdapFailure: then nothing of what came may be believed. Entries
        that ``take`` takes are not among those that come out; None comes with the end of each page.
        """
        request = ber.search(base, scope, compiled, attributes)
        cookie, held = b"", []
        for _ in range(PAGES):
            result: ber.Result | None = None
            came = -self._taken
            for answer in self._answers(request, ber.paged(self.profile.page_size, cookie), take):
                if isinstance(answer, ber.Result):
                    result = answer
                    continue
                came += 1
                if any(";range=" in name for name in answer[1]):
                    held.append(answer)  # asked for the rest when the pages are through
                else:
                    yield answer
            assert result is not None
            came += self._taken
            if result.code:
                raise decoded(result.code, result.diagnostic, self.server.url)
            if result.cookie is None:
                raise self._failure(Reason.PAGING, "a page came without the paging control, so it may not be the last")
            if result.cookie and result.cookie == cookie and not came:
                raise self._failure(Reason.PAGING, "the same empty page came twice")
            self.counted.pages += 1
            self.counted.entries += came
            cookie = result.cookie
            yield None
            if not cookie:
                break
        else:
            raise self._failure(Reason.PAGING, f"there is no end after {PAGES} pages")
        for name, found in held:
            yield name, self.whole(name, found)

    def whole(self, dn: str, found: Mapping[str, list[bytes]]) -> dict[str, list[bytes]]:
        """The entry with every value of attributes that came in parts (``member;range=0-1499``). Raises LdapFailure."""
        whole: dict[str, list[bytes]] = {name: values for name, values in found.items() if ";range=" not in name}
        for part, values in found.items():
            if ";range=" not in part:
                continue
            name, _, span = part.partition(";range=")
            gathered = list(values)
            for _ in range(RANGES):
                if span.endswith("-*"):
                    break
                self.counted.ranged += 1
                more = self.read(dn, [f"{name};range={int(span.partition('-')[2]) + 1}-*"]) or {}
                nexts = [key for key in more if key.startswith(f"{name};range=")]
                if not nexts:
                    raise self._failure(Reason.LOST, f"{dn}: the rest of {name} did not come")
                span = nexts[0].partition(";range=")[2]
                gathered += more[nexts[0]]
            else:
                raise self._failure(Reason.PAGING, f"{dn}: {name} has no end")
            whole[name] = gathered
        return whole

    def _answers(self, request: bytes, controls: bytes, take: Take | None = None) -> Iterator[ber.Entry | ber.Result]:
        """Entries and then the result of one request. Continuation references are counted and not followed."""
        profile = self.profile
        self._number += 1
        until = time.monotonic() + profile.page_timeout_s
        try:
            self._socket.settimeout(profile.answer_timeout_s)
            self._socket.sendall(ber.tlv(0x30, ber.integer(self._number) + request + controls))
            for found in self._messages(until, take):
                if found.operation == ber.SEARCH_ENTRY and found.number == self._number:
                    yield ber.entry(found)
                elif found.operation == ber.SEARCH_REFERENCE and found.number == self._number:
                    self.counted.references += 1
                elif found.operation == ber.SEARCH_DONE and found.number == self._number:
                    yield ber.result(found)
                    return
                elif found.operation == ber.EXTENDED_RESPONSE and not found.number:
                    result = ber.result(found)  # Notice of Disconnection, RFC 4511 §4.4.1
                    raise self._failure(Reason.LOST, f"the server hangs up: {result.diagnostic or result.code}")
                else:
                    raise ber.Garbled("an answer belongs to no question")
        except ber.Garbled as fault:
            raise self._failure(Reason.NOT_LDAP, str(fault)) from None
        except TimeoutError:
            raise self._failure(Reason.SLOW, f"nothing came for {profile.answer_timeout_s:g} s") from None
        except OSError as error:
            raise self._failure(Reason.LOST, f"the connection broke: {error.strerror or _plain(error)}") from None

    def _messages(self, until: float, take: Take | None) -> Iterator[ber.Message]:
        data, at = self._rest, 0
        self._rest = b""
        while True:
            if take is not None:
                at, taken = ber.entries(data, at, self._number, take)
                self._taken += taken
            found = ber.message(data, at)
            if found is not None:
                at = found.whole
                if found.operation == ber.SEARCH_DONE:
                    self._rest = data[at:]
                yield found
                continue
            left = until - time.monotonic()
            if left <= 0:
                raise self._failure(Reason.SLOW, f"a page took longer than {self.profile.page_timeout_s:g} s")
            more = received(self._socket, self._room, min(left, self.profile.answer_timeout_s))
            if not more:
                raise self._failure(Reason.LOST, "the server hung up in the middle of an answer")
            data, at = data[at:] + more, 0


def _plain(error: Exception) -> str:
    """An error's words, fit for one line of a log."""
    return "".join(c if c.isprintable() else "?" for c in str(error))[:200]
