"""Packs what the trainer reads: sequences in target tokens, with the sources' aligned distributions of their labels.

A sequence has rows, and a row has entries. A row is one source's distribution of one token: up to K entries and a tail, which
is the mass outside them. The rows of all sequences lie end to end, with offsets that say where each sequence's begin, and so
do the entries of all rows (as in CSR). profuser.train.targets reads the shards back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from profuser.alignment.types import KINDS, Aligned
from profuser.prepare.capture import ScoredResponse
from profuser.ragged import offsets_of
from profuser.recipe.schedule import Mode
from profuser.store.layout import TARGET_COLUMNS, shard_arrays, winner_of
from profuser.store.marks import marks_of
from profuser.text.encoded import Encoded
from profuser.text.fit import Verdict


@dataclass(frozen=True, slots=True)
class TargetText:
    """A text that the target is to learn, with what the sources said about it.

    example: its number in the split. encoded: the conversation in target tokens.
    scored: one capture per source, None where the source did not score the text. In inference mode only the winner did.
    weights: (S,), how much each source counts beside the others.
    """

    example: int
    mode: Mode
    text: str
    encoded: Encoded
    scored: list[ScoredResponse | None]
    weights: list[float]


class TargetWriter:
    """Collects aligned sequences, and counts of the alignment, until `arrays` returns them as the arrays of one shard.

    Args:
        sources: how many sources there are. vocabulary: how many tokens the target has.
        top_k: the most entries that a row can have.
        min_ce_unit: "token" or "byte", the unit of the cross-entropies by which Min-CE chooses.
        keep: "winner" or "all", the sources of a sequence whose rows are kept. What is counted are the rows of all.
    """

    def __init__(self, sources: int, vocabulary: int, top_k: int, min_ce_unit: str, keep: str):
        self.sources, self.vocabulary, self.top_k = sources, vocabulary, top_k
        self.min_ce_unit, self.keep = min_ce_unit, keep
        # One item per sequence, then per row, then per entry.
        self.example, self.mode, self.response_bytes, self.source_ce, self.source_weight = [], [], [], [], []
        self.input_ids, self.marks = [], []
        self.row_counts, self.row_tail = [], []
        self.entry_counts, self.entry_ids, self.entry_logprobs = [], [], []
        # The counts by mode, and all but the first by source as well.
        modes = len(Mode)
        self.skipped = np.zeros((modes, len(Verdict)), np.int64)
        self.kinds = np.zeros((modes, sources, len(KINDS)), np.int64)
        self.covered = np.zeros((modes, sources), np.int64)
        self.mapped_mass = np.zeros((modes, sources), np.float64)
        self.reliability = np.zeros((modes, sources, 10), np.int64)

    def skip(self, mode: Mode, verdict: Verdict) -> None:
        """Counts a text that is left out, with the reason."""
        self.skipped[mode, verdict] += 1

    def add(self, target: TargetText, aligned: Sequence[Aligned | None]) -> None:
        """Adds one sequence. `aligned` holds the aligned distributions of its labels, one item per source."""
        # The sequence itself.
        encoded, mode = target.encoded, target.mode
        positions = np.array(encoded.label_positions)
        self.example.append(target.example)
        self.mode.append(mode)
        self.response_bytes.append(len(target.text.encode()))
        # In inference mode only the winner of the vote was captured, so that Min-CE has no choice either.
        ce = np.array([np.inf if r is None else r.cross_entropy(self.min_ce_unit) for r in target.scored], np.float32)
        self.source_ce.append(ce)
        self.source_weight.append(target.weights)
        self.input_ids.append(np.array(encoded.input_ids))

        # The rows of the sources that are kept. A position that the alignment left without entries gets no row.
        sources, tokens = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
        for source, found in enumerate(aligned):
            if found is None:
                continue
            counts = np.diff(found.offsets)
            kept = np.flatnonzero(counts)
            self.kinds[mode, source] += np.bincount(found.kind, minlength=len(KINDS))
            self.covered[mode, source] += len(kept)
            self.mapped_mass[mode, source] += (1 - found.tail[kept]).sum(dtype=np.float64)
            self.reliability[mode, source] += np.histogram(found.reliability[kept], bins=10, range=(0, 1))[0]
            if self.keep == "winner" and source != winner_of(ce):
                continue
            sources.append(np.full(len(kept), source))
            tokens.append(positions[kept])
            self.row_tail.append(found.tail[kept])
            self.entry_counts.append(counts[kept])
            self.entry_ids.append(found.ids)
            self.entry_logprobs.append(found.logprobs)
        source, token = np.concatenate(sources), np.concatenate(tokens)
        self.marks.append(marks_of(np.array(encoded.label_mask, bool), source, token))
        self.row_counts.append(len(source))

    def arrays(self) -> dict[str, np.ndarray]:
        """Returns the shard's arrays (profuser.store.layout.TARGET_COLUMNS)."""

        def end_to_end(parts: list[np.ndarray]) -> np.ndarray:
            """Concatenates the parts, of which there may be none."""
            return np.concatenate(parts or [np.zeros(0)])

        row_offsets, entry_counts = offsets_of(self.row_counts), end_to_end(self.entry_counts).astype(np.int64)
        arrays = {
            "example": np.array(self.example),
            "mode": np.array(self.mode),
            "response_bytes": np.array(self.response_bytes),
            "source_ce": np.array(self.source_ce).reshape(-1, self.sources),
            "source_weight": np.array(self.source_weight).reshape(-1, self.sources),
            "offsets": offsets_of([len(ids) for ids in self.input_ids]),
            "row_offsets": row_offsets,
            "entry_offsets": offsets_of(entry_counts)[row_offsets],
            "input_ids": end_to_end(self.input_ids),
            "marks": end_to_end(self.marks),
            "row_tail": end_to_end(self.row_tail),
            "entry_counts": entry_counts,
            "entry_ids": end_to_end(self.entry_ids),
            "entry_logprobs": end_to_end(self.entry_logprobs),
            "skipped": self.skipped,
            "kinds": self.kinds,
            "covered": self.covered,
            "mapped_mass": self.mapped_mass,
            "reliability": self.reliability,
        }
        return shard_arrays(TARGET_COLUMNS, arrays, self.vocabulary, self.top_k)
