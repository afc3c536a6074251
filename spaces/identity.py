"""Named spaces of the identity, which has nothing to search: each holds its only setting."""

from spaces.domain import Domain

PAPER: dict[str, Domain] = {}
"""The row `no defense` in every paper's tables."""

WIDE: dict[str, Domain] = {}
"""Same as PAPER."""

DEFAULT: dict[str, Domain] = {}
"""Same as PAPER."""

SMOKE: dict[str, Domain] = {}
"""Same as PAPER."""
