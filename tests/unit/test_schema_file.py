"""The schema for editors says what the loader says, and the examples are configurations."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import pytest
from jsonschema import Draft202012Validator

from relay.cli.schema import json_schema
from relay.config.load import load
from relay.config.origin import ConfigErrors

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "config" / "examples").glob("*.toml"))
VALIDATOR = Draft202012Validator(json_schema())


def test_the_schema_in_the_tree_is_the_one_that_the_command_prints() -> None:
    kept = json.loads((ROOT / "config" / "relay.schema.json").read_text())
    assert kept == json_schema(), "run: relay schema > config/relay.schema.json"
    Draft202012Validator.check_schema(kept)


@pytest.mark.parametrize("path", [ROOT / "config" / "relay.toml", *EXAMPLES], ids=lambda path: path.name)
def test_what_is_shipped_loads_and_fits_the_schema(path: Path) -> None:
    load(path, {})
    assert [error.message for error in VALIDATOR.iter_errors(tomllib.loads(path.read_text()))] == []


@pytest.mark.parametrize("name", ["misspelt", "wrong_types", "unknown_choices", "out_of_range"])
def test_what_the_loader_refuses_for_its_form_an_editor_marks_too(name: str) -> None:
    path = ROOT / "tests" / "bad_configs" / f"{name}.toml"
    with pytest.raises(ConfigErrors):
        load(path, {})
    assert list(VALIDATOR.iter_errors(tomllib.loads(path.read_text())))


def test_three_situations_have_an_example() -> None:
    assert len(EXAMPLES) >= 3
