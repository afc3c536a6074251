"""Runs `another_device.py` in a process of its own: torch learns of a device only before autograd has run."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.support.paths import ROOT


@pytest.mark.slow
def test_all_works_on_another_device() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "tests/end_to_end/another_device.py"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:]
