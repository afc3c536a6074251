"""A short form of `benchmarks/partitions.py`: one search on three machines, of which one is cut off for a while."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.machines import lacking
from benchmarks.partitions import cluster, ordeal

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3000), pytest.mark.skipif(bool(lacking()), reason=lacking())]


def test_a_search_outlives_a_machine_that_is_cut_off_for_twenty_seconds(tmp_path: Path) -> None:
    with cluster() as at:
        told = ordeal(at, tmp_path, "cut-20s", 4)
    assert told["started again"] == 0, told  # nor is its trial held up: the connections of its worker outlive the cut
