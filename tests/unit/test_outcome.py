from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.mail.answer import Answer, Stage
from relay.policy.outcome import Fault, Outcome, advice, classify, client_reply, fault

DELIVERED, REFUSED, DEFERRED, OUR_FAULT = Outcome.DELIVERED, Outcome.REFUSED, Outcome.DEFERRED, Outcome.OUR_FAULT

SESSION = [Stage.CONNECT, Stage.BANNER, Stage.EHLO, Stage.STARTTLS, Stage.AUTH]
TRANSACTION = [Stage.MAIL, Stage.RCPT, Stage.DATA, Stage.FINAL]


def answer(stage: Stage, code: int, enhanced: str = "", text: str = "no") -> Answer:
    return Answer(stage, code, enhanced, text)


@pytest.mark.parametrize("stage", Stage)
@pytest.mark.parametrize(("code", "enhanced"), [(0, ""), (421, "4.3.2"), (421, ""), (450, "4.2.1"), (451, "5.7.57")])
def test_no_answer_and_every_4xx_is_for_now(stage: Stage, code: int, enhanced: str) -> None:
    assert classify(answer(stage, code, enhanced)) is DEFERRED


@pytest.mark.parametrize("stage", SESSION)
@pytest.mark.parametrize("code", [500, 502, 521, 530, 535, 550, 554, 571])
def test_a_5xx_before_mail_is_our_fault(stage: Stage, code: int) -> None:
    assert classify(answer(stage, code, "5.1.1")) is OUR_FAULT


@pytest.mark.parametrize("stage", TRANSACTION)
@pytest.mark.parametrize("code", [500, 501, 502, 503, 504, 530, 534, 535, 538])
def test_syntax_and_login_codes_are_our_fault_at_any_stage(stage: Stage, code: int) -> None:
    assert classify(answer(stage, code, "5.5.4")) is OUR_FAULT
    assert classify(answer(stage, code)) is OUR_FAULT


@pytest.mark.parametrize("stage", TRANSACTION)
@pytest.mark.parametrize("enhanced", ["5.7.3", "5.7.54", "5.7.57", "5.7.60"])
def test_a_right_missing_on_the_exchange_connector_is_our_fault(stage: Stage, enhanced: str) -> None:
    assert classify(answer(stage, 550, enhanced)) is OUR_FAULT


@pytest.mark.parametrize(
    ("code", "enhanced", "outcome"),
    [
        (552, "", REFUSED),
        (552, "5.3.4", REFUSED),
        (550, "5.3.4", REFUSED),
        (552, "5.2.3", REFUSED),
        (553, "5.6.7", REFUSED),
        (550, "5.6.7", REFUSED),
        (550, "5.6.9", REFUSED),
        (554, "5.6.3", REFUSED),
        (553, "5.1.7", REFUSED),
        (501, "5.1.7", REFUSED),
        (553, "5.1.8", REFUSED),
        (554, "5.1.0", REFUSED),
        (553, "", REFUSED),
        (550, "5.7.1", OUR_FAULT),
        (550, "", OUR_FAULT),
        (554, "", OUR_FAULT),
        (553, "5.7.1", OUR_FAULT),
        (555, "5.5.4", OUR_FAULT),
        (550, "5.1.1", OUR_FAULT),
    ],
)
def test_a_5xx_to_mail_is_our_fault_unless_about_size_utf8_content_or_sender(
    code: int, enhanced: str, outcome: Outcome
) -> None:
    assert classify(answer(Stage.MAIL, code, enhanced)) is outcome


@pytest.mark.parametrize(
    ("stage", "code", "enhanced", "outcome"),
    [
        (Stage.RCPT, 550, "5.1.1", REFUSED),
        (Stage.RCPT, 550, "", REFUSED),
        (Stage.RCPT, 553, "5.1.3", REFUSED),
        (Stage.RCPT, 501, "5.1.3", REFUSED),
        (Stage.RCPT, 554, "5.7.1", REFUSED),
        (Stage.RCPT, 556, "5.1.10", REFUSED),
        (Stage.RCPT, 552, "", DEFERRED),
        (Stage.RCPT, 552, "5.5.3", DEFERRED),
        (Stage.RCPT, 550, "5.5.3", DEFERRED),
        (Stage.RCPT, 552, "5.2.2", REFUSED),
        (Stage.RCPT, 552, "5.3.4", REFUSED),
        (Stage.DATA, 552, "", DEFERRED),
        (Stage.DATA, 554, "5.5.1", REFUSED),
        (Stage.FINAL, 552, "", REFUSED),
        (Stage.FINAL, 552, "5.3.4", REFUSED),
        (Stage.FINAL, 554, "5.7.1", REFUSED),
        (Stage.FINAL, 550, "", REFUSED),
    ],
)
def test_a_5xx_about_recipient_or_message_is_for_good(stage: Stage, code: int, enhanced: str, outcome: Outcome) -> None:
    assert classify(answer(stage, code, enhanced)) is outcome


@given(st.sampled_from(Stage), st.integers(-1, 999), st.from_regex(r"|[245]\.\d{1,3}\.\d{1,3}", fullmatch=True))
def test_only_a_2xx_to_the_final_dot_is_delivered_and_only_a_5xx_ends_a_recipient(
    stage: Stage, code: int, enhanced: str
) -> None:
    outcome = classify(answer(stage, code, enhanced))
    assert (outcome is DELIVERED) == (stage is Stage.FINAL and 200 <= code <= 299)
    if outcome in (REFUSED, OUR_FAULT):
        assert 500 <= code <= 599


@pytest.mark.parametrize(
    ("given_answer", "family", "words"),
    [
        (answer(Stage.BANNER, 554), Fault.GREETING, "RemoteIPRanges"),
        (answer(Stage.EHLO, 550), Fault.EHLO, "server.hostname"),
        (answer(Stage.STARTTLS, 554), Fault.TLS, "delivery.tls"),
        (answer(Stage.AUTH, 535, "5.7.8"), Fault.AUTH, "password"),
        (answer(Stage.MAIL, 530, "5.7.57"), Fault.ANONYMOUS, "AnonymousUsers"),
        (answer(Stage.RCPT, 550, "5.7.54"), Fault.RECIPIENT_RIGHT, "ms-Exch-SMTP-Accept-Any-Recipient"),
        (answer(Stage.FINAL, 550, "5.7.60"), Fault.SENDER_RIGHT, "ms-Exch-SMTP-Accept-Any-Sender"),
        (
            answer(Stage.MAIL, 550, "5.7.1", "Client does not have permissions to send as this sender"),
            Fault.SENDER_RIGHT,
            "Accept-Authoritative-Domain-Sender",
        ),
        (
            answer(Stage.MAIL, 550, "5.7.1", "Client does not have permission"),
            Fault.SUBMIT_RIGHT,
            "ms-Exch-SMTP-Submit",
        ),
        (answer(Stage.MAIL, 530, "5.7.0", "Must issue a STARTTLS command first"), Fault.TLS, "RequireTLS"),
        (answer(Stage.MAIL, 530, "5.7.0", "Authentication required"), Fault.AUTH, "login"),
        (answer(Stage.RCPT, 503, "5.5.1"), Fault.SYNTAX, "firewall"),
    ],
)
def test_the_alarm_names_cause_and_cure(given_answer: Answer, family: Fault, words: str) -> None:
    assert classify(given_answer) is OUR_FAULT
    assert fault(given_answer) is family
    assert words in advice(given_answer)
    assert advice(given_answer).isascii()
    assert advice(given_answer).isprintable()


@pytest.mark.parametrize(
    ("answers", "code", "enhanced"),
    [
        ([(Stage.RCPT, 550, "5.1.1")], 550, "5.1.1"),
        ([(Stage.RCPT, 550, "")], 550, "5.0.0"),
        ([(Stage.RCPT, 550, ""), (Stage.RCPT, 550, "5.2.1")], 550, "5.2.1"),
        ([(Stage.RCPT, 550, "5.1.1"), (Stage.RCPT, 554, "5.2.1")], 550, "5.1.1"),
        ([(Stage.RCPT, 550, "5.1.1"), (Stage.FINAL, 554, "")], 554, "5.0.0"),
        ([(Stage.FINAL, 552, "5.3.4"), (Stage.RCPT, 550, "5.1.1")], 552, "5.3.4"),
        ([(Stage.MAIL, 552, "5.3.4"), (Stage.MAIL, 552, "5.3.4")], 552, "5.3.4"),
    ],
)
def test_the_client_is_told_the_most_telling_refusal(
    answers: list[tuple[Stage, int, str]], code: int, enhanced: str
) -> None:
    kind = client_reply([answer(*one) for one in answers])
    assert (kind.code, kind.enhanced) == (code, enhanced)


@pytest.mark.parametrize(
    "answers",
    [
        [],
        [(Stage.RCPT, 450, "4.2.1")],
        [(Stage.RCPT, 550, "5.1.1"), (Stage.RCPT, 450, "4.2.1")],
        [(Stage.RCPT, 550, "5.7.54")],
        [(Stage.FINAL, 250, "2.0.0"), (Stage.RCPT, 550, "5.1.1")],
    ],
)
def test_a_refusal_is_never_made_of_anything_but_refusals(answers: list[tuple[Stage, int, str]]) -> None:
    with pytest.raises(ValueError, match="refused for good"):
        client_reply([answer(*one) for one in answers])


def test_every_family_of_fault_is_in_the_documentation() -> None:
    text = (Path(__file__).parents[2] / "docs" / "replies.md").read_text()
    assert [family for family in Fault if f"| `{family}` |" not in text] == []
