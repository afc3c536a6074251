"""Named spaces of Defense-VAE: knob -> domain, grid or value; other knobs keep their default."""

from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from spaces.domain import Domain

PAPER: dict[str, Domain] = {
    "variant": "plain",
    "attacks": "fgsm+rand+cw",
    "eps_set": "paper",
    "kl_weight": 1.0,
    "last_layer": ("sigmoid", "bn_relu"),
    "bn_eval": ("running", "batch"),
    "epochs": 5,
}
"""Defense-VAE in Table 1; the last layer is the code's or Table 6's, the batch norms' mode at test is not stated."""

PAPER_REC: dict[str, Domain] = {**PAPER, "variant": "rec", "last_layer": "sigmoid", "rec_share": 0.5, "epochs": 10}
"""Defense-VAE-REC in Table 1: five epochs of the VAE, then five of the classifier (not stated)."""

PAPER_E2E: dict[str, Domain] = {
    **PAPER_REC,
    "variant": "e2e",
    "lambda_ce": (0.1, 1.0, 10.0, 100.0),
    "rec_share": 1 / 3,
    "e2e_share": 1 / 3,
    "epochs": 15,
}
"""Defense-VAE-E2E in Table 1: five epochs per phase; neither these nor lambda are stated."""

PAPER_SCRATCH: dict[str, Domain] = {**PAPER_E2E, "variant": "scratch"}
"""The first approach of section 4.1, "almost equally effective": all 15 epochs (not stated) end to end from scratch."""

PAPER_UNTRAINED: dict[str, Domain] = {
    **PAPER_REC,
    "attacks": ("fgsm+rand+cw", "rand+cw", "fgsm+cw", "fgsm+rand", "fgsm+rand+deepfool"),
}
"""Table 2: each attack left out in turn, and DeepFool instead of CW. Its last column is REC of Table 1."""

CODE: dict[str, Domain] = {"variant": "plain", "eps_set": "code", "kl_weight": 0.0, "bn_eval": "batch", "epochs": 5}
"""The authors' published code: one training."""

WIDE: dict[str, Domain] = {
    "variant": CategoricalDistribution(("plain", "rec", "e2e")),
    "attacks": CategoricalDistribution(("fgsm+rand+cw", "fgsm+rand", "fgsm+cw", "rand+cw", "fgsm+rand+cw+clean")),
    "eps_set": CategoricalDistribution(("paper", "code")),
    "kl_weight": FloatDistribution(1e-4, 10.0, log=True),
    "lambda_ce": FloatDistribution(0.1, 1000.0, log=True),
    "rec_share": FloatDistribution(0.1, 0.35),
    "e2e_share": FloatDistribution(0.1, 0.35),
    "maps": IntDistribution(8, 96, log=True),
    "latent": IntDistribution(8, 256, log=True),
    "deeper": (0, 1, 2),
    "last_layer": CategoricalDistribution(("sigmoid", "bn_relu")),
    "learning_rate": FloatDistribution(1e-4, 1e-2, log=True),
    "rec_learning_rate": FloatDistribution(1e-4, 1e-2, log=True),
    "batch_size": (16, 32, 64, 128),
    "epochs": 10,
}
"""All knobs that may matter, including the architecture and hence the latency; without transductive batch norms."""

DEFAULT: dict[str, Domain] = {
    "variant": ("plain", "rec", "e2e"),
    "attacks": ("fgsm+rand+cw", "fgsm+rand+cw+clean"),
    "cw_steps": 10,
    "epoch_share": 0.1,
    "kl_weight": FloatDistribution(1e-4, 1.0, log=True),
    "lambda_ce": FloatDistribution(0.1, 10.0, log=True),
    "maps": (8, 16),
    "learning_rate": FloatDistribution(1e-3, 1e-2, log=True),
    "batch_size": 32,
    "epochs": 10,
}
"""Short trainings: all epochs together show each pair once, and CW takes a tenth of its steps."""

SMOKE: dict[str, Domain] = {
    "variant": ("plain", "rec"),
    "cw_steps": 2,
    "epoch_share": 0.2,
    "kl_weight": (0.01, 0.1),
    "maps": (4, 8),
    "latent": 16,
    "learning_rate": 5e-3,
    "batch_size": 32,
    "epochs": 3,
}
"""Takes seconds on a CPU; for trials and tests."""

STARTS = (
    {"variant": "plain", "attacks": "fgsm+rand+cw", "kl_weight": 1.0, "learning_rate": 5e-4},  # the paper's
    # The best of our short trainings on digits, for clean and attacked images.
    {"variant": "plain", "attacks": "fgsm+rand+cw+clean", "kl_weight": 1e-3, "learning_rate": 5e-3},
)
"""Settings that a search tries first if its space contains them."""
