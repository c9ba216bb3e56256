"""Owns: what SMTP commands mean (RFC 5321 §4.1): order, parameters, replies; one session's transaction.

Facts come from ``inbound.transaction``, decisions from ``policy``, and 250 for a message only from ``dispatch``. Octets,
deadlines and TLS are ``inbound.wire``'s.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from relay.inbound import login
from relay.inbound.asking import ask
from relay.inbound.chunks import Assembly, Chunk, announced
from relay.inbound.parameters import (
    MAIL_PREFIX,
    PLAIN_MAIL,
    PLAIN_RCPT,
    RCPT_PREFIX,
    RCPT_VERB,
    mail_parameters,
    rcpt_parameters,
)
from relay.inbound.receiver import Receiver
from relay.inbound.refusal import Refusing
from relay.inbound.transaction import Transaction
from relay.inbound.wire import LINE_OCTETS, NO_TEXT
from relay.mail import reply
from relay.mail.address import (
    NULL_SENDER,
    AddressFault,
    Mailbox,
    ascii_form,
    is_relay_form,
    parse_path,
    parse_utf8_path,
    unquoted,
)
from relay.mail.envelope import Envelope, QueueId
from relay.mail.reply import Kind, OperatorText
from relay.mail.terms import PLAIN, RecipientTerms
from relay.mail.trace import Origin, helo_text, literal, logged_in_as, origin, received, utf8_protocol
from relay.policy.recipient import ASK
from relay.policy.verdict import ACCEPT, Verdict

if TYPE_CHECKING:
    from relay.inbound.listener import Listener
    from relay.policy.ownership import Account

HELO_OCTETS: Final = 255

_IN_CLEAR: Final = frozenset({b"EHLO", b"STARTTLS", b"NOOP", b"QUIT", b"RSET", b"AUTH", b"BDAT"})
"""What is not answered "STARTTLS first" where TLS is required (RFC 3207 §4). Clients say RSET out of habit, AUTH has a refusal
of its own, and BDAT has to read its octets.
"""

_FAULTS: Final = {
    AddressFault.NON_ASCII: reply.NOT_UTF8,
    AddressFault.SOURCE_ROUTE: reply.RELAY_FORM,
}


class Session(Refusing):
    """One SMTP session. Made by its listener for each accepted socket."""

    open_transaction: Callable[..., Transaction] = Transaction

    def __init__(self, listener: Listener) -> None:
        super().__init__(listener)
        self.helo = ""
        self.protocol = "SMTP"
        self._origin = Origin("")
        self.account: Account | None = None
        self._login: login.Login | None = None
        self._transaction: Transaction | None = None
        self._assembly: Assembly | None = None
        self._queue_id = QueueId("")
        self._final_dot = 0.0

    @property
    def idle(self) -> bool:
        """True when no transaction is open."""
        return self._transaction is None and self._assembly is None

    def forget(self) -> None:
        """Everything said in the clear is void."""
        self.helo = ""
        self._login = self.account = None
        self._drop()

    def _drop(self) -> None:
        """The transaction is over without a message."""
        self._transaction = None
        if self._assembly is not None:
            self._assembly.receiver.discard()
            self._assembly = None

    def connection_lost(self, error: Exception | None) -> None:
        """The client is gone, perhaps in the middle of a login."""
        super().connection_lost(error)
        if self._login is not None:
            self._login.abandon()
            self._login = None

    def may_be_long(self, line: bytes) -> bool:
        """AUTH and its responses alone (RFC 4954 §4)."""
        return len(line) <= login.RESPONSE_OCTETS + LINE_OCTETS and (
            self._login is not None or line[:5].upper() == b"AUTH "
        )

    # --- logging in ----------------------------------------------------------------------------------------------------

    def challenge(self, text: bytes) -> None:
        """Say 334; ``text`` is base64."""
        self.listener.metrics.replied(reply.AUTH_CONTINUE)
        self._out.append(b"334 " + text + b"\r\n")

    def logged_in(self, account: Account) -> None:
        """From now on the session acts for ``account``."""
        self._login = None
        self.account = account
        if self.listener.require_auth or self.protocol != "SMTP":
            self.protocol = "ESMTPSA"
        self._come_from()

    def logged_out(self) -> None:
        """A login failed."""
        self._login = None

    def _auth(self, argument: bytes) -> None:
        listener = self.listener
        if not self.helo:
            self.say(reply.NEED_HELO)
        elif not self.tls:
            self.say(reply.NEED_TLS if listener.require_tls else reply.AUTH_NEEDS_TLS)
        elif self.account is not None:
            self.say(reply.AUTH_AGAIN)
        elif not self.idle:
            self.say(reply.AUTH_IN_TRANSACTION)
        elif not listener.mechanisms:
            self.say(reply.AUTH_UNAVAILABLE if listener.takes_logins else reply.AUTH_DISABLED)
        else:
            self._login = login.start(self, argument)
            if self._login is not None:
                self._login.begin()

    # --- commands ------------------------------------------------------------------------------------------------------

    def command(self, line: bytes) -> None:
        """One command line."""
        if self._login is not None:
            self._login.line(line)
            return
        verb = line[:4].upper()
        if verb == b"RCPT":
            self._rcpt(line)
        elif verb == b"MAIL":
            self._mail(line)
        elif verb == b"DATA":
            self._data(line)
        else:
            word, _, argument = line.partition(b" ")
            word = word.upper()
            handler = self._COMMANDS.get(word)
            if handler is None:
                self.say(reply.UNKNOWN_COMMAND)
            elif self.needs_tls and not self.tls and word not in _IN_CLEAR:
                self.say(reply.NEED_TLS)
            else:
                handler(self, argument.strip(b" "))

    def _hello(self, argument: bytes, protocol: str) -> bool:
        if not argument or len(argument) > HELO_OCTETS or not argument.isascii() or not argument.decode().isprintable():
            self.say(reply.BAD_HELO)
            return False
        self.helo = helo_text(argument.decode("ascii"))
        self._come_from()
        self.protocol = protocol
        self._drop()  # RFC 5321 §4.1.4: EHLO acts like RSET
        return True

    def _come_from(self) -> None:
        self._origin = origin(self.helo, "", self.address)
        if self.account is not None and self.listener.show_login:
            self._origin = logged_in_as(self._origin, self.account.name)

    def _ehlo(self, argument: bytes) -> None:
        if self._hello(argument, "ESMTP" if not self.tls else "ESMTPS" if self.account is None else "ESMTPSA"):
            self.listener.metrics.replied(reply.OK_EHLO)
            listener = self.listener
            if self.trusted or listener.require_auth:
                self._out.append(listener.ehlo_trusted_in_tls if self.tls else listener.ehlo_trusted)
            else:
                self._out.append(listener.ehlo_in_tls if self.tls else listener.ehlo)

    def _helo(self, argument: bytes) -> None:
        if self._hello(argument, "SMTP"):
            self.say(reply.OK_HELO, text=OperatorText(self.listener.hostname))

    def _mail(self, line: bytes) -> None:
        listener = self.listener
        if not self.helo:
            self.say(reply.NEED_HELO)
            return
        if self._transaction is not None or self._assembly is not None:
            self.say(reply.NESTED_MAIL)
            return
        if listener.guarded and self._held_off():
            return
        if self.needs_tls and not self.tls:
            self.say(reply.NEED_TLS)
            return
        account = self.account
        if account is None and listener.require_auth:
            self.say(reply.NEED_AUTH)
            return
        body_8bit, terms, size = False, PLAIN, 0
        found = PLAIN_MAIL(line)
        if found is not None:
            mailbox = Mailbox(found[1].decode("ascii")) if found[1] else NULL_SENDER
        else:
            prefix = MAIL_PREFIX(line)
            if prefix is None:
                self.say(reply.BAD_ARGUMENTS)
                return
            path, words = parse_path(line[prefix.end() :])
            if path is AddressFault.NON_ASCII:
                path, words = parse_utf8_path(line[prefix.end() :])
            if isinstance(path, AddressFault):
                self.say(_FAULTS.get(path, reply.BAD_SENDER))
                return
            if path and "@" not in path:  # postmaster alone is a recipient only (RFC 5321 §4.1.1.3)
                self.say(reply.BAD_SENDER)
                return
            mailbox = path
            parameters = mail_parameters(words)
            if isinstance(parameters, Kind):
                self.say(parameters)
                return
            if not parameters.terms.utf8 and not line.isascii():
                self.say(reply.NOT_UTF8)
                return
            if parameters.size > (
                listener.receive.message_octets if self.trusted or account is not None else listener.offered
            ):
                self.say(reply.MESSAGE_TOO_BIG)
                return
            if parameters.auth and not (listener.mechanisms and self.tls):
                self.say(reply.BAD_PARAMETER)
                return
            body_8bit, terms, size = parameters.body_8bit, parameters.terms, parameters.size
        transaction = self.open_transaction(
            mailbox, body_8bit, self.trusted or account is not None, listener.rules, listener.directory,
            self.address, account,
        )  # fmt: skip
        verdict = transaction.judge_sender() if account is None else self._owner(transaction, account)
        if verdict is not None:
            self._shadows(verdict, "MAIL", mailbox, None)
            if verdict.kind is not None:
                self._reject(verdict, "MAIL", mailbox, mailbox, None)
                return
        transaction.terms, transaction.size = terms, size
        self._transaction = transaction
        self.say(reply.OK_MAIL)

    @staticmethod
    def _owner(transaction: Transaction, account: Account) -> Verdict | None:
        """What is said at MAIL of the sender of an account: whose it is, then whether it may send."""
        verdict = transaction.judge_owner(account)
        return verdict if verdict.kind is not None or verdict.shadow else transaction.judge_sender()

    def _rcpt(self, line: bytes) -> None:
        transaction = self._transaction
        if transaction is None:
            self.say(reply.NEED_MAIL if self.helo else reply.NEED_HELO)
            return
        transaction.asked = True
        relay_form = False
        said: RecipientTerms | None = None
        found = PLAIN_RCPT(line, len(RCPT_VERB)) if line[: len(RCPT_VERB)].upper() == RCPT_VERB else None
        if found is not None:
            mailbox = Mailbox(found[1].decode("ascii"))
            if not self.listener.blocked:
                quick = transaction.quick(mailbox)
                if quick is ACCEPT:
                    transaction.recipients.append(mailbox)
                    self.say(reply.OK_RCPT)
                    return
                if quick is not None:
                    self._refuse_unknown(transaction, mailbox, quick)
                    return
        else:
            prefix = RCPT_PREFIX(line)
            if prefix is None:
                self.say(reply.BAD_ARGUMENTS)
                return
            path, words = parse_path(line[prefix.end() :])
            if path is AddressFault.NON_ASCII and transaction.terms.utf8:
                path, words = parse_utf8_path(line[prefix.end() :])
            if isinstance(path, AddressFault):
                self.say(_FAULTS.get(path, reply.BAD_RECIPIENT))
                return
            if path == NULL_SENDER:
                self.say(reply.BAD_RECIPIENT)
                return
            if words:
                given = rcpt_parameters(words)
                if isinstance(given, Kind):
                    self.say(given)
                    return
                said = given
            mailbox = path
            if "@" not in mailbox or self._is_postmaster_here(mailbox):  # RFC 5321 §4.5.1
                mailbox = self.listener.rules.postmaster or mailbox
            relay_form = is_relay_form(mailbox)
        if self.listener.blocked and self._blocked(transaction.sender, mailbox):
            return
        verdict = transaction.judge_recipient(mailbox, relay_form)
        if verdict is ASK:
            ask(self, transaction, mailbox, relay_form, said)
        else:
            self.judged(transaction, mailbox, verdict, said)

    def _is_postmaster_here(self, mailbox: Mailbox) -> bool:
        """Postmaster at the address that the client connected to: who knows no name of ours writes that."""
        domain = mailbox.rpartition("@")[2]
        if domain[:1] != "[" or unquoted(mailbox).rpartition("@")[0].lower() != "postmaster":
            return False
        here = self.transport.get_extra_info("sockname")
        return bool(here) and domain.lower() == literal(str(here[0])).lower()

    def _data(self, line: bytes) -> None:
        transaction = self._transaction
        if len(line) != 4 and line[4:].strip(b" "):  # trailing spaces are tolerated (RFC 5321 §4.1.1)
            self.say(reply.BAD_ARGUMENTS if line[4:5] == b" " else reply.UNKNOWN_COMMAND)
        elif transaction is None:
            self.say(reply.NEED_MAIL if self.helo else reply.NEED_HELO)
        elif not transaction.recipients:
            self.say(reply.NO_VALID_RCPT if transaction.asked else reply.NEED_RCPT)
        else:
            self.receiver = self._begin_message(transaction)
            self.say(reply.START_DATA)

    def _begin_message(self, transaction: Transaction) -> Receiver:
        listener = self.listener
        self._queue_id = listener.next_id()
        only = transaction.recipients[0] if len(transaction.recipients) == 1 else None
        protocol = self.protocol
        if transaction.terms.utf8:
            protocol = utf8_protocol(protocol)
            only = only and (ascii_form(only) or only)  # so that the trace alone never needs SMTPUTF8
        trace = received(self._origin, listener.hostname, protocol, self._queue_id, only, listener.date())
        receiver = Receiver(listener.receive, trace, self.trusted, listener.dispatch.open_body)
        if transaction.trusted and listener.rules.header.outgoing is not None and transaction.leaves:
            receiver.leaves(listener.rules.header.outgoing)
        return receiver

    # --- in chunks (RFC 3030) ------------------------------------------------------------------------------------------

    def _bdat(self, argument: bytes) -> None:
        """A chunk follows. It is read whatever becomes of it: its octets are no commands."""
        said = announced(argument)
        if said is None:
            self.say(reply.BAD_CHUNK)
            self.end(reply.OUT_OF_STEP)
            return
        assembly, transaction = self._assembly, self._transaction
        refusal: Kind | None = None
        if assembly is None:
            if transaction is None:
                refusal = reply.NEED_MAIL if self.helo else reply.NEED_HELO
            elif not transaction.recipients:
                refusal = reply.NO_VALID_RCPT if transaction.asked else reply.NEED_RCPT
            else:
                # From here on the transaction is the assembly's: RCPT and DATA find none (RFC 3030 §2, §3).
                assembly = self._assembly = Assembly(transaction, self._begin_message(transaction))
                self._transaction = None
        chunk = Chunk(said.size, said.last, assembly, refusal)
        if said.size:
            self.receiver = chunk
        else:
            self._chunk_complete(chunk)

    def _chunk_complete(self, chunk: Chunk) -> None:
        """The last octet of a chunk was read."""
        self.receiver = None
        assembly = chunk.assembly
        if assembly is None:
            assert chunk.refusal is not None
            self.say(chunk.refusal)
        elif chunk.last or assembly.receiver.refusal is not None:
            # A failed message is over with the chunk that it fails in; later ones find no transaction.
            self._assembly, self._transaction = None, assembly.transaction
            assembly.receiver.end()
            self.message_complete(assembly.receiver)
        else:
            self.say(reply.OK_CHUNK, text=OperatorText(str(chunk.size)))

    def message_complete(self, receiver: Receiver | Chunk) -> None:
        """The final dot was read, or the last octet of a chunk."""
        if isinstance(receiver, Chunk):
            self._chunk_complete(receiver)
            return
        self.receiver = None
        listener, transaction = self.listener, self._transaction
        assert transaction is not None
        self._transaction = None
        content = receiver.finish()
        if receiver.removed:
            self._removed(self._queue_id, receiver.removed)
        if isinstance(content, Kind):
            self._refuse_message(transaction, content)
            return
        over = self._outgrown(transaction, receiver.octets) if transaction.limits else ()
        if len(over) == len(transaction.recipients):
            content.close()
            self.say(reply.RECIPIENT_SIZE, transaction.recipients[0])
            return
        envelope = Envelope(
            self._queue_id,
            transaction.sender if listener.directory.primaries is None else self._goes_out_as(transaction),
            tuple(transaction.recipients),
            transaction.body_8bit,
            listener.name,
            self.client,
            transaction.terms if transaction.terms is PLAIN else transaction.all_terms(),
        )
        listener.log.received(
            envelope.id, self.client, listener.name, envelope.sender, len(envelope.recipients),
            content.size, self.protocol, self.helo, self.tls,
        )  # fmt: skip
        listener.metrics.received(listener.name, content.size)
        self.messages += 1
        self.busy = True
        self.deadline = float("inf")  # dispatch answers in bounded time
        self._final_dot = listener.clock()
        if over:
            listener.dispatch.accept_without(over, reply.RECIPIENT_SIZE, envelope, content, self._answered)
        else:
            listener.dispatch.accept(envelope, content, self._answered)

    def _answered(self, kind: Kind, text: OperatorText | QueueId = NO_TEXT) -> None:
        """Dispatch knows what to say."""
        listener = self.listener
        listener.metrics.accepted(listener.clock() - self._final_dot)
        if self.closed:
            return
        self.busy = False
        self.say(kind, text=text)
        self.answered()

    def _rset(self, argument: bytes) -> None:
        if argument:
            self.say(reply.BAD_ARGUMENTS)
            return
        self._drop()
        self.say(reply.OK_RSET)

    def _noop(self, argument: bytes) -> None:
        self.say(reply.OK_NOOP)

    def _vrfy(self, argument: bytes) -> None:
        self.say(reply.VRFY_UNSURE if argument else reply.BAD_ARGUMENTS)

    def _expn(self, argument: bytes) -> None:
        self.say(reply.NOT_IMPLEMENTED)

    def _help(self, argument: bytes) -> None:
        self.say(reply.HELP)

    def _quit(self, argument: bytes) -> None:
        if argument:
            self.say(reply.BAD_ARGUMENTS)
        else:
            self.end(reply.BYE)

    def _starttls(self, argument: bytes) -> None:
        if argument:
            self.say(reply.BAD_ARGUMENTS)
        elif self.tls:
            self.say(reply.TLS_ACTIVE)
        elif not self.helo:
            self.say(reply.NEED_HELO)
        elif self.listener.tls is None:
            self.say(reply.TLS_UNAVAILABLE)
        else:
            self.say(reply.START_TLS)
            self.upgrade()

    _COMMANDS: Final[dict[bytes, Callable[[Session, bytes], None]]] = {
        b"EHLO": _ehlo,
        b"HELO": _helo,
        b"BDAT": _bdat,
        b"RSET": _rset,
        b"NOOP": _noop,
        b"QUIT": _quit,
        b"STARTTLS": _starttls,
        b"AUTH": _auth,
        b"VRFY": _vrfy,
        b"EXPN": _expn,
        b"HELP": _help,
    }
