"""The small parent of the process tree: sockets, secrets, watchdog, signals, reload. See ``docs/processes.md``."""

from relay.supervisor.tree import run

__all__ = ["run"]
