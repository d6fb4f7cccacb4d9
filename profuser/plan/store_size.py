"""How many bytes a store will have, from the columns and dtypes of its shards (profuser/store/layout.py)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from profuser.store.layout import CAPTURE_COLUMNS, COUNT, MARK, TARGET_COLUMNS, TOKEN, id_dtype

PER_EXAMPLE = {"reason", "cut", "nll", "response_bytes", "offsets", "range_offsets"}
"""The columns of a capture with a value per example. Of the others, those of a range begin with range_, the rest are of tokens."""
ENTRIES = {"top_ids", "top_logprobs", "range_ids", "range_logprobs"}
"""The columns of a capture with top_k values per token or range."""
PER_SEQUENCE = {
    "example",
    "mode",
    "response_bytes",
    "source_ce",
    "source_weight",
    "offsets",
    "row_offsets",
    "entry_offsets",
}
"""The columns of targets with a value per sequence; source_ce and source_weight have one for every source."""
PER_TOKEN, PER_ENTRY = {"input_ids", "marks"}, {"entry_ids", "entry_logprobs"}
PER_ROW = {"row_tail", "entry_counts"}

HEADER = 66
"""How many bytes of a shard's header are about one column."""


@dataclass(frozen=True, slots=True)
class Counts:
    """How much there is of a kind of shard.

    examples: or sequences, of targets. tokens: of all of them. more: the prefix ranges of captures, or the rows of targets.
    shards: in how many files they are.
    """

    examples: float
    tokens: float
    more: float
    shards: int


def capture_bytes(counts: Counts, vocabulary: int, top_k: int) -> int:
    """Returns the bytes of one source's captures. `counts.tokens` are the responses' own tokens of the source."""
    k = min(top_k, vocabulary)
    of_example = _width(CAPTURE_COLUMNS, PER_EXAMPLE, vocabulary, k)
    ranges = {name for name in CAPTURE_COLUMNS if name.startswith("range_")} - PER_EXAMPLE
    of_range = _width(CAPTURE_COLUMNS, ranges - ENTRIES, vocabulary, k)
    of_range += k * _width(CAPTURE_COLUMNS, ranges & ENTRIES, vocabulary, k)
    tokens = CAPTURE_COLUMNS.keys() - ranges - PER_EXAMPLE
    of_token = _width(CAPTURE_COLUMNS, tokens - ENTRIES, vocabulary, k)
    of_token += k * _width(CAPTURE_COLUMNS, tokens & ENTRIES, vocabulary, k)
    sizes = counts.examples * of_example + counts.tokens * of_token + counts.more * of_range
    return round(sizes + counts.shards * HEADER * len(CAPTURE_COLUMNS))


def targets_bytes(counts: Counts, vocabulary: int, top_k: int, sources: int) -> int:
    """Returns the bytes of targets, of which every row is taken to have top_k entries.

    `counts.tokens` are the target's tokens of whole conversations, and `counts.more` the rows: those of the responses, for every
    source that was captured on them.
    """
    k = min(top_k, vocabulary)
    of_sequence = _width(TARGET_COLUMNS, PER_SEQUENCE, vocabulary, k)
    of_sequence += (sources - 1) * _width(TARGET_COLUMNS, {"source_ce", "source_weight"}, vocabulary, k)
    of_token = _width(TARGET_COLUMNS, PER_TOKEN, vocabulary, k, sources)
    of_row = _width(TARGET_COLUMNS, PER_ROW, vocabulary, k) + k * _width(TARGET_COLUMNS, PER_ENTRY, vocabulary, k)
    of_shard = 18 * 8 + sources * 2 * (4 + 1 + 1 + 10) * 8  # the alignment's counts by mode and source
    sizes = counts.examples * of_sequence + counts.tokens * of_token + counts.more * of_row
    return round(sizes + counts.shards * (of_shard + HEADER * len(TARGET_COLUMNS)))


def _width(columns, names: Iterable[str], vocabulary: int, top_k: int, sources: int = 0) -> int:
    """Returns the bytes that one value of each of these columns takes."""
    mark = np.min_scalar_type((2 << sources) - 1)
    special = {TOKEN: id_dtype(vocabulary), COUNT: np.uint8 if top_k < 256 else np.int32, MARK: mark}
    return sum(np.dtype(special.get(columns[name], columns[name])).itemsize for name in names)
