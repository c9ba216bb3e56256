"""Owns: the name, type, meaning and labels of every metric of the project, and nothing else.

``docs/metrics.md`` is tested against this table. Must not count anything: members do that in ``telemetry.metrics``,
figures that can be read at scrape time come from ``web.collect``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal


@dataclass(frozen=True, slots=True)
class Family:
    """One metric. ``name`` is the scraped name without ``_total``, which every counter gets.

    ``merge`` says how a gauge of several members becomes one: the sum, the least or the most. Help texts stay short, because
    value files repeat them with every label set.
    """

    name: str
    type: Literal["counter", "gauge", "histogram"]
    text: str
    labels: tuple[str, ...] = ()
    merge: Literal["livesum", "livemin", "livemax"] = "livesum"

    @property
    def scraped(self) -> str:
        """The name on the metrics page."""
        return f"{self.name}_total" if self.type == "counter" else self.name


# --- counted by the members --------------------------------------------------------------------------------------
REPLIES: Final = Family("relay_replies", "counter", "Replies to clients", ("code", "enhanced", "reason"))
SESSIONS: Final = Family("relay_sessions", "counter", "Sessions accepted", ("listener",))
OPEN_SESSIONS: Final = Family("relay_open_sessions", "gauge", "Sessions open now", ("listener",))
RECEIVED_MESSAGES: Final = Family("relay_received_messages", "counter", "Messages taken", ("listener",))
RECEIVED_BYTES: Final = Family("relay_received_bytes", "counter", "Octets of messages taken", ("listener",))
ACCEPTED: Final = Family("relay_accepted", "counter", "Messages acknowledged, by way", ("way", "reason"))
LOGINS: Final = Family("relay_logins", "counter", "Logins, by mechanism and result", ("mechanism", "result"))
SHORT_OF: Final = Family("relay_short_of", "gauge", "Workers short of it", ("what",))
SHADOW: Final = Family("relay_shadow_refusals", "counter", "Refusals by rules in mode log", ("reason",))
HEADERS_REMOVED: Final = Family("relay_headers_removed", "counter", "Header lines taken out by the firewall")
SENT_MESSAGES: Final = Family("relay_sent_messages", "counter", "Messages handed to a next hop", ("next_hop",))
SENT_BYTES: Final = Family("relay_sent_bytes", "counter", "Octets handed to a next hop", ("next_hop",))
DELIVERIES: Final = Family("relay_deliveries", "counter", "Results, one per recipient", ("next_hop", "outcome"))
NEXT_HOP_STATE: Final = Family("relay_next_hop_state", "gauge", "Workers that see it so", ("next_hop", "state"))
NEXT_HOP_CONNECTIONS: Final = Family("relay_next_hop_connections", "gauge", "Connections open now", ("next_hop",))
LATE: Final = Family("relay_late_answers", "counter", "Messages slower than the express deadline")
POSSIBLE_DUPLICATES: Final = Family(
    "relay_possible_duplicates", "counter", "Deliveries tried again without knowing the outcome"
)
ACCEPT_SECONDS: Final = Family("relay_accept_seconds", "histogram", "Final dot to reply")
DELIVERY_SECONDS: Final = Family("relay_delivery_seconds", "histogram", "One transaction", ("next_hop",))
SNAPSHOT_IN_USE: Final = Family(
    "relay_snapshot_generation_in_use", "gauge", "Oldest generation a worker uses", merge="livemin"
)
SNAPSHOT_REFUSALS: Final = Family("relay_snapshot_refusals", "counter", "Snapshots a worker refused")
CALLOUTS: Final = Family("relay_callouts", "counter", "Recipients a next hop was asked about, by result", ("result",))
CALLOUT_OFF: Final = Family(
    "relay_callout_off", "gauge", "Domains whose next hop takes anything, seen by some worker", merge="livemax"
)
LOG_LINES_LOST: Final = Family("relay_log_lines_lost", "counter", "Log lines that could not be written")
RESTARTS: Final = Family(
    "relay_process_restarts", "counter", "Processes that died and were replaced", ("role", "cause")
)
ALIVE: Final = Family(
    "relay_member_alive_timestamp_seconds", "gauge", "When its loop last turned", ("member",), merge="livemax"
)

MEMBERS: Final = (
    REPLIES,
    SESSIONS,
    OPEN_SESSIONS,
    SHORT_OF,
    RECEIVED_MESSAGES,
    RECEIVED_BYTES,
    ACCEPTED,
    LOGINS,
    SHADOW,
    HEADERS_REMOVED,
    SENT_MESSAGES,
    SENT_BYTES,
    DELIVERIES,
    NEXT_HOP_STATE,
    NEXT_HOP_CONNECTIONS,
    LATE,
    POSSIBLE_DUPLICATES,
    ACCEPT_SECONDS,
    DELIVERY_SECONDS,
    SNAPSHOT_IN_USE,
    SNAPSHOT_REFUSALS,
    CALLOUTS,
    CALLOUT_OFF,
    LOG_LINES_LOST,
    RESTARTS,
    ALIVE,
)

# --- read at scrape time -----------------------------------------------------------------------------------------
BUILD: Final = Family("relay_build_info", "gauge", "Always 1; the version is the label", ("version",))
QUEUE_READABLE: Final = Family("relay_queue_readable", "gauge", "1 when the queue could be read")
QUEUE_MESSAGES: Final = Family("relay_queue_messages", "gauge", "Messages in the queue")
QUEUE_RECIPIENTS: Final = Family("relay_queue_recipients", "gauge", "Recipients still to be served")
QUEUE_HELD: Final = Family("relay_queue_held_recipients", "gauge", "Recipients held by an operator")
QUEUE_LEASED: Final = Family("relay_queue_leased_messages", "gauge", "Messages a worker is busy with")
QUEUE_BYTES: Final = Family("relay_queue_bytes", "gauge", "Octets of the messages in the queue")
QUEUE_OLDEST: Final = Family("relay_queue_oldest_age_seconds", "gauge", "Age of the oldest message, 0 when empty")
QUEUE_CORRUPT: Final = Family("relay_queue_corrupt_messages", "gauge", "Damaged messages that were set aside")
SPOOL_FREE: Final = Family("relay_spool_free_bytes", "gauge", "Free space on the spool's file system")
SNAPSHOT_USABLE: Final = Family("relay_snapshot_usable", "gauge", "1 when the snapshot file can be used")
SNAPSHOT_AGE: Final = Family("relay_snapshot_age_seconds", "gauge", "Time since the snapshot was built")
SNAPSHOT_BYTES: Final = Family("relay_snapshot_bytes", "gauge", "Size of the snapshot file")
SNAPSHOT_GENERATION: Final = Family("relay_snapshot_generation", "gauge", "Generation of the snapshot file")
SNAPSHOT_ADDRESSES: Final = Family("relay_snapshot_addresses", "gauge", "Valid addresses in the snapshot")
SNAPSHOT_RESTRICTED: Final = Family("relay_snapshot_restricted_senders", "gauge", "Restricted senders in the snapshot")
DIRECTORY_AGE: Final = Family(
    "relay_directory_success_age_seconds", "gauge", "Time since the directories were last read and taken"
)
DIRECTORY_DURATION: Final = Family(
    "relay_directory_read_seconds", "gauge", "How long the last reading taken took", ("kind",)
)
DIRECTORY_READ: Final = Family("relay_directory_readings", "counter", "Readings taken", ("kind",))
DIRECTORY_FAILED: Final = Family("relay_directory_refused_readings", "counter", "Readings not taken", ("reason",))
DIRECTORY_CERTIFICATE: Final = Family(
    "relay_directory_certificate_seconds", "gauge", "Time until the server's certificate ends", ("directory",)
)
DIRECTORY_PASSWORD: Final = Family(
    "relay_directory_password_seconds",
    "gauge",
    "Time until the password of the account that reads ends",
    ("directory",),
)
DIRECTORY_WEAK: Final = Family(
    "relay_directory_insecure", "gauge", "1 when a directory is asked in clear, unverified or as nobody", ("directory",)
)
PROCESS_CPU: Final = Family("relay_process_cpu_seconds", "counter", "CPU time of living members", ("member",))
PROCESS_MEMORY: Final = Family("relay_process_resident_bytes", "gauge", "Resident memory of members", ("member",))
FILES_UNREADABLE: Final = Family("relay_metrics_files_unreadable", "gauge", "Value files left out of this page")

SCRAPED: Final = (
    BUILD,
    QUEUE_READABLE,
    QUEUE_MESSAGES,
    QUEUE_RECIPIENTS,
    QUEUE_HELD,
    QUEUE_LEASED,
    QUEUE_BYTES,
    QUEUE_OLDEST,
    QUEUE_CORRUPT,
    SPOOL_FREE,
    SNAPSHOT_USABLE,
    SNAPSHOT_AGE,
    SNAPSHOT_BYTES,
    SNAPSHOT_GENERATION,
    SNAPSHOT_ADDRESSES,
    SNAPSHOT_RESTRICTED,
    DIRECTORY_AGE,
    DIRECTORY_DURATION,
    DIRECTORY_READ,
    DIRECTORY_FAILED,
    DIRECTORY_CERTIFICATE,
    DIRECTORY_PASSWORD,
    DIRECTORY_WEAK,
    PROCESS_CPU,
    PROCESS_MEMORY,
    FILES_UNREADABLE,
)
