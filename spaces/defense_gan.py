"""Named spaces of Defense-GAN: knob -> domain, grid or value; other knobs keep their default."""

from optuna.distributions import FloatDistribution, IntDistribution

from spaces.domain import Domain

PAPER: dict[str, Domain] = {
    "spread": 128**-0.5,
    "steps": (25, 50, 100, 200, 400),
    "restarts": (1, 2, 5, 10, 20),
}
"""One training with the values of L and R that the papers trade for latency; `spread` is that of the authors' code.

L = 200 and R = 10 is recommended, R = 20 is PuVAE's (section V-B), and Table 4 of Defense-VAE also times L = 400.
"""

WIDE: dict[str, Domain] = {
    "latent": IntDistribution(16, 256, log=True),
    "maps": IntDistribution(8, 128, log=True),
    "lambda_gp": FloatDistribution(1.0, 100.0, log=True),
    "critic_steps": IntDistribution(1, 10),
    "learning_rate": FloatDistribution(3e-5, 3e-3, log=True),
    "beta_1": (0.0, 0.5),
    "batch_size": (32, 50, 128),
    "steps": IntDistribution(5, 400, log=True),
    "restarts": IntDistribution(1, 20, log=True),
    "rate": FloatDistribution(1.0, 100.0, log=True),
    "momentum": FloatDistribution(0.0, 0.95),
    "spread": FloatDistribution(0.05, 1.0, log=True),
}
"""All knobs that may matter, including the architecture and hence the latency."""

DEFAULT: dict[str, Domain] = {
    "latent": 64,
    "maps": (16, 32),
    "critic_steps": (3, 5),
    "learning_rate": FloatDistribution(5e-4, 2e-3, log=True),
    "batch_size": 32,
    "epochs": 20,
    "steps": (25, 10),
    "restarts": (2, 1),
    "rate": (10.0, 30.0),
}
"""Short trainings at ten times the paper's learning rate, and descents short enough to run an attack through."""

SMOKE: dict[str, Domain] = {
    "latent": 16,
    "maps": 8,
    "critic_steps": (2, 3),
    "learning_rate": (3e-3, 5e-3),
    "batch_size": 16,
    "epochs": 3,
    "steps": (10, 3),
    "restarts": (2, 1),
}
"""Takes seconds on a CPU; for trials and tests."""

STARTS = (
    {"spread": 128**-0.5, "steps": 200, "restarts": 10},  # recommended by its authors
    {"spread": 128**-0.5, "steps": 200, "restarts": 20},  # used in PuVAE's comparison
    {"latent": 64, "maps": 16, "critic_steps": 3, "learning_rate": 1e-3, "steps": 25, "restarts": 2, "rate": 30.0},
)
"""Settings that a search tries first if its space contains them; the last, from our short trainings, is in DEFAULT."""
