"""Bad input is one clear line and exit code 2, before anything is attacked."""

from __future__ import annotations

from pathlib import Path

import pytest

from search.auditing import examination
from tests.search.cli.test_cli import said

HOW = "--norm Linf --eps 0.1"
DIGITS = "--weights net.pt --data digits.npz"
REFUSED = [
    ("net.py --data digits.npz", "a model must be FILE.py:FUNCTION, a function that returns an nn.Module, but is"),
    (". --data digits.npz", "but is '.'; an export is attacked by python launch.py attack"),
    ("nets.py:plain --data digits.npz", "but there is no nets.py"),
    ("net.py:plain --weights none.pt --data digits.npz", "but there is no none.pt"),
    ("net.py:plane --data digits.npz", "but is 'plane'; did you mean 'plain'?"),
    ("broken.py:build --data digits.npz", "broken.py must be a file that can be imported, but raises SyntaxError"),
    ("net.py:raises --data digits.npz", "when called without arguments, but raises OSError: no such checkpoint"),
    ("net.py:wants --data digits.npz", "when called without arguments, but raises TypeError"),
    ("net.py:a_number --data digits.npz", "must return an nn.Module, but returns a int"),
    ("net.py:plain --weights whole.pt --data digits.npz", "since a pickle may run code"),
    ("net.py:plain --weights net.py --data digits.npz", "weights must be safetensors, or a state dict"),
    ("net.py:plain --weights more.pt --data digits.npz", "it has more, which the network has not"),
    ("net.py:few_classes --weights net.pt --data digits.npz", "net.pt it lacks 1.weight"),
    ("net.py:softmax --data digits.npz", "a model must return logits, but returns probabilities"),
    ("net.py:infinite --data digits.npz", "a model must return finite logits, but some are NaN"),
    (
        "net.py:few_classes --data digits",
        "a model must return 10 logits, one for each class of the data, but returns 5",
    ),
    ("net.py:few_classes --data digits.npz", "labels must be classes of the model, 0 to 4, but go up to 9"),
    ("net.py:colour --data digits.npz", "must answer images 1 x 1 x 8 x 8, but logits raises RuntimeError"),
    ("net.py:large --data digits.npz", "a model must answer images 1 x 1 x 8 x 8, but logits raises RuntimeError"),
    ("net.py:silent --data digits.npz", "must have a forward pass, or purify and classify, but Silent has neither"),
    ("net.py:only_purifies --data digits.npz", "a model with purify must have classify too, but OnlyPurifies has none"),
    (f"net.py:bent {DIGITS}", "model(x) must be model.classify(model.purify(x)), but they differ"),
    (f"net.py:blind {DIGITS}", "a model must have a gradient, but Blind computes without one"),
    (f"net.py:counts {DIGITS}", "classify must have a gradient, as attacks go around purify by it, but Counts"),
    (f"net.py:shrinks {DIGITS}", "purify must return images 1 x 1 x 8 x 8, as it gets, but"),
    ("net.py:plain --data digit", "but is 'digit'; did you mean 'digits'?"),
    ("net.py:plain --data none.npz", "none.npz must be an .npz with arrays x and y"),
    ("net.py:plain --data unnamed.npz", "with arrays x and y, or x_test and y_test, but has images, labels"),
    ("net.py:plain --data bright.npz", "images must be uint8, or floats in [0, 1], N x C x H x W, N x H x W x C or N"),
    ("net.py:plain --data whole.npz", "but are torch.int64"),
    ("net.py:plain --data flat.npz", "but are 397 x 64"),
    ("net.py:plain --data apart.npz", "labels must be 397 integers, one for each image, but are 396"),
    ("net.py:plain --data soft.npz", "labels must be 397 integers, one for each image, but are 397 of torch.float32"),
    ("net.py:plain --data words.npz", "labels must be integers, one for each image, but are of NumPy's type <U"),
    (
        "net.py:plain --data renamed.npz",
        "renamed.npz must be an .npz with arrays x and y, or x_test and y_test, but is",
    ),
    ("net.py:plain --data torn.npz", "torn.npz must be an .npz with arrays x and y, or x_test and y_test, but cannot"),
    ("net.py:plain --data below.npz", "labels must be classes from 0 on, but one is -1"),
    ("net.py:plain --data beyond.npz", "labels must be classes of the model, 0 to 9, but go up to 10"),
    ("net.py:plain --data few.npz", "images must be from 32, as many as most checks ask about, to 20 of few.npz"),
    ("net.py:plain --data digits.npz --images 500", "to 397 of digits.npz, but is 500"),
    ("net.py:plain --data digits.npz --suite standart", "did you mean 'standard'?"),
    ("net.py:plain --data digits.npz --threat whitebox", "did you mean 'white-box'?"),
    ("net.py:plain --data digits.npz --threat black-box --substitute Q", "the substitute must be one of A, B"),
    ("net.py:plain --data digits.npz --out .", "the folder of an audit must be new, but . exists"),
    ("net.py:plain --data digits.npz --out none/there", "must lie in one that exists, but none does not"),
]


@pytest.fixture(autouse=True)
def _nothing_is_attacked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(examination, "audit_model", lambda *_, **__: pytest.fail("it was attacked"))


@pytest.mark.parametrize(("words", "told"), REFUSED, ids=[words for words, _ in REFUSED])
def test_bad_input_is_one_line_before_anything_is_attacked(words: str, told: str, at_home: Path) -> None:
    before = sorted(at_home.iterdir())
    heard = said("audit", *words.split(), *HOW.split())
    assert heard.code == 2 and heard.out == "" and told in heard.err, heard
    assert heard.err.startswith("error: ") and heard.err.count("\n") == 1
    assert [path for path in sorted(at_home.iterdir()) if path.name != "__pycache__"] == [
        path for path in before if path.name != "__pycache__"
    ]


@pytest.mark.parametrize(
    ("how", "told"),
    [
        ("--norm Linf", "Missing option '--eps'"),
        ("--eps 0.1", "Missing option '--norm'"),
        ("--norm Linf --eps 0", "eps must be above 0, but is 0"),
        ("--norm Linf --eps -1", "eps must be from 0 to 1 in Linf"),
        (
            "--norm linf --eps 8",
            "in Linf, in pixel units of [0, 1], but is 8.0; did you mean 8/255?",
        ),
        ("--norm Linf --eps nan", "eps must be from 0 to 1 in Linf"),
        ("--norm Linf --eps 8/0", "eps must be a number or a fraction, but is '8/0'"),
        ("--norm L1 --eps 8/255", "the norm must be one of Linf, L2, but is 'L1'"),
        ("--norm L2 --eps 1 --suite quick --images 31", "images must be from 32"),
    ],
)
def test_a_threat_model_that_is_none_is_refused(how: str, told: str, at_home: Path) -> None:
    heard = said("audit", "net.py:plain", "--data", "digits.npz", *how.split())
    assert heard.code == 2 and told in heard.err, heard
