"""The header firewall (row F10) and the loop check: which fields go, which stay, and that no spelling hides one."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from relay.config.schema import Config, Mode
from relay.policy.content import HeaderRules, authserv_id

OWN = "mx.example.com"


def rules(*, mode: str = "enforce", remove: list[str] | None = None, hostname: str = OWN) -> HeaderRules:
    content: dict[str, object] = {"header_firewall": mode}
    if remove is not None:
        content["remove_headers"] = remove
    return HeaderRules(
        Config.model_validate(
            {
                "server": {"hostname": hostname},
                "listener": [{"name": "mx", "address": "127.0.0.1:2525"}],
                "content": content,
            }
        )
    )


ENFORCED = rules()
ORGANIZATION = "x-ms-exchange-organization-"

REMOVED = [
    ("plain", b"X-MS-Exchange-Organization-SCL: -1\r\n"),
    ("another prefix", b"X-MS-Exchange-Forest-RulesExecuted: x\r\n"),
    ("lower case", b"x-ms-exchange-organization-scl: -1\r\n"),
    ("upper case", b"X-MS-EXCHANGE-ORGANIZATION-SCL: -1\r\n"),
    ("space before the colon", b"X-MS-Exchange-Organization-SCL : -1\r\n"),
    ("tabs before the colon", b"X-MS-Exchange-Organization-SCL\t \t: -1\r\n"),
    ("no space behind the colon", b"X-MS-Exchange-Organization-SCL:-1\r\n"),
    ("no value", b"X-MS-Exchange-Organization-SCL:\r\n"),
    ("folded", b"X-MS-Exchange-Organization-SCL:\r\n -1\r\n"),
    ("folded with a tab, twice", b"X-MS-Exchange-Organization-SCL: a\r\n\tb\r\n c\r\n"),
    ("folded over a line of spaces", b"X-MS-Exchange-Organization-SCL: a\r\n \t\r\n c\r\n"),
    ("folded behind a dot that will be taken off", b"X-MS-Exchange-Organization-SCL: a\r\n. b\r\n"),
    ("behind a dot that will be taken off", b".X-MS-Exchange-Organization-SCL: -1\r\n"),
    ("nothing behind the prefix", b"X-MS-Exchange-Organization-: -1\r\n"),
    ("other characters behind the prefix", b"X-MS-Exchange-Organization-\x00\xe4 (): -1\r\n"),
    ("8-bit in the value", b"X-MS-Exchange-Organization-SCL: \xe4\xff\x00\r\n"),
    ("very long", b"X-MS-Exchange-Organization-SCL: " + b"a" * 100_000 + b"\r\n"),
]
KEPT = [
    ("other fields", b"X-MS-Exchange-CrossTenant-Id: 1\r\nX-MS-Has-Attach:\r\n"),
    ("a longer name", b"XX-MS-Exchange-Organization-SCL: -1\r\n"),
    ("the name in a value", b"Subject: X-MS-Exchange-Organization-SCL: -1\r\n"),
    ("the name in a folded value", b"Subject: x\r\n X-MS-Exchange-Organization-SCL: -1\r\n"),
    ("two dots: one stays", b"..X-MS-Exchange-Organization-SCL: -1\r\n"),
    ("no field at all", b"X-MS-Exchange-Organization-SCL\r\n"),
]


@pytest.mark.parametrize("field", [field for _, field in REMOVED], ids=[name for name, _ in REMOVED])
@pytest.mark.parametrize("place", ["first", "middle", "last", "alone"])
def test_a_forbidden_field_is_removed_and_nothing_else(field: bytes, place: str) -> None:
    before = b"" if place in ("first", "alone") else b"Received: x\r\n\tby y\r\nSubject: a\r\n"
    after = b"" if place in ("last", "alone") else b"To: b\r\nX: c\r\n"
    header, removed, _ = ENFORCED.apply(before + field + after, trusted=False)
    assert header == before + after
    [name] = removed
    assert name.startswith(("x-ms-exchange-organization-", "x-ms-exchange-forest-"))


@pytest.mark.parametrize("field", [field for _, field in KEPT], ids=[name for name, _ in KEPT])
def test_what_only_looks_like_one_is_kept(field: bytes) -> None:
    header = b"Subject: a\r\n" + field + b"To: b\r\n"
    assert ENFORCED.apply(header, trusted=False) == (header, (), 0)


def test_every_field_of_several_is_removed_and_named_in_order() -> None:
    fields = b"".join(field for _, field in REMOVED)
    header, removed, _ = ENFORCED.apply(b"A: 1\r\n" + fields + b"B: 2\r\n" + fields, trusted=False)
    assert header == b"A: 1\r\nB: 2\r\n"
    assert len(removed) == 2 * len(REMOVED)
    assert removed[1] == "x-ms-exchange-forest-rulesexecuted"


@pytest.mark.parametrize(("trusted", "mode"), [(True, "enforce"), (False, "off"), (True, "log"), (True, "off")])
def test_trusted_clients_and_a_firewall_that_is_off_keep_everything(*, trusted: bool, mode: str) -> None:
    header = b"".join(field for _, field in REMOVED)
    assert rules(mode=mode).apply(header, trusted=trusted) == (header, (), 0)


def test_mode_log_names_and_keeps() -> None:
    firewall = rules(mode="log")
    assert firewall.mode is Mode.LOG
    header = b"X-MS-Exchange-Organization-SCL: -1\r\nAuthentication-Results: mx.example.com; none\r\n"
    assert firewall.apply(header, trusted=False) == (
        header,
        ("x-ms-exchange-organization-scl", "authentication-results"),
        0,
    )


def test_names_of_the_configuration_are_whole_names_or_prefixes() -> None:
    firewall = rules(remove=["X-Own", "X-Pre*", "X.Dot"])
    header = b"X-Own: 1\r\nX-Own-Not: 2\r\nX-Prefixed: 3\r\nXaDot: 4\r\nX.Dot: 5\r\nX-MS-Exchange-Organization-A: 6\r\n"
    assert firewall.apply(header, trusted=False) == (
        b"X-Own-Not: 2\r\nXaDot: 4\r\nX-MS-Exchange-Organization-A: 6\r\n",
        ("x-own", "x-prefixed", "x.dot"),
        0,
    )


# --- Authentication-Results (RFC 8601) ---------------------------------------------------------------------------------

OURS = [
    b" mx.example.com; spf=pass smtp.mailfrom=a@example.net",
    b"mx.example.com;none",
    b" mx.example.com",
    b" MX.Example.COM; none",
    b" mx.example.com 1; none",
    b"\t  mx.example.com\t; none",
    b"\r\n mx.example.com; none",
    b"\r\n\t\r\n mx.example.com;\r\n none",
    b"\r\n. mx.example.com; none",
    b' "mx.example.com"; none',
    b' "mx\\.example.com"; none',
    b' "MX.EXAMPLE.COM" 1; none',
    b" (a comment) mx.example.com; none",
    b" (nested (comments) here) mx.example.com; none",
    b" (one)(two) (three) mx.example.com; none",
    b" (a \\) in it) mx.example.com; none",
    b" (other.example.net;) mx.example.com; none",
    b" (folded\r\n comment) mx.example.com; none",
    b" mx.example.com(comment); none",
    b" mx.example.com/1; none",
    b" mx.example.com.; none",
    b" (never closed mx.example.com; none",
    b" ; mx.example.com; none",
]
FOREIGN = [
    b" mx.example.net; spf=pass",
    b" mx.example.com.evil.example; spf=pass",
    b" amx.example.com; none",
    b" mx.example.comx; none",
    b" mx.example.com-1; none",
    b" mx-example-com; none",
    b" other.example.net; spf=pass smtp.helo=mx.example.com",
    b" (mx.example.com) other.example.net; none",
    b' "other" ; reason="mx.example.com"',
    b" other.example.net;\r\n mx.example.com; none",
    b"",
    b" ; none",
]


@pytest.mark.parametrize("value", OURS)
def test_results_that_claim_to_be_ours_are_removed(value: bytes) -> None:
    for name in (b"Authentication-Results:", b"AUTHENTICATION-results :", b".authentication-results:"):
        header, removed, _ = ENFORCED.apply(b"A: 1\r\n" + name + value + b"\r\nB: 2\r\n", trusted=False)
        assert (header, removed) == (b"A: 1\r\nB: 2\r\n", ("authentication-results",))


@pytest.mark.parametrize("value", FOREIGN)
def test_results_of_others_are_kept(value: bytes) -> None:
    header = b"A: 1\r\nAuthentication-Results:" + value + b"\r\nB: 2\r\n"
    assert ENFORCED.apply(header, trusted=False) == (header, (), 0)


def test_ours_go_and_those_of_others_stay_in_one_header() -> None:
    header, removed, _ = ENFORCED.apply(
        b"Authentication-Results: other.example.net; none\r\nAuthentication-Results: mx.example.com; none\r\n"
        b"X-MS-Exchange-Organization-A: 1\r\nAuthentication-Results: third.example.net;\r\n none\r\n",
        trusted=False,
    )
    assert header == (
        b"Authentication-Results: other.example.net; none\r\nAuthentication-Results: third.example.net;\r\n none\r\n"
    )
    assert removed == ("authentication-results", "x-ms-exchange-organization-a")


COMMENTS = st.recursive(
    st.text("ab .;\\", max_size=4).map(lambda text: text.replace("\\", "\\)")),
    lambda inner: st.lists(inner, max_size=3).map(lambda parts: f"({'x'.join(parts)})"),
    max_leaves=6,
)


@settings(max_examples=300, deadline=None)
@given(st.lists(COMMENTS, max_size=3), st.sampled_from(["mx.example.com", '"mx.example.com"', '"mx\\.example\\.com"']))
def test_any_comments_may_stand_before_the_name(comments: list[str], name: str) -> None:
    value = "".join(f" ({comment})" for comment in comments) + f" {name}; none"
    assert authserv_id(value.encode()) == OWN.encode()


@given(st.text('()"\\ ;m', max_size=30))
def test_broken_values_come_to_an_end(value: str) -> None:
    assert set(authserv_id(value.encode())) <= set(b'()"\\ ;m')


# --- hops --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("header", "hops"),
    [
        (b"", 0),
        (b"Received: a\r\n", 1),
        (b"received:a\r\nRECEIVED: b\r\n", 2),
        (b"Received: a\r\n\tby b\r\n Received: c\r\n", 1),
        (b"X-Received: a\r\nReceived-SPF: b\r\nSubject: Received: c\r\n", 0),
        (b".Received: a\r\n..Received: b\r\n", 1),
    ],
)
def test_received_lines_are_counted(header: bytes, hops: int) -> None:
    assert ENFORCED.apply(header, trusted=False).hops == hops
    assert ENFORCED.apply(header, trusted=True).hops == hops


# --- the same a second time: by fields, as a reader of the message sees them ----------------------------------------------

NAMES = st.sampled_from(
    [b"Subject", b"X-MS-Exchange-Organization-SCL", b"x-ms-exchange-forest-a", b"Received", b"X-MS-Exchange", b"A"]
)
LINES = st.one_of(
    st.tuples(st.sampled_from([b"", b".", b".."]), NAMES, st.sampled_from([b":", b" :", b" ", b": a:"])).map(b"".join),
    st.sampled_from(
        [b" folded", b"\tX-MS-Exchange-Organization-SCL: 1", b". folded", b".. two", b"no field", b" ", b".: a"]
    ),
)


def _without_forbidden(header: bytes) -> bytes:
    kept: list[bytes] = []
    dropping = False
    for line in header.split(b"\r\n")[:-1]:
        seen = line.removeprefix(b".")  # RFC 5321 §4.5.2
        if not seen.startswith((b" ", b"\t")):
            name, colon, _ = seen.partition(b":")
            name = name.lower()
            dropping = bool(colon) and name.startswith((b"x-ms-exchange-organization-", b"x-ms-exchange-forest-"))
        if not dropping:
            kept.append(line + b"\r\n")
    return b"".join(kept)


@settings(max_examples=1000, deadline=None)
@given(st.lists(LINES, max_size=10))
def test_the_rules_agree_with_a_reader_of_the_message(lines: list[bytes]) -> None:
    header = b"".join(line + b"\r\n" for line in lines)
    result = ENFORCED.apply(header, trusted=False)
    assert result.header == _without_forbidden(header)
    assert bool(result.removed) == (result.header != header)


@pytest.mark.parametrize(
    ("field", "loops"),
    [
        (b"Received: from a (unknown [192.0.2.1])\r\n\tby mx.example.com with ESMTP id x;\r\n\tdate\r\n", True),
        (b"Received: from a by MX.Example.Com with SMTP id x; date\r\n", True),
        (b"Received: from a\r\n by\r\n\tmx.example.com\r\n with SMTP id x; date\r\n", True),
        (b"Received: from mx.example.com by other.example with SMTP id x; date\r\n", False),
        (b"Received: from a by mx.example.com.example with SMTP id x; date\r\n", False),
        (b"Received: from a by other.example with SMTP; date\r\nX-By: by mx.example.com \r\n", False),
    ],
)
def test_a_message_that_passed_here_ten_times_is_a_loop(field: bytes, loops: bool) -> None:  # noqa: FBT001
    assert ENFORCED.apply(field * 9, trusted=False).hops == 9
    assert ENFORCED.apply(field * 10, trusted=True).hops == (100 if loops else 10)
