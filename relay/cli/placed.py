"""Owns: the routes as the daemon asks them, with what the directory says of single recipients. Decides nothing."""

from __future__ import annotations

from relay.cli.directory import in_use
from relay.config.schema import Config
from relay.directory.placement import placement
from relay.mail.address import Mailbox
from relay.policy.route import Decision, Route, RouteTable


class Placed:
    """Where mail goes, for commands. Reads the snapshot only where a directory may name hosts (``directory.next_hops``)."""

    def __init__(self, config: Config) -> None:
        """Raises CommandFailed when the snapshot's key is needed and cannot be read."""
        self.table = RouteTable(config)
        self._hop_of = placement(in_use(config), config) if config.directory.next_hops else None

    def hop(self, mailbox: Mailbox) -> str:
        """The host that the directory names, allowed or not; "" for none."""
        return self._hop_of(mailbox) if self._hop_of is not None else ""

    def route(self, mailbox: Mailbox) -> Route | None:
        """As the daemon finds it."""
        return self.table.of(mailbox, self.hop(mailbox))

    def decide(self, mailbox: Mailbox) -> Decision | None:
        """The same, with what decided."""
        return self.table.decide(mailbox, self.hop(mailbox))

    def remark(self, mailbox: Mailbox) -> str:
        """What the directory says of the host, in words; "" when it says nothing."""
        hop = self.hop(mailbox)
        if not hop:
            return ""
        return f"names the host {hop}" + ("" if hop in self.table.own else ", which is none of directory.next_hops")
