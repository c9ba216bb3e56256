"""Owns: what the mail log says, one function per event, in two forms: Postfix's lines and JSON objects.

Lines cannot be forged: every line is checked to be printable as a whole (ASCII but for addresses in UTF-8), and what
strangers choose (HELO name, next hop's text, quoted local parts) loses the characters that delimit fields. Must not
decide anything, nor write: ``telemetry.logs`` does. The form of each event stands in ``docs/log.md``, which is tested against this module.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Sequence
from enum import StrEnum
from typing import Any, Final, Literal, Protocol

from relay.config.schema import CopyKind

Value = str | int | float | bool | None
Status = Literal["sent", "deferred", "bounced", "expired"]
Form = Literal["postfix", "json"]
Via = Literal["express", "queue"]

HELO_OCTETS: Final = 255
"""So much of a HELO name is logged: RFC 5321 section 4.5.3.1.2 allows a domain no more."""
TEXT_OCTETS: Final = 500
"""So much of a next hop's text is logged: one reply line (RFC 5321 section 4.5.3.1.5)."""
NAMES_SHOWN: Final = 20
"""Removed header names in one line; the count is complete."""
LINE_OCTETS: Final = 4000
"""Longest line in Postfix's form: with its end it still fits one write to a pipe (PIPE_BUF)."""

RECOVERIES: Final = frozenset({"next_hop_up", "next_hop_mended", "snapshot_taken", "callout_on"})
"""Alarms that end an earlier one: good news has no level ``error``."""

_RESOURCE: Final = frozenset(
    {
        "queue_full",
        "queue_put_failed",
        "queue_claim_failed",
        "queue_settle_failed",
        "queue_renew_failed",
        "queue_close_failed",
    }
)
_SOFTWARE: Final = frozenset(
    {"next_hop_misconfigured", "next_hop_fault", "session_fault", "queue_entry_set_aside", "snapshot_refused"}
)
"""Alarms by the postmaster's classes."""

_MONTHS: Final = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")
_NOT_IN_LOGIN: Final = str.maketrans(dict.fromkeys(' <>[],"', "?"))
_DELIMITERS: Final = str.maketrans({"<": "?", ">": "?"})
_DSN: Final = {"sent": "2.0.0", "deferred": "4.0.0", "bounced": "5.0.0", "expired": "4.4.7"}
_REPORTS: Final = {"failed": "non-delivery", "delayed": "delay"}
_PLAIN_VALUE: Final = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_.:/[]@+%,")


class Level(StrEnum):
    """How much an operator should care; ``info`` is left out of lines in Postfix's form, as Postfix does."""

    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


class Writer(Protocol):
    """Where lines go: ``telemetry.logs.LogWriter``, or a list in a test."""

    def write(self, line: str, /) -> None:
        """Take one line without its end."""

    def flush(self) -> None:
        """Return once all lines so far outlive the process."""


def printable(text: str, limit: int) -> str:
    """``text`` with everything but printable ASCII as ``?``, cut to ``limit`` characters."""
    if len(text) > limit:
        text = text[:limit]
    if text.isascii() and text.isprintable():
        return text
    return "".join(c if " " <= c <= "~" else "?" for c in text)


class MailLog:
    """The log of one process; make it after the fork, it remembers the pid.

    ``client`` is ``host[address]`` everywhere; ``sender`` empty is the null sender; seconds are seconds.
    """

    def __init__(self, writer: Writer, form: Form, hostname: str, clock: Callable[[], float] = time.time) -> None:
        self._write = writer.write
        self._flush = writer.flush
        self._json = form == "json"
        self._hostname = hostname
        self._clock = clock
        self._pid = os.getpid()
        self._encode = json.JSONEncoder(separators=(",", ":")).encode
        self._second = -1
        self._stamp = ""
        self._starts: dict[str, str] = {}
        """How a line of this second begins, by service: names from our own code."""
        self.copy: Callable[[CopyKind, str], None] | None = None
        """Told what the postmaster wants to know, if anything."""

    # --- inbound ---
    def connect(self, client: str, listener: str) -> None:
        """A client was let in."""
        if self._json:
            self._object("connect", client=client, listener=listener)
        else:
            self._line("smtpd", f"connect from {client} listener={listener}")

    def disconnect(self, client: str, listener: str, commands: int, messages: int, errors: int) -> None:
        """Its session ended, with so many commands, messages taken and commands refused."""
        if self._json:
            self._object(
                "disconnect", client=client, listener=listener, commands=commands, messages=messages, errors=errors
            )
        else:
            self._line(
                "smtpd",
                f"disconnect from {client} listener={listener} messages={messages} errors={errors} commands={commands}",
            )

    def tls(self, client: str, version: str, cipher: str, *, resumed: bool = False) -> None:
        """TLS with a client is up; ``resumed``: by a session of before (RFC 8446 §2.2)."""
        if self._json:
            more: dict[str, Any] = {"resumed": True} if resumed else {}
            self._object("tls", client=client, version=version, cipher=cipher, **more)
        else:
            how = " (resumed)" if resumed else ""
            self._line("smtpd", f"TLS connection established from {client}: {version} with cipher {cipher}{how}")

    def tls_failed(self, client: str, error: str) -> None:
        """TLS with a client did not come up."""
        error = printable(error, TEXT_OCTETS)
        if self._json:
            self._object("tls_failed", Level.WARNING, client=client, error=error)
        else:
            self._line("smtpd", f"warning: TLS handshake failed with {client}: {error}")

    def login(self, client: str, user: str, mechanism: str) -> None:
        """An account logged in."""
        user = _login_name(user)
        if self._json:
            self._object("login", client=client, user=user, mechanism=mechanism)
        else:
            self._line("smtpd", f"login from {client}: sasl_method={mechanism}, sasl_username={user}")

    def login_failed(self, client: str, user: str, mechanism: str, why: str) -> None:
        """It did not; the line is Postfix's, which fail2ban reads. ``user`` as the client wrote it, may be empty."""
        user = _login_name(user)
        if self._json:
            self._object("login_failed", Level.WARNING, client=client, user=user, mechanism=mechanism, why=why)
        else:
            self._line(
                "smtpd",
                f"warning: {client}: SASL {mechanism} authentication failed: {why or 'no reason'}, sasl_username={user}",
            )

    def reject(
        self,
        client: str,
        stage: str,
        reply: str,
        reason: str,
        rule: str,
        sender: str,
        recipient: str | None,
        proto: str,
        helo: str,
        *,
        enforced: bool = True,
    ) -> None:
        """A refusal at ``stage`` (CONNECT, MAIL, RCPT, …). Not ``enforced``: the rule is in mode log, nothing was said.

        ``rule`` is the policy's rule, ``reason`` the metrics label; both go into the JSON form only.
        """
        if '"' in sender:
            reply, sender = _disarm(reply, sender)
        if recipient is None:
            to = ""
        else:
            if '"' in recipient:
                reply, recipient = _disarm(reply, recipient)
            to = f" to=<{recipient}>"
        helo = _inside_brackets(helo)
        word = "reject" if enforced else "reject_warning"
        text = f"NOQUEUE: {word}: {stage} from {client}: {reply}; from=<{sender}>{to} proto={proto} helo=<{helo}>"
        if self.copy is not None and enforced:
            self.copy("policy", text[9:])
        if self._json:
            self._object(
                word,
                client=client,
                stage=stage,
                reply=reply,
                reason=reason,
                rule=rule,
                sender=sender,
                recipient=recipient,
                proto=proto,
                helo=helo,
                message=text,
            )
        else:
            self._line("smtpd", text)

    def refusals(
        self, client: str, stage: str, sender: str, proto: str, helo: str
    ) -> Callable[[str, str], None] | None:
        """``reject`` for many recipients of one sender, told reply and recipient, both without a quote in them.

        None when lines have another form than Postfix's, or somebody wants a copy: then ``reject`` is the way.
        """
        if self._json or self.copy is not None or '"' in sender:
            return None
        head, middle = f"NOQUEUE: reject: {stage} from {client}: ", f"; from=<{sender}> to=<"
        tail = f"> proto={proto} helo=<{_inside_brackets(helo)}>"
        line = self._line

        def note(reply: str, recipient: str) -> None:
            line("smtpd", f"{head}{reply}{middle}{recipient}{tail}")

        return note

    def header_removed(self, queue_id: str, names: Sequence[str], count: int) -> None:
        """The header firewall took ``count`` fields out of a message."""
        shown = [printable(name, HELO_OCTETS) for name in names[:NAMES_SHOWN]]
        if self._json:
            self._object("header_removed", id=queue_id, names=shown, count=count)
        else:
            self._line("cleanup", f"{queue_id}: header removed: {', '.join(shown)} ({count})")

    def header_warning(self, queue_id: str, names: Sequence[str], count: int) -> None:
        """The header firewall in mode log: it would have taken them out, and the message went on as it was."""
        shown = [printable(name, HELO_OCTETS) for name in names[:NAMES_SHOWN]]
        if self._json:
            self._object("header_warning", id=queue_id, names=shown, count=count)
        else:
            self._line("cleanup", f"{queue_id}: header_warning: would be removed: {', '.join(shown)} ({count})")

    def received(
        self,
        queue_id: str,
        client: str,
        listener: str,
        sender: str,
        recipients: int,
        size: int,
        proto: str,
        helo: str,
        tls: str,
    ) -> None:
        """A message is in, up to its final dot. ``recipients`` were accepted; ``size`` in octets; ``tls`` may be ""."""
        if '"' in sender:
            sender = sender.translate(_DELIMITERS)
        helo = _inside_brackets(helo)
        if self._json:
            self._object(
                "received",
                id=queue_id,
                client=client,
                listener=listener,
                sender=sender,
                recipients=recipients,
                size=size,
                proto=proto,
                helo=helo,
                tls=tls,
            )
        else:
            self._line(
                "smtpd",
                f"{queue_id}: client={client}, from=<{sender}>, size={size}, nrcpt={recipients}, proto={proto}, "
                f"helo=<{helo}>, tls={tls or 'none'}, listener={listener}",
            )

    # --- dispatch, queue, outbound ---
    def result(
        self,
        queue_id: str,
        recipient: str,
        next_hop: str,
        status: Status,
        code: int,
        enhanced: str,
        text: str,
        delay: float,
        via: Via,
        attempts: int,
    ) -> None:
        """One recipient's result of one attempt. ``code`` 0: no reply, ``text`` says why; ``delay`` since it came."""
        if '"' in recipient:
            recipient = recipient.translate(_DELIMITERS)
        text = printable(text, TEXT_OCTETS)
        enhanced = printable(enhanced, 12)
        if self._json:
            self._object(
                "result",
                id=queue_id,
                recipient=recipient,
                next_hop=next_hop,
                status=status,
                code=code,
                enhanced=enhanced,
                text=text,
                delay=round(delay, 3),
                via=via,
                attempts=attempts,
            )
        else:
            codes = f"{code} {enhanced} " if code and enhanced else f"{code} " if code else ""
            self._line(
                "smtp",
                f"{queue_id}: to=<{recipient}>, relay={next_hop or 'none'}, delay={delay:.2f}, "
                f"dsn={enhanced or _DSN[status]}, status={status} ({codes}{text})",
            )

    def queued(self, queue_id: str, reason: str, size: int) -> None:
        """A message is safe in the queue."""
        if self._json:
            self._object("queued", id=queue_id, reason=reason, size=size)
        else:
            self._line("qmgr", f"{queue_id}: queued, reason={reason}, size={size}")

    def removed(self, queue_id: str) -> None:
        """The last recipient of a queued message is settled; it is gone from the queue."""
        if self._json:
            self._object("removed", id=queue_id)
        else:
            self._line("qmgr", f"{queue_id}: removed")

    def report(self, queue_id: str, for_id: str, to: str, action: str = "failed") -> None:
        """Report ``queue_id`` about message ``for_id`` was queued for the sender ``to``. ``action``: that of RFC 3464."""
        if '"' in to:
            to = to.translate(_DELIMITERS)
        if self._json:
            self._object("report", id=queue_id, for_id=for_id, to=to, action=action)
        else:
            what = _REPORTS.get(action, "delivery status")
            self._line("bounce", f"{for_id}: sender {what} notification: {queue_id}, to=<{to}>")

    def possible_duplicate(self, queue_id: str) -> None:
        """An earlier attempt ended between final dot and reply: the next one may deliver a second copy (RFC 1047).

        The line is written before this returns, and with it before the dot: it must not die with the process.
        """
        if self._json:
            self._object("possible_duplicate", Level.WARNING, id=queue_id)
        else:
            self._line("qmgr", f"warning: {queue_id}: possible duplicate: an earlier final dot was not answered")
        self._flush()

    # --- the process ---
    def alarm(self, event: str, **fields: Value) -> None:
        """Something an operator has to look at: next hop down or misconfigured, snapshot refused, disk full; or
        that it is over (``RECOVERIES``).
        """
        if self.copy is not None and event not in RECOVERIES:
            kind: CopyKind | None = "resource" if event in _RESOURCE else "software" if event in _SOFTWARE else None
            if kind is not None:
                self.copy(kind, " ".join([event, *(f"{name}={_quoted(value)}" for name, value in fields.items())]))
        self.note(Level.INFO if event in RECOVERIES else Level.ERROR, event, **fields)

    def note(self, level: Level | str, event: str, **fields: Value) -> None:
        """Something a process did or met. ``event`` and the names of the fields come from our code, values may not."""
        level = Level(level)
        pid = os.getpid()  # a fork may have happened since: notes are rare enough to ask
        if pid != self._pid:
            self._pid = pid
            self._starts.clear()
        if self._json:
            clean = {k: printable(v, LINE_OCTETS) if isinstance(v, str) else v for k, v in fields.items()}
            self._object(event, level, **clean)
        else:
            said = "".join(f" {name}={_quoted(value)}" for name, value in fields.items())
            self._line("relay", f"{event}{said}" if level is Level.INFO else f"{level}: {event}{said}")

    # --- form ---
    def _line(self, service: str, text: str) -> None:
        now = int(self._clock())
        if now != self._second:
            self._second = now
            t = time.localtime(now)
            self._stamp = (
                f"{_MONTHS[t.tm_mon - 1]} {t.tm_mday:2} {t.tm_hour:02}:{t.tm_min:02}:{t.tm_sec:02} "
                f"{self._hostname} dmz-relay/"
            )
            self._starts.clear()
        start = self._starts.get(service)
        if start is None:
            start = self._starts[service] = f"{self._stamp}{service}[{self._pid}]: "
        line = start + text
        # The last guard against forged lines: whatever came in by whichever field.
        if not (line.isascii() and line.isprintable()) or len(line) > LINE_OCTETS:
            line = "".join(c if c.isprintable() else "?" for c in line[:LINE_OCTETS])
            line = line.encode(errors="replace")[:LINE_OCTETS].decode(errors="ignore")
        self._write(line)

    def _object(self, event: str, level: Level = Level.INFO, **fields: Value | Sequence[str]) -> None:
        now = self._clock()
        second = int(now)
        if second != self._second:
            self._second = second
            t = time.gmtime(second)
            self._stamp = f"{t.tm_year}-{t.tm_mon:02}-{t.tm_mday:02}T{t.tm_hour:02}:{t.tm_min:02}:{t.tm_sec:02}."
        # The encoder escapes everything that is not printable ASCII, so an object is one line whatever is in it.
        self._write(
            self._encode(
                {
                    "time": f"{self._stamp}{int((now - second) * 1000):03}Z",
                    "level": level,
                    "event": event,
                    "host": self._hostname,
                    "pid": self._pid,
                    **fields,
                }
            )
        )


def _inside_brackets(text: str) -> str:
    text = printable(text, HELO_OCTETS)
    return text.translate(_DELIMITERS) if "<" in text or ">" in text else text


def _login_name(text: str) -> str:
    return printable(text, HELO_OCTETS).translate(_NOT_IN_LOGIN)


def _disarm(reply: str, mailbox: str) -> tuple[str, str]:
    """Reply and mailbox without angle brackets inside a quoted local part: they would end ``from=<…>`` early."""
    harmless = mailbox.translate(_DELIMITERS)
    return reply.replace(mailbox, harmless), harmless


def _quoted(value: Value) -> str:
    text = printable(str(value), LINE_OCTETS)
    return text if text and _PLAIN_VALUE.issuperset(text) else json.dumps(text)


class _StandardError:
    """Where notes go before a process has opened its log."""

    def write(self, line: str, /) -> None:
        with contextlib.suppress(OSError):  # nobody is left to tell
            os.write(2, f"{line}\n".encode())

    def flush(self) -> None:
        """Nothing waits."""


_process_log: MailLog | None = None


def adopt(log: MailLog) -> None:
    """Make ``log`` the one that ``note`` writes to in this process."""
    global _process_log  # noqa: PLW0603 - one log a process; a parent's is replaced after the fork
    _process_log = log


def note(level: Level | str, event: str, **fields: Value) -> None:
    """``MailLog.note`` for code that is handed no log: the adopted one, else standard error in Postfix's form."""
    log = _process_log or MailLog(_StandardError(), "postfix", os.uname().nodename)
    log.note(level, event, **fields)
