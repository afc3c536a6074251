"""Builds a model anew in a new process, which answers images: `python -m search.auditing.answer HOW ASKED ANSWERED`.

Shapes: N images, C channels, H x W pixels.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from defenses.base import Defended, Shape
from search.auditing.protocol import wrapped
from search.auditing.source import Source
from search.data import guard
from search.export.answer import answer


def words(source: Source, data: str) -> tuple[str, str]:
    """Return this module and its first argument, which tell a new process what to build (`confirmed_by`)."""
    how: dict[str, Any] = {"file": source.file, "function": source.function, "weights": source.weights}
    how |= {"data": Path(data).resolve(), "folder": Path.cwd()}
    return __name__, json.dumps({name: value and str(value) for name, value in how.items()})


def main(how: str, asked: Path, answered: Path) -> None:
    """Answer the images of a file by a model that is built anew, as `search.export.answer.answer` does."""
    known = json.loads(how)
    source = Source(Path(known["file"]), known["function"], known["weights"] and Path(known["weights"]))
    guard.watch(Path(known["data"]))
    os.chdir(known["folder"])  # the function may open files by names that are relative to it

    def build(_: Mapping[str, Any]) -> Defended:
        return wrapped(source.build(), Shape(0, 0, 0, 0), noisy=False, exact=False)  # answers depend on none of these

    answer(build, asked, answered)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
