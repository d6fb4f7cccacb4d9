"""Reads the examples of a split: prompts or conversations with their ground truth, one row per example."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

from profuser.disk_list import DiskList
from profuser.errors import DataError
from profuser.prepare.chosen import BY_CROSS_ENTROPY, SourceChoice
from profuser.prepare.columns import Columns, check_none_left_out, examples_of, find_columns, text_of
from profuser.prepare.data_sets import read_tables
from profuser.recipe.data import DataConfig, DataLocation, Split
from profuser.text.conversation import Conversation, Prompt, as_messages

Row = dict[str, Any]
"""One example: its `prompt`, a text or a Conversation, its `response` (the ground truth, stripped), its `skill`, and all other
columns of the data."""


class Examples(DiskList[Row]):
    """The rows of a split. `notes` are lines on how they were read, which a user should see."""

    def __init__(self, rows: Iterable[Row], notes: Iterable[str]):
        super().__init__(rows)
        self.notes = list(notes)


def load_examples(
    config: DataConfig,
    location: str | DataLocation,
    limit: int | None = None,
    split: Split = "train",
    part: tuple[float, float] = (0.0, 1.0),
    of_split: Split | None = None,
    sources: SourceChoice = BY_CROSS_ENTROPY,
) -> Examples:
    """Reads the rows of a split.

    Args:
        config: the recipe's group `data`, which names the columns and says which examples are used.
        location: the file, folder or data set, or a place in one.
        limit: how many examples are read, counted from the first; None reads all.
        split: the recipe's split that the rows are for.
        part: only examples are read whose prompts have a hash from the first of these numbers on and below the second; 0 is the
            smallest hash, and all are below 1.
        of_split: the recipe's split that names the location, where it is another one.
        sources: what a column must say of the sources in every training row; by default no column has to.

    Raises:
        DataError: the data is missing, broken or empty; a column is missing or holds something other than text or conversations;
            a part of the prompts would be left out.
    """
    # Read all rows, or so many as hold the examples that are asked for. That is known when they have been looked through.
    location = DataLocation(path=location) if isinstance(location, str) else location
    notes: list[str] = []
    # A split without a limit is downloaded. The others of its data set are then left where they are, if one of them is read there.
    streams, alone = config.streams and limit is not None, config.streams and limit is None
    tables = read_tables(location, of_split or split, streams=streams, alone=alone, say=notes.append)
    unread = ((name, number, cells) for name, table in tables for number, cells in enumerate(table))
    table = DiskList(islice(unread, limit))
    rows = _examples_in(table, config, location, split, part, sources)
    while limit is not None and len(rows) < limit and (more := list(islice(unread, max(limit, len(table))))):
        table.extend(more)
        rows = _examples_in(table, config, location, split, part, sources)
    rows = Examples(islice(rows, limit), notes + rows.notes)

    if any(row["skill"] == "mean" for row in rows):
        raise DataError(
            f'data {location}: a skill must not be called "mean", which stands for the mean over skills; rename it, or set '
            "data.skill_column: null"
        )
    if (
        not rows
        and config.bad_rows == "skip"
        and (left_out := [note for note in rows.notes if "x row left out" in note])
    ):
        raise DataError(
            f"data.{split} must have at least one example, all were left out: {'; '.join(left_out)}; fix the file"
        )
    if not rows:
        raise DataError(
            f"data.{split} must have at least one example, none of {location} is in its share; change data.heldout_share or "
            "data.validation_share"
        )
    return rows


def _examples_in(
    table: Sequence[tuple[str, int, dict[str, Any]]],
    config: DataConfig,
    location: DataLocation,
    split: Split,
    part: tuple[float, float],
    sources: SourceChoice,
) -> Examples:
    """Returns the examples of some rows, of which there may be none. It raises what `load_examples` raises.

    Args:
        table: what messages call each row's file, its number there, and its cells.
    """
    of_files: dict[str, dict[str, None]] = {}
    for name, _, cells in table:
        of_files.setdefault(name, {}).update(dict.fromkeys(cells))
    there = list(dict.fromkeys(column for of_file in of_files.values() for column in of_file))
    if not there:
        raise DataError(f"data {location} must have at least one row, got none; fix the file")
    columns = _columns_of_files(str(location), there, of_files, config)
    skill = config.skill_column if config.skill_column in there else None
    if config.skill_column not in (skill, DataConfig.skill_column):  # one that the recipe names must be there
        raise DataError(
            f"data {location} must have the column {config.skill_column!r} (data.skill_column), found: {', '.join(there)}; set "
            "data.skill_column to the right one, or to null"
        )

    chosen = sources.column(config)
    if chosen is not None and chosen[1] not in there:
        if split == "train":
            raise DataError(
                f"data {location} must have the column {chosen[1]!r} ({chosen[0]}) with capture.choice: {sources.choice}, found: "
                f"{', '.join(there)}; add it, set {chosen[0]} to the right one, or take {sources.choice} out of the recipe"
            )
        chosen = None

    # Name what an example has as everything else expects it, and keep the other columns beside it. What was found by its name
    # is not kept twice, so that the rows are the same however the data set writes them down.
    counts: Counter[str] = Counter()
    dropped = {name: found.all if found.by_name else (found.system,) for name, found in columns.items()}
    of_any = {column for of_file in dropped.values() for column in of_file}
    kept = {
        name: [c for c in there if c not in dropped[name] and (c in of_file or c not in of_any)]
        for name, of_file in of_files.items()
    }
    seen: set[bytes] = set()

    def rows() -> Iterator[Row]:
        for name, number, cells in table:
            cells = dict.fromkeys(there) | cells
            try:
                check_none_left_out(columns[name], cells)
                examples = examples_of(columns[name], cells, config, counts)
                if chosen is not None and not (split != "train" and sources.may_lack(cells[chosen[1]])):
                    sources.check(cells[chosen[1]], chosen[1])
                of_skill = (text_of(skill, cells[skill]) if skill else "") or "all"
            except DataError as error:
                if config.bad_rows == "refuse":
                    skips = ", or set data.bad_rows: skip" if columns[name].messages else ""
                    raise DataError(f"data {name}, row {number} (from 0): {error}{skips}") from None
                counts[f"x row left out, because {_rule(error)}"] += 1
                continue
            for prompt, response in examples:
                if not part[0] <= place_of(prompt) < part[1]:
                    continue
                if split == "train" and config.drop_duplicates and _is_twice(prompt, seen, counts):
                    continue
                others = {column: cells[column] for column in kept[name]}
                yield others | {"prompt": prompt, "response": response.strip(), "skill": of_skill}

    alike = len({*map(str, columns.values())}) == 1
    of_place = {str(location): next(iter(columns.values()))} if alike else columns
    notes = [f"data {place}: {found}" for place, found in of_place.items() if found.by_name or found.system]
    found = Examples(rows(), notes)
    found.notes += [f"data {location}: {count} {what}" for what, count in counts.items()]
    return found


def _columns_of_files(
    location: str, there: Sequence[str], of_files: Mapping[str, Iterable[str]], config: DataConfig
) -> dict[str, Columns]:
    """Finds the columns of each file of a split, by its name. Files may be written in several ways.

    Args:
        there: the columns of all files. of_files: those of each. A file that lacks one which others have is read as all are.
    Raises:
        DataError: what find_columns raises.
    """
    if len(of_files) == 1:
        return dict.fromkeys(of_files, find_columns(location, there, config))
    found = {}
    for name, of_file in of_files.items():
        try:
            found[name] = find_columns(name, [*of_file], config)
        except DataError as error:
            try:
                found[name] = find_columns(location, there, config)
            except DataError:
                raise error from None
    return found


def _rule(error: DataError) -> str:
    """The rule that a row breaks, without what it has instead and how to mend it, so that rows are counted by it."""
    return re.split(", got |; |, it ", str(error), maxsplit=1)[0]


def _is_twice(prompt: Prompt, seen: set[bytes], counts: Counter[str]) -> bool:
    """Whether an earlier example had the same prompt. It is then counted, and else remembered by its hash."""
    if (digest := _plain_digest(prompt)) in seen:
        counts["examples with the prompt of an earlier one, dropped"] += 1
        return True
    seen.add(digest)
    return False


def plain(prompt: Prompt) -> str:
    """A prompt without differences in whitespace, to be compared with others."""
    return " ".join(str(prompt).split())


def _plain_digest(prompt: Prompt) -> bytes:
    """The first 16 bytes of the sha256 of a plain prompt, which take less memory than the prompt."""
    return hashlib.sha256(plain(prompt).encode()).digest()[:16]


def place_of(prompt: Prompt) -> float:
    """A hash in [0, 1) of the user's first turn, which is the same for all examples of one conversation."""
    if isinstance(prompt, Conversation):
        prompt = next(turn.text for turn in prompt.turns if turn.role == "user")
    return int.from_bytes(_plain_digest(prompt)[:6], "big") / 256**6


def for_functions(row: Row) -> dict[str, Any]:
    """Returns a row as functions of the user's own get it. A conversation is its last turn as `prompt`, and all of it as `messages`."""
    prompt = row["prompt"]
    if not isinstance(prompt, Conversation):
        return dict(row)
    return row | {"prompt": prompt.turns[-1].text, "messages": as_messages(prompt.turns)}


def shared_prompts(rows: Sequence[Row], training: Sequence[Row]) -> int:
    """Counts the rows whose prompt is a training prompt as well. Differences in whitespace alone do not count."""
    known = {_plain_digest(row["prompt"]) for row in training}
    return sum(_plain_digest(row["prompt"]) in known for row in rows)


def data_hash(rows: Sequence[Row]) -> str:
    """Returns a short hash of all rows. It covers every column, because judges may read all of them."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(_spelt(row))
    return digest.hexdigest()[:16]


def row_digest(row: Row) -> bytes:
    """Returns the sha256 of a row with all of its columns. Empty ones do not count: they may be there for other rows' sake."""
    return hashlib.sha256(_spelt({column: cell for column, cell in row.items() if cell is not None})).digest()


def prompt_digest(prompt: Prompt) -> bytes:
    """Returns the sha256 of a prompt."""
    return hashlib.sha256(_spelt(prompt)).digest()


def _spelt(value: object) -> bytes:
    """Spells a row or a prompt as JSON."""

    def spelt(value: object) -> object:
        return value.turns if isinstance(value, Conversation) else str(value)

    return json.dumps(value, sort_keys=True, default=spelt).encode()
