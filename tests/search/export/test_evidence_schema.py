"""docs/evidence.schema.json says what evidence.json holds: all of it, and nothing else."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator, ValidationError

from tests.support.paths import ROOT

SCHEMA: dict[str, Any] = json.loads((ROOT / "docs" / "evidence.schema.json").read_text())


def described(schema: dict[str, Any], at: str = "") -> Iterator[tuple[str, bool]]:
    """Yield each field of a schema with whether it has a description."""
    for name, field in (*schema.get("properties", {}).items(), *schema.get("$defs", {}).items()):
        yield f"{at}/{name}", bool(field.get("description"))
        yield from described(field, f"{at}/{name}")


def test_the_schema_is_valid_and_describes_every_field() -> None:
    Draft202012Validator.check_schema(SCHEMA)
    assert [at for at, told in described(SCHEMA) if not told] == []


@pytest.mark.slow
def test_the_evidence_of_an_export_is_as_the_schema_says(small: Path) -> None:
    evidence = json.loads((small / "evidence.json").read_text())
    validator = Draft202012Validator(SCHEMA)
    validator.validate(evidence)
    assert any(gate["images"] for gate in evidence["gates"])
    for name in SCHEMA["required"]:
        with pytest.raises(ValidationError):
            validator.validate({key: value for key, value in evidence.items() if key != name})
    for more in ({"surprise": 1}, {"clean_accuracy": 61.0}, {"gates": [evidence["gates"][0] | {"images": -1}]}):
        with pytest.raises(ValidationError):
            validator.validate(evidence | more)
