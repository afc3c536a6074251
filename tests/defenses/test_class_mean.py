"""The class means as purifier, against a loop; and PuVAE's choice among them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from defenses.base import Batches, Shape
from defenses.class_mean import ClassMean


def test_each_image_becomes_the_nearest_mean_of_a_class(digits: tuple[Tensor, Tensor]) -> None:
    x, y = digits[0][:300], digits[1][:300]
    defense = ClassMean({"batch_size": 64}, {}, Shape(1, 8, 8, 10))
    (metrics,) = defense.fit(Batches(x, y, epochs=1, batch_size=64), nn.Identity())
    means = torch.stack([x[y == k].double().mean(0) for k in range(10)])
    torch.testing.assert_close(defense.mean_KCHW.double(), means)
    distances = [[float((image.double() - mean).square().mean().sqrt()) for mean in means] for image in x[:40]]
    nearest = [row.index(min(row)) for row in distances]
    assert defense.purify(x[:40]).equal(defense.mean_KCHW[nearest]) and not defense.stochastic
    assert 0 < metrics["loss"] < 0.5


def test_a_class_without_images_has_a_black_mean() -> None:
    defense = ClassMean({}, {}, Shape(1, 2, 2, 3))
    batches = Batches(torch.ones(4, 1, 2, 2), torch.tensor([0, 0, 1, 1]), epochs=1, batch_size=4)
    list(defense.fit(batches, nn.Identity()))
    assert defense.mean_KCHW.flatten(1).tolist() == [[1.0] * 4, [1.0] * 4, [0.0] * 4]
