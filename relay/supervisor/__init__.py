"""The small parent of the process tree: sockets, secrets, watchdog, signals, reload. See ``docs/processes.md``."""
