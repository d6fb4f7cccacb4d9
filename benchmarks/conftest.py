"""The benchmarks' options, and the table of bench_align.py that is printed at the end.

benchmarks/ is a package, so that this file and tests/conftest.py can be loaded in one run.
"""

from __future__ import annotations

import os
import time

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the times are those of one core

MS_PER_SEQUENCE = pytest.StashKey[dict[str, dict[str, float]]]()  # by pair, and then by what was measured
BEGIN = pytest.StashKey[float]()
skipped: dict[str, None] = {}  # why tests were skipped, each reason once, in order


def pytest_addoption(parser):
    parser.addoption(
        "--tokenizers",
        metavar="DIR",
        default=os.environ.get("PROFUSER_TOKENIZERS") or None,
        help="a folder with one folder per real tokenizer, for bench_align.py (default: $PROFUSER_TOKENIZERS, or else the "
        "tokenizers of the bundled demo are used)",
    )
    parser.addoption(
        "--headline",
        action="store_true",
        help="run only the shape 8192 x 128 x 32000, whose dense implementations take 13 GB and minutes, and no other",
    )
    parser.addoption(
        "--seconds",
        type=float,
        default=float("inf"),
        help="start no benchmark after so many seconds, so that a result is written in time",
    )


def pytest_configure(config):
    config.stash[MS_PER_SEQUENCE] = {}
    config.stash[BEGIN] = time.monotonic()


def pytest_runtest_setup(item):
    limit = item.config.getoption("--seconds")
    if time.monotonic() - item.config.stash[BEGIN] > limit:
        pytest.skip(f"not started: the {limit:g} s of --seconds are over")


def pytest_runtest_logreport(report):
    if report.skipped and isinstance(report.longrepr, tuple):
        skipped[report.longrepr[2].removeprefix("Skipped: ")] = None


def pytest_benchmark_update_json(config, benchmarks, output_json):
    output_json["skipped"] = list(skipped)


def pytest_benchmark_update_machine_info(config, machine_info):
    del machine_info["node"]


@pytest.fixture
def ms_per_sequence(request):
    return request.config.stash[MS_PER_SEQUENCE]


def pytest_terminal_summary(terminalreporter, config):
    found = config.stash[MS_PER_SEQUENCE]
    if not found:
        return
    parts = ("ranges", "align", "C++", "C++ x2", "cold", "oracle", "our DTW", "plain DTW", "target text", "source text")
    terminalreporter.section("alignment, ms per sequence of 2048 target tokens")
    header = "".join(f"{part:>12}" for part in ("total", *parts))
    terminalreporter.write_line(f"{'target <- source':24}{header}")
    for pair, ms in found.items():
        # The total is all that alignment adds to a text that both sides have encoded.
        total = ms["ranges"] + ms["align"] if {"ranges", "align"} <= ms.keys() else None
        cells = [total, *map(ms.get, parts)]
        line = "".join(f"{'-' if value is None else f'{value:.2f}':>12}" for value in cells)
        terminalreporter.write_line(f"{pair:24}{line}")
    terminalreporter.write_line(
        "total = ranges + align, with full caches and one thread; the last two columns are the encodings of the text with spans"
    )
