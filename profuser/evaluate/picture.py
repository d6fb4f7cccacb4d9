"""Draws the scores of a comparison with their intervals: the shares of right answers in one panel, every other kind in its own."""

from __future__ import annotations

import itertools
import math
import textwrap
from collections.abc import Collection, Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from profuser.evaluate.comparison import Compared
from profuser.report.figures import WIDTH_INCHES
from profuser.report.theme import Theme
from profuser.text.display import visible

MARKERS = "ov^<>P"
INCHES_PER_POINT = 0.15


def draw(compared: Sequence[Compared], models: Sequence[str], fused: Collection[str], theme: Theme) -> Figure:
    """Draws every column of a comparison as a row of points, one for each model.

    Args:
        fused: the models whose points stand out.
    """
    by_axis: dict[str, list[Compared]] = {}
    for column in compared:
        by_axis.setdefault("share" if column.is_share else column.kind, []).append(column)
    panels = list(by_axis.values())
    pitch = max(0.34, INCHES_PER_POINT * len(models) + 0.14)
    with matplotlib.rc_context(theme.style):
        heights = [len(panel) * pitch + 0.55 for panel in panels]
        figure = Figure(
            figsize=(WIDTH_INCHES * 1.3, sum(heights) + 0.2 * math.ceil(len(models) / 2)), layout="constrained"
        )
        FigureCanvasAgg(figure)
        axes = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0]
        looks = dict(zip(models, _looks(models, fused, theme)))
        for axis, panel in zip(axes, panels):
            _panel(axis, panel, looks, theme)
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(
            handles, labels, loc="outside upper left", ncols=2, handletextpad=0.4, columnspacing=1, borderpad=0
        )
        return figure


Look = tuple[str, str, float]
"""A colour, a marker and its size."""


def _looks(models: Sequence[str], fused: Collection[str], theme: Theme) -> list[Look]:
    others = itertools.cycle(zip(theme.sources, MARKERS))
    return [(theme.fused, "D", 7.0) if model in fused else (*next(others), 6.0) for model in models]


def _panel(axis: Axes, panel: Sequence[Compared], looks: dict[str, Look], theme: Theme) -> None:
    factor = 100 if panel[0].is_share else 1
    offsets = np.linspace(-0.32, 0.32, len(looks)) if len(looks) > 1 else [0.0]
    for (model, (color, marker, size)), offset in zip(looks.items(), offsets):
        value, low, high = (factor * np.array([column.scores[model][i] for column in panel]) for i in range(3))
        error = np.nan_to_num(np.maximum(np.stack([value - low, high - value]), 0))
        label = textwrap.shorten(visible(model), 34, placeholder="…") or "…"
        axis.errorbar(
            value, np.arange(len(panel)) + offset, xerr=error, fmt=marker, color=color, ms=size, mec=theme.page, mew=0.5,
            clip_on=False, elinewidth=1.4, label=label,
        )  # fmt: skip
    for row in range(0, len(panel), 2):
        axis.axhspan(row - 0.5, row + 0.5, color=theme.band, lw=0, zorder=0)
    for row, column in enumerate(panel):
        if row and column.overall:  # a line above the score of the tasks before it
            axis.axhline(row - 0.5, color=theme.text, lw=1.2, zorder=1)
    names = ["\n".join(textwrap.wrap(visible(column.name).replace("_", " "), 18)[:3]) for column in panel]
    axis.set_yticks(range(len(panel)), names)
    axis.set_ylim(len(panel) - 0.5, -0.5)
    axis.tick_params(axis="y", length=0)
    axis.grid(axis="x")
    if panel[0].is_share:
        axis.set(xlim=(0, 100), xlabel="%, more is better (95 % interval)")
    else:
        kind = visible(panel[0].kind).removesuffix(",none").replace("_", " ")
        axis.set_xlabel(f"{kind}, {'more' if panel[0].higher else 'less'} is better (95 % interval)")
