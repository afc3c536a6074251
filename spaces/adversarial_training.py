"""Named spaces of adversarial training: knob -> domain, grid or value; other knobs keep their default."""

from optuna.distributions import FloatDistribution, IntDistribution

from spaces.domain import Domain

PAPER: dict[str, Domain] = {
    "attack": ("fgsm", "pgd"),
}
"""The two baselines on MNIST: that of PuVAE and Defense-GAN, and AdvAE's iterative one (section 4.1)."""

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
    "warm_up": IntDistribution(0, 10),
    "clean_share": FloatDistribution(0.0, 0.9),
    "start": ("scratch", "pretrained"),
    "learning_rate": FloatDistribution(1e-4, 1e-2, log=True),
    "batch_size": (32, 64, 128),
}
"""All knobs that may matter; none of them can change the latency."""

DEFAULT: dict[str, Domain] = {
    "attack": ("fgsm", "pgd"),
    "eps": (8 / 255, 0.1, 0.2, 0.3),
    "pgd_steps": 10,
    "pgd_step_size": (0.01, 0.05),
    "start": ("scratch", "pretrained"),
    "learning_rate": FloatDistribution(3e-4, 3e-3, log=True),
    "batch_size": 64,
}
"""Ten steps instead of forty: a quarter of the cost at nearly the same strength."""

L2: dict[str, Domain] = {
    "attack": "pgd",
    "norm": "L2",
    "eps": (0.5, 1.0, 1.5, 2.0),
    "pgd_steps": 10,
    "pgd_step_size": (0.2, 0.4),
    "start": ("scratch", "pretrained"),
    "learning_rate": FloatDistribution(3e-4, 3e-3, log=True),
    "batch_size": 64,
}
"""For studies with `--norm L2`: ten steps of PGD in L2, which together span eps."""

SMOKE: dict[str, Domain] = {
    "attack": ("fgsm", "pgd"),
    "eps": (0.1, 0.2),
    "pgd_steps": 5,
    "pgd_step_size": 0.05,
    "start": ("scratch", "pretrained"),
    "batch_size": 64,
    "epochs": 3,
}
"""Takes seconds on a CPU; for trials and tests."""

STARTS = (
    {"attack": "pgd", "eps": 0.3, "pgd_step_size": 0.05, "start": "scratch"},
    {"attack": "fgsm", "eps": 0.3, "clean_share": 0.5, "start": "scratch"},  # Goodfellow's
)
"""Settings that a search tries first if its space contains them."""
