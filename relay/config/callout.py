"""Owns: the shape of ``[callout]``: asking next hops about recipients of domains with ``recipients = "callout"`` (row R13)."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from relay.config.section import DAY_S, MANY, Seconds, Section


class Callout(Section):
    """How the next hop is asked about recipients of domains with recipients = "callout"."""

    per_minute: Annotated[int, Field(ge=1, le=MANY)] = 120
    """Questions a minute, of all workers together; beyond that recipients get 451. Whoever guesses must not make this
    relay an attack on the next hop."""
    valid_s: Annotated[float, Field(ge=1, le=30 * DAY_S)] = DAY_S
    """How long a valid recipient is remembered, seconds."""
    unknown_s: Annotated[float, Field(ge=1, le=DAY_S)] = 1800.0
    """How long an unknown one is, seconds: a new mailbox is refused for as long."""
    probe_s: Annotated[float, Field(ge=1, le=DAY_S)] = 3600.0
    """How often a random address is asked first: a next hop that takes it takes everything, and is not asked any more."""
    timeout_s: Seconds = 10.0
    """Longest wait for an answer, connection and all, seconds; then 451."""
