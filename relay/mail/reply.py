"""Owns: every reply the relay gives to a client, as named constants.

A reply is a ``Kind`` (code, enhanced code, wording, and the ``reason`` label of logs and metrics) filled through
typed slots: a ``Mailbox`` validated by ``mail.address``, or text cleaned by ``operator_text``. Nothing else can get
into a reply, a kind whose code and enhanced code disagree cannot be built, and a rendered line never exceeds 512
octets (RFC 5321 §4.5.3.1.5). It is ASCII, unless the mailbox is not: then the client announced UTF-8 (RFC 6531 §3.7.4).
"""

from __future__ import annotations

import re
from typing import Final, NewType

from relay.mail.address import NULL_SENDER, Mailbox
from relay.mail.envelope import QueueId

OperatorText = NewType("OperatorText", str)
"""Printable ASCII of at most ``TEXT_OCTETS`` octets: the only free text that may enter a reply."""

NO_TEXT: Final = OperatorText("")

TEXT_OCTETS: Final = 200
LINE_OCTETS: Final = 512  # RFC 5321 §4.5.3.1.5, CR LF included

_ENHANCED: Final = re.compile(r"[245]\.\d{1,3}\.\d{1,3}")
_REASON: Final = re.compile(r"[a-z0-9_]+")


def operator_text(text: str) -> OperatorText:
    """``text`` made fit for a reply: control and non-ASCII characters become ``?``, cut to 200 octets."""
    clean = "".join(c if " " <= c <= "~" else "?" for c in text)
    return OperatorText(clean[:TEXT_OCTETS])


# The 4xx that says the same for now; 451 for the rest, among them the 53x, which have no temporary twin in MAIL.
_SOFT: Final = {500: 450, 501: 450, 502: 450, 503: 450, 504: 450, 550: 450, 552: 452, 553: 450}


class Kind:
    """One thing the relay can say. ``{mailbox}`` and ``{text}`` in the wording are its slots."""

    __slots__ = ("_halves", "_template", "code", "enhanced", "fixed", "reason", "wording")

    def __init__(self, code: int, enhanced: str, wording: str, reason: str) -> None:
        """Raise ValueError when code and enhanced code disagree (RFC 2034 §4) or the wording is not ASCII."""
        if not 200 <= code <= 599:
            raise ValueError(f"no SMTP reply code: {code}")
        if enhanced:
            if _ENHANCED.fullmatch(enhanced) is None or enhanced[0] != str(code)[0]:
                raise ValueError(f"reply {code} cannot carry the enhanced code {enhanced!r}")
        elif str(code)[0] in "245" and code not in (220, 221, 250, 334, 354):
            raise ValueError(f"reply {code} needs an enhanced code")
        if not wording.isascii() or not wording.isprintable() or _REASON.fullmatch(reason) is None:
            raise ValueError(f"reply {code} {wording!r} ({reason!r}) is not printable ASCII")
        self.code = code
        self.enhanced = enhanced
        self.wording = wording
        self.reason = reason
        without_slots = wording.replace("{mailbox}", "").replace("{text}", "")
        if "{" in without_slots or "}" in without_slots:
            raise ValueError(f"reply {code} {wording!r} has a slot that is neither {{mailbox}} nor {{text}}")
        self._template = f"{code} {enhanced} {wording}" if enhanced else f"{code} {wording}"
        if len(self._template) > LINE_OCTETS - 2:
            raise ValueError(f"reply {code} {wording!r} is over {LINE_OCTETS} octets")
        self.fixed: Final[bytes] = b"" if "{" in wording else (self._template + "\r\n").encode("ascii")
        """The whole reply when the wording has no slots, else empty."""
        head, slot, tail = self._template.partition("{mailbox}")
        self._halves: Final = (head, tail) if slot and "{" not in head + tail else None

    def line(self, mailbox: Mailbox = NULL_SENDER, text: OperatorText | QueueId = NO_TEXT) -> str:
        """The reply line without CR LF, cut to what one line may hold."""
        # One pass: a mailbox may itself contain {text} (RFC 5321 §4.1.2 allows both braces), which stays as it is.
        if self._halves is None:
            line = self._template.format(mailbox=mailbox, text=text)
        else:  # most refusals, and three times as fast
            line = f"{self._halves[0]}{mailbox}{self._halves[1]}"
        if line.isascii():
            return line if len(line) <= LINE_OCTETS - 2 else line[: LINE_OCTETS - 2]
        return line.encode()[: LINE_OCTETS - 2].decode(errors="ignore")

    def wire(self, mailbox: Mailbox = NULL_SENDER, text: OperatorText | QueueId = NO_TEXT) -> bytes:
        """The octets for the client."""
        return (self.line(mailbox, text) + "\r\n").encode()

    def softened(self) -> Kind:
        """The same as a temporary failure: what ``soft_bounce`` (row O12) makes of a 5xx."""
        if self.code < 500:
            return self
        return Kind(_SOFT.get(self.code, 451), "4" + self.enhanced[1:], self.wording, self.reason)

    def __repr__(self) -> str:
        return f"<Kind {self.code} {self.enhanced} {self.reason}>"


# --- success and progress -------------------------------------------------------------------------------------
OK_MAIL: Final = Kind(250, "2.1.0", "Ok", "mail_ok")
OK_RCPT: Final = Kind(250, "2.1.5", "Ok", "rcpt_ok")
OK_RSET: Final = Kind(250, "2.0.0", "Ok", "rset")
OK_NOOP: Final = Kind(250, "2.0.0", "Ok", "noop")
OK_DELIVERED: Final = Kind(250, "2.0.0", "Ok: delivered as {text}", "delivered")
OK_QUEUED: Final = Kind(250, "2.0.0", "Ok: queued as {text}", "queued")
START_DATA: Final = Kind(354, "", "End data with <CR><LF>.<CR><LF>", "data")
OK_CHUNK: Final = Kind(250, "2.0.0", "{text} octets received", "chunk")
START_TLS: Final = Kind(220, "2.0.0", "Ready to start TLS", "starttls")
BYE: Final = Kind(221, "2.0.0", "Bye", "quit")
OK_EHLO: Final = Kind(250, "", "EHLO", "ehlo")
"""Stands for the many lines of EHLO's reply in the metrics."""
OK_HELO: Final = Kind(250, "", "{text}", "helo")
AUTH_OK: Final = Kind(235, "2.7.0", "Authentication successful", "auth_ok")
AUTH_CONTINUE: Final = Kind(334, "", "AUTH", "auth_continue")
"""Stands for challenges in the metrics: their text is base64 and may be longer than a reply line."""
HELP: Final = Kind(214, "2.0.0", "See RFC 5321", "help")
VRFY_UNSURE: Final = Kind(252, "2.5.0", "Cannot VRFY; send some mail, we will try our best", "vrfy")

# --- the session cannot go on ----------------------------------------------------------------------------------
SERVICE_BUSY: Final = Kind(421, "4.3.2", "Too many sessions, try again later", "busy")
CLIENT_BUSY: Final = Kind(421, "4.7.0", "Too many sessions from your address", "client_busy")
TIMED_OUT: Final = Kind(421, "4.4.2", "Timed out waiting for you", "timeout")
SHUTTING_DOWN: Final = Kind(421, "4.3.2", "Service is restarting, try again soon", "shutdown")
TOO_MANY_ERRORS: Final = Kind(421, "4.7.0", "Too many errors", "too_many_errors")
EARLY_TALKER: Final = Kind(554, "5.5.0", "You talked before you were greeted", "early_talker")
TOO_SLOW: Final = Kind(421, "4.4.2", "Message comes too slowly", "too_slow")
TOO_LONG: Final = Kind(421, "4.4.2", "Session took too long", "session_too_long")
CONNECTION_RATE: Final = Kind(
    421, "4.7.0", "Too many connections from your address, try again later", "connection_rate"
)
SESSION_FAULT: Final = Kind(421, "4.3.0", "Local error, try again later", "session_fault")
OUT_OF_STEP: Final = Kind(421, "4.5.2", "The chunk's size cannot be told, closing", "out_of_step")

# --- syntax and order ------------------------------------------------------------------------------------------
UNKNOWN_COMMAND: Final = Kind(500, "5.5.2", "Command not recognized", "unknown_command")
LINE_TOO_LONG: Final = Kind(500, "5.5.2", "Line too long", "line_too_long")
BARE_NEWLINE: Final = Kind(500, "5.5.2", "Lines end with CR LF", "bare_newline")
BAD_ARGUMENTS: Final = Kind(501, "5.5.4", "Syntax error in parameters", "bad_arguments")
BAD_CHUNK: Final = Kind(501, "5.5.4", "Syntax: BDAT size [LAST]", "bad_chunk")
BAD_HELO: Final = Kind(501, "5.5.4", "Your host name or address literal is required", "bad_helo")
BAD_SENDER: Final = Kind(501, "5.1.7", "Bad sender address syntax", "bad_sender")
BAD_RECIPIENT: Final = Kind(501, "5.1.3", "Bad recipient address syntax", "bad_recipient")
BAD_SIZE: Final = Kind(501, "5.5.4", "SIZE is a number of octets", "bad_size")
BAD_PARAMETER: Final = Kind(555, "5.5.4", "MAIL or RCPT parameter not recognized", "bad_parameter")
NOT_IMPLEMENTED: Final = Kind(502, "5.5.1", "Command not implemented", "not_implemented")
NEED_HELO: Final = Kind(503, "5.5.1", "Say EHLO first", "need_helo")
NEED_MAIL: Final = Kind(503, "5.5.1", "MAIL first", "need_mail")
NEED_RCPT: Final = Kind(503, "5.5.1", "RCPT first", "need_rcpt")
NO_VALID_RCPT: Final = Kind(554, "5.5.1", "No valid recipients", "no_valid_recipients")
NESTED_MAIL: Final = Kind(503, "5.5.1", "A transaction is already open", "nested_mail")
TLS_ACTIVE: Final = Kind(503, "5.5.1", "TLS is already active", "tls_active")
TLS_UNAVAILABLE: Final = Kind(454, "4.7.0", "TLS is not available", "tls_unavailable")
AUTH_TOO_LONG: Final = Kind(500, "5.5.6", "Authentication exchange line is too long", "auth_too_long")  # RFC 4954 §4
AUTH_NOT_BASE64: Final = Kind(501, "5.5.2", "Cannot decode this base64", "auth_not_base64")
AUTH_MALFORMED: Final = Kind(501, "5.5.2", "Not what this mechanism expects", "auth_malformed")
AUTH_CANCELLED: Final = Kind(501, "5.7.0", "Authentication cancelled", "auth_cancelled")
AUTH_AGAIN: Final = Kind(503, "5.5.1", "Already authenticated", "auth_again")
AUTH_IN_TRANSACTION: Final = Kind(
    503, "5.5.1", "AUTH is not permitted during a mail transaction", "auth_in_transaction"
)
AUTH_DISABLED: Final = Kind(503, "5.5.1", "Authentication is not enabled here", "auth_disabled")
AUTH_MECHANISM: Final = Kind(504, "5.5.4", "Authentication mechanism not offered", "auth_mechanism")
NOT_UTF8: Final = Kind(553, "5.6.7", "Addresses must be ASCII without SMTPUTF8", "not_ascii")

# --- policy ----------------------------------------------------------------------------------------------------
NEED_TLS: Final = Kind(530, "5.7.0", "Must issue a STARTTLS command first", "need_tls")
NEED_AUTH: Final = Kind(530, "5.7.0", "Authentication required", "need_auth")
AUTH_NEEDS_TLS: Final = Kind(538, "5.7.11", "Encryption required to authenticate", "auth_needs_tls")
AUTH_FAILED: Final = Kind(535, "5.7.8", "Authentication credentials invalid", "auth_failed")
AUTH_BLOCKED: Final = Kind(454, "4.7.0", "Too many failed logins, try again later", "auth_blocked")
AUTH_UNAVAILABLE: Final = Kind(454, "4.7.0", "Temporary authentication failure", "auth_unavailable")
NOT_OWNER: Final = Kind(
    553, "5.7.1", "<{mailbox}>: Sender address rejected: not owned by the account that logged in", "not_owner"
)
NULL_NOT_ALLOWED: Final = Kind(
    550, "5.7.1", "Sender address rejected: the null sender is not allowed for submission", "null_not_allowed"
)
OWN_DOMAIN_SPOOFED: Final = Kind(
    550, "5.7.1", "<{mailbox}>: Sender address rejected: our own domain, from outside", "own_domain_spoofed"
)
RELAY_DENIED: Final = Kind(554, "5.7.1", "<{mailbox}>: Relay access denied", "relay_denied")
RELAY_FORM: Final = Kind(554, "5.7.1", "Routed addresses are not accepted", "relay_form")
SENDER_RESTRICTED: Final = Kind(554, "5.7.1", "<{mailbox}>: Sender address rejected: {text}", "sender_restricted")
UNKNOWN_RECIPIENT: Final = Kind(
    550, "5.1.1", "<{mailbox}>: Recipient address rejected: User unknown", "unknown_recipient"
)
INTERNAL_RECIPIENT: Final = Kind(
    550, "5.7.1", "<{mailbox}>: Recipient address rejected: takes mail from authenticated senders only", "internal_only"
)
RECIPIENT_SIZE: Final = Kind(  # RFC 3463 §3.3: a limit of one mailbox, below that of the system
    552,
    "5.2.3",
    "<{mailbox}>: Recipient address rejected: message exceeds the recipient's size limit",
    "recipient_size",
)
DIRECTORY_UNAVAILABLE: Final = Kind(
    451, "4.3.0", "<{mailbox}>: Recipient cannot be verified now, try again later", "directory_unavailable"
)
TOO_MANY_UNKNOWN: Final = Kind(
    450, "4.7.1", "Too many unknown recipients from your network, try again later", "too_many_unknown"
)
MESSAGE_RATE: Final = Kind(450, "4.7.1", "Too many messages from your address, try again later", "message_rate")
TOO_MANY_RECIPIENTS: Final = Kind(452, "4.5.3", "Too many recipients", "too_many_recipients")  # RFC 5321 §4.5.3.1.10
MESSAGE_TOO_BIG: Final = Kind(552, "5.3.4", "Message exceeds the size limit", "message_too_big")  # RFC 1870 §6
HEADER_TOO_BIG: Final = Kind(552, "5.3.4", "Message header exceeds the size limit", "header_too_big")
BARE_NEWLINE_DATA: Final = Kind(554, "5.6.0", "Bare CR or LF in the message", "bare_newline_data")
TOO_MANY_HOPS: Final = Kind(554, "5.4.6", "Too many hops", "too_many_hops")


ABOUT_SENDER: Final = frozenset({SENDER_RESTRICTED, NOT_OWNER, NULL_NOT_ALLOWED, OWN_DOMAIN_SPOOFED})
"""Refusals that name the sender, wherever they are said."""


def route_refused(status: str) -> Kind:
    """What ``error:`` in a route says of a recipient, with the enhanced code written there."""
    return Kind(550, status, "<{mailbox}>: Recipient address rejected: {text}", "route")


# --- our own troubles ------------------------------------------------------------------------------------------
INTERNAL: Final = Kind(451, "4.3.0", "Local error, try again later", "internal")
QUEUE_FAILED: Final = Kind(451, "4.3.0", "Message could not be stored, try again later", "queue_failed")
MEMORY_LOW: Final = Kind(452, "4.3.1", "Insufficient memory, try again later", "memory_low")
QUEUE_FULL: Final = Kind(452, "4.3.1", "Insufficient system storage", "queue_full")

# --- what the operator wrote about one recipient ----------------------------------------------------------------
REJECTED_REASON: Final = "recipient_rejected"


def recipient_rejected(code: int, enhanced: str) -> Kind:
    """The refusal of a recipient with the operator's own codes and ``{text}``. Raises ValueError when they disagree."""
    return Kind(code, enhanced, "<{mailbox}>: Recipient address rejected: {text}", REJECTED_REASON)


# --- what a next hop said, passed on with its code and our text -------------------------------------------------
NEXT_HOP_REASON: Final = "next_hop"


def from_next_hop(code: int, enhanced: str) -> Kind:
    """The reply that passes a next hop's 4xx or 5xx on: its codes, our wording.

    A missing or contradicting enhanced code becomes ``X.0.0``; 421 is never copied (RFC 5321 §3.8: it announces
    the end of *that* session) and becomes 451.
    """
    if code == 421 or not 400 <= code <= 599:
        code = 451 if code < 500 else 554
    if _ENHANCED.fullmatch(enhanced) is None or enhanced[0] != str(code)[0]:
        enhanced = f"{str(code)[0]}.0.0"
    return Kind(code, enhanced, "The destination server refused the message", NEXT_HOP_REASON)
