"""Words of the closing summary: numbers with their units, left out where there are none."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

Row = tuple[str, str]


def number(r: Mapping[str, Any], key: str, spec: str, unit: str = "") -> str:
    """r[key] with its unit; empty without one, "not finite" for NaN and infinity."""
    value = r.get(key)
    if value is None:
        return ""
    value = float(value)
    return f"{value:{spec}}{unit}" if math.isfinite(value) else f"not finite{unit}"


def percent(r: Mapping[str, Any], key: str, unit: str = "", digits: int = 1) -> str:
    """The share r[key] in percent."""
    value = r.get(key)
    if value is None:
        return ""
    return number({key: 100 * float(value)}, key, f".{digits}f", f" %{unit}")


def seconds(value: Any) -> str:
    """A short time in us, ms or s."""
    if value is None:
        return ""
    value = float(value)
    if not math.isfinite(value):
        return "not finite s"
    if value < 1e-3:
        return f"{1e6 * value:.1f} us"
    return f"{1e3 * value:.2f} ms" if value < 1 else f"{value:.2f} s"


def duration(value: Any) -> str:
    """A long time in seconds, minutes and hours."""
    if value is None:
        return ""
    value = float(value)
    if not math.isfinite(value):
        return "not finite s"
    if value < 60:
        return f"{value:.1f} s"
    minutes, seconds = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    tail = f"{minutes} min {seconds:02d} s"
    return f"{hours} h {tail}" if hours else tail


def text(r: Mapping[str, Any], key: str) -> str:
    """r[key] on one line."""
    value = r.get(key)
    return "" if value is None else " ".join(str(value).split())


def join(parts: Iterable[str]) -> str:
    """The parts that say something, with commas."""
    return ", ".join(part for part in parts if part)


def rows(all_rows: Iterable[Row]) -> list[Row]:
    """The rows that say something."""
    return [(label, value) for label, value in all_rows if value]
