"""The one environment of the pages that are written from templates: reports, tables, model cards."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import jinja2

from search.formatting import duration, milliseconds, percent, spoken_device, spoken_value


def render(template: Path, **values: Any) -> str:
    """Return a page; a name that a template uses and is not given is an error.

    Args:
        template: a file NAME.j2; what NAME ends with says how values are escaped, and `include` looks beside it.
    """
    return _environment(template.parent).get_template(template.name).render(**values)


@cache
def _environment(folder: Path) -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder),
        # Names and reasons of failures are not ours, and may hold markup; in markdown there is nothing to escape.
        autoescape=lambda name: not (name or "").endswith(".md.j2"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(percent=percent, ms=milliseconds, duration=duration, value=spoken_value)
    environment.filters.update(device=spoken_device, range=lambda ends: " to ".join(percent(e, unit="") for e in ends))
    return environment
