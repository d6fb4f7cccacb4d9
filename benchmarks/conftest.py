"""The benchmarks' options, and a line per pair of tokenizers when they are done.

benchmarks/ is a package so that this file and tests/conftest.py can be loaded in one run.
"""

from __future__ import annotations

import os
import time

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # times are of one core

MS_PER_SEQUENCE = pytest.StashKey[dict[str, dict[str, float]]]()  # by pair, then by what was measured
BEGIN = pytest.StashKey[float]()
skipped: dict[str, None] = {}  # reasons, in order


def pytest_addoption(parser):
    parser.addoption(
        "--tokenizers",
        metavar="DIR",
        default=os.environ.get("PROFUSER_TOKENIZERS") or None,
        help="folder of real tokenizers, one folder each, for bench_align.py (default: $PROFUSER_TOKENIZERS, else the "
        "bundled demo's tokenizers)",
    )
    parser.addoption(
        "--headline",
        action="store_true",
        help="only 8192 x 128 x 32000 instead of the table of shapes: its dense arms take 13 GB and minutes",
    )
    parser.addoption(
        "--seconds",
        type=float,
        default=float("inf"),
        help="start no benchmark later than this, so that a result is written",
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
        # Everything that alignment adds to a text that both sides have encoded.
        total = ms["ranges"] + ms["align"] if {"ranges", "align"} <= ms.keys() else None
        cells = [total, *map(ms.get, parts)]
        line = "".join(f"{'-' if value is None else f'{value:.2f}':>12}" for value in cells)
        terminalreporter.write_line(f"{pair:24}{line}")
    terminalreporter.write_line(
        "total = ranges + align, caches warm, one thread; the encodings of the text, spans included, are the last two"
    )
