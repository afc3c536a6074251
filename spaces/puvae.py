"""Named spaces of PuVAE: knob -> domain, grid or value; other knobs keep their default."""

from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from spaces.domain import Domain

LAMBDAS = (0.01, 0.1, 1.0, 10.0, 100.0, 1000.0)
SIGMA_EPS = (0.0, 0.01, 0.1, 1.0, 10.0, 100.0)

PAPER: dict[str, Domain] = {
    "lambda_rc": LAMBDAS,
    "lambda_kl": LAMBDAS,
    "lambda_ce": LAMBDAS,
    "sigma_eps": SIGMA_EPS,
}
"""Exactly the paper's grid: 216 trainings, 1296 candidates. Source: IEEE Access 2019, sections IV-A and IV-B."""

WIDE: dict[str, Domain] = {
    "lambda_rc": FloatDistribution(1e-3, 1e3, log=True),
    "lambda_kl": FloatDistribution(1e-3, 1e3, log=True),
    "lambda_ce": FloatDistribution(1e-3, 1e3, log=True),
    "conv_maps": IntDistribution(4, 64, log=True),
    "decoder_maps": IntDistribution(8, 64, log=True),
    "dense": IntDistribution(128, 2048, log=True),
    "latent": IntDistribution(8, 128, log=True),
    "label_injection": CategoricalDistribution(("dense", "planes")),
    "learning_rate": FloatDistribution(1e-4, 1e-2, log=True),
    "sigma_eps": SIGMA_EPS,
}
"""All knobs that may matter, including the architecture and hence the latency."""

DEFAULT: dict[str, Domain] = {
    "lambda_rc": FloatDistribution(0.1, 10.0, log=True),
    "lambda_kl": FloatDistribution(0.1, 10.0, log=True),
    "lambda_ce": FloatDistribution(1.0, 100.0, log=True),
    "conv_maps": (8, 16),
    "learning_rate": 2e-3,
    "batch_size": 32,
    "sigma_eps": SIGMA_EPS,
}
"""Range in which short trainings already purify: the reconstruction weight suffices to keep the digit's shape."""

SMOKE: dict[str, Domain] = {
    "lambda_rc": (0.1, 1.0),
    "lambda_kl": (0.1, 1.0),
    "lambda_ce": 10.0,
    "conv_maps": (4, 8),
    "decoder_maps": 8,
    "dense": 64,
    "latent": 8,
    "batch_size": 32,
    "epochs": 3,
    "sigma_eps": SIGMA_EPS,
}
"""Takes seconds on a CPU; for trials and tests."""

STARTS = (
    {"lambda_rc": 0.01, "lambda_kl": 0.1, "lambda_ce": 10.0, "sigma_eps": 0.1},  # the paper's best
    {"lambda_rc": 1.0, "lambda_kl": 2.0, "lambda_ce": 10.0, "sigma_eps": 0.1},  # the best of our short trainings
)
"""Settings that a search tries first if its space contains them."""
