"""Model kinship (arXiv 2410.12613): how much what two models have learnt since a common base points the same way.

A model's delta is what it adds to the base's weights, all parameters as one vector: the task vector that profuser.merge would
merge. The kinship of two models is the Pearson correlation of their deltas, or the cosine. Parameters are read one after the other,
and in each a block of rows at a time. Means and products are summed in float64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from profuser.errors import ConfigError, DataError
from profuser.merge.models import Architecture, Candidate, blocks_of, open_models
from profuser.progress import Progress
from profuser.recipe.schema import SourceConfig

AS_LARGE = 1.0
"""A base is no ancestor of a model whose delta is this many times as large as the base's own weights."""
CONSTANT = 1e-28
"""A vector is the same everywhere if what varies has at most this share of its square, which rounding in float64 leaves."""
FINITE = "weights must be finite, got NaN or infinity; copy or download it again"


@dataclass(frozen=True, slots=True)
class Pair:
    """The kinship of two sources. It is None where a delta is 0 or, for Pearson's correlation, the same everywhere."""

    first: str
    second: str
    pearson: float | None
    cosine: float | None


@dataclass(frozen=True, slots=True)
class Kinship:
    """How the sources are related.

    base: the common base. change: for every source that can be compared, how large its delta is, in sizes of the base's weights;
    only matrices count, without the tables of tokens. pairs: all pairs of these sources.
    apart: the others, each with the reason.
    """

    base: str
    change: dict[str, float]
    pairs: list[Pair]
    apart: dict[str, str]

    @property
    def strangers(self) -> list[str]:
        """The sources that the base cannot be the ancestor of."""
        return [name for name, size in self.change.items() if size >= AS_LARGE]

    def least(self, names: Sequence[str]) -> float | None:
        """Returns the lowest cosine among some sources; None unless all can be compared and come from the base."""
        chosen = [pair.cosine for pair in self.pairs if pair.first in names and pair.second in names]
        related = set(self.change) - set(self.strangers)
        cosines = [cosine for cosine in chosen if cosine is not None]
        return min(cosines) if cosines and len(cosines) == len(chosen) and related.issuperset(names) else None


@dataclass(slots=True)
class Related:
    """The base, and the sources that can be compared with it. apart: those that cannot, each with the reason."""

    base: str
    architecture: Architecture
    first: Candidate
    others: dict[str, Candidate]
    apart: dict[str, str]


def open_related(base: str, sources: Sequence[SourceConfig]) -> Related:
    """Opens the base and all sources that have its architecture and vocabulary. No weights are read.

    Raises:
        DataError: the base cannot be read.
    """
    architecture, (first,) = open_models([base])
    related = Related(base, architecture, first, {}, {})
    for source in sources:
        try:
            if source.revision is not None:
                raise ConfigError(
                    f"models are compared and merged by directory, got the revision {source.revision}; download it and give its "
                    "directory as model"
                )
            related.others[source.name] = open_models([base, source.model])[1][1]
        except (ConfigError, DataError) as error:
            related.apart[source.name] = str(error)
    return related


def kinship(related: Related) -> Kinship:
    """Reads the weights, and computes the kinship of all pairs of sources that can be compared.

    Raises:
        DataError: a weight of the base is not finite.
    """
    names, architecture = list(related.others), related.architecture
    moments = Moments(len(names))
    base_size, sizes = 0.0, torch.zeros(len(names), dtype=torch.float64)
    parameters = [
        name for name in architecture.shapes if name in related.first.weights and name not in architecture.aliases
    ]
    with Progress("compare the weights", len(parameters) if names else 0, "parameters") as bar:
        for name in parameters if names else []:
            bar.update(1)
            blocks = blocks_of(architecture, [related.first, *related.others.values()], name)
            if not blocks.tensors[0].is_floating_point():
                continue
            counts = len(architecture.shapes[name]) > 1 and name not in architecture.tables
            for block in blocks:
                first, *rest = (part.double().reshape(-1) for part in block)
                if not first.isfinite().all():
                    raise DataError(f"{related.base}: {FINITE}")
                deltas = torch.stack(rest) - first
                moments.add(deltas)
                if counts:
                    base_size += float(first @ first)
                    sizes += deltas.square().sum(1)

    # A weight that is not finite would make all numbers of its source NaN.
    apart, finite = dict(related.apart), moments.dot.diagonal().isfinite()
    for n, name in enumerate(names):
        if not finite[n]:
            apart[name] = FINITE
    kept = [n for n in range(len(names)) if finite[n]]
    pairs = [
        Pair(names[a], names[b], ratio(moments.varying, a, b), ratio(moments.dot, a, b))
        for i, a in enumerate(kept)
        for b in kept[i + 1 :]
    ]
    length = math.sqrt(max(base_size, 1e-300))  # a base without any weights has no size
    change = {names[n]: math.sqrt(float(sizes[n])) / length for n in kept}
    return Kinship(related.base, change, pairs, apart)


class Moments:
    """The products of K vectors with each other, summed over blocks of their elements.

    Products are summed around the mean, and the sums of blocks are joined as by Chan, Golub and LeVeque (1979). So nothing cancels
    where a mean is much larger than what varies around it.
    """

    def __init__(self, size: int):
        self._count = 0
        self._mean = torch.zeros(size, dtype=torch.float64)
        self._centred = torch.zeros(size, size, dtype=torch.float64)

    def add(self, block: Tensor) -> None:
        """Adds the next elements of all vectors, (K, n) float64."""
        n = block.shape[1]
        mean = block.mean(1)
        around = block - mean[:, None]
        apart, total = mean - self._mean, self._count + n
        self._centred += around @ around.T + torch.outer(apart, apart) * (self._count * n / total)
        self._mean += apart * (n / total)
        self._count = total

    @property
    def varying(self) -> Tensor:
        """(K, K) the products of the vectors without their means. One that is the same everywhere is 0, whatever was rounded."""
        constant = self._centred.diagonal() <= CONSTANT * self.dot.diagonal()
        return self._centred.masked_fill(constant[:, None] | constant, 0.0)

    @property
    def dot(self) -> Tensor:
        """(K, K) the products of the vectors as they are."""
        return self._centred + self._count * torch.outer(self._mean, self._mean)


def ratio(products: Tensor, a: int, b: int) -> float | None:
    """Returns the product of two vectors over that of their lengths; None where one has no length."""
    lengths = math.sqrt(float(products[a, a])) * math.sqrt(float(products[b, b]))
    return max(-1.0, min(1.0, float(products[a, b]) / lengths)) if lengths > 0 else None
