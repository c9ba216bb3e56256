"""Alert rules and dashboard ask for metrics that exist, by labels that these have; each alert comes when it should."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from relay.telemetry import catalogue

DEPLOY = Path(__file__).parents[2] / "deploy"
RULES = DEPLOY / "prometheus/dmz-relay.rules.yaml"
CASES = DEPLOY / "prometheus/dmz-relay.test.yaml"
BOARD = DEPLOY / "grafana/dmz-relay.json"

FAMILIES = {family.scraped: family for family in (*catalogue.MEMBERS, *catalogue.SCRAPED)}
SCRAPERS_LABELS = {"instance", "job"}
"""What Prometheus adds itself."""


def alerts() -> dict[str, str]:
    """The expression of each alert."""
    return dict(re.findall(r"- alert: (\w+)\n\s+expr: (.+)\n", RULES.read_text()))


def panels() -> dict[str, str]:
    """The expressions of each panel."""
    board = json.loads(BOARD.read_text())
    return {panel["title"]: "\n".join(target["expr"] for target in panel["targets"]) for panel in board["panels"]}


def asked(expression: str) -> Iterator[tuple[str, set[str]]]:
    """Each metric of ours in an expression and the labels in its braces."""
    for name, braces in re.findall(r"\b(relay_\w+)(\{[^}]*\})?", expression):
        yield name, set(re.findall(r"(\w+)=", braces))


@pytest.mark.parametrize(("where", "expression"), [*alerts().items(), *panels().items()])
def test_what_is_asked_for_exists(where: str, expression: str) -> None:
    found = list(asked(expression))
    assert found or "up{" in expression, where
    labels: set[str] = set(SCRAPERS_LABELS)
    for name, given in found:
        bucket = name.removesuffix("_bucket")
        family = FAMILIES[bucket if bucket != name and FAMILIES[bucket].type == "histogram" else name]
        own = {*family.labels, *SCRAPERS_LABELS, *(["le"] if family.type == "histogram" else [])}
        assert given <= own, where
        labels |= own
    for words in re.findall(r"\b(?:by|on) \(([^)]*)\)", expression):
        assert set(words.split(", ")) <= labels, where


def test_the_dashboard_explains_itself_and_no_panel_lies_on_another() -> None:
    board = json.loads(BOARD.read_text())
    taken: set[tuple[int, int]] = set()
    for panel in board["panels"]:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & taken, panel["title"]
        assert at["x"] + at["w"] <= 24
        taken |= cells
    assert {variable["name"] for variable in board["templating"]["list"]} == {"source", "instance"}


def test_each_alert_says_how_bad_it_is_and_has_a_case_that_makes_it() -> None:
    names = set(alerts())
    assert len(names) == RULES.read_text().count("- alert:")
    cases = CASES.read_text()
    assert names == set(re.findall(r"alertname: (\w+)\n\s+exp_alerts:\n\s+- exp_labels: \{severity: \"\w+\"", cases))
    assert names == set(re.findall(r"alertname: (\w+), exp_alerts: \[\]", cases))
    documented = set(re.findall(r"^\| `(Relay\w+)` \|", (DEPLOY.parent / "docs/metrics.md").read_text(), re.MULTILINE))
    assert names == documented


@pytest.mark.needs("promtool")
def test_prometheus_understands_the_rules_and_each_alert_comes_when_it_should_and_not_on_an_ordinary_day() -> None:
    for command in (["check", "rules", RULES], ["test", "rules", CASES]):
        done = subprocess.run(
            ["promtool", *map(str, command)], capture_output=True, text=True, check=False, timeout=120
        )
        assert done.returncode == 0, done.stdout + done.stderr
