"""Byte alignment in batches, by the C++ engine where it was built, else by its plain-Python oracle (`reference.py`).

C++ goes through the sequences and merges the mass. What a candidate counts for (rule 3) is asked of the target's tokenizer
in Python, at once for all candidates of a batch that are not known yet. The answers are remembered.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Sequence

import numpy as np

from profuser.alignment.merging import boundaries_of, candidate_table
from profuser.alignment.numbers import numbers
from profuser.alignment.reference import MAX_CACHED_CANDIDATES, PythonByteAligner, check_encoded, check_settings
from profuser.alignment.spans import _align
from profuser.alignment.types import Aligned, SourceCapture
from profuser.alignment.vocab_map import TAIL, TextFormat, same_tokens
from profuser.errors import DataError
from profuser.ragged import ragged
from profuser.text.encoded import Encoded

BYTES_AT_ONCE = 1 << 20  # this much text is tokenised at once; its encodings take about 100 times as much memory


class CppByteAligner:
    """`PythonByteAligner` in C++: it takes the same arguments and gives the same results up to rounding.

    Args:
        threads: the number of threads that share the sequences of a batch.
    """

    def __init__(
        self,
        target: TextFormat,
        source: TextFormat,
        *,
        top_k: int = 10,
        min_reliability: float = 0.1,
        threads: int = 1,
    ):
        check_settings(top_k, min_reliability)
        assert _align is not None, "without the C++ extension `byte_aligner` gives PythonByteAligner"
        self.target, self.source = target, source
        self.threads = threads
        self._lock = threading.Lock()  # the engine has state, and releases the GIL while it works
        self._boundaries = boundaries_of(target.token_bytes)
        table = candidate_table(target.token_bytes, source.token_bytes)
        size = len(source.token_bytes.pieces)
        ends = np.zeros(size, dtype=np.uint8)
        ends[[i for i in source.end_ids if i < len(ends)]] = 1
        self._engine = _align.ByteAligner(
            _vocabulary(target.token_bytes.pieces),
            _vocabulary([*source.token_bytes.pieces, *numbers()]),
            {
                "top_k": top_k,
                "min_reliability": min_reliability,
                "same_tokens": same_tokens(target.token_bytes, source.token_bytes),
                "target_end": -1 if target.end_id is None else target.end_id,
                "target_closing": target.closing,
                "source_closing": source.closing,
                "first_number": size,
                "source_ends": _with_numbers(ends),
                "table": _with_numbers(table.counts_for, TAIL),
                "opens": _with_numbers(table.opens.astype(np.uint8)),
                "closes": table.closes.astype(np.uint8),
                "lookahead": _with_numbers(table.lookahead),
                "merges_digits": table.merges_digits,
                "onward": _with_numbers(table.onward),
                "exact": np.fromiter(table.exact.values(), np.int32),
            },
        )

    def align(self, response: bytes, encoded: Encoded, capture: SourceCapture) -> Aligned:
        return self.align_batch([response], [encoded], [capture])[0]

    def align_batch(
        self, responses: Sequence[bytes], encoded: Sequence[Encoded], captures: Sequence[SourceCapture]
    ) -> list[Aligned]:
        """Does the same as `align` for several responses, in threads, and asks the tokenizer for all of them at once."""
        return self.align_arrays(self.batch_of(responses, encoded, captures))

    def batch_of(
        self, responses: Sequence[bytes], encoded: Sequence[Encoded], captures: Sequence[SourceCapture]
    ) -> dict:
        """The arrays of all sequences end to end, in the form that the C++ engine reads."""
        if not len(responses) == len(encoded) == len(captures):
            raise ValueError(
                f"a batch must have one encoding and one capture per response, got {len(responses)}, {len(encoded)} and "
                f"{len(captures)}"
            )
        # The sequences end to end. `ragged` gives the offsets at which each of them begins.
        for e in encoded:
            check_encoded(e, len(self.target.token_bytes.pieces))
        target_offsets, target_ids = ragged([np.array(e.input_ids[: e.stop]) for e in encoded], np.int32)
        span_offsets, spans = ragged([np.array(e.spans).reshape(-1, 2) for e in encoded], np.int32)
        spans = spans.reshape(-1, 2)
        starts = [self._boundaries.prefix_starts(e.input_ids[: e.stop], e.words[: e.stop], e.start) for e in encoded]
        # Captures may have prefix ranges of different widths, which are padded to the widest.
        ranges = [c.ranges for c in captures]
        widest = max((r.ids.shape[1] for r in ranges), default=1)
        return {
            "response": b"".join(responses),
            "response_offsets": np.cumsum([0, *map(len, responses)], dtype=np.int64),
            "target_ids": target_ids,
            "target_offsets": target_offsets,
            "start": np.array([e.start for e in encoded], dtype=np.int64),
            "target_end": np.array(
                [-1 if e.end_of_turn is None else e.input_ids[e.end_of_turn] for e in encoded], dtype=np.int32
            ),
            "span_offsets": span_offsets,
            "target_begin": np.ascontiguousarray(spans[:, 0]),
            "target_stop": np.ascontiguousarray(spans[:, 1]),
            "prefix_start": _joined(starts, np.int32),
            "source_offsets": np.cumsum([0, *(len(c.ids) for c in captures)], dtype=np.int64),
            "source_ids": _joined([c.ids for c in captures], np.int32),
            "source_begin": _joined([c.begin for c in captures], np.int32),
            "source_stop": _joined([c.stop for c in captures], np.int32),
            "top_ids": _joined([c.top_ids for c in captures], np.int32, columns=True),
            "top_logprobs": _joined([c.top_logprobs for c in captures], np.float32, columns=True),
            "own_logprobs": _joined([c.own_logprobs for c in captures], np.float32),
            "range_offsets": np.cumsum([0, *(len(r.rows) for r in ranges)], dtype=np.int64),
            "range_rows": _joined([r.rows for r in ranges], np.int32),
            "range_strip": _joined([r.strip for r in ranges], np.int32),
            "range_logmass": _joined([r.logmass for r in ranges], np.float32),
            "range_ids": _joined([_widened(r.ids, widest, -1) for r in ranges], np.int32, columns=True),
            "range_logprobs": _joined(
                [_widened(r.logprobs, widest, -np.inf) for r in ranges], np.float32, columns=True
            ),
        }

    def align_arrays(self, batch: dict) -> list[Aligned]:
        """Does the same as `align_batch` for the arrays that `batch_of` returns."""
        with self._lock:
            try:
                # The engine lists the texts that it needs tokenised, and is called again when it has learnt their tokens.
                found = self._engine.align(batch, self.threads)
                while texts := self._engine.wanted():
                    self._learn(texts)
                    found = self._engine.align(batch, self.threads)
            except ValueError as error:
                raise DataError(str(error)) from None
            if self._engine.cached > MAX_CACHED_CANDIDATES:
                self._engine.clear()
        return _split(found)

    def _learn(self, texts: list[str]) -> None:
        """Tokenises the texts, part by part, and hands the tokens to the engine."""
        fragment = self.target.token_bytes.fragment
        counts, ids = [0], []
        ends = np.cumsum([len(text) for text in texts])
        parts = np.searchsorted(ends, np.arange(BYTES_AT_ONCE, ends[-1] + BYTES_AT_ONCE, BYTES_AT_ONCE), side="right")
        for first, last in itertools.pairwise([0, *parts.tolist()]):
            part = texts[first:last]
            for encoding in fragment.encode_batch_fast(part, add_special_tokens=False):
                found = encoding.ids
                counts.append(len(found))
                ids.extend(found)
        self._engine.learn(np.array(ids, dtype=np.int32), np.cumsum(counts, dtype=np.int64))


def byte_aligner(
    target: TextFormat, source: TextFormat, *, top_k: int = 10, min_reliability: float = 0.1, threads: int = 1
) -> CppByteAligner | PythonByteAligner:
    """An aligner of the engine that is installed; `profuser.alignment.spans.ENGINE` names this engine."""
    if _align is None:
        return PythonByteAligner(target, source, top_k=top_k, min_reliability=min_reliability)
    return CppByteAligner(target, source, top_k=top_k, min_reliability=min_reliability, threads=threads)


def _with_numbers(of_tokens: np.ndarray, value: int = 0) -> np.ndarray:
    """An array with one value per source token, with the same value for every number behind them (rule 9)."""
    return np.pad(of_tokens, (0, len(numbers())), constant_values=value)


def _vocabulary(pieces: Sequence[bytes | None]) -> dict:
    """The bytes of all tokens end to end, in the form that the C++ engine reads."""
    return {
        "bytes": b"".join(piece or b"" for piece in pieces),
        "offsets": np.cumsum([0, *(len(piece or b"") for piece in pieces)], dtype=np.int64),
        "text": np.array([piece is not None for piece in pieces], dtype=np.uint8),
    }


def _joined(parts: Sequence[np.ndarray], dtype, columns: bool = False) -> np.ndarray:
    if not parts:
        return np.zeros((0, 1) if columns else 0, dtype=dtype)
    for part in parts:
        if part.dtype != dtype:
            raise DataError(f"a capture's array must be {np.dtype(dtype)}, got {part.dtype}; capture it again")
    return np.ascontiguousarray(np.concatenate(parts))


def _widened(rows: np.ndarray, width: int, padding) -> np.ndarray:
    missing = width - rows.shape[1]
    return np.pad(rows, ((0, 0), (0, missing)), constant_values=padding) if missing else rows


def _split(found: dict) -> list[Aligned]:
    """The results of each sequence of a batch, as views of the batch's arrays."""
    entries, result = found["entry_offsets"], []
    for begin, end in itertools.pairwise(found["position_offsets"].tolist()):
        part, kept = slice(begin, end), slice(*entries[[begin, end]].tolist())
        result.append(
            Aligned(
                kind=found["kind"][part],
                source_position=found["source_position"][part],
                offsets=entries[begin : end + 1] - entries[begin],
                ids=found["ids"][kept],
                logprobs=found["logprobs"][kept],
                tail=found["tail"][part],
                reliability=found["reliability"][part],
                skip_reason=found["skip_reason"][part],
            )
        )
    return result
