"""Named spaces of HGD: knob -> domain, grid or value; other knobs keep their default."""

from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from spaces.domain import Domain

PAPER: dict[str, Domain] = {
    "guide": ("logits", "pixels", "labels"),
    "attack": "mix",
    "eps": (16 / 255, 0.3),
    "strengths": 16,
    "maps": 64,
    "levels": 5,
    "epochs": 30,
}
"""The three guides that the paper compares, with its eps and with that of MNIST."""

WIDE: dict[str, Domain] = {
    "guide": CategoricalDistribution(("logits", "pixels", "labels")),
    "attack": CategoricalDistribution(("mix", "fgsm", "pgd")),
    "pgd_steps": IntDistribution(2, 40, log=True),
    "eps": (0.03, 0.1, 0.2, 0.3, 0.4),
    "strengths": (1, 4, 16),
    "maps": IntDistribution(8, 64, log=True),
    "levels": (2, 3, 4),
    "learning_rate": FloatDistribution(1e-4, 1e-2, log=True),
    "batch_size": (32, 60, 128),
}
"""All knobs that may matter, including the architecture and hence the latency."""

DEFAULT: dict[str, Domain] = {
    "guide": ("logits", "labels"),
    "attack": ("mix", "pgd"),
    "pgd_steps": 10,
    "eps": (0.1, 0.2, 0.3, 0.4),
    "strengths": (1, 4, 16),
    "maps": (8, 16),
    "levels": (2, 3),
    "learning_rate": FloatDistribution(1e-3, 1e-2, log=True),
    "epochs": 5,
}
"""Range in which short trainings already purify: narrow U-Nets, and few passes since each covers every attack."""

SMOKE: dict[str, Domain] = {
    "guide": ("logits", "labels"),
    "attack": ("fgsm", "pgd"),
    "pgd_steps": 5,
    "strengths": (1, 4),
    "maps": 8,
    "levels": 2,
    "learning_rate": 3e-3,
    "epochs": 2,
}
"""Takes seconds on a CPU; for trials and tests."""

STARTS = (
    {"guide": "logits", "attack": "mix", "strengths": 16},  # the paper's LGD
    {"guide": "labels", "attack": "pgd", "strengths": 1},  # AdvAE's baseline
)
"""Settings that a search tries first if its space contains them."""
