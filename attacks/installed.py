"""Where Python's library and installed packages lie: code that is neither ours nor of who is judged."""

from __future__ import annotations

import os
import sys
import sysconfig
from pathlib import Path

PATHS = sysconfig.get_paths()
LIBRARY = tuple({f"{PATHS[name]}{os.sep}" for name in ("stdlib", "platstdlib")})
_USED = {entry for entry in sys.path if entry and next(Path(entry).glob("*.dist-info"), None) is not None}
PACKAGES = tuple(f"{Path(folder)}{os.sep}" for folder in {PATHS["purelib"], PATHS["platlib"]} | _USED)
"""All folders from which packages are imported: those of another environment below this one or of the user, too."""
