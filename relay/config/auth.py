"""Owns: the shape of ``[auth]``: mechanisms, stores of accounts, and how many wrong guesses are let through.

Plain values only, as in ``config.schema``.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Final, Literal

from pydantic import AfterValidator, Field

from relay.config.section import DAY_S, FilePath, Section, label

STORES: Final = 20  # a login asks them one after the other


class Mechanism(StrEnum):
    """How a client logs in (SASL, RFC 4954)."""

    PLAIN = "PLAIN"
    LOGIN = "LOGIN"
    CRAM_MD5 = "CRAM-MD5"
    SCRAM_SHA_256 = "SCRAM-SHA-256"
    SCRAM_SHA_256_PLUS = "SCRAM-SHA-256-PLUS"


class Store(Section):
    """One place where accounts stand."""

    name: Annotated[str, AfterValidator(label), Field(examples=["local"])]
    """Short name, used in logs and by listener.stores."""
    type: Annotated[Literal["file"], Field(examples=["file"])]
    """file: NAME:PASSWORD:ADDRESSES a line, passwords as made by ``relay hash-password``."""
    path: Annotated[FilePath, Field(examples=["/etc/dmz-relay/users"])]
    """The file. The hub's user must be able to read it and nobody else should."""


class Auth(Section):
    """Logging in on the listeners that offer it (rows A1 to A9). Only ever inside TLS."""

    stores: Annotated[list[Store], Field(max_length=STORES)] = []
    """Where accounts stand; asked in this order."""
    mechanisms: Annotated[list[Annotated[Mechanism, Field(strict=False)]], Field(max_length=len(Mechanism))] = []
    """What is offered; empty: all that every account of every store of the listener can use."""
    by_hand: bool = False
    """Offer auth.mechanisms even where some accounts cannot use one of them. Their clients may then fail to log in."""
    account_failures: Annotated[int, Field(ge=3, le=1000)] = 9
    """Wrong passwords for one account, from anywhere, within auth.window_s. Keep it below the directory's lock-out."""
    client_failures: Annotated[int, Field(ge=3, le=10_000)] = 20
    """Failed logins of one client address within auth.window_s; then it is told 454."""
    network_failures: Annotated[int, Field(ge=3, le=100_000)] = 100
    """The same for a network: /24 of IPv4, /48 of IPv6."""
    window_s: Annotated[float, Field(ge=10, le=DAY_S)] = 900.0
    """How long a failure counts, seconds."""
    failure_delay_s: Annotated[float, Field(ge=0, le=30)] = 1.0
    """A failed login is answered after this long, whatever the reason, seconds."""
    show_login: bool = False
    """Name the account in the Received header."""
