"""The five pictures of a run's report, drawn from plain numbers (profuser/report.py reads the files).

Every picture is a matplotlib Figure of its own on the Agg canvas: no pyplot, no global state, no display. All are 5
inches wide with 10-point text, so that they stay legible when a phone shows them 360 pixels wide, and white, so that
the page can show them on a light card in dark mode. Colours are Okabe and Ito's, which readers with colour-vision
deficiencies can tell apart; a marker, dash, hatch or number always says the same. The win matrices are Figure 1 of
arXiv 2408.04998. A picture without data says so instead of staying empty.
"""

from __future__ import annotations

import itertools
import math
import textwrap
import unicodedata
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

BLACK, ORANGE, SKY, GREEN, BLUE, VERMILLION, PURPLE, GREY = (
    "#000000", "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#CC79A7", "#767676",
)  # fmt: skip
WIDTH_INCHES = 5.0
_SOURCE_STYLES = list(zip((BLUE, ORANGE, GREEN, PURPLE, SKY, GREY), "ov^<>P"))
_KIND_STYLES = {
    "same_span": (BLUE, ""),
    "shared_prefix": (SKY, "//"),
    "inside": (ORANGE, ".."),
    "skipped": ("#D9D9D9", "xx"),
}
_STYLE = {
    "font.size": 10, "axes.titlesize": 11, "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True,
    "axes.grid": False, "grid.color": "#DDDDDD", "hatch.linewidth": 0.5, "legend.frameon": False, "legend.fontsize": 9,
    "text.parse_math": False,  # a "$" in a skill's name is a dollar sign
}  # fmt: skip


class Score(NamedTuple):
    """A share of correct answers in [0, 1] with its 95 % interval; low and high are NaN where the count is unknown."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Model:
    """One row of the comparison: `role` is "source", "target" (before fusion, also when it is a source) or "fused"."""

    name: str
    role: str
    scores: Mapping[str, Score]  # per skill, and "mean"

    @property
    def label(self) -> str:
        return f"{self.name} (target before)" if self.role == "target" else self.name


def visible(text: str) -> str:
    """`text` with control characters, direction overrides and lone surrogates written out, as `\\x1b` or `\\u202e`."""
    return "".join(ascii(c)[1:-1] if _is_hidden(c) else c for c in text)


def _is_hidden(character: str) -> bool:
    if character in "\n\t" or " " <= character <= "~":
        return False
    directions = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}
    return (
        unicodedata.category(character) in {"Cc", "Cs", "Zl", "Zp"}
        or unicodedata.bidirectional(character) in directions
        or character == "\ufeff"
    )


def _wrap(name: str, width: int) -> str:
    lines = textwrap.wrap(visible(name).replace("_", " "), width)  # an underscore reads as a space and breaks like one
    return "\n".join(lines[:3]) + ("…" if len(lines) > 3 else "")


def _ink(depth: float) -> str:
    """Black or white, whichever reads better on the map "Blues" at `depth` in [0, 1]."""
    linear = np.array(matplotlib.colormaps["Blues"](float(depth))[:3]) ** 2.2
    return "black" if linear @ (0.2126, 0.7152, 0.0722) > 0.179 else "white"  # the luminance of equal contrast (WCAG)


def _figure(height: float, ratios: Sequence[float] = (1,), sharex: bool = False) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(WIDTH_INCHES, height), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(ratios), 1, squeeze=False, sharex=sharex, height_ratios=list(ratios))
    return figure, list(axes[:, 0])


def _save(figure: Figure, path: Path) -> None:
    with warnings.catch_warnings():
        # The bundled font has no Chinese, for instance; the tables beside the picture carry every name.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(path, dpi=160)


def _note(path: Path, text: str) -> None:
    figure, (axis,) = _figure(1.0)
    axis.axis("off")
    axis.text(0.5, 0.5, textwrap.fill(text, 60), ha="center", va="center", color="#333333", transform=axis.transAxes)
    _save(figure, path)


def draw_scores(path: Path, models: Sequence[Model], skills: Sequence[str]) -> None:
    """Accuracy of every model per skill (a row each, "mean" among them where given) with its 95 % interval."""
    rows = len(skills)
    if not rows:
        return _note(path, "No scores: the recipe has no held-out prompts.")
    pitch = max(0.32, min(0.13 * len(models) + 0.16, 13 / rows))  # inches a row
    with matplotlib.rc_context(_STYLE):
        figure, (axis,) = _figure(rows * pitch + 1.0 + 0.2 * math.ceil(len(models) / 2))
        styles = itertools.cycle(_SOURCE_STYLES)
        margin = {"transform": axis.get_yaxis_transform(), "color": VERMILLION, "weight": "bold"}
        offsets = np.linspace(-0.36, 0.36, len(models)) if len(models) > 1 else [0.0]
        for model, offset in zip(models, offsets):
            if model.role == "fused":
                color, marker, size = VERMILLION, "D", 6.5
            elif model.role == "target":
                color, marker, size = BLACK, "s", 5.0
            else:
                (color, marker), size = next(styles), 5.5
            points = [(row + offset, model.scores[skill]) for row, skill in enumerate(skills) if skill in model.scores]
            y = np.array([row for row, _ in points])
            value, low, high = (100 * np.array([score[i] for _, score in points]) for i in range(3))
            error = np.nan_to_num(np.maximum(np.stack([value - low, high - value]), 0))
            axis.errorbar(
                value, y, xerr=error, fmt=marker, color=color, ms=size, mec="white", mew=0.5, clip_on=False,
                elinewidth=1.6 if model.role == "fused" else 1.0, label=_wrap(model.label, 28),
            )  # fmt: skip
            if model.role == "fused":
                for row, percent in zip(y - offset, value):
                    axis.text(1.02, row, f"{percent:.1f}" if percent == percent else "–", va="center", **margin)
        for row in range(0, rows, 2):
            axis.axhspan(row - 0.5, row + 0.5, color="#F4F4F4", lw=0, zorder=0)
        if skills[-1] == "mean" and rows > 1:
            axis.axhline(rows - 1.5, color="black", lw=1.2)
        axis.set(xlim=(0, 100), ylim=(rows - 0.5, -0.5), xlabel="correct answers, % (95 % interval)")
        axis.set_yticks(range(rows), [_wrap(skill, 20) for skill in skills])
        axis.tick_params(axis="y", length=0)
        axis.grid(axis="x")
        axis.text(1.02, -0.55, "fused", va="bottom", **margin)
        figure.legend(loc="outside upper left", ncols=2)
        _save(figure, path)


def draw_wins(path: Path, wins: Mapping[str, Mapping[str, int]], sources: Sequence[str], by: str) -> None:
    """Heat map of a win matrix: the share of each skill's examples that a source wins, `by` Min-CE or vote."""
    with matplotlib.rc_context(_STYLE):
        if not any(sum(row.values()) for row in wins.values()):
            return _note(path, f"No wins by {by}: this run did not compare its sources that way.")
        columns = [*sources, *sorted({name for row in wins.values() for name in row} - set(sources))]
        counts = np.array([[row.get(name, 0) for name in columns] for row in wins.values()], dtype=float)
        labels = [_wrap(skill, 20) for skill in wins]
        if len(labels) > 1:
            counts, labels = np.vstack([counts, counts.sum(0)]), [*labels, "all skills"]
        totals = counts.sum(1, keepdims=True)
        shares = np.divide(100 * counts, totals, out=np.zeros_like(counts), where=totals > 0)
        figure, (axis,) = _figure(1.3 + 0.42 * len(labels))
        axis.imshow(shares / 100, cmap="Blues", vmin=0, vmax=1, aspect="auto")
        for (row, column), share in np.ndenumerate(shares):
            text = f"{share:.0f} %" if totals[row] else "–"
            axis.text(column, row, text, ha="center", va="center", color=_ink(share / 100))
        if len(wins) > 1:
            axis.axhline(len(wins) - 0.5, color="black", lw=1.5)
        slanted = len(columns) > 5
        names = [_wrap(name, 24 if slanted else 12) for name in columns]
        turn = {"rotation": 40, "ha": "left", "rotation_mode": "anchor"} if slanted else {}
        count = "{}\nn = {:.0f}" if len(labels) < 9 else "{} ({:.0f})"
        axis.set_xticks(range(len(columns)), names, **turn)
        axis.set_yticks(range(len(labels)), [count.format(*pair) for pair in zip(labels, totals[:, 0])])
        axis.xaxis.tick_top()
        axis.tick_params(length=0)
        axis.spines[:].set_visible(False)
        axis.set_title(f"Share of examples won by {by}", loc="left", pad=10)
        _save(figure, path)


def draw_alignment(
    path: Path, alignment: Mapping[str, Mapping[str, Mapping[str, Any]]], sources: Sequence[str]
) -> None:
    """Per mode and source: positions by kind with the coverage, and the histogram of reliability as a strip of bins."""
    names = {"train": "training mode", "infer": "inference mode"}
    rows = [(mode, source, alignment[mode][source]) for mode in names if mode in alignment
            for source in sources if source in alignment[mode]]  # fmt: skip
    with matplotlib.rc_context(_STYLE):
        if not rows:
            return _note(path, "No alignment: this run took no distributions from its sources.")
        labels = [f"{_wrap(source, 18)}\n{names[mode]}" for mode, source, _ in rows]
        height = 0.46 * len(rows)
        figure, (bars, strip) = _figure(2 * height + 2.4, (1, 1))
        left = np.zeros(len(rows))
        for kind, (color, hatch) in _KIND_STYLES.items():
            width = 100 * np.array([row.get(kind, 0.0) for _, _, row in rows])
            style = {"color": color, "hatch": hatch, "edgecolor": "white", "lw": 0.5, "label": kind.replace("_", " ")}
            bars.barh(range(len(rows)), width, left=left, height=0.66, **style)
            left += width
        for row, (_, _, numbers) in enumerate(rows):
            bars.text(101, row, f"{100 * numbers['coverage']:.1f} %", va="center", weight="bold")
        bars.set(xlim=(0, 100), xlabel="target positions, %", ylim=(len(rows) - 0.5, -0.5))
        bars.set_title("Kinds of position, and coverage (right)", loc="left", pad=24)
        bars.legend(loc="lower left", bbox_to_anchor=(0, 0.98), ncols=4, columnspacing=1, handlelength=1.5, borderpad=0)

        counts = np.array([row["reliability"] for _, _, row in rows], dtype=float)
        totals = counts.sum(1, keepdims=True)
        shares = np.divide(100 * counts, totals, out=np.zeros_like(counts), where=totals > 0)
        bins = counts.shape[1]
        # The square root keeps a bin of 2 % visible beside one of 95 %; the numbers are the shares themselves.
        depth = np.sqrt(shares / 100)
        strip.imshow(depth, cmap="Blues", vmin=0, vmax=1, aspect="auto", extent=(0, bins, len(rows) - 0.5, -0.5))
        for (row, column), share in np.ndenumerate(shares):
            text = "" if share == 0 else "<1" if share < 1 else f"{share:.0f}"
            strip.text(column + 0.5, row, text, ha="center", va="center", fontsize=9, color=_ink(depth[row, column]))
        ticks = np.linspace(0, bins, 6)
        strip.set_xticks(ticks, [f"{tick / bins:.1f}" for tick in ticks])
        strip.set_xlabel("reliability of a position")
        strip.set_title("Covered positions by reliability, %", loc="left")
        for axis in (bars, strip):
            axis.set_yticks(range(len(rows)), labels, fontsize=9)
            axis.tick_params(axis="y", length=0)
        _save(figure, path)


def _series(lines: Sequence[Mapping[str, Any]], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of `key`; null, absent and exactly zero (a mode without tokens adds 0) are left out."""
    pairs = [(line["step"], line[key]) for line in lines if line.get(key)]
    steps, values = np.array(pairs, dtype=float).reshape(-1, 2).T
    return steps, values


def _plot_training(axis: Axes, lines: Sequence[Mapping[str, Any]], key: str, label: str, color: str, dash: str) -> None:
    for _, stage in itertools.groupby(lines, key=itemgetter("stage")):  # no smoothing over a stage boundary
        steps, values = _series(list(stage), key)
        if not len(steps):
            continue
        window = max(1, len(values) // 25)
        smooth = np.convolve(values, np.ones(window) / window, "valid")
        middle = np.convolve(steps, np.ones(window) / window, "valid")
        keep = slice(None, None, max(1, len(values) // 1000))
        if window > 1:
            axis.plot(steps[keep], values[keep], color=color, lw=0.6, alpha=0.3)
        axis.plot(middle[keep], smooth[keep], color=color, ls=dash, lw=1.6, label=label)


def draw_curves(path: Path, training: Sequence[Mapping[str, Any]], validation: Sequence[Mapping[str, Any]]) -> None:
    """Loss, CE and KD over the optimizer steps, the stages' boundaries marked; a panel without a line is left out."""
    evals = [{"step": line["step"], **line["eval"]} for line in validation]
    modes = (("infer", "inference mode", BLUE, "-"), ("train", "training mode", ORANGE, "--"))
    panels = {
        "Loss as optimised": ("loss", [("loss", "loss", VERMILLION, "-")]),
        "Cross-entropy, nats per target token": ("ce", [(f"ce_{mode}", *style) for mode, *style in modes]),
        "KL to the source, nats per target token": ("kd", [(f"kd_{mode}", *style) for mode, *style in modes]),
    }
    for title, (key, lines) in list(panels.items()):
        if not (len(_series(evals, key)[0]) or any(len(_series(training, name)[0]) for name, *_ in lines)):
            del panels[title]
    with matplotlib.rc_context(_STYLE):
        if not panels:
            return _note(path, "No curves: metrics.jsonl holds no training step.")
        figure, axes = _figure(0.8 + 1.9 * len(panels), (1,) * len(panels), sharex=True)
        stages = itertools.groupby(training, key=itemgetter("stage"))
        spans = [(stage, [line["step"] for line in lines]) for stage, lines in stages]
        # A line is the mean since the one before it, so a stage begins where the last line of the one before it stands.
        starts = [(stage, spans[i - 1][1][-1] if i else steps[0]) for i, (stage, steps) in enumerate(spans)]
        for axis, (title, (key, lines)) in zip(axes, panels.items()):
            for line in lines:
                _plot_training(axis, training, *line)
            steps, values = _series(evals, key)
            if key != "loss" and len(steps):
                axis.plot(steps, values, color=BLACK, marker="o", ms=4, lw=1.0, label="validation")
            axis.set_title(title, loc="left")
            axis.grid(axis="y")
            for _, start in starts[1:]:
                axis.axvline(start, color=GREY, ls=(0, (4, 3)), lw=1.2)
            axis.margins(x=0.02, y=0.12)
        if len(starts) > 1:
            first = min((stage for stage, _ in starts if isinstance(stage, int)), default=0)
            for stage, start in starts:
                name = f"stage {stage - first + 1}" if isinstance(stage, int) else visible(str(stage))
                place = {"transform": axes[0].get_xaxis_transform(), "va": "bottom"}
                axes[0].text(start, 0.02, f" {name}", color="#444444", fontsize=9, **place)
        axes[-1].set_xlabel("optimizer step")
        handles = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels())}
        handles.pop("loss", None)  # alone in its panel
        if handles:
            figure.legend(handles.values(), handles.keys(), loc="outside upper left", ncols=3, handlelength=1.8)
        _save(figure, path)
