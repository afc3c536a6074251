"""A user's own data: real digits as a folder of pictures, an .npz and two .npy, added and used like any data set."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from search.classifiers.task import find_task, tasks
from search.data import adding, cache, splits
from search.data.adding import Wishes
from search.data.guard import closed
from search.data.registry import data_set_names, find_data_set
from search.exceptions import TrialError
from search.study.loading import make_study
from spaces.exceptions import InputError
from tests.support import own


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data folder of the test's own."""
    monkeypatch.setenv("CRUCIBLE_DATA", str(tmp_path / "data"))
    return tmp_path / "data"


def npz(path: Path, **arrays: object) -> Path:
    np.savez(path, **arrays)  # type: ignore[arg-type]
    return path


def all_images(name: str) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    train, validation = (splits.load(name, split) for split in splits.SPLITS)
    return {"train": train, "validation": validation, "test": splits.open_test(name)}


@pytest.mark.parametrize(("mode", "channels"), [("L", 1), ("RGB", 3), ("P", 3), ("1", 1)])
def test_a_folder_of_pictures_becomes_a_data_set(data: Path, tmp_path: Path, mode: str, channels: int) -> None:
    found = adding.add("leaves", [own.folder_of(tmp_path / "pictures", mode=mode)])
    assert found.shape.channels == channels and found.classes == ("four", "one", "zero")
    parts = all_images("leaves")
    assert [len(y_N) for _, y_N in parts.values()] == [84, 18, 18] == list(splits.sizes("leaves"))
    for x_NCHW, y_N in parts.values():
        assert x_NCHW.shape[1:] == (channels, 8, 8) and 0 <= x_NCHW.min() and x_NCHW.max() <= 1
        assert y_N.bincount().tolist() == [len(y_N) / 3] * 3
        assert y_N[:6].bincount().min() >= 1  # any first images have every class
    assert "leaves" in data_set_names() and "leaves/A" in tasks()
    assert splits.check("leaves").state == "ready" and "(four, one, zero)" in splits.check("leaves").detail


def test_pictures_are_kept_pixel_for_pixel_with_their_labels(data: Path, tmp_path: Path) -> None:
    x_NHW, y_N = own.digits(40)
    adding.add("leaves", [own.folder_of(tmp_path / "pictures")])
    classes = find_data_set("leaves").classes
    known = {x.tobytes(): own.NAMES[y] for x, y in zip(x_NHW, y_N, strict=True)}
    for x_NCHW, labels_N in all_images("leaves").values():
        for x, y in zip((x_NCHW * 255).round().byte().numpy(), labels_N.tolist(), strict=True):
            assert known[x.tobytes()] == classes[y]


def test_the_users_own_splits_are_kept_and_only_a_missing_one_is_drawn(data: Path, tmp_path: Path) -> None:
    adding.add("three", [own.folder_of(tmp_path / "three", parts=("train", "val", "test"))])
    adding.add("two", [own.folder_of(tmp_path / "two", parts=("train", "test"))])
    assert list(splits.sizes("three")) == [42, 39, 39] and find_data_set("three").split == "as its owner split it"
    assert list(splits.sizes("two")) == [51, 9, 60] and "validation drawn by class, 15%" in find_data_set("two").split


def test_a_split_is_that_of_its_seed(data: Path, tmp_path: Path) -> None:
    pictures = own.folder_of(tmp_path / "pictures")
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        adding.add(name, [pictures], Wishes(seed=seed))
    assert splits.checksum("a") == splits.checksum("b") != splits.checksum("c")


def test_a_group_of_names_stays_in_one_split(data: Path, tmp_path: Path) -> None:
    pictures = own.folder_of(tmp_path / "pictures", count=20, copies=4)
    adding.add("apart", [pictures])
    adding.add("together", [pictures], Wishes(group=r"[^/]+/d\d+_"))
    assert "of validation and test are in train too" in adding.repeated("apart")
    assert adding.repeated("together") == ""
    assert "the same match of" in find_data_set("together").split


def test_a_copy_of_a_validation_image_in_test_is_told_too(data: Path, tmp_path: Path) -> None:
    x_NHW, y_N = np.random.default_rng(0).integers(0, 256, (60, 8, 8), np.uint8), np.arange(60) % 2
    parts = {"train": slice(30), "validation": slice(30, 50), "test": slice(48, 60)}
    arrays = {f"{axis}_{part}": each[of] for part, of in parts.items() for axis, each in (("x", x_NHW), ("y", y_N))}
    adding.add("copied", [npz(tmp_path / "copied.npz", **arrays)])
    assert adding.repeated("copied").startswith(
        "warning: 2 of the images of test are in validation too, which flatters"
    )


@pytest.mark.parametrize("axes", ["NHW", "NCHW", "NHWC", "colour"])
@pytest.mark.parametrize("kind", [np.uint8, np.float32])
def test_arrays_of_every_layout_and_type_give_the_same_images(
    data: Path, tmp_path: Path, axes: str, kind: type
) -> None:
    x_NHW, y_N = own.digits(40)
    x = x_NHW if kind is np.uint8 else (x_NHW / 255).astype(kind)
    layout = {"NHW": x, "NCHW": x[:, None], "NHWC": x[..., None], "colour": np.stack([x] * 3, 1)}[axes]
    adding.add("plain", [npz(tmp_path / "plain.npz", x_train=x_NHW, y_train=y_N)])
    adding.add("other", [npz(tmp_path / "other.npz", x_train=layout, y_train=y_N[:, None])])
    images = splits.load("other", "train")[0]
    assert torch.equal(images[:, :1], splits.load("plain", "train")[0])
    assert images.shape[1] == (3 if axes == "colour" else 1)


def test_two_files_and_an_archive_with_a_test_split_work(data: Path, tmp_path: Path) -> None:
    x_NHW, y_N = own.digits(40)
    np.save(tmp_path / "x.npy", x_NHW)
    np.save(tmp_path / "y.npy", y_N)
    adding.add("pair", [tmp_path / "x.npy", tmp_path / "y.npy"])
    arrays = {"x_train": x_NHW, "y_train": y_N, "x_test": x_NHW[::4], "y_test": y_N[::4], "classes": own.NAMES}
    adding.add("archive", [npz(tmp_path / "both.npz", **arrays)])
    assert list(splits.sizes("pair")) == [84, 18, 18] and list(splits.sizes("archive")) == [102, 18, 30]
    assert find_data_set("archive").classes == own.NAMES and find_data_set("pair").classes == ("0", "1", "2")


@pytest.mark.parametrize(("size", "shape"), [("16", (16, 16)), ("12x10", (12, 10))])
def test_images_of_unlike_sizes_are_resized(data: Path, tmp_path: Path, size: str, shape: tuple[int, int]) -> None:
    pictures = own.folder_of(tmp_path / "pictures")
    Image.new("L", (30, 20)).save(pictures / "zero" / "large.png")
    adding.add("leaves", [pictures], Wishes(size=size))
    assert splits.load("leaves", "train")[0].shape[2:] == shape


def test_eps_and_licence_are_remembered_and_the_study_has_them(data: Path, tmp_path: Path) -> None:
    adding.add("leaves", [own.folder_of(tmp_path / "pictures")], Wishes(eps="4/255", licence="CC0"))
    assert find_data_set("leaves").licence == "CC0" and find_task("leaves/A").eps == 4 / 255
    study = make_study({"task": "leaves/A", "storage": str(tmp_path)})
    assert study.resolved.threat.eps == 4 / 255 and study.resolved.eval_images == 14


def test_a_data_folder_that_is_named_holds_its_own_data(data: Path, tmp_path: Path) -> None:
    adding.add("leaves", [own.folder_of(tmp_path / "pictures")], data_dir=tmp_path / "elsewhere")
    assert "leaves" not in data_set_names() and "leaves" in data_set_names(tmp_path / "elsewhere")
    study = make_study({"task": "leaves/A", "storage": str(tmp_path), "data_dir": str(tmp_path / "elsewhere")})
    assert study.resolved.task.shape.classes == 3
    with pytest.raises(InputError, match="must be one of mnist, .*digits, but is 'leaves'"):
        find_task("leaves/A")


def test_another_machine_adopts_the_data_and_refuses_others_of_the_name(data: Path, tmp_path: Path) -> None:
    pictures = own.folder_of(tmp_path / "pictures")
    adding.add("leaves", [pictures])
    packed, checksum = cache.pack("leaves", None), splits.checksum("leaves")
    cache.adopt("leaves", tmp_path / "node", lambda: packed, checksum)
    assert splits.sizes("leaves", tmp_path / "node") == splits.sizes("leaves")
    assert find_data_set("leaves", tmp_path / "node") == find_data_set("leaves")
    adding.add("leaves", [pictures], Wishes(seed=1), data_dir=tmp_path / "other")
    with pytest.raises(InputError, match="the data must be those of the search, leaves with the SHA-256"):
        cache.adopt("leaves", tmp_path / "other", lambda: packed, checksum)


def test_a_defense_can_open_neither_the_cache_nor_the_pictures(data: Path, tmp_path: Path) -> None:
    pictures = own.folder_of(tmp_path / "pictures")
    adding.add("leaves", [pictures])
    splits.load("leaves", "train")
    opened: list[Callable[[], object]] = [
        lambda: (pictures / "zero" / "d0_0.png").read_bytes(),
        lambda: splits.load("leaves", "validation"),
        lambda: (data / "decoded" / "leaves" / "x_test.npy").read_bytes(),
    ]
    for attempt in opened:
        with pytest.raises(TrialError, match="must not get at the data"), closed("trained"):
            attempt()


def test_removed_data_are_gone_and_may_be_added_again(data: Path, tmp_path: Path) -> None:
    pictures = own.folder_of(tmp_path / "pictures")
    adding.add("leaves", [pictures])
    adding.remove("leaves")
    assert "leaves" not in data_set_names() and (pictures / "zero").is_dir()
    adding.add("leaves", [pictures])
    assert splits.check("leaves").state == "ready"


def test_data_that_stay_are_not_called_removed(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A read-only file system, which its own superuser cannot change either."""
    adding.add("leaves", [own.folder_of(tmp_path / "pictures")])
    monkeypatch.setattr("search.data.adding.shutil.rmtree", lambda *_, **__: None)
    with pytest.raises(InputError, match=f"must lie where one may write, but {data / 'decoded' / 'leaves'} cannot"):
        adding.remove("leaves")


def test_damaged_data_say_how_to_add_them_again(data: Path, tmp_path: Path) -> None:
    pictures = own.folder_of(tmp_path / "pictures")
    adding.add("leaves", [pictures])
    file = data / "decoded" / "leaves" / "x_train.npy"
    file.write_bytes(file.read_bytes()[:-1])
    law = f"cut short or altered.*data remove leaves, then data add leaves {pictures}"
    assert splits.check("leaves").state == "altered"
    for ask in (lambda: splits.load("leaves", "train"), lambda: splits.fetch("leaves")):
        with pytest.raises(InputError, match=law):
            ask()


# What is refused, in one line each, with nothing left behind.


def broken(path: Path) -> Path:
    (own.folder_of(path) / "one" / "d3_0.png").write_bytes(b"no picture")
    return path


def cut(path: Path) -> Path:
    file = own.folder_of(path, side=40) / "one" / "d3_0.png"
    file.write_bytes(file.read_bytes()[:-60])
    return path


def unlike(path: Path) -> Path:
    Image.new("L", (9, 9)).save(own.folder_of(path) / "zero" / "x.png")
    return path


def deep(path: Path) -> Path:
    Image.new("I;16", (8, 8)).save(own.folder_of(path) / "zero" / "x.png")
    return path


def one_class(path: Path) -> Path:
    own.folder_of(path)
    for name in ("one", "four"):
        (path / name).rename(path.parent / f"{path.name}-{name}")
    return path


def missing(path: Path) -> Path:
    (own.folder_of(path, parts=("train", "test")) / "test" / "one").rename(path.parent / "gone")
    return path


def beside(path: Path) -> Path:
    (own.folder_of(path, parts=("train", "test")) / "others").mkdir()
    return path


def flat(path: Path) -> Path:
    path.mkdir()
    Image.new("L", (8, 8)).save(path / "x.png")
    return path


def two_of_one(path: Path) -> Path:
    for part in ("train", "val", "valid"):
        own.folder_of(path / part)
    return path


def torn(path: Path) -> Path:
    np.savez_compressed(path.with_suffix(".npz"), x_train=X, y_train=Y)
    whole = bytearray(path.with_suffix(".npz").read_bytes())
    whole[300:400] = bytes(100)
    path.with_suffix(".npz").write_bytes(whole)
    return path.with_suffix(".npz")


def renamed(path: Path) -> Path:
    np.save(path.with_suffix(".npy"), X)
    return path.with_suffix(".npy").rename(path.with_suffix(".npz"))


def few(path: Path) -> Path:
    return own.folder_of(path, count=2)


def arrays(**changes: object) -> Callable[[Path], Path]:
    x_NHW, y_N = own.digits(40)
    whole: dict[str, object] = {"x_train": x_NHW, "y_train": y_N, **changes}
    return lambda path: npz(path.with_suffix(".npz"), **{k: v for k, v in whole.items() if v is not None})


X, Y = own.digits(40)


@pytest.mark.parametrize(
    ("make", "law"),
    [
        (broken, "d3_0.png must be a picture, but its content is none$"),
        (cut, "d3_0.png must be a picture, but reading it fails"),
        (unlike, r"images must have one size, or be resized by --size, but .* has 8 x 8 pixels and .*x.png 9 x 9"),
        (deep, "an image must have 8 bits for each colour, but .*x.png is of Pillow's mode I;16"),
        (one_class, "there must be from 2 to 256 classes, but there are 1"),
        (missing, "every class must have an image in every split, but test has none of 'one'"),
        (beside, r"beside train/ there must be nothing but validation/ and test/, but .* has others"),
        (two_of_one, "beside train/ there must be nothing but validation/ and test/, but .*given has val, valid"),
        (arrays(x_val=X, x_valid=X, y_val=Y, y_valid=Y), "where you split them, but .* holds x_train, y_train, x_val,"),
        (torn, "given.npz must hold arrays of numbers, but reading it fails"),
        (renamed, "given.npz must be a whole NumPy file .*, but: its content is that of an .npy"),
        (flat, "must have a subfolder for each class"),
        (few, "a class must have at least 3 images, to have one in each split, but four has 2"),
        (lambda path: path, "does not exist"),
        (arrays(y_train=None), "an .npz must hold x_train and y_train"),
        (arrays(y_train=Y[:-1]), "labels must be 120 whole numbers, one for each image, but y_train is 119, int64"),
        (arrays(y_train=Y / 2), "labels must be 120 whole numbers"),
        (arrays(y_train=Y - 1), "labels must be from 0 to 1, for the 2 classes of train, but y_train has -1"),
        (arrays(x_test=X[:9], y_test=np.full(9, 7)), "labels must be from 0 to 2, .* but y_test has 7"),
        (arrays(y_train=Y + 1), "and labels count from 0, but train has none of '0'"),
        (arrays(classes=["a", "b", "a"]), "the names of classes must differ, but 'a' is the name of 2"),
        (arrays(classes=["a", "b"]), "labels must be from 0 to 1, .* but y_train has 2"),
        (arrays(x_train=X.astype(np.int64)), "images must be uint8, or float in .*, but x_train of .* is int64"),
        (arrays(x_train=X.astype(np.float32)), "but x_train of .* goes from 0 to 255"),
        (arrays(x_train=np.where(X > 9, np.nan, 0.5)), "but x_train of .* goes from nan to nan"),
        (arrays(x_train=np.stack([X] * 4, 1)), "with 1 or 3 channels C, but x_train of .* is 120 x 4 x 8 x 8"),
        (arrays(x_test=np.stack([X[:9]] * 3, 1), y_test=Y[:9]), "the images of all splits must have one shape"),
    ],
)
def test_what_is_no_data_set_is_refused_in_one_line_and_leaves_nothing(
    data: Path, tmp_path: Path, make: Callable[[Path], Path], law: str
) -> None:
    with pytest.raises(InputError, match=law) as refusal:
        adding.add("leaves", [make(tmp_path / "given")])
    assert "\n" not in str(refusal.value)
    assert "leaves" not in data_set_names()
    assert [path.name for path in data.rglob("*") if "leaves" in path.name and path.suffix != ".lock"] == []


@pytest.mark.parametrize(
    ("name", "wishes", "law"),
    [
        ("mnist", Wishes(), "must be new, but 'mnist' is built in"),
        ("taken", Wishes(), "must be new, but 'taken' was added before: .* data remove taken"),
        ("../up", Wishes(), "must be letters, digits"),
        ("new", Wishes(eps="2"), r"eps must be a number or a fraction in \(0, 1\]"),
        ("new", Wishes(eps="much"), "eps must be a number or a fraction"),
        ("new", Wishes(size="big"), "size must be SIDE or HEIGHTxWIDTH"),
        ("new", Wishes(group="("), "group must be a regular expression"),
        ("new", Wishes(group="tree"), "group must match every file name, but 'tree' does not match the file name"),
    ],
)
def test_wishes_that_cannot_be_met_are_refused(data: Path, tmp_path: Path, name: str, wishes: Wishes, law: str) -> None:
    pictures = own.folder_of(tmp_path / "pictures")
    adding.add("taken", [pictures])
    with pytest.raises(InputError, match=law):
        adding.add(name, [pictures], wishes)
    assert [each for each in data_set_names() if each in ("new", "taken")] == ["taken"]


def test_a_numpy_file_with_a_pickle_is_not_read(data: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    np.save(tmp_path / "y.npy", Y)
    with pytest.raises(InputError, match="must be a whole NumPy file without pickles"):
        adding.add("leaves", [tmp_path / "x.npy", tmp_path / "y.npy"])
    np.savez(tmp_path / "z.npz", X)
    with pytest.raises(InputError, match=r"z.npy must be .*: its content is that of an .npz"):
        adding.add("leaves", [(tmp_path / "z.npz").rename(tmp_path / "z.npy"), tmp_path / "y.npy"])


@pytest.mark.parametrize("name", ["mnist", "nothing"])
def test_only_added_data_can_be_removed(data: Path, name: str) -> None:
    with pytest.raises(InputError, match="must be one that was added"):
        adding.remove(name)


def test_the_index_is_plain_json_and_names_digests(data: Path, tmp_path: Path) -> None:
    adding.add("leaves", [own.folder_of(tmp_path / "pictures")])
    index = json.loads((data / "decoded" / "leaves" / "decoded.json").read_text())
    assert set(index["files"]) == {"x_train.npy", "y_train.npy", "x_test.npy", "y_test.npy"}
    assert all(len(file["sha256"]) == 64 for file in index["files"].values())
