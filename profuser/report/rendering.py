"""Turns values into HTML: fills the templates of this folder, formats numbers, and embeds pictures."""

from __future__ import annotations

import base64
import functools
import math
import re
from pathlib import Path
from typing import Any

import jinja2
import yaml
from markupsafe import Markup, escape
from matplotlib.figure import Figure

from profuser.report import figures
from profuser.report.intervals import Score
from profuser.report.metrics import Change, OnePoint
from profuser.text.display import visible

MAX_TEXT = 2000  # how many characters of a prompt or response a page shows
MAX_SETTING = 400  # and of a recipe's value


def render(template: str, **values: Any) -> str:
    """Fills the template of a page with these values."""
    return _environment().get_template(template).render(values)


@functools.cache
def _environment() -> jinja2.Environment:
    """Returns what knows the templates of this folder and their filters."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        # Everything that the page prints goes through here. Whatever a model wrote, it cannot hide or reorder other text.
        finalize=lambda value: visible(value) if type(value) is str else value,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "percent": _percent,
        "points": _points,
        "signed": _signed,
        "duration": duration,
        "shorten": _shorten,
        "change": _change,
        "setting": _setting,
        "breakable": _breakable,
    }
    return environment


def embedded(light: Figure, dark: Figure) -> dict[str, Markup]:
    """Returns a picture in both themes for a page, as SVG in base64."""
    pictures = {"light": figures.to_svg(light), "dark": figures.to_svg(dark)}
    return {theme: Markup(base64.b64encode(svg).decode()) for theme, svg in pictures.items()}


def _percent(value: float | None, digits: int = 1) -> str:
    """Formats a share in percent, without the sign; a dash stands for a missing value."""
    return "–" if value is None or math.isnan(value) else f"{100 * value:.{digits}f}"


def _signed(value: float | None) -> str:
    """Formats a number between -1 and 1 with a true minus sign; a dash stands for a missing value."""
    return "–" if value is None else f"{round(value, 2) + 0.0:.2f}".replace("-", "−")  # adding 0.0 turns -0.0 into 0.0


def _points(change: Score) -> str:
    """Formats a difference as `+3.1 points (95 % interval -0.4 to +6.6)`, with a true minus sign."""
    value, low, high = (round(100 * part, 1) + 0.0 for part in change)  # adding 0.0 turns -0.0 into 0.0
    text = f"{value:+.1f} points"
    if not math.isnan(low):
        text += f" (95 % interval {low:+.1f} to {high:+.1f})"
    return text.replace("-", "−")


def duration(seconds: float) -> str:
    """Formats a duration in seconds, minutes or hours."""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def _shorten(text: str) -> str:
    """Cuts a text that is too long for the page, and says how much was cut off."""
    return text if len(text) <= MAX_TEXT else f"{text[:MAX_TEXT]}… ({len(text) - MAX_TEXT:,} more characters)"


def _nats(value: float) -> str:
    """Formats a loss. That of a stage in which nothing was left to learn may be a little below 0, which is shown as 0."""
    return f"{round(value, 3) + 0.0:.3f}"


def _change(value: Any) -> str:
    """Formats a cell of the table of stages."""
    if isinstance(value, Change):
        return f"{_nats(value.first)} → {_nats(value.last)}"
    if isinstance(value, OnePoint):
        return f"{_nats(value.value)} (one point)"
    return "–" if value is None else value if isinstance(value, str) else f"{value:.3g}"


def _breakable(name: str) -> Markup:
    """Returns a name as HTML in which a line may break after an underscore, a slash or a dot."""
    return Markup(re.sub(r"([_/.])", r"\1<wbr>", str(escape(visible(name)))))


def _setting(value: Any) -> str:
    """Formats a value of a recipe as YAML in one line; a dash stands for null, and for a key that is missing."""
    if value is None:
        return "–"
    text = (
        value
        if isinstance(value, str)
        else yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=math.inf)
    )
    text = text.removesuffix("\n").removesuffix("\n...")
    return text if len(text) <= MAX_SETTING else f"{text[:MAX_SETTING]}… ({len(text) - MAX_SETTING:,} more characters)"
