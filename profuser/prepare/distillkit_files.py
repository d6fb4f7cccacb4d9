"""Reads the files of DistillKit (its commit a61c2e7): Parquet files with packed log-probabilities, and compression_config.yaml.

A row is a sequence of tokens, `input_ids`; for each token but the last it has what the model says of the next one, the k most probable
tokens with their log-probabilities, packed into bytes:

- `bytepacked_indices`: the tokens from the most probable on, each in ceil(log2 d) bits, the highest bit first.
- `compressed_logprobs`: the first `exact_k` values; then the coefficients of a curve through the others, a sum of powers of their place
  (from 0, or scaled to [0, 1]) and of its square root or exponential; then in bins what the curve leaves over: a scale, and integers of
  a few bits, which are multiplied by it. With `delta_encoding` every value but the first is the difference to the one before.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from profuser.errors import DataError, first_line
from profuser.recipe.utf8 import read_utf8
from profuser.recipe.yaml_text import CHARACTERS, load_yaml
from profuser.typed import Rule, checked

CONFIG = "compression_config.yaml"
COLUMNS = ("input_ids", "compressed_logprobs", "bytepacked_indices")
ROWS_AT_A_TIME = 64
"""How many sequences are in memory at a time, of which each may have thousands of tokens with hundreds of bytes."""

DTYPES: dict[str, torch.dtype] = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "float64": torch.float64,
}
FUNCTIONS = {"sqrt": torch.sqrt, "exp": torch.exp}
"""The terms of the curve that are no powers."""

_SIZE = Rule("a whole number above 0", lambda x: type(x) is int and 0 < x < 1 << 31)
_BITS = Rule("a number of bits from 1 to 32", lambda x: type(x) is int and 1 <= x <= 32)
_DTYPE = Rule(f"one of {', '.join(DTYPES)}", lambda x: isinstance(x, str) and x in DTYPES)
_TERM = Rule(
    f"a power from 0 to 64, or one of {', '.join(FUNCTIONS)}",
    lambda x: (type(x) is int and 0 <= x <= 64) or (isinstance(x, str) and x in FUNCTIONS),
)
SHAPE = {
    "d": _SIZE,
    "k": _SIZE,
    "exact_k": Rule("a whole number of 0 or more", lambda x: type(x) is int and 0 <= x < 1 << 31),
    "exact_dtype?": _DTYPE,
    "polynomial_terms?": ([_TERM], None),
    "term_dtype?": _DTYPE,
    "residual_bins": [{"scale_dtype": _DTYPE, "element_bits": _BITS, "num_elements": _SIZE}],
    "delta_encoding?": bool,
    "normalize_t?": bool,
}
"""The shape of compression_config.yaml. What else it says matters to the writer alone."""


@dataclass(frozen=True, slots=True)
class Bin:
    """Values behind the exact ones that share a scale: so many integers of so many bits."""

    scale_dtype: torch.dtype
    bits: int
    count: int

    @property
    def bytes(self) -> int:
        """The bytes of the integers."""
        return math.ceil(self.bits * self.count / 8)


@dataclass(frozen=True, slots=True)
class Compression:
    """How the log-probabilities of a folder are packed, by the names that its configuration has."""

    d: int
    k: int
    exact_k: int
    exact_dtype: torch.dtype
    terms: tuple[int | str, ...]
    term_dtype: torch.dtype
    bins: tuple[Bin, ...]
    delta_encoding: bool
    normalize_t: bool

    @classmethod
    def read(cls, path: Path) -> Compression:
        """Reads a configuration.

        Raises:
            DataError: it is missing, or is none.
        """
        again = "copy it again, it lies in the folder that DistillKit has written"
        try:
            given = checked(load_yaml(read_utf8(path, CHARACTERS)), SHAPE)
        except OSError:
            raise DataError(f"{path} is missing, without which nothing can be unpacked; {again}") from None
        except (yaml.YAMLError, ValueError) as error:
            raise DataError(f"{path} must hold DistillKit's compression, got {first_line(error)}; {again}") from None
        found = cls(
            d=given["d"],
            k=given["k"],
            exact_k=given["exact_k"],
            exact_dtype=DTYPES[given.get("exact_dtype", "float32")],
            terms=tuple(given.get("polynomial_terms") or ()),
            term_dtype=DTYPES[given.get("term_dtype", "float32")],
            bins=tuple(
                Bin(DTYPES[b["scale_dtype"]], b["element_bits"], b["num_elements"]) for b in given["residual_bins"]
            ),
            delta_encoding=given.get("delta_encoding", True),
            normalize_t=given.get("normalize_t", False),
        )
        if sum(b.count for b in found.bins) > found.k - found.exact_k or found.k > found.d:
            raise DataError(
                f"{path} must have exact_k and num_elements of k together at most, and k of d, got {found.exact_k}, "
                f"{[b.count for b in found.bins]}, {found.k} and {found.d}; {again}"
            )
        return found

    @property
    def index_bits(self) -> int:
        """The bits of a token."""
        return max(1, (self.d - 1).bit_length())

    @property
    def widths(self) -> tuple[int, int]:
        """The bytes of a token's two columns: those of the log-probabilities, and those of the k tokens."""
        logprobs = self.exact_k * self.exact_dtype.itemsize + len(self.terms) * self.term_dtype.itemsize
        logprobs += sum(b.scale_dtype.itemsize + b.bytes for b in self.bins)
        return logprobs, math.ceil(self.k * self.index_bits / 8)

    def curve(self) -> torch.Tensor:
        """Returns (k - exact_k, terms) in `term_dtype`, by which the coefficients are multiplied."""
        places = self.k - self.exact_k
        t = (
            torch.linspace(0, 1, places, dtype=self.term_dtype)
            if self.normalize_t
            else torch.arange(places, dtype=self.term_dtype)
        )
        return torch.stack([FUNCTIONS[x](t) if isinstance(x, str) else t**x for x in self.terms], dim=-1)

    def logprobs(self, packed: np.ndarray) -> np.ndarray:
        """Unpacks log-probabilities.

        Args:
            packed: (n, bytes) uint8, with as many bytes as `widths` says.
        Returns:
            (n, k) float32, natural logarithms from the most probable token on, as exact as they were packed.
        """
        n, at = len(packed), 0

        def taken(count: int, dtype: torch.dtype) -> torch.Tensor:
            """The next values of a type, (n, count)."""
            nonlocal at
            if not count:
                return torch.empty(n, 0, dtype=dtype)
            part = np.array(packed[:, at : at + count * dtype.itemsize])
            at += count * dtype.itemsize
            return torch.from_numpy(part).view(dtype)

        exact = taken(self.exact_k, self.exact_dtype).float()
        others = torch.zeros(n, self.k - self.exact_k)
        if self.terms:
            others += (taken(len(self.terms), self.term_dtype)[:, None, :] * self.curve()).sum(-1).float()
        first = 0
        for of_bin in self.bins:
            scale = taken(1, of_bin.scale_dtype).float()
            numbers = torch.from_numpy(integers(packed[:, at : at + of_bin.bytes], of_bin.bits, of_bin.count))
            at += of_bin.bytes
            # A single bit stands for the scale and its opposite, more of them for whole multiples around 0.
            steps = numbers.float() * 2 - 1 if of_bin.bits == 1 else (numbers - (1 << (of_bin.bits - 1))).float()
            others[:, first : first + of_bin.count] += steps * scale
            first += of_bin.count
        values = torch.cat([exact, others], dim=-1)
        return (values.cumsum(-1) if self.delta_encoding else values).numpy()

    def tokens(self, packed: np.ndarray) -> np.ndarray:
        """Unpacks the tokens, (n, bytes) uint8, into (n, k) int64."""
        return integers(packed, self.index_bits, self.k)


def integers(packed: np.ndarray, bits: int, count: int) -> np.ndarray:
    """Reads (n, count) int64 of so many bits each from (n, bytes) uint8. The highest bit comes first."""
    found = np.unpackbits(packed, axis=1)[:, : bits * count].reshape(len(packed), count, bits)
    return found @ (1 << np.arange(bits - 1, -1, -1, dtype=np.int64))


@dataclass(frozen=True, slots=True)
class Captured:
    """A sequence of DistillKit's. where: what messages call its row. ids: (n,). logprobs, tokens: (m, bytes), packed, m <= n."""

    where: str
    ids: np.ndarray
    logprobs: np.ndarray
    tokens: np.ndarray


def sequences(folder: Path, compression: Compression) -> Iterator[Captured]:
    """Reads the sequences of a folder, one after the other. Those that DistillKit has packed into one row are taken apart.

    Raises:
        DataError: there are no files, one cannot be read, or a row is not what its configuration says.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    files = sorted(folder.glob("*.parquet"))
    if not files:
        raise DataError(
            f"{folder} must hold DistillKit's Parquet files, it has none; give the folder that it has written"
        )
    for file in files:
        number = 0
        try:
            table = pq.ParquetFile(file)
            names = table.schema_arrow.names
            check_columns(file, names)
            wanted = [*COLUMNS, *(["attention_mask"] if "attention_mask" in names else [])]
            for batch in table.iter_batches(ROWS_AT_A_TIME, columns=wanted):
                for row in range(len(batch)):
                    where = f"{file}, row {number} (from 0)"
                    yield from taken_apart(where, {name: batch.column(name)[row] for name in wanted}, compression)
                    number += 1
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{file} cannot be read as Parquet ({first_line(error)}); copy it again") from None


def check_columns(file: Path, names: Sequence[str]) -> None:
    """Raises DataError unless a file has the columns of DistillKit's packed log-probabilities."""
    if not set(COLUMNS) - set(names):
        return
    old = "packed_indices" in names
    why = (
        ", DistillKit's older form, which may hold logits instead of log-probabilities and does not say so"
        if old
        else ""
    )
    raise DataError(
        f"{file} must have the columns {', '.join(COLUMNS)}, it has {', '.join(names)}{why}; capture again with DistillKit's "
        "sample_logits_vllm, or ask a server for the log-probabilities"
    )


def taken_apart(where: str, row: Mapping[str, Any], compression: Compression) -> Iterator[Captured]:
    """Yields the sequences of one row, which is one sequence unless its attention mask counts several."""
    ids = np.asarray(row["input_ids"].values.to_numpy(zero_copy_only=False)).astype(np.int64)
    logprobs, tokens = (
        bytes_of(where, name, row[name].values, width)
        for name, width in zip(COLUMNS[1:], compression.widths, strict=True)
    )
    if len(logprobs) != len(tokens) or not len(ids) - 1 <= len(tokens) <= len(ids):
        raise DataError(
            f"{where}: the packed columns must have an entry for each of {len(ids)} tokens, or for all but the last, got "
            f"{len(logprobs)} and {len(tokens)}; capture the row again"
        )
    bounds = [0, len(ids)]
    if "attention_mask" in row:
        mask = np.asarray(row["attention_mask"].values.to_numpy(zero_copy_only=False))
        if len(mask) != len(ids):
            raise DataError(
                f"{where}: `attention_mask` must have an entry for each of {len(ids)} tokens, got {len(mask)}; capture the row again"
            )
        bounds = [0, *(np.flatnonzero(np.diff(mask)) + 1).tolist(), len(ids)]
    for first, stop in pairwise(bounds):
        yield Captured(where, ids[first:stop], logprobs[first:stop], tokens[first:stop])


def bytes_of(where: str, name: str, lists: Any, width: int) -> np.ndarray:
    """Returns a packed column of a row as (m, width) uint8."""
    lengths = np.asarray(lists.value_lengths().to_numpy(zero_copy_only=False))
    if wrong := [int(n) for n in lengths if n != width][:1]:
        raise DataError(
            f"{where}: `{name}` must have {width} bytes for each token by {CONFIG}, got {wrong[0]}; give the configuration that the folder "
            "was written with"
        )
    return np.asarray(lists.flatten().to_numpy(zero_copy_only=False)).astype(np.uint8).reshape(len(lengths), width)
