"""Owns: gathering what the inside signs for the DMZ: every source and directory once, nothing of it put in place here.

The receiver's guards compare with what it has; here only what can be seen without that is refused. Must not write.
"""

from __future__ import annotations

from collections.abc import Mapping

from relay.config.schema import Config
from relay.directory.asking import Progress
from relay.directory.build import day_of
from relay.directory.guard import Difference, judge
from relay.directory.key import new_key
from relay.directory.layout import SnapshotError
from relay.directory.reading import read_profile
from relay.directory.sources import Collection, Tally, gather
from relay.directory.whole import Whole


def everything(
    config: Config, passwords: Mapping[str, str], now: float, progress: Progress
) -> tuple[Collection, Tally]:
    """All recipients, senders and rulings. ``now``: seconds since 1970. Raises SnapshotError and LdapFailure."""
    collection, tally = gather(config, day_of(now))
    key = new_key()  # of this run: what is sent has names in it
    for profile in config.directory.readings:
        came = read_profile(config, profile, passwords[profile.name], tally, progress, key, {})
        for address, entry in came.ledger.named():
            collection.add(address, entry)
    directory = config.directory
    refused = judge(Difference(), Whole([collection], key), directory.canaries, directory.restricted_canaries, 1.0, 0)
    if refused is not None:
        raise SnapshotError(str(refused))
    return collection, tally
