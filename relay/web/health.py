"""Owns: whether the relay is ready for mail, decided from the figures. Pure: the clock is in the figures."""

from __future__ import annotations

from typing import Final

from relay.config.schema import Config
from relay.queue.layout import Tuning
from relay.web.collect import Figures

SPOOL_FREE_OCTETS: Final = Tuning().reserve_octets
"""Below this much free space the queue takes nothing new, and clients get 452."""

WORKER: Final = "worker-"


def reasons(figures: Figures, config: Config) -> list[str]:
    """Why the relay is not ready; empty when it is. For operators: what, where, what to do."""
    found: list[str] = []
    if figures.snapshot is None and any(domain.recipients in {"directory", "static"} for domain in config.domain):
        found.append(f"snapshot: {figures.snapshot_problem}")
    if figures.spool_free is None:
        found.append(f"spool: {figures.spool_problem}")
    elif figures.spool_free < SPOOL_FREE_OCTETS:
        found.append(
            f"spool: {figures.spool_free // 2**20} MB are free on {config.server.spool}, "
            f"{SPOOL_FREE_OCTETS // 2**20} MB are needed; make room"
        )
    if figures.queue is None:
        found.append(f"queue: {figures.queue_problem}")
    oldest = figures.taken - config.process.heartbeat_timeout_s
    if not any(turned >= oldest for member, turned in figures.alive.items() if member.startswith(WORKER)):
        found.append("workers: none is alive; see the log")
    return found
