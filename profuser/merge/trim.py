"""Finds the largest elements of task vectors exactly, although the vectors are only ever read in blocks.

Numbers that are not negative stand in the order of their bits. The bits of the smallest magnitude that is kept are found 16 at a
time, from the highest on: a pass over a vector counts the values of the next 16 bits among the elements whose higher bits are those
that were found. So a vector in fp32 is read twice, whatever is in it (radix selection).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import hardshrink

from profuser.merge.blocks import Blocks

DIGIT = 16
"""So many bits are found in one pass."""


class Trim:
    """Sets all but the largest share of a task vector's elements to 0. At least one element is kept.

    Exactly as many are kept as the density says: of elements that have the smallest magnitude that is kept, the first ones. It is
    called with the blocks of the vector, in their order, after all of them were counted for every digit.
    """

    def __init__(self, density: float):
        self._density = density
        self._bits = 0  # of the smallest magnitude that is kept, as far as they were found
        self._left: int | None = None  # how many elements with these bits are kept
        self._counts = torch.zeros(1 << DIGIT, dtype=torch.int64)

    def count(self, delta: Tensor, shift: int) -> None:
        """Counts the values of the bits from `shift` on, among the elements whose higher bits are those that were found."""
        bits = magnitudes(delta)
        if self._left is not None:
            found = bits.numpy()  # numpy takes few elements out of many faster than torch
            found = found[found >> (shift + DIGIT) == self._bits]
            bits = torch.from_numpy(found).sub_(self._bits << (shift + DIGIT))
        self._counts += torch.bincount(bits >> shift, minlength=1 << DIGIT)

    def find_digit(self) -> None:
        """Finds the next bits from what was counted."""
        # How many elements have the largest value, at least the second largest, and so on.
        at_least = self._counts.flip(0).cumsum(0)
        if self._left is None:
            self._left = max(1, int(self._density * int(at_least[-1])))
        smaller = int((at_least < self._left).sum())
        if smaller:
            self._left -= int(at_least[smaller - 1])
        self._bits = self._bits << DIGIT | (len(at_least) - 1 - smaller)
        self._counts.zero_()

    def __call__(self, delta: Tensor) -> Tensor:
        integers = torch.int64 if delta.dtype == torch.float64 else torch.int32
        below, smallest = torch.tensor([max(0, self._bits - 1), self._bits], dtype=integers).view(delta.dtype).tolist()
        if not self._left or not smallest:
            return hardshrink(delta, smallest)
        alike = magnitudes(delta) == self._bits
        count = int(alike.count_nonzero())
        if count <= self._left:
            self._left -= count
            return hardshrink(delta, below)
        kept = hardshrink(delta, smallest)
        (places,) = alike.nonzero(as_tuple=True)
        kept.reshape(-1)[places[: self._left]] = delta.reshape(-1)[places[: self._left]]
        self._left = 0
        return kept


def magnitudes(delta: Tensor) -> Tensor:
    """The magnitudes of all elements, as whole numbers that have the same order."""
    return delta.abs().reshape(-1).view(torch.int64 if delta.dtype == torch.float64 else torch.int32)


def trims(blocks: Blocks, densities: Sequence[float]) -> list[Trim | None]:
    """One for the task vector of every model, whose blocks stand behind those of the base. It is None for a vector that stays whole."""
    found = [Trim(density) if density < 1 else None for density in densities]
    width = next((8 * base.element_size() for base, *_ in blocks), 0)  # a parameter without elements has no block
    for shift in range(width - DIGIT, -1, -DIGIT) if any(found) else ():
        for base, *tensors in blocks:
            for trim, tensor in zip(found, tensors, strict=True):
                if trim is not None:
                    trim.count(tensor - base, shift)
        for trim in filter(None, found):
            trim.find_digit()
    return found
