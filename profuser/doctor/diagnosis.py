"""Diagnoses how well a source's tokens cover a target's, on one text and without any model.

The text is taken as one response, just as it is: there is no template and no end of turn, and nothing is stripped. Both
tokenizers encode it. Then every target token has exactly one kind (profuser.alignment.types): `same_span`, `shared_prefix`,
`inside` or `skipped`. This includes tokens that cover no bytes. If a tokenizer puts a space of its own in front of the text,
the first token's span is clipped to the text.

A tokenizer's normaliser or decoder may change a text, so that its tokens no longer hold the text's bytes. `prepare` leaves
such a response out for that source. Here one decomposed accent would then make the whole file useless; instead only the lines
that a tokenizer changes are skipped. A line includes its newline. There are two cases:

- If the tokens of the whole text hold what the normaliser makes of each line, these tokens are kept. Then `positions` is the
  number of tokens that the target really has, whichever source it is compared with. A token across the end of a line, such as
  `.\\n\\n`, is not cut; it is skipped if it touches a changed line.
- If the tokens of the whole text cannot be placed at all, for instance because of an unknown character, the lines at fault
  are encoded one by one, only to be counted, and each run of lines between them is encoded as a text of its own.

Mapped mass and reliability need a model and are left out; the report of a run shows them.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from profuser.alignment.align import PlainText
from profuser.alignment.spans import match_spans
from profuser.alignment.types import KINDS, SKIP_NO_SOURCE_POSITION, SKIP_NOT_MATCHED, SKIP_REASONS, SKIPPED
from profuser.errors import DataError
from profuser.text.token_bytes import Reason, TokenBytes, TokenBytesMismatch

MAX_PAIRS = 400_000_000  # how many pairs of tokens dynamic time warping may compare; each takes a byte


@dataclass(frozen=True, slots=True)
class Line:
    """A line that a tokenizer's tokens do not hold, with the reason. It covers the bytes [begin, end) of the text."""

    begin: int
    end: int
    reason: Reason


@dataclass(frozen=True, slots=True)
class View:
    """The tokens that one tokenizer makes of a text.

    ids: the n token ids. begin, end: (n,) int32, the tokens' byte spans; they never decrease, and are approximate inside the
    changed lines. changed: the lines that the tokens do not hold.
    """

    ids: list[int]
    begin: np.ndarray
    end: np.ndarray
    changed: list[Line]

    def touching(self, begin: int, end: int) -> slice:
        """Returns which tokens hold a byte of [begin, end), or stand there without covering any byte."""
        occupied = np.maximum(self.end, self.begin + 1)
        return slice(int(np.searchsorted(occupied, begin, "right")), int(np.searchsorted(self.begin, end, "left")))


@dataclass(frozen=True, slots=True)
class Skip:
    """Target positions that the source says nothing about, for one reason.

    text: the changed line, or the text that the tokens hold; None where the positions are scattered over the text.
    positions: how many there are.
    """

    reason: str
    text: str | None
    positions: int


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """What became of every target token.

    data: the text as bytes. target: the byte spans of the target's n tokens, as ((n,) begin, (n,) end).
    source: the same of the source's tokens, without those of changed lines. kind: (n,) uint8, an index into KINDS.
    skips: what was skipped, and why.
    """

    data: bytes
    target: tuple[np.ndarray, np.ndarray]
    source: tuple[np.ndarray, np.ndarray]
    kind: np.ndarray
    skips: list[Skip]

    @property
    def counts(self) -> dict[str, int]:
        """The number of positions of every kind."""
        return dict(zip(KINDS, np.bincount(self.kind, minlength=len(KINDS)).tolist()))

    @property
    def shares(self) -> dict[str, float]:
        """The share of the positions that every kind has, and of all `usable` ones. Without any positions all are `skipped`."""
        total = len(self.kind)
        shares = {name: count / total if total else float(name == "skipped") for name, count in self.counts.items()}
        return {**shares, "usable": 1 - shares["skipped"]}


def view(tokens: TokenBytes, text: str) -> View:
    """Returns the tokens of `text`, with the lines that they do not hold. The module's docstring describes the cases."""
    # The usual case: the tokens hold the text.
    try:
        return _view(*_encode(tokens, text, text), [])
    except TokenBytesMismatch:
        lines = _lines(text)

    # The tokens hold what the normaliser makes of each line, or else cannot be placed.
    held = [tokens.seen(line) for line in lines]
    try:
        ids, spans = _encode(tokens, text, "".join(held))
    except TokenBytesMismatch:
        return _view_of_runs(tokens, lines)

    # Spans in what they hold become spans in the text: a byte keeps its distance from the beginning of its line.
    starts, held_starts = _starts(lines), _starts(held)

    def place(offsets: np.ndarray) -> np.ndarray:
        """Returns the offsets in the text of offsets in what the tokens hold. None goes beyond its line."""
        line = np.clip(np.searchsorted(held_starts, offsets, "right") - 1, 0, len(lines) - 1)
        return np.minimum(starts[line] + offsets - held_starts[line], starts[line + 1])

    begin, end = np.array(spans, np.int64).reshape(-1, 2).T
    changed = [
        Line(int(first), int(stop), "normaliser" if tokens.normalised(line) != line else "decoder")
        for line, has, first, stop in zip(lines, held, starts, starts[1:])
        if line != has
    ]
    return _view(ids, list(zip(place(np.maximum(begin, 0)), place(end))), changed)


def diagnose(target: PlainText, source: PlainText, text: str, align: str = "bytes") -> Diagnosis:
    """Returns the kinds of the target's tokens of `text`, which is taken as one response.

    Args:
        align: "bytes" uses every position whose prefix the source has seen as well; "fusellm" uses only those of them that
            FuseLLM's dynamic time warping accepts, and skips the others.
    Raises:
        DataError: the text is too long for dynamic time warping.
    """
    # The tokens of both sides. Those of the source that touch a changed line are taken out. A region is a changed line with
    # the bytes of all tokens that touch it, because a token across the line's end takes the bytes beyond with it.
    data = text.encode()
    target_view, source_view = view(target.token_bytes, text), view(source.token_bytes, text)
    keep = np.ones(len(source_view.ids), bool)
    regions = []
    for side in (target_view, source_view):
        for line in side.changed:
            hit = side.touching(line.begin, line.end)
            if side is source_view:
                keep[hit] = False
            begin = min([line.begin, *side.begin[hit][:1].tolist()])
            regions.append((line, begin, max([line.end, *side.end[hit][-1:].tolist()])))
    source_spans = source_view.begin[keep], source_view.end[keep]
    kind, _ = match_spans(target_view.begin, target_view.end, *source_spans)

    # The target's tokens in the regions are skipped. A token in two regions counts for the first.
    reason = np.full(len(kind), "", dtype=object)
    skips = []
    for line, begin, end in sorted(regions, key=lambda region: region[0].begin):
        hit = target_view.touching(begin, end)
        new = int((reason[hit] == "").sum())
        reason[hit] = line.reason
        kind[hit] = SKIPPED
        if new:
            skips.append(Skip(line.reason, data[line.begin : line.end].decode(), new))

    # The other skipped tokens have no token of the source to go with. Neighbours are listed as one.
    alone = np.flatnonzero((kind == SKIPPED) & (reason == ""))
    for run in np.split(alone, np.flatnonzero(np.diff(alone) > 1) + 1) if len(alone) else []:
        held = data[target_view.begin[run[0]] : target_view.end[run[-1]]].decode(errors="replace")
        skips.append(Skip(SKIP_REASONS[SKIP_NO_SOURCE_POSITION], held, len(run)))

    # FuseLLM's rule skips more of them.
    if align == "fusellm":
        rejected = (kind != SKIPPED) & ~_accepted(target, source, target_view.ids, source_view.ids)
        kind[rejected] = SKIPPED
        if rejected.any():
            skips.append(Skip(SKIP_REASONS[SKIP_NOT_MATCHED], None, int(rejected.sum())))
    return Diagnosis(data, (target_view.begin, target_view.end), source_spans, kind, skips)


def _accepted(target: PlainText, source: PlainText, target_ids: list[int], source_ids: list[int]) -> np.ndarray:
    """Returns which of the target's tokens FuseLLM's rule accepts, (n,) bool."""
    # Only this mode needs rapidfuzz, which the module imports.
    from profuser.alignment.fusellm import accepted_positions, vocabulary_map

    if len(target_ids) * len(source_ids) > MAX_PAIRS:
        raise DataError(
            f"--align fusellm compares every target token with every source token, at most {MAX_PAIRS} pairs, got "
            f"{len(target_ids)} x {len(source_ids)} tokens; give a shorter text"
        )
    return accepted_positions(target_ids, source_ids, target, source, vocabulary_map(target, source))[0]


def _encode(tokens: TokenBytes, text: str, held: str) -> tuple[list[int], list[tuple[int, int]]]:
    """Returns the ids of a text, in which nothing counts as a control token, and the spans of these tokens in `held`.

    `held` is what the tokens are expected to hold.

    Raises:
        TokenBytesMismatch: they hold something else.
    """
    ids, _ = tokens.encode_parts([(text, True)])
    return ids, tokens.spans(ids, held)


def _view(ids: list[int], spans: Sequence[tuple[int, int]], changed: list[Line]) -> View:
    """Makes a View, with spans that begin before the text clipped to it."""
    begin, end = np.array(spans, np.int32).reshape(-1, 2).T
    return View(ids, np.maximum(begin, 0), end, changed)


def _view_of_runs(tokens: TokenBytes, lines: list[str]) -> View:
    """Returns the tokens of each run of lines that the tokens hold, and of every other line by itself."""

    def fits(part: str) -> bool:
        """Whether the tokens of a part of the text hold its bytes."""
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
        # Lines that fit one by one need not fit together.
        for part in ["".join(run)] if good and fits("".join(run)) else run:
            size = len(part.encode())
            try:
                own, own_spans = _encode(tokens, part, part)
            except TokenBytesMismatch as error:
                # The tokens of a line at fault cannot be placed. They are counted, and each gets the whole line as its span.
                own = tokens.encode(part)
                own_spans = [(0, size)] * len(own)
                changed.append(Line(position, position + size, error.reason))
            ids += own
            spans += [(position + max(begin, 0), position + end) for begin, end in own_spans]
            position += size
    return _view(ids, spans, changed)


def _lines(text: str) -> list[str]:
    """Splits a text into lines, which keep their newlines. Only "\\n" ends a line."""
    parts = text.split("\n")
    return [f"{part}\n" for part in parts[:-1]] + parts[-1:] * bool(parts[-1])


def _starts(lines: Sequence[str]) -> np.ndarray:
    """Returns the byte offsets at which n lines begin, and at which the last one ends, (n + 1,) int64."""
    return np.cumsum([0, *(len(line.encode()) for line in lines)])
