"""An export runs the code that it was judged with: another is refused, or said."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from search.export.loader import load, ran
from search.storage.seal import SEAL, opened, seal
from spaces.exceptions import InputError

pytestmark = pytest.mark.slow


def edited(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text, old
    path.write_text(text.replace(old, new, 1))


def loaded(code: Path, export: Path, more: str = "") -> subprocess.CompletedProcess[str]:
    """Load an export by the code of a folder, in a process of its own."""
    script = f"from search import load; print(repr(load({str(export)!r}{more}).changed))"
    return subprocess.run([sys.executable, "-c", script], cwd=code, capture_output=True, text=True)


def launched(code: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "launch.py", *words], cwd=code, capture_output=True, text=True)


SIGN = "return classifier(self.purify(x_NCHW))", "return -classifier(self.purify(x_NCHW))"


@pytest.mark.parametrize(
    ("path", "old", "new"),
    [
        ("defenses/magnet.py", "NEVER = 1e6", "NEVER = 2e6"),
        ("defenses/base.py", *SIGN),
        ("search/classifiers/architectures.py", "nn.ReLU()", "nn.Sigmoid()"),
        ("attacks/gradient_view.py", "BATCH = 256", "BATCH = 255"),
        ("spaces/space.py", "import numpy", "LIMIT = 1\nimport numpy"),
    ],
)
def test_another_code_than_judged_is_refused_with_the_name_of_its_module(
    small: Path, code: Path, path: str, old: str, new: str
) -> None:
    edited(code / path, old, new)
    module = path.removesuffix(".py").replace("/", ".")
    done = loaded(code, small)
    assert done.returncode == 1
    said = f"an export must run the code that it was judged with, but {small} was judged with another {module}: take"
    last = done.stderr.splitlines()[-1]
    assert said in last and "export it anew, or go on with changed=True (--changed)" in last
    done = loaded(code, small, ", changed=True")
    assert done.stdout == f"'was judged with another {module}'\n"
    assert done.stderr == f"{small} was judged with another {module}: it is no longer what was judged\n"


def test_a_reworded_comment_and_a_moved_file_change_nothing(small: Path, code: Path) -> None:
    edited(code / "defenses/base.py", "The contract of a defense", "What a defense must do")
    (code / "attacks/gradient_view.py").rename(code / "attacks/view.py")
    for path in code.glob("*/**/*.py"):
        path.write_text(path.read_text().replace("attacks.gradient_view", "attacks.view"))
    assert loaded(code, small).stdout == "''\n"


@pytest.mark.parametrize("defense", ["hgd", "defense_vae"])
def test_an_attack_that_only_a_training_needs_is_no_part_of_a_model(defense: str) -> None:
    modules = ran({"defense": defense})
    assert {f"defenses.{defense}", "defenses.base", "attacks.gradient_view", "spaces.space"} <= set(modules)
    assert not any(name.startswith(("attacks.catalog", "attacks.algorithms")) for name in modules)


def test_attack_and_final_refuse_too_and_say_so_where_they_go_on(small: Path, code: Path) -> None:
    edited(code / "defenses/base.py", *SIGN)
    copy = shutil.copytree(small, code / "runs" / small.name)
    for words in (("attack", str(copy), "--suite", "quick"), ("final", str(copy), "--debug")):
        done = launched(code, *words)
        assert done.returncode == 2
        assert f"{copy} was judged with another defenses.base: take that code" in done.stderr.replace("\n", " ")
    said = f"CHANGED** {small.name} was judged with another defenses.base: these figures are of the code as it is now"
    assert said in launched(code, "attack", str(copy), "--suite", "quick", "--images", "5", "--changed").stdout
    (table,) = (copy / "attacks").glob("*.json")
    assert json.loads(table.read_text())["changed"] == "was judged with another defenses.base"


def test_an_export_that_does_not_say_its_code_is_refused(small: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(small, tmp_path / "copy"))
    known = json.loads((copy / "evidence.json").read_text())
    del known["code"]["modules"]
    (copy / "evidence.json").write_text(json.dumps(known))
    (copy / SEAL).write_bytes(seal({name: (copy / name).read_bytes() for name in opened(small)}))
    with pytest.raises(InputError, match=re.escape(f"but {copy} does not say which code that is")):
        load(copy)
    assert load(copy, changed=True).changed
