"""Readings of a directory from a slapd on loopback: CPU, memory, time, beside ldapsearch's; look-ups; what mail notices.

usage: bench/directory.py [N ...]     default: 100000 500000. Needs slapd and ldap-utils; two processors for what mail notices.

Both the relay and ldapsearch speak TLS to the same slapd in turn. The process that reads is measured alone: it is forked from one
that has nothing but the program. What mail notices is measured at the first N: one worker and its client on the first processor,
slapd and the reading on the second.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

sys.path.insert(0, str(Path(__file__).parents[1]))

from relay.directory.snapshot import Snapshot
from relay.directory.sync import Extent
from tests.bed.certificates import Authority
from tests.bed.next_hop import NextHop
from tests.bed.relay import RelayRunner
from tests.bed.slapd import BASE, DOMAINS, PASSWORD, SERVICE, Kind, Slapd, ad_tree, openldap_tree
from tests.bed.waiting import wait_for

ROUNDS: Final = 5
LOOKUPS: Final = 20_000
CHANGES: Final = 100
BUSY_S: Final = 6.0
SEARCHES: Final[dict[Kind, tuple[str, ...]]] = {
    "ad": ("(proxyAddresses=*)", "proxyAddresses", "mail", "userAccountControl", "objectClass", "objectGUID", "uSNChanged"),
    "openldap": ("(|(mail=*)(mailAlternateAddress=*))", "mail", "mailAlternateAddress", "entryUUID", "entryCSN"),
}  # fmt: skip


def children_cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def reference(server: Slapd) -> float:
    """CPU seconds of ldapsearch for the same pages and attributes."""
    before = children_cpu()
    kind = server.kind
    subprocess.run(
        ["ldapsearch", "-x", "-o", "ldif-wrap=no", "-H", server.tls_url, "-D", SERVICE[kind], "-w", PASSWORD, "-b", BASE[kind],
         "-E", "pr=990/noprompt", *SEARCHES[kind]],
        check=True, stdout=subprocess.DEVNULL, env={**os.environ, "LDAPTLS_CACERT": str(server.ca_file)},
    )  # fmt: skip
    return children_cpu() - before


def site(folder: Path, server: Slapd) -> dict[str, Any]:
    """A configuration."""
    profile = {name: str(value) if isinstance(value, Path) else value for name, value in server.profile().items()}
    return {
        "server": {"hostname": "mx.example.com", "spool": str(folder / "spool")},
        "process": {"user": "", "hub_user": ""},
        "listener": [{"name": "mx", "address": "127.0.0.1:2525"}],
        "domain": [{"names": list(DOMAINS[server.kind])}],
        "route": [{"domains": ["*"], "next_hops": ["smtp:[127.0.0.1]:26"]}],
        "directory": {"ldap": [profile]},
    }


def read(config: Path, extent: Extent) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("reading.py"), extent.value, config],
        check=True,
        stdout=subprocess.PIPE,
    )
    return dict(json.loads(done.stdout))


def look(snapshot: Path, key: bytes, addresses: Sequence[str]) -> None:
    found = Snapshot.open(snapshot, key)
    unknown = [f"x{address}" for address in addresses]
    for name, asked in (("hit", addresses), ("miss", unknown)):
        best = min(_lookups(found, asked) for _ in range(ROUNDS))
        print(f"  look-up, {name}: {best * 1e6:.2f} µs of {found.addresses} addresses (wanted: at most 2)")


def _lookups(snapshot: Snapshot, addresses: Sequence[str]) -> float:
    lookup, began = snapshot.lookup, time.perf_counter()
    for address in addresses:
        lookup(address)
    return (time.perf_counter() - began) / len(addresses)


def show(name: str, rounds: list[dict[str, Any]], searched: list[float], wanted: str) -> None:
    cpu = statistics.median(one["cpu"] for one in rounds)
    ratio = statistics.median(one["cpu"] / beside for one, beside in zip(rounds, searched, strict=True))
    each = ", ".join(f"{one['cpu']:.2f}" for one in rounds)
    print(
        f"  {name}: {cpu:.2f} s CPU ({each}), "
        f"{ratio:.2f} × ldapsearch ({statistics.median(searched):.2f} s), "
        f"{max(one['mb'] for one in rounds):.0f} MB, {statistics.median(one['wall'] for one in rounds):.2f} s; wanted: {wanted}",
        flush=True,
    )


@contextlib.contextmanager
def directory(kind: Kind, count: int, folder: Path) -> Iterator[tuple[Slapd, set[str]]]:
    entries, truth = ad_tree(count) if kind == "ad" else openldap_tree(count)
    place = folder / kind
    place.mkdir()
    server = Slapd(place, kind, entries, Authority())
    del entries
    try:
        yield server, truth.valid
    finally:
        server.close()


def full(count: int, folder: Path, wanted: str) -> None:
    """Of a tree like Active Directory's; look-ups in what comes of it."""
    with directory("ad", count, folder) as (server, valid):
        config = folder / "ad.json"
        config.write_text(json.dumps(site(folder / "ad-site", server)))
        searched, rounds = [], []
        for _ in range(ROUNDS if count <= 100_000 else 2):
            searched.append(reference(server))
            rounds.append(read(config, Extent.EVERYTHING))
            assert rounds[-1]["recipients"] == len(valid)
        show(f"full, Active Directory, {len(valid)} addresses", rounds, searched, wanted)
        place = folder / "ad-site/spool/directory"
        look(place / "snapshot", (place / "key").read_bytes(), sorted(valid)[:: max(1, len(valid) // LOOKUPS)])


def incremental(count: int, folder: Path) -> None:
    """Of a tree like OpenLDAP's, with a hundred changes each time."""
    with directory("openldap", count, folder) as (server, valid):
        config = folder / "openldap.json"
        config.write_text(json.dumps(site(folder / "openldap-site", server)))
        searched, rounds, changes = [], [], []
        for number in range(ROUNDS):
            searched.append(reference(server))
            rounds.append(read(config, Extent.EVERYTHING))
            server.modify(_changes(1000 + number * CHANGES))
            changes.append(read(config, Extent.CHANGES))
            assert changes[-1]["kind"] == "incremental"
            assert CHANGES <= changes[-1]["changed"] <= CHANGES + 1  # the last one of the time before comes again
        show(f"full, OpenLDAP, {len(valid)} addresses", rounds, searched, "at most 6 s, 60 MB, 10 s, 1.5 ×")
        show(f"incremental, OpenLDAP, {CHANGES} changes", changes, searched, "at most 0.5 s")
        noticed(server, folder, next(address for address in valid if address.startswith("user7@")))


def _changes(first: int) -> str:
    def change(number: int) -> str:
        dn = f"dn: uid=user{number},ou=People,{BASE['openldap']}\nchangetype: "
        if number % 5 == 0:
            return f"{dn}delete\n\n"
        return f"{dn}modify\nreplace: mailAlternateAddress\nmailAlternateAddress: new{number}@example.org\n\n"

    return "".join(map(change, range(first, first + CHANGES)))


class Mail:
    """A client that asks for one recipient after the other, as fast as it is answered."""

    def __init__(self, port: int, recipient: str) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port), 30)
        self._file = self._socket.makefile("rb")
        self._round = (b"MAIL FROM:<a@elsewhere.example>", f"RCPT TO:<{recipient}>".encode(), b"RSET")
        self._answer()
        self._ask(b"EHLO client.example.com")

    def _answer(self) -> bytes:
        while True:
            line = self._file.readline()
            if line[3:4] == b" ":
                return line

    def _ask(self, command: bytes) -> bytes:
        self._socket.sendall(command + b"\r\n")
        return self._answer()

    def until(
        self, ends: float, still: subprocess.Popen[bytes] | None = None
    ) -> tuple[float, list[tuple[float, float]]]:
        """Rounds a second, and for each round when it began and how long its slowest answer took."""
        began, seen = time.monotonic(), []
        while time.monotonic() < ends or (still is not None and still.poll() is None):
            at, slowest = time.monotonic(), 0.0
            for command in self._round:
                before = time.monotonic()
                assert self._ask(command).startswith(b"250")
                slowest = max(slowest, time.monotonic() - before)
            seen.append((at, slowest))
        return len(seen) / (time.monotonic() - began), seen


def noticed(server: Slapd, folder: Path, recipient: str) -> None:
    """What a worker's clients notice of a reading and of the switch, and how long until all workers have switched."""
    place = folder / "relay"
    place.mkdir()
    hop = NextHop()
    relay = RelayRunner(place, hop.route, config={
        "server": {"workers": 2},
        "domain": [{"names": list(DOMAINS["openldap"])}],
        "route": [{"domains": ["*"], "next_hops": [hop.route]}],
        "directory": {"sources": None, "ldap": [server.profile()], "sync_s": 86000.0},
    })  # fmt: skip
    try:
        relay.start(build=False)
        relay.wait_for_log("snapshot_taken", 2)
        took = []
        for _ in range(3):
            before, began = len(relay.grep("snapshot_taken")), time.monotonic()
            _sync(relay).wait()
            wait_for(lambda: len(relay.grep("snapshot_taken")) >= before + 2, "both workers")  # noqa: B023
            took.append(time.monotonic() - began)
        print(
            f"  from the start of the command to both workers switched: {statistics.median(took):.2f} s; wanted: at most 10"
        )
        assert relay.stop() == 0
        relay.configure({"server": {"workers": 1}})
        own = os.sched_getaffinity(0)
        if len(own) < 2:
            print("  what mail notices needs two processors")
            return
        first, second = sorted(own)[:2]
        os.sched_setaffinity(0, {first})
        try:
            relay.start(build=False)
            _pin(server.pid, second)
            ratios, worst, quiet = [], 0.0, 0.0
            for _ in range(3):
                mail = Mail(relay.ports["mx"], recipient)
                alone, rounds = mail.until(time.monotonic() + BUSY_S)
                quiet = max(quiet, *(slowest for _, slowest in rounds))
                there = len(relay.grep("snapshot_taken"))
                beside, rounds = mail.until(0.0, _sync(relay, second))
                _, more = mail.until(time.monotonic() + 2.0)  # a worker looks once a second
                assert len(relay.grep("snapshot_taken")) > there
                ratios.append(beside / alone)
                worst = max(worst, *(slowest for _, slowest in [*rounds, *more]))
            print(
                f"  throughput beside a reading: {statistics.median(ratios):.2f} of the undisturbed; wanted: at least 0.9"
            )
            print(f"  slowest answer beside readings and switches: {worst * 1000:.0f} ms (without: {quiet * 1000:.0f}); wanted: at most 100")  # fmt: skip
        finally:
            os.sched_setaffinity(0, own)
    finally:
        relay.stop()
        hop.close()


def _pin(pid: int, processor: int) -> None:
    """All threads of a process."""
    for thread in os.listdir(f"/proc/{pid}/task"):
        os.sched_setaffinity(int(thread), {processor})


def _sync(relay: RelayRunner, processor: int | None = None) -> subprocess.Popen[bytes]:
    pinned = ["taskset", "-c", str(processor)] if processor is not None and shutil.which("taskset") else []
    return subprocess.Popen(
        [*pinned, sys.executable, "-m", "relay", "directory", "sync", "--full", "--config", str(relay.config_file)],
        cwd=Path(__file__).parents[1], stdout=subprocess.DEVNULL,
    )  # fmt: skip


def main() -> None:
    for count in map(int, sys.argv[1:] or ["100000", "500000"]):
        print(f"{count} entries", flush=True)
        large = count > 100_000
        with tempfile.TemporaryDirectory(prefix="relay-bench-") as folder:
            full(count, Path(folder), "at most 80 MB" if large else "at most 6 s, 60 MB, 10 s, 1.5 ×")
            if not large:
                incremental(count, Path(folder))


if __name__ == "__main__":
    main()
