"""The command ``relay schema``: the configuration's JSON Schema, for editors. Owns nothing: pydantic makes it."""

from __future__ import annotations

import json
from typing import Any

from relay.config.schema import Config

DIALECT = "https://json-schema.org/draft/2020-12/schema"


def schema() -> None:
    """Print the JSON Schema of the configuration, for editors that complete and check TOML."""
    print(json.dumps(json_schema(), indent=2))


def json_schema() -> dict[str, Any]:
    """What a configuration may hold, by the models that load it. What one key means for another is for `relay check`."""
    return {"$schema": DIALECT, **Config.model_json_schema()}
