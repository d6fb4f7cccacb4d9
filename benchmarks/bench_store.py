"""Bytes per row, time to read a sequence, and error: a store's targets beside two other forms of the same numbers.

    pytest benchmarks/bench_store.py --benchmark-only -s

A row is the distribution of one token: its 10 most probable of 32,000 tokens, their log-probabilities, and the probability of all others.
The distributions are made up, in sequences of 512 tokens of which the last 384 have a row. All bytes of a form's files count.

- *targets* is what `profuser.prepare` writes and the trainer reads.
- *nested lists* is a Hugging Face data set with the same columns, the rows as lists of lists, in 32 bits or in 16. It is read from its
  Arrow table; a data set that returns NumPy arrays by itself takes many times as long.
- *packed* is the form of DistillKit, Parquet with tokens of 15 bits and log-probabilities in bytes (profuser/prepare/distillkit_files.py):
  all of them in fp16, or the first two and a curve with residuals of four bits through the others. It has no place for what lies outside
  the entries, which is therefore 1 less their sum. It is read by what profuser has for it, and not by DistillKit.

Every read is of one sequence anywhere, after the files have been read once. The forms take turns.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from datasets import Dataset, disable_progress_bars, load_dataset, load_from_disk

from benchmarks.measure import surroundings
from benchmarks.synthetic_store import SETTINGS, counts_of
from profuser.prepare.distillkit_files import CONFIG, Compression, bytes_of
from profuser.ragged import offsets_of
from profuser.store import layout
from profuser.store.layout import TARGET_COLUMNS, shard_arrays
from profuser.store.marks import marks_of
from profuser.store.store import Store
from profuser.train.targets import Targets

VOCABULARY, TOP_K, SOURCES = 32_000, 10, 3
SEQUENCES, TOKENS, ROWS = 200, 512, 384
ROUNDS, READS = 5, 40

EXACT = {
    "d": VOCABULARY,
    "k": TOP_K,
    "exact_k": TOP_K,
    "exact_dtype": "float16",
    "residual_bins": [],
    "delta_encoding": False,
}
CURVE = EXACT | {
    "exact_k": 2, "polynomial_terms": [0, 1, 2], "term_dtype": "float16",
    "residual_bins": [{"scale_dtype": "float16", "element_bits": 4, "num_elements": TOP_K - 2}],
}  # fmt: skip

Rows = tuple[np.ndarray, np.ndarray, np.ndarray]
"""The tokens (ROWS, k), their log-probabilities (ROWS, k), and the mass outside them (ROWS,), of one sequence."""


def distributions(rng: np.random.Generator, rows: int) -> Rows:
    """Makes up so many rows. A token takes on average half of what those before it have left."""
    taken = rng.beta(1.5, 1.5, (rows, TOP_K))
    left = np.cumprod(1 - taken, 1)
    p = np.sort(taken * np.concatenate([np.ones((rows, 1)), left[:, :-1]], 1), 1)[:, ::-1]
    ids = np.stack([rng.permutation(VOCABULARY // TOP_K) * TOP_K + slot for slot in range(TOP_K)])
    return ids[:, rng.integers(0, VOCABULARY // TOP_K, rows)].T, np.log(p), left[:, -1]


def test_store(benchmark, tmp_path):
    disable_progress_bars()
    rng = np.random.default_rng(0)
    ids = rng.integers(0, VOCABULARY, (SEQUENCES, TOKENS))
    truth = [distributions(rng, ROWS) for _ in range(SEQUENCES)]
    forms = {
        "targets": targets(tmp_path / "store", ids, truth),
        "nested lists, 32 bits": nested(tmp_path / "lists32", ids, truth, pa.float32(), pa.int32()),
        "nested lists, 16 bits": nested(tmp_path / "lists16", ids, truth, pa.float16(), pa.uint16()),
        "packed, exact": packed(tmp_path / "exact", ids, truth, EXACT),
        "packed, curve": packed(tmp_path / "curve", ids, truth, CURVE),
    }
    places = {"targets": tmp_path / "store/targets"} | {
        name: tmp_path / folder
        for name, folder in zip(list(forms)[1:], ("lists32", "lists16", "exact", "curve"), strict=True)
    }
    sizes = {
        name: sum(path.stat().st_size for path in place.rglob("*") if path.is_file()) / (SEQUENCES * ROWS)
        for name, place in places.items()
    }
    errors = {name: error_of([read(n) for n in range(SEQUENCES)], truth) for name, read in forms.items()}

    seconds: dict[str, list[float]] = {name: [] for name in forms}

    def measure() -> None:
        for name, read in forms.items():
            for n in rng.integers(0, SEQUENCES, READS).tolist():
                begin = time.perf_counter()
                read(n)
                seconds[name].append(time.perf_counter() - begin)

    benchmark.pedantic(measure, rounds=ROUNDS)
    milliseconds = {name: 1e3 * statistics.median(times) for name, times in seconds.items()}
    benchmark.extra_info.update(
        surroundings(), sequences=SEQUENCES, tokens=TOKENS, rows=ROWS, vocabulary=VOCABULARY, top_k=TOP_K,
        bytes_per_row=sizes, milliseconds_per_sequence=milliseconds, errors=errors,
    )  # fmt: skip
    print(f"\n{SEQUENCES} sequences of {TOKENS} tokens, {ROWS} of them with {TOP_K} of {VOCABULARY:,} tokens")
    print(f"{'':22}{'bytes/row':>10}{'ms/sequence':>13}{'log-probability':>17}{'tail':>10}   largest error")
    for name in forms:
        logprob, tail = errors[name]
        print(f"{name:22}{sizes[name]:10.1f}{milliseconds[name]:13.3f}{logprob:17.1e}{tail:10.1e}")
    assert sizes["targets"] <= 50


def error_of(found: list[Rows], truth: list[Rows]) -> tuple[float, float]:
    """Returns the largest error of a log-probability, and of the mass outside the entries. The tokens must be the same."""
    assert all(np.array_equal(a[0], b[0]) for a, b in zip(found, truth, strict=True))
    logprob, tail = (
        max(float(np.abs(a[part].astype(np.float64) - b[part]).max()) for a, b in zip(found, truth, strict=True))
        for part in (1, 2)
    )
    return logprob, tail


def targets(directory: Path, ids: np.ndarray, truth: list[Rows]) -> Callable[[int], Rows]:
    """Writes a store. Of each sequence it has the rows of the source that won."""
    labels = np.arange(TOKENS) >= TOKENS - ROWS
    position = np.flatnonzero(labels)
    winner = np.arange(SEQUENCES) % SOURCES
    arrays = {
        "example": np.arange(SEQUENCES),
        "mode": np.zeros(SEQUENCES),
        "response_bytes": np.full(SEQUENCES, 4 * ROWS),
        "source_ce": np.where(np.arange(SOURCES) == winner[:, None], 0.5, 1.0),
        "source_weight": np.ones((SEQUENCES, SOURCES)),
        "offsets": offsets_of(np.full(SEQUENCES, TOKENS)),
        "row_offsets": offsets_of(np.full(SEQUENCES, ROWS)),
        "entry_offsets": offsets_of(np.full(SEQUENCES, ROWS * TOP_K)),
        "input_ids": ids.ravel(),
        "marks": np.concatenate([marks_of(labels, np.full(ROWS, source), position) for source in winner]),
        "row_tail": np.concatenate([tail for _, _, tail in truth]),
        "entry_counts": np.full(SEQUENCES * ROWS, TOP_K),
        "entry_ids": np.concatenate([tokens.ravel() for tokens, _, _ in truth]),
        "entry_logprobs": np.concatenate([logprobs.ravel() for _, logprobs, _ in truth]),
        **counts_of(SEQUENCES, SOURCES),
    }
    store = Store.build(directory, SETTINGS, {})
    shard = shard_arrays(TARGET_COLUMNS, arrays, VOCABULARY, TOP_K)
    store.put(layout.targets("train"), 0, shard, examples=SEQUENCES)
    store.finish()
    split = Targets(Store.open(directory), "train")

    def read(n: int) -> Rows:
        found = split.sequence(n)
        entries = found.entry_ids.reshape(-1, TOP_K), found.entry_logprobs.reshape(-1, TOP_K)
        return *entries, found.row_tail

    return read


def nested(
    directory: Path, ids: np.ndarray, truth: list[Rows], real: pa.DataType, integer: pa.DataType
) -> Callable[[int], Rows]:
    """Writes a Hugging Face data set with a row per sequence, and the distributions as lists of lists of these types."""
    table = pa.table(
        {
            "input_ids": pa.array(list(ids.astype(integer.to_pandas_dtype())), pa.list_(integer)),
            "labels": pa.array([np.arange(TOKENS) >= TOKENS - ROWS] * SEQUENCES, pa.list_(pa.bool_())),
            "ids": pa.array([list(rows.astype(integer.to_pandas_dtype())) for rows, _, _ in truth], pa.list_(pa.list_(integer))),
            "logprobs": pa.array([list(rows.astype(real.to_pandas_dtype())) for _, rows, _ in truth], pa.list_(pa.list_(real))),
            "tail": pa.array([rows.astype(np.float32) for _, _, rows in truth], pa.list_(pa.float32())),
        }
    )  # fmt: skip
    Dataset(table).save_to_disk(directory)
    split = load_from_disk(directory)
    assert isinstance(split, Dataset)

    def read(n: int) -> Rows:
        row = split.data.slice(n, 1).to_batches()[0]
        tokens, logprobs = (row[name][0].values.flatten().to_numpy().reshape(-1, TOP_K) for name in ("ids", "logprobs"))
        return tokens, logprobs, row["tail"][0].values.to_numpy()

    return read


def packed(directory: Path, ids: np.ndarray, truth: list[Rows], config: dict) -> Callable[[int], Rows]:
    """Writes a folder as DistillKit does, but for the tokens of the prompt, which have no distribution here."""
    directory.mkdir()
    (directory / CONFIG).write_text(yaml.safe_dump(config), encoding="utf-8")
    compression = Compression.read(directory / CONFIG)
    lists = pa.list_(pa.list_(pa.uint8()))
    table = pa.table(
        {
            "input_ids": pa.array(list(ids), pa.list_(pa.uint64())),
            "compressed_logprobs": pa.array([list(pack_logprobs(rows, compression)) for _, rows, _ in truth], lists),
            "bytepacked_indices": pa.array([list(pack(rows, compression.index_bits)) for rows, _, _ in truth], lists),
        }
    )
    pq.write_table(table, directory / "data.parquet")
    split = load_dataset(
        "parquet", data_files=str(directory / "data.parquet"), split="train", cache_dir=str(directory.parent)
    )

    def read(n: int) -> Rows:
        row = split.data.slice(n, 1).to_batches()[0]
        logprobs, tokens = (
            bytes_of("", name, row[name][0].values, width)
            for name, width in zip(("compressed_logprobs", "bytepacked_indices"), compression.widths, strict=True)
        )
        values = compression.logprobs(logprobs)
        return compression.tokens(tokens), values, 1 - np.exp(values.astype(np.float64)).sum(1)

    return read


def pack(numbers: np.ndarray, bits: int) -> np.ndarray:
    """Writes (n, count) integers of so many bits as (n, bytes) uint8, the highest bit first."""
    found = (numbers[..., None] >> np.arange(bits - 1, -1, -1)) & 1
    return np.packbits(found.reshape(len(numbers), -1).astype(np.uint8), axis=1)


def pack_logprobs(logprobs: np.ndarray, compression: Compression) -> np.ndarray:
    """Writes the first values in fp16, the coefficients of the curve of least squares, and in four bits what it leaves over."""
    parts = [logprobs[:, : compression.exact_k].astype(np.float16)]
    if compression.terms:
        others, curve = logprobs[:, compression.exact_k :], compression.curve().double().numpy()
        terms = np.linalg.lstsq(curve, others.T, rcond=None)[0].T.astype(np.float16)
        rest = others - terms @ curve.T
        scale = (np.abs(rest).max(1, keepdims=True) / 7).astype(np.float16)
        steps = np.clip(np.round(rest / np.where(scale, scale, 1).astype(np.float64)), -8, 7).astype(np.int64) + 8
        parts += [terms, scale, pack(steps, 4)]
    return np.concatenate([np.ascontiguousarray(part).view(np.uint8) for part in parts], 1)
