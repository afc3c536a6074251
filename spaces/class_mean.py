"""Named spaces of the class means, which have nothing to search: each holds its only setting."""

from spaces.domain import Domain

PAPER: dict[str, Domain] = {}
"""What a collapsed PuVAE purifies to, beside it."""

WIDE: dict[str, Domain] = {}
"""Same as PAPER."""

DEFAULT: dict[str, Domain] = {}
"""Same as PAPER."""

SMOKE: dict[str, Domain] = {}
"""Same as PAPER."""
