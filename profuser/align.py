"""Alignment of one source's distributions to the target's tokens, on bytes: only where the prefixes agree.

Target token t covers the bytes [a_t, e_t) of the response, source token j covers [b_j, f_j). Where a_t = b_j both
models condition on the same bytes, so what the source says of its token j is a statement about the target's token t:

- candidates are the source's top k of j and its own token;
- a candidate counts for the token that the target's tokenizer would really put at a_t: (true text from the start of the
  current pre-token to b_j) + (candidate) is tokenised. If an earlier token changes, the candidate cannot follow the
  target's prefix and is dropped;
- while the source's own token ends before e_t it is replaced by the next position's candidates, their mass times its
  probability; the last own token of that path counts for the gold token;
- end of turn counts for end of turn by role; control tokens, and what ends inside a character, stay in the tail.

Mass, per aligned position, in the source's probabilities (exact mass 1): kept + tail + dropped = 1, where the tail is
what the source's top k left out, what counts for no token, and what falls out of the K entries kept here. Stored is the
conditional on the prefix being possible at all: logprobs = log(kept / (1 - dropped)), tail / (1 - dropped) and
reliability = 1 - dropped; so sum(exp(logprobs)) + tail = 1.

Left out for now: positions that begin inside a source token (b_j < a_t < f_j, or the source's first token begins before
the response and the target's does not). They need the mass of all tokens that begin with bytes [b_j, a_t), which a
capture of the plain top k does not hold. They are skipped with the reason "inside" and keep their kind, so that the
shares of the kinds are right. The source's template tokens between response and end of turn are taken as given.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from profuser.chat import ChatFormat
from profuser.errors import DataError
from profuser.token_bytes import TokenBytes

try:
    from profuser import _align
except ImportError:
    _align = None

ENGINE = (
    "C++" if _align is not None else "Python (the C++ extension is not built: pip install -e . with a C++ compiler)"
)

KINDS = ("same_span", "shared_prefix", "inside", "skipped")
SAME_SPAN, SHARED_PREFIX, INSIDE, SKIPPED = range(len(KINDS))
SKIP_REASONS = ("", "inside", "low_reliability", "empty", "no_source_position")
ALIGNED, SKIP_INSIDE, SKIP_LOW_RELIABILITY, SKIP_EMPTY, SKIP_NO_SOURCE_POSITION = range(len(SKIP_REASONS))

# What a candidate counts for when it is not a target token.
TAIL, DROPPED, END = -1, -2, -3

MAX_CACHED_CANDIDATES = 4_000_000  # ~100 bytes each
MAX_LEAD_TOKENS = 32  # of the template before the response; a pre-token is far shorter


@dataclass(slots=True)
class SourceCapture:
    """What one source says about one response; row j is its distribution OF its own token j.

    Rows are its tokens start..stop and then its end of turn, if the response was not cut.
    ids: (m,) int32 own tokens; begin, stop: (m,) int32 byte spans relative to the response (end of turn: n, n; the
        first begin may be < 0).
    top_ids: (m, k) int32, -1 = padding; top_logprobs: (m, k) float32, natural log, absolute.
    own_logprobs: (m,) float32, the own token's, whether it is among the top k or not.
    """

    ids: np.ndarray
    begin: np.ndarray
    stop: np.ndarray
    top_ids: np.ndarray
    top_logprobs: np.ndarray
    own_logprobs: np.ndarray


@dataclass(slots=True)
class Aligned:
    """A source's distributions over the target's tokens start..stop and its end of turn, if the response was not cut.

    kind: (n,) uint8 into KINDS, by structure alone; source_position: (n,) int32 row of the capture, -1 none.
    offsets: (n + 1,) int64 into ids (nnz,) int32 and logprobs (nnz,) float32, a position's entries by falling mass.
    tail: (n,) float32, probability outside the entries (1 where skipped); reliability: (n,) float32, 1 - dropped mass.
    skip_reason: (n,) uint8 into SKIP_REASONS, 0 = aligned.
    """

    kind: np.ndarray
    source_position: np.ndarray
    offsets: np.ndarray
    ids: np.ndarray
    logprobs: np.ndarray
    tail: np.ndarray
    reliability: np.ndarray
    skip_reason: np.ndarray


def match_spans_python(target_begin, target_end, source_begin, source_end) -> tuple[np.ndarray, np.ndarray]:
    """The oracle of `match_spans`."""
    a, e, b, f = (np.asarray(x, dtype=np.int32) for x in (target_begin, target_end, source_begin, source_end))
    for name, begin, end in (("target", a, e), ("source", b, f)):
        if begin.ndim != 1 or begin.shape != end.shape:
            raise ValueError(
                f"{name}_begin and {name}_end must be 1-D of one length, got {begin.shape} and {end.shape}"
            )
    a, b = np.maximum(a, 0), np.maximum(b, 0)
    for name, begin, end in (("target", a, e), ("source", b, f)):
        if (begin[1:] < begin[:-1]).any() or (end < begin).any():
            raise ValueError(f"{name} spans must be monotone with begin <= end; re-encode the response")
    kind = np.full(len(a), SKIPPED, dtype=np.uint8)
    position = np.full(len(a), -1, dtype=np.int32)
    if len(b) == 0 or len(a) == 0:
        return kind, position
    first = np.searchsorted(b, a, side="left")
    past = np.searchsorted(b, a, side="right")
    # Several tokens at one offset (zero-width ones) match by order; one too many takes the first.
    order = np.arange(len(a)) - np.searchsorted(a, a, side="left")
    row = np.where(first + order < past, first + order, first)
    shared = first < past
    position[shared] = row[shared]
    kind[shared] = np.where(f[row[shared]] == e[shared], SAME_SPAN, SHARED_PREFIX)
    before = np.maximum(first - 1, 0)
    inside = ~shared & (first > 0) & (f[before] > a)
    position[inside] = before[inside]
    kind[inside] = INSIDE
    return kind, position


def match_spans(target_begin, target_end, source_begin, source_end) -> tuple[np.ndarray, np.ndarray]:
    """Which source token each target token's distribution can come from.

    Args: (n,) and (m,) int32 byte spans, monotone; begins below 0 are clipped there.
    Returns:
        kind (n,) uint8 into KINDS; source_position (n,) int32: the token that begins at the same byte, for `inside` the
        one that holds it, -1 where skipped.
    Raises:
        ValueError: spans that are not monotone, or not of one length.
    """
    if _align is None:
        return match_spans_python(target_begin, target_end, source_begin, source_end)
    spans = (np.ascontiguousarray(x, dtype=np.int32) for x in (target_begin, target_end, source_begin, source_end))
    return _align.match_spans(*spans)


class _Context:
    """What the target has in front of a candidate, and what each candidate of the source counts for there."""

    __slots__ = ("counts_for", "data", "extension", "prefix", "turn_may_end")

    def __init__(self, prefix: tuple[int, ...], data: bytes, extension: bytes, turn_may_end: bool):
        self.prefix = prefix  # the target's tokens from the start of the current pre-token
        self.data = data  # their bytes and the extension's
        self.extension = extension  # bytes between the target's position and the candidate
        self.turn_may_end = turn_may_end  # no byte of the response between them: end of turn counts by role
        self.counts_for: dict[int, int] = {}


class ByteAligner:
    """Aligns captures of `source` to `target`, mode `bytes`.

    top_k: entries kept per target position. min_reliability: a position that keeps less mass than this is skipped.
    """

    def __init__(self, target: ChatFormat, source: ChatFormat, *, top_k: int = 10, min_reliability: float = 0.1):
        if top_k < 1:
            raise ValueError(f"top_k must be >= 1, got {top_k}")
        self.target, self.source = target, source
        self.top_k, self.min_reliability = top_k, min_reliability
        self._same_tokens = _same_tokens(target.token_bytes, source.token_bytes)
        self._boundaries = _Boundaries(target.token_bytes)
        self._source_ends = frozenset(source.end_ids)
        self._lookahead: dict[int, str] = {}
        self._contexts: dict[tuple, _Context] = {}
        self._cached = 0
        self._token_of: dict[bytes, int] = {}
        for i, piece in enumerate(target.token_bytes.pieces):
            if piece:
                known = self._token_of.setdefault(piece, i)
                # Byte-fallback tokens come first in SentencePiece vocabularies, but text uses the plain one.
                if known != i and target.tokenizer.convert_ids_to_tokens(known).startswith("<0x"):
                    self._token_of[piece] = i

    def align(
        self,
        response: bytes,
        target_ids: Sequence[int],
        target_spans: Sequence[tuple[int, int]],
        target_has_end: bool,
        capture: SourceCapture,
        *,
        target_lead: Sequence[int] = (),
    ) -> Aligned:
        """One response's distributions.

        Args:
            response: its n bytes.
            target_ids: the target's tokens start..stop, and its end of turn if target_has_end.
            target_spans: byte spans of the tokens start..stop (one more, for the end of turn, is ignored).
            target_lead: the target's tokens before start (`input_ids[:start]`): a candidate that would merge with the
                template cannot follow it. Without them the response counts as the beginning of a text.
        Raises:
            DataError: tokens that do not hold the response's bytes, or arrays that do not belong together.
        """
        n = len(response)
        target_ids = [int(i) for i in target_ids]
        content = len(target_ids) - bool(target_has_end)
        if content < 0 or not content <= len(target_spans) <= len(target_ids):
            raise DataError(
                f"target_spans must be one per token of the response, got {len(target_spans)} for {content} tokens"
            )
        a = [int(begin) for begin, _ in target_spans[:content]]
        e = [int(end) for _, end in target_spans[:content]]
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

        kind, position = match_spans(a, e, rows.begin[: rows.content], rows.stop[: rows.content])
        if target_has_end:
            kind = np.append(kind, SAME_SPAN if rows.has_end else SKIPPED).astype(np.uint8)
            position = np.append(position, rows.content if rows.has_end else -1).astype(np.int32)
        for t in range(content):
            j = position[t]
            if (
                kind[t] < INSIDE
                and source_clip[j]
                and not self._same_clip(target_ids[t], target_clip[t], rows.ids[j], source_clip[j])
            ):
                kind[t] = INSIDE

        lead = self._lead(target_lead)
        prefixes = self._boundaries.prefixes(lead + target_ids[:content], len(lead))
        skip = np.select([kind == INSIDE, kind == SKIPPED], [SKIP_INSIDE, SKIP_NO_SOURCE_POSITION], ALIGNED).astype(
            np.uint8
        )

        paths: list[list[tuple] | None] = []
        wanted: list[tuple[_Context, int]] = []
        for t in range(len(target_ids)):
            path = None
            if not skip[t] and t == content:
                path = self._end_path(prefixes[t], rows)
            elif not skip[t]:
                path = self._path(t, a, e, n, int(position[t]), target_ids, target_clip, source_clip, prefixes[t], rows)
                if path is None:
                    skip[t] = SKIP_INSIDE
            paths.append(path)
            for context, candidates, _, _ in path or ():
                if context is not None:
                    known = context.counts_for
                    wanted.extend((context, c) for c in candidates if c not in known)
        if wanted:
            self._resolve(wanted)
        return self._collect(paths, target_ids, content, rows, kind, position, skip)

    def _same_clip(self, target_id: int, target_clip: int, source_id: int, source_clip: int) -> bool:
        """Whether both tokens begin with the same bytes before the response: then they still share their prefix."""
        return (
            self.target.token_bytes.pieces[target_id][:target_clip]
            == self.source.token_bytes.pieces[source_id][:source_clip]
        )

    def _lead(self, target_lead: Sequence[int]) -> list[int]:
        """The tokens of the template that stand directly before the response, since the last control token."""
        pieces = self.target.token_bytes.pieces
        lead: list[int] = []
        for i in reversed(target_lead[-MAX_LEAD_TOKENS:]):
            if pieces[i] is None:
                break
            lead.append(int(i))
        lead.reverse()
        while lead and pieces[lead[0]][:1] and pieces[lead[0]][0] & 0xC0 == 0x80:  # begins inside a character
            lead.pop(0)
        return lead

    def _path(self, t, a, e, n, j, target_ids, target_clip, source_clip, prefix, rows: _Rows) -> list[tuple] | None:
        """What counts where: (context, candidates, their masses, mass for the gold token) per source position.

        None when a source token on the way has bytes of its own in front (a dummy space in the middle of the response).
        """
        piece = self.target.token_bytes.pieces[target_ids[t]]
        begin = max(a[t], 0)
        end = min(e[t], n)  # bytes beyond the response are the target's template, no one's label
        if (
            self._same_tokens
            and rows.stop[j] == e[t]
            and rows.ids[j] == target_ids[t]
            and target_clip[t] == source_clip[j]
        ):
            return [(None, rows.candidates[j], rows.masses[j], rows.own[j])]
        # Bytes that only the target has in front stand before every candidate.
        extension = b"" if source_clip[j] else piece[: target_clip[t]]
        path = []
        weight = 1.0
        while True:
            context = self._context(prefix, extension, rows.begin[j] <= begin)
            masses = rows.masses[j] if weight == 1.0 else [weight * p for p in rows.masses[j]]
            weight *= rows.own[j]
            last = rows.stop[j] >= end
            path.append((context, rows.candidates[j], masses, weight if last else 0.0))
            if last:
                return path
            j += 1
            assert j < rows.content, "the last source token of a response ends at its end"
            if source_clip[j]:
                return None
            extension = piece[: target_clip[t] + rows.begin[j] - begin]

    def _end_path(self, prefix: tuple[int, ...], rows: _Rows) -> list[tuple]:
        j = rows.content
        if self._same_tokens and self.target.closing == self.source.closing:
            return [(None, rows.candidates[j], rows.masses[j], rows.own[j])]
        if self.target.closing:
            # The target's own template stands before its end of turn: what else the source would say stays in the tail.
            ends = [(c, p) for c, p in zip(rows.candidates[j], rows.masses[j], strict=True) if c in self._source_ends]
            return [(self._context(prefix, b"", True), [c for c, _ in ends], [p for _, p in ends], rows.own[j])]
        return [(self._context(prefix, self.source.closing, True), rows.candidates[j], rows.masses[j], rows.own[j])]

    def _context(self, prefix: tuple[int, ...], extension: bytes, turn_may_end: bool) -> _Context:
        key = (prefix, extension, turn_may_end)
        context = self._contexts.get(key)
        if context is None:
            data = self.target.token_bytes.of(prefix) + extension
            context = self._contexts[key] = _Context(prefix, data, extension, turn_may_end)
        return context

    def _resolve(self, wanted: list[tuple[_Context, int]]) -> None:
        """Finds out what candidates count for, by tokenising them after their context, all at once."""
        pending = []
        texts = []
        for context, candidate in wanted:
            if candidate in context.counts_for:
                continue
            known, text, size = self._without_encoding(context, candidate)
            context.counts_for[candidate] = known
            self._cached += 1
            if text is not None:
                pending.append((context, candidate, text, size))
                texts.append(text)
        encodings = self.target.token_bytes.fragment.encode_batch_fast(texts, add_special_tokens=False) if texts else []
        pieces = self.target.token_bytes.pieces
        for (context, candidate, text, size), encoding in zip(pending, encodings, strict=True):
            ids = encoding.ids
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
            data, lookahead = context.data, ""
        else:
            piece = pieces[candidate] if 0 <= candidate < len(pieces) else None
            if not piece:
                return TAIL, None, 0
            data, lookahead = context.data + piece, self._after_spaces(candidate, piece)
        try:
            return TAIL, data.decode() + lookahead, len(data)
        except UnicodeDecodeError:
            # Ends inside a character: no text to tokenise, only a token of exactly these bytes will do.
            exact = context.extension if candidate in self._source_ends else context.extension + pieces[candidate]
            return self._token_of.get(exact, TAIL), None, 0

    def _after_spaces(self, candidate: int, piece: bytes) -> str:
        """What to put after a candidate that ends in spaces, because it is not the end of the text.

        Tokenizers of the GPT family give a word its last space: `x` would take one from the candidate, ` x` does not.
        """
        lookahead = self._lookahead.get(candidate)
        if lookahead is None:
            text = piece.decode(errors="replace")
            lookahead = ""
            if text[-1:].isspace():
                encode = self.source.token_bytes.fragment.encode
                kept = (x for x in ("x", " x") if encode(text + x, add_special_tokens=False).ids[:1] == [candidate])
                lookahead = next(kept, "x")
            self._lookahead[candidate] = lookahead
        return lookahead

    def _collect(self, paths, target_ids, content, rows: _Rows, kind, position, skip) -> Aligned:
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
            for context, candidates, masses, own in path:
                if own:
                    mass[gold] = mass.get(gold, 0.0) + own
                counts_for = self._unchanged if context is None else context.counts_for.__getitem__
                for token, p in zip(map(counts_for, candidates), masses, strict=True):
                    if token == DROPPED:
                        dropped += p
                    elif token == END:
                        mass[end_id] = mass.get(end_id, 0.0) + p
                    elif token != TAIL:
                        mass[token] = mass.get(token, 0.0) + p
            possible = max(1.0 - dropped, 0.0)
            reliability[t] = possible
            if possible < self.min_reliability:
                skip[t] = SKIP_LOW_RELIABILITY
                continue
            kept = sorted(((-p, i) for i, p in mass.items() if p > 0.0))[: self.top_k]
            if not kept:
                skip[t] = SKIP_EMPTY
                continue
            # float32 log-probabilities may add up to a hair more than one.
            possible = max(possible, -sum(p for p, _ in kept))
            sizes[t + 1] = len(kept)
            all_ids.extend(i for _, i in kept)
            kept_masses = [-p / possible for p, _ in kept]
            all_masses.extend(kept_masses)
            tail[t] = max(1.0 - sum(kept_masses), 0.0)
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


class _Rows:
    """A capture as lists: per row its candidates other than the own token, their masses, and the own token's mass."""

    def __init__(self, capture: SourceCapture, end_ids: frozenset[int], n: int):
        m = len(capture.ids)
        shapes = {
            len(capture.begin),
            len(capture.stop),
            len(capture.top_ids),
            len(capture.top_logprobs),
            len(capture.own_logprobs),
        }
        if shapes != {m} or capture.top_ids.shape != capture.top_logprobs.shape:
            raise DataError(
                f"a capture's arrays must have one row per token ({m}), got rows {sorted(shapes)}; capture it again"
            )
        self.ids: list[int] = capture.ids.tolist()
        self.begin: list[int] = capture.begin.tolist()
        self.stop: list[int] = capture.stop.tolist()
        self.has_end = m > 0 and self.ids[-1] in end_ids and self.begin[-1] == self.stop[-1] == n
        self.content = m - self.has_end
        if self.content and self.stop[self.content - 1] < n:
            raise DataError(
                f"a capture must reach the response's end, byte {n}, got {self.stop[self.content - 1]}; capture it again"
            )
        self.own: list[float] = np.exp(capture.own_logprobs.astype(np.float64)).tolist()
        self.candidates: list[list[int]] = []
        self.masses: list[list[float]] = []
        masses = np.exp(capture.top_logprobs.astype(np.float64)).tolist()
        for own, ids, row in zip(self.ids, capture.top_ids.tolist(), masses, strict=True):
            if own in ids or -1 in ids:
                keep = [n for n, i in enumerate(ids) if i != own and i >= 0]
                ids, row = [ids[n] for n in keep], [row[n] for n in keep]
            self.candidates.append(ids)
            self.masses.append(row)


class _Boundaries:
    """Where a target text can be cut so that what stands before the cut has no say in the tokens after it.

    With a pre-tokenizer that splits: at the pre-tokens, but not between two whitespace characters (what follows decides
    how a run of them is cut). Without one (Llama-2, Mistral): between two characters that no token of the vocabulary
    holds next to each other, because then no merge crosses.
    """

    def __init__(self, token_bytes: TokenBytes):
        self._bytes = token_bytes
        fragment = token_bytes.fragment
        self._normalizer, self._pre_tokenizer = fragment.normalizer, fragment.pre_tokenizer
        probe = "a b. c1 2\nd"
        if self._normalizer is not None:
            probe = self._normalizer.normalize_str(probe)
        self._splits = self._pre_tokenizer is not None and len(self._pre_tokenizer.pre_tokenize_str(probe)) > 1
        self._neighbours: set[str] | None = None
        if not self._splits:
            self._neighbours = set()
            for piece in token_bytes.pieces:
                try:
                    text = (piece or b"").decode()
                except UnicodeDecodeError:
                    if len(piece) > 1:  # part of a character and more: characters do not tell where merges cross
                        self._neighbours = None
                        break
                    continue
                self._neighbours.update(map("".join, itertools.pairwise(text)))

    def prefixes(self, ids: Sequence[int], start: int) -> list[tuple[int, ...]]:
        """Per token from `start` on, and for the end: the tokens before it since the start of the current pre-token.

        The current pre-token is that of the byte before: a candidate may still extend it.
        """
        pieces = [self._bytes.pieces[i] for i in ids]
        begins = [0, *itertools.accumulate(map(len, pieces))]
        cuts = self._cuts(b"".join(pieces).decode(errors="replace"), begins[-1])
        prefixes = []
        first = 0  # token at the last cut before this one
        for t in range(len(ids) + 1):
            # A cut at the token's own begin does not count: what follows is not known.
            if t > 0 and begins[t - 1] in cuts and begins[t - 1] < begins[t]:
                first = t - 1
            if t >= start:
                prefixes.append(tuple(ids[first:t]))
        return prefixes

    def _cuts(self, text: str, size: int) -> set[int]:
        """Byte offsets of the cuts in `text`."""
        if self._splits:
            normalised = text if self._normalizer is None else self._normalizer.normalize_str(text)
            if len(normalised) != len(text):
                return {0}
            starts = (begin for _, (begin, _) in self._pre_tokenizer.pre_tokenize_str(normalised))
            chars = [x for x in starts if x == 0 or not (text[x - 1].isspace() and text[x].isspace())]
        elif self._neighbours is not None:
            chars = [x for x in range(1, len(text)) if text[x - 1 : x + 1] not in self._neighbours]
        else:
            chars = []
        if len(text) == size:  # ASCII
            return {0, *chars}
        offsets = [0, *itertools.accumulate(len(c.encode()) for c in text)]
        if offsets[-1] != size:  # not decodable: replaced characters have other sizes
            return {0}
        return {0, *(offsets[x] for x in chars)}


def _same_tokens(left: TokenBytes, right: TokenBytes) -> bool:
    """Whether two tokenizers give every text the same ids (control tokens aside)."""

    def essence(tokens: TokenBytes):
        config = tokens.fragment_config
        added = {t["content"]: t["id"] for t in config["added_tokens"] if t["id"] not in tokens.specials}
        return added, config["normalizer"], config["pre_tokenizer"], config["model"]

    return left is right or essence(left) == essence(right)


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
        if clip < 0 or first != reached or piece[clip : len(piece) - max(e - n, 0)] != response[first : min(e, n)]:
            raise DataError(
                f"a {name} token must hold the response's bytes [{first}, {e}) = {response[first:e]!r}, token {i} is {piece!r}; "
                "encode the response again with this tokenizer"
            )
        clips.append(clip)
        reached = max(e, 0)
    if ids and reached < n:
        raise DataError(f"the {name}'s tokens must reach the response's end, byte {n}, got {reached}; encode it again")
    return clips
