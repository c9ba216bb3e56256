"""Full synchronisations of a directory of N entries from a slapd on loopback: CPU, memory, time, beside ldapsearch's.

Usage: bench/directory.py [N ...]     default: 10000 100000. Needs slapd and ldap-utils.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from relay.config.schema import Config
from relay.directory.child import run, start
from relay.directory.passwords import read_passwords
from relay.directory.sync import Purpose
from tests.bed.certificates import Authority
from tests.bed.slapd import BASE, DOMAINS, PASSWORD, SERVICE, Slapd, ad_tree

ROUNDS = 3


def children_cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def reference(server: Slapd) -> float:
    """CPU seconds of ldapsearch for the same pages and attributes."""
    before = children_cpu()
    subprocess.run(
        ["ldapsearch", "-x", "-o", "ldif-wrap=no", "-H", server.url, "-D", SERVICE["ad"], "-w", PASSWORD, "-b", BASE["ad"],
         "-E", "pr=990/noprompt", "(proxyAddresses=*)", "proxyAddresses", "userAccountControl", "objectClass"],
        check=True, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    return children_cpu() - before


def measure(count: int, folder: Path) -> None:
    entries, truth = ad_tree(count)
    place = folder / "slapd"
    place.mkdir()
    server = Slapd(place, "ad", entries, Authority())
    del entries
    try:
        config = Config.model_validate({
            "server": {"hostname": "mx.example.com", "spool": folder / "spool"},
            "process": {"user": "", "hub_user": ""},
            "listener": [{"name": "mx", "address": "127.0.0.1:2525"}],
            "domain": [{"names": list(DOMAINS["ad"])}],
            "route": [{"domains": ["*"], "next_hops": ["smtp:[127.0.0.1]:26"]}],
            "directory": {"ldap": [server.profile()]},
        })  # fmt: skip
        passwords = read_passwords(config, os.environ)
        for _ in range(ROUNDS):
            searched = reference(server)
            before, began = children_cpu(), time.monotonic()
            outcome = run(start(config, passwords, Purpose.ASKED), config, lambda *_: None)
            wall, cpu = time.monotonic() - began, children_cpu() - before
            assert not outcome.reason, outcome.why
            assert outcome.counts["recipients"] == len(truth.valid)
            print(
                f"{count} entries, {len(truth.valid)} addresses: {cpu:.2f} s CPU, {wall:.2f} s in all, "
                f"{cpu / searched:.1f} x ldapsearch ({searched:.2f} s CPU)",
                flush=True,
            )
    finally:
        server.close()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(f"(this process, which made the tree, had {peak // 1024} MB)", file=sys.stderr)


def main() -> None:
    for count in map(int, sys.argv[1:] or ["10000", "100000"]):
        with tempfile.TemporaryDirectory(prefix="relay-bench-") as folder:
            measure(count, Path(folder))


if __name__ == "__main__":
    main()
