"""Whatever goes wrong with a directory in the middle of a reading: the old snapshot stays, the reason is named, and the next
good reading needs no help.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator

import pytest

from tests.bed.ldap_faults import BIND, DONE, ENTRY, Break, FaultProxy, answer, inside, silent, tlv, trickle
from tests.bed.slapd import Slapd, Truth
from tests.directory.conftest import Site, agrees

pytestmark = pytest.mark.needs("slapd")

Act = Callable[[bytes, int, int], bytes]


@pytest.fixture(scope="module")
def proxy(ad: tuple[Slapd, Truth]) -> Iterator[FaultProxy]:
    made = FaultProxy(ad[0].port)
    yield made
    made.close()


@pytest.fixture(scope="module")
def site(ad: tuple[Slapd, Truth], proxy: FaultProxy, tmp_path_factory: pytest.TempPathFactory) -> Site:
    """Behind the proxy, with one good reading."""
    server, _ = ad
    profile = server.profile(
        servers=[proxy.url],
        insecure=True,
        ca_file=None,
        answer_timeout_s=1.0,
        page_timeout_s=2.0,
        connect_timeout_s=2.0,
    )
    made = Site(tmp_path_factory.mktemp("faults"), profile, domains=("corp.test", "office.corp.test"))
    made.good()
    return made


def at(operation: int, number: int, do: Callable[[bytes], bytes]) -> Act:
    """Do it to the given answer of the server; the root DSE is the first entry and the first done."""

    def act(message: bytes, found: int, before: int) -> bytes:
        return do(message) if (found, before) == (operation, number) else message

    return act


def from_then_on(operation: int, number: int, do: Callable[[bytes], bytes]) -> Act:
    def act(message: bytes, found: int, before: int) -> bytes:
        return do(message) if found == operation and before >= number else message

    return act


def ends(how: str) -> Callable[[bytes], bytes]:
    def do(_: bytes) -> bytes:
        raise Break(how)

    return do


def code(number: int, text: str = "") -> Callable[[bytes], bytes]:
    return lambda message: answer(message, inside(message)[1], number, text)


def half(message: bytes) -> bytes:
    """What comes behind it completes a message that is none."""
    return message[: len(message) // 2]


def disconnection(_: bytes) -> bytes:
    """Notice of Disconnection, RFC 4511 §4.4.1."""
    result = tlv(0x0A, b"\x34") + tlv(4, b"") + tlv(4, b"going down") + tlv(0x8A, b"1.3.6.1.4.1.1466.20036")
    return tlv(0x30, tlv(2, b"\0") + tlv(0x78, result))


def greet(octets: bytes) -> Callable[[socket.socket], None]:
    def do(client: socket.socket) -> None:
        client.sendall(octets)
        silent(client)

    return do


def reset_at_once(client: socket.socket) -> None:
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")


GREETINGS = {
    "accepts and resets": (reset_at_once, {"lost", "not-ldap"}),
    "accepts and closes": (lambda client: None, {"lost", "not-ldap"}),
    "accepts and hangs": (silent, {"slow", "lost"}),
    "speaks SMTP": (greet(b"220 mail.example.com ESMTP\r\n"), {"not-ldap", "lost", "slow"}),
    "speaks HTTP": (greet(b"HTTP/1.1 400 Bad Request\r\n\r\n"), {"not-ldap", "lost", "slow"}),
    "trickles": (trickle, {"slow"}),
    "announces an endless message": (greet(b"\x30\x84\x7f\xff\xff\xff" + b"x" * 100), {"slow", "not-ldap", "lost"}),
}

ACTS = {
    "login: reset": (at(BIND, 0, ends("reset")), {"lost"}),
    "login: hang": (at(BIND, 0, ends("hang")), {"slow", "lost"}),
    "login: wrong password in Active Directory's words": (
        at(
            BIND,
            0,
            code(49, "80090308: LdapErr: DSID-0C090447, comment: AcceptSecurityContext error, data 775, v4563\0"),
        ),
        {"credentials"},
    ),
    "login: needs TLS": (at(BIND, 0, code(8, "00002028: LdapErr")), {"needs-tls"}),
    "login: busy": (at(BIND, 0, code(51)), {"busy"}),
    "root: reset": (at(ENTRY, 0, ends("reset")), {"lost"}),
    "root: no LDAP": (at(DONE, 0, lambda _: b"\xff\xfe\xfd"), {"not-ldap"}),
    "first entry: reset": (at(ENTRY, 1, ends("reset")), {"lost"}),
    "first entry: close": (at(ENTRY, 1, ends("close")), {"lost"}),
    "first entry: hang": (at(ENTRY, 1, ends("hang")), {"slow"}),
    "first entry: half, then the rest": (at(ENTRY, 1, half), {"not-ldap"}),
    "middle of a page: reset": (at(ENTRY, 500, ends("reset")), {"lost"}),
    "middle of a page: hang": (at(ENTRY, 500, ends("hang")), {"slow"}),
    "middle of a page: garbage": (at(ENTRY, 500, lambda m: bytes(len(m))), {"not-ldap"}),
    "middle of a page: success that is a lie": (at(ENTRY, 500, lambda m: answer(m, DONE, 0)), {"paging"}),
    "middle of a page: the server goes down": (at(ENTRY, 500, disconnection), {"lost"}),
    "end of a page: without the paging control": (at(DONE, 1, lambda m: answer(m, DONE, 0)), {"paging"}),
    "end of a page: size limit": (at(DONE, 1, code(4)), {"size-limit"}),
    "end of a page: time limit": (at(DONE, 1, code(3)), {"slow"}),
    "end of a page: administrative limit": (at(DONE, 1, code(11)), {"size-limit"}),
    "end of a page: referral": (at(DONE, 1, code(10)), {"referral"}),
    "end of a page: no such object": (at(DONE, 1, code(32)), {"base"}),
    "end of a page: no right": (at(DONE, 1, code(50)), {"rights"}),
    "end of a page: unavailable": (at(DONE, 1, code(52)), {"busy"}),
    "end of a page: operations error": (at(DONE, 1, code(1)), {"other"}),
    "end of a page: reset": (at(DONE, 1, ends("reset")), {"lost"}),
    "second page: reset": (at(ENTRY, 1500, ends("reset")), {"lost"}),
    "second page: hang": (at(ENTRY, 1500, ends("hang")), {"slow"}),
    "last page: close": (at(DONE, 3, ends("close")), {"lost"}),
    "last page: without the paging control": (at(DONE, 3, lambda m: answer(m, DONE, 0)), {"paging"}),
    "another question's answer": (
        at(ENTRY, 700, lambda m: tlv(0x30, tlv(2, b"\x05") + b"\x64\x04\x04\0\x30\0")),
        {"not-ldap"},
    ),
}


def breaks(site: Site, truth: Truth, proxy: FaultProxy, reasons: set[str]) -> None:
    before = site.snapshot.generation
    outcome = site.sync()
    assert outcome.reason in reasons, outcome.why
    assert outcome.why
    assert outcome.cure
    assert outcome.generation == 0
    assert site.snapshot.generation == before
    proxy.act = proxy.greeting = None
    site.good()
    agrees(site.snapshot, truth)


@pytest.mark.parametrize("name", GREETINGS)
def test_a_server_that_is_none_changes_nothing(
    name: str, site: Site, ad: tuple[Slapd, Truth], proxy: FaultProxy
) -> None:
    proxy.greeting, reasons = GREETINGS[name]
    breaks(site, ad[1], proxy, reasons)


@pytest.mark.parametrize("name", ACTS)
def test_a_reading_that_breaks_changes_nothing(
    name: str, site: Site, ad: tuple[Slapd, Truth], proxy: FaultProxy
) -> None:
    proxy.act, reasons = ACTS[name]
    breaks(site, ad[1], proxy, reasons)


def test_active_directorys_numbers_are_said_in_words(site: Site, proxy: FaultProxy) -> None:
    text = "80090308: LdapErr: DSID-0C090447, comment: AcceptSecurityContext error, data %s, v4563"
    for number, words in (("52e", "wrong password"), ("533", "disabled"), ("532", "expired"), ("775", "locked")):
        proxy.act = at(BIND, 0, code(49, text % number))
        assert words in site.sync().why
    proxy.act = None


def test_one_reading_never_mixes_two_servers(
    ad: tuple[Slapd, Truth], proxy: FaultProxy, site: Site, tmp_path: object
) -> None:
    """The first breaks off on its last page; what it had said by then is not in the snapshot that the second gives."""
    server, truth = ad

    def lies(message: bytes) -> bytes:
        return message.replace(b"alias0.", b"wrong0.")

    def act(message: bytes, operation: int, before: int) -> bytes:
        if operation == DONE and before == 3:
            raise Break("reset")
        return lies(message)

    proxy.act = act
    profile = {**site.config.directory.ldap[0].model_dump(exclude_unset=True), "servers": [proxy.url, server.url]}
    both = Site(tmp_path, profile, domains=("corp.test", "office.corp.test"))
    outcome = both.good()
    proxy.act = None
    assert outcome.readings[0]["server"] == server.url
    agrees(both.snapshot, truth)
