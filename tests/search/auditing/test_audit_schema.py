"""docs/audit.schema.json says what evidence.json of an audited model holds: all of it, and nothing else."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from jsonschema import Draft202012Validator, ValidationError
from referencing import Registry, Resource

import search
from attacks.threat import ThreatModel
from tests.search.auditing.conftest import Heard
from tests.search.export.test_evidence_schema import SCHEMA as EXPORTS
from tests.search.export.test_evidence_schema import described
from tests.support.paths import ROOT

SCHEMA: dict[str, Any] = json.loads((ROOT / "docs" / "audit.schema.json").read_text())
BESIDE = Registry().with_resource("evidence.schema.json", Resource.from_contents(EXPORTS))
VALIDATOR = Draft202012Validator(SCHEMA, registry=BESIDE)


def test_the_schema_is_valid_and_every_field_is_described_here_or_in_that_of_exports() -> None:
    Draft202012Validator.check_schema(SCHEMA)
    here = {at for at, told in described(SCHEMA) if told}
    elsewhere = {f"/{name}" for name, field in SCHEMA["properties"].items() if "$ref" in field}
    assert {at for at, _ in described(SCHEMA)} == here | elsewhere
    for name in elsewhere:
        assert SCHEMA["properties"][name[1:]] == {"$ref": f"evidence.schema.json#/properties/{name[1:]}"}


@pytest.mark.parametrize("function", ["plain", "rounding", "guided", "noisy", "detecting"])
def test_the_evidence_of_a_model_is_as_the_schema_says(function: str, heard: Callable[[str], Heard]) -> None:
    _, evidence, _ = heard(function)
    VALIDATOR.validate(evidence)
    for name in SCHEMA["required"]:
        with pytest.raises(ValidationError):
            VALIDATOR.validate({key: value for key, value in evidence.items() if key != name})
    for more in ({"surprise": 1}, {"clean_accuracy": 61.0}, {"gates": [evidence["gates"][0] | {"images": -1}]}):
        with pytest.raises(ValidationError):
            VALIDATOR.validate(evidence | more)


def test_so_is_that_of_a_module_given_in_python(digits: Any, classifier: Any) -> None:
    report = search.audit(
        classifier, *(part[:32] for part in digits), ThreatModel("L2", 1.0, "oblivious"), suite="advae"
    )
    VALIDATOR.validate(json.loads(json.dumps(report.evidence)))
