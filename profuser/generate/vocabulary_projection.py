"""The projection of one model's vocabulary onto another's by the rows of their heads (EVA, arXiv 2404.09492).

Tokens of equal spelling are the anchors by which the two spaces of head rows are mapped onto a common one, as VecMap does with a
dictionary (Artetxe, Labaka and Agirre, AAAI 2018: whiten, rotate, re-weight, de-whiten). There every token of the source gets
the most similar tokens of the main model by CSLS (Conneau et al., arXiv 1710.04087), with their similarities as weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from profuser.text.token_bytes import Spelling, TokenBytes

NEIGHBOURS = 10
"""The most tokens of the main model that a source token counts for."""
LEAST_WEIGHT = 0.1
"""Similarities below this one are dropped."""
LEAST_SPREAD, MANY = 0.01, 5
"""A token with more than MANY neighbours whose weights have no larger standard deviation than LEAST_SPREAD has no meaning of its
own, and is dropped."""
CHUNK = 512
"""So many rows are compared with the whole other vocabulary at a time."""


@dataclass(frozen=True, slots=True)
class Projection:
    """The weights with which a source's tokens count for the main model's.

    weights: (V_main, V_source) sparse. anchors: how many tokens are spelt the same in both (TokenBytes.spellings).
    projected, dropped: how many of the source's tokens with bytes count for a token of the main model, and how many for none.
    """

    weights: Tensor
    anchors: int
    projected: int
    dropped: int

    def __call__(self, probabilities: Tensor) -> Tensor:
        """(V_main,), what a distribution (V_source,) says in the main model's vocabulary. Its sum need not be 1."""
        return torch.sparse.mm(self.weights, probabilities[:, None])[:, 0]


def project(
    source: TokenBytes,
    source_head: Tensor,
    main: TokenBytes,
    main_head: Tensor,
    ends: tuple[Sequence[int], int],
    dtype: torch.dtype = torch.float32,
) -> Projection:
    """Computes a projection on the device of the main head.

    Args:
        source_head: (V_source, D_source), the weight of the source's head. main_head: (V_main, D_main).
        ends: the source's end tokens, and the token of the main model that all of them count for.
        dtype: in which the similarities are computed. The common space is found in fp64.
    """
    device = main_head.device
    own, place_own = _rows(source, len(source_head))
    others, place_other = _rows(main, len(main_head))
    shared = [spelling for spelling in place_own if spelling in place_other]
    x, z = mapped(
        source_head[own].to(device, torch.float64),
        main_head[others].to(device, torch.float64),
        torch.tensor([(place_own[known], place_other[known]) for known in shared], device=device).reshape(-1, 2),
    )
    x, z = x.to(dtype), z.to(dtype)

    # CSLS with a neighbourhood of one: a main token that is near to many source tokens is not preferred.
    nearest = torch.cat([(rows @ x.T).amax(1) for rows in z.split(CHUNK)])
    indices, values, projected = [], [], 0
    for number, rows in enumerate(x.split(CHUNK)):
        similarity, token = (2 * (rows @ z.T) - nearest).topk(min(NEIGHBOURS, len(z)), dim=1)
        keep = similarity >= LEAST_WEIGHT
        count = keep.sum(1)
        mean = (similarity * keep).sum(1) / count.clamp(min=1)
        spread = (((similarity - mean[:, None]) ** 2 * keep).sum(1) / count.clamp(min=1)).sqrt()
        keep &= ~((spread <= LEAST_SPREAD) & (count > MANY))[:, None]
        row, column = keep.nonzero(as_tuple=True)
        indices.append(torch.stack([token[row, column], row + number * CHUNK]))
        values.append(similarity[row, column])
        projected += int(keep.any(1).sum())

    # From the rows that were compared to token ids, and the ends of a turn.
    main_ids, own_ids = torch.cat(indices, dim=1).cpu()
    main_ids = torch.cat([torch.tensor(others)[main_ids], torch.full((len(ends[0]),), ends[1])])
    own_ids = torch.cat([torch.tensor(own)[own_ids], torch.tensor(list(ends[0]), dtype=torch.long)])
    weights = torch.sparse_coo_tensor(
        torch.stack([main_ids, own_ids]),
        torch.cat([torch.cat(values).cpu(), torch.ones(len(ends[0]))]).float(),
        (len(main_head), len(source_head)),
        check_invariants=True,
    )
    return Projection(weights.coalesce().to(device), len(shared), projected, len(own) - projected)


def mapped(x: Tensor, z: Tensor, anchors: Tensor) -> tuple[Tensor, Tensor]:
    """Both sets of vectors in a common space, with length 1. `anchors` (A, 2) are the pairs of rows that mean the same.

    The rotation is found in the coordinates that whitening keeps. In all of them, of which more may be empty than not where anchors are
    few, LAPACK's decomposition need not converge.
    """
    x, z = _normalised(x), _normalised(z)
    xa, x_scale, x_axes = _decomposed(x[anchors[:, 0]])
    za, z_scale, z_axes = _decomposed(z[anchors[:, 1]])
    u, s, vt = torch.linalg.svd(xa.T @ za, full_matrices=False)
    v = vt.T
    x = (x @ (x_axes / x_scale) @ u * s.sqrt()) @ (u.T * x_scale @ u)
    z = (z @ (z_axes / z_scale) @ v * s.sqrt()) @ (v.T * z_scale @ v)
    return _unit(x), _unit(z)


def _normalised(vectors: Tensor) -> Tensor:
    vectors = _unit(vectors)
    return _unit(vectors - vectors.mean(0))


def _unit(vectors: Tensor) -> Tensor:
    return torch.nn.functional.normalize(vectors, dim=1)


def _decomposed(vectors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The vectors with uncorrelated coordinates of one scale (A, R), the scale of each, and the axes (D, R) on which they are measured.

    Dimensions in which the vectors do not differ are left out, as where there are fewer anchors than dimensions.
    """
    u, s, vt = torch.linalg.svd(vectors, full_matrices=False)
    kept = s > 1e-10 * (s[0] if len(s) else 0)
    return u[:, kept], s[kept], vt[kept].T


def _rows(tokens: TokenBytes, size: int) -> tuple[list[int], dict[Spelling, int]]:
    """The tokens that have bytes and a row in the head, and where each spelling stands among them."""
    known = {spelling: i for i, spelling in enumerate(tokens.spellings[:size]) if spelling is not None}
    return [*known.values()], {spelling: place for place, spelling in enumerate(known)}
