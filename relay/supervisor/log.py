"""Owns: the supervisor's own log, and that its children may write to the same file."""

from __future__ import annotations

from relay.config.schema import Config
from relay.supervisor import spool
from relay.supervisor.errors import Refusal
from relay.supervisor.privileges import Identity
from relay.telemetry.logs import LogWriter
from relay.telemetry.maillog import MailLog, adopt, note


class SupervisorLog:
    """What ``note`` writes to in this process. Never started: the supervisor writes each line at once, threadless."""

    def __init__(self, config: Config, worker: Identity | None) -> None:
        """Raise Refusal when the file cannot be written."""
        self._worker = worker
        self._writer, self.mail = self._open(config)

    def reopen(self, config: Config) -> None:
        """Open the file again by its name; when that fails, the old one stays and is told so."""
        try:
            fresh = self._open(config)
        except Refusal as refusal:
            note("error", "log_not_opened", why=str(refusal))
            return
        self._writer.close()
        self._writer, self.mail = fresh

    def leave(self, config: Config) -> None:
        """In a child: let go of the file. Until its role has opened its own log, notes go to standard error."""
        self._writer.close()
        adopt(MailLog(LogWriter(None), config.log.format, config.server.hostname))

    def _open(self, config: Config) -> tuple[LogWriter, MailLog]:
        try:
            spool.share_log(config.log.file, self._worker)
            writer = LogWriter(config.log.file)
        except OSError as error:
            raise Refusal(f"log.file: cannot write {config.log.file}: {error.strerror}; check owner and mode") from None
        mail = MailLog(writer, config.log.format, config.server.hostname)
        adopt(mail)
        return writer, mail
