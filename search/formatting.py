"""Formats figures for people."""

from __future__ import annotations

import math

from attacks.threat import ThreatModel
from spaces.domain import Scalar, written


def percent(fraction: float | None, unit: str = "\u00a0%", absent: str = "–") -> str:
    """Return a fraction in percent, with one decimal."""
    if fraction is None or not math.isfinite(fraction):
        return absent
    return f"{100 * fraction:.1f}{unit}"


def points(fraction: float | None) -> str:
    """Return a fraction in percent without the percent sign, for a column that has it in its heading."""
    return percent(fraction, unit="", absent="-")


def milliseconds(value: float | None) -> str:
    if value is None or not math.isfinite(value):
        return "–"
    return f"{value:.3g}\u00a0ms" if value < 1000 else f"{value:,.0f}\u00a0ms"


def duration(seconds: float | None) -> str:
    if seconds is None or not math.isfinite(seconds):
        return "–"
    if seconds < 60:
        return f"{seconds:.0f}\u00a0s"
    minutes = round(seconds / 60)
    return f"{minutes}\u00a0min" if minutes < 60 else f"{minutes // 60}\u00a0h {minutes % 60:02d}\u00a0min"


def counted(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'s' if number != 1 else ''}"


def spoken_device(device: str) -> str:
    """Return the description of a device, with `thread` in the singular or plural."""
    return device.replace(" 1 thread(s)", " 1 thread").replace("thread(s)", "threads")


def spoken_value(value: Scalar | None) -> str:
    if value is None:
        return "–"
    if not isinstance(value, float):
        return str(value)
    return f"{value:.0f}" if 1000 <= abs(value) < 1e6 else brief(value)


def spoken_eps(eps: float | None) -> str:
    """Return eps as papers write it: as a decimal, such as 0.3, or a fraction, such as 8/255."""
    return "of the task" if eps is None else written(eps)


def spoken_threat(threat: ThreatModel) -> str:
    """Return a threat model, such as `white-box, Linf eps 8/255`."""
    return f"{threat.knowledge}, {threat.norm} eps {spoken_eps(threat.eps)}"


def of_255(eps: float) -> str:
    """Return the question whether an eps was meant in steps of 8-bit pixels, for the end of a message; else nothing."""
    return f"; did you mean {eps:g}/255?" if 1 < eps <= 255 and eps == round(eps) else ""


def brief(value: Scalar) -> str:
    """Return the value of a knob; a float has three significant digits, or as many as tell it from a whole number."""
    if not isinstance(value, float) or value.is_integer():
        return f"{value:.3g}" if isinstance(value, float) else str(value)
    texts = (f"{value:.{digits}g}" for digits in range(3, 18))
    return next((text for text in texts if not float(text).is_integer()), str(value))
