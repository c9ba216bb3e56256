"""``relay explain`` and the running relay say the same: every reply line, and every line that each would write to the log."""

from __future__ import annotations

import itertools
import json
import re
from dataclasses import dataclass

import pytest

from relay.cli.explain import play
from relay.config.load import load
from tests.bed.wire import letter
from tests.dialogue.matrix import VERDICTS
from tests.dialogue.sites import TRUSTED, Site, Sites

_numbers = itertools.count(1)

LONG = "x" * 64
INSIDE = "user@example.com"
OUTSIDE = "someone@elsewhere.example"


@dataclass(frozen=True, slots=True)
class Case:
    """One dialogue: who connects where, and what it names."""

    site: str
    to: tuple[str, ...]
    sender: str = "a@example.net"
    client: str = "127.0.0.1"
    listener: str = "mx"
    tls: bool = False
    size: int = 0

    def __str__(self) -> str:
        return f"{self.site}-{self.listener}-{self.client}-{self.sender}-{'+'.join(self.to)}"[:90]


RECIPIENTS = (
    INSIDE, "USER@Example.COM", '"user"@example.com', "nobody@example.com", "restricted@example.com", OUTSIDE,
    "postmaster", "Postmaster@example.com", "whoever@any.example.com", "a%b@any.example.com", "a!b@example.com",
    '"a@b"@example.com', "@hop:user@example.com", "", "user", "user@", "a@[127.0.0.1]", f"{LONG}x@example.com",
    "user@example.com> FOO=1", "us er@example.com",
)  # fmt: skip
SENDERS = (
    "", "user@example.com", "restricted@example.com", "RESTRICTED@EXAMPLE.COM", '"restricted"@example.com', "postmaster",
    "nobody", "a@b@c", "@a:b@c", "a b@example.net", "<a@example.net> FOO", "<a@example.net> SIZE=12 BODY=8BITMIME",
)  # fmt: skip

CASES = [
    *(Case(one.site, one.to, one.sender, one.client, one.listener, one.tls, one.size) for one in VERDICTS),
    *(Case("usual", (one,)) for one in RECIPIENTS),
    *(Case("usual", (one,), client=TRUSTED) for one in (INSIDE, "nobody@example.com", OUTSIDE, "a%b@elsewhere.example", "postmaster")),
    *(Case("usual", (INSIDE,), sender=one) for one in SENDERS),
    Case("usual", (INSIDE, "nobody@example.com", OUTSIDE), sender="restricted@example.com"),
    Case("usual", (INSIDE,), size=10**9),
    Case("usual", (INSIDE,), size=1000),
    Case("usual", (INSIDE,), listener="strict"),
    Case("usual", (INSIDE, "nobody@example.com"), listener="strict", tls=True),
    Case("usual", (INSIDE,), tls=True),
    Case("usual", (OUTSIDE,), tls=True, sender="restricted@example.com"),
    Case("usual", (INSIDE,), listener="submission"),
    Case("usual", (INSIDE,), listener="submission", tls=True),
    Case("usual", (INSIDE,), listener="submissions", tls=True),
    Case("narrow", tuple(f"user{n}@elsewhere.example" for n in range(6))),
    Case("narrow", (INSIDE,) * 102),
    Case("narrow", (INSIDE,), size=100_001),
    *(Case("watching", (one,), sender="restricted@example.com") for one in (INSIDE, "nobody@example.com", OUTSIDE)),
    *(Case("soft", (one,)) for one in (INSIDE, "nobody@example.com", OUTSIDE, "a%b@example.com", "us er@example.com")),
    *(Case("soft", (INSIDE,), sender=one) for one in ("restricted@example.com", "a@b@c")),
    Case("soft", (INSIDE,), size=10**9),
    *(Case("blind", (one,)) for one in (INSIDE, "postmaster", OUTSIDE, "whoever@any.example.com")),
    *(
        Case("listed", (one,))
        for one in (
            "mapped@example.com", "left@example.com", "user+news@example.com", "bob+x@example.com", "carol@example.com",
            "closed@wide.example.com", "whoever@wide.example.com", "bob@exact.example.com", "Bob@exact.example.com",
            "gone@any.example.com", "postmaster", "user+x@tagged.example.com", "nobody+x@tagged.example.com",
        )
    ),
]  # fmt: skip


def live(site: Site, case: Case, helo: str) -> list[tuple[int, tuple[str, ...]]]:
    """What the running relay says, reply by reply."""
    context = site.authority.client()
    implicit = case.listener == "submissions"
    options = {"tls": context} if implicit else {}
    with site.client(case.listener, source=case.client, **options) as client:
        said = [client.greeting(), client.command(f"EHLO {helo}")]
        if case.tls and not implicit:
            said.append(client.command("STARTTLS"))
            client.wrap(context)
            said.append(client.command(f"EHLO {helo}"))
        size = f" SIZE={case.size}" if case.size else ""
        said.append(client.command(f"MAIL FROM:{path(case.sender)}{size}"))
        for recipient in case.to:
            said.append(client.command(f"RCPT TO:{path(recipient)}"))
            if said[-1].code == 421:
                break
        else:
            client.quit()
    return [tuple(reply) for reply in said]


def path(address: str) -> str:
    return address if address.startswith("<") else f"<{address}>"


def told(reply: tuple[str, ...]) -> tuple[int, tuple[str, ...]]:
    """As the client of the test bed gives it."""
    return int(reply[-1][:3]), tuple(line[4:] for line in reply)


def bare(lines: list[str]) -> list[object]:
    """Log lines without time, host and process."""
    return [
        {key: value for key, value in json.loads(line).items() if key not in ("time", "pid")}
        if line.startswith("{")
        else line.partition("]: ")[2]
        for line in lines
    ]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_explain_agrees_with_the_running_relay(sites: Sites, case: Case) -> None:
    site = sites.get(case.site)
    helo = f"case{next(_numbers)}.example.net"
    before = len(site.relay.grep("disconnect"))
    config = load(site.relay.config_file, {})
    explained = play(
        config, case.client, helo, case.sender, list(case.to), case.size, case.listener, None, tls=case.tls
    )
    said = live(site, case, helo)
    assert [told(one.reply) for one in explained.dialogue] == said
    site.relay.wait_for_log("disconnect", before + 1)
    written = [line for one in explained.dialogue for line in one.log if helo in line]
    assert bare(site.relay.grep(re.escape(helo))) == bare(written)
    for one in explained.dialogue:
        if one.command and one.reply[0][0] in "45":
            assert (one.rule, one.accepted) == (one.asked[-1].rule, False)
            assert one.asked[-1].answer == f"refuses: {one.reply[0]}"
            assert not any(each.answer.startswith("refuses") for each in one.asked[:-1])


@pytest.mark.parametrize(
    ("site", "client", "message", "code", "logged"),
    [
        ("usual", "127.0.0.1", b"Subject: a\n\n.dot\n", 250, ""),
        ("usual", "127.0.0.1", b"X-MS-Exchange-Organization-SCL: -1\r\nSubject: a\r\n\r\nb\r\n", 250, "header removed: x-ms-exchange-organization-scl (1)"),
        ("usual", TRUSTED, b"X-MS-Exchange-Organization-SCL: -1\r\n\r\nb\r\n", 250, ""),
        ("watching", "127.0.0.1", b"X-MS-Exchange-Organization-SCL: -1\n\nb\n", 250, "header_warning: would be removed: x-ms-exchange-organization-scl (1)"),
        ("narrow", "127.0.0.1", b"Received: a\nReceived: b\nReceived: c\n\nb\n", 554, "5.4.6"),
        ("narrow", "127.0.0.1", letter() + b"x" * 100_000, 552, "5.3.4"),
    ],
)  # fmt: skip
def test_a_message_is_explained_as_it_is_taken(
    sites: Sites, site: str, client: str, message: bytes, code: int, logged: str
) -> None:
    there = sites.get(site)
    config = load(there.relay.config_file, {})
    explained = play(config, client, "a.example", "a@example.net", [INSIDE], 0, "", message, tls=False)
    last = explained.dialogue[-1]
    assert (int(last.reply[0][:3]), last.accepted) == (code, code == 250)
    assert logged in "\n".join(last.log)
    with there.client(source=client) as real:
        real.open()
        real.envelope("a@example.net", [INSIDE])
        wire = b"".join(line + b"\r\n" for line in message.splitlines())
        assert real.data(wire).code == code
        real.quit()


def test_the_command_prints_it_for_people_and_for_programs_with_an_exit_code(listed: Site) -> None:
    arguments = ("explain", "--client", "192.0.2.9", "--helo", "a.example", "--from", "x@y.example")
    said = listed.relay.command(*arguments, "--to", "user+news@example.com")
    assert said.returncode == 0
    lines = said.stdout.splitlines()
    assert "> RCPT TO:<user+news@example.com>" in lines
    assert "    look-up: user@example.com: a recipient" in lines
    assert any(line.startswith("    8. recipients.unknown") and line.endswith(": accepts") for line in lines)
    assert lines[-2].startswith("headers: removed where they occur: X-MS-Exchange-Organization-*")
    refused = listed.relay.command(*arguments, "--to", "left@example.com", "--to", "postmaster", "--json")
    assert refused.returncode == 1
    found = json.loads(refused.stdout)
    left, postmaster = found["dialogue"][-2:]
    assert (found["accepted"], left["rule"]) == (False, "directory.sources")
    assert left["log"][0].endswith("from=<x@y.example> to=<left@example.com> proto=ESMTP helo=<a.example>")
    assert (postmaster["accepted"], postmaster["goes_to"]) == (True, "hostmaster@example.com")
    assert postmaster["route"] == (
        f"127.0.0.1:{listed.hop.port}, by the entry example.com (asked: hostmaster@example.com, example.com)"
    )


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (("--client", "a.example"), "--client a.example: not an IP address"),
        (("--listener", "nowhere"), "--listener nowhere: there is none; there are mx"),
        (("--tls",), "--tls: the relay offers no STARTTLS"),
        (("--helo", "a\nQUIT"), "an argument of a command is one line"),
        (("--message", "/nowhere/message"), "--message /nowhere/message: No such file or directory"),
    ],
)
def test_what_cannot_be_asked_is_told_with_exit_code_2(listed: Site, arguments: tuple[str, ...], what: str) -> None:
    said = listed.relay.command("explain", "--to", INSIDE, *arguments)
    assert said.returncode == 2
    assert what in said.stderr
