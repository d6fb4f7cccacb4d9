"""What a store holds: the kinds of shard with their places, and the dtype of every column.

A shard holds `capture.shard_size` consecutive examples of one split. Its file is `KIND/SPLIT-OF-NUMBER`, for instance
`truth/train-scholar-00003.safetensors`, where OF is the source or judge that it is about.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np

from profuser.recipe.schema import Split

Folder = Literal["truth", "responses", "scores", "winners", "targets"]


@dataclass(frozen=True, slots=True)
class Kind:
    """The shards of one kind; the functions below make them.

    folder: what they hold. split: of which examples. of: which source or judge they are about, "" for all.
    """

    folder: Folder
    split: Split
    of: str = ""

    @property
    def suffix(self) -> str:
        return ".json" if self.folder == "responses" else ".safetensors"

    @property
    def index(self) -> tuple[str, ...]:
        """The columns that a reader needs of every shard before it reads any of them."""
        return ("example", "mode", "offsets") if self.folder == "targets" else ()

    def shard(self, number: int) -> str:
        """A shard's name, which is its path in the store without the suffix."""
        of = f"-{self.of}" if self.of else ""
        return f"{self.folder}/{self.split}{of}-{number:05d}"


def truth(split: Split, source: str) -> Kind:
    """Captures of the ground truth by one source (training mode)."""
    return Kind("truth", split, source)


def responses(split: Split, source: str) -> Kind:
    """One source's own responses, as JSON: for every example a list of (text, finished)."""
    return Kind("responses", split, source)


def scores(judge: str) -> Kind:
    """One judge's scores of all responses to the training prompts."""
    return Kind("scores", "train", judge)


def winners(source: str) -> Kind:
    """Captures by one source of those of its responses that won the vote (inference mode)."""
    return Kind("winners", "train", source)


def targets(split: Split) -> Kind:
    """What the trainer reads: sequences in target tokens with the sources' aligned distributions."""
    return Kind("targets", split)


def kind_of(shard: str) -> tuple[Kind, int]:
    """The kind and number that a shard's name stands for.

    Raises:
        ValueError: it is no such name.
    """
    if not (found := re.fullmatch(r"(truth|responses|scores|winners|targets)/([a-z]+)(?:-(.+))?-(\d{5,})", shard)):
        raise ValueError(f"{shard!r} names no shard")
    folder, split, of, number = found.groups()
    return Kind(cast("Folder", folder), cast("Split", split), of or ""), int(number)


# Columns of the shards. TOKEN stands for the smallest unsigned or signed type that holds the vocabulary's ids, COUNT for
# the one that holds top_k. Log-probabilities are fp16: near 0, where they are, it is ten times finer than bf16.
TOKEN, COUNT = "token", "count"
Columns = Mapping[str, Any]

CAPTURE_COLUMNS: Columns = {
    # per example
    "reason": np.uint8,  # profuser.text.fit.Verdict
    "cut": np.uint8,
    "nll": np.float64,  # nats over the response and its end of turn; NaN where nothing was captured
    "response_bytes": np.int32,
    "offsets": np.int64,  # (n + 1,) of the tokens
    # per own token of the source: its byte span, and the distribution that predicts it
    "ids": TOKEN,
    "begin": np.int32,
    "stop": np.int32,
    "top_ids": TOKEN,  # (m, k)
    "top_logprobs": np.float16,  # (m, k)
    "own_logprobs": np.float32,
    "lse": np.float32,
    # per prefix range (alignment rule 2)
    "range_offsets": np.int64,  # (n + 1,)
    "range_rows": np.int32,
    "range_strip": np.int32,
    "range_logmass": np.float32,
    "range_counts": COUNT,  # entries of the row that are real
    "range_ids": TOKEN,  # (r, k)
    "range_logprobs": np.float16,  # (r, k), relative to the range's mass
}

TARGET_COLUMNS: Columns = {
    # per sequence
    "example": np.int32,
    "mode": np.uint8,  # profuser.recipe.schedule.Mode
    "response_bytes": np.int32,
    "source_ce": np.float32,  # (n, S) nats per unit; +inf where the source does not take part
    "offsets": np.int64,  # (n + 1,) of the tokens
    "row_offsets": np.int64,  # (n + 1,) of the rows
    # per target token
    "input_ids": TOKEN,
    "label_mask": np.uint8,
    # per row: one source's distribution of one target token
    "row_position": np.int32,  # index of that token in its sequence
    "row_source": np.uint8,
    "row_tail": np.float32,  # probability outside the entries
    "row_reliability": np.uint8,  # in 255ths
    "entry_offsets": np.int64,  # (rows + 1,) of the entries
    # per entry
    "entry_ids": TOKEN,
    "entry_logprobs": np.float16,
    # counts of the alignment, by mode and, but for the first, by source
    "skipped": np.int64,
    "kinds": np.int64,
    "covered": np.int64,
    "mapped_mass": np.float64,
    "reliability": np.int64,
}


def id_dtype(vocabulary: int) -> type[np.integer]:
    return np.uint16 if vocabulary <= 1 << 16 else np.int32


def shard_arrays(
    columns: Columns, arrays: Mapping[str, np.ndarray], vocabulary: int, top_k: int = 0
) -> dict[str, np.ndarray]:
    """The arrays of a shard in the columns' order and dtypes; every column must be there and no other."""
    assert columns.keys() == arrays.keys(), columns.keys() ^ arrays.keys()
    special = {TOKEN: id_dtype(vocabulary), COUNT: np.uint8 if top_k < 256 else np.int32}
    return {
        name: np.asarray(arrays[name]).astype(special[dtype] if isinstance(dtype, str) else dtype, copy=False)
        for name, dtype in columns.items()
    }
