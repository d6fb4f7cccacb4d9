"""The merging methods, as plain functions of the tensors of one parameter.

All of them compute in fp32 (fp64 for fp64 tensors) and return that dtype. `weight`, `density`, `scale` (mergekit's `lambda`)
and `t` mean what they mean in mergekit. A task vector is what a model adds to the base: its tensor minus the base's.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

PARALLEL = 0.9995
"""Tensors with a cosine beyond this one, or below its negative, are interpolated linearly by `slerp`, as in mergekit."""

BLOCK = 1 << 20
"""So many elements are converted to fp64 at a time."""


def computed(tensor: Tensor) -> Tensor:
    """The tensor in the dtype of the computation."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def linear(tensors: Iterable[Tensor], weights: Sequence[float], *, normalize: bool = True) -> Tensor:
    """The weighted sum (model soups, arXiv 2203.05482). With `normalize` it is divided by the sum of the weights.

    Raises:
        ValueError: the weights add up to 0 and should be normalised.
    """
    total = sum(weights)
    if normalize and abs(total) < 1e-8:
        raise ValueError("weights must not add up to 0 where they are normalised; change one, or set normalize: false")
    merged = _sum((weight, computed(tensor)) for weight, tensor in zip(weights, tensors, strict=True))
    return merged.div_(total) if normalize else merged


def slerp(first: Tensor, second: Tensor, t: float) -> Tensor:
    """Spherical interpolation from `first` (t = 0) to `second` (t = 1), each tensor taken as one vector.

    The angle is that between the directions; the coefficients are applied to the tensors themselves, as in mergekit.
    """
    a, b = computed(first), computed(second)
    norms = [norm if norm > 1e-8 else 1.0 for norm in (math.sqrt(_dot(x, x)) for x in (a, b))]
    cosine = _dot(a, b) / norms[0] / norms[1]
    if abs(cosine) > PARALLEL:
        return a.mul(1 - t).add_(b, alpha=t)
    angle = torch.acos(torch.tensor(cosine, dtype=torch.float64))
    shares = (float(torch.sin(share * angle) / torch.sin(angle)) for share in (1 - t, t))
    return a.mul(next(shares)).add_(b, alpha=next(shares))


def _dot(a: Tensor, b: Tensor) -> float:
    """The inner product of two tensors in fp64, block by block, so that no copy of them is made."""
    blocks = zip(a.flatten().split(BLOCK), b.flatten().split(BLOCK))
    return sum(float(x.double() @ y.double()) for x, y in blocks)


def task_arithmetic(
    base: Tensor, tensors: Iterable[Tensor], weights: Sequence[float], *, scale: float = 1.0, normalize: bool = False
) -> Tensor:
    """The base plus the weighted sum of the task vectors (arXiv 2212.04089)."""
    return _added(base, _deltas(base, tensors), weights, scale, normalize)


def dare_linear(
    base: Tensor,
    tensors: Iterable[Tensor],
    weights: Sequence[float],
    densities: Sequence[float],
    generator: torch.Generator,
    *,
    scale: float = 1.0,
    normalize: bool = False,
) -> Tensor:
    """Task arithmetic with task vectors of which a random share is kept and enlarged (DARE, arXiv 2311.03099)."""
    return _added(base, _dropped(base, tensors, densities, generator), weights, scale, normalize)


def ties(
    base: Tensor,
    tensors: Iterable[Tensor],
    weights: Sequence[float],
    densities: Sequence[float],
    *,
    scale: float = 1.0,
    normalize: bool = True,
) -> Tensor:
    """TIES (arXiv 2306.01708): trims the task vectors by magnitude, elects signs, and adds what has the elected sign."""
    trimmed = (largest(delta, density) for delta, density in zip(_deltas(base, tensors), densities, strict=True))
    return _elected(base, trimmed, weights, scale, normalize)


def dare_ties(
    base: Tensor,
    tensors: Iterable[Tensor],
    weights: Sequence[float],
    densities: Sequence[float],
    generator: torch.Generator,
    *,
    scale: float = 1.0,
    normalize: bool = False,
) -> Tensor:
    """TIES with task vectors of which a random share is kept and enlarged (DARE, arXiv 2311.03099)."""
    return _elected(base, _dropped(base, tensors, densities, generator), weights, scale, normalize)


def widen(base: Tensor, tensors: Sequence[Tensor], *, by_row: bool = False) -> Tensor:
    """WIDEN (arXiv 2408.03092): the base plus task vectors that are weighted by how much each column changes in each model.

    A column is the weights that leave one input; its magnitude changes by |‖w‖ - ‖w_0‖|, its direction by 1 - cos(w, w_0).
    Within a model both changes are ranked over the columns, as shares in [0, 1), and a softmax over the models turns the ranks
    into importances. An importance is 1 where the rank is above the model's mean. A column's weight is the mean of the two.
    The elements of a vector are ranked by |w - w_0|.

    Args:
        by_row: the tensor is a table of token embeddings, whose rows take the place of columns.
    """
    w0 = computed(base)
    deltas = [computed(tensor) - w0 for tensor in tensors]
    if w0.dim() < 2:
        (importance,) = _importances([delta.abs().reshape(1, -1) for delta in deltas])
        weights = [of_model.reshape(w0.shape) for of_model in importance]
    else:
        matrices = [w0.reshape(w0.shape[0], -1), *(computed(tensor).reshape(w0.shape[0], -1) for tensor in tensors)]
        dim = 1 if by_row else 0
        norms = [matrix.norm(dim=dim) for matrix in matrices]
        magnitude = [(norm - norms[0]).abs() for norm in norms[1:]]
        direction = [1 - torch.nn.functional.cosine_similarity(matrix, matrices[0], dim=dim) for matrix in matrices[1:]]
        both = _importances([torch.stack(changes) for changes in zip(magnitude, direction, strict=True)])
        shape = (-1, *[1] * (w0.dim() - 1)) if by_row else (1, *w0.shape[1:])
        weights = [(m + d).div_(2).reshape(shape) for m, d in zip(*both, strict=True)]
    merged = w0.clone()
    for weight, delta in zip(weights, deltas, strict=True):
        merged.addcmul_(weight, delta)
    return merged


def largest(delta: Tensor, density: float) -> Tensor:
    """Sets all but the largest share of the elements to 0. At least one element is kept."""
    if density >= 1:
        return delta
    kept = max(1, int(density * delta.numel()))
    flat = delta.reshape(-1)
    trimmed = torch.zeros_like(flat)
    at = flat.abs().topk(kept).indices
    trimmed[at] = flat[at]
    return trimmed.reshape(delta.shape)


def dropped_at_random(delta: Tensor, density: float, generator: torch.Generator) -> Tensor:
    """Keeps each element with probability `density`, and enlarges what is kept so that its expected value is the same."""
    if density >= 1:
        return delta
    kept = torch.rand(delta.shape, generator=generator, dtype=torch.float32) < density
    return (delta * kept).div_(density)


def _deltas(base: Tensor, tensors: Iterable[Tensor]) -> Iterator[Tensor]:
    w0 = computed(base)
    for tensor in tensors:
        yield computed(tensor) - w0


def _dropped(
    base: Tensor, tensors: Iterable[Tensor], densities: Sequence[float], generator: torch.Generator
) -> Iterator[Tensor]:
    for delta, density in zip(_deltas(base, tensors), densities, strict=True):
        yield dropped_at_random(delta, density, generator)


def _sum(parts: Iterator[tuple[float, Tensor]]) -> Tensor:
    """A weighted sum, for which only one part is in memory at a time."""
    weight, tensor = next(parts)
    total = tensor * weight
    for weight, tensor in parts:
        total.add_(tensor, alpha=weight)
    return total


def _added(base: Tensor, deltas: Iterable[Tensor], weights: Sequence[float], scale: float, normalize: bool) -> Tensor:
    total = _sum(zip(weights, deltas, strict=True))
    divisor = sum(weights)
    if normalize and abs(divisor) >= 1e-8:
        total.div_(divisor)
    return total.mul_(scale).add_(computed(base))


def _elected(base: Tensor, deltas: Iterable[Tensor], weights: Sequence[float], scale: float, normalize: bool) -> Tensor:
    """Adds of the weighted task vectors the elements that have the sign of their sum."""
    weighted = [delta.mul(weight) for delta, weight in zip(deltas, weights, strict=True)]
    total = weighted[0].clone()
    for delta in weighted[1:]:
        total.add_(delta)
    sign = torch.where(total >= 0, 1.0, -1.0).to(total.dtype)
    merged, divisor = torch.zeros_like(total), torch.zeros_like(total)
    for delta, weight in zip(weighted, weights, strict=True):
        agrees = delta.sign() == sign
        merged.add_(delta * agrees)
        divisor.add_(agrees, alpha=weight)
    if normalize:
        divisor[divisor == 0] = 1
        merged.div_(divisor)
    return merged.mul_(scale).add_(computed(base))


def _importances(changes: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """For each kind of change the importance of every column in every model.

    Args:
        changes: of each model, its changes (kinds, n).
    """
    for of_kind in zip(*changes, strict=True):
        n = of_kind[0].numel()
        ranks = torch.stack([change.argsort(stable=True).argsort(stable=True) for change in of_kind])
        importance = (ranks / n).softmax(0)
        importance[2 * ranks > n - 1] = 1.0  # the mean of the ranks 0 to n - 1 is (n - 1) / 2
        yield list(importance.to(of_kind[0].dtype))
