"""Reads the top-k log-probabilities that a user has of a source, from an inference server for instance. The source is then not run.

Two forms of a row are known, of which a file may hold both. Beside `prompt` (or `messages`) and `response` it has

- `token_ids`, `top_ids` and `top_logprobs`: the tokens, and for each the most probable tokens in its place; and `logprobs`, the
  tokens' own, which may be missing where all of them are among the most probable; or
- `prompt_token_ids` and `prompt_logprobs`, as vLLM returns them for the whole conversation.

The tokens are those of the whole conversation, or only those that are learnt: the response's and its end of turn. They must be the tokens
that the source's own tokenizer and chat template give. A file says nothing of prefixes, so that target tokens which begin inside a
source's token are skipped (docs/alignment.md, "The top k alone, as a server gives it").
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from profuser.alignment.types import PrefixRanges, SourceCapture
from profuser.disk_table import DiskTable, key_of
from profuser.errors import DataError, in_short
from profuser.prepare.capture import ScoredResponse
from profuser.prepare.data import plain
from profuser.prepare.given import file_rows, prompt_of_row
from profuser.prepare.spelt_json import from_json
from profuser.text.chat import ChatFormat
from profuser.text.conversation import Prompt
from profuser.text.encoded import Encoded
from profuser.text.fit import Fitted

LISTS = ("token_ids", "top_ids", "top_logprobs", "logprobs", "prompt_token_ids", "prompt_logprobs")
"""The columns with an entry per token."""
LARGEST = 1e6
"""No log-probability is below this with its sign turned, but that of what is impossible."""
ROUNDING = 1e-3
"""By so much a probability, or the sum of a token's, may be above 1: servers round them."""
COARSE_ROUNDING = 0.02
"""So far bf16 may take the sum above 1, which is then divided out."""
APART = 0.02
"""So far may a token's own log-probability be from what the most probable ones say, as a share of it, or absolutely above -1."""


@dataclass(frozen=True, slots=True)
class GivenRow:
    """What a row of a file says about n tokens.

    where: what messages call the row. ids: (n,) int32, the tokens. own: (n,) float32, their log-probabilities, NaN where unknown.
    top_ids: (n, k) int32, the most probable first, -1 = none. top_logprobs: (n, k) float32, natural log.
    """

    where: str
    ids: np.ndarray
    own: np.ndarray
    top_ids: np.ndarray
    top_logprobs: np.ndarray


class GivenLogprobs:
    """The top-k log-probabilities of one source, from a file or all files of a pattern, which are read one after the other.

    Of several rows of one response the first counts whose tokens fit.

    Args:
        source: the source's name, for messages. path: the file. chat: the source's chat format. top_k: how many entries are kept.
    Raises:
        DataError: a file is missing or broken; a row lacks a part, or says what no source can say.
    """

    def __init__(self, source: str, path: str, chat: ChatFormat, top_k: int):
        key = f"sources: {source}: logprobs"
        self.place = f"{key} {path}"
        self._chat, self._top_k = chat, top_k
        self._of: DiskTable[GivenRow] = DiskTable()
        for where, row in file_rows(key, path):
            self._add(where, row)

    def _add(self, where: str, row: dict[str, Any]) -> None:
        response = row.get("response")
        if not isinstance(response, str):
            raise DataError(f"{where}: `response` must be a text, got {in_short(response)}; fix the row")
        found = _read(where, row, len(self._chat.token_bytes.pieces), self._top_k)
        key = key_of(prompt_of_row(where, row), response.strip())
        if not any(np.array_equal(other.ids, found.ids) for other in self._of[key]):
            self._of.add(key, found)

    def has(self, prompt: Prompt, response: str) -> bool:
        """Whether the file has a response to a prompt. Whitespace around a response and in a prompt does not count."""
        return key_of(plain(prompt), response.strip()) in self._of

    def digest(self, prompt: Prompt, response: str) -> str | None:
        """Returns a digest of what the file says about a response to a prompt, in whatever row; None where it has not this response."""
        rows = self._of[key_of(plain(prompt), response.strip())]
        digest = hashlib.sha256()
        for row in rows:
            digest.update(str(row.top_ids.shape).encode())
            for array in (row.ids, row.own, row.top_ids, row.top_logprobs):
                digest.update(array.tobytes())
        return digest.hexdigest() if rows else None

    def scored(self, prompt: Prompt, response: str, fitted: Fitted, encoded: Encoded) -> ScoredResponse:
        """Returns what the source says about a response, as if it had been run, but without ranges.

        Args:
            fitted: what is learnt of the response. encoded: the conversation with that, in the source's tokens.
        Raises:
            DataError: the file has not this response, or other tokens; or a token that is learnt has no log-probabilities, or fewer than
                capture.top_k.
        """
        response_bytes = len(fitted.text.encode())
        rows = self._of[key_of(plain(prompt), response.strip())]
        if not rows:
            raise DataError(
                f"{self.place} must have all responses that are learnt, or none of a split, it has not {in_short(response)} to "
                f"{in_short(str(prompt))}; add the row"
            )
        row, at = next(((row, at) for row in rows if (at := _places(row, encoded)) is not None), (rows[0], None))
        if at is None:
            raise self._misfit(row, encoded, fitted.cut)
        own, top_ids, top_logprobs = row.own[at], row.top_ids[at, : self._top_k], row.top_logprobs[at, : self._top_k]
        few = np.flatnonzero((top_ids < 0).any(1)) if top_ids.shape[1] == self._top_k else np.arange(len(at))
        if len(few):
            token = int(at[few[0]])
            raise DataError(
                f"{row.where}: token {token} (from 0) must have capture.top_k = {self._top_k} log-probabilities, it has "
                f"{int((row.top_ids[token] >= 0).sum())}; set capture.top_k to that, or ask for more"
            )
        if (unknown := np.flatnonzero(~np.isfinite(own))).size:
            raise DataError(
                f"{row.where}: token {int(at[unknown[0]])} (from 0), {int(row.ids[at[unknown[0]]])}, must have a finite "
                "log-probability, and it is not among the most probable; add it as `logprobs`, which are the tokens' own"
            )
        spans = np.array(encoded.label_spans(response_bytes), dtype=np.int32).reshape(-1, 2)
        capture = SourceCapture(
            ids=row.ids[at],
            begin=spans[:, 0].copy(),
            stop=spans[:, 1].copy(),
            top_ids=top_ids,
            top_logprobs=top_logprobs,
            own_logprobs=own,
            ranges=PrefixRanges.none(self._top_k),
        )
        nll = -float(own.sum(dtype=np.float64))
        return ScoredResponse(capture, np.full(len(at), np.nan, np.float32), nll, len(at), response_bytes)

    def _misfit(self, row: GivenRow, encoded: Encoded, cut: bool) -> DataError:
        """The error for a row that holds neither the conversation nor the response. It is compared with what it agrees with longest."""
        given = row.ids.tolist()
        agreed = {
            what: next(
                (n for n, (ours, theirs) in enumerate(zip(ids, given)) if ours != theirs), min(len(ids), len(given))
            )
            for what, (ids, _) in _forms(encoded).items()
        }
        what = max(agreed, key=lambda form: agreed[form])
        n, (ids, _) = agreed[what], _forms(encoded)[what]
        got = f"{given[n]} ({self._text(given[n])})" if n < len(given) else "no more"
        fix = "ask for the log-probabilities of these tokens"
        if cut:
            fix = "the response was cut there: raise data.max_length, or set data.too_long: skip"
        return DataError(
            f"{row.where}: token {n} (from 0) of the {what} must be {ids[n]} ({self._text(ids[n])}), as the source's tokenizer and chat "
            f"template have it, got {got}; {fix}"
        )

    def _text(self, token: int) -> str:
        return repr(self._chat.tokenizer.convert_ids_to_tokens(token))


def _forms(encoded: Encoded) -> dict[str, tuple[list[int], Sequence[int]]]:
    """The tokens that a row may hold, each with the places among them of those that are learnt."""
    labels = encoded.label_positions
    return {
        "conversation": (encoded.input_ids, labels),
        "response": ([encoded.input_ids[i] for i in labels], range(len(labels))),
    }


def _places(row: GivenRow, encoded: Encoded) -> np.ndarray | None:
    """Returns where in a row the tokens stand that are learnt; None where it holds others."""
    for ids, at in _forms(encoded).values():
        if row.ids[: len(ids)].tolist() == ids:
            return np.array(at, dtype=np.int64)
    return None


def _read(where: str, row: Mapping[str, Any], vocabulary: int, top_k: int) -> GivenRow:
    """Reads a row in either form, and checks its numbers. `top_k` entries of a token are kept at most."""
    row = {name: _unspelt(cell) if name in LISTS else cell for name, cell in row.items()}
    served = row.get("prompt_logprobs") is not None
    names = ("prompt_token_ids", "prompt_logprobs") if served else ("token_ids", "top_ids", "top_logprobs")
    if missing := [name for name in names if not isinstance(row.get(name), (list, tuple))]:
        raise DataError(
            f"{where}: `{missing[0]}` must be a list with an entry per token, got {in_short(row.get(missing[0]))}; docs/data.md has "
            "the columns"
        )
    tokens = row[names[0]]
    own_given = None if served else row.get("logprobs")
    for name in (*names[1:], *(["logprobs"] if own_given is not None else [])):
        is_list = isinstance(row[name], (list, tuple))
        if not is_list or len(row[name]) != len(tokens):
            got = len(row[name]) if is_list else in_short(row[name])
            raise DataError(
                f"{where}: `{name}` must have one entry for each of its {len(tokens)} tokens, got {got}; fix the row"
            )

    ids, own = np.zeros(len(tokens), np.int32), np.full(len(tokens), np.nan, np.float32)
    top_ids, top_logprobs = (
        np.full((len(tokens), top_k), -1, np.int32),
        np.full((len(tokens), top_k), -np.inf, np.float32),
    )
    for n, token in enumerate(tokens):
        place = f"{where}: token {n} (from 0)"
        ids[n] = _token(place, token, vocabulary)
        if served:
            said, known = _served(place, row["prompt_logprobs"][n], ids[n])
        else:
            said, known = _listed(place, row["top_ids"][n], row["top_logprobs"][n]), None
            if own_given is not None:
                known = own_given[n]
        best = _checked(place, said, vocabulary)
        own[n] = _own(place, int(ids[n]), best, known)
        kept = sorted(best.items(), key=lambda entry: (-entry[1], entry[0]))[:top_k]
        for j, (candidate, logprob) in enumerate(kept):
            top_ids[n, j], top_logprobs[n, j] = candidate, logprob
    return GivenRow(where, ids, own, top_ids, top_logprobs)


def _unspelt(cell: Any) -> Any:
    """What a cell says that is spelt as JSON, as lists are in a CSV file. Any other is left as it is."""
    if not isinstance(cell, str):
        return cell
    try:
        return from_json(cell) if cell.strip() else None
    except (ValueError, RecursionError):
        return cell


def _served(place: str, entry: Any, token: int) -> tuple[list[tuple[Any, Any]], Any]:
    """The entries of vLLM's `prompt_logprobs` at one token, and the token's own log-probability.

    vLLM adds the token itself where it is not among the k that were asked for. Its rank then tells.
    """
    if entry is None:
        return [], None
    # A Parquet file has pairs in place of a mapping, or for every token all keys of all tokens, most of them null.
    pairs_only = isinstance(entry, list) and all(isinstance(x, tuple) and len(x) == 2 for x in entry)
    entry = dict(entry) if pairs_only else entry
    if isinstance(entry, Mapping):
        entry = {candidate: x for candidate, x in entry.items() if x is not None}
    if not isinstance(entry, Mapping) or not all(isinstance(x, Mapping) and "logprob" in x for x in entry.values()):
        raise DataError(
            f"{place}: `prompt_logprobs` must map tokens to their `logprob`, got {in_short(entry)}; fix the row"
        )
    known = entry.get(str(token), entry.get(token))
    rank = None if known is None else known.get("rank")
    added = isinstance(rank, int) and rank > len(entry)
    pairs = [(candidate, x["logprob"]) for candidate, x in entry.items() if not (added and x is known)]
    return pairs, None if known is None else known["logprob"]


def _listed(place: str, ids: Any, logprobs: Any) -> list[tuple[Any, Any]]:
    """The entries of `top_ids` and `top_logprobs` at one token. null means that there are none, and so does -1 as an id."""
    ids, logprobs = [] if ids is None else ids, [] if logprobs is None else logprobs
    if not all(isinstance(x, (list, tuple)) for x in (ids, logprobs)) or len(ids) != len(logprobs):
        raise DataError(
            f"{place}: `top_ids` and `top_logprobs` must be lists of one length, got {in_short(ids)} and {in_short(logprobs)}; fix the row"
        )
    return [pair for pair in zip(ids, logprobs) if pair[0] != -1]


def _checked(place: str, entries: Iterable[tuple[Any, Any]], vocabulary: int) -> dict[int, float]:
    """The log-probabilities of the most probable tokens at one place, after checking that they can be what they say."""
    found: dict[int, float] = {}
    for candidate, logprob in entries:
        candidate = _token(place, candidate, vocabulary)
        if candidate in found:
            raise DataError(f"{place}: a token must come once, got {candidate} twice; fix the row")
        if (value := _logprob(place, logprob)) > -math.inf:
            found[candidate] = value
    if (total := sum(map(math.exp, found.values()))) > 1 + COARSE_ROUNDING:
        raise DataError(
            f"{place}: probabilities must add up to 1 at most, got {total:.4g}; write natural logarithms of what is not cut or scaled"
        )
    above = math.log(total) if total > 1 + ROUNDING else 0.0
    return {candidate: logprob - above for candidate, logprob in found.items()}


def _own(place: str, token: int, best: Mapping[int, float], known: Any) -> float:
    """The log-probability of the token itself: what the most probable ones say, else what is given for it; NaN where neither does."""
    if known is None:
        return best.get(token, math.nan)
    given = _logprob(place, known)
    highest = best.get(token, min(best.values(), default=0.0))
    apart = given - highest if token not in best else abs(given - highest)
    if math.isfinite(given) and apart > APART * max(1.0, -highest):
        what = "equal its entry" if token in best else "be at most that of the last"
        raise DataError(
            f"{place}: the log-probability of its own {token} must {what} among the most probable ({highest:.4g}), got {given:.4g}; "
            "check that all lists begin at the same token"
        )
    return best.get(token, given)


def _token(place: str, token: Any, vocabulary: int) -> int:
    """A token's id, which JSON's keys spell as text."""
    if isinstance(token, str) and token.isascii() and token.isdigit() and len(token) <= len(str(vocabulary)):
        token = int(token)
    if not isinstance(token, (int, np.integer)) or isinstance(token, bool) or not 0 <= token < vocabulary:
        raise DataError(
            f"{place}: a token must be an id below {vocabulary}, got {in_short(token)}; use the source's own tokens"
        )
    return int(token)


def _logprob(place: str, value: Any) -> float:
    """A log-probability, which rounding may have put above 0."""
    is_number = not isinstance(value, bool) and isinstance(value, (int, float, np.floating))
    if not is_number or not (value == -math.inf or -LARGEST < value <= ROUNDING):
        raise DataError(
            f"{place}: a log-probability must be a number, 0 at most, got {in_short(value)}; write natural logarithms"
        )
    return min(float(value), 0.0)
