"""Named spaces of adversarial training: knob -> domain, grid or value; knobs that are not named keep their default."""

from optuna.distributions import FloatDistribution, IntDistribution

from spaces.domain import Domain

PAPER: dict[str, Domain] = {
    "attack": ("fgsm", "pgd"),
}
"""The two baselines on MNIST: PuVAE's and Defense-GAN's adversarial training, AdvAE's iterative one (section 4.1)."""

PAPER_CIFAR: dict[str, Domain] = {
    "attack": "pgd",
    "eps": 8 / 255,
    "pgd_steps": 10,
    "pgd_step_size": 1 / 255,
}
"""AdvAE's iterative adversarial training on CIFAR-10 (section 4.1)."""

WIDE: dict[str, Domain] = {
    "attack": ("fgsm", "pgd"),
    "eps": FloatDistribution(0.01, 0.5),
    "pgd_steps": IntDistribution(3, 40),
    "pgd_step_size": FloatDistribution(0.002, 0.1, log=True),
    "clean_share": FloatDistribution(0.0, 0.9),
    "start": ("scratch", "pretrained"),
    "learning_rate": FloatDistribution(1e-4, 1e-2, log=True),
    "batch_size": (32, 64, 128),
}
"""Everything that may matter; none of it can change the latency."""

DEFAULT: dict[str, Domain] = {
    "attack": ("fgsm", "pgd"),
    "eps": (8 / 255, 0.1, 0.2, 0.3),
    "pgd_steps": 10,
    "pgd_step_size": (0.01, 0.05),
    "start": ("scratch", "pretrained"),
    "learning_rate": FloatDistribution(3e-4, 3e-3, log=True),
    "batch_size": 64,
}
"""Ten steps instead of forty: a fourth of the cost, and nearly the strength."""

SMOKE: dict[str, Domain] = {
    "attack": ("fgsm", "pgd"),
    "eps": (0.1, 0.2),
    "pgd_steps": 5,
    "pgd_step_size": 0.05,
    "start": ("scratch", "pretrained"),
    "batch_size": 64,
    "epochs": 3,
}
"""Seconds on a CPU: for trying things out and for tests."""

STARTS = (
    {"attack": "pgd", "eps": 0.3, "pgd_step_size": 0.05, "start": "scratch"},
    {"attack": "fgsm", "eps": 0.3, "clean_share": 0.5, "start": "scratch"},  # Goodfellow's
)
"""Settings that a search tries first where they lie in its space."""
