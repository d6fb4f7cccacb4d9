"""Turns result files of the benchmarks into Markdown tables, and writes one picture per file beside it.

    python -m pytest benchmarks/ --benchmark-only --benchmark-json=RESULT.json
    python -m benchmarks.report RESULT.json... [--write docs/results.md]

Without --write the tables are printed. With it they replace what stands between the comments of the page that bear the file's
name. Benchmarks that are not timed against a floor are left out; bench_align.py prints a summary of its own.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from pathlib import Path

from matplotlib.figure import Figure

from benchmarks.measure import PACKAGES
from benchmarks.peers import CROSS_ENTROPY, TEACHERS
from profuser.errors import DataError
from profuser.experiments.page import write_section

OURS, OTHERS = "#0072b2", "#8c8c8c"
OURS_FOR = {CROSS_ENTROPY: "profuser-no-source"} | dict.fromkeys(TEACHERS, "profuser-teacher")
"""Which of ours the time of another is divided by; "profuser" for what is not here."""
COLUMNS = ("implementation", "computes", "median ms", "p20–p80 ms", "× ours", "× floor", "peak MiB", "error of dW")


def read(path: Path) -> tuple[dict[str, list[dict]], list[str]]:
    """The extra_info of every implementation by group, in the order in which they ran, and why others did not run.

    Raises:
        DataError: the file is not a result of these benchmarks.
    """
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        timed = [b for b in result["benchmarks"] if "times_floor" in b["extra_info"]]
    except (OSError, ValueError, KeyError) as error:
        raise DataError(
            f"RESULT must be a file of --benchmark-json, got {path} ({error}); run the benchmarks"
        ) from error
    if not timed:
        raise DataError(f"RESULT must hold benchmarks with a floor, got none in {path}; run bench_fused_loss.py")
    groups: dict[str, list[dict]] = {}
    for each in timed:
        groups.setdefault(each["group"], []).append(each["extra_info"])
    return groups, result.get("skipped", [])


def cells(info: dict, ours_ms: float | None) -> list[str]:
    def text(value, form):
        return "" if value is None else format(value, form)

    return [
        info["implementation"],
        info["computes"],
        text(info["median_ms"], ".1f"),
        f"{info['p20_ms']:.1f}–{info['p80_ms']:.1f}",
        text(ours_ms and info["median_ms"] / ours_ms, ".2f"),
        text(info.get("times_floor"), ".2f"),
        text(info.get("peak_mib"), ".0f"),
        text(info.get("dweight_error"), ".1e"),
    ]


def table(rows: list[dict]) -> str:
    medians = {info["implementation"]: info["median_ms"] for info in rows}

    def ours_ms(info):
        """Our time for the same loss, or for the loss with all sources where there is none for the same."""
        same = OURS_FOR.get(info["computes"], "profuser")
        return medians.get(same, medians.get("profuser"))

    lines = [COLUMNS, ("---", "---", *["---:"] * (len(COLUMNS) - 2)), *(cells(info, ours_ms(info)) for info in rows)]
    kept = [column for column in zip(*lines) if any(column[2:])]
    return "\n".join(f"| {' | '.join(line)} |" for line in zip(*kept))


def describe(rows: list[dict], skipped: list[str]) -> str:
    first = rows[0]
    machine = first["gpu"] or f"{first['cpu']}, {first['threads']} of {first['cpus']} threads"
    versions = ", ".join(f"{name} {first[name]}" for name in PACKAGES if first.get(name))
    loads = [info["load_1_min"] for info in rows]
    return "\n".join(
        [
            f"Command: `{first['command']}`; {machine}, {first['dtype'].removeprefix('torch.')}; load {min(loads)} to "
            f"{max(loads)}; Python {first['python']}, {versions}; commit {first['commit']}.",
            "× ours: over profuser's median for the same loss, no source where it is cross-entropy, all sources otherwise; "
            "× floor: over the time of the matrix products alone, or of the step without a loss, between the same rounds.",
            *([f"Not run: {'; '.join(skipped)}."] if skipped else []),
        ]
    )


def section(groups: dict[str, list[dict]], skipped: list[str]) -> str:
    rows = list(itertools.chain.from_iterable(groups.values()))
    tables = [f"**{group[0].upper()}{group[1:]}**\n\n{table(rows)}" for group, rows in groups.items()]
    return "\n\n".join([describe(rows, skipped), *tables])


def draw(groups: dict[str, list[dict]]) -> Figure:
    """Draws the time relative to the floor and the peak memory, with one bar per implementation.

    An axis is logarithmic where its longest bar is ten times its shortest or more. Otherwise it begins at 0.
    """
    labels, bars = [], []
    for group, rows in groups.items():
        labels += [group, *(info["implementation"] for info in rows), ""]
        bars += [None, *rows, None]
    figure = Figure(figsize=(11, 0.8 + 0.2 * len(bars)), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for axis, key, title in zip(
        axes, ("times_floor", "peak_mib"), ("time / time of the GEMMs alone", "peak memory, MiB")
    ):
        values = {y: info[key] for y, info in enumerate(bars) if info and info.get(key)}
        for y, value in values.items():
            is_ours = bars[y]["implementation"].startswith("profuser")
            axis.barh(y, value, color=OURS if is_ours else OTHERS)
            axis.annotate(f" {value:,.2f}" if value < 10 else f" {value:,.0f}", (value, y), va="center", fontsize=7)
        spread = max(values.values(), default=1) / min(values.values(), default=1)
        axis.set(xscale="log" if spread >= 10 else "linear", title=title)
        axis.margins(x=0.15)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_yticks(range(len(labels)), labels, fontsize=7)
    for tick, label in zip(axes[0].get_yticklabels(), labels):
        tick.set_fontweight("bold" if label in groups else "normal")
    axes[0].tick_params(axis="y", length=0)
    axes[0].set_ylim(len(bars) - 1, -1)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "results", nargs="+", type=Path, metavar="RESULT.json", help="a file that --benchmark-json has written"
    )
    parser.add_argument("--write", type=Path, metavar="PAGE", help="the Markdown page into which the tables are put")
    args = parser.parse_args()
    try:
        for path in args.results:
            groups, skipped = read(path)
            text = section(groups, skipped)
            if args.write is None:
                print(text)
            else:
                write_section(args.write, path.stem, text)
            draw(groups).savefig(path.with_suffix(".png"), dpi=100)
    except DataError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
