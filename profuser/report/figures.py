"""Draws the five pictures of a run's report, and the curves of several runs, from plain numbers; page.py and comparison.py read the
files.

Every picture is a matplotlib Figure on a canvas of its own (Agg), so that there is no global state and no display is needed.
All are 4.2 inches wide with text of 11 points, to stay legible when a phone shows them 350 pixels wide. They come in the light
and the dark colours of theme.py, and whatever a colour says is also said by a marker, a dash, a hatch or a number. The win
matrices follow Figure 1 of arXiv 2408.04998. A picture for which there is no data says so instead of staying empty.
"""

from __future__ import annotations

import itertools
import textwrap
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from operator import itemgetter
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from profuser.recipe.schedule import Mode
from profuser.report.intervals import Score
from profuser.report.metrics import Metrics, judges_of, value_of
from profuser.report.theme import Theme
from profuser.store.files import write_atomic
from profuser.text.display import visible
from profuser.train.metrics_log import REWARD

WIDTH_INCHES = 4.2

_MARKERS = "ov^<>P"
_KINDS = {"same_span": (0, ""), "shared_prefix": (4, "//"), "inside": (1, ".."), "skipped": (5, "xx")}
"""For every kind of position the index of its colour, and its hatch."""


@dataclass(frozen=True, slots=True)
class Model:
    """One model of the comparison.

    role: "source", "target" or "fused". The target before fusion is the "target", even if it is also a source.
    scores: its score for each skill, and for "mean".
    """

    name: str
    role: str
    scores: Mapping[str, Score]

    @property
    def label(self) -> str:
        """The model's name in a legend."""
        return f"{self.name} (target before)" if self.role == "target" else self.name


def _wrap(name: str, width: int, most: int = 3) -> str:
    """Breaks a name into at most so many lines. An underscore is shown as a space, so that a line can break there."""
    lines = textwrap.wrap(visible(name).replace("_", " "), width)
    return "\n".join(lines[:most]) + ("…" if len(lines) > most else "")


def _short(name: str, width: int) -> str:
    """Shortens a name to one line of this width. It is cut in the middle, because models' names differ at both ends."""
    name = visible(name)
    return name if len(name) <= width else f"{name[: width - width // 3 - 1]}…{name[-(width // 3) :]}"


def save_png(figure: Figure, path: Path) -> None:
    """Writes a picture as a PNG file."""
    write_atomic(path, _encoded(figure, format="png", dpi=190))


def to_svg(figure: Figure) -> bytes:
    """Returns a picture as an SVG. It is transparent, to take the page's background.

    It has no date, so that the same run gives the same file.
    """
    return _encoded(figure, format="svg", transparent=True, metadata={"Date": None})


def _encoded(figure: Figure, **options: Any) -> bytes:
    """Returns a picture in a file format. The salt makes the ids within an SVG the same every time."""
    file = BytesIO()
    with warnings.catch_warnings(), matplotlib.rc_context({"svg.hashsalt": "profuser"}):
        # The bundled font lacks Chinese, for instance. The tables beside the picture show every name.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(file, **options)
    figure.set_layout_engine("none")  # what was laid out once is not laid out again for another format
    return file.getvalue()


def _figure(height: float, ratios: Sequence[float] = (1,), sharex: bool = False) -> tuple[Figure, list[Axes]]:
    """Makes a figure with panels below one another, whose heights stand in these ratios. `height` is in inches."""
    figure = Figure(figsize=(WIDTH_INCHES, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(ratios), 1, squeeze=False, sharex=sharex, height_ratios=list(ratios))
    return figure, list(axes[:, 0])


def _note(text: str, theme: Theme) -> Figure:
    """Makes a picture that holds one sentence, for where there is nothing to draw."""
    figure, (axis,) = _figure(1.0)
    axis.axis("off")
    place = {"ha": "center", "va": "center", "transform": axis.transAxes}
    axis.text(0.5, 0.5, textwrap.fill(text, 44), color=theme.soft, **place)
    return figure


def draw_scores(models: Sequence[Model], skills: Sequence[str], theme: Theme) -> Figure:
    """Draws the share of correct answers of every model with its 95 % interval, in a row per skill.

    One of `skills` may be "mean".
    """
    rows = len(skills)
    pitch = max(0.32, min(0.14 * len(models) + 0.16, 13 / max(rows, 1)))  # inches per row
    with matplotlib.rc_context(theme.style):
        if not rows:
            return _note("No scores: the recipe has no held-out prompts.", theme)

        # The figure is as high as its rows and the lines of its legend, which has two names per row.
        names = [_wrap(model.label, 24 if len(model.label) <= 24 else 20) for model in models]
        legend = sum(max(name.count("\n") for name in pair) + 1 for pair in zip(names[::2], [*names[1::2], ""]))
        figure, (axis,) = _figure(rows * pitch + 1.05 + 0.19 * legend)

        # The models' points, which lie below one another within a row. The fused model's values are written at the right.
        styles = itertools.cycle(zip(theme.sources, _MARKERS))
        margin = {"transform": axis.get_yaxis_transform(), "color": theme.fused, "weight": "bold"}
        offsets = np.linspace(-0.34, 0.34, len(models)) if len(models) > 1 else [0.0]
        for model, name, offset in zip(models, names, offsets):
            if model.role == "fused":
                color, marker, size = theme.fused, "D", 7.0
            elif model.role == "target":
                color, marker, size = theme.text, "s", 5.5
            else:
                (color, marker), size = next(styles), 6.0
            points = [(row + offset, model.scores[skill]) for row, skill in enumerate(skills) if skill in model.scores]
            y = np.array([row for row, _ in points])
            value, low, high = (100 * np.array([score[i] for _, score in points]) for i in range(3))
            error = np.nan_to_num(np.maximum(np.stack([value - low, high - value]), 0))
            axis.errorbar(
                value, y, xerr=error, fmt=marker, color=color, ms=size, mec=theme.page, mew=0.5, clip_on=False,
                elinewidth=2.0 if model.role == "fused" else 1.2, label=name,
            )  # fmt: skip
            if model.role == "fused":
                for row, percent in zip(y - offset, value):
                    axis.text(1.03, row, f"{percent:.1f}" if percent == percent else "–", va="center", **margin)

        # Bands behind every other row, a line above the mean, the axes and the legend.
        for row in range(0, rows, 2):
            axis.axhspan(row - 0.5, row + 0.5, color=theme.band, lw=0, zorder=0)
        if skills[-1] == "mean" and rows > 1:
            axis.axhline(rows - 1.5, color=theme.text, lw=1.2)
        axis.set(xlim=(0, 100), ylim=(rows - 0.5, -0.5), xlabel="correct answers, % (95 % interval)")
        axis.set_yticks(range(rows), [_wrap(skill, 14) for skill in skills])
        axis.tick_params(axis="y", length=0)
        axis.grid(axis="x")
        axis.text(1.03, -0.55, "fused", va="bottom", **margin)
        figure.legend(
            loc="outside upper left", ncols=2, handlelength=1.2, handletextpad=0.4, columnspacing=1, borderpad=0
        )
        return figure


def _heat(
    axis: Axes, depth: np.ndarray, texts: Sequence[Sequence[str]], theme: Theme, size: float, top: float = 0
) -> None:
    """Draws a table of cells, each with a colour for its value in [0, 1] and with a text.

    A cell is one unit wide and high, and the first row begins at the height `top`. `size` is the size of the text in points.
    """
    rows, columns = depth.shape
    edges = np.arange(columns + 1), top + np.arange(rows + 1)
    axis.pcolormesh(*edges, depth, cmap=theme.heat_map, vmin=0, vmax=1, edgecolors=theme.page, linewidth=1.5)
    for (row, column), value in np.ndenumerate(depth):
        place = {"ha": "center", "va": "center", "color": theme.ink(value), "fontsize": size}
        axis.text(column + 0.5, top + row + 0.5, texts[row][column], **place)
    axis.set(xlim=(0, columns), ylim=(top + rows, 0))
    axis.spines[:].set_visible(False)
    axis.tick_params(length=0)


def draw_wins(wins: Mapping[str, Mapping[str, int]], sources: Sequence[str], by: str, theme: Theme) -> Figure:
    """Draws a win matrix: what share of each skill's examples every source wins. `by` is "Min-CE" or "vote"."""
    with matplotlib.rc_context(theme.style):
        if not any(sum(row.values()) for row in wins.values()):
            return _note(f"No wins by {by}: this run did not compare its sources that way.", theme)

        # The shares of every skill and, below them, of all skills together. "none" has a column where nobody won.
        columns = [*sources, *sorted({name for row in wins.values() for name in row} - set(sources))]
        counts = np.array([[row.get(name, 0) for name in columns] for row in wins.values()], dtype=float)
        labels = [_wrap(skill, 15, 2) for skill in wins]
        if len(labels) > 1:
            counts, labels = np.vstack([counts, counts.sum(0)]), [*labels, "all skills"]
        totals = counts.sum(1, keepdims=True)
        shares = np.divide(100 * counts, totals, out=np.zeros_like(counts), where=totals > 0)

        # The texts. Every skill says how many examples it has. Where the sources' names do not fit side by side, they are
        # slanted and the sign of percent moves into the title.
        count = "{}\nn = {:.0f}" if len(labels) < 9 else "{} ({:.0f})"
        labels = [count.format(*pair) for pair in zip(labels, totals[:, 0])]
        slanted = len(columns) > 4 or max(map(len, columns)) > 36 // len(columns)
        names = [_short(name, 20) for name in columns]
        turn: dict[str, Any] = {"rotation": 50, "ha": "left", "rotation_mode": "anchor"} if slanted else {}
        unit = "" if slanted else " %"
        texts = [[f"{share:.0f}{unit}" if total else "–" for share in row] for row, (total,) in zip(shares, totals)]

        # The cells, with a line above the row of all skills.
        pitch = 0.1 + 0.17 * max(label.count("\n") + 1 for label in labels)  # inches per row
        head = 0.6 + (0.065 * max(map(len, names)) if slanted else 0.2)
        figure, (axis,) = _figure(head + pitch * len(labels))
        _heat(axis, shares / 100, texts, theme, 11)
        if len(wins) > 1:
            axis.axhline(len(wins), color=theme.text, lw=1.8)
        axis.set_xticks(np.arange(len(columns)) + 0.5, names, **turn)
        axis.set_yticks(np.arange(len(labels)) + 0.5, labels)
        axis.xaxis.tick_top()
        axis.tick_params(length=0)
        figure.suptitle(f"Share of examples won by {by}{', %' if slanted else ''}", size=11.5, weight="bold")
        return figure


def draw_alignment(
    alignment: Mapping[str, Mapping[str, Mapping[str, Any]]], sources: Sequence[str], theme: Theme
) -> Figure:
    """Draws two panels with a row per mode and source: the shares of the kinds of position, and a histogram of the reliability.

    Beside the first stands the coverage. The histogram is a strip of ten cells.
    """
    # A group of rows for every mode that has any.
    groups = [
        (f"{mode.key} mode", [(source, of_mode[source]) for source in sources if source in of_mode])
        for mode in Mode
        if (of_mode := alignment.get(mode.key))
    ]
    with matplotlib.rc_context(theme.style):
        if not groups:
            return _note("No alignment: this run took no distributions from its sources.", theme)

        # Both panels have the same rows, with room for a heading above each group.
        heading = 0.75  # the height of a heading, in rows
        height = sum(heading + len(rows) for _, rows in groups)
        figure, (bars, strip) = _figure(0.7 * height + 2.0, (1, 1))
        ticks: dict[float, str] = {}
        top, bins = 0.0, 0
        for name, rows in groups:
            # The heading, and the names of the sources.
            place = {"y": top + heading / 2 + 0.08, "s": name, "va": "center", "color": theme.soft, "fontsize": 10}
            bars.text(0, **place)
            strip.text(0, **place)
            top += heading
            center = top + np.arange(len(rows)) + 0.5
            ticks |= {y: _short(source, 13) for y, (source, _) in zip(center, rows)}

            # The kinds of position as a stacked bar that ends at 100 %, and the coverage at its right.
            left = np.zeros(len(rows))
            for kind, (color, hatch) in _KINDS.items():
                width = 100 * np.array([row.get(kind, 0.0) for _, row in rows])
                style = {"color": theme.sources[color], "hatch": hatch, "edgecolor": theme.page, "lw": 0.5}
                label = kind.replace("_", " ") if name == groups[0][0] else None
                bars.barh(center, width, left=left, height=0.72, label=label, **style)
                left += width
            for y, (_, row) in zip(center, rows):
                bars.text(102, y, f"{100 * row['coverage']:.1f}", va="center", weight="bold")

            # The histogram. The colours are square roots of the shares, so that a bin of 2 % can be seen beside one of 95 %;
            # the numbers are the shares themselves.
            counts = np.array([row["reliability"] for _, row in rows], dtype=float)
            bins = counts.shape[1]
            totals = counts.sum(1, keepdims=True)
            shares = np.divide(100 * counts, totals, out=np.zeros_like(counts), where=totals > 0)
            texts = [["" if share == 0 else "<1" if share < 1 else f"{share:.0f}" for share in row] for row in shares]
            _heat(strip, np.sqrt(shares / 100), texts, theme, 8.5, top)
            top += len(rows)

        # Titles, axes and the legend.
        bars.set(xlim=(0, 100), xlabel="target positions, %", ylim=(height, 0))
        bars.text(102, heading / 2 + 0.08, "coverage", va="center", color=theme.soft, fontsize=10)
        bars.set_title("Kinds of position", loc="left", pad=44)
        bars.legend(loc="lower left", bbox_to_anchor=(0, 0.99), ncols=2, columnspacing=1, handlelength=1.5, borderpad=0)
        bars.spines["left"].set_visible(False)
        strip.set_xticks(np.linspace(0, bins, 6), [f"{tick:.1f}" for tick in np.linspace(0, 1, 6)])
        strip.set_xlabel("reliability of covered positions")
        strip.set_title("By reliability, %", loc="left")
        for axis in (bars, strip):
            axis.set_yticks(list(ticks), list(ticks.values()), fontsize=10)
            axis.tick_params(axis="y", length=0)
        return figure


def _series(lines: Sequence[Mapping[str, Any]], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns the steps and values of a quantity. A line without it is left out."""
    pairs = [(line["step"], value) for line in lines if (value := value_of(line, key)) is not None]
    steps, values = np.array(pairs, dtype=float).reshape(-1, 2).T
    return steps, values


def _window(lines: int) -> int:
    """Returns over how many of a stage's lines the moving mean goes; 1 leaves the values as they were logged."""
    return max(1, lines // 25)


def _plot_training(
    axis: Axes,
    lines: Sequence[Mapping[str, Any]],
    key: str,
    label: str,
    color: str,
    dash: str | tuple[int, tuple[float, ...]],
    *,
    as_logged: bool = True,
) -> None:
    """Plots one quantity of the training lines: the moving mean and, if `as_logged`, thinly the values themselves.

    Every stage is smoothed for itself, because the loss may jump between two stages. At most about 1000 points are drawn.
    """
    for _, stage in itertools.groupby(lines, key=itemgetter("stage")):
        steps, values = _series(list(stage), key)
        if not len(steps):
            continue
        window = _window(len(values))
        smooth = np.convolve(values, np.ones(window) / window, "valid")
        middle = np.convolve(steps, np.ones(window) / window, "valid")
        keep = slice(None, None, max(1, len(values) // 1000))
        if window > 1 and as_logged:
            axis.plot(steps[keep], values[keep], color=color, lw=0.6, alpha=0.3)
        dot = "o" if len(middle) == 1 else None  # a line through a single point would not be seen
        axis.plot(middle[keep], smooth[keep], color=color, ls=dash, lw=1.6, marker=dot, ms=5, label=label)


def _stage_spans(training: Sequence[Mapping[str, Any]]) -> list[tuple[int, int, int]]:
    """Returns every stage with the steps at which its curves begin and end.

    A line is the mean since the line before it, so that a stage begins where the last line of the stage before it stands.
    """
    stages = itertools.groupby(training, key=itemgetter("stage"))
    spans = [(stage, [line["step"] for line in lines]) for stage, lines in stages]
    return [(stage, spans[i - 1][1][-1] if i else steps[0], steps[-1]) for i, (stage, steps) in enumerate(spans)]


def _name_stages(axis: Axes, spans: Sequence[tuple[int, int, int]], theme: Theme) -> None:
    """Writes the stages' names at the top of a panel, if there are several."""
    place = {"transform": axis.get_xaxis_transform(), "ha": "center", "va": "top", "fontsize": 10}
    for stage, start, stop in spans if len(spans) > 1 else ():
        axis.text((start + stop) / 2, 0.97, f"stage {stage - spans[0][0] + 1}", color=theme.soft, **place)


def draw_curves(metrics: Metrics, theme: Theme) -> Figure:
    """Draws the loss, CE and KD over the optimizer steps, with the boundaries of the stages. A panel without data is left out."""
    # The panels that have data: for each its key in the validation lines, and its lines with key, label, colour and dash.
    training = metrics.training
    evals = [{"step": line["step"], **line["eval"]} for line in metrics.validation]
    blue, orange, *_ = theme.sources
    modes = (("inference", "inference", blue, "-"), ("training", "training", orange, "--"))
    panels = {
        "Loss as optimised": ("loss", [("loss", "loss", theme.fused, "-")]),
        "Cross-entropy, nats per token": ("ce", [(f"ce_{mode}", *style) for mode, *style in modes]),
        "KL to the source, nats per token": ("kd", [(f"kd_{mode}", *style) for mode, *style in modes]),
    }
    panels |= {f"Mean score by {_short(name, 40)}": (REWARD + name, []) for name in judges_of([metrics])}
    for title, (key, lines) in list(panels.items()):
        if not (len(_series(evals, key)[0]) or any(len(_series(training, name)[0]) for name, *_ in lines)):
            del panels[title]
    with matplotlib.rc_context(theme.style):
        if not panels:
            return _note("No curves: metrics.jsonl holds no training step.", theme)

        figure, axes = _figure(1.0 + 1.5 * len(panels), (1,) * len(panels), sharex=True)
        spans = _stage_spans(training)

        # The curves of training and validation, with a dashed line at each new stage.
        for axis, (title, (key, lines)) in zip(axes, panels.items()):
            for line in lines:
                _plot_training(axis, training, *line)
            steps, values = _series(evals, key)
            if key != "loss" and len(steps):
                axis.plot(steps, values, color=theme.text, marker="o", ms=4, lw=1.0, label="validation")
            axis.set_title(title, loc="left")
            axis.grid(axis="y")
            for _, start, _ in spans[1:]:
                axis.axvline(start, color=theme.soft, ls=(0, (4, 3)), lw=1.2)
            axis.margins(x=0.02, y=0.12)

        # The stages' names in the first panel, and one legend for all panels. "loss" needs none: it is alone in its panel.
        _name_stages(axes[0], spans, theme)
        axes[-1].set_xlabel("optimizer step")
        axes[-1].locator_params(axis="x", integer=True, min_n_ticks=1)
        handles = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels())}
        handles.pop("loss", None)
        if handles:
            figure.legend(
                handles.values(), handles.keys(), loc="outside upper left", ncols=3, handlelength=1.8, borderpad=0.2
            )
        return figure


def curves_caption(metrics: Metrics) -> str:
    """Returns what a reader of the curves must know, as far as it applies to this run."""
    parts, lines_per_stage = [], Counter(line["stage"] for line in metrics.training)
    if len(lines_per_stage) > 1:
        parts.append("Dashed: a new stage begins, with its own weights, so the loss does not compare across.")
    if any(_window(lines) > 1 for lines in lines_per_stage.values()):
        parts.append("Thin: as logged; thick: the moving mean.")
    if metrics.validation:
        parts.append("Validation at step 0 is the target before fusion.")
    if any(line["eval"].get("kd") for line in metrics.validation):
        parts.append("Its KL is to the Min-CE winner.")
    if judges_of([metrics]):
        parts.append("The judges score the target's answers to validation prompts, each in its own units.")
    return " ".join(parts)


_DASHES: tuple[str | tuple[int, tuple[float, ...]], ...] = ("-", (0, (5, 1.5)), (0, (1.5, 1)), (0, (6, 1.5, 1.5, 1.5)))


def draw_compared_curves(runs: Mapping[str, Metrics], theme: Theme) -> Figure:
    """Draws the loss, CE and KD of several runs over the optimizer steps, a line for each run and a panel for each quantity.

    The lines are moving means, and of validation the values themselves. A panel without data is left out.
    """
    # The quantities: for each a title, its key, and whether it stands in the validation lines.
    quantities = [("Loss as optimised", "loss", False)]
    for title, key in (("Cross-entropy", "ce"), ("KL to the source", "kd")):
        quantities += [
            (f"{title}, {mode.key} mode", f"{key}_{mode.key}", False) for mode in (Mode.INFERENCE, Mode.TRAINING)
        ]
        quantities += [(f"{title}, validation", key, True)]
    for name in judges_of(list(runs.values())):
        quantities += [(f"Mean score by {_short(name, 40)}, validation", REWARD + name, True)]
    looks = dict(zip(runs, zip(itertools.cycle((theme.fused, *theme.sources)), itertools.cycle(_DASHES))))
    with matplotlib.rc_context(theme.style):
        # The panels that have data, each with the lines of every run.
        panels = {}
        for title, key, validates in quantities:
            of_run = {
                name: [{**line, **line["eval"]} for line in metrics.validation] if validates else metrics.training
                for name, metrics in runs.items()
            }
            if any(len(_series(lines, key)[0]) for lines in of_run.values()):
                panels[title, key, validates] = of_run
        if not panels:
            return _note("No curves: no metrics.jsonl holds a training step.", theme)

        names = [_short(name, 44) for name in runs]
        columns = 2 if max(map(len, names)) <= 20 else 1
        figure, axes = _figure(
            0.8 + 0.2 * -(-len(names) // columns) + 1.5 * len(panels), (1,) * len(panels), sharex=True
        )
        spans = {name: _stage_spans(metrics.training) for name, metrics in runs.items()}
        alike = all(of_run == next(iter(spans.values())) for of_run in spans.values())
        for axis, ((title, key, validates), of_run) in zip(axes, panels.items()):
            for name, lines in of_run.items():
                color, dash = looks[name]
                if validates:
                    axis.plot(*_series(lines, key), color=color, ls=dash, marker="o", ms=3.5, lw=1.3)
                else:
                    _plot_training(axis, lines, key, name, color, dash, as_logged=False)
            # Where the stages begin: at the same steps in all runs, or else in each run's own colour.
            for name in list(runs)[:1] if alike else runs:
                for _, start, _ in spans[name][1:]:
                    axis.axvline(start, ls=(0, (4, 3)), color=theme.soft if alike else looks[name][0], lw=1.1)
            axis.set_title(title, loc="left")
            axis.grid(axis="y")
            axis.margins(x=0.02, y=0.12)
        if alike:
            _name_stages(axes[0], next(iter(spans.values())), theme)
        axes[-1].set_xlabel("optimizer step")
        axes[-1].locator_params(axis="x", integer=True, min_n_ticks=1)
        handles = [Line2D([], [], color=color, ls=dash, lw=1.8) for color, dash in looks.values()]
        figure.legend(handles, names, loc="outside upper left", ncols=columns, handlelength=2.6, borderpad=0.2)
        return figure


def compared_caption(runs: Sequence[Metrics]) -> str:
    """Returns what a reader of several runs' curves must know, as far as it applies to them."""
    spans = [_stage_spans(metrics.training) for metrics in runs]
    lines = [Counter(line["stage"] for line in metrics.training) for metrics in runs]
    parts = ["In nats per target token."]
    if any(_window(count) > 1 for of_run in lines for count in of_run.values()):
        parts.append("In training: moving means.")
    if any(len(of_run) > 1 for of_run in spans):
        alike = "" if all(of_run == spans[0] for of_run in spans) else " of the run in this colour"
        parts.append(f"Dashed: a new stage{alike} begins, with its own weights, so the loss does not compare across.")
    if any(metrics.validation for metrics in runs):
        parts.append("Validation at step 0 is the target before fusion; its KL is to the Min-CE winner.")
    return " ".join(parts)
