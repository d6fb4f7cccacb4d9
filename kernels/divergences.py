"""The divergences: what a target's distribution Q costs beside a source's P, by name.

Both are distributions over the same few parts: the kept ids, and the bucket of all the others. `divergences_torch.py` and
`divergences_triton.py` compute them. `reference.py` has the values once more, on purpose, and its gradients by autograd.

β is `divergence_beta`. M, the mixture, is βP + (1 − β)Q for `jsd` and `skew_kl`, (1 − β)P + βQ for `skew_reverse_kl`:

    forward_kl         KL(P ‖ Q)
    reverse_kl         KL(Q ‖ P)
    jsd                β·KL(P ‖ M) + (1 − β)·KL(Q ‖ M); at β = 0 it is forward_kl, at β = 1 reverse_kl (arXiv 2306.13649, as in TRL)
    skew_kl            KL(P ‖ M), β being the paper's α (arXiv 2402.03898)
    skew_reverse_kl    KL(Q ‖ M), likewise
    tvd                ½ Σ |P − Q|
"""

from typing import Final, Literal, get_args

from .tails import BUCKET, CONDITIONAL, RENORMALIZE

Divergence = Literal["forward_kl", "reverse_kl", "jsd", "skew_kl", "skew_reverse_kl", "tvd"]
DIVERGENCES: tuple[Divergence, ...] = get_args(Divergence)

FORWARD_KL: Final = "forward_kl"
REVERSE_KL: Final = "reverse_kl"
JSD: Final = "jsd"
SKEW_KL: Final = "skew_kl"
SKEW_REVERSE_KL: Final = "skew_reverse_kl"
TVD: Final = "tvd"

WITH_BETA = (JSD, SKEW_KL, SKEW_REVERSE_KL)
"""Those that read `divergence_beta`."""

TAIL_FLOOR = 1e-6
"""The least mass of the bucket, and of the kept entries together, where the divergence would be infinite at 0. A bucket without mass
costs log(1/TAIL_FLOOR) = 13.8 nats at most."""

ENTRY_FLOOR = 1e-30
"""A kept entry of less mass belongs to the rest where the divergence would be infinite at 0. In fp32 such a p has no digits left."""


def canonical(divergence: str, beta: float) -> str:
    """The member's plain name: at its ends a mixture is one of the two distributions, and a KL without one is left."""
    if (divergence == JSD and beta == 0) or (divergence == SKEW_KL and beta == 0):
        return FORWARD_KL
    if (divergence == JSD and beta == 1) or (divergence == SKEW_REVERSE_KL and beta == 0):
        return REVERSE_KL
    return divergence


def infinite_at_zero(divergence: str) -> bool:
    """Whether a part that the source gives no mass at all makes the (canonical) divergence infinite."""
    return divergence == REVERSE_KL


def check_divergence(divergence: str, beta: float, tail: str) -> None:
    """Raises ValueError unless this divergence with this β is finite on the parts that the tail makes."""
    if divergence not in DIVERGENCES:
        raise ValueError(f"divergence must be one of {DIVERGENCES}, got {divergence!r}; the default is {FORWARD_KL!r}")
    if divergence == JSD and not 0 <= beta <= 1:
        raise ValueError(f"divergence_beta must be in [0, 1] for {JSD!r}, got {beta}; 0.5 is the symmetric one")
    if divergence in (SKEW_KL, SKEW_REVERSE_KL) and not 0 <= beta < 1:
        raise ValueError(
            f"divergence_beta must be in [0, 1) for {divergence!r}, got {beta}; 1 would compare a distribution with itself, "
            "DistiLLM takes 0.1"
        )
    if tail == RENORMALIZE and infinite_at_zero(canonical(divergence, beta)):
        at = f" at divergence_beta={beta}" if divergence in (JSD, SKEW_REVERSE_KL) else ""
        raise ValueError(
            f"divergence={divergence!r}{at} is infinite with tail={RENORMALIZE!r}, where a source has no mass outside its "
            f"entries; use tail={BUCKET!r} or {CONDITIONAL!r}"
        )
