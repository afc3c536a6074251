"""A search whose workers pretend."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from search.engine import run
from tests.support.engine import Pretence

Working = Callable[[Pretence], None]


@pytest.fixture
def working(monkeypatch: pytest.MonkeyPatch) -> Working:
    """Let workers pretend, so that nothing is trained."""
    defaults = run.run.__kwdefaults__ or {}
    return lambda pretence: monkeypatch.setitem(defaults, "work", pretence.work())
