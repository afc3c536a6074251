"""Values at the edges for any flag of a command and any field of a study, most of which are none of its values."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import Any, get_args
from zlib import crc32

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

import defenses
from attacks.suites import SUITES
from search.classifiers.task import TASKS
from search.study.fields import Fields
from spaces.space import SearchSpace

MEGABYTE = "é" * 2**19
NUMBERS = (
    *("nan", "-nan", "inf", "-inf", "1e400", "-1e400", "-0", "-0.0", "0", "1", "2", "-1", "0.5", "1.5", "5e-324"),
    *("1e-320", "1e308", str(2**31), str(2**32), str(2**63), str(2**64), "9" * 30, "-" + "9" * 30, "9" * 5000),
    *("0x10", "1_000", "１２", "٣", "½", "1,5", "8/255", "255/8", "-8/255", "1/0", "nan/1", "9" * 400 + "/1", "1/3/5"),
    *(" 5 ", "5\n", "+5", "5.", ".5", "5e", "true", "null", "None"),
)
TEXTS = (
    *(
        "",
        " ",
        "\n",
        "\t",
        "\r\n",
        "\0",
        "a\0b",
        "é",
        "日本語",
        "🙂",
        "e\u0301",
        "\u202etxt",
        "\ufeffx",
        "\x1b[31mred",
        "\x7f",
    ),
    *("\ud800", "\udcff", "a\udc80b", "a" * 256, "a" * 5000, "a/" * 3000, "a," * 3000, "-", "--", "-x", "--help", "="),
    *(
        "=1",
        "a=",
        "a=b=c",
        "%s%n",
        "{0}",
        "{}",
        "[red]x[/red]",
        "[/]",
        "$HOME",
        "`id`",
        "'",
        '"',
        "\\",
        "\\x",
        "*",
        "?",
    ),
    *(
        "a:b",
        ":",
        "a:",
        ":0",
        "localhost:",
        "localhost:0",
        "localhost:99999",
        "127.0.0.1:1",
        "[::1]:1",
        "a b:1",
        "auto",
    ),
    *("1..2", "..", "1..", "..2", "2..1", "1..2:log", "0..1:log", "1..2:lin", "nan..inf", "1..2..3", "true,false"),
    *(
        "s3://x/y",
        "://",
        "x://y",
        "file://",
        "file:///proc/none",
        "memory://x",
        "http://127.0.0.1:9/x",
        "simplecache::x",
    ),
    *(
        "s3://user:secret@x/y",
        "local",
        "CON",
        "(",
        "(?P<",
        "a{99999}",
        "(a+)+$",
        "0x",
        "8x",
        "8x8x8",
        "8×8",
        "9999x9999",
    ),
)
PATHS = (
    *(
        ".",
        "..",
        "../up",
        "~",
        "~nosuchuser",
        "~nosuchuser/x",
        "none",
        "none/x",
        "file",
        "file/x",
        "study.yaml",
        "net.py:net",
    ),
    *("net.py", "net.py:", ":net", "net.py:none", "study.yaml:net", "broken.py:net", "net.pt", "pictures", "runs"),
    *(
        "runs/first",
        "runs/export",
        "loop",
        "/dev/null",
        "/dev/full",
        "/proc/none/x",
        "/proc/self/mem",
        "first",
        "leaves",
    ),
    *("leaves/mine", "digits", "x.npz", "puvae/3", "quick"),
)
DOCUMENTS = (
    *(".nan", ".inf", "-.Inf", "1e400", "0o17", "0x1F", "1_000", "12:30:45", "2001-01-01", "2001-12-14t21:59:43.10Z"),
    *("!!binary aGk=", "!!set {a, b}", "!!omap [a: 1]", "!!float x", "!!int ''", "!!timestamp x", "!!bool x", "!x y"),
    *(
        "!!python/object/apply:os.system [x]",
        "&a [*a]",
        "&a {a: *a}",
        "*none",
        "|\n  text",
        "? a",
        "[1, 2",
        "{a: 1",
        "'",
    ),
    *("[" * 3000, "{a: " * 3000, "[[1, 2], [3]]", "{a: {b: {c: 1}}}", "{1: 2}", "{null: 1}", "{[1]: 2}", "{a: null}"),
    *("[]", "{}", "[null]", "~", "true", "yes", "no", "- a", "a: b", "<<: {a: 1}", "@", "`", "%", "\t1", "\0", "\x07"),
    *(
        '"\\ud800"',
        '"\\0"',
        '"\\x1b"',
        "9" * 5000,
        "-" + "9" * 30,
        "{lambda_rc: {min: 1, max: 2}}",
        "{lambda_rc: [[1]]}",
    ),
    *(
        "{lambda_rc: []}",
        "{lambda_rc: .nan}",
        "{lambda_rc: 1e400}",
        "{lambda_rc: true}",
        "{'': 1}",
        "{lambda_rc: '..'}",
    ),
    *("{conv_maps: 9999999999999999999999}", "{conv_maps: 1.0}", "{conv_maps: [4, 4, 4.0]}", "{conv_maps: 1..9:log}"),
)
"""Values of a field as they stand in a YAML file, most of them no value of any."""


def legal() -> list[str]:
    """Return words that are legal somewhere: what the fields, defenses, tasks, suites and knobs are called."""
    kinds = [kind for field in Fields.model_fields.values() for kind in (field.annotation, *get_args(field.annotation))]
    words = [word for kind in kinds for word in get_args(kind) if isinstance(word, str)]
    knobs = [f"{name}=" for one in defenses.names() for name in SearchSpace.of(defenses.find(one)).flat()]
    return [*dict.fromkeys([*words, *defenses.names(), *TASKS, *SUITES, *Fields.model_fields, *knobs])]


def words(longest: int = 100_000) -> st.SearchStrategy[str]:
    """Return values of a flag as a shell may hand them over, of at most so many characters (a shell's limit)."""
    listed = [word for word in (*NUMBERS, *TEXTS, *PATHS, *legal(), MEGABYTE) if len(word) <= longest]
    numbers = st.one_of(st.integers(), st.floats()).map(str)
    knobs = [word for word in legal() if word.endswith("=")]
    settings = st.tuples(st.sampled_from(knobs), st.sampled_from([*NUMBERS, *TEXTS])).map("".join)
    return st.one_of(st.sampled_from(listed), st.sampled_from(listed), numbers, st.text(max_size=40), settings)


def documents() -> st.SearchStrategy[str]:
    """Return values of a field as YAML has them."""
    plain = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), words(2**20))
    nested = st.recursive(
        plain, lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(words(), inner, max_size=3))
    )
    return st.one_of(st.sampled_from(DOCUMENTS), st.sampled_from(DOCUMENTS), nested.map(json.dumps), words(2**20))


def tried(what: str, strategy: st.SearchStrategy[Any], check: Callable[[Any], None], count: int = 2) -> None:
    """Check drawn values: the same ones each time, others for each `what`.

    $CRUCIBLE_INPUTS is how many for each, in place of `count`; another $CRUCIBLE_SEED draws others.
    """
    count = int(os.environ.get("CRUCIBLE_INPUTS", count))
    start = crc32(what.encode()) + int(os.environ.get("CRUCIBLE_SEED", 0))
    how: dict[str, Any] = {"database": None, "deadline": None, "suppress_health_check": list(HealthCheck)}
    phases = [Phase.generate, *([Phase.shrink] if count > 9 else [])]
    seed(start)(settings(max_examples=count, phases=phases, **how)(given(strategy)(check)))()
