"""Writes what the trainer reads: sequences in target tokens with the sources' aligned distributions of their labels.

A shard is in CSR form: sequences -> rows -> entries. A row is one source's distribution of one token: K entries and the
tail, the mass outside them. Read back by profuser.train.targets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from profuser.alignment.types import KINDS, Aligned
from profuser.prepare.capture import ScoredResponse
from profuser.ragged import offsets_of
from profuser.recipe.schedule import Mode
from profuser.store.layout import TARGET_COLUMNS, shard_arrays
from profuser.text.encoded import Encoded
from profuser.text.fit import Verdict


@dataclass(frozen=True, slots=True)
class TargetText:
    """A text that the target is to learn, with what the sources said of it.

    example: its number in the split. encoded: the conversation in target tokens.
    scored: by source; None where the source did not score it (in inference mode all but the winner).
    """

    example: int
    mode: Mode
    text: str
    encoded: Encoded
    scored: list[ScoredResponse | None]


class TargetWriter:
    """Collects aligned sequences into the arrays of one shard, with the counts of the alignment."""

    def __init__(self, sources: int, vocabulary: int, min_ce_unit: str):
        self.sources, self.vocabulary, self.min_ce_unit = sources, vocabulary, min_ce_unit
        self.example, self.mode, self.response_bytes, self.source_ce = [], [], [], []
        self.input_ids, self.label_mask = [], []
        self.row_counts, self.row_position, self.row_source, self.row_tail, self.row_reliability = [], [], [], [], []
        self.entry_counts, self.entry_ids, self.entry_logprobs = [], [], []
        modes = len(Mode)
        self.skipped = np.zeros((modes, len(Verdict)), np.int64)
        self.kinds = np.zeros((modes, sources, len(KINDS)), np.int64)
        self.covered = np.zeros((modes, sources), np.int64)
        self.mapped_mass = np.zeros((modes, sources), np.float64)
        self.reliability = np.zeros((modes, sources, 10), np.int64)

    def skip(self, mode: Mode, verdict: Verdict) -> None:
        """Count a text that is not learnt."""
        self.skipped[mode, verdict] += 1

    def add(self, target: TargetText, aligned: Sequence[Aligned | None]) -> None:
        """One sequence. `aligned` has one entry per source over its labels."""
        encoded, mode = target.encoded, target.mode
        positions = np.array(encoded.label_positions)
        mask = np.zeros(len(encoded.input_ids), np.uint8)
        mask[positions] = 1
        self.example.append(target.example)
        self.mode.append(mode)
        self.response_bytes.append(len(target.text.encode()))
        # In inference mode the vote has chosen: only the winner was captured and takes part.
        self.source_ce.append([np.inf if r is None else r.cross_entropy(self.min_ce_unit) for r in target.scored])
        self.input_ids.append(np.array(encoded.input_ids))
        self.label_mask.append(mask)
        rows = 0
        for s, a in enumerate(aligned):
            if a is None:
                continue
            counts = np.diff(a.offsets)
            kept = np.flatnonzero(counts)
            rows += len(kept)
            self.row_position.append(positions[kept])
            self.row_source.append(np.full(len(kept), s))
            self.row_tail.append(a.tail[kept])
            self.row_reliability.append(np.round(a.reliability[kept] * 255))
            self.entry_counts.append(counts[kept])
            self.entry_ids.append(a.ids)
            self.entry_logprobs.append(a.logprobs)
            self.kinds[mode, s] += np.bincount(a.kind, minlength=len(KINDS))
            self.covered[mode, s] += len(kept)
            self.mapped_mass[mode, s] += (1 - a.tail[kept]).sum(dtype=np.float64)
            self.reliability[mode, s] += np.histogram(a.reliability[kept], bins=10, range=(0, 1))[0]
        self.row_counts.append(rows)

    def arrays(self) -> dict[str, np.ndarray]:
        """The shard's arrays (profuser.store.layout.TARGET_COLUMNS)."""

        def end_to_end(parts: list[np.ndarray]) -> np.ndarray:
            return np.concatenate(parts or [np.zeros(0)])

        arrays = {
            "example": np.array(self.example),
            "mode": np.array(self.mode),
            "response_bytes": np.array(self.response_bytes),
            "source_ce": np.array(self.source_ce, np.float32).reshape(-1, self.sources),
            "offsets": offsets_of([len(ids) for ids in self.input_ids]),
            "row_offsets": offsets_of(self.row_counts),
            "input_ids": end_to_end(self.input_ids),
            "label_mask": end_to_end(self.label_mask),
            "row_position": end_to_end(self.row_position),
            "row_source": end_to_end(self.row_source),
            "row_tail": end_to_end(self.row_tail),
            "row_reliability": end_to_end(self.row_reliability),
            "entry_offsets": offsets_of(end_to_end(self.entry_counts).astype(np.int64)),
            "entry_ids": end_to_end(self.entry_ids),
            "entry_logprobs": end_to_end(self.entry_logprobs),
            "skipped": self.skipped,
            "kinds": self.kinds,
            "covered": self.covered,
            "mapped_mass": self.mapped_mass,
            "reliability": self.reliability,
        }
        return shard_arrays(TARGET_COLUMNS, arrays, self.vocabulary)
