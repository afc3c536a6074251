"""Fingerprints of code: a rewording retrains nothing, a changed constant or statement does."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from search.storage.fingerprint import _digest, code_digests, fingerprint

BASE = '''
    """A defense."""
    from __future__ import annotations
    import math
    from dataclasses import dataclass
    from math import floor as down
    import attacks.threat
    from attacks.threat import ThreatModel

    RATE = 0.1
    """Of Adam."""

    @dataclass
    class Knobs:
        """Its knobs."""
        width: int = 8

    def scaled(x: float, by: float = 2.0) -> float:
        """Return x scaled."""
        # Twice, since once is not enough.
        whole: float = down(x) * math.pi
        return whole * by * RATE

    def bound() -> ThreatModel:
        return attacks.threat.ThreatModel("Linf", 0.3, "white-box")
'''
Written = Callable[..., list[str]]


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Written]:
    """Return what writes a module with replacements in its text, and returns its digests."""
    monkeypatch.syspath_prepend(str(tmp_path))
    modules: list[str] = []

    def write(*replacements: tuple[str, str], name: str = "drawn") -> list[str]:
        text = textwrap.dedent(BASE)
        for old, new in replacements:
            assert old in text, old
            text = text.replace(old, new)
        module = f"{name}_{len(modules)}"
        (tmp_path / f"{module}.py").write_text(text)
        modules.append(module)
        return code_digests(module)

    _digest.cache_clear()
    yield write
    _digest.cache_clear()
    for module in modules:
        sys.modules.pop(module, None)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("A defense.", "A very good defense."),
        ("Twice, since once is not enough.", "Because."),
        ('"""Return x scaled."""', ""),
        ('"""Of Adam."""', '"""Of SGD."""'),
        ('"""Its knobs."""', ""),
        ("x: float, by: float = 2.0", "x, by = 2.0"),
        ("-> ThreatModel", "-> object"),
        ("whole: float = down", "whole = down"),
        ("import math\n", "import math\nimport os\n"),
        ("import math\nfrom dataclasses import dataclass\n", "from dataclasses import dataclass\nimport math\n"),
        ("import math\nfrom dataclasses", "import math as m\nimport math\nfrom dataclasses"),
        ("    return whole * by * RATE", "    return (\n        whole\n        * by\n        * RATE\n    )"),
        ("attacks.threat.ThreatModel(", "ThreatModel("),
        ("import attacks.threat\n", "from attacks import threat\n"),
    ],
)
def test_what_does_not_act_leaves_a_digest_as_it_is(written: Written, old: str, new: str) -> None:
    also = [("attacks.threat.ThreatModel(", "threat.ThreatModel(")] if "import threat" in new else []
    assert written((old, new), *also) == written()


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("RATE = 0.1", "RATE = 0.2"),
        ("whole * by * RATE", "whole * by + RATE"),
        ("by: float = 2.0", "by: float = 3.0"),
        ("width: int = 8", "width: int = 16"),
        ("width: int", "width: float"),  # a dataclass is made of its annotations
        ("from math import floor as down", "from math import ceil as down"),
        ("def scaled", "def scaled_anew"),
        ('"Linf", 0.3', '"L2", 0.3'),
        ("@dataclass\n", "@dataclass(frozen=True)\n"),
    ],
)
def test_what_acts_alters_it(written: Written, old: str, new: str) -> None:
    assert written((old, new)) != written()


def test_a_file_that_was_moved_keeps_its_digest(written: Written) -> None:
    assert written() == written(name="elsewhere")


def test_what_a_module_imports_of_ours_counts(written: Written) -> None:
    without = written(
        ("import attacks.threat\nfrom attacks.threat import ThreatModel\n", ""),
        ("attacks.threat.ThreatModel(", "ThreatModel("),
    )
    threat = code_digests("attacks.threat")
    assert set(threat) <= set(written()) and not set(threat) & set(without)


def test_a_fingerprint_changes_with_each_part_and_not_with_their_order() -> None:
    assert fingerprint(a=1, b=[2]) == fingerprint(b=[2], a=1)
    assert len({fingerprint(a=1, b=[2]), fingerprint(a=2, b=[2]), fingerprint(a=1, b=[3])}) == 3
