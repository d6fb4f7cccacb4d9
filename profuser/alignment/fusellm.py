"""FuseLLM's token alignment (compatibility mode `fusellm`), which compares token strings by edit distance, not bytes.

- Vocabulary map. In a source token's string the source's word prefix (Ġ, ▁) is replaced by the target's. The token is
  mapped to the target token with the same string, or else to the one with the smallest Levenshtein distance.
- Positions. The token strings of both sides, without their word prefixes, are matched by dynamic time warping with
  Levenshtein cost. Of equally cheap steps back, the diagonal one is preferred, then the one up (to the previous source
  token), then the one left (to the previous target token).
- Acceptance. A target token is accepted if exactly one source token lies on its part of the path and the map takes that
  source token to it. This is FuseLLM's soft variant. The hard variant accepts equal strings only, and the map takes
  these to each other as well.
- Rows. Whether a distribution is used is decided by the token in front of it. FuseLLM's position i holds the distribution
  of token i + 1, and is used if token i is accepted. Our row t is the distribution of token t itself, so it is used if
  token t - 1 is accepted, and it is the source's row after the match of token t - 1. Row 0 follows the prompt on both
  sides and is always used. The row of the end of turn is used if the last token is accepted.
- Entries. The source's top k of such a row are mapped token by token. Of several that are mapped to the same token, the
  most probable one is kept. The kept ones are renormalised by softmax.

Source: FuseLLM, arXiv 2401.10491, section 3.2, and the behaviour of its code. Three things are different on purpose:
- FuseLLM's one-hot fallback names the token in front, and ours (`fallback="label"`) names the row's own token.
- An end of turn counts for an end of turn by role, and no other control token has a counterpart.
- Of several target tokens at the same distance the one of the lowest id is taken. In FuseLLM the order of a hash table
  decides.
Left out is FuseLLM's exception for the first token of a text, where it overlooks that a word prefix is missing.
"""

from __future__ import annotations

import functools
import hashlib
import io
import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np
from rapidfuzz.distance import Levenshtein
from rapidfuzz.process import cdist

from profuser.alignment.capture_rows import check_capture
from profuser.alignment.reference import check_encoded
from profuser.alignment.spans import _align, match_spans
from profuser.alignment.types import (
    ALIGNED,
    SKIP_EMPTY,
    SKIP_NO_SOURCE_POSITION,
    SKIP_NOT_MATCHED,
    SKIPPED,
    Aligned,
    SourceCapture,
)
from profuser.errors import DataError
from profuser.store.files import write_atomic
from profuser.text.encoded import Encoded
from profuser.text.token_bytes import TokenBytes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

WORD_PREFIXES = ("Ġ", "▁", " ")  # what a space looks like in byte-level, SentencePiece and plain token strings
MAP_VERSION = 1  # a part of the cache's key; it is raised when a change of the rules makes another map
MAX_DISTANCES = 4_000_000  # the number of int32 distances that are held at once, 16 MB


class TokenFormat(Protocol):
    """One side of an alignment, such as `profuser.text.chat.ChatFormat` or `profuser.alignment.align.PlainText`."""

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase: ...
    @property
    def token_bytes(self) -> TokenBytes: ...
    @property
    def end_ids(self) -> tuple[int, ...]: ...
    @property
    def end_id(self) -> int | None: ...


class FuseLLMAligner:
    """Aligns captures of `source` to `target` by the rules above (mode `fusellm`).

    Args:
        top_k: the number of entries of a source's row that are mapped.
        fallback: what a position without a distribution gets: "skip" (nothing) or "label" (one-hot on its label).
        cache_dir: the directory of `vocabulary_map`, which is called here.
    """

    def __init__(
        self,
        target: TokenFormat,
        source: TokenFormat,
        *,
        top_k: int = 10,
        fallback: Literal["skip", "label"] = "skip",
        cache_dir: Path | None = None,
    ):
        if top_k < 1:
            raise ValueError(f"top_k must be >= 1, got {top_k}")
        if fallback not in ("skip", "label"):
            raise ValueError(f'fallback must be "skip" or "label", got {fallback!r}')
        self.target, self.source = target, source
        self.top_k, self.fallback = top_k, fallback
        self.token_map = vocabulary_map(target, source, cache_dir=cache_dir)
        self._source_ends = frozenset(source.end_ids)

    def align(self, response: bytes, encoded: Encoded, capture: SourceCapture) -> Aligned:
        """Aligns the distributions of one response.

        Row t is accepted if token t - 1 is (`accepted_positions`). It takes the source's row after the one that token
        t - 1 is matched with. Row 0 is always accepted and takes the source's row 0. The end of turn is a row like the
        others. If the source has no such row, the position is skipped with SKIP_NO_SOURCE_POSITION.

        This rule does not look at bytes. Where two matched tokens end at different bytes (`▁trust` and `Ġtrusted`), the
        row that is taken follows another prefix than the target's row. Measured on code and on texts in four languages,
        this happens at up to 0.4 % of the positions for Llama-2 from GPT-NeoX, and at up to 2.2 % from Qwen-2. `kind`
        cannot show it and may say same_span there.

        Args:
            response: its n bytes.
            encoded: the response in the target's tokens.
            capture: what the source says about the response.
        Returns:
            The aligned distributions. source_position is the row that was taken. The kind of an accepted row is what
            `match_spans` says of the target's token, whichever row was taken. All other rows have the kind SKIPPED, also
            where the fallback put a label. Positions with entries have tail 0 and reliability 1.
        Raises:
            DataError: the arrays do not belong together, or ids are outside the vocabularies.
        """
        # Read both sides. An end of turn has no bytes.
        check_encoded(encoded, len(self.target.token_bytes.pieces))
        check_capture(capture)
        n, rows = len(response), len(capture.ids)
        content = encoded.stop - encoded.start
        labels, spans = encoded.input_ids[encoded.start : encoded.stop], encoded.spans
        if encoded.end_of_turn is not None:
            labels, spans = [*labels, encoded.input_ids[encoded.end_of_turn]], [*spans, (n, n)]
        source_has_end = (
            rows > 0 and int(capture.ids[-1]) in self._source_ends and capture.begin[-1] == capture.stop[-1] == n
        )
        source_content = rows - bool(source_has_end)

        accepted, matched = accepted_positions(
            labels[:content], capture.ids[:source_content], self.target, self.source, self.token_map
        )
        # Each row follows the token in front of it, so there is one row more than tokens. The last one is that of the end
        # of turn, and is left off where the response was cut.
        accepted = np.append(True, accepted)[: len(labels)]
        position = np.append(0, matched + 1)[: len(labels)].astype(np.int32)
        skip = np.where(position < rows, ALIGNED, SKIP_NO_SOURCE_POSITION).astype(np.uint8)
        skip[~accepted] = SKIP_NOT_MATCHED
        begin, end = np.asarray(spans, dtype=np.int32).reshape(-1, 2).T
        kind, _ = match_spans(begin, end, capture.begin, capture.stop)
        kind[skip != ALIGNED] = SKIPPED
        position[skip != ALIGNED] = -1

        # Map the entries of the rows that were taken, and use the fallback where there are none.
        rows_of_positions: list[list[tuple[int, float]]] = []
        for t, label in enumerate(labels):
            entries: list[tuple[int, float]] = []
            if skip[t] == ALIGNED:
                entries = self._mapped(capture, int(position[t]), label if t == content else self.target.end_id)
                skip[t] = ALIGNED if entries else SKIP_EMPTY
            if not entries and self.fallback == "label":
                entries, skip[t], position[t] = [(label, 0.0)], ALIGNED, -1
            rows_of_positions.append(entries)
        sizes = np.array([len(entries) for entries in rows_of_positions], dtype=np.int64)
        return Aligned(
            kind=kind,
            source_position=position,
            offsets=np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64),
            ids=np.array([i for entries in rows_of_positions for i, _ in entries], dtype=np.int32),
            logprobs=np.array([logprob for entries in rows_of_positions for _, logprob in entries], dtype=np.float32),
            tail=(sizes == 0).astype(np.float32),
            reliability=(sizes > 0).astype(np.float32),
            skip_reason=skip,
        )

    def align_batch(
        self, responses: Sequence[bytes], encoded: Sequence[Encoded], captures: Sequence[SourceCapture]
    ) -> list[Aligned]:
        """Does the same as `align` for several responses."""
        return [self.align(*sequence) for sequence in zip(responses, encoded, captures, strict=True)]

    def _mapped(self, capture: SourceCapture, row: int, end_id: int | None) -> list[tuple[int, float]]:
        """A row's top k as (target token, log-probability), the most probable first, with a sum of probabilities of 1."""
        ids, logprobs = capture.top_ids[row], capture.top_logprobs[row].astype(np.float64)
        entries: dict[int, float] = {}
        for c in np.argsort(-logprobs, kind="stable")[: self.top_k]:
            i = int(ids[c])
            token = int(self.token_map[i]) if 0 <= i < len(self.token_map) else -1
            if i in self._source_ends and end_id is not None:
                token = end_id
            if token >= 0 and logprobs[c] > -np.inf:
                # The first entry for a token is kept, which is the most probable one.
                entries.setdefault(token, float(logprobs[c]))
        if not entries:
            return []
        lse = np.logaddexp.reduce(list(entries.values()))
        return sorted(((i, float(x - lse)) for i, x in entries.items()), key=lambda entry: (-entry[1], entry[0]))


def accepted_positions(
    target_ids: Sequence[int] | np.ndarray,
    source_ids: Sequence[int] | np.ndarray,
    target: TokenFormat,
    source: TokenFormat,
    token_map: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Tells which target tokens of a text FuseLLM's rule accepts, and the source token that each is matched with.

    Args:
        target_ids: (n,), the target's tokens of the text, without an end of turn.
        source_ids: (m,), the source's tokens of the same text, without an end of turn.
        token_map: (source vocabulary,), the result of `vocabulary_map(target, source)`.
    Returns:
        accepted: (n,) bool.
        source_position: (n,) int32, -1 where the token is not accepted.
    Raises:
        DataError: an id is outside its vocabulary.
    """
    target_ids = _checked_ids(target_ids, len(target.token_bytes.pieces), "target")
    source_ids = _checked_ids(source_ids, len(token_map), "source")
    path_source, path_target = dtw(*_bare_tokens(source, source_ids), *_bare_tokens(target, target_ids))
    position = np.full(len(target_ids), -1, dtype=np.int32)
    position[path_target] = path_source
    accepted = np.bincount(path_target, minlength=len(target_ids)) == 1
    accepted[accepted] = token_map[source_ids[position[accepted]]] == target_ids[accepted]
    position[~accepted] = -1
    return accepted, position


def vocabulary_map(target: TokenFormat, source: TokenFormat, *, cache_dir: Path | None = None) -> np.ndarray:
    """Maps each source token to the target token that FuseLLM takes it for.

    The map is computed once, which takes about a minute for vocabularies of 150,000 tokens. It is kept in `cache_dir`
    under a hash of both vocabularies. The default directory is $PROFUSER_CACHE, or else ~/.cache/profuser. A damaged file
    is made again.

    Returns:
        (source vocabulary,) int32. The source's end-of-turn tokens are mapped to the target's end of turn. Its other
        control tokens, and ids without a token, have -1. No source token is mapped to a control token of the target,
        except by the role end of turn.
    """
    # Look for a kept map of these two vocabularies.
    tokens = [_vocabulary(side.tokenizer) for side in (target, source)]
    parts = [
        [strings, sorted(side.token_bytes.specials), sorted(side.end_ids), side.end_id]
        for side, strings in zip((target, source), tokens, strict=True)
    ]
    key = hashlib.sha256(json.dumps([MAP_VERSION, *parts]).encode()).hexdigest()[:32]
    directory = Path(cache_dir or os.environ.get("PROFUSER_CACHE") or Path.home() / ".cache" / "profuser")
    path = directory / f"vocabulary-map-{key}.npy"
    known = _read_map(path, len(tokens[1]), len(tokens[0]))
    if known is not None:
        return known

    # Compute the map and keep it. A directory that cannot be written to is no reason to fail.
    logger.info("mapping a vocabulary of %d onto one of %d, once: %s", len(tokens[1]), len(tokens[0]), path)
    mapped = _compute_map(target, source, *tokens)
    buffer = io.BytesIO()
    np.save(buffer, mapped)
    try:
        write_atomic(path, buffer.getvalue())
    except OSError as error:
        logger.warning(
            "the vocabulary map could not be kept (%s) and is made again next time; set PROFUSER_CACHE", error
        )
    return mapped


def _compute_map(
    target: TokenFormat, source: TokenFormat, target_tokens: list[str], source_tokens: list[str]
) -> np.ndarray:
    # Map end tokens by role and equal strings to each other. `rest` holds the strings that are left, with their ids.
    mapped = np.full(len(source_tokens), -1, dtype=np.int32)
    no_choice = {*target.token_bytes.specials, *target.end_ids}
    choices = [i for i, token in enumerate(target_tokens) if token and i not in no_choice]
    id_of = {target_tokens[i]: i for i in choices}
    old, new = _word_prefix(source), _word_prefix(target)
    rest: dict[str, list[int]] = {}
    for i, token in enumerate(source_tokens):
        if i in source.end_ids:
            mapped[i] = -1 if target.end_id is None else target.end_id
        elif token and i not in source.token_bytes.specials:
            token = token.replace(old, new)
            mapped[i] = id_of.get(token, -1)
            if mapped[i] < 0:
                rest.setdefault(token, []).append(i)
    # Map each string that is left to the nearest one.
    if not choices:
        return mapped
    nearest = _nearest(list(rest), [target_tokens[i] for i in choices])
    for ids, choice in zip(rest.values(), nearest.tolist(), strict=True):
        mapped[ids] = choices[choice]
    return mapped


def _nearest(queries: list[str], choices: list[str]) -> np.ndarray:
    """Finds the choice of least Levenshtein distance for each query, the first one of several.

    The choices are grouped by length. Groups are compared with a query from its own length outwards, and a group is left
    out if its length alone rules it out.

    Returns:
        (len(queries),) int64, indices into choices.
    """
    # Characters that no choice has are all the same to a distance. They are replaced by one character, which makes most
    # queries in foreign scripts equal to each other.
    alphabet = set("".join(choices))
    foreign = next(chr(code) for code in range(len(alphabet) + 1) if chr(code) not in alphabet)
    reduced = ["".join(c if c in alphabet else foreign for c in query) for query in queries]
    index = dict.fromkeys(reduced)
    # Group the distinct queries and the choices by length.
    queries_of_length: dict[int, list[str]] = {}
    for query in index:
        queries_of_length.setdefault(len(query), []).append(query)
    choices_of_length: dict[int, list[int]] = {}
    for i, choice in enumerate(choices):
        choices_of_length.setdefault(len(choice), []).append(i)

    for length, same_length in queries_of_length.items():
        foreign_count = np.array([query.count(foreign) for query in same_length])
        best = np.full(len(same_length), max(length, *choices_of_length) + 1)  # more than any distance
        best_index = np.full(len(same_length), len(choices))
        for other in sorted(choices_of_length, key=lambda other: abs(other - length)):
            bucket = np.array(choices_of_length[other])
            strings = [choices[i] for i in bucket]
            # A lower bound of the distance: every foreign character costs an edit, and so does every character by which
            # one string is longer. Only queries that this bound does not rule out are compared with the group.
            excess = other - length
            bound = foreign_count + excess if excess > 0 else np.maximum(foreign_count, -excess)
            (open_queries,) = np.nonzero((bound < best) | ((bound == best) & (bucket[0] < best_index)))
            # Compare them in parts, so that no more than MAX_DISTANCES distances are held at once.
            rows = max(1, MAX_DISTANCES // len(strings))
            for begin in range(0, len(open_queries), rows):
                part = open_queries[begin : begin + rows]
                distances = cdist(  # pyrefly: ignore[no-matching-overload]  # the stubs refuse rapidfuzz's own scorers
                    [same_length[i] for i in part],
                    strings,
                    scorer=Levenshtein.distance,
                    score_cutoff=int(best[part].max()),
                    dtype=np.int32,
                    workers=-1,
                )
                column = distances.argmin(axis=1)
                distance = distances[np.arange(len(part)), column]
                better = (distance < best[part]) | ((distance == best[part]) & (bucket[column] < best_index[part]))
                best[part[better]] = distance[better]
                best_index[part[better]] = bucket[column[better]]
        index.update(zip(same_length, best_index.tolist(), strict=True))
    return np.array([index[query] for query in reduced], dtype=np.int64)


def dtw(
    source_codes: np.ndarray, source_offsets: np.ndarray, target_codes: np.ndarray, target_offsets: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Finds the cheapest way to walk through two token sequences together. A pair of tokens costs their Levenshtein distance.

    Args:
        source_codes, target_codes: (c,) uint32, the code points of the tokens, from `code_points(tokens)`.
        source_offsets, target_offsets: (tokens + 1,) int64, from `code_points(tokens)`.
    Returns:
        source_position, target_position: (p,) int32, the pairs of the path from the first to the last. They are empty if
        one of the sequences is empty.
    Raises:
        TypeError: an array has another dtype.
        ValueError: the offsets fall, or do not cover the code points.
    """
    engine = dtw_python if _align is None else _align.dtw
    return engine(source_codes, source_offsets, target_codes, target_offsets)


def dtw_python(
    source_codes: np.ndarray, source_offsets: np.ndarray, target_codes: np.ndarray, target_offsets: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The oracle of `dtw`."""
    source = _strings("source", source_codes, source_offsets)
    target = _strings("target", target_codes, target_offsets)
    n, m = len(source), len(target)
    path: list[tuple[int, int]] = []
    if n and m:
        # total[i][j] is the cost of the cheapest path to the first i source tokens and the first j target tokens.
        distance = functools.cache(Levenshtein.distance)
        total = [[0.0] + m * [np.inf]] + [(m + 1) * [np.inf] for _ in range(n)]
        for i in range(1, n + 1):
            for j in range(1, m + 1):
                before = min(total[i - 1][j - 1], total[i - 1][j], total[i][j - 1])
                total[i][j] = distance(source[i - 1], target[j - 1]) + before
        # Walk back from the end. Of equally cheap steps min() takes the first.
        i, j = n, m
        while (i, j) != (0, 0):
            path.append((i - 1, j - 1))
            i, j = min(((i - 1, j - 1), (i - 1, j), (i, j - 1)), key=lambda cell: total[cell[0]][cell[1]])
    positions = np.array(path[::-1], dtype=np.int32).reshape(-1, 2)
    return positions[:, 0].copy(), positions[:, 1].copy()


def code_points(strings: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Puts the code points of strings end to end.

    Returns:
        codes: (c,) uint32, the code points.
        offsets: (len(strings) + 1,) int64. String i is codes[offsets[i] : offsets[i + 1]].
    """
    codes = np.frombuffer("".join(strings).encode("utf-32-le", "surrogatepass"), dtype="<u4").astype(
        np.uint32, copy=False
    )
    return codes, np.cumsum([0, *map(len, strings)], dtype=np.int64)


def _strings(name: str, codes: np.ndarray, offsets: np.ndarray) -> list[str]:
    """The strings that `code_points` put end to end, after a check of the arrays."""
    for what, array, dtype in ((f"{name}_codes", codes, np.uint32), (f"{name}_offsets", offsets, np.int64)):
        if not isinstance(array, np.ndarray) or array.dtype != dtype:
            got = getattr(array, "dtype", type(array))
            raise TypeError(f"{what} must be a {np.dtype(dtype)} array, got {got}; make it with code_points()")
        if array.ndim != 1:
            raise ValueError(f"{what} must be a 1-D array, got {array.ndim}-D; make it with code_points()")
    if len(offsets) < 1 or offsets[0] != 0 or offsets[-1] != len(codes) or (np.diff(offsets) < 0).any():
        raise ValueError(
            f"{name}_offsets must rise from 0 to the number of code points, {len(codes)}, got {offsets.tolist()[:8]}...; "
            "make them with code_points()"
        )
    if (codes > 0x10FFFF).any():
        raise ValueError(
            f"{name}_codes must be code points <= 0x10FFFF, got {codes.max()}; make them with code_points()"
        )
    text = "".join(map(chr, codes.tolist()))
    return [text[b:f] for b, f in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)]


def _bare_tokens(side: TokenFormat, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The token strings without their word prefixes, in the form that `dtw` takes."""
    prefix = _word_prefix(side)
    return code_points([token.replace(prefix, "") for token in side.tokenizer.convert_ids_to_tokens(ids.tolist())])


def _word_prefix(side: TokenFormat) -> str:
    """The character that stands for a space in the tokenizer's token strings."""
    for i, piece in enumerate(side.token_bytes.pieces):
        if piece and piece.startswith(b" "):
            first = side.tokenizer.convert_ids_to_tokens(i)[0]
            if first in WORD_PREFIXES:  # false for the byte token <0x20>
                return first
    return " "


def _vocabulary(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The token string of every id, "" for an id without a token."""
    vocab = tokenizer.get_vocab()
    tokens = [""] * (max(vocab.values(), default=-1) + 1)
    for token, i in vocab.items():
        tokens[i] = token
    return tokens


def _read_map(path: Path, source_size: int, target_size: int) -> np.ndarray | None:
    """The map in this file; None if there is no file or it is damaged."""
    try:
        known = np.load(io.BytesIO(path.read_bytes()), allow_pickle=False)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, EOFError) as error:
        logger.warning("the vocabulary map %s cannot be read (%s) and is made again", path, error)
        return None
    right = isinstance(known, np.ndarray) and known.dtype == np.int32 and known.shape == (source_size,)
    if not right or ((known < -1) | (known >= target_size)).any():
        logger.warning("the vocabulary map %s is not one of %d ids and is made again", path, source_size)
        return None
    return known


def _checked_ids(ids: Sequence[int] | np.ndarray, vocabulary: int, name: str) -> np.ndarray:
    ids = np.asarray(ids, dtype=np.int64)
    wrong = ids[(ids < 0) | (ids >= vocabulary)]
    if len(wrong):
        raise DataError(
            f"{name} ids must be in [0, {vocabulary}), got {wrong[0]}; encode the response with the {name}'s own tokenizer"
        )
    return ids
