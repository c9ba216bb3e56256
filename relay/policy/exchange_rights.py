"""Owns: the PowerShell that mends each of Exchange's refusals on its receive connector. Pure."""

from __future__ import annotations

from typing import Final

from relay.mail.answer import Answer
from relay.policy.outcome import Fault, Outcome, classify, fault

_CONNECTOR: Final = "$connector = Get-ReceiveConnector 'SERVER\\From DMZ Relay'"
_GRANT: Final = "$connector | Add-ADPermission -User 'NT AUTHORITY\\ANONYMOUS LOGON' -ExtendedRights {}"
_MAKE: Final = (
    "New-ReceiveConnector 'From DMZ Relay' -Server SERVER -TransportRole FrontendTransport -Usage Custom "
    "-Bindings 0.0.0.0:25 -RemoteIPRanges RELAY-ADDRESS -PermissionGroups AnonymousUsers -AuthMechanism Tls"
)


def _grant(*rights: str) -> tuple[str, ...]:
    return (_CONNECTOR, *(_GRANT.format(right) for right in rights))


_CURES: Final[dict[Fault, tuple[str, ...]]] = {
    Fault.GREETING: (_CONNECTOR, "$connector | Set-ReceiveConnector -RemoteIPRanges RELAY-ADDRESS"),
    Fault.TLS: (_CONNECTOR, "$connector | Set-ReceiveConnector -AuthMechanism Tls -RequireTLS $true"),
    Fault.AUTH: (_CONNECTOR, "$connector | Set-ReceiveConnector -AuthMechanism Tls -PermissionGroups AnonymousUsers"),
    Fault.ANONYMOUS: (
        _MAKE,
        "or, on the connector that answered:",
        _CONNECTOR,
        "$connector | Set-ReceiveConnector -PermissionGroups AnonymousUsers",
    ),
    Fault.RECIPIENT_RIGHT: _grant("ms-Exch-SMTP-Accept-Any-Recipient"),
    Fault.SENDER_RIGHT: _grant("ms-Exch-SMTP-Accept-Any-Sender", "ms-Exch-SMTP-Accept-Authoritative-Domain-Sender"),
    Fault.SUBMIT_RIGHT: _grant("ms-Exch-SMTP-Submit", "ms-Exch-SMTP-Accept-Any-Sender", "ms-Exch-Bypass-Anti-Spam"),
}


def cure(answer: Answer) -> tuple[str, ...]:
    """Lines for the Exchange Management Shell; SERVER and RELAY-ADDRESS are the reader's. Empty when there are none."""
    return _CURES.get(fault(answer), ()) if classify(answer) is Outcome.OUR_FAULT else ()
