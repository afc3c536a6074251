"""Named spaces of the identity: there is nothing to search, so each is its one setting."""

from spaces.domain import Domain

PAPER: dict[str, Domain] = {}
"""The row `no defense` of every paper's tables."""

WIDE: dict[str, Domain] = {}
"""As PAPER."""

DEFAULT: dict[str, Domain] = {}
"""As PAPER."""

SMOKE: dict[str, Domain] = {}
"""As PAPER."""
