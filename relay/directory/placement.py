"""Owns: the hosts that a directory names for single recipients (row R14): finding one, and counting those not allowed.

What is allowed is ``policy.route``'s: here is only said what the snapshot says. Must not decide where mail goes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Final

from relay.config.schema import Config
from relay.directory.snapshot import ACCEPT, Directory, Entry
from relay.directory.whole import Whole
from relay.mail.address import Mailbox, domain_of, unquoted, without_tag
from relay.policy.route import RouteTable

NAMES: Final = 20
"""Hosts reported one by one: a directory full of them fills no log."""
UNLISTED: Final = "the mail host is none of directory.next_hops"


def placement(directory: Directory, config: Config) -> Callable[[Mailbox], str] | None:
    """Address → the host that the snapshot in use names for it, "" for none; None where no host is allowed anyway."""
    if not config.directory.next_hops:
        return None
    delimiters = {name: domain.delimiter for domain in config.domain if domain.delimiter for name in domain.names}

    def hop_of(mailbox: Mailbox) -> str:
        snapshot = directory.snapshot
        if snapshot is None or not snapshot.placed:
            return ""
        plain = unquoted(mailbox)
        entry = snapshot.entry(plain)
        if (entry is None or not entry.flags & ACCEPT) and delimiters:
            bare = without_tag(plain, delimiters.get(domain_of(plain), ""))
            entry = snapshot.entry(bare) if bare else None
        return _of(entry)

    return hop_of


def _of(entry: Entry | None) -> str:
    return entry.next_hop if entry is not None and entry.flags & ACCEPT else ""


def unlisted(config: Config, whole: Whole) -> Counter[str]:
    """Addresses by host that is not allowed; with no host allowed nobody asked for any of it."""
    hosts: Counter[str] = Counter()
    if config.directory.next_hops:
        allowed = RouteTable(config).own
        for kind, times in whole.times.items():
            hop = _of(whole.table[kind].entry)
            if hop and hop not in allowed:
                hosts[hop] += times
    found: Counter[str] = Counter()
    for place, (host, count) in enumerate(hosts.most_common()):
        found[f"{UNLISTED}: {host}" if place < NAMES else f"{UNLISTED}: others"] += count
    return found
