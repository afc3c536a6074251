"""Named spaces of GMVAE: knob -> domain, grid or value; other knobs keep their default."""

from optuna.distributions import FloatDistribution, IntDistribution

from spaces.domain import Domain

NEVER = 1e9
"""A threshold that never rejects."""
TAU_ENC = (0.5, 1.0, 3.0, 10.0, NEVER)
TAU_DEC = (2.0, 3.0, 5.0, 10.0, NEVER)

PAPER: dict[str, Domain] = {
    "alpha": (0.45, 4.5, 45.0, 450.0),
    "latent_variance": (1 / 300, 1 / 3000, 1 / 30_000),
    "tau_enc": TAU_ENC,
    "tau_dec": TAU_DEC,
    "reclassify": (False, True),
}
"""MNIST and COIL-100, supervised: 12 trainings, 600 candidates. Alpha and COIL-100's smaller noise are not stated; a
variance in proportion to 1 / latent dimensions (inferred) is 1/30000 there."""

PAPER_SVHN: dict[str, Domain] = {**PAPER, "latent": 32, "latent_variance": (1 / 960, 1 / 9600, 1 / 96_000)}
"""SVHN: one-hot means padded to 32 dimensions; the noise is smaller in proportion (inferred)."""

PAPER_SEMI: dict[str, Domain] = {**PAPER, "labels_per_class": 100}
"""MNIST with 100 labels per class; for SVHN add latent=32."""

PAPER_VARIABLE: dict[str, Domain] = {**PAPER, "variable_entropy": True, "latent_variance": 1 / 3000}
"""Fig. 5: MNIST with the encoder's own variance, "keeping all other parameters same"."""

WIDE: dict[str, Domain] = {
    "alpha": FloatDistribution(0.1, 1000.0, log=True),
    "latent_variance": FloatDistribution(1e-5, 0.1, log=True),
    "latent": (0, 128),
    "maps": IntDistribution(8, 64, log=True),
    "dense": IntDistribution(32, 512, log=True),
    "learning_rate": FloatDistribution(1e-4, 1e-2, log=True),
    "batch_size": (32, 64, 128),
    "tau_enc": TAU_ENC,
    "tau_dec": TAU_DEC,
    "reclassify": (False, True),
}
"""All knobs that may matter, including the architecture and hence the latency."""

DEFAULT: dict[str, Domain] = {
    "alpha": FloatDistribution(0.5, 100.0, log=True),
    "latent_variance": FloatDistribution(1e-4, 0.03, log=True),
    "maps": (8, 16),
    "learning_rate": FloatDistribution(1e-3, 4e-3, log=True),
    "batch_size": 32,
    "epochs": 20,
    "tau_enc": TAU_ENC,
    "tau_dec": TAU_DEC,
}
"""Range in which short trainings already classify; no reclassification (hundreds of decoder passes per image)."""

SMOKE: dict[str, Domain] = {
    "alpha": (4.5, 30.0),
    "maps": 8,
    "dense": (32, 64),
    "learning_rate": 3e-3,
    "batch_size": 32,
    "epochs": 3,
    "tau_enc": (1.0, 10.0),
    "tau_dec": (3.0, NEVER),
}
"""Takes seconds on a CPU; for trials and tests."""

STARTS = ({"alpha": 4.5, "latent_variance": 1 / 3000, "tau_enc": 1.0, "tau_dec": 3.0},)
"""Settings that a search tries first if its space contains them: the paper's noise and thresholds."""
