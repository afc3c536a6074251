"""Renders the Jinja templates of reports, tables and model cards in one environment."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import jinja2

from search.formatting import duration, milliseconds, percent, spoken_device, spoken_eps, spoken_value


def render(template: Path, **values: Any) -> str:
    """Return the rendered page; a missing value is an error.

    Args:
        template: a file NAME.j2. The suffix of NAME determines escaping; `include` looks in the same folder.
    """
    return _environment(template.parent).get_template(template.name).render(**values)


@cache
def _environment(folder: Path) -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder),
        # Names and failure reasons come from outside and may contain markup; markdown needs no escaping.
        autoescape=lambda name: not (name or "").endswith(".md.j2"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.policies["json.dumps_kwargs"] = {"sort_keys": True, "separators": (",", ":")}
    environment.filters.update(percent=percent, ms=milliseconds, duration=duration, value=spoken_value)
    environment.filters.update(
        device=spoken_device, eps=spoken_eps, range=lambda ends: " to ".join(percent(e, unit="") for e in ends)
    )
    return environment
