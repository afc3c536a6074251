"""The script for a GPU runs on the CPU, small, and writes one JSON with every part."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks import gpu
from search.trial import latency


@pytest.mark.slow
def test_it_writes_every_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "gpu.json"
    monkeypatch.setattr(latency, "PATIENCE_S", 1.0)
    monkeypatch.setattr(sys, "argv", ["gpu", "--out", str(out), "--small"])
    gpu.main()
    found = json.loads(out.read_text())
    assert found["agreement"] == {"clean": 1.0, "attacked": 1.0} and min(found["attacks"].values()) > 0
    assert [row["defense"] for row in found["trainings"]] == ["puvae", "advae", "gmvae", "defense_vae"]
    for row in found["trainings"]:
        assert row["faster"] > 0 and min(row["epoch_s"].values()) > 0
    assert [(row["neighbours"], row["device_lock"]) for row in found["latency"]] == [(0, True), (1, False), (1, True)]
