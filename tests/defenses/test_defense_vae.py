"""Defense-VAE against the paper: Table 6, Eq. 4 and 5 in float64 loops, the twelve versions, REC and E2E."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import spaces
from defenses.base import Batches, Shape, Tensors, halved
from defenses.defense_vae import ALPHA, EDGE, DefenseVAE, Phase, Train, versions
from spaces.domain import Scalar
from spaces.exceptions import InputError
from spaces.space import SearchSpace

MNIST, CIFAR, DIGITS = Shape(1, 28, 28, 10), Shape(3, 32, 32, 10), Shape(1, 8, 8, 10)
COIL, ODD = Shape(3, 128, 128, 100), Shape(2, 9, 13, 4)
SMALL: dict[str, Scalar] = {"maps": 3, "latent": 5, "attacks": "fgsm+rand", "batch_size": 16, "epoch_share": 0.25}


def build(shape: Shape = ODD, bn_eval: str = "running", **train: Scalar) -> DefenseVAE:
    torch.manual_seed(0)
    return DefenseVAE(SMALL | train, {"bn_eval": bn_eval}, shape).eval()


def images(shape: Shape = ODD, n: int = 6) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(n, shape.channels, shape.height, shape.width, generator=generator)


def linear(shape: Shape = ODD) -> nn.Module:
    torch.manual_seed(3)
    network = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(shape.channels * shape.height * shape.width, 4))
    return network.eval().requires_grad_(False)


def batches(epochs: int = 3, n: int = 24, start: int = 0) -> Batches:
    return Batches(images(n=n), torch.arange(n) % 4, epochs=epochs, batch_size=16, start=start)


def fitted(defense: DefenseVAE, classifier: nn.Module, work: Batches) -> DefenseVAE:
    defense.adopt(classifier)
    for _ in defense.fit(work, classifier):
        pass
    return defense


# Table 6.


def test_the_default_architecture_is_table_6() -> None:
    defense = DefenseVAE({}, {}, MNIST)
    convolutions = [m for m in defense.encoder if isinstance(m, nn.Conv2d)]
    assert [(m.in_channels, m.out_channels, *m.kernel_size, *m.stride, m.padding) for m in convolutions] == [
        (1, 64, 5, 5, 1, 1, (2, 2)),
        (64, 64, 4, 4, 2, 2, (3, 3)),
        (64, 128, 4, 4, 2, 2, (1, 1)),
        (128, 256, 4, 4, 2, 2, (1, 1)),
    ]
    deconvolutions = [m for m in defense.decoder if isinstance(m, nn.ConvTranspose2d)]
    assert [(m.in_channels, m.out_channels, *m.kernel_size, *m.stride, m.padding) for m in deconvolutions] == [
        (256, 128, 4, 4, 2, 2, (1, 1)),
        (128, 64, 4, 4, 2, 2, (1, 1)),
        (64, 64, 4, 4, 2, 2, (3, 3)),
        (64, 1, 5, 5, 1, 1, (2, 2)),
    ]
    # By hand: convolutions without bias before their batch norms, which have two weights a map.
    encoder = 25 * 64 + 16 * (64 * 64 + 64 * 128 + 128 * 256) + 2 * (64 + 64 + 128 + 256)
    dense = 2 * (4096 * 128 + 128) + (128 * 4096 + 4096)
    decoder = 16 * (256 * 128 + 128 * 64 + 64 * 64) + 25 * 64 + 2 * (128 + 64 + 64)
    assert sum(p.numel() for p in defense.parameters()) == encoder + dense + decoder


def test_the_first_halving_makes_16_pixels_of_28() -> None:
    defense = build(MNIST)
    sizes, maps = [], images(MNIST)
    for layer in defense.encoder:
        maps = layer(maps)
        sizes.append(tuple(maps.shape[2:]))
    assert list(dict.fromkeys(sizes)) == [(28, 28), (16, 16), (8, 8), (4, 4)]


@pytest.mark.parametrize(
    ("shape", "halvings", "smallest"),
    [
        (MNIST, 3, (4, 4)),
        (CIFAR, 3, (4, 4)),
        (DIGITS, 1, (4, 4)),
        (Shape(3, 64, 64, 2), 4, (4, 4)),
        (COIL, 5, (4, 4)),
        (ODD, 2, (3, 4)),
        (Shape(1, 17, 5, 3), 3, (3, 1)),
    ],
    ids=str,
)
@pytest.mark.parametrize("deeper", [0, 2])
def test_any_size_is_halved_to_about_four_pixels_and_comes_back(
    shape: Shape, halvings: int, smallest: tuple[int, int], deeper: int
) -> None:
    defense, x = build(shape, deeper=deeper), images(shape, 2)
    assert sum(isinstance(m, nn.Conv2d) and m.stride == (2, 2) for m in defense.encoder) == halvings
    assert sum(isinstance(m, nn.Conv2d) for m in defense.encoder) == 1 + halvings + deeper
    assert defense.size == smallest
    purified = defense.purify(x).detach()
    assert purified.shape == x.shape and purified.dtype == x.dtype
    assert 0 <= float(purified.min()) and float(purified.max()) <= 1
    with torch.device("meta"):
        build(shape, deeper=deeper)


def test_weights_begin_as_section_4_1_says() -> None:
    defense = DefenseVAE({}, {}, MNIST)
    convolutions = [m.weight for m in defense.modules() if isinstance(m, nn.Conv2d | nn.ConvTranspose2d)]
    norms = [m.weight for m in defense.modules() if isinstance(m, nn.BatchNorm2d)]
    for weights, mean in ((convolutions, 0.0), (norms, 1.0)):
        drawn = torch.cat([w.detach().flatten() for w in weights])
        assert float(drawn.mean()) == pytest.approx(mean, abs=0.005)
        assert float(drawn.std()) == pytest.approx(0.02, rel=0.1)


def test_the_tables_last_layer_is_a_batch_norm_and_a_relu_cut_off_at_one() -> None:
    defense, x = build(last_layer="bn_relu"), images()
    assert isinstance(defense.decoder[-1], nn.BatchNorm2d) and defense.decoder[-1].num_features == 2
    raw = torch.linspace(-1, 2, 7).expand(6, 2, 7, 7)
    assert torch.equal(defense.emit(raw), raw.relu().clamp(max=1))
    assert isinstance(build().decoder[-1], nn.ConvTranspose2d)
    assert torch.equal(build().emit(raw), raw.sigmoid())
    assert 0 <= float(defense.purify(x).detach().min())


# Losses.


def loops(defense: DefenseVAE, x_hat: Tensor, x: Tensor) -> tuple[float, float, Tensor]:
    """Eq. 4's two terms, number by number in float64, on what the network emitted; and the images that it emitted."""
    mu, log_var = defense.encode(x_hat)
    torch.manual_seed(7)
    z = mu + torch.randn(mu.shape) * torch.sqrt(log_var.exp())
    image = defense.emit(defense.decode(z)).detach()
    low = EDGE if defense.train_knobs.last_layer == "bn_relu" else 0.0
    bce, kl = 0.0, 0.0
    for n in range(len(x)):
        for t, p in zip(x[n].double().flatten().tolist(), image[n].double().flatten().tolist(), strict=True):
            p = min(max(p, low), 1 - low)
            bce -= t * math.log(p) + (1 - t) * math.log(1 - p)
        for m, v in zip(mu[n].double().tolist(), log_var[n].double().exp().tolist(), strict=True):
            kl += (m**2 + v - math.log(v) - 1) / 2
    return bce / len(x), kl / len(x), image


@pytest.mark.parametrize("last_layer", ["sigmoid", "bn_relu"])
@pytest.mark.parametrize("kl_weight", [0.0, 1.0, 2.5])
def test_the_loss_is_equation_4(last_layer: str, kl_weight: float) -> None:
    defense, x_hat = build(last_layer=last_layer, kl_weight=kl_weight), images()
    x = x_hat.flip(0)
    defense.train()  # so that images of bn_relu spread beyond 0 and 1
    bce, kl, _ = loops(defense, x_hat, x)
    torch.manual_seed(7)
    found = defense.losses("vae", x_hat, x, torch.zeros(6)).tolist()
    assert found == pytest.approx([bce + kl_weight * kl, bce, kl, 0], rel=1e-4)


def test_a_collapsed_posterior_is_remarked() -> None:
    defense, x = build(), images()
    with torch.no_grad():
        for layer in (defense.fc1, defense.fc2):
            layer.weight.zero_()
            layer.bias.zero_()
        (remark,) = defense.remarks(x, torch.zeros(6).long())
        assert "the posterior collapsed (0.00 nats" in remark
        defense.fc1.bias[0] = 1.5  # 1.125 nats
        assert defense.remarks(x, torch.zeros(6).long()) == ()


def test_the_end_to_end_loss_is_equation_5() -> None:
    defense, x_hat, y = build(variant="e2e", lambda_ce=3.0), images(), torch.tensor([0, 1, 2, 3, 0, 1])
    defense.adopt(linear())
    x = x_hat.flip(0)
    bce, kl, image = loops(defense, x_hat, x)
    ce = 0.0
    for logits, label in zip(defense.own(image).double().tolist(), y.tolist(), strict=True):
        ce -= (logits[label] - math.log(sum(map(math.exp, logits)))) / len(y)
    torch.manual_seed(7)
    assert defense.losses("e2e", x_hat, x, y).tolist() == pytest.approx([bce + kl + 3 * ce, bce, kl, ce], rel=1e-4)


def test_the_retraining_loss_is_the_cross_entropy_on_reconstructions_and_spares_the_vae() -> None:
    defense, x_hat, y = build(variant="rec"), images(), torch.tensor([0, 1, 2, 3, 0, 1])
    defense.adopt(linear())
    losses = defense.losses("rec", x_hat, x_hat.flip(0), y)
    rows = zip(defense.own(defense.purify(x_hat)).double().tolist(), y.tolist(), strict=True)
    by_hand = [math.log(sum(map(math.exp, logits))) - logits[label] for logits, label in rows]
    assert losses.tolist() == pytest.approx([sum(by_hand) / 6, 0, 0, sum(by_hand) / 6], rel=1e-4)
    losses[0].backward()
    assert {name.startswith("own.") for name, p in defense.named_parameters() if p.grad is not None} == {True}


# The adversarial versions.


@pytest.mark.parametrize(
    ("attacks", "families"),
    [
        ("fgsm+rand+cw", ["FGSM"] * 4 + ["RandFGSM"] * 4 + ["CW"] * 4),
        ("fgsm+rand", ["FGSM"] * 4 + ["RandFGSM"] * 4),
        ("fgsm+cw", ["FGSM"] * 4 + ["CW"] * 4),
        ("rand+cw", ["RandFGSM"] * 4 + ["CW"] * 4),
        ("fgsm+rand+deepfool", ["FGSM"] * 4 + ["RandFGSM"] * 4 + ["DeepFool"]),
        ("fgsm+rand+cw+clean", ["FGSM"] * 4 + ["RandFGSM"] * 4 + ["CW"] * 4 + ["VANILA"]),
    ],
)
def test_each_choice_of_attacks_makes_its_versions(attacks: str, families: list[str]) -> None:
    assert [family.__name__ for family, _ in versions(Train(attacks=attacks))] == families


def test_the_versions_have_the_papers_settings_or_the_codes() -> None:
    paper, code = (versions(Train(eps_set=which)) for which in ("paper", "code"))
    for forms, eps in ((paper, [0.25, 0.3, 0.35, 0.4]), (code, [0.2, 0.25, 0.3, 0.35])):
        assert [options["eps"] for _, options in forms[:4]] == [options["eps"] for _, options in forms[4:8]] == eps
        assert [options["lr"] for _, options in forms[8:]] == [6, 8, 10, 12]
        assert all(options["alpha"] == ALPHA == 0.05 for _, options in forms[4:8])
        assert all((options["c"], options["steps"]) == (100, 100) for _, options in forms[8:])
    scaled = versions(Train(eps_scale=0.1))
    assert [options["eps"] for _, options in scaled[:4]] == pytest.approx([0.025, 0.03, 0.035, 0.04])
    assert scaled[4][1]["alpha"] == pytest.approx(0.005)


def test_every_pair_joins_a_version_to_the_clean_image_behind_it() -> None:
    work = batches()
    pairs = build(attacks="fgsm+rand+cw+clean", cw_steps=3).pairs(work, linear())
    assert pairs.x_NCHW.shape == (13 * 24, 2, 9, 13) and pairs.x_NCHW.dtype == torch.float16
    assert pairs.y_N.tolist() == list(range(24)) * 13
    assert 0 <= float(pairs.x_NCHW.min()) and float(pairs.x_NCHW.max()) <= 1
    moved = (pairs.x_NCHW.float() - work.x_NCHW[pairs.y_N]).abs().unflatten(0, (13, 24)).flatten(1).amax(1)
    bounds = torch.tensor([0.25, 0.3, 0.35, 0.4] * 2)
    assert bool((moved[:8] <= bounds + 1 / 2048).all() and (moved[:8] >= bounds - 0.01).all())
    assert bool((moved[8:12] > 0).all()) and float(moved[12]) <= 1 / 2048


def test_versions_are_made_once_and_shared_by_whoever_asks_for_the_same() -> None:
    kept: dict[str, Tensors] = {}
    made: list[str] = []

    def once(words: str, make: Callable[[], Tensors]) -> Tensors:
        if words not in kept:
            made.append(words)
            kept[words] = halved(make())
        return kept[words]

    work = batches()
    work.once = once
    first = build(attacks="fgsm+rand+cw", cw_steps=3).pairs(work, linear())
    assert len(made) == 12
    again = build(attacks="fgsm+rand+cw", cw_steps=3, maps=2, kl_weight=0.0).pairs(work, linear())
    assert len(made) == 12 and torch.equal(first.x_NCHW, again.x_NCHW)
    build(attacks="fgsm+rand+cw", cw_steps=4).pairs(work, linear())
    build(attacks="fgsm+rand", eps_set="code").pairs(work, linear())
    assert len(made) == 12 + 4 + 2  # CW anew; of the code's eps, 0.2 alone is new to the two
    assert torch.equal(build(attacks="rand+cw", cw_steps=3).pairs(batches(), linear()).x_NCHW, first.x_NCHW[4 * 24 :])


@pytest.mark.parametrize(("share", "shown"), [(1.0, 192), (0.25, 48)])
def test_an_epoch_shows_its_share_of_the_pairs_none_of_them_twice(
    share: float, shown: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    defense, seen = build(epoch_share=share), list[Tensor]()
    losses = defense.losses

    def spy(phase: Phase, x_hat_NCHW: Tensor, x_NCHW: Tensor, y_N: Tensor) -> Tensor:
        assert x_hat_NCHW.dtype == torch.float32
        assert float((x_hat_NCHW - x_NCHW).abs().max()) <= 0.4 + 1 / 1024
        seen.append(x_hat_NCHW.flatten(1))
        return losses(phase, x_hat_NCHW, x_NCHW, y_N)

    monkeypatch.setattr(defense, "losses", spy)
    fitted(defense, linear(), batches(epochs=1))
    assert len(torch.cat(seen).unique(dim=0)) == sum(map(len, seen)) == shown


# Inference.


def test_an_image_is_decoded_from_the_mean_whatever_the_variance() -> None:
    defense, x = build(), images()
    expected = defense.emit(defense.decode(defense.encode(x)[0]))
    with torch.no_grad():
        defense.fc2.bias.add_(10)
    assert not defense.stochastic and torch.equal(defense.purify(x), expected)


def trained(bn_eval: str) -> DefenseVAE:
    return fitted(build(bn_eval=bn_eval), linear(), batches(epochs=1)).eval()


def test_running_statistics_ignore_the_batch_and_batch_statistics_do_not() -> None:
    x = images(n=8)
    running, batch = trained("running"), trained("batch")
    assert torch.allclose(running.purify(x), torch.cat([running.purify(one) for one in x.split(1)]), atol=1e-6)
    assert not torch.allclose(batch.purify(x), torch.cat([batch.purify(one) for one in x.split(4)]), atol=1e-4)


def test_batch_statistics_are_those_of_training_and_leave_the_buffers() -> None:
    defense, x = trained("batch"), images(n=8)
    before = {name: value.clone() for name, value in defense.state_dict().items()}
    found = defense.purify(x)
    assert all(torch.equal(before[name], value) for name, value in defense.state_dict().items())
    assert not torch.allclose(found, defense.at({"bn_eval": "running"}).purify(x), atol=1e-4)
    assert torch.allclose(found, defense.train().purify(x), atol=1e-6)


def test_the_attacker_of_a_retrained_classifier_has_the_exact_gradient_alone() -> None:
    assert build().gradients == ("bpda", "exact")
    assert build(variant="rec").gradients == build(variant="scratch").gradients == ("exact",)


# REC and E2E.


@pytest.mark.parametrize(
    ("variant", "epochs", "phases"),
    [
        ("plain", 3, "vae vae vae"),
        ("rec", 2, "vae rec"),
        ("rec", 5, "vae vae vae rec rec"),
        ("e2e", 3, "vae rec e2e"),
        ("e2e", 5, "vae vae rec rec e2e"),
        ("scratch", 1, "e2e"),
        ("scratch", 3, "e2e e2e e2e"),
    ],
)
def test_the_epochs_are_spent_in_phases(variant: str, epochs: int, phases: str) -> None:
    defense = build(variant=variant, epochs=epochs, rec_share=0.4, e2e_share=0.2)
    assert [defense.phase(epoch) for epoch in range(epochs)] == phases.split()


@pytest.mark.parametrize(
    ("train", "words"),
    [
        ({"variant": "rec", "epochs": 1}, "epochs must exceed the 1 that variant rec retrains, but is 1"),
        ({"variant": "e2e", "epochs": 2}, "epochs must exceed the 2 that variant e2e retrains, but is 2"),
        ({"variant": "e2e", "epochs": 10, "rec_share": 0.5, "e2e_share": 0.5}, "epochs must exceed the 10"),
    ],
)
def test_phases_that_leave_the_vae_no_epoch_are_refused_in_one_line(train: dict[str, Scalar], words: str) -> None:
    with pytest.raises(InputError, match=words):
        build(ODD, "running", **train)


def test_each_phase_trains_what_it_should_and_never_the_protected_classifier() -> None:
    defense, classifier = build(variant="e2e", epochs=3), linear()
    protected = {name: value.clone() for name, value in classifier.state_dict().items()}
    defense.adopt(nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(234, 4)))  # the architecture alone
    moved, before = [], {name: value.clone() for name, value in defense.state_dict().items()}
    for _ in defense.fit(batches(), classifier):
        after = {name: value.clone() for name, value in defense.state_dict().items()}
        changed = [name for name in after if not torch.equal(after[name], before[name])]
        moved.append((any(n.startswith("own.") for n in changed), any(not n.startswith("own.") for n in changed)))
        if len(moved) == 1:
            assert all(torch.equal(after[f"own.{name}"], value) for name, value in protected.items())
        before = after
    assert moved[1:] == [(True, False), (True, True)]
    assert all(torch.equal(protected[name], value) for name, value in classifier.state_dict().items())
    assert not any(module.training for module in classifier.modules())
    assert not any(p.requires_grad or p.grad is not None for p in classifier.parameters())


def test_from_scratch_the_copy_forgets_the_protected_weights_and_each_part_is_trained_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    classifier, defense = linear(), build(variant="scratch", epochs=1)
    defense.adopt(classifier)
    begun = list[Tensor]()
    losses = defense.losses

    def spy(phase: Phase, *given: Tensor) -> Tensor:
        begun.append(defense.own[2].weight.detach().clone())  # type: ignore[index]
        assert phase == "e2e"
        return losses(phase, *given)

    monkeypatch.setattr(defense, "losses", spy)
    before = {name: value.clone() for name, value in defense.named_parameters()}
    for _ in defense.fit(batches(epochs=1), classifier):
        pass
    assert not torch.equal(begun[0], classifier[2].weight)  # type: ignore[index]
    assert all(not torch.equal(value, before[name]) for name, value in defense.named_parameters())
    assert defense.phase(0) == "e2e" and Train().variant == "plain"


@pytest.mark.parametrize("variant", ["plain", "rec", "e2e", "scratch"])
def test_who_classifies_depends_on_the_variant(variant: str) -> None:
    classifier, x = linear(), images()
    defense = fitted(build(variant=variant, epochs=3), classifier, batches()).eval()
    owns = any(name.startswith("own.") for name in defense.state_dict())
    assert owns == (variant != "plain")
    who = defense.own if owns else classifier
    assert torch.equal(defense.classify(x, classifier), who(defense.purify(x)))
    assert torch.equal(defense.classify(x, classifier), classifier(defense.purify(x))) == (variant == "plain")


@pytest.mark.parametrize("variant", ["plain", "rec", "e2e", "scratch"])
@pytest.mark.parametrize("epochs_before", [1, 2, 3])
def test_a_fit_resumed_in_any_phase_ends_bit_for_bit_the_same(variant: str, epochs_before: int) -> None:
    classifier = linear()
    whole = fitted(build(variant=variant, epochs=4), classifier, batches(epochs=4))
    first = build(variant=variant, epochs=4)
    first.adopt(classifier)
    fit = first.fit(batches(epochs=4), classifier)
    for _ in range(epochs_before):
        next(fit)
    torch.manual_seed(99)
    second = build(variant=variant, epochs=4, last_layer="sigmoid")
    second.adopt(classifier)
    second.resume(first.progress())
    for _ in second.fit(batches(epochs=4, start=epochs_before), classifier):
        pass
    ends = second.state_dict()
    assert all(torch.equal(value, ends[name]) for name, value in whole.state_dict().items())


# Spaces.


def test_the_papers_spaces_are_as_large_as_its_tables() -> None:
    whole = SearchSpace.of(DefenseVAE)
    trainings = {name: whole.narrow(spaces.named("defense_vae", name)).trainings() for name in ("paper", "code")}
    assert trainings == {"paper": 2, "code": 1}
    untrained = whole.narrow(spaces.named("defense_vae", "paper_untrained"))
    assert len({setting.train["attacks"] for setting in untrained.grid()}) == 5


@pytest.mark.parametrize(
    "space", ["paper", "paper_rec", "paper_e2e", "paper_scratch", "paper_untrained", "code", "smoke"]
)
def test_every_setting_of_a_finite_space_can_be_built(space: str) -> None:
    for setting in SearchSpace.of(DefenseVAE).narrow(spaces.named("defense_vae", space)).grid():
        with torch.device("meta"):
            DefenseVAE(setting.train, setting.inference, MNIST)


def test_it_gives_attacked_digits_back_their_class(digits: tuple[Tensor, Tensor], classifier: nn.Module) -> None:
    (x, y), smoke = digits, SearchSpace.of(DefenseVAE).narrow(spaces.named("defense_vae", "smoke"))
    torch.manual_seed(0)
    defense = DefenseVAE({**smoke.complete({"variant": "plain", "kl_weight": 0.01, "maps": 8}).train}, {}, DIGITS)
    fitted(defense, classifier, Batches(x[:1257], y[:1257], epochs=3, batch_size=32)).eval()
    tested = Batches(x[1400:], y[1400:], epochs=1, batch_size=1)
    attacked = build(DIGITS, attacks="fgsm+rand").pairs(tested, classifier).x_NCHW[397:794].float()  # FGSM, eps 0.3
    bare, defended = (
        float((logits.argmax(1) == y[1400:]).float().mean())
        for logits in (classifier(attacked), defense.classify(attacked, classifier))
    )
    assert bare < 0.2 and defended > 0.6


@pytest.mark.parametrize("bn_eval", ["running", "batch"])
def test_what_is_generated_from_an_images_latent_vector_is_what_it_is_purified_to(bn_eval: str) -> None:
    defense, x = build(bn_eval=bn_eval), images().requires_grad_()
    z = defense.latent(x)
    assert z.shape == (6, 5) and torch.equal(defense.generate(z), defense.purify(x))
    (slope,) = torch.autograd.grad(z.square().sum(), x)
    assert bool((slope.flatten(1).abs().amax(1) > 0).all()) and defense.openings == ("latent",)
