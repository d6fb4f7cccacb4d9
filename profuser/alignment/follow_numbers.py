"""Asks a source how its numbers go on, for a target that has tokens of several digits (rule 9 of reference.py).

A source that writes `4` may mean the number 4 or go on with `47`. Its row does not say so, and for the numbers that the text
does not have no other row does. Here the source goes on from the probable ones among them: `4` is followed by a look at the
row behind it, then `47` by one at the row behind that, until the target's longest token of digits is reached. All branches
of a response share its key-value cache, so a response costs one more reading and its branches' tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedModel

from profuser.alignment.numbers import is_number, most_merged_digits, number_ids
from profuser.alignment.types import NUMBERS, PrefixRanges
from profuser.kernels.head import ChunkedHead, Head
from profuser.kernels.source_topk import source_topk
from profuser.models.branches import Branch, Branches
from profuser.text.encoded import Encoded
from profuser.text.token_bytes import TokenBytes

FOLLOWED = 0.005
"""The least probability with which the source writes a number's digits, for the number to be followed further."""
LISTED = 1e-5
"""The least probability of a number that is listed."""


@dataclass(frozen=True, slots=True)
class NumberRow:
    """A row of a capture at which a number may begin or go on.

    row: the row. most: the most digits that are of interest there.
    """

    row: int
    most: int


def number_rows(target: TokenBytes, encoded: Encoded, source: TokenBytes, own: Encoded) -> list[NumberRow]:
    """The rows of a response at which its text has a number, and those behind a number.

    Args:
        encoded, own: the response in the target's and in the source's tokens.
    """
    longest, last = most_merged_digits(target.pieces), len(encoded.spans) - 1
    if longest < 2 or last < 0:
        return []
    rows: list[NumberRow] = []
    t, behind_digit = 0, False
    for row, (i, (begin, _)) in enumerate(zip(own.input_ids[own.start : own.stop], own.spans, strict=True)):
        number = is_number(source.pieces[i])
        if number or behind_digit:
            while t < last and encoded.spans[t][1] < begin:
                t += 1
            # Digits of the target's token in front of the row count already, if the row's number goes on in that token.
            first, stop = encoded.spans[t]
            before = target.piece(encoded.input_ids[encoded.start + t])
            before = before[: len(before) - max(stop - begin, 0)]
            goes_on = first < begin < stop or (begin == stop and not number)
            digits = len(before) - len(before.rstrip(b"0123456789")) if goes_on else 0
            rows.append(NumberRow(row, longest - digits if digits < longest else longest))
        behind_digit = (source.pieces[i] or b"")[-1:].isdigit()
    if behind_digit and own.end_of_turn == own.stop:
        rows.append(NumberRow(len(own.spans), longest))
    return [of for of in rows if own.label_positions[of.row] > 0]  # nothing is said of a text's first token


class NumberFollower:
    """Follows the numbers of one source for one target.

    Args:
        target, source: the tokens of both sides.
        model, head: the source.
        top_k: how many numbers are kept per row.
    """

    def __init__(self, target: TokenBytes, source: TokenBytes, model: PreTrainedModel, head: Head, top_k: int):
        self.target, self.source, self.model, self.head, self.top_k = target, source, model, head, top_k
        pieces = source.pieces[: head.weight.shape[0]]
        # The tokens with which a number may begin or go on.
        ids = [i for i, piece in enumerate(pieces) if piece and (is_number(piece) or piece[:1].isdigit())]
        self._pieces = [pieces[i] or b"" for i in ids]
        self._begins = np.array([is_number(piece) for piece in self._pieces], dtype=bool)
        self._goes_on = np.array([piece[:1].isdigit() for piece in self._pieces], dtype=bool)
        self._ids = np.array(ids, dtype=np.int64)
        index = torch.from_numpy(self._ids).to(head.weight.device)
        bias = None if head.bias is None else head.bias[index]
        self._part = Head(head.weight[index], bias, head.softcap, head.logit_scale)

    def follow(self, own: Encoded, rows: Sequence[NumberRow]) -> PrefixRanges:
        """The numbers that the source may write at rows of a response: ranges of kind NUMBERS, in the order of the rows.

        Args:
            own: the response in the source's tokens.
            rows: what `number_rows` gives for it.
        Raises:
            DataError: the model cannot go on along several branches.
        """
        if not rows or not len(self._ids):
            return PrefixRanges.none(self.top_k)
        positions = own.label_positions
        read = Branches(self.model, own.input_ids[: positions[rows[-1].row]], "leave out align.follow_numbers")
        if len(read.hidden) > 1:
            read.check()  # of every text, because a long one may fill a window that a short one does not
        branches: list[Branch] = [(positions[of.row], ()) for of in rows]
        numbers: list[dict[bytes, float]] = [{} for _ in rows]
        # Every number that begins at a row, except through the row's own token, whose numbers the gold path tells.
        shares = self._shares(read, branches)
        shares[:, ~self._begins] = 0.0
        for n, of in enumerate(rows):
            shares[n, self._ids == own.input_ids[positions[of.row]]] = 0.0
        total = shares.sum(1)
        places = [(n, b"", 1.0, branch) for n, branch in enumerate(branches)]
        while places:
            further = []
            for (n, before, mass, (cut, tokens)), share in zip(places, shares, strict=True):
                for c in np.flatnonzero(mass * share >= LISTED).tolist():
                    piece, reached = self._pieces[c], mass * float(share[c])
                    digits = piece.lstrip(b" ")
                    run = digits[: len(digits) - len(digits.lstrip(b"0123456789"))]
                    number = before + piece[: len(piece) - len(digits)] + run
                    beyond = len(number.lstrip(b" ")) - rows[n].most
                    if beyond >= 0 or len(run) < len(digits):
                        # The number is decided, or the token itself goes on with something else.
                        number = number[: len(number) - max(beyond, 0)]
                        numbers[n][number] = numbers[n].get(number, 0.0) + reached
                    elif reached >= FOLLOWED:
                        further.append((n, number, reached, (cut, (*tokens, int(self._ids[c])))))
            places = further
            if places:
                shares = self._shares(read, [branch for *_, branch in places])
                shares[:, ~self._goes_on] = 0.0
                for (n, number, mass, _), share in zip(places, shares, strict=True):
                    numbers[n][number] = numbers[n].get(number, 0.0) + mass * max(1.0 - float(share.sum()), 0.0)
        return self._ranges(rows, numbers, total)

    @torch.no_grad()
    def _shares(self, read: Branches, branches: Sequence[Branch]) -> np.ndarray:
        """The probabilities of the tokens of numbers behind branches, (n, number of these tokens) float64."""
        hidden = read.states(branches).to(self.head.weight.device)
        none = torch.zeros(len(hidden), dtype=torch.long, device=hidden.device)
        head = self.head
        lse = source_topk(
            hidden, head.weight, none, 1, bias=head.bias, softcap=head.softcap, logit_scale=head.logit_scale
        )[2]
        dtype = torch.float32
        logits = torch.empty(len(hidden), len(self._ids), dtype=dtype, device=hidden.device)
        ChunkedHead(self._part, dtype, len(hidden)).logits_into(logits, hidden.to(dtype))
        return (logits.double() - lse.double()[:, None]).exp().cpu().numpy()

    def _ranges(
        self, rows: Sequence[NumberRow], numbers: Sequence[dict[bytes, float]], total: np.ndarray
    ) -> PrefixRanges:
        """The most probable numbers of every row."""
        ids = np.full((len(rows), self.top_k), -1, dtype=np.int32)
        logprobs = np.full((len(rows), self.top_k), -np.inf, dtype=np.float32)
        base, known = len(self.target.pieces) + len(self.source.pieces), number_ids()
        for n, of_row in enumerate(numbers):
            kept = sorted((-p, number) for number, p in of_row.items() if p >= LISTED)[: self.top_k]
            ids[n, : len(kept)] = [base + known[number] for _, number in kept]
            logprobs[n, : len(kept)] = np.log([-p for p, _ in kept])
        return PrefixRanges(
            rows=np.array([of.row for of in rows], dtype=np.int32),
            strip=np.full(len(rows), NUMBERS, dtype=np.int32),
            logmass=np.log(np.maximum(total, LISTED)).astype(np.float32),
            ids=ids,
            logprobs=logprobs,
        )
