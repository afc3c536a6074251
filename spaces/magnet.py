"""Named spaces of MagNet: knob -> domain, grid or value; other knobs keep their default."""

from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from spaces.domain import Domain

LIMITS = (0.95, 0.99, 0.995, 0.999, 0.9995, 1e6)
"""1 - false-positive rate of a detector; the last value never rejects."""

PAPER: dict[str, Domain] = {
    "noise": (0.025, 0.1),
    "pooling": ("average", "max"),
    "reformer": ("I", "II"),
    "detector_1": (0.995, 0.999),
    "detector_2": (0.995, 0.999),
}
"""The settings of the paper: for MNIST (noise 0.1, I, 0.999), for CIFAR-10 (0.025, II, 0.995)."""

WIDE: dict[str, Domain] = {
    "maps": IntDistribution(1, 64, log=True),
    "pooling": CategoricalDistribution(("average", "max")),
    "noise": FloatDistribution(0.0, 0.5),
    "learning_rate": FloatDistribution(1e-4, 1e-1, log=True),
    "batch_size": (32, 64, 128, 256),
    "reformer": ("I", "II"),
    "detector_1": LIMITS,
    "detector_2": LIMITS,
}
"""All knobs that may matter, including the architecture and hence the latency."""

DEFAULT: dict[str, Domain] = {
    "maps": IntDistribution(3, 32, log=True),
    "noise": FloatDistribution(0.0, 0.4),
    "learning_rate": FloatDistribution(3e-3, 3e-2, log=True),
    "batch_size": 64,
    "epochs": 20,
    "detector_1": LIMITS,
    "detector_2": LIMITS,
}
"""Range in which short trainings already reconstruct: higher learning rates and smaller batches than for 100 epochs."""

SMOKE: dict[str, Domain] = {
    "maps": (8, 16),
    "noise": (0.1, 0.3),
    "learning_rate": 2e-2,
    "batch_size": 16,
    "epochs": 3,
    "reformer": ("I", "II"),
    "detector_1": (0.99, 1e6),
    "detector_2": (0.99, 1e6),
}
"""Takes seconds on a CPU; for trials and tests."""

STARTS = ({"maps": 3, "pooling": "average", "noise": 0.1, "reformer": "I", "detector_1": 0.999, "detector_2": 0.999},)
"""Settings that a search tries first if its space contains them: the paper's on MNIST."""
