"""Owns: the shape of ``[[senders.rules]]``: what an operator says of single senders, over everything else.

Plain values only, as in ``config.schema``.
"""

from __future__ import annotations

import datetime as dt
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from relay.config.directory import address_or_domain, day
from relay.config.section import REFUSAL_OCTETS, Section


class SenderRule(Section):
    """A sender, or all of a domain. In force with a reload; the first one that fits counts, an address before its domain."""

    sender: Annotated[str, AfterValidator(address_or_domain), Field(examples=["intern@example.com"])]
    """user@example.com, or @example.com for every address of a domain."""
    action: Annotated[Literal["restrict", "allow"], Field(examples=["restrict"])]
    """restrict: may not send. allow: may, whatever the directory says."""
    text: Annotated[str, Field(max_length=REFUSAL_OCTETS)] = ""
    """Wording of the refusal; empty: senders.text."""
    comment: Annotated[str, Field(max_length=REFUSAL_OCTETS)] = ""
    """For people: why, who, which ticket. Shown by relay sender."""
    expires: Annotated[dt.date, BeforeValidator(day)] | None = None
    """The last day it applies (UTC), e.g. 2027-01-31."""
