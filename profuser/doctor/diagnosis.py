"""How well a source's tokens cover a target's, on one text and without any model.

The text is taken as one response, as it is: no template, no begin or end of turn, nothing stripped. Both tokenizers
encode it and every target token, zero-width ones included, has exactly one kind (profuser.alignment.types): `same_span`,
`shared_prefix`, `inside` or `skipped`. A token that begins before the text (dummy leading space) counts by its clipped
span.

A normaliser or a decoder can make it impossible that tokens hold the text's bytes. `prepare` leaves such a response out
for that source as a whole; one file with one decomposed accent would then say nothing, so the doctor skips the lines
(a line keeps its newline) that a tokenizer changes, and no others:

- The tokens stay those of the whole text wherever they hold what the normaliser makes of it, line by line: then
  `positions` is the number of tokens that the target really has, whichever the source, and a token across a line's
  end, `.\\n\\n`, is not cut; it is skipped when it touches a changed line.
- Where the text has no tokens that can be placed at all (an unknown character), each run of lines between those at
  fault is encoded as a text of its own, and the lines at fault by themselves, to be counted.

What needs a model, mapped mass and reliability, is left out here; the report of a run shows it.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from profuser.alignment.align import PlainText
from profuser.alignment.spans import match_spans
from profuser.alignment.types import KINDS, SKIP_NO_SOURCE_POSITION, SKIP_NOT_MATCHED, SKIP_REASONS, SKIPPED
from profuser.errors import DataError
from profuser.text.token_bytes import Reason, TokenBytes, TokenBytesMismatch

MAX_PAIRS = 400_000_000  # of tokens, in dynamic time warping: a byte each


@dataclass(frozen=True, slots=True)
class Line:
    """A line (bytes [begin, end) of the text) that a tokenizer's tokens do not hold."""

    begin: int
    end: int
    reason: Reason


@dataclass(frozen=True, slots=True)
class View:
    """One tokenizer's tokens of a text.

    ids: n token ids; begin, end: (n,) int32 byte spans, monotone, begin >= 0; approximate inside the changed lines.
    """

    ids: list[int]
    begin: np.ndarray
    end: np.ndarray
    changed: list[Line]

    def touching(self, begin: int, end: int) -> slice:
        """The tokens that hold a byte of [begin, end), or stand there with none."""
        occupied = np.maximum(self.end, self.begin + 1)
        return slice(int(np.searchsorted(occupied, begin, "right")), int(np.searchsorted(self.begin, end, "left")))


@dataclass(frozen=True, slots=True)
class Skip:
    """Positions that get nothing. text: the line's, or what the tokens hold; None where they lie all over the text."""

    reason: str
    text: str | None
    positions: int


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """What became of every target token.

    data: the text; target: ((n,) begin, (n,) end) byte spans; source: the same, without the tokens of changed lines;
    kind: (n,) uint8 into KINDS.
    """

    data: bytes
    target: tuple[np.ndarray, np.ndarray]
    source: tuple[np.ndarray, np.ndarray]
    kind: np.ndarray
    skips: list[Skip]

    @property
    def counts(self) -> dict[str, int]:
        return dict(zip(KINDS, np.bincount(self.kind, minlength=len(KINDS)).tolist()))

    @property
    def shares(self) -> dict[str, float]:
        """Fractions of the positions by kind, and `usable`. Without any position nothing is usable: all `skipped`."""
        n = len(self.kind)
        shares = {name: count / n if n else float(name == "skipped") for name, count in self.counts.items()}
        return {**shares, "usable": 1 - shares["skipped"]}


def view(tokens: TokenBytes, text: str) -> View:
    """The tokens of `text`, with the lines that they do not hold (see the head of this module)."""
    try:
        return _view(*_encode(tokens, text, text), [])
    except TokenBytesMismatch:
        lines = _lines(text)
    held = [tokens.seen(line) for line in lines]
    try:
        ids, spans = _encode(tokens, text, "".join(held))
    except TokenBytesMismatch:
        return _view_of_runs(tokens, lines)
    starts, held_starts = _starts(lines), _starts(held)

    def place(offsets: np.ndarray) -> np.ndarray:
        line = np.clip(np.searchsorted(held_starts, offsets, "right") - 1, 0, len(lines) - 1)
        return np.minimum(starts[line] + offsets - held_starts[line], starts[line + 1])

    begin, end = np.array(spans, np.int64).reshape(-1, 2).T
    changed = [
        Line(int(a), int(e), "normaliser" if tokens.normalised(line) != line else "decoder")
        for line, has, a, e in zip(lines, held, starts, starts[1:])
        if line != has
    ]
    return _view(ids, list(zip(place(np.maximum(begin, 0)), place(end))), changed)


def diagnose(target: PlainText, source: PlainText, text: str, align: str = "bytes") -> Diagnosis:
    """Kinds of the target's tokens of `text`, taken as one response.

    Args:
        align: "bytes": every position that conditions on bytes which the source saw; "fusellm": of these, the ones that
            FuseLLM's dynamic time warping accepts, the others are skipped.
    Raises:
        DataError: a text too long for dynamic time warping.
    """
    data = text.encode()
    target_view, source_view = view(target.token_bytes, text), view(source.token_bytes, text)
    keep = np.ones(len(source_view.ids), bool)
    regions = []
    for side in (target_view, source_view):
        for line in side.changed:
            hit = side.touching(line.begin, line.end)
            if side is source_view:
                keep[hit] = False
            # Whole tokens: one that straddles the line's end takes the bytes beyond with it.
            begin = min([line.begin, *side.begin[hit][:1].tolist()])
            regions.append((line, begin, max([line.end, *side.end[hit][-1:].tolist()])))
    source_spans = source_view.begin[keep], source_view.end[keep]
    kind, _ = match_spans(target_view.begin, target_view.end, *source_spans)

    reason = np.full(len(kind), "", dtype=object)
    skips = []
    for line, begin, end in sorted(regions, key=lambda region: region[0].begin):
        hit = target_view.touching(begin, end)
        new = int((reason[hit] == "").sum())
        reason[hit] = line.reason
        kind[hit] = SKIPPED
        if new:
            skips.append(Skip(line.reason, data[line.begin : line.end].decode(), new))
    alone = np.flatnonzero((kind == SKIPPED) & (reason == ""))
    for run in np.split(alone, np.flatnonzero(np.diff(alone) > 1) + 1) if len(alone) else []:
        held = data[target_view.begin[run[0]] : target_view.end[run[-1]]].decode(errors="replace")
        skips.append(Skip(SKIP_REASONS[SKIP_NO_SOURCE_POSITION], held, len(run)))
    if align == "fusellm":
        rejected = (kind != SKIPPED) & ~_accepted(target, source, target_view.ids, source_view.ids)
        kind[rejected] = SKIPPED
        if rejected.any():
            skips.append(Skip(SKIP_REASONS[SKIP_NOT_MATCHED], None, int(rejected.sum())))
    return Diagnosis(data, (target_view.begin, target_view.end), source_spans, kind, skips)


def read_text(path: Path) -> str:
    """A file's text, byte for byte.

    Raises:
        DataError: no such file, or not UTF-8.
    """
    try:
        return path.read_bytes().decode()
    except OSError as error:
        raise DataError(f"--text must be a readable file, got {path} ({error.strerror}); fix the path") from None
    except UnicodeDecodeError as error:
        raise DataError(
            f"--text must be UTF-8, {path} has the byte 0x{error.object[error.start]:02x} at {error.start}; convert "
            "it, for instance with `iconv -t UTF-8`"
        ) from None


def _accepted(target: PlainText, source: PlainText, target_ids: list[int], source_ids: list[int]) -> np.ndarray:
    """(n,) bool: the target's tokens that FuseLLM's rule accepts."""
    from profuser.alignment.fusellm import accepted_positions, vocabulary_map  # rapidfuzz and a map: for this mode only

    if len(target_ids) * len(source_ids) > MAX_PAIRS:
        raise DataError(
            f"--align fusellm compares every target token with every source token, at most {MAX_PAIRS} pairs, got "
            f"{len(target_ids)} x {len(source_ids)} tokens; give a shorter text"
        )
    return accepted_positions(target_ids, source_ids, target, source, vocabulary_map(target, source))[0]


def _encode(tokens: TokenBytes, text: str, held: str) -> tuple[list[int], list[tuple[int, int]]]:
    """Ids of a text in which nothing is a control token, and their spans in what the tokens hold of it."""
    ids, _ = tokens.encode_parts([(text, True)])
    return ids, tokens.spans(ids, held)


def _view(ids: list[int], spans: Sequence[tuple[int, int]], changed: list[Line]) -> View:
    begin, end = np.array(spans, np.int32).reshape(-1, 2).T
    return View(ids, np.maximum(begin, 0), end, changed)


def _view_of_runs(tokens: TokenBytes, lines: list[str]) -> View:
    """The tokens of each run of lines that they hold, and of each other line by itself."""

    def fits(part: str) -> bool:
        try:
            _encode(tokens, part, part)
        except TokenBytesMismatch:
            return False
        return True

    ids: list[int] = []
    spans: list[tuple[int, int]] = []
    changed = []
    position = 0
    for good, group in itertools.groupby(lines, fits):
        run = list(group)
        for part in ["".join(run)] if good and fits("".join(run)) else run:
            size = len(part.encode())
            try:
                own, own_spans = _encode(tokens, part, part)
            except TokenBytesMismatch as error:
                own = tokens.encode(part)
                own_spans = [(0, size)] * len(own)
                changed.append(Line(position, position + size, error.reason))
            ids += own
            spans += [(position + max(begin, 0), position + end) for begin, end in own_spans]
            position += size
    return _view(ids, spans, changed)


def _lines(text: str) -> list[str]:
    """Lines with their newlines; only "\\n" ends one."""
    parts = text.split("\n")
    return [f"{part}\n" for part in parts[:-1]] + parts[-1:] * bool(parts[-1])


def _starts(lines: Sequence[str]) -> np.ndarray:
    """(n + 1,) int64 byte offsets."""
    return np.cumsum([0, *(len(line.encode()) for line in lines)])
