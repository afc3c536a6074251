"""`launch.py final` with suites of two attacks, a baseline of two epochs and a black-box attacker of one round.

python short_final.py final EXPORT
"""

from __future__ import annotations

import sys
from functools import partial, update_wrapper
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import attacks.black_box
import launch
from attacks.catalog import FGSM, PGD_5
from attacks.suites import SUITES, Suite
from search.final import retraining

if __name__ == "__main__":
    for name in ("full", "standard"):
        SUITES[name] = Suite(name=name, oblivious=(FGSM, PGD_5), white_box=(FGSM, PGD_5), draws=1)  # type: ignore[index]
    retraining.EPOCHS, retraining.UPDATES, retraining.WARM_UP = 2, 1, 0
    train = attacks.black_box.train_substitute
    attacks.black_box.train_substitute = update_wrapper(partial(train, rounds=1), train)
    sys.exit(launch.main())
