"""Directories of 1,000, 10,000 and 100,000 entries of both kinds against the truth about them, and a dictionary attack of
100,000 RCPTs that must cause no question to a directory. Prints the counts; the exit code is 1 when anything differs.

    make check-directory [SIZES="1000 10000"]
"""

from __future__ import annotations

import base64
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from relay.config.schema import Config
from relay.directory.key import read_key
from relay.directory.passwords import read_passwords
from relay.directory.snapshot import NEEDS_AUTH, RESTRICTED, Directory
from relay.directory.sync import Purpose, synchronise
from relay.inbound.transaction import Rules, Transaction
from relay.mail.address import NULL_SENDER, AddressFault, is_relay_form, parse_utf8_mailbox
from relay.mail.reply import INTERNAL_RECIPIENT
from tests.bed.certificates import Authority
from tests.bed.next_hop import NextHop
from tests.bed.relay import RelayRunner
from tests.bed.slapd import BASE, DOMAINS, PASSWORD, Kind, Slapd, Truth, ad_tree, ldif, openldap_tree

SIZES: Final = (1_000, 10_000, 100_000)
GUESSES: Final = 100_000
MEMBERS: Final = 300
DELETED: Final = 200
SHOWN: Final = 5

Tree = Callable[[int], tuple[list[str], Truth]]
TREES: Final[dict[Kind, Tree]] = {"ad": ad_tree, "openldap": openldap_tree}
HOLDERS: Final = ("proxyAddresses", "mail", "mailAlternateAddress")


def main(sizes: Sequence[int]) -> int:
    """Print the counts; the exit code."""
    wrong = 0
    with tempfile.TemporaryDirectory(prefix="dmz-relay-check-") as name:
        folder = Path(name)
        authority = Authority()
        for kind in TREES:
            for size in sizes:
                place = folder / f"{kind}-{size}"
                place.mkdir()
                wrong += _tree(place, kind, size, authority)
        wrong += _attack(folder / "attack", authority)
    print("everything agrees" if not wrong else f"{wrong} disagreements")
    return 1 if wrong else 0


def _tree(place: Path, kind: Kind, size: int, authority: Authority) -> int:
    entries, truth = TREES[kind](size)
    people = dict(_people(entries, truth.valid))
    chosen = list(people)[: min(MEMBERS, len(people) // 3)]
    folder = "ou=Groups"
    group = f"cn=chosen,{folder},{BASE[kind]}"
    entries.append(ldif(group, ["group" if kind == "ad" else "groupOfNames"], cn="chosen", member=chosen))
    server = Slapd(place, kind, entries, authority)
    try:
        check = _Check(f"{kind} {size:,}")
        began = time.monotonic()
        judge = _read(place, server, {})
        seconds = time.monotonic() - began
        check.all("valid, accepted", truth.valid, judge.accepts, wanted=True)
        others = truth.never | {f"nobody-{number}@{domain}" for number in range(1000) for domain in DOMAINS[kind]}
        check.all("others, refused", others, judge.accepts, wanted=False)
        check.same("recipients in the snapshot", judge.recipients, len(truth.valid))
        check.all("restricted", truth.restricted, judge.has(RESTRICTED), wanted=True)
        check.all("not restricted", truth.valid - truth.restricted, judge.has(RESTRICTED), wanted=False)
        check.all("internal", truth.internal, judge.has(NEEDS_AUTH), wanted=True)
        check.all("not internal", truth.valid - truth.internal, judge.has(NEEDS_AUTH), wanted=False)

        members = set().union(*(people[dn] for dn in chosen))
        in_group = _read(place, server, {"groups": [group]}, "group")
        check.all("members of a group, accepted", members, in_group.accepts, wanted=True)
        check.all("out of the group, refused", truth.valid - members, in_group.accepts, wanted=False)

        gone = list(people)[-min(DELETED, size // 20) :]
        _delete(server, gone)
        deleted = set().union(*(people[dn] for dn in gone))
        after = _read(place, server, {})
        check.all("deleted, refused", deleted, after.accepts, wanted=False)
        check.all("left, accepted", truth.valid - deleted, after.accepts, wanted=True)
        print(f"{check.name} entries, read in {seconds:.1f} s: {', '.join(check.counted)}", flush=True)
        return check.wrong
    finally:
        server.close()


def _people(entries: Iterable[str], valid: set[str]) -> Iterator[tuple[str, set[str]]]:
    """The persons of a tree by name, each with the addresses that are to be accepted."""
    for entry in entries:
        found: dict[str, list[str]] = {}
        for line in entry.splitlines():
            name, _, value = line.partition(":: ")
            found.setdefault(name, []).append(base64.b64decode(value).decode("utf-8", "replace"))
        if not found or not {"user", "inetOrgPerson"} & set(found.get("objectClass", ())):
            continue
        said = [value for name in HOLDERS for value in found.get(name, ())]
        addresses = {one[5:] if one[:5].lower() == "smtp:" else one for one in said}
        mine = {address.lower() for address in addresses} & valid
        if mine:
            yield found["dn"][0], mine


def _delete(server: Slapd, names: Sequence[str]) -> None:
    subprocess.run(
        ["ldapdelete", "-x", "-H", server.url, "-D", f"cn=manager,{BASE[server.kind]}", "-w", PASSWORD],
        input="".join(f"{name}\n" for name in names), text=True, check=True, timeout=100,
    )  # fmt: skip


class _Judge:
    """What a session would say, from the snapshot that a worker would take."""

    def __init__(self, config: Config) -> None:
        directory = Directory(config.snapshot_path, read_key(config.key_path))
        assert directory.snapshot is not None, directory.refused
        self._lookup = directory.snapshot.lookup
        self.recipients = directory.snapshot.recipients
        self._transaction = Transaction(NULL_SENDER, False, False, Rules.of(config), directory)  # noqa: FBT003 - facts

    def accepts(self, address: str) -> bool:
        """Whether RCPT is answered 250; that an internal recipient refuses strangers is another question."""
        mailbox = parse_utf8_mailbox(address)
        if isinstance(mailbox, AddressFault) or "@" not in mailbox:
            return False
        verdict = self._transaction.judge_recipient(mailbox, is_relay_form(mailbox))
        return verdict.kind in (None, INTERNAL_RECIPIENT)

    def has(self, flag: int) -> Callable[[str], bool]:
        return lambda address: bool(self._lookup(address) & flag)


def _read(place: Path, server: Slapd, profile: dict[str, object], spool: str = "spool") -> _Judge:
    config = Config.model_validate(_config(place / spool, server, profile))
    outcome = synchronise(config, read_passwords(config, {}), Purpose.ASKED, time.time(), lambda _, __: None)
    assert not outcome.reason, f"{outcome.why}; {outcome.cure}"
    return _Judge(config)


def _config(spool: Path, server: Slapd, profile: dict[str, object]) -> dict[str, Any]:
    return {
        "server": {"hostname": "mx.example.com", "spool": spool},
        "process": {"user": "", "hub_user": ""},
        "listener": [{"name": "mx", "address": "127.0.0.1:2525"}],
        "domain": [{"names": list(DOMAINS[server.kind])}],
        "route": [{"domains": ["*"], "next_hops": ["smtp:[127.0.0.1]:26"]}],
        "directory": {"ldap": [server.profile(**profile)], "shrink": 1.0},
    }


class _Check:
    """Counts, and what differs."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.wrong = 0
        self.counted: list[str] = []

    def all(self, what: str, addresses: set[str], asked: Callable[[str], bool], *, wanted: bool) -> None:
        differ = [address for address in addresses if asked(address) is not wanted]
        self.counted.append(f"{len(addresses) - len(differ):,} {what}")
        self.wrong += len(differ)
        if differ:
            print(f"{self.name}: {len(differ)} of {len(addresses)} are not {what}: {sorted(differ)[:SHOWN]}")

    def same(self, what: str, found: int, wanted: int) -> None:
        if found != wanted:
            self.wrong += 1
            print(f"{self.name}: {found} {what}, and there should be {wanted}")


def _attack(place: Path, authority: Authority) -> int:
    """100,000 guesses at a relay with a directory behind it; searches are counted where they would arrive."""
    place.mkdir()
    (place / "slapd").mkdir()
    (place / "relay").mkdir()
    server = Slapd(place / "slapd", "openldap", openldap_tree(1000)[0], authority)
    hop = NextHop()
    relay = RelayRunner(place / "relay", hop.route, config={
        "domain": [{"names": list(DOMAINS["openldap"])}],
        "route": [{"domains": ["*"], "next_hops": [hop.route]}],
        "directory": {"sources": None, "ldap": [server.profile()], "sync_s": 3600.0},
        "limits": {"errors": 1_000_000},
    })  # fmt: skip
    try:
        relay.start(build=False)
        relay.wait_for_log("directory_read ")
        relay.wait_for_log("snapshot_taken")
        before = server.searches()
        began = time.monotonic()
        refused = 0
        with relay.client().open() as client:
            client.expect("250", "MAIL FROM:<x@elsewhere.example>")
            for start in range(0, GUESSES, 1000):
                said = client.pipeline(*(f"RCPT TO:<guess{n}@example.org>" for n in range(start, start + 1000)))
                refused += sum(one.code == 550 and one.enhanced == "5.1.1" for one in said)
        seconds = time.monotonic() - began
        asked = server.searches() - before
        print(
            f"dictionary attack: {refused:,} of {GUESSES:,} guesses refused in {seconds:.1f} s, searches at the directory: {asked}"
        )
        return asked + GUESSES - refused
    finally:
        relay.close()
        hop.close()
        server.close()


if __name__ == "__main__":
    sys.exit(main([int(one) for one in sys.argv[1:]] or SIZES))
