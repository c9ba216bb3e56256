"""Owns: which of the SMTP library's own tests do not apply to the relay's session, and why. docs/decisions.md explains.

A name ends in ``*`` where what comes behind it does not matter. Every other test of ``MODULES`` has to pass, every one listed
here has to fail (of those with a ``*`` some may not; those under ``STUCK`` are not run), and every name has to stand for a test that exists.
"""

from __future__ import annotations

from typing import Final

MODULES: Final = ("test_smtp", "test_starttls", "test_smtps", "test_smtpsmuggling")

OTHER_MODULES: Final = {
    "test_handlers": "handlers of the library; the relay has dispatch instead",
    "test_lmtp": "the relay is a client of LMTP, no server",
    "test_main": "the library's command line",
    "test_misc": "the library's own helpers",
    "test_proxyprotocol": "the library's parser; the relay's own stands in front of the session (tests/dialogue/test_proxy.py)",
    "test_server": "the library's controllers; the relay has a process tree",
}

HOOKS: Final = (
    "a hook of the library's handlers for a single command: the relay's rules decide, and there are none to call"
)
CLEAR: Final = "a login without TLS: never offered, and refused (row A1)"
WORDING: Final = "looks for the library's own words or capabilities"
INSIDE: Final = "looks at the library's stream writer, which is not there"
LINES: Final = (
    "a message with lines over 1,001 octets is refused by the library; real mail has them, so the relay takes it"
)
ADDRESS: Final = (
    "the grammar of RFC 5321 §4.1.2: a path stands in angle brackets; comments, source routes and bare words are no mailbox, "
    "and a local part has at most 64 octets"
)
LIMITS: Final = "the library counts calls of each command; the relay counts refusals (limits.errors)"
UTF8: Final = "SMTPUTF8 cannot be switched off in the relay, and 8-bit content is taken without being announced"
HELP: Final = "HELP tells where to read, not what commands there are: nobody learns anything from it"

NOT_OURS: Final[dict[str, str]] = {
    # replies of a pipelined group leave in one write
    "test_smtp::TestProtocol::*": "counts writes: replies to a pipelined group leave in one (RFC 2920 §3.2)",
    "test_smtp::TestSMTP::test_ehlo": WORDING,
    "test_smtp::TestSMTP::test_help_bad_arg": HELP,
    "test_smtp::TestSMTP::test_vrfy_not_address": "VRFY is answered 252 whatever it asks for (RFC 5321 §7.3)",
    "test_smtp::TestSMTP::test_mail_valid_address[*": ADDRESS,
    "test_smtp::TestSMTP::test_rcpt_valid_address[*": ADDRESS,
    "test_smtp::TestSMTP::test_mail_smtp_errsyntax[params_noesmtp]": "SIZE behind HELO is taken: it does no harm",
    "test_smtp::TestSMTPAuth::test_already_authenticated": CLEAR,
    "test_smtp::TestSMTPAuth::test_auth_individually": CLEAR,
    "test_smtp::TestSMTPAuth::test_rset_maintain_authenticated": CLEAR,
    "test_smtp::TestSMTPAuth::test_auth_loginteract_warning": CLEAR,
    "test_smtp::TestAuthMechanisms::*": CLEAR,
    "test_smtp::TestAuthenticator::*": CLEAR,
    "test_smtp::TestRequiredAuthentication::*": CLEAR,
    "test_smtp::TestResetCommands::*": HOOKS,
    "test_smtp::TestSMTPWithController::test_esmtp_no_size_limit": "there is always a limit, and SIZE tells it",
    "test_smtp::TestSMTPWithController::test_process_message_error": WORDING,
    "test_smtp::TestSMTPWithController::test_unexpected_errors*": HOOKS,
    "test_smtp::TestSMTPWithController::test_exception_handler_exception": HOOKS,
    "test_smtp::TestSMTPWithController::test_exception_handler_undescribable": HOOKS,
    "test_smtp::TestSMTPWithController::test_bad_encodings": "octets that are no UTF-8 in an address, without brackets",
    "test_smtp::TestSMTPWithController::test_data_line_too_long": LINES,
    "test_smtp::TestSMTPWithController::test_long_line_*": LINES,
    "test_smtp::TestSMTPWithController::test_too_long_body_delay_error": WORDING,
    "test_smtp::TestSMTPWithController::test_too_long_line_delay_error": LINES,
    "test_smtp::TestCustomization::test_default_greeting": "the greeting tells no program and no version",
    "test_smtp::TestCustomization::test_custom_greeting": "the greeting tells no program and no version",
    "test_smtp::TestCustomization::test_limitlocalpart": ADDRESS,
    "test_smtp::TestClientCrash::*": INSIDE,
    "test_smtp::TestStrictASCII::test_ehlo": UTF8,
    "test_smtp::TestStrictASCII::test_mail_param": UTF8,
    "test_smtp::TestStrictASCII::test_data": UTF8,
    "test_smtp::TestTimeout::test_timeout": "the relay says 421 before it closes (RFC 5321 §4.5.3.2)",
    "test_smtp::TestAuthArgs::test_warn_authreqnotls": "an argument of the library's constructor",
    "test_smtp::TestAuthArgs::test_log_authmechanisms": "an argument of the library's constructor",
    "test_smtp::TestLimits::*": LIMITS,
    "test_starttls::TestTLSContext::test_certreq_warn": "an argument of the library's constructor",
    "test_starttls::TestTLSContext::test_nocertreq_chkhost_warn": "an argument of the library's constructor",
}

STUCK: Final[dict[str, str]] = {
    "test_smtp::TestSMTP::test_data_354": "stops the controller, which ends its tasks: a session here is none, and the client waits",
    "test_smtp::TestSMTPWithController::test_exception_handler_multiple_connections_lost": HOOKS,
    "test_smtp::TestSleepingHandler::*": "a half-close behind HELO: its reply comes first (RFC 9293 §3.6), the test wants none",
    "test_starttls::TestStartTLS::test_tls_handshake_stopcontroller": "stops the controller, as above",
    "test_starttls::TestStartTLS::test_helo_starttls": "stops the controller, as above",
    "test_starttls::TestTLSEnding::*": "stops the controller, as above, and looks at the library's session",
}
