"""How long alignment takes per sequence of 2048 target tokens at k = 10, over 1.2 MB of Python's help and library sources.

    pytest benchmarks/bench_align.py --benchmark-only [--tokenizers DIR]

With a folder of real tokenizers (--tokenizers or PROFUSER_TOKENIZERS) it takes the pairs of align_inputs.REAL_PAIRS, and
without one two tokenizers of the demo. The two engines, and the two implementations of time warping, are checked against
each other before they are timed. The times in pytest-benchmark's table are those of one pass over the corpus, or of one
sequence for what is plain Python. The lines at the end, and extra_info, give the median in ms per sequence.
"""

from __future__ import annotations

import ctypes
import functools
import gc
import multiprocessing
import os
import platform
import statistics
import time
from pathlib import Path

import numpy as np
import pytest

from benchmarks.align_inputs import (
    BATCH,
    BUNDLED_PAIRS,
    LARGEST_PAIR,
    REAL_PAIRS,
    SEQUENCE_TOKENS,
    K,
    make_case,
    pair_name,
    tokenizer,
)
from benchmarks.measure import resident_mib, surroundings
from benchmarks.plain_dtw import plain_dtw
from profuser.alignment.align import PlainText
from profuser.alignment.engine import CppByteAligner
from profuser.alignment.fusellm import code_points, dtw
from profuser.alignment.spans import ENGINE, _align

pytestmark = pytest.mark.skipif(_align is None, reason="the C++ extension is not built")

MEMORY_SEQUENCES = 192  # three times the largest batch


def pytest_generate_tests(metafunc):
    bundled = metafunc.config.getoption("--tokenizers") is None
    pairs = BUNDLED_PAIRS if bundled else REAL_PAIRS
    ids = functools.partial(map, lambda pair: pair_name(pair).replace(" <- ", "_from_"))
    if "case" in metafunc.fixturenames:
        metafunc.parametrize("case", pairs, ids=ids(pairs), indirect=True, scope="module")
    elif "tokenizer_pair" in metafunc.fixturenames:
        pairs = pairs if bundled else (*pairs, LARGEST_PAIR)
        metafunc.parametrize("tokenizer_pair", pairs, ids=ids(pairs))
    elif "memory_pair" in metafunc.fixturenames:
        metafunc.parametrize("memory_pair", pairs[:1], ids=ids(pairs[:1]))


@pytest.fixture(scope="module")
def case(request):
    """The case of one pair, for which both engines have given the same result on two sequences."""
    case = make_case(request.param, request.config.getoption("--tokenizers"))
    part = case.part(0, 2)
    for found, true in zip(case.aligner.align_batch(*part), case.oracle.align_batch(*part), strict=True):
        check_same(found, true)
    return case


def check_same(found, true):
    for field in ("kind", "source_position", "offsets", "skip_reason"):
        np.testing.assert_array_equal(getattr(found, field), getattr(true, field), err_msg=field)
    for field in ("tail", "reliability", "logprobs"):
        left, right = getattr(found, field), getattr(true, field)
        left, right = (np.exp(left), np.exp(right)) if field == "logprobs" else (left, right)
        np.testing.assert_allclose(left, right, atol=1e-6, err_msg=field)
    # Entries of equal mass may come in any order, and the last of them may differ.
    for t in np.unique(np.searchsorted(found.offsets, np.flatnonzero(found.ids != true.ids), side="right") - 1):
        part = slice(found.offsets[t], found.offsets[t + 1])
        above = np.exp(found.logprobs[part]) > np.exp(found.logprobs[part][-1]) + 1e-6
        assert set(found.ids[part][above]) == set(true.ids[part][above]), t


def describe(benchmark, pair, **info):
    benchmark.group = f"align {pair}"
    benchmark.extra_info.update(surroundings(), engine=ENGINE, threads=1, load_1_min=round(os.getloadavg()[0], 2), k=K)
    benchmark.extra_info.update(info)


def measure(benchmark, case, table, name, function, *, sequences=None, rounds=5, warmup_rounds=1, **info):
    """Times `function`, which goes over `sequences` sequences of the case (over all unless given); returns its result."""
    sequences = sequences or len(case.raw)
    size = sum(map(len, case.raw[:sequences]))
    describe(benchmark, case.pair, sequences=sequences, bytes=size, sequences_skipped=case.skipped, **info)
    result = benchmark.pedantic(function, rounds=rounds, warmup_rounds=warmup_rounds)
    ms = benchmark.stats.stats.median / sequences * 1e3
    benchmark.extra_info["ms_per_sequence"] = round(ms, 4)
    table.setdefault(case.pair, {})[name] = ms
    return result


@pytest.mark.parametrize("kind", ["tokenizer", "with_spans"])
@pytest.mark.parametrize("side", ["target", "source"])
def test_encoding(benchmark, case, side, kind, ms_per_sequence):
    """What the text costs under any alignment: the tokenizer alone, and with a check of every token's bytes."""
    text = getattr(case, side)
    backend = text.tokenizer.backend_tokenizer

    def tokenise():
        for part in case.texts:
            _ = backend.encode(part, add_special_tokens=False).ids

    def with_spans():
        for part in case.texts:
            text.encode(part)

    name, function = (f"{side} text", with_spans) if kind == "with_spans" else (f"{side} tokenizer", tokenise)
    tokens = sum(len(e.input_ids) for e in (case.encoded if side == "target" else case.own))
    measure(benchmark, case, ms_per_sequence, name, function, rounds=3, tokens=tokens)


def test_ranges_needed(benchmark, case, ms_per_sequence):
    """The part of the work that precedes a capture: which prefix ranges to ask the source for."""

    def ranges():
        for n in range(len(case.raw)):
            case.needed(n)

    count = sum(len(capture.ranges.rows) for capture in case.captures)
    measure(benchmark, case, ms_per_sequence, "ranges", ranges, ranges=count)


def test_align_warm(benchmark, case, ms_per_sequence):
    """The whole way from encodings and captures to results, with full caches."""
    info = {"batch": BATCH, "cached_candidates": case.aligner._engine.cached}
    measure(benchmark, case, ms_per_sequence, "align", lambda: case.align_all(case.aligner), **info)


@pytest.mark.parametrize("threads", [1, 2])
def test_cpp_alone(benchmark, case, threads, ms_per_sequence):
    engine, batches = case.aligner._engine, case.batches

    def run(threads):
        for batch in batches:
            engine.align(batch, threads)

    name = "C++" if threads == 1 else "C++ x2"
    info = {"rounds": 9, "threads": threads, "batch": BATCH}
    measure(benchmark, case, ms_per_sequence, name, functools.partial(run, threads), **info)
    if threads == 2:  # one and two threads take turns, so that a busy machine is equally busy for both
        pairs = [(seconds(run, 1), seconds(run, 2)) for _ in range(9)]
        speed_ups = [one_clock / two_clock for (one_clock, _), (two_clock, _) in pairs]
        # This is near 2 where both cores were free. Near 1, other programs had the second core, and the speed-up says nothing.
        cores = [cpu / clock for _, (clock, cpu) in pairs]
        benchmark.extra_info["speed_up"] = round(statistics.median(speed_ups), 3)
        benchmark.extra_info["cores_given_to_two_threads"] = round(statistics.median(cores), 2)


def test_align_cold(benchmark, case, ms_per_sequence):
    """The first pass, with empty caches. How long the aligner's tables took is recorded beside it."""
    began = time.perf_counter()
    aligner = CppByteAligner(case.target, case.source, top_k=K)
    info = {"rounds": 1, "warmup_rounds": 0, "aligner_seconds": round(time.perf_counter() - began, 3)}
    measure(benchmark, case, ms_per_sequence, "cold", lambda: case.align_all(aligner), **info)
    benchmark.extra_info["cached_candidates"] = aligner._engine.cached


def test_oracle(benchmark, case, ms_per_sequence):
    """The engine in plain Python, on one sequence, with full caches."""
    (response,), (encoded,), (capture,) = case.part(0, 1)
    run = functools.partial(case.oracle.align, response, encoded, capture)
    measure(benchmark, case, ms_per_sequence, "oracle", run, sequences=1, engine="Python")


@pytest.mark.parametrize("implementation", ["ours", "plain"])
def test_time_warping(benchmark, case, implementation, ms_per_sequence):
    """FuseLLM's matching of one sequence: time warping of token strings without word prefixes, at Levenshtein cost."""
    source, target = (
        [token.replace("Ġ", "").replace("▁", "") for token in side.tokenizer.convert_ids_to_tokens(encoded.input_ids)]
        for side, encoded in ((case.source, case.own[0]), (case.target, case.encoded[0]))
    )
    info = {"sequences": 1, "target_tokens": len(target), "source_tokens": len(source)}
    if implementation == "plain":
        info |= {"rounds": 1, "warmup_rounds": 0, "engine": "Python"}
        path = measure(benchmark, case, ms_per_sequence, "plain DTW", lambda: plain_dtw(source, target), **info)
        assert path == our_dtw(source, target)
        return
    part = source[:400], target[:400]
    assert our_dtw(*part) == plain_dtw(*part)
    codes = (*code_points(source), *code_points(target))
    measure(benchmark, case, ms_per_sequence, "our DTW", lambda: dtw(*codes), **info)


def our_dtw(source, target):
    return [tuple(pair) for pair in np.stack(dtw(*code_points(source), *code_points(target)), axis=1).tolist()]


def test_tables(benchmark, tokenizer_pair, request):
    """What a pair needs before its first text: exact bytes of both vocabularies, the candidates' table and the byte order."""
    tokenizers = [tokenizer(name, request.config.getoption("--tokenizers")) for name in tokenizer_pair]
    parts = {}

    def build():
        times = [time.perf_counter()]
        target, source = PlainText(tokenizers[0]), PlainText(tokenizers[1])
        times.append(time.perf_counter())
        CppByteAligner(target, source, top_k=K)
        times.append(time.perf_counter())
        _ = source.byte_order
        times.append(time.perf_counter())
        names = ("token_bytes_seconds", "candidates_seconds", "order_seconds")
        parts.update({name: round(b - a, 3) for name, a, b in zip(names, times, times[1:])})

    sizes = {"target_vocabulary": len(tokenizers[0]), "source_vocabulary": len(tokenizers[1])}
    describe(benchmark, pair_name(tokenizer_pair), **sizes)
    benchmark.pedantic(build, rounds=3)
    benchmark.extra_info.update(parts)


@pytest.mark.skipif(platform.system() != "Linux", reason="reads /proc")
@pytest.mark.parametrize("batch", [4, 16, 64])
def test_peak_memory(benchmark, memory_pair, batch, request):
    """How many MiB alignment with full caches adds to the resident set of a process of its own.

    This is measured for one batch, and for a pass over the sequences in such batches.
    """
    describe(benchmark, pair_name(memory_pair), batch=batch, sequence_tokens=SEQUENCE_TOKENS)
    folder = request.config.getoption("--tokenizers")
    benchmark.pedantic(lambda: benchmark.extra_info.update(measure_peak(memory_pair, folder, batch)), rounds=1)


def measure_peak(pair, folder, batch) -> dict[str, float]:
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=put_peaks, args=(pair, folder, batch, queue))
    process.start()
    peaks = queue.get(timeout=600)
    process.join()
    return peaks


def put_peaks(pair, folder, batch, queue):
    case = make_case(pair, folder, sequences=MEMORY_SEQUENCES)
    without = trimmed_rss_mib()
    aligner = CppByteAligner(case.target, case.source, top_k=K)
    case.align_all(aligner, batch=1)
    peaks = {"learnt_mib": trimmed_rss_mib() - without}
    for name, run in (
        ("peak_one_batch_mib", lambda: aligner.align_batch(*case.part(0, batch))),
        ("peak_pass_mib", lambda: case.align_all(aligner, batch)),
    ):
        before = trimmed_rss_mib()
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # resets the high-water mark
        run()
        peaks[name] = resident_mib("VmHWM") - before
    queue.put({name: round(peak, 1) for name, peak in peaks.items()} | {"sequences": len(case.raw)})


def trimmed_rss_mib():
    """The resident set, after glibc has returned its freed memory. Otherwise a peak within that memory would not be seen."""
    gc.collect()
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)
    return resident_mib("VmRSS")


def seconds(function, *args) -> tuple[float, float]:
    """How many seconds the call takes by the clock, and how many of CPU time on all cores together."""
    clock, cpu = time.perf_counter(), time.process_time()
    function(*args)
    return time.perf_counter() - clock, time.process_time() - cpu
