"""Reads what DistillKit has captured of a model, and writes it in the form that `sources[].logprobs` reads.

A folder of DistillKit's (its commit a61c2e7) has Parquet files and compression_config.yaml. A row is a sequence of tokens, `input_ids`;
for each token but the last it has what the model says of the next one, the k most probable tokens with their log-probabilities,
packed into bytes:

- `bytepacked_indices`: the tokens from the most probable on, each in ceil(log2 d) bits, the highest bit first.
- `compressed_logprobs`: the first `exact_k` values; then the coefficients of a curve through the others, a sum of powers of their place
  (from 0, or scaled to [0, 1]) and of its square root or exponential; then in bins what the curve leaves over: a scale, and integers of
  a few bits, which are multiplied by it. With `delta_encoding` every value but the first is the difference to the one before.

There are neither prompts nor responses. So the rows of a recipe's data are written in the source's tokens, and looked for among the
beginnings of these sequences: what is found is exactly what the source would have read. Where a token that is learnt is not among the
k most probable, its own log-probability is unknown; it is taken as that of the k-th, which is the most that it can be.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from profuser.errors import ConfigError, DataError, first_line, in_short
from profuser.models.load import chat_format
from profuser.prepare.inputs import load_split, settled_date
from profuser.recipe.data import SPLITS
from profuser.recipe.schema import Recipe, SourceConfig
from profuser.recipe.utf8 import read_utf8
from profuser.recipe.yaml_text import CHARACTERS, load_yaml
from profuser.store.files import move_into_place, temporary_beside, writing
from profuser.text.chat import ChatFormat
from profuser.text.conversation import Conversation, Prompt, as_messages
from profuser.text.encoded import Encoded
from profuser.text.token_bytes import TokenBytesMismatch
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


@dataclass
class Counts:
    """What a conversion has found.

    wanted, found: rows of the data. learnt, outside: tokens of these, and those that are not among the k most probable.
    missing: the prompt of the first row that is not there; empty where all are.
    """

    wanted: int = 0
    found: int = 0
    learnt: int = 0
    outside: int = 0
    missing: str = ""


@dataclass
class Wanted:
    """A row of the data in the source's tokens, and which tokens of it are learnt."""

    prompt: Prompt
    response: str
    encoded: Encoded
    found: bool = False


class Prefixes:
    """Finds which of some token sequences others begin with, by a hash of each beginning (Karp and Rabin, 1987)."""

    BASE, MODULUS = 1_000_003, (1 << 61) - 1

    def __init__(self) -> None:
        self._of: dict[tuple[int, int], list[Wanted]] = {}

    def add(self, wanted: Wanted) -> None:
        """Adds a sequence to those that are looked for."""
        *_, last = self._hashes(wanted.encoded.input_ids)
        self._of.setdefault(last, []).append(wanted)

    def beginning(self, ids: Sequence[int]) -> Iterator[Wanted]:
        """Yields what a sequence begins with, from the shortest on."""
        for length, digest in self._hashes(ids):
            for wanted in self._of.get((length, digest), ()):
                if wanted.encoded.input_ids == list(ids[:length]):
                    yield wanted

    def _hashes(self, ids: Sequence[int]) -> Iterator[tuple[int, int]]:
        digest = 0
        for length, token in enumerate(ids, start=1):
            digest = (digest * self.BASE + token + 1) % self.MODULUS
            yield length, digest


def convert(recipe: Recipe, source: SourceConfig, folder: Path, output: Path) -> Counts:
    """Writes a Parquet file with what DistillKit has captured of the rows of a recipe's data, `capture.top_k` entries of each token.

    Args:
        source: the source of the recipe that was captured. folder: DistillKit's.
    Raises:
        ConfigError: the output is there already, or more entries are asked for than there are.
        DataError: a file is missing or broken, none of the data's rows is in it, or its tokens are not the source's.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    compression, top_k = Compression.read(folder / CONFIG), recipe.capture.top_k
    if top_k > compression.k:
        raise ConfigError(
            f"capture.top_k must be at most the {compression.k} that {folder / CONFIG} gives as k, got {top_k}; lower it"
        )
    if output.exists():
        raise ConfigError(f"--output must be a new file, got {output}; name another one")

    # What is looked for.
    chat = chat_format(source, date=settled_date(recipe.date, None))
    prefixes, wanted = Prefixes(), list(wanted_of(recipe, chat))
    for one in wanted:
        prefixes.add(one)
    counts, first = Counts(wanted=len(wanted)), None

    # It is written as it is found, in the order of DistillKit's files.
    message = pa.struct([("role", pa.string()), ("content", pa.string())])
    schema = pa.schema(
        [
            ("prompt", pa.string()),
            ("messages", pa.list_(message)),
            ("response", pa.string()),
            ("token_ids", pa.list_(pa.int32())),
            ("top_ids", pa.list_(pa.list_(pa.int32()))),
            ("top_logprobs", pa.list_(pa.list_(pa.float32()))),
            ("logprobs", pa.list_(pa.float32())),
        ]
    )
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary, waiting = temporary_beside(output), []
    try:
        with writing(temporary, 0), pq.ParquetWriter(temporary, schema) as writer:
            for sequence in sequences(folder, compression):
                first = first or sequence
                for one in prefixes.beginning(sequence.ids.tolist()):
                    if not one.found and len(one.encoded.input_ids) - 1 <= len(sequence.tokens):
                        waiting.append(written_row(one, sequence, compression, chat, top_k, counts))
                        one.found = True
                        counts.found += 1
                if len(waiting) >= ROWS_AT_A_TIME:
                    writer.write_table(pa.Table.from_pylist(waiting, schema))
                    waiting = []
            writer.write_table(pa.Table.from_pylist(waiting, schema))
        if not counts.found:
            raise nothing_found(folder, first, wanted, chat)
        move_into_place(temporary, output)
    finally:
        temporary.unlink(missing_ok=True)
    counts.missing = next((in_short(str(one.prompt)) for one in wanted if not one.found), "")
    return counts


def wanted_of(recipe: Recipe, chat: ChatFormat) -> Iterator[Wanted]:
    """Yields the rows of all splits of a recipe's data, in a source's tokens. Texts that it cannot encode are left out of what it says."""
    for split in SPLITS:
        for row in load_split(recipe, split) if recipe.data.location(split) is not None else ():
            with contextlib.suppress(TokenBytesMismatch):
                yield Wanted(row["prompt"], row["response"], chat.encode(row["prompt"], row["response"]))


def written_row(
    wanted: Wanted, sequence: Captured, compression: Compression, chat: ChatFormat, top_k: int, counts: Counts
) -> dict[str, Any]:
    """Returns the row for a text, with the tokens of it that are learnt. `counts` counts these.

    Raises:
        DataError: the numbers are none that a model can say, or a token is none of the source's.
    """
    labels = np.array(wanted.encoded.label_positions)
    ids, before = sequence.ids[labels], labels - 1  # an entry says what comes next
    tokens, logprobs = compression.tokens(sequence.tokens[before]), compression.logprobs(sequence.logprobs[before])
    there = np.isfinite(logprobs)
    if not there[:, :top_k].all() or (logprobs[there] > 1e-2).any():
        raise DataError(
            f"{sequence.where}: its {top_k} first log-probabilities must be numbers, 0 at most; give the {CONFIG} that the folder was "
            "written with, or lower capture.top_k"
        )
    if (beyond := tokens[there & (tokens >= len(chat.token_bytes.pieces))]).size:
        raise DataError(
            f"{sequence.where}: tokens must be ids of the source's {len(chat.token_bytes.pieces):,}, got {beyond[0]}; give the model that "
            "was captured as the source"
        )
    logprobs = np.minimum(np.where(there, logprobs, -np.inf), 0.0)
    # What a curve approximates may come to more than all there is.
    total = np.log(np.maximum(1.0, np.exp(logprobs.astype(np.float64)).sum(1)))
    logprobs = logprobs - total[:, None]
    is_own = there & (tokens == ids[:, None])
    least = np.where(there, logprobs, np.inf).min(1)
    own = np.where(is_own.any(1), np.where(is_own, logprobs, -np.inf).max(1), least)
    counts.learnt += len(labels)
    counts.outside += int((~is_own.any(1)).sum())
    talks = isinstance(wanted.prompt, Conversation)
    return {
        "prompt": None if talks else wanted.prompt,
        "messages": as_messages(wanted.prompt.turns) if isinstance(wanted.prompt, Conversation) else None,
        "response": wanted.response,
        "token_ids": ids.tolist(),
        "top_ids": tokens[:, :top_k].tolist(),
        "top_logprobs": logprobs[:, :top_k].tolist(),
        "logprobs": own.tolist(),
    }


def nothing_found(folder: Path, first: Captured | None, wanted: Sequence[Wanted], chat: ChatFormat) -> DataError:
    """The error where no row of the data is in a folder, with how the first of both begin."""
    if first is None or not wanted:
        return DataError(f"{folder} and the data must have rows, one of them has none; fix the paths")
    shown = [in_short(chat.tokenizer.decode(ids[:24])) for ids in (first.ids.tolist(), wanted[0].encoded.input_ids)]
    return DataError(
        f"{folder} must hold rows of the recipe's data in the source's tokens and template, none of {len(wanted)} is in it: {first.where} "
        f"begins {shown[0]}, the data's first {shown[1]}; give the data, model and chat template that were captured"
    )
