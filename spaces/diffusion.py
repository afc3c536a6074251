"""Named spaces of diffusion purification: knob -> domain, grid or value; other knobs keep their default."""

from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from spaces.domain import Domain

PAPER: dict[str, Domain] = {
    "schedule": "linear",
    "maps": 128,
    "levels": 4,
    "blocks": 4,
    "attention": 16,
    "embedding": 512,
    "dropout": 0.1,
    "ema": 0.9999,
    "learning_rate": 2e-4,
    "batch_size": 128,
    "epochs": 2048,
    "t_star": (0.05, 0.075, 0.1, 0.125, 0.15),
    "steps": 100,
}
"""DiffPure on CIFAR-10: a U-Net of DDPM++'s width and depth, 800,000 steps of training, 100 steps back from t* = 0.1.

We have not trained it: it needs a GPU for days. DiffPure's network is the larger DDPM++ cont. (deep) with 8 blocks.
"""

WIDE: dict[str, Domain] = {
    "schedule": CategoricalDistribution(("linear", "cosine")),
    "maps": IntDistribution(8, 64, log=True),
    "levels": IntDistribution(2, 4),
    "blocks": IntDistribution(1, 3),
    "attention": (0, 7, 14),
    "embedding": (32, 64, 128),
    "dropout": (0.0, 0.1),
    "ema": (0.99, 0.999),
    "learning_rate": FloatDistribution(1e-4, 3e-3, log=True),
    "batch_size": (32, 64, 128),
    "t_star": FloatDistribution(0.02, 0.7),
    "steps": IntDistribution(1, 100, log=True),
    "sampler": CategoricalDistribution(("ddpm", "ddim")),
    "eta": FloatDistribution(0.0, 1.0),
    "votes": IntDistribution(1, 16, log=True),
    "guidance": (0.0, 1.0, 4.0, 19.0),
}
"""All knobs that may matter, including the architecture and hence the latency."""

DEFAULT: dict[str, Domain] = {
    "schedule": CategoricalDistribution(("linear", "cosine")),
    "maps": (12, 16),
    "learning_rate": FloatDistribution(5e-4, 2e-3, log=True),
    "epochs": 3,
    "t_star": (0.1, 0.2, 0.3),
    "steps": (2, 1),
    "votes": (1, 4),
}
"""A small U-Net, which draws recognisable MNIST digits after one epoch, and processes short enough to attack through.

From t* = 0.3 on MNIST, 1 or 2 steps left as many clean digits right as 10; from 0.5 on, few were left.
"""

SMOKE: dict[str, Domain] = {
    "maps": 8,
    "levels": 1,
    "attention": 0,
    "embedding": 16,
    "ema": 0.95,
    "learning_rate": (3e-3, 5e-3),
    "batch_size": 32,
    "epochs": 3,
    "t_star": 0.2,
    "steps": (2, 1),
}
"""Takes seconds on a CPU; for trials and tests."""

STARTS = (
    {"t_star": 0.1, "steps": 100, "sampler": "ddpm", "votes": 1},  # DiffPure on CIFAR-10
    {"t_star": 0.5, "steps": 5, "sampler": "ddpm", "votes": 1},  # on images like MNIST's
    {"t_star": 0.036, "steps": 36, "sampler": "ddpm", "guidance": 19.0},  # GDMP on CIFAR-10, one of its four rounds
)
"""Settings that a search tries first if its space contains them."""
