"""Aligns the distributions of one source to the target's tokens, on bytes.

A distribution is used only where both models condition on the same bytes. This file is the plain-Python oracle of
`engine.py`, and replaces it where the C++ extension was not built. The rules of the alignment are numbered here, and
other files cite them by number.

Target token t covers the bytes [a_t, e_t) of the response, source token j covers [b_j, f_j). The own token of a source's
position is the one that stands in the source's tokens there. A candidate is a source token with a known probability at a
position: one of the top k, or the own token. The gold token is the target's token t itself. A pre-token is one of the
pieces, mostly words, that a tokenizer cuts a text into before it looks for tokens.

1. Shared prefix. Where a_t = b_j, both models condition on the same bytes. The source's distribution of its token j is
   therefore a statement about the target's token t. The candidates are the source's top k at j and its own token j. The
   exact mass, which includes everything else that the source could say there, is 1.
2. Inside a source token. Where b_j < a_t < f_j, the candidates are the source's tokens that begin with the bytes
   [b_j, a_t). The capture holds the exact mass of all these tokens together, and the top k among them. A token of exactly
   these bytes ends where t begins. The source does not say what would follow it, so its mass goes to the tail.
3. What a candidate counts for. The true text from the start of the current pre-token to a_t is put before the
   candidate's bytes from a_t on, and the target's tokenizer tokenises both together. The candidate counts for the token
   that begins at a_t. If an earlier token changes, the candidate cannot follow the target's prefix, and it is dropped
   together with its mass. A candidate that ends inside a character stays in the tail, unless the target has a token of
   exactly these bytes and no longer token that begins with them. The source's end of turn counts for the target's end of
   turn, because their role is the same. Every other control token stays in the tail.
4. The gold path. An own token of the source that ends before e_t is only a part of the gold token. It is replaced by the
   candidates of the next source position, whose masses are multiplied by its probability, and so on until an own token
   reaches e_t. This last own token of the path counts for the gold token.
5. Mass. At every aligned position kept + tail + dropped = exact mass, in the source's probabilities. The tail is the
   mass that the source's top k left out, that counts for no token, or that is not among the K entries which are kept.
   What is stored is the distribution under the condition that the target's prefix is possible at all: with
   possible = exact - dropped, the log-probabilities are log(kept / possible), the tail is tail / possible, and the
   reliability is possible / exact. Therefore sum(exp(logprobs)) + tail = 1.
6. Ends. The first token of a response may have bytes in front of the response. If the source's token has them, they are a
   prefix as in rule 2. If the target's token has them, they are put before every candidate. The source's template tokens
   between the response and the end of turn are taken as given. A target position is skipped if its gold path goes on to
   a source token that has a dummy space of its own in the middle of the response.
7. Merging before the cut. A top k loses the mass of many improbable candidates that count for one token together. Therefore
   the capture also holds what whole rows and prefix ranges say after the masses of candidates that count for the same token
   were added, over the whole vocabulary and without the own token. This takes the candidates of which rule 3 is known
   without the prefix: a new pre-token certainly begins with them (`merging.py`). They count as if they stood alone,
   provided that the prefix's own tokens stay as they are before a new pre-token; if not, they are dropped. Within a gold path,
   all of them together mean that the target's token ends there.
8. Numbers go on. A candidate that ends in a digit may be the beginning of a longer number, which a target with tokens of
   several digits would write with another token. Its mass counts for its token only with the probability that the source
   then writes something else. Of the own token it is known that a digit follows with the mass of all tokens that begin with
   a digit, in the row behind it. A candidate is taken to go on with a probability halfway between this one and 1, because a
   number that ends on the path (`at 9`) says little of others (`at 1`, which goes on with `10`), and mass in the tail does
   less harm than mass on a wrong token. Where the own token ends in no digit, the candidates' mass goes to the tail. Only
   those of the ten digits are counted with which the target's token would change. For the gold token the probability is
   exact, and the digits that may follow it are candidates of their own.
9. Numbers that were followed. Where a source was asked how its numbers go on (`follow_numbers.py`), the capture also holds
   the most probable numbers of a row: strings of digits, each with the probability that the source writes it and then
   something else. A string with as many digits as the target's longest token has the probability that the source writes
   at least these. Such a row's numbers take the place of its candidates that consist of digits, and count as they are. What
   was not followed stays in the tail.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from profuser.alignment.boundaries import Boundaries
from profuser.alignment.capture_rows import Row, Rows
from profuser.alignment.numbers import DIGITS as DIGITS_OF_TEN
from profuser.alignment.numbers import most_merged_digits, numbers
from profuser.alignment.spans import match_spans_python
from profuser.alignment.types import (
    ALIGNED,
    INSIDE,
    SAME_SPAN,
    SKIP_EMPTY,
    SKIP_LOW_RELIABILITY,
    SKIP_NO_PREFIX_RANGE,
    SKIP_NO_SOURCE_POSITION,
    SKIPPED,
    Aligned,
    SourceCapture,
)
from profuser.alignment.vocab_map import (
    DROPPED,
    END,
    LOOKAHEADS,
    TAIL,
    TextFormat,
    exact_tokens,
    lookaheads,
    same_tokens,
)
from profuser.errors import DataError
from profuser.text.encoded import Encoded
from profuser.text.token_bytes import TokenBytes

MAX_CACHED_CANDIDATES = 4_000_000  # a candidate takes about 100 bytes
# These stand in place of a candidate in a context: all candidates that end the target's token, and an example of those that
# begin a new pre-token with a space or with a digit, for which it is found out whether the prefix stays as it is.
CUT, BEHIND_SPACE, BEHIND_DIGIT = -1, -2, -3
EXAMPLES = {CUT: " x", BEHIND_SPACE: " x", BEHIND_DIGIT: "1"}
STAYS = 0
ONWARD = 10  # the number of digits that may follow a candidate


class _Context:
    """A place behind one of the target's prefixes, and the token that each candidate counts for there (rule 3)."""

    __slots__ = ("counts_for", "data", "extension", "onward", "prefix", "strip", "turn_may_end")

    def __init__(self, prefix: tuple[int, ...], data: bytes, extension: bytes, strip: int, turn_may_end: bool):
        self.prefix = prefix  # the target's tokens from the start of the current pre-token
        self.data = data  # the bytes of the prefix and of the extension
        self.extension = extension  # the bytes between the target's position and the candidate
        self.strip = strip  # the number of the candidate's bytes that stand before the target's position
        # An end of turn counts by its role only where no byte of the response lies between the position and the candidate.
        self.turn_may_end = turn_may_end
        self.counts_for: dict[int, int] = {}
        # With how many of the ten digits behind it a candidate counts for another token than without (rule 8).
        self.onward: dict[int, int] = {}


class PythonByteAligner:
    """Aligns captures of `source` to `target` by the rules above (mode `bytes`).

    Args:
        top_k: K, the number of entries that are kept per target position.
        min_reliability: a position whose reliability is below this share is skipped.
    """

    def __init__(self, target: TextFormat, source: TextFormat, *, top_k: int = 10, min_reliability: float = 0.1):
        check_settings(top_k, min_reliability)
        self.target, self.source = target, source
        self.top_k, self.min_reliability = top_k, min_reliability
        self._same_tokens = same_tokens(target.token_bytes, source.token_bytes)
        self._boundaries = Boundaries(target.token_bytes)
        self._source_ends = frozenset(source.end_ids)
        self._lookahead: dict[int, str] = {}
        self._contexts: dict[tuple, _Context] = {}
        self._cached = 0
        self._exact = exact_tokens(target.token_bytes)
        self._merges_digits = most_merged_digits(target.token_bytes.pieces) > 1
        self._pieces = [*source.token_bytes.pieces, *numbers()]  # of all candidates, by their ids

    def align(self, response: bytes, encoded: Encoded, capture: SourceCapture) -> Aligned:
        """Aligns the distributions of one response.

        Args:
            response: its n bytes.
            encoded: the response in the target's tokens, with the template before it, because a candidate that would merge
                with the template cannot follow it.
            capture: what the source says about the response.
        Raises:
            DataError: the tokens do not hold the response's bytes, or the arrays do not belong together.
        """
        # Read both sides, and check that their tokens hold the response's bytes.
        check_encoded(encoded, len(self.target.token_bytes.pieces))
        n = len(response)
        content = encoded.stop - encoded.start
        target_ids = encoded.input_ids[encoded.start : encoded.stop]
        target_has_end = encoded.end_of_turn is not None
        if encoded.end_of_turn is not None:
            target_ids = [*target_ids, encoded.input_ids[encoded.end_of_turn]]
        a = [begin for begin, _ in encoded.spans]
        e = [end for _, end in encoded.spans]
        target_clip = _clips(self.target.token_bytes, target_ids[:content], a, e, response, "target")

        rows = Rows(capture, self._source_ends, n, len(self.target.token_bytes.pieces), self.source.token_bytes.pieces)
        source_clip = _clips(
            self.source.token_bytes,
            rows.ids[: rows.content],
            rows.begin[: rows.content],
            rows.stop[: rows.content],
            response,
            "source",
        )

        # Find the source position for each target position. The target's end of turn gets the source's, by role.
        kind, position = match_spans_python(a, e, rows.begin[: rows.content], rows.stop[: rows.content])
        if target_has_end:
            kind = np.append(kind, SAME_SPAN if rows.has_end else SKIPPED).astype(np.uint8)
            position = np.append(position, rows.content if rows.has_end else -1).astype(np.int32)

        # The prefix of a position: the target's tokens from the start of the current pre-token (rule 3).
        starts = self._boundaries.prefix_starts(
            encoded.input_ids[: encoded.stop], encoded.words[: encoded.stop], encoded.start
        )
        prefixes = [tuple(encoded.input_ids[first : encoded.start + t]) for t, first in enumerate(starts.tolist())]
        skip = np.where(kind == SKIPPED, SKIP_NO_SOURCE_POSITION, ALIGNED).astype(np.uint8)

        # Collect the candidates of each position, and look up those that were not met behind this prefix before.
        paths: list[_Path | None] = []
        wanted: list[tuple[_Context, int]] = []
        number: list[tuple[_Context, int]] = []
        for t in range(len(target_ids)):
            path = None
            if not skip[t] and t == content:
                path = self._end_path(prefixes[t], rows)
            elif not skip[t]:
                inside = kind[t] == INSIDE
                path = self._path(
                    t, a, e, n, int(position[t]), inside, target_ids, target_clip, source_clip, prefixes[t], rows
                )
                if path is None:
                    skip[t] = SKIP_NO_PREFIX_RANGE
            paths.append(path)
            for step in path.steps if path else ():
                wanted.extend(step.wanted())
                number.extend(step.numbers(self.source.token_bytes.pieces) if self._merges_digits else ())
        if wanted:
            self._resolve(wanted)
        self._resolve_onward(number)
        return self._collect(paths, target_ids, content, kind, position, skip)

    def align_batch(
        self, responses: Sequence[bytes], encoded: Sequence[Encoded], captures: Sequence[SourceCapture]
    ) -> list[Aligned]:
        """Does the same as `align` for several responses."""
        return [self.align(*sequence) for sequence in zip(responses, encoded, captures, strict=True)]

    def _path(self, t, a, e, n, j, inside, target_ids, target_clip, source_clip, prefix, rows: Rows) -> _Path | None:
        """Collects the candidates that speak of target position t: those of source position j, then the gold path's.

        Returns None if the capture does not hold the prefix range that the position needs, or if a later source token of
        the path has bytes of its own in front, which is a dummy space in the middle of the response.
        """
        piece = self.target.token_bytes.pieces[target_ids[t]]
        begin = max(a[t], 0)
        end = min(e[t], n)  # bytes beyond the response belong to the target's template and are part of no label
        clip = piece[: target_clip[t]]  # the bytes that the target's token has in front of the response or its section
        # Candidates must begin with the first `strip` bytes of the source's token (rules 2 and 6).
        strip = 0
        if inside:
            strip = source_clip[j] + begin - max(rows.begin[j], 0)
        elif self.source.token_bytes.pieces[rows.ids[j]][: source_clip[j]] != clip:
            strip = source_clip[j]
        elif self._same_tokens and rows.stop[j] == e[t] and rows.ids[j] == target_ids[t]:
            # The same token of the same tokenizer: every candidate counts for itself.
            return _Path(1.0, [_Step(None, rows.top(j), gold=rows.own[j])])
        row = rows.whole(j)
        if strip:
            # Take the candidates from the prefix range instead of the whole row.
            if (j, strip) not in rows.ranges:
                return None
            row = rows.ranges[j, strip]
            pieces = self.source.token_bytes.pieces
            entered = pieces[rows.ids[j]][:strip]
            for c in row.candidates:
                if not (0 <= c < len(pieces) and (pieces[c] or b"").startswith(entered)):
                    raise DataError(
                        f"a prefix range's tokens must begin with {entered!r}, got token {c}; capture it again"
                    )
        # Bytes that both tokens have in front are already part of every candidate.
        extension = b"" if source_clip[j] and not strip else clip
        # Follow the gold path (rule 4). `weight` is the probability of the own tokens so far.
        path = _Path(row.exact, [])
        weight = 1.0
        while True:
            context = self._context(prefix, extension, strip, rows.begin[j] <= begin)
            path.steps.append(_Step(context, row, weight, goes_on=rows.goes_on(j)))
            weight *= rows.own[j]
            if rows.stop[j] >= end:
                break
            j += 1
            assert j < rows.content, "the last source token of a response ends at its end"
            if source_clip[j]:
                return None
            row, strip = rows.whole(j), 0
            extension = piece[: target_clip[t] + rows.begin[j] - begin]
        # Behind a gold token that ends in a digit, the digits that the target would merge with it are candidates (rule 8).
        digits = rows.digits(j + 1) if self._merges_digits and rows.stop[j] == e[t] else None
        if digits is None:
            path.steps[-1].gold = weight
        else:
            context = self._context(prefix, piece, 0, False)
            path.steps.append(_Step(context, digits, weight, goes_on=rows.goes_on(j + 1), follows_gold=True))
        return path

    def _end_path(self, prefix: tuple[int, ...], rows: Rows) -> _Path:
        """Collects the candidates that speak of the target's end of turn: those at the source's end of turn."""
        row, own = rows.top(rows.content), rows.own[rows.content]
        if self._same_tokens and self.target.closing == self.source.closing:
            return _Path(1.0, [_Step(None, row, gold=own)])
        extension = self.source.closing
        if self.target.closing:
            # Text of the target's template stands before its end of turn. The source's other candidates would have to
            # stand before that text, so they say nothing about this position and stay in the tail.
            row, extension = rows.ends(rows.content), b""
        return _Path(1.0, [_Step(self._context(prefix, extension, 0, True), row, gold=own)])

    def _context(self, prefix: tuple[int, ...], extension: bytes, strip: int, turn_may_end: bool) -> _Context:
        key = (prefix, extension, strip, turn_may_end)
        context = self._contexts.get(key)
        if context is None:
            data = self.target.token_bytes.of(prefix) + extension
            context = self._contexts[key] = _Context(prefix, data, extension, strip, turn_may_end)
        return context

    def _resolve(self, wanted: list[tuple[_Context, int]]) -> None:
        """Finds out what candidates count for (rule 3): tokenises them behind their contexts, all in one call."""
        # Settle the candidates that need no tokenizer, and collect the texts of the others, each once.
        pending = []
        texts = []
        seen: set[tuple[int, int]] = set()
        for context, candidate in wanted:
            if candidate in context.counts_for or (id(context), candidate) in seen:
                continue
            known, text, size = self._without_encoding(context, candidate)
            if text is None:
                context.counts_for[candidate] = known
            else:
                seen.add((id(context), candidate))
                pending.append((context, candidate, text, size))
                texts.append(text)
        # Tokenise the texts, and read off the token that begins at the target's position.
        self._cached += len(pending)
        encodings = self.target.token_bytes.fragment.encode_batch_fast(texts, add_special_tokens=False) if texts else []
        pieces = self.target.token_bytes.pieces
        for (context, candidate, text, size), encoding in zip(pending, encodings, strict=True):
            ids = encoding.ids
            context.counts_for[candidate] = TAIL
            before = len(context.prefix)
            if tuple(ids[:before]) != context.prefix:
                context.counts_for[candidate] = DROPPED
                continue
            if candidate in (BEHIND_SPACE, BEHIND_DIGIT):
                context.counts_for[candidate] = STAYS
                continue
            if len(ids) == before or pieces[ids[before]] is None:
                continue  # the candidate has no token of its own and stays in the tail
            through = self.target.token_bytes.of(ids[: before + 1])
            # A token that is longer than the candidate reaches into the look-ahead, and one of other bytes was changed by
            # the normaliser. In both cases the candidate stays in the tail.
            if len(through) <= size and text.encode().startswith(through):
                context.counts_for[candidate] = ids[before]

    def _resolve_onward(self, numbers: list[tuple[_Context, int]]) -> None:
        """Finds out with how many of the ten digits behind it each candidate counts for another token (rule 8)."""
        asked = {}
        pieces, ours = self._pieces, self.target.token_bytes.pieces
        for context, candidate in numbers:
            if candidate in context.onward:
                continue
            token = context.counts_for[candidate]
            text = context.data + (pieces[candidate] or b"")[context.strip :]
            # Only a token that reaches the candidate's end can be merged with what follows it.
            before = len(context.data) - len(context.extension)
            context.onward[candidate] = 0
            if token >= 0 and before + len(ours[token] or b"") == len(text) and _is_text(text):
                asked[id(context), candidate] = context, candidate, token, text.decode()
        texts = [text + digit for *_, text in asked.values() for digit in DIGITS_OF_TEN]
        encodings = self.target.token_bytes.fragment.encode_batch_fast(texts, add_special_tokens=False) if texts else []
        for n, (context, candidate, token, _) in enumerate(asked.values()):
            before = len(context.prefix)
            found = [encoding.ids[: before + 1] for encoding in encodings[ONWARD * n : ONWARD * (n + 1)]]
            context.onward[candidate] = sum(tuple(ids) != (*context.prefix, token) for ids in found)

    def _without_encoding(self, context: _Context, candidate: int) -> tuple[int, str | None, int]:
        """Finds out what can be told of a candidate without the tokenizer.

        Returns:
            What the candidate counts for, if there is no text to tokenise; the text to tokenise, or None; the number of
            that text's bytes without the look-ahead.
        """
        pieces = self._pieces
        if candidate < 0:
            return TAIL, context.data.decode() + EXAMPLES[candidate], len(context.data)
        if candidate in self._source_ends:
            if context.turn_may_end:
                return END, None, 0
            # The turn would end within the gold token, so the text up to there is tokenised with nothing behind it.
            piece, lookahead = b"", ""
        else:
            piece = pieces[candidate] if 0 <= candidate < len(pieces) else None
            # A token that ends where the position begins does not say what would follow it (rule 2).
            if not piece or len(piece) == context.strip:
                return TAIL, None, 0
            piece, lookahead = piece[context.strip :], self._after_spaces(candidate)
        data = context.data + piece
        try:
            return TAIL, data.decode() + lookahead, len(data)
        except UnicodeDecodeError:
            # The candidate ends inside a character. That is no text to tokenise, so only a token of exactly these bytes
            # fits.
            return self._exact.get(context.extension + piece, TAIL), None, 0

    def _after_spaces(self, candidate: int) -> str:
        """The text to put behind a candidate when it is tokenised (`vocab_map.lookaheads`)."""
        if candidate >= len(self.source.token_bytes.pieces):
            return ""  # a number
        known = self._lookahead.get(candidate)
        if known is None:
            known = self._lookahead[candidate] = LOOKAHEADS[lookaheads(self.source.token_bytes, [candidate])[0]]
        return known

    def _collect(self, paths, target_ids, content, kind, position, skip) -> Aligned:
        """Adds up the masses of all positions and keeps the top k of each (rule 5)."""
        tail = np.ones(len(paths), dtype=np.float32)
        reliability = np.zeros(len(paths), dtype=np.float32)
        sizes = np.zeros(len(paths) + 1, dtype=np.int64)
        all_ids: list[int] = []
        all_masses: list[float] = []
        for t, path in enumerate(paths):
            if path is None:
                continue
            # Add up the mass of each target token, and the mass that is dropped.
            gold = target_ids[t]
            end_id = gold if t == content else self.target.end_id
            mass: dict[int, float] = {}
            dropped = 0.0
            for step in path.steps:
                for token, p in self._counted(step, gold):
                    if token == END:
                        token = TAIL if end_id is None else end_id
                    if token == DROPPED:
                        dropped += p
                    elif token != TAIL:
                        mass[token] = mass.get(token, 0.0) + p
            # Skip positions at which little of the source's mass is possible, or none counts for a token.
            possible = max(path.exact - dropped, 0.0)
            reliability[t] = possible / path.exact if path.exact else 0.0
            if reliability[t] < self.min_reliability:
                skip[t] = SKIP_LOW_RELIABILITY
                continue
            kept = sorted(((-p, i) for i, p in mass.items() if p > 0.0))[: self.top_k]
            if not kept:
                skip[t] = SKIP_EMPTY
                continue
            # Log-probabilities in float32 may add up to slightly more than the exact mass.
            possible = max(possible, -sum(p for p, _ in kept))
            all_ids.extend(i for _, i in kept)
            all_masses.extend(-p / possible for p, _ in kept)
            tail[t] = max(0.0, 1.0 + sum(p for p, _ in kept) / possible)
            sizes[t + 1] = len(kept)
        # Forget what candidates count for once the cache has grown too large.
        if self._cached > MAX_CACHED_CANDIDATES:
            self._contexts.clear()
            self._cached = 0
        return Aligned(
            kind=kind,
            source_position=position,
            offsets=np.cumsum(sizes),
            ids=np.array(all_ids, dtype=np.int32),
            logprobs=np.log(np.array(all_masses, dtype=np.float64)).astype(np.float32),
            tail=tail,
            reliability=reliability,
            skip_reason=skip,
        )

    def _counted(self, step: _Step, gold: int) -> Iterator[tuple[int, float]]:
        """The tokens that a step's candidates count for, each with its mass."""
        context, row = step.context, step.row
        if step.gold:
            yield gold, step.gold
        if context is None:
            yield from zip(map(self._unchanged, row.candidates), row.masses, strict=True)
            return
        # What was merged before the cut, if the prefix stays as it is (rule 7).
        for token, p in row.tokens:
            piece = self.target.token_bytes.pieces[token] or b""
            example = BEHIND_DIGIT if piece[:1].isdigit() else BEHIND_SPACE
            stays = not context.prefix or context.counts_for[example] == STAYS
            yield token if stays else DROPPED, step.weight * p
        if row.cut:
            yield context.counts_for[CUT], step.weight * row.cut
        # The candidates. One that the target would merge with a further digit counts only if none follows (rule 8).
        counts = [context.counts_for[c] for c in row.candidates]
        if step.follows_gold:
            goes_on = any(token != gold for token in counts)
            yield gold, step.weight * (max(0.0, 1.0 - row.exact) if goes_on else 1.0)
            if not goes_on:
                return
        share = 1.0 if step.goes_on is None else step.goes_on
        for c, token, p in zip(row.candidates, counts, row.masses, strict=True):
            yield token, step.weight * p * (1.0 - share * context.onward.get(c, 0) / ONWARD)

    def _unchanged(self, candidate: int) -> int:
        """What a candidate counts for where both models have the same tokenizer and the same token: for itself."""
        if candidate in self._source_ends:
            return END
        pieces = self.target.token_bytes.pieces
        return candidate if 0 <= candidate < len(pieces) and pieces[candidate] else TAIL


@dataclass(slots=True)
class _Step:
    """A row or range that speaks of a target position.

    context: where its candidates stand. None means that every candidate counts for itself.
    weight: the probability of the own tokens before it.
    gold: the mass of the gold token.
    goes_on: the probability with which a digit is taken to follow a candidate, None if it is not known.
    follows_gold: the row stands behind the gold token, and its digits may be merged with it.
    """

    context: _Context | None
    row: Row
    weight: float = 1.0
    gold: float = 0.0
    goes_on: float | None = None
    follows_gold: bool = False

    def wanted(self) -> Iterator[tuple[_Context, int]]:
        """What must be known of the step's context."""
        context, row = self.context, self.row
        if context is None:
            return
        asked = [*row.candidates, *([CUT] if row.cut else [])]
        if row.tokens and context.prefix:
            asked += [BEHIND_SPACE, BEHIND_DIGIT]
        yield from ((context, c) for c in asked if c not in context.counts_for)

    def numbers(self, pieces: Sequence[bytes | None]) -> Iterator[tuple[_Context, int]]:
        """The step's candidates that end in a digit."""
        context = self.context
        for c in self.row.candidates if context is not None else ():
            piece = (pieces[c] or b"") if 0 <= c < len(pieces) else b""
            if context is not None and piece[-1:].isdigit() and len(piece) > context.strip:
                yield context, c


@dataclass(slots=True)
class _Path:
    """A target position's exact mass, and the steps that speak of it."""

    exact: float
    steps: list[_Step]


def _is_text(data: bytes) -> bool:
    """Whether the bytes are UTF-8."""
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def check_settings(top_k: int, min_reliability: float) -> None:
    """Raises ValueError unless top_k is a positive integer and min_reliability is a share."""
    if not isinstance(top_k, int) or not 1 <= top_k < 1 << 31:
        raise ValueError(f"top_k must be an integer >= 1, got {top_k}; 10 is the usual choice")
    if not 0 <= min_reliability <= 1:
        raise ValueError(f"min_reliability must be in [0, 1], got {min_reliability}; default 0.1")


def check_encoded(encoded: Encoded, vocabulary: int) -> None:
    """Raises DataError for an encoding that contradicts itself or has ids of another vocabulary."""
    content = encoded.stop - encoded.start
    if content < 0 or len(encoded.spans) != content or len(encoded.words) != len(encoded.input_ids):
        raise DataError(
            f"an encoding must have one span per token of the response and one word per token, got {len(encoded.spans)} "
            f"spans for {content} tokens and {len(encoded.words)} words for {len(encoded.input_ids)}; "
            "encode the response again"
        )
    if encoded.input_ids and not (min(encoded.input_ids) >= 0 and max(encoded.input_ids) < vocabulary):
        raise DataError(
            f"a target id must be in [0, {vocabulary}) (its vocabulary), got {min(encoded.input_ids)}..{max(encoded.input_ids)}; "
            "encode the response with this tokenizer"
        )


def _clips(tokens: TokenBytes, ids, begin, end, response: bytes, name: str) -> list[int]:
    """The number of bytes that each token has in front of the response or of its section: template or a dummy space.

    Raises:
        DataError: a token does not hold the response's bytes.
    """
    n = len(response)
    clips = []
    reached = 0
    for i, b, e in zip(ids, begin, end, strict=True):
        piece = tokens.pieces[i] if 0 <= i < len(tokens.pieces) else None
        first = max(b, 0)
        clip = len(piece) - (e - first) if piece is not None else -1
        held = None if piece is None or clip < 0 else piece[clip : len(piece) - max(e - n, 0)]
        if first != reached or held != response[first : min(e, n)]:
            raise DataError(
                f"a {name} token must hold the response's bytes [{first}, {e}) = {response[first:e]!r}, token {i} is {piece!r}; "
                "encode the response again with this tokenizer"
            )
        clips.append(clip)
        reached = max(e, 0)
    if reached < n:
        raise DataError(f"the {name}'s tokens must reach the response's end, byte {n}, got {reached}; encode it again")
    return clips
