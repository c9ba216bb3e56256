"""The line of every key and list item of a TOML text."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from relay.config.lines import key_lines
from relay.config.whole import KeyPath

ROOT = Path(__file__).parents[2]

EVERY_FORM = """\
top = 1 # a comment with = and [brackets]
dotted.key = "a # that is text ]"
[table] # comment
  several = \"\"\"
[not.a.table]
key = \"\\\"\" \\\\\"\"\"\"\"
literal = '''
['neither']'''''
list = [ # comment ]
  1,
  "two", [3, { x = 1, "y z" = 'q' }],
  # comment,
]
moment = 2024-01-01 00:00:00
number = -1_000.5e3
[[array]]
n = 1
[[array]]
n = 2
[array.below]
k = ''
[[array.deep]]
z = 1
[[array.deep]]
z = []
y = {}
["quoted.name".c]
"q\\u0041" = true
"""


def paths(value: object, at: KeyPath = ()) -> Iterator[KeyPath]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for step, item in items:
        yield (*at, step)
        yield from paths(item, (*at, step))


@pytest.mark.parametrize(
    "text",
    [
        EVERY_FORM,
        EVERY_FORM.replace("\n", "\r\n"),
        (ROOT / "config/relay.toml").read_text(),
        (ROOT / "config/demo.toml").read_text(),
        (ROOT / "pyproject.toml").read_text(),
        "",
        "key = 1",
    ],
    ids=["every form", "with CR LF", "relay.toml", "demo.toml", "pyproject.toml", "nothing", "no last newline"],
)
def test_every_key_and_item_that_tomllib_sees_has_a_line(text):
    assert set(key_lines(text)) == set(paths(tomllib.loads(text)))


def test_the_line_is_the_one_where_the_key_or_item_begins():
    lines = key_lines(EVERY_FORM)
    assert lines["top",] == 1
    assert lines["dotted", "key"] == 2
    assert lines["table",] == 3
    assert lines["table", "several"] == 4
    assert lines["table", "literal"] == 7
    assert lines["table", "list"] == 9
    assert lines["table", "list", 0] == 10
    assert lines["table", "list", 2, 1, "y z"] == 11
    assert lines["array",] == 16
    assert lines["array", 1, "n"] == 19
    assert lines["array", 1, "deep", 1, "z"] == 25
    assert lines["quoted.name", "c", "qA"] == 28


def test_a_text_that_is_no_toml_ends_with_an_error_and_not_in_a_loop():
    with pytest.raises(ValueError, match="line 2"):
        key_lines('a = 1\n= "no key"')
