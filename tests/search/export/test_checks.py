"""What is said of the gates names what was checked, what was not, and the smallest fault that they can see."""

from __future__ import annotations

from dataclasses import asdict

from attacks.audit.gate import at_most
from search.export.checks import UNSEEN, checks, spoken

GATES = [
    at_most(4, "square", "", 0.0, 0.05, 64),
    at_most(1, "named", "", 0.0, 0.0),
    at_most(5, "convergence", "", 0.2, 0.05, 32),
    at_most(3, "gradient", "", 0.0, 0.1, 8),
    at_most(99, "brand-new", "", 0.0, 0.1, 500),
]


def test_what_is_said_of_gates_names_their_areas_images_and_smallest_fault() -> None:
    found = checks([asdict(gate) for gate in GATES])
    assert (found["passed"], found["gates"], found["images"]) == (4, 5, [8, 500])
    assert found["checked"] == ["budgets", "gradients", "weaker attacks", "convergence", "brand-new"]
    assert (found["seen_by_one"], found["seen_by_all"]) == (2 / 32, 4 / 64)  # 5 % of 32 is 1.6 images, of 64 3.2
    first, on, second = spoken(found).splitlines()
    assert first == "4 of 5 measurement checks passed"
    assert on == "checked on 8 to 500 images: a fault on fewer than 6.2 % of them is not seen"
    assert second.startswith("checked: budgets, gradients, weaker attacks, convergence, brand-new; not checked: ")
    assert all(words in second for words in UNSEEN)


def test_a_gate_that_sees_less_than_another_is_said() -> None:
    gates = [asdict(at_most(4, name, "", 0.0, 0.05, n)) for name, n in (("noise", 200), ("transfer", 10))]
    assert "fewer than 5.5 % of them is not seen, on fewer than 10.0 % not by every check" in spoken(checks(gates))
    alone = spoken(checks([asdict(at_most(3, "gradient", "", 0.0, 0.1, 32))])).splitlines()
    assert alone[:2] == [
        "All 1 measurement checks passed: the figure can be believed, whatever it is",
        "checked on 32 images",
    ]
