"""The merging methods. Each takes one parameter of all models in blocks, and gives the merged parameter in the same blocks.

What a method has to know of whole tensors it finds by iterating over the blocks before, so that a whole tensor is the case of one
block. Where a method needs a base, it is the first tensor of every block. A task vector is what a model adds to the base: its
tensor minus the base's. `weight`, `density`, `scale` (mergekit's `lambda`) and `t` mean what they mean in mergekit.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from profuser.merge.blocks import Blocks
from profuser.merge.trim import trims

Keep = Callable[[Tensor], Tensor] | None
"""What sets elements of a task vector to 0. It gets the vector's blocks in their order. None keeps all."""

PARALLEL = 0.9995
"""Tensors with a cosine beyond this one, or below its negative, are interpolated linearly by `slerp`, as in mergekit."""


def linear(blocks: Blocks, weights: Sequence[float], *, normalize: bool = True) -> Iterator[Tensor]:
    """The weighted sum (model soups, arXiv 2203.05482). With `normalize` it is divided by the sum of the weights.

    Raises:
        ValueError: the weights add up to 0 and should be normalised.
    """
    total = sum(weights)
    if normalize and abs(total) < 1e-8:
        raise ValueError("weights must not add up to 0 where they are normalised; change one, or set normalize: false")
    for tensors in blocks:
        merged = _sum(weights, tensors)
        yield merged.div_(total) if normalize else merged


def slerp(blocks: Blocks, t: float) -> Iterator[Tensor]:
    """Spherical interpolation from the first tensor (t = 0) to the second (t = 1), each taken as one vector.

    The angle is that between the directions; the coefficients are applied to the tensors themselves, as in mergekit.
    """
    between = cosine(blocks)
    if abs(between) > PARALLEL:
        shares = [1 - t, t]
    else:
        angle = math.acos(between)
        shares = [math.sin(share * angle) / math.sin(angle) for share in (1 - t, t)]
    return linear(blocks, shares, normalize=False)


def cosine(blocks: Blocks) -> float:
    """The cosine of two tensors that are taken as vectors, summed in fp64; 0 where one has no length."""
    products = torch.zeros(3, dtype=torch.float64)
    for a, b in blocks:
        x, y = a.double().reshape(-1), b.double().reshape(-1)
        products += torch.stack([x @ x, y @ y, x @ y])
    xx, yy, xy = products.tolist()
    norms = [norm if norm > 1e-8 else 1.0 for norm in (math.sqrt(xx), math.sqrt(yy))]
    return xy / norms[0] / norms[1]


def task_arithmetic(
    blocks: Blocks, weights: Sequence[float], *, scale: float = 1.0, normalize: bool = False
) -> Iterator[Tensor]:
    """The base plus the weighted sum of the task vectors (arXiv 2212.04089)."""
    return _added(blocks, [None] * len(weights), weights, scale, normalize)


def dare_linear(
    blocks: Blocks,
    weights: Sequence[float],
    densities: Sequence[float],
    generator: torch.Generator,
    *,
    scale: float = 1.0,
    normalize: bool = False,
) -> Iterator[Tensor]:
    """Task arithmetic with task vectors of which a random share is kept and enlarged (DARE, arXiv 2311.03099)."""
    return _added(blocks, drops(blocks, densities, generator), weights, scale, normalize)


def ties(
    blocks: Blocks,
    weights: Sequence[float],
    densities: Sequence[float],
    *,
    scale: float = 1.0,
    normalize: bool = True,
) -> Iterator[Tensor]:
    """TIES (arXiv 2306.01708): trims the task vectors by magnitude, elects signs, and adds what has the elected sign."""
    return _elected(blocks, trims(blocks, densities), weights, scale, normalize)


def dare_ties(
    blocks: Blocks,
    weights: Sequence[float],
    densities: Sequence[float],
    generator: torch.Generator,
    *,
    scale: float = 1.0,
    normalize: bool = False,
) -> Iterator[Tensor]:
    """TIES with task vectors of which a random share is kept and enlarged (DARE, arXiv 2311.03099)."""
    return _elected(blocks, drops(blocks, densities, generator), weights, scale, normalize)


def drops(blocks: Blocks, densities: Sequence[float], generator: torch.Generator) -> list[Keep]:
    """For every task vector what keeps a random share of it.

    The random numbers are those that the generator gives for one whole vector after the other, whatever the blocks are. So each
    vector has a generator of its own, which begins behind the numbers for the vectors before it.
    """
    found: list[Keep] = []
    for n, density in enumerate(densities):
        if density >= 1:
            found.append(None)
            continue
        found.append(functools.partial(dropped_at_random, density=density, generator=generator.clone_state()))
        for base, *_ in blocks if min(densities[n + 1 :], default=1) < 1 else ():
            torch.rand(base.shape, generator=generator)
    return found


def dropped_at_random(delta: Tensor, density: float, generator: torch.Generator) -> Tensor:
    """Keeps each element with probability `density`, and enlarges what is kept so that its expected value is the same."""
    kept = torch.rand(delta.shape, generator=generator, dtype=torch.float32) < density
    return (delta * kept).div_(density)


def _sum(weights: Sequence[float], tensors: Iterable[Tensor]) -> Tensor:
    """A weighted sum, for which only one tensor has to be in memory at a time."""
    parts = zip(weights, tensors, strict=True)
    weight, tensor = next(parts)
    total = tensor * weight
    for weight, tensor in parts:
        total.add_(tensor, alpha=weight)
    return total


def _deltas(keeps: Sequence[Keep], base: Tensor, tensors: Sequence[Tensor]) -> Iterator[Tensor]:
    """The blocks of the task vectors, or what is kept of them."""
    for keep, tensor in zip(keeps, tensors, strict=True):
        yield tensor - base if keep is None else keep(tensor - base)


def _added(
    blocks: Blocks, keeps: Sequence[Keep], weights: Sequence[float], scale: float, normalize: bool
) -> Iterator[Tensor]:
    """The base plus the weighted sum of what is kept of the task vectors."""
    divisor = sum(weights)
    for base, *tensors in blocks:
        total = _sum(weights, _deltas(keeps, base, tensors))
        if normalize and abs(divisor) >= 1e-8:
            total.div_(divisor)
        yield total.mul_(scale).add_(base)


def _elected(
    blocks: Blocks, keeps: Sequence[Keep], weights: Sequence[float], scale: float, normalize: bool
) -> Iterator[Tensor]:
    """The base plus those elements of the weighted task vectors that have the sign of their sum."""
    for base, *tensors in blocks:
        deltas = [delta.mul_(weight) for delta, weight in zip(_deltas(keeps, base, tensors), weights, strict=True)]
        total = deltas[0].clone()
        for delta in deltas[1:]:
            total.add_(delta)
        sign = torch.copysign(torch.ones_like(total), total)
        merged, divisor = torch.zeros_like(total), torch.zeros_like(total)
        for delta, weight in zip(deltas, weights, strict=True):
            agreeing = delta.mul_(sign).clamp_min_(
                0
            )  # its magnitude where it has the elected sign, and NaN where it is NaN
            merged.add_(agreeing)
            divisor.add_(agreeing.sign_(), alpha=weight)
        if normalize:
            merged.div_(divisor.add_(1 - divisor.sign().abs_()))  # by 1 where no model agrees
        yield merged.mul_(sign).mul_(scale).add_(base)
