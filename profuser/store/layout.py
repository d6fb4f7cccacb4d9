"""The layout of a store: which kinds of shard there are, where their files lie, and the dtype of every column.

A shard covers about `capture.shard_size` examples of one split (division.py). Its file is called `FOLDER/SPLIT-OF-NUMBER`, where OF
is the source or judge that the shard is about, for instance `truth/train-scholar-00003.safetensors`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

import numpy as np

from profuser.recipe.data import Split
from profuser.store.marks import mark_dtype

Folder = Literal["truth", "responses", "scores", "winners", "targets"]
FOLDERS: tuple[Folder, ...] = get_args(Folder)


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of shard. The functions below, from `truth` to `targets`, return the kinds that there are.

    folder: what the shards hold. split: the split whose examples they cover.
    of: the source or judge that they are about, or "" where they are about all sources.
    """

    folder: Folder
    split: Split
    of: str = ""

    @property
    def suffix(self) -> str:
        """The suffix of the shards' files."""
        return ".json" if self.folder == "responses" else ".safetensors"

    @property
    def index(self) -> tuple[str, ...]:
        """The columns that are read of every shard at the start, before any shard is read as a whole."""
        return ("example", "mode", "offsets") if self.folder == "targets" else ()

    def shard(self, number: int) -> str:
        """Returns a shard's name, which is its path in the store without the suffix."""
        of = f"-{self.of}" if self.of else ""
        return f"{self.folder}/{self.split}{of}-{number:05d}"


def truth(split: Split, source: str) -> Kind:
    """One source's captures of the ground truth, for the training mode."""
    return Kind("truth", split, source)


def responses(split: Split, source: str) -> Kind:
    """One source's own responses, as JSON: a list of (text, finished) for every example."""
    return Kind("responses", split, source)


def scores(judge: str) -> Kind:
    """One judge's scores of all responses to the training prompts."""
    return Kind("scores", "train", judge)


def winners(source: str) -> Kind:
    """One source's captures of its own responses that won the vote, for the inference mode."""
    return Kind("winners", "train", source)


def targets(split: Split) -> Kind:
    """The sequences that the trainer reads, in target tokens and with the sources' aligned distributions."""
    return Kind("targets", split)


def kind_of(shard: str) -> tuple[Kind, int]:
    """Returns the kind and the number that a shard's name stands for.

    Raises:
        ValueError: it is not the name of a shard.
    """
    if not (found := re.fullmatch(r"(truth|responses|scores|winners|targets)/([a-z]+)(?:-(.+))?-(\d{5,})", shard)):
        raise ValueError(f"{shard!r} names no shard")
    folder, split, of, number = found.groups()
    return Kind(cast("Folder", folder), cast("Split", split), of or ""), int(number)


# The columns of the shards, each with its dtype. TOKEN stands for the smaller of uint16 and int32 that can hold every id of
# the vocabulary, COUNT for the smaller of uint8 and int32 that can hold top_k, and MARK for the smallest unsigned integer that can hold
# the marks that are there. Log-probabilities are stored in fp16, which near 0, where most of them are, is finer than bf16 by three bits.
TOKEN, COUNT, MARK = "token", "count", "mark"
Columns = Mapping[str, Any]

CAPTURE_COLUMNS: Columns = {
    # One value per example.
    "reason": np.uint8,  # profuser.text.fit.Verdict
    "cut": np.uint8,  # 1 where the response was too long, and its end was cut off
    "nll": np.float64,  # nats of the response and its end of turn; NaN where nothing was captured
    "response_bytes": np.int32,
    "offsets": np.int64,  # (n + 1,): where the tokens of each of n examples begin
    # One value or row per own token of the source: its byte span, and the distribution that predicts it.
    "ids": TOKEN,
    "begin": np.int32,
    "stop": np.int32,
    "top_ids": TOKEN,  # (m, k) for m tokens
    "top_logprobs": np.float16,  # (m, k)
    "own_logprobs": np.float32,  # of the token itself, whether it is among the top k or not
    "lse": np.float32,  # the log-sum-exp of the logits
    # One value or row per range of the vocabulary (alignment rules 2 and 7 to 9).
    "range_offsets": np.int64,  # (n + 1,): where the ranges of each example begin
    "range_rows": np.int32,  # the token, counted within its example, that the range belongs to
    "range_strip": np.int32,  # how many bytes of that token are the prefix, or WHOLE, DIGITS or NUMBERS
    "range_logmass": np.float32,  # the log-probability of all tokens in the range together
    "range_counts": COUNT,  # how many of the k entries are real; the others are padding
    "range_ids": np.int32,  # (r, k) for r ranges, as the maps of profuser/alignment/merging.py spell what tokens count for
    "range_logprobs": np.float16,  # (r, k), relative to the range's mass
}

TARGET_COLUMNS: Columns = {
    # One value or row per sequence.
    "example": np.int32,
    "mode": np.uint8,  # profuser.recipe.schedule.Mode
    "response_bytes": np.int32,
    "source_ce": np.float32,  # (n, S), nats per byte or token; +inf where the source does not take part
    "source_weight": np.float32,  # (n, S), how much each source counts beside the others; 1 where the data do not say it
    "offsets": np.int64,  # (n + 1,): where the tokens of each of n sequences begin
    "row_offsets": np.int64,  # (n + 1,): where the rows of each sequence begin
    "entry_offsets": np.int64,  # (n + 1,): where the entries of each sequence begin
    # One value per target token.
    "input_ids": TOKEN,
    "marks": MARK,  # whether it is a label, and which sources have a row there (marks.py)
    # One value per row, in the order of the marks. A row is one source's distribution of one target token.
    "row_tail": np.float32,  # the probability outside the entries
    "entry_counts": COUNT,  # how many entries the row has
    # One value per entry.
    "entry_ids": TOKEN,
    "entry_logprobs": np.float16,
    # Counts of the alignment by mode, and all but `skipped` by source as well.
    "skipped": np.int64,
    "kinds": np.int64,
    "covered": np.int64,
    "mapped_mass": np.float64,
    "reliability": np.int64,
}


def winner_of(source_ce: np.ndarray) -> int | None:
    """Returns the source with the lowest cross-entropy, the first of several equal ones; None where no source takes part.

    Args:
        source_ce: (S,) float32, as it is stored: +inf where a source does not take part, and NaN counts as that.
    """
    ce = np.where(np.isfinite(source_ce), source_ce, np.inf)
    return int(ce.argmin()) if np.isfinite(ce).any() else None


def id_dtype(vocabulary: int) -> type[np.integer]:
    """Returns the dtype in which the ids of a vocabulary of this size are stored."""
    return np.uint16 if vocabulary <= 1 << 16 else np.int32


def shard_arrays(
    columns: Columns, arrays: Mapping[str, np.ndarray], vocabulary: int, top_k: int = 0
) -> dict[str, np.ndarray]:
    """Returns a shard's arrays in the order and dtypes of `columns`. There must be an array for every column, and no other."""
    assert columns.keys() == arrays.keys(), columns.keys() ^ arrays.keys()
    special = {TOKEN: id_dtype(vocabulary), COUNT: np.uint8 if top_k < 256 else np.int32}

    def stored(array: np.ndarray, dtype: Any) -> np.ndarray:
        if dtype == MARK:
            dtype = mark_dtype(array)
        return array.astype(special[dtype] if isinstance(dtype, str) else dtype, copy=False)

    return {name: stored(np.asarray(arrays[name]), dtype) for name, dtype in columns.items()}
