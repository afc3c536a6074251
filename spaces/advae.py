"""Named spaces of AdvAE: knob -> domain, grid or value; other knobs keep their default."""

from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from spaces.domain import Domain

LAMBDAS = (0.0, 0.2, 0.5, 1.0, 1.5, 5.0)
"""The grid of the authors' code; the paper reports 0 on MNIST and 1 on CIFAR-10."""

PAPER: dict[str, Domain] = {
    "lambda_rec": LAMBDAS,
    "eps": (0.1, 0.2, 0.3),
    "pgd_steps": (10, 20, 40),
    "pgd_step_size": (0.01, 0.02, 0.04),
}
"""Around the paper's MNIST setting: 40 steps of 0.01 within 0.3 through the small autoencoder. Source: section 4.1."""

PAPER_CIFAR: dict[str, Domain] = {
    "lambda_rec": LAMBDAS,
    "eps": (4 / 255, 8 / 255),
    "pgd_steps": (5, 10),
    "pgd_step_size": (1 / 255, 2 / 255),
    "architecture": "unet",
    "levels": 5,
}
"""Around the paper's CIFAR-10 setting: 10 steps of 1/255 (code: 2/255) within 8/255 through a U-Net of 5 levels."""

WIDE: dict[str, Domain] = {
    "lambda_rec": FloatDistribution(0.0, 10.0),
    "eps": FloatDistribution(0.01, 0.5, log=True),
    "pgd_steps": IntDistribution(1, 40, log=True),
    "pgd_step_size": FloatDistribution(0.003, 0.3, log=True),
    "bases": CategoricalDistribution(("task", "advae-X", "advae-X+advae-A+advae-B")),
    "attack_statistics": CategoricalDistribution(("batch", "running")),
    "architecture": CategoricalDistribution(("cnn", "unet")),
    "maps": IntDistribution(8, 64, log=True),
    "levels": IntDistribution(1, 4),
    "learning_rate": FloatDistribution(1e-4, 1e-2, log=True),
}
"""All knobs that may matter, including the architecture (and hence the latency) and the ensembles."""

DEFAULT: dict[str, Domain] = {
    "lambda_rec": (0.0, 0.2, 1.0),
    "eps": FloatDistribution(0.02, 0.4, log=True),
    "pgd_steps": (3, 5, 7),
    "pgd_step_size": (0.02, 0.05, 0.1),
    "attack_statistics": ("batch", "running"),
    "architecture": ("cnn", "unet"),
    "maps": (8, 16),
    "levels": (2, 3),
    "learning_rate": (1e-3, 3e-3),
    "batch_size": 64,
    "epochs": 20,
}
"""Fewer and larger PGD steps and narrower networks: a training step costs a tenth of the paper's."""

SMOKE: dict[str, Domain] = {
    "lambda_rec": (0.0, 1.0),
    "eps": (0.1, 0.2),
    "pgd_steps": 3,
    "pgd_step_size": 0.1,
    "architecture": ("cnn", "unet"),
    "maps": 8,
    "learning_rate": 5e-3,
    "batch_size": 32,
    "epochs": 3,
}
"""Takes seconds on a CPU; for trials and tests."""

STARTS = (
    {"lambda_rec": 0.0, "eps": 0.3, "pgd_steps": 40, "pgd_step_size": 0.01, "architecture": "cnn", "levels": 2},
    {"lambda_rec": 1.0, "eps": 8 / 255, "pgd_steps": 10, "pgd_step_size": 1 / 255, "architecture": "unet", "levels": 5},
    {
        "lambda_rec": 0.2,
        "eps": 0.3,
        "pgd_steps": 5,
        "pgd_step_size": 0.1,
        "attack_statistics": "batch",
        "architecture": "unet",
        "maps": 8,
        "levels": 2,
        "learning_rate": 3e-3,
    },
)
"""Settings that a search tries first if its space contains them: the paper's two, and our best short one on MNIST."""
