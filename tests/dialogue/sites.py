"""Owns: the relays that the dialogues are held with: one for each configuration and test process, started when first
asked for, and one next hop behind all of them.

Tests share a relay, so each tells its own messages by a sender nobody else uses (``Site.sender``).
"""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from tests.bed.certificates import Authority
from tests.bed.client import Client
from tests.bed.next_hop import NextHop, Transaction
from tests.bed.relay import RelayRunner
from tests.bed.waiting import wait_for

TRUSTED: Final = "127.0.0.3"
"""A source address that may relay in the sites that have trusted clients."""

MX: Final = {"mx": "mx"}
ALL: Final = {"mx": "mx", "strict": "mx", "submission": "submission", "submissions": "submissions"}
SMALLEST_MESSAGE: Final = 100_000

_numbers = itertools.count(1)

SITES: Final[Mapping[str, Mapping[str, Any]]] = {
    # What an operator gets who sets next to nothing; ``strict`` is an MX that requires TLS.
    "usual": {
        "listeners": ALL,
        "certificate": True,
        "config": {"trusted": {"networks": [TRUSTED]}, "domain": [{"names": ["example.com"]}, {"names": ["any.example.com"], "recipients": "any"}]},
    },
    "narrow": {
        "config": {
            "limits": {
                "message_octets": SMALLEST_MESSAGE,
                "header_octets": 2048,
                "recipients": 100,
                "hops": 3,
                "errors": 5,
                "sessions_per_client": 4,
                "sessions": 6,
            },
            "log": {"format": "json"},
        },
    },
    "hasty": {
        "listeners": {"mx": "mx", "submissions": "submissions"},
        "certificate": True,
        "config": {
            "limits": {
                "command_timeout_s": 1.0,
                "data_timeout_s": 1.0,
                "tls_handshake_timeout_s": 1.0,
                "sessions_per_client": 3,
            },
        },
    },
    "watching": {
        "config": {
            "senders": {"restricted": "log", "own_domains": "off"},
            "recipients": {"unknown": "log"},
            "content": {"header_firewall": "log"},
        },
    },
    "soft": {
        "config": {
            "server": {"soft_bounce": True},
            "senders": {"stage": "mail", "text": "Ask postmaster"},
            "content": {"line_endings": "refuse"},
        },
    },
    # Recipients from every kind of file, every rule about addresses; mail that leaves loses what is inside.
    "listed": {
        "files": {
            "map": "mapped@example.com OK\nleft@example.com 550 5.1.1 Has left\n  the company\n@wide.example.com OK\n",
            "aliases": "alias: SMTP:Proxy@example.com, smtp:second@example.com, X500:/o=Example/cn=alias\n",
            "list": "user@example.com\nbob@example.com\ncarol@example.com\nBob@exact.example.com\nuser@tagged.example.com\n",
            "overrides": "# ticket 4711\nclosed@wide.example.com 550 Closed\ncarol@example.com until=2001-01-31 550 Over\n",
        },
        "config": {
            "trusted": {"networks": [TRUSTED]},
            "content": {"outbound": True, "hide_received": True},
            "domain": [
                {"names": ["example.com"], "delimiter": "+", "postmaster": "hostmaster@example.com"},
                {"names": ["tagged.example.com"], "delimiter": "+", "tag": "remove"},
                {"names": ["wide.example.com"]},
                {"names": ["exact.example.com"], "case": "sensitive"},
                {"names": ["any.example.com"], "recipients": "any"},
            ],
            "directory": {
                "sources": [{"type": name, "path": name} for name in ("map", "aliases", "list", "overrides")],
                "overrides": [
                    {"address": "bob@example.com", "action": "450 4.2.1 On leave", "comment": "back in May"},
                    {"address": "carol@example.com", "action": "450 Over", "expires": "2001-01-31"},
                    {"address": "gone@any.example.com", "action": "550 5.1.6 Moved"},
                ],
            },
        },
    },
    # Behind a balancer at 127.0.0.1; several certificates; some clients have to use TLS.
    "fronted": {
        "listeners": {"mx": "mx", "submissions": "submissions", "open": "mx"},
        "certificate": True,
        "balanced": ("mx", "submissions"),
        "config": {"trusted": {"networks": ["192.0.2.7"]}, "limits": {"sessions_per_client": 3}},
    },
    # Whoever stands in the way meets it soon. Two workers: what one counts the other hears of.
    "wary": {
        "config": {
            "server": {"workers": 2},
            "limits": {
                "sessions": 20,
                "stress_percent": 50,
                "stress_timeout_s": 1.0,
                "unknown_recipients_per_client": 10,
                "unknown_recipients_per_network": 0,
                "greet_pause_s": 0.5,
                "tarpit_after": 2,
                "tarpit_s": 0.5,
            },
        },
    },
    # UTF-8 in addresses: a composed and a decomposed spelling, a domain of ours in its own script.
    "world": {
        "recipients": ["jörg@example.com", "zoe\u0308@example.com", "user@bücher.example", "user@example.com"],
        "restricted": ["böse@example.net Niemals"],
        "listeners": {"mx": "mx", "submissions": "submissions"},
        "certificate": True,
        "config": {"domain": [{"names": ["example.com"]}, {"names": ["Bücher.example"]}]},
    },
    "blind": {"build": False, "config": {"limits": {"errors": 5}, "domain": [{"names": ["example.com"]}, {"names": ["any.example.com"], "recipients": "any"}]}},
}  # fmt: skip


class Site:
    """One relay of ``SITES`` with what tests ask of it."""

    def __init__(self, name: str, folder: Path, hop: NextHop, authority: Authority) -> None:
        options = dict(SITES[name])
        folder.mkdir()
        self.hop = hop
        self.folder = folder
        self.authority = authority
        build = options.pop("build", True)
        for file, text in options.pop("files", {}).items():
            (folder / file).write_text(text)
        if options.pop("certificate", False):
            options["certificate"] = authority.files(folder)
        balanced = options.pop("balanced", ())
        self.relay = RelayRunner(folder, hop.route, default_next_hop=hop.route, **options)
        for listener in self.relay.config["listener"]:
            if listener["name"] == "strict":
                listener["require_tls"] = True
            if listener["name"] in balanced:
                listener["proxy_protocol"] = ["127.0.0.1"]
                listener["require_tls_from"] = ["192.0.2.64/26"]
        if balanced:
            self.relay.config["tls"]["named"] = [self.named(name) for name in ("mail.example.org", "*.example.edu")]
        self.relay.config["route"][0]["domains"].append("any.example.com")
        self.relay.configure({})
        self.relay.start(build=build)

    def named(self, name: str) -> dict[str, Any]:
        """A further certificate in its own folder, for one server name."""
        folder = self.folder / name.replace("*", "any")
        folder.mkdir(exist_ok=True)
        certificate, key = self.authority.files(folder, name)
        return {"names": [name], "certificate": certificate, "key": key}

    def client(self, listener: str = "mx", **options: Any) -> Client:
        """A connection, banner unread."""
        return self.relay.client(listener, **options)

    def sender(self) -> str:
        """An address that no other test uses."""
        return f"sender{next(_numbers)}@example.net"

    def arrived(self, sender: str, count: int = 1) -> list[Transaction]:
        """The messages of ``sender`` that the next hop took, once there are ``count``."""
        found = wait_for(
            lambda: seen if len(seen := self.from_(sender)) >= count else [],
            lambda: f"{count} messages of {sender}; {self.hop.story()}",
        )
        assert len(found) == count
        return found

    def from_(self, sender: str) -> list[Transaction]:
        """The messages of ``sender`` that the next hop took so far."""
        return [one for one in self.hop.accepted if one.sender == sender]

    def nothing_but(self, *senders: str) -> None:
        """Fail when a message of anybody else came since the last call: a smuggled one, for example."""
        strangers = [one for one in self.hop.accepted if one.sender not in senders and "smuggled" in one.sender]
        assert strangers == []
        assert self.hop.violations == []

    def session_count(self, listener: str = "mx") -> float:
        """Sessions the relay holds open now, as its metrics tell."""
        return self.relay.metric("relay_open_sessions", listener=listener)


class Sites:
    """All of them, made on demand."""

    def __init__(self, folder: Path, authority: Authority) -> None:
        self._folder = folder
        self._authority = authority
        self._made: dict[str, Site] = {}
        self.hop = NextHop()

    def get(self, name: str) -> Site:
        """The site, started now when nobody asked before."""
        if name not in self._made:
            self._made[name] = Site(name, self._folder / name, self.hop, self._authority)
        return self._made[name]

    def close(self) -> None:
        """Stop all; complain about exit codes, tracebacks, and what the next hop found wrong."""
        problems: list[Exception] = []
        for site in self._made.values():
            try:
                site.relay.close()
            except (AssertionError, OSError) as problem:
                problems.append(problem)
        self.hop.close()
        shutil.rmtree(self._folder)
        if problems:
            raise problems[0]
        assert self.hop.violations == []
