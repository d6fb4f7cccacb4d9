"""Turns what DistillKit has captured of a model (distillkit_files.py) into what `sources[].logprobs` reads.

There are neither prompts nor responses in it. So the rows of a recipe's data are written in the source's tokens, and looked for among
the beginnings of its sequences: what is found is exactly what the source would have read. Where a token that is learnt is not among the
k most probable, its own log-probability is unknown; it is taken as that of the k-th, which is the most that it can be.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from profuser.errors import ConfigError, DataError, in_short
from profuser.models.load import chat_format
from profuser.prepare.distillkit_files import CONFIG, ROWS_AT_A_TIME, Captured, Compression, sequences
from profuser.prepare.inputs import load_split, settled_date
from profuser.recipe.data import SPLITS
from profuser.recipe.schema import Recipe, SourceConfig
from profuser.store.parquet import write_rows
from profuser.text.chat import ChatFormat
from profuser.text.conversation import Conversation, Prompt, as_messages
from profuser.text.encoded import Encoded
from profuser.text.token_bytes import TokenBytesMismatch


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
    counts, captured = Counts(wanted=len(wanted)), sequences(folder, compression)
    first = next(captured, None)
    if first is None or not wanted:
        raise nothing_found(folder, first, wanted, chat)

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

    def found() -> Iterator[dict[str, Any]]:
        for sequence in chain([first], captured):
            for one in prefixes.beginning(sequence.ids.tolist()):
                if not one.found and len(one.encoded.input_ids) - 1 <= len(sequence.tokens):
                    one.found = True
                    counts.found += 1
                    yield written_row(one, sequence, compression, chat, top_k, counts)

    if not write_rows(output, found(), schema, ROWS_AT_A_TIME):
        raise nothing_found(folder, first, wanted, chat)
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
    talk = wanted.prompt if isinstance(wanted.prompt, Conversation) else None
    return {
        "prompt": wanted.prompt if talk is None else None,
        "messages": None if talk is None else as_messages(talk.turns),
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
