"""What the pages take for granted: a user's data `leaves` with a classifier `mine`."""

from __future__ import annotations

from pathlib import Path

import pytest

from search.classifiers import adding
from tests.support import own


@pytest.fixture(scope="session")
def leaves(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder with the task leaves/mine."""
    folder = tmp_path_factory.mktemp("leaves")
    own.data_with_classifier(folder, folder / "data")
    adding.add("mine", f"{folder}/net.py:net", "leaves", weights=folder / "net.pt", data_dir=str(folder / "data"))
    return folder / "data"
