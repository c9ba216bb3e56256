"""Owns: reading ``matrix.md``: dialogues with the replies that the RFCs allow. It plays none of them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final, NamedTuple

STATES: Final = ("new", "helo", "ehlo", "mail", "rcpt", "refused", "done", "reset", "tls")

_OF_A_SITE: Final = {"narrow": ("narrow", "mx"), "blind": ("blind", "mx")}
_EXPANSION: Final = re.compile(rb"\{(?:x([0-9a-f]{2})|(\d+)\*(.))\}")


class Row(NamedTuple):
    """One command in one state."""

    name: str
    listener: str
    state: str
    sent: bytes
    codes: tuple[int, ...]
    section: str


class Verdict(NamedTuple):
    """One transaction by its facts, and what its last command may be answered."""

    name: str
    site: str
    listener: str
    client: str
    helo: str
    sender: str
    to: tuple[str, ...]
    size: int
    tls: bool
    codes: tuple[int, ...]
    section: str

    def commands(self) -> list[str]:
        """MAIL and each RCPT."""
        size = f" SIZE={self.size}" if self.size else ""
        return [f"MAIL FROM:<{self.sender}>{size}", *(f"RCPT TO:<{one}>" for one in self.to)]


def _tables() -> dict[str, list[dict[str, str]]]:
    found: dict[str, list[dict[str, str]]] = {}
    head: list[str] = []
    rows: list[dict[str, str]] = []
    for line in Path(__file__).with_name("matrix.md").read_text("utf-8").splitlines():
        if line.startswith("## "):
            rows = found.setdefault(line[3:], [])
            head = []
        elif line.startswith("|---"):
            continue
        elif line.startswith("|"):
            cells = [cell.strip() for cell in line[1:-1].split("|")]
            if head:
                rows.append(dict(zip(head, cells, strict=True)))
            head = head or cells
    return found


def _octets(cell: str) -> bytes:
    """A cell in backticks as it goes over the wire, CR LF added."""
    assert cell[0] + cell[-1] == "``", cell
    octets = cell[1:-1].encode("ascii")
    end = b"" if octets.endswith(b"{raw}") else b"\r\n"
    return (
        _EXPANSION.sub(
            lambda found: bytes.fromhex(found[1].decode()) if found[1] else int(found[2]) * found[3],
            octets.removesuffix(b"{raw}"),
        )
        + end
    )


def _codes(cell: str) -> tuple[int, ...]:
    return tuple(map(int, cell.split("/")))


def _to(cell: str) -> tuple[str, ...]:
    times, star, address = cell.partition("*")
    return (address,) * int(times) if star else tuple(cell.split(" "))


_TABLES: Final = _tables()

ORDER: Final = tuple(
    Row(f"{row['sent']} in state {state}"[:100], "mx", state, _octets(row["sent"]), _codes(row[state]), row["section"])
    for row in _TABLES["Order"]
    for state in STATES
    if row[state] != "-"
)
FORM: Final = tuple(
    Row(row["name"], "mx", row["state"], _octets(row["sent"]), _codes(row["reply"]), row["section"])
    for row in _TABLES["Form and size"]
)
LISTENERS: Final = tuple(
    Row(row["name"], row["listener"], row["state"], _octets(row["sent"]), _codes(row["reply"]), row["section"])
    for row in _TABLES["Listeners"]
)
VERDICTS: Final = tuple(
    Verdict(
        row["name"],
        *_OF_A_SITE.get(row["listener"], ("usual", row["listener"])),
        row["client"],
        row["helo"],
        row["from"],
        _to(row["to"]),
        int(row["size"] or 0),
        row["tls"] == "yes",
        _codes(row["reply"]),
        row["section"],
    )
    for row in _TABLES["Verdicts"]
)
