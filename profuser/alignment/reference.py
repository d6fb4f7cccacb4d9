"""Alignment of one source's distributions to the target's tokens, on bytes: only where the prefixes agree.

This is the plain-Python oracle of `engine.py`, and stands in for it where the extension was not built. Its rules are
numbered here and cited by number elsewhere.

Target token t covers the bytes [a_t, e_t) of the response, source token j covers [b_j, f_j).

1. Shared prefix. Where a_t = b_j both models condition on the same bytes, so what the source says of its token j is a
   statement about the target's token t. The candidates are the source's top k of j and its own token; their exact mass,
   with everything else that the source could say, is 1.
2. Inside a source token. Where b_j < a_t < f_j the candidates are the tokens that begin with the bytes [b_j, a_t). The
   capture holds the exact mass of all of them and the top k of these. A token of exactly these bytes ends where t begins;
   what would follow it is unknown, so its mass is tail.
3. What a candidate counts for. The true text from the start of the current pre-token to a_t is followed by the candidate's
   bytes from there and tokenised, and the candidate counts for the token that the target's tokenizer puts at a_t. If an
   earlier token changes, the candidate cannot follow the target's prefix: it is dropped, with its mass. A candidate that
   ends inside a character stays in the tail, unless the target has a token of exactly these bytes and none that goes on
   from them. End of turn counts for end of turn by role; every other control token stays in the tail.
4. The gold path. While the source's own token ends before e_t it is replaced by the next position's candidates, their mass
   times its probability. The last own token of that path counts for the gold token.
5. Mass. At every aligned position kept + tail + dropped = exact mass, in the source's probabilities. The tail is what the
   source's top k left out, what counts for no token, and what falls out of the K entries that are kept. Stored is the
   conditional on the prefix being possible at all: with possible = exact - dropped, the log-probabilities are
   log(kept / possible), the tail is tail / possible, and reliability is possible / exact. So sum(exp(logprobs)) + tail = 1.
6. Ends. Bytes before the response that belong to its first token are a prefix as in rule 2 if the source's token has them,
   and stand before every candidate if the target's has. The source's template tokens between response and end of turn
   are taken as given. A position whose source token has a dummy space of its own in the middle of the response, after
   the first, is skipped.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from profuser.alignment.boundaries import Boundaries
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

MAX_CACHED_CANDIDATES = 4_000_000  # ~100 bytes each


class _Context:
    """What the target has in front of a candidate, and what each candidate of the source counts for there."""

    __slots__ = ("counts_for", "data", "extension", "prefix", "strip", "turn_may_end")

    def __init__(self, prefix: tuple[int, ...], data: bytes, extension: bytes, strip: int, turn_may_end: bool):
        self.prefix = prefix  # the target's tokens from the start of the current pre-token
        self.data = data  # their bytes and the extension's
        self.extension = extension  # bytes between the target's position and the candidate
        self.strip = strip  # bytes of the candidate that stand before the target's position
        self.turn_may_end = turn_may_end  # no byte of the response between them: end of turn counts by role
        self.counts_for: dict[int, int] = {}


class PythonByteAligner:
    """Aligns captures of `source` to `target`, mode `bytes`.

    top_k: entries kept per target position. min_reliability: a position that keeps less mass than this is skipped.
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

    def align(self, response: bytes, encoded: Encoded, capture: SourceCapture) -> Aligned:
        """One response's distributions.

        Args:
            response: its n bytes.
            encoded: the response in the target's tokens, with what stands before it: a candidate that would merge with the
                template cannot follow it.
        Raises:
            DataError: tokens that do not hold the response's bytes, or arrays that do not belong together.
        """
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

        rows = _Rows(capture, self._source_ends, n)
        source_clip = _clips(
            self.source.token_bytes,
            rows.ids[: rows.content],
            rows.begin[: rows.content],
            rows.stop[: rows.content],
            response,
            "source",
        )

        kind, position = match_spans_python(a, e, rows.begin[: rows.content], rows.stop[: rows.content])
        if target_has_end:
            kind = np.append(kind, SAME_SPAN if rows.has_end else SKIPPED).astype(np.uint8)
            position = np.append(position, rows.content if rows.has_end else -1).astype(np.int32)

        starts = self._boundaries.prefix_starts(
            encoded.input_ids[: encoded.stop], encoded.words[: encoded.stop], encoded.start
        )
        prefixes = [tuple(encoded.input_ids[first : encoded.start + t]) for t, first in enumerate(starts.tolist())]
        skip = np.where(kind == SKIPPED, SKIP_NO_SOURCE_POSITION, ALIGNED).astype(np.uint8)

        paths: list[_Path | None] = []
        wanted: list[tuple[_Context, int]] = []
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
            for context, candidates, _, _ in path.steps if path else ():
                if context is not None:
                    known = context.counts_for
                    wanted.extend((context, c) for c in candidates if c not in known)
        if wanted:
            self._resolve(wanted)
        return self._collect(paths, target_ids, content, kind, position, skip)

    def align_batch(
        self, responses: Sequence[bytes], encoded: Sequence[Encoded], captures: Sequence[SourceCapture]
    ) -> list[Aligned]:
        """`align` of several responses."""
        return [self.align(*sequence) for sequence in zip(responses, encoded, captures, strict=True)]

    def _path(self, t, a, e, n, j, inside, target_ids, target_clip, source_clip, prefix, rows: _Rows) -> _Path | None:
        """What counts where: per source position (context, candidates, their masses, mass for the gold token).

        None when the capture does not hold the range that the position needs, or a source token on the way has bytes of
        its own in front (a dummy space in the middle of the response).
        """
        piece = self.target.token_bytes.pieces[target_ids[t]]
        begin = max(a[t], 0)
        end = min(e[t], n)  # bytes beyond the response are the target's template, no one's label
        clip = piece[: target_clip[t]]  # bytes that the target has in front
        strip = 0
        if inside:
            strip = source_clip[j] + begin - max(rows.begin[j], 0)
        elif self.source.token_bytes.pieces[rows.ids[j]][: source_clip[j]] != clip:
            strip = source_clip[j]
        elif self._same_tokens and rows.stop[j] == e[t] and rows.ids[j] == target_ids[t]:
            return _Path(1.0, [(None, rows.candidates[j], rows.masses[j], rows.own[j])])
        candidates, masses, exact = rows.candidates[j], rows.masses[j], 1.0
        if strip:
            if (j, strip) not in rows.ranges:
                return None
            candidates, masses, exact = rows.ranges[j, strip]
            pieces = self.source.token_bytes.pieces
            entered = pieces[rows.ids[j]][:strip]
            for c in candidates:
                if not (0 <= c < len(pieces) and (pieces[c] or b"").startswith(entered)):
                    raise DataError(
                        f"a prefix range's tokens must begin with {entered!r}, got token {c}; capture it again"
                    )
        # Bytes that both have in front are part of every candidate.
        extension = b"" if source_clip[j] and not strip else clip
        path = _Path(exact, [])
        weight = 1.0
        while True:
            context = self._context(prefix, extension, strip, rows.begin[j] <= begin)
            if weight != 1.0:
                masses = [weight * p for p in masses]
            weight *= rows.own[j]
            last = rows.stop[j] >= end
            path.steps.append((context, candidates, masses, weight if last else 0.0))
            if last:
                return path
            j += 1
            assert j < rows.content, "the last source token of a response ends at its end"
            if source_clip[j]:
                return None
            candidates, masses, strip = rows.candidates[j], rows.masses[j], 0
            extension = piece[: target_clip[t] + rows.begin[j] - begin]

    def _end_path(self, prefix: tuple[int, ...], rows: _Rows) -> _Path:
        j = rows.content
        candidates, masses, own = rows.candidates[j], rows.masses[j], rows.own[j]
        if self._same_tokens and self.target.closing == self.source.closing:
            return _Path(1.0, [(None, candidates, masses, own)])
        extension = self.source.closing
        if self.target.closing:
            # The target's own template stands before its end of turn: what else the source would say stays in the tail.
            ends = [(c, p) for c, p in zip(candidates, masses, strict=True) if c in self._source_ends]
            candidates, masses, extension = [c for c, _ in ends], [p for _, p in ends], b""
        return _Path(1.0, [(self._context(prefix, extension, 0, True), candidates, masses, own)])

    def _context(self, prefix: tuple[int, ...], extension: bytes, strip: int, turn_may_end: bool) -> _Context:
        key = (prefix, extension, strip, turn_may_end)
        context = self._contexts.get(key)
        if context is None:
            data = self.target.token_bytes.of(prefix) + extension
            context = self._contexts[key] = _Context(prefix, data, extension, strip, turn_may_end)
        return context

    def _resolve(self, wanted: list[tuple[_Context, int]]) -> None:
        """Finds out what candidates count for, by tokenising them after their context, all at once."""
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
            if len(ids) == before or pieces[ids[before]] is None:
                continue  # no token of its own: stays in the tail
            through = self.target.token_bytes.of(ids[: before + 1])
            # Longer than the candidate: reaches into the look-ahead. Other bytes: the normaliser changed them.
            if len(through) <= size and text.encode().startswith(through):
                context.counts_for[candidate] = ids[before]

    def _without_encoding(self, context: _Context, candidate: int) -> tuple[int, str | None, int]:
        """(what it counts for unless tokens say otherwise, text to tokenise or None, its bytes without look-ahead)."""
        pieces = self.source.token_bytes.pieces
        if candidate in self._source_ends:
            if context.turn_may_end:
                return END, None, 0
            piece, lookahead = b"", ""
        else:
            piece = pieces[candidate] if 0 <= candidate < len(pieces) else None
            if (
                not piece or len(piece) == context.strip
            ):  # the latter ends where the position begins: who knows how it goes on
                return TAIL, None, 0
            piece, lookahead = piece[context.strip :], self._after_spaces(candidate)
        data = context.data + piece
        try:
            return TAIL, data.decode() + lookahead, len(data)
        except UnicodeDecodeError:
            # Ends inside a character: no text to tokenise, only a token of exactly these bytes will do.
            return self._exact.get(context.extension + piece, TAIL), None, 0

    def _after_spaces(self, candidate: int) -> str:
        known = self._lookahead.get(candidate)
        if known is None:
            known = self._lookahead[candidate] = LOOKAHEADS[lookaheads(self.source.token_bytes, [candidate])[0]]
        return known

    def _collect(self, paths, target_ids, content, kind, position, skip) -> Aligned:
        tail = np.ones(len(paths), dtype=np.float32)
        reliability = np.zeros(len(paths), dtype=np.float32)
        sizes = np.zeros(len(paths) + 1, dtype=np.int64)
        all_ids: list[int] = []
        all_masses: list[float] = []
        for t, path in enumerate(paths):
            if path is None:
                continue
            gold = target_ids[t]
            end_id = gold if t == content else self.target.end_id
            mass: dict[int, float] = {}
            dropped = 0.0
            for context, candidates, masses, own in path.steps:
                if own:
                    mass[gold] = mass.get(gold, 0.0) + own
                counts_for = self._unchanged if context is None else context.counts_for.__getitem__
                for token, p in zip(map(counts_for, candidates), masses, strict=True):
                    if token == END:
                        token = TAIL if end_id is None else end_id
                    if token == DROPPED:
                        dropped += p
                    elif token != TAIL:
                        mass[token] = mass.get(token, 0.0) + p
            possible = max(path.exact - dropped, 0.0)
            reliability[t] = possible / path.exact if path.exact else 0.0
            if reliability[t] < self.min_reliability:
                skip[t] = SKIP_LOW_RELIABILITY
                continue
            kept = sorted(((-p, i) for i, p in mass.items() if p > 0.0))[: self.top_k]
            if not kept:
                skip[t] = SKIP_EMPTY
                continue
            # float32 log-probabilities may add up to a hair more than the exact mass.
            possible = max(possible, -sum(p for p, _ in kept))
            all_ids.extend(i for _, i in kept)
            all_masses.extend(-p / possible for p, _ in kept)
            tail[t] = max(0.0, 1.0 + sum(p for p, _ in kept) / possible)
            sizes[t + 1] = len(kept)
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

    def _unchanged(self, candidate: int) -> int:
        """What a candidate counts for where both models have the same tokenizer and the same token: itself."""
        if candidate in self._source_ends:
            return END
        pieces = self.target.token_bytes.pieces
        return candidate if 0 <= candidate < len(pieces) and pieces[candidate] else TAIL


class _Path:
    """Exact mass of a position, and what the source's positions under it add: (context, candidates, masses, gold mass)."""

    __slots__ = ("exact", "steps")

    def __init__(self, exact: float, steps: list[tuple]):
        self.exact, self.steps = exact, steps


class _Rows:
    """A capture as lists: per row its candidates other than the own token, their masses, and the own token's mass."""

    def __init__(self, capture: SourceCapture, end_ids: frozenset[int], n: int):
        check_capture(capture)
        m = len(capture.ids)
        self.ids: list[int] = capture.ids.tolist()
        self.begin: list[int] = capture.begin.tolist()
        self.stop: list[int] = capture.stop.tolist()
        self.has_end = m > 0 and self.ids[-1] in end_ids and self.begin[-1] == self.stop[-1] == n
        self.content = m - self.has_end
        self.own: list[float] = np.exp(capture.own_logprobs.astype(np.float64)).tolist()
        self.candidates: list[list[int]] = []
        self.masses: list[list[float]] = []
        masses = np.exp(capture.top_logprobs.astype(np.float64)).tolist()
        for own, ids, row in zip(self.ids, capture.top_ids.tolist(), masses, strict=True):
            candidates, kept = _others(ids, row, own)
            self.candidates.append(candidates)
            self.masses.append(kept)
        ranges = capture.ranges
        exact = np.exp(ranges.logmass.astype(np.float64)).tolist()
        masses = np.exp(ranges.logprobs.astype(np.float64)).tolist()
        # By (row, strip): candidates other than the own token, their masses, exact mass.
        self.ranges = {
            (j, strip): (*_others(ids, row, self.ids[j]), mass)
            for j, strip, ids, row, mass in zip(
                ranges.rows.tolist(), ranges.strip.tolist(), ranges.ids.tolist(), masses, exact, strict=True
            )
        }


def _others(ids: list[int], masses: list[float], own: int) -> tuple[list[int], list[float]]:
    if own not in ids and -1 not in ids:
        return ids, masses
    keep = [n for n, i in enumerate(ids) if i != own and i >= 0]
    return [ids[n] for n in keep], [masses[n] for n in keep]


def check_settings(top_k: int, min_reliability: float) -> None:
    """Raises ValueError unless top_k is a positive integer and min_reliability a share."""
    if not isinstance(top_k, int) or not 1 <= top_k < 1 << 31:
        raise ValueError(f"top_k must be an integer >= 1, got {top_k}; 10 is the usual choice")
    if not 0 <= min_reliability <= 1:
        raise ValueError(f"min_reliability must be in [0, 1], got {min_reliability}; default 0.1")


def check_encoded(encoded: Encoded, vocabulary: int) -> None:
    """Raises DataError for an encoding that contradicts itself or has ids of another vocabulary."""
    content = encoded.stop - encoded.start
    if content < 0 or len(encoded.spans) != content or len(encoded.words) != len(encoded.input_ids):
        raise DataError(
            f"an encoding must have one span per token of the response and one word per token, got {len(encoded.spans)} for "
            f"{content} and {len(encoded.words)} for {len(encoded.input_ids)}; encode the response again"
        )
    if encoded.input_ids and not (min(encoded.input_ids) >= 0 and max(encoded.input_ids) < vocabulary):
        raise DataError(
            f"a target id must be in [0, {vocabulary}) (its vocabulary), got {min(encoded.input_ids)}..{max(encoded.input_ids)}; "
            "encode the response with this tokenizer"
        )


def check_capture(capture: SourceCapture) -> None:
    """Raises DataError for arrays that do not belong together, or hold what no distribution does."""
    m, ranges = len(capture.ids), capture.ranges
    lengths = {
        len(x) for x in (capture.begin, capture.stop, capture.top_ids, capture.top_logprobs, capture.own_logprobs)
    }
    if lengths != {m} or capture.top_ids.ndim != 2 or capture.top_ids.shape != capture.top_logprobs.shape:
        raise DataError(
            f"a capture's arrays must have one row per token ({m}), got rows {sorted(lengths)}; capture it again"
        )
    r = len(ranges.rows)
    lengths = {len(x) for x in (ranges.strip, ranges.logmass, ranges.ids, ranges.logprobs)}
    if lengths != {r} or ranges.ids.ndim != 2 or ranges.ids.shape != ranges.logprobs.shape:
        raise DataError(
            f"a capture's prefix ranges must have one row each ({r}), got {sorted(lengths)}; capture it again"
        )
    if r and not (ranges.rows.min() >= 0 and ranges.rows.max() < m and ranges.strip.min() > 0):
        raise DataError(
            f"a prefix range must belong to one of {m} rows and have bytes, got rows [{ranges.rows.min()}, "
            f"{ranges.rows.max()}] and {ranges.strip.min()} bytes; capture it again"
        )
    for name, logprobs in (
        ("top_logprobs", capture.top_logprobs),
        ("own_logprobs", capture.own_logprobs),
        ("ranges.logmass", ranges.logmass),
        ("ranges.logprobs", ranges.logprobs),
    ):
        # float32 sums may end a hair above 0.
        bad = ~(logprobs <= 1e-3)
        if bad.any():
            raise DataError(
                f"{name} must be natural log-probabilities, got {logprobs[bad].flat[0]}; apply log_softmax, or capture it again"
            )


def _clips(tokens: TokenBytes, ids, begin, end, response: bytes, name: str) -> list[int]:
    """Per token the number of its bytes in front of the response (or of its section): template or dummy space.

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
