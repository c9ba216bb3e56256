"""The pages for newcomers: what they show is valid, what they name is there."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from relay.config.load import load

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
LINK = re.compile(r"\]\((?!https?:|#)([^)#]+)(?:#[^)]*)?\)")


def block(page: str, opening: str, closing: str) -> str:
    text = (ROOT / page).read_text(encoding="utf-8")
    found = re.search(rf"^{re.escape(opening)}\n(.*?)^{re.escape(closing)}$", text, re.MULTILINE | re.DOTALL)
    assert found, f"{page} has no {opening}"
    return found[1]


@pytest.mark.parametrize(
    ("page", "opening", "closing"),
    [("README.md", "```toml", "```"), ("docs/quickstart.md", "cat >/etc/dmz-relay/relay.toml <<'END'", "END")],
    ids=["README", "quickstart"],
)
def test_the_first_configuration_is_valid_as_it_stands(page: str, opening: str, closing: str, tmp_path: Path) -> None:
    file = tmp_path / "relay.toml"
    file.write_text(block(page, opening, closing))
    config = load(file, {})
    assert config.server.hostname == "mx.example.com"
    assert [listener.address for listener in config.listener] == ["0.0.0.0:25"]


def test_the_demo_s_configuration_sends_nothing_off_this_computer() -> None:
    config = tomllib.loads((ROOT / "config" / "demo.toml").read_text(encoding="utf-8"))
    hops = [hop for route in config["route"] for hop in route["next_hops"]]
    addresses = [*(listener["address"] for listener in config["listener"]), config["web"]["listen"]]
    assert all(hop.startswith("smtp:[127.0.0.1]:") for hop in hops)
    assert all(address.startswith("127.0.0.1:") for address in addresses)


def test_every_page_of_docs_is_on_the_map() -> None:
    named = {Path(link).name for link in LINK.findall((ROOT / "docs" / "index.md").read_text(encoding="utf-8"))}
    missing = {page.name for page in (ROOT / "docs").glob("*.md")} - named - {"index.md"}
    assert not missing, f"add to docs/index.md: {sorted(missing)}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page: Path) -> None:
    links = LINK.findall(page.read_text(encoding="utf-8"))
    assert [link for link in links if not (page.parent / link).exists()] == []
