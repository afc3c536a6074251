"""The classifiers: each architecture against its paper's table, by hand, and on the data sets."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from defenses.base import Shape
from search.classifiers.architectures import ARCHITECTURES, PARTNERS, Stack, least
from search.classifiers.task import TASKS, find_task
from search.classifiers.training import train
from search.data.datasets import DATASETS
from search.trial.assets import Assets
from spaces.exceptions import InputError
from tests.conftest import digits_study

MNIST = Shape(1, 28, 28, 10)
R, F = "relu", "flatten"
# Each table once more, on 28 x 28 x 1: conv IN OUT KERNEL STRIDE PADDING -> side, fc IN OUT, drop RATE.
TABLES: dict[str, list[str]] = {
    "A": ["conv 1 64 5 1 0 -> 24", R, "conv 64 64 5 2 0 -> 10", R, "drop 0.25", F]
    + ["fc 6400 128", R, "drop 0.5", "fc 128 10"],
    "B": ["conv 1 128 3 1 0 -> 26", R, "conv 128 64 3 2 0 -> 12", R, "drop 0.25", F]
    + ["fc 9216 128", R, "drop 0.5", "fc 128 10"],
    "C": ["conv 1 64 5 1 0 -> 24", R, "conv 64 128 5 1 0 -> 20", R, "conv 128 256 5 2 0 -> 8", R, "drop 0.25", F]
    + ["fc 16384 512", R, "drop 0.5", "fc 512 256", R, "fc 256 10"],
    "D": ["conv 1 128 3 1 0 -> 26", R, "conv 128 256 3 1 0 -> 24", R, "conv 256 512 3 2 0 -> 11", R, "drop 0.25", F]
    + ["fc 61952 512", R, "drop 0.5", "fc 512 10"],
    "defensegan-A": ["conv 1 64 5 1 2 -> 28", R, "conv 64 64 5 2 0 -> 12", R, "drop 0.25", F]
    + ["fc 9216 128", R, "drop 0.5", "fc 128 10"],
    "defensegan-B": ["drop 0.2", "conv 1 64 8 2 5 -> 16", R, "conv 64 128 6 2 0 -> 6", R, "conv 128 128 5 1 0 -> 2", R]
    + ["drop 0.5", F, "fc 512 10"],
    "defensegan-C": ["conv 1 128 3 1 1 -> 28", R, "conv 128 64 5 2 0 -> 12", R, "drop 0.25", F]
    + ["fc 9216 128", R, "drop 0.5", "fc 128 10"],
    "defensegan-D": [F, "fc 784 200", R, "drop 0.5", "fc 200 200", R, "drop 0.25", "fc 200 10"],
    "defensegan-E": [F, "fc 784 200", R, "fc 200 200", R, "fc 200 10"],
    "advae-X": ["conv 1 32 3 1 0 -> 26", R, "conv 32 32 3 1 0 -> 24", R, "pool 2 -> 12"]
    + ["conv 32 64 3 1 0 -> 10", R, "conv 64 64 3 1 0 -> 8", R, "pool 2 -> 4", F]
    + ["fc 1024 200", R, "drop 0.5", "fc 200 200", R, "fc 200 10"],
    "advae-A": ["conv 1 64 5 1 2 -> 28", R, "conv 64 64 5 2 0 -> 12", R, "drop 0.25", F]
    + ["fc 9216 128", R, "drop 0.5", "fc 128 10"],
    "advae-B": ["drop 0.2", "conv 1 64 8 2 3 -> 14", R, "conv 64 128 6 2 0 -> 5", R, "conv 128 128 5 1 0 -> 1", R]
    + ["drop 0.5", F, "fc 128 10"],
    "advae-C": ["conv 1 128 3 1 1 -> 28", R, "conv 128 64 3 2 0 -> 13", R, "drop 0.25", F]
    + ["fc 10816 128", R, "drop 0.5", "fc 128 10"],
    "advae-D": [F, "fc 784 200", R, "drop 0.5", "fc 200 200", R, "drop 0.5", "fc 200 10"],
}
PARAMETERS = {
    "A": (25 * 64 + 64) + (25 * 64 * 64 + 64) + (10 * 10 * 64 + 1) * 128 + 129 * 10,
    "B": (9 * 128 + 128) + (9 * 128 * 64 + 64) + (12 * 12 * 64 + 1) * 128 + 129 * 10,
    "C": (25 * 64 + 64) + (25 * 64 * 128 + 128) + (25 * 128 * 256 + 256)
    + (8 * 8 * 256 + 1) * 512 + 513 * 256 + 257 * 10,
    "D": (9 * 128 + 128) + (9 * 128 * 256 + 256) + (9 * 256 * 512 + 512) + (11 * 11 * 512 + 1) * 512 + 513 * 10,
    "defensegan-A": (25 * 64 + 64) + (25 * 64 * 64 + 64) + (12 * 12 * 64 + 1) * 128 + 129 * 10,
    "defensegan-B": (64 * 64 + 64) + (36 * 64 * 128 + 128) + (25 * 128 * 128 + 128) + (2 * 2 * 128 + 1) * 10,
    "defensegan-C": (9 * 128 + 128) + (25 * 128 * 64 + 64) + (12 * 12 * 64 + 1) * 128 + 129 * 10,
    "defensegan-D": 785 * 200 + 201 * 200 + 201 * 10,
    "defensegan-E": 785 * 200 + 201 * 200 + 201 * 10,
    "advae-X": (9 * 32 + 32) + (9 * 32 * 32 + 32) + (9 * 32 * 64 + 64) + (9 * 64 * 64 + 64)
    + (4 * 4 * 64 + 1) * 200 + 201 * 200 + 201 * 10,
    "advae-A": (25 * 64 + 64) + (25 * 64 * 64 + 64) + (12 * 12 * 64 + 1) * 128 + 129 * 10,
    "advae-B": (64 * 64 + 64) + (36 * 64 * 128 + 128) + (25 * 128 * 128 + 128) + 129 * 10,
    "advae-C": (9 * 128 + 128) + (9 * 128 * 64 + 64) + (13 * 13 * 64 + 1) * 128 + 129 * 10,
    "advae-D": 785 * 200 + 201 * 200 + 201 * 10,
}  # fmt: skip


def described(network: nn.Sequential, shape: Shape) -> list[str]:
    """Return each layer in the words of TABLES, with the side that its maps really have."""
    x_NCHW, words = torch.zeros(1, shape.channels, shape.height, shape.width, device="meta"), []
    for part in network:
        x_NCHW = part(x_NCHW)
        match part:
            case nn.Conv2d():
                numbers = (part.kernel_size[0], part.stride[0], part.padding[0])
                words.append(f"conv {part.in_channels} {part.out_channels} {' '.join(map(str, numbers))}")
            case nn.MaxPool2d():
                words.append(f"pool {part.kernel_size}")
            case nn.Linear():
                words.append(f"fc {part.in_features} {part.out_features}")
            case nn.Dropout():
                words.append(f"drop {part.p}")
            case _:
                words.append({nn.ReLU: R, nn.Flatten: F}[type(part)])
        if words[-1].startswith(("conv", "pool")):
            words[-1] += f" -> {x_NCHW.shape[-1]}"
    return words


def test_every_architecture_stands_in_a_table_here() -> None:
    assert {*TABLES, "resnet29"} == {*PARAMETERS, "resnet29"} == set(ARCHITECTURES)


@pytest.mark.parametrize("name", TABLES)
def test_the_layers_are_those_of_the_papers_table(name: str) -> None:
    with torch.device("meta"):
        network = ARCHITECTURES[name].build(MNIST)
    assert described(network, MNIST) == TABLES[name]
    assert sum(p.numel() for p in network.parameters()) == PARAMETERS[name]


def test_resnet29_has_29_layers_and_as_many_parameters_as_keras_example() -> None:
    def convolution(maps: int, wide: int, size: int) -> int:
        return size * size * maps * wide + wide

    def unit(maps: int, narrow: int, wide: int) -> int:
        norms = 2 * (maps + narrow + narrow)
        return norms + convolution(maps, narrow, 1) + convolution(narrow, narrow, 3) + convolution(narrow, wide, 1)

    stem = convolution(3, 16, 3) + 2 * 16
    first = unit(16, 16, 64) - 2 * 16 + convolution(16, 64, 1) + 2 * unit(64, 16, 64)
    second = unit(64, 64, 128) + convolution(64, 128, 1) + 2 * unit(128, 64, 128)
    third = unit(128, 128, 256) + convolution(128, 256, 1) + 2 * unit(256, 128, 256)
    with torch.device("meta"):
        network = ARCHITECTURES["resnet29"].build(Shape(3, 32, 32, 10))
    assert sum(p.numel() for p in network.parameters()) == stem + first + second + third + 2 * 256 + 257 * 10
    deep = [n for n, m in network.named_modules() if isinstance(m, nn.Conv2d | nn.Linear) and "shortcut" not in n]
    assert len(deep) == 29


def test_resnet29_halves_the_image_twice_and_activates_before_it_convolves() -> None:
    network = ARCHITECTURES["resnet29"].build(Shape(3, 32, 32, 10)).eval()
    x_NCHW, sizes = torch.rand(1, 3, 32, 32), []
    for part in network:
        x_NCHW = part(x_NCHW)
        sizes.append(tuple(x_NCHW.shape[1:]))
    assert sizes[3:12] == 3 * [(64, 32, 32)] + 3 * [(128, 16, 16)] + 3 * [(256, 8, 8)]
    kinds = [[type(m).__name__ for m in network[i].residual] for i in (3, 4)]  # type: ignore[union-attr]
    assert kinds[1][:3] == ["BatchNorm2d", "ReLU", "Conv2d"] and kinds[0] == kinds[1][2:]


def test_a_residual_unit_adds_what_its_convolutions_make_of_the_activated_image() -> None:
    unit = ARCHITECTURES["resnet29"].build(Shape(3, 32, 32, 10)).eval()[4]
    x_NCHW = torch.randn(2, 64, 8, 8)
    h_NCHW = x_NCHW
    for norm, convolution in ((0, 2), (3, 5), (6, 8)):
        h_NCHW = unit.residual[convolution](torch.relu(unit.residual[norm](h_NCHW)))  # type: ignore[index, operator]
    assert torch.allclose(unit(x_NCHW), x_NCHW + h_NCHW)


@pytest.mark.parametrize("name", TASKS)
def test_a_classifier_gives_a_logit_for_each_class_of_a_data_set(name: str) -> None:
    one = find_task(name)
    with torch.device("meta"):
        network = ARCHITECTURES[one.classifier].build(one.shape)
        logits_NK = network(torch.zeros(3, one.shape.channels, one.shape.height, one.shape.width))
    assert logits_NK.shape == (3, one.shape.classes)


@pytest.mark.parametrize("name", TABLES)
def test_what_is_said_to_fit_can_be_built_and_run_and_nothing_else_can(name: str) -> None:
    architecture = ARCHITECTURES[name]
    assert isinstance(architecture, Stack)
    for height, width in [*((n, n) for n in range(1, 34)), (28, 33), (33, 28), (19, 40), (23, 40), (40, 24)]:
        shape = Shape(2, height, width, 3)
        with torch.device("meta"):
            if not architecture.fits(shape):
                with pytest.raises(InputError, match=f"but {height} x {width} vanishes"):
                    architecture.build(shape)
                side = least(name, shape)
                assert side > min(height, width) and not architecture.fits(Shape(2, side - 1, side - 1, 3))
                shape = Shape(2, side, side, 3)
            x_NCHW = torch.zeros(1, 2, shape.height, shape.width)
            assert architecture.build(shape)(x_NCHW).shape == (1, 3)


def test_convolutions_of_small_images_are_padded_only_where_the_paper_names_no_padding() -> None:
    def paddings(name: str) -> list[int]:
        network = ARCHITECTURES[name].build(DATASETS["digits"].shape)
        return [part.padding[0] for part in network if isinstance(part, nn.Conv2d)]  # type: ignore[misc]

    assert paddings("C") == [2, 2, 2] and paddings("advae-X") == [1, 1, 1, 1] and paddings("advae-B") == [3, 3, 2]
    assert paddings("defensegan-A") == [2, 0] and paddings("defensegan-C") == [1, 0]


def test_no_partner_needs_larger_images_than_its_classifier() -> None:
    for side in range(1, 40):
        fits = {name for name, one in ARCHITECTURES.items() if one.fits(Shape(1, side, side, 2))}
        assert {PARTNERS[name] for name in fits} <= fits, side


@pytest.mark.parametrize(("name", "epochs"), [("defensegan-D", 30), ("advae-X", 25)])
def test_a_classifier_learns_the_digits(name: str, epochs: int, digits: tuple[Tensor, Tensor]) -> None:
    x_NCHW, y_N = digits
    network = ARCHITECTURES[name].build(DATASETS["digits"].shape)
    train(network, x_NCHW[:1257], y_N[:1257], epochs=epochs, seed=0)
    assert right(network.eval(), x_NCHW[1257:], y_N[1257:]) > 0.9


def right(network: nn.Module, x_NCHW: Tensor, y_N: Tensor) -> float:
    with torch.no_grad():
        return float((network(x_NCHW).argmax(1) == y_N).double().mean())


def test_resnet29_learns_the_digits_and_is_stored_frozen_in_eval_mode(
    tmp_path_factory: pytest.TempPathFactory, digits: tuple[Tensor, Tensor]
) -> None:
    storage = tmp_path_factory.mktemp("resnet")
    study = digits_study(storage, task="digits/resnet29").model_copy(update={"classifier_epochs": 5})
    x_NCHW, y_N = digits

    def found() -> nn.Module:
        return Assets(study, study.store).classifier("resnet29")

    network = found()
    before = [tensor.clone() for tensor in network.state_dict().values()]
    assert not network.training and not any(p.requires_grad for p in network.parameters())
    assert right(network, x_NCHW[1257:], y_N[1257:]) > 0.85
    logits_NK = network(x_NCHW[1257:1300])
    assert torch.allclose(logits_NK[:1], network(x_NCHW[1257:1258]), atol=1e-4)
    assert all(torch.equal(a, b) for a, b in zip(before, found().state_dict().values(), strict=True))


@pytest.mark.parametrize("name", ["A", "resnet29"])
def test_a_training_depends_on_nothing_that_the_network_was_before(name: str, digits: tuple[Tensor, Tensor]) -> None:
    x_NCHW, y_N = digits[0][:128], digits[1][:128]
    used = ARCHITECTURES[name].build(DATASETS["digits"].shape)
    train(used, x_NCHW, y_N, epochs=1, seed=1)
    new = ARCHITECTURES[name].build(DATASETS["digits"].shape)
    for network in (used, new):
        train(network, x_NCHW, y_N, epochs=1, seed=0)
    assert all(torch.equal(a, b) for a, b in zip(used.state_dict().values(), new.state_dict().values(), strict=True))
