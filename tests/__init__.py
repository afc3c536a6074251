"""The tests. The package sets its environment before any of its modules loads torch."""

import search  # noqa: F401
